//! This machine as the outside of a Realm's user-mode network.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::Result;

use crate::args::RunArgs;
use crate::run::nets::{NetArg, NetArgs, Plug, Publish};

/// A web server that answers each question with what the guest's own server says to its published port.
pub(super) struct Outside {
    /// Where it listens; the guest finds it at 10.0.2.2.
    pub(super) port: u16,
    published: u16,
}

impl Outside {
    /// Starts it; it ends with the process.
    pub(super) fn start() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        // Free now, and QEMU takes it in a moment.
        let published = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        std::thread::spawn(move || {
            for mut guest in listener.incoming().flatten() {
                let page =
                    ask(published).unwrap_or_else(|error| format!("no answer from the guest: {error}\n"));
                let _ = guest.read(&mut [0; 4096]);
                let _ = write!(guest, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n{page}", page.len());
            }
        });
        Ok(Self { port, published })
    }

    /// The flags of a Realm in this network.
    pub(super) fn flags(&self) -> RunArgs {
        let address = Ipv4Addr::LOCALHOST;
        let nets = NetArgs {
            cards: vec![NetArg { plug: Plug::User, mac: None }],
            publish: vec![Publish { address, host: self.published, guest: 80, udp: false }],
        };
        RunArgs { nets, ..RunArgs::default() }
    }
}

/// The page that the guest's server has.
fn ask(port: u16) -> std::io::Result<String> {
    let mut guest = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    guest.set_read_timeout(Some(Duration::from_secs(120)))?;
    guest.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    guest.read_to_string(&mut answer)?;
    Ok(answer.split_once("\r\n\r\n").map_or(answer.clone(), |(_, page)| page.to_owned()))
}
