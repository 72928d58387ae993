//! This machine as the outside of a Realm's networks.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

use crate::args::RunArgs;
use crate::run::nets::{NetArg, NetArgs, Plug, Publish};

/// A web server that answers each question with what the guest's own server says to its published port.
pub(super) struct Outside {
    /// Where it listens; the guest finds it at 10.0.2.2.
    pub(super) port: u16,
    published: u16,
    neighbour: PathBuf,
}

impl Outside {
    /// Starts it, and a neighbour on the wire of the guest's second card; they end with the process.
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
        let neighbour = std::env::temp_dir().join(format!("realm-neighbour-{}", std::process::id()));
        let listener = UnixListener::bind(&neighbour)?;
        std::thread::spawn(move || {
            let _ = listener.accept().and_then(|(wire, _)| answer(wire));
        });
        Ok(Self { port, published, neighbour })
    }

    /// The flags of a Realm in this network.
    pub(super) fn flags(&self) -> RunArgs {
        let address = Ipv4Addr::LOCALHOST;
        let nets = NetArgs {
            cards: [Plug::User, Plug::Socket(self.neighbour.clone())]
                .map(|plug| NetArg { plug, mac: None })
                .to_vec(),
            publish: vec![Publish { address, host: self.published, guest: 80, udp: false }],
        };
        RunArgs { nets, ..RunArgs::default() }
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.neighbour);
    }
}

/// Says to whoever asks for any Internet address (ARP) that it is ours.
fn answer(mut wire: UnixStream) -> std::io::Result<()> {
    const OURS: [u8; 6] = [2, 0, 0, 0, 0, 9];
    loop {
        let mut length = [0; 4];
        wire.read_exact(&mut length)?;
        let mut frame = vec![0; usize::try_from(u32::from_be_bytes(length)).unwrap_or(0)];
        wire.read_exact(&mut frame)?;
        // Type ARP; the operation is a question.
        if frame.len() < 42 || frame[12..14] != [8, 6] || frame[20..22] != [0, 1] {
            continue;
        }
        let asker: Vec<u8> = frame[22..32].to_vec();
        let wanted: Vec<u8> = frame[38..42].to_vec();
        frame.truncate(21);
        frame[..6].copy_from_slice(&asker[..6]);
        frame[6..12].copy_from_slice(&OURS);
        let reply = [&frame[..], &[2], &OURS, &wanted, &asker].concat();
        let length = u32::try_from(reply.len()).unwrap_or(0).to_be_bytes();
        wire.write_all(&[&length[..], &reply].concat())?;
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
