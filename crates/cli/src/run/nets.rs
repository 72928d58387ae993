//! `--net`.

use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};
use vmm::link::Link;
use vmm::virtio::Device;
use vmm::virtio::net::Net;

/// One network card as the user names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NetArg {
    /// Where it is plugged in.
    pub(crate) plug: Plug,
    /// Its address; without, one that is made of what it is plugged into.
    pub(crate) mac: Option<[u8; 6]>,
}

/// Where a card is plugged in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Plug {
    /// A tap interface.
    Tap(String),
    /// A user-mode network's socket.
    Socket(PathBuf),
}

/// Parses `tap=NAME[,mac=ADDRESS]` and `socket=PATH[,mac=ADDRESS]`.
pub(crate) fn parse(text: &str) -> Result<NetArg, String> {
    let (mut plug, mut mac) = (None, None);
    for word in text.split(',') {
        match word.split_once('=') {
            Some(("tap", name)) if plug.is_none() && !name.is_empty() => {
                plug = Some(Plug::Tap(name.to_owned()))
            }
            Some(("socket", path)) if plug.is_none() && !path.is_empty() => {
                plug = Some(Plug::Socket(path.into()))
            }
            Some(("mac", address)) => {
                mac = Some(parse_mac(address).ok_or("an address is six bytes such as 02:00:00:00:00:01")?);
            }
            _ => return Err(format!("`{word}` is none of tap=NAME, socket=PATH, mac=ADDRESS")),
        }
    }
    Ok(NetArg { plug: plug.ok_or("tap=NAME or socket=PATH is expected")?, mac })
}

/// Six bytes, and not a group's address.
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|byte| if byte.len() == 2 { u8::from_str_radix(byte, 16).ok() } else { None })
        .collect();
    bytes?.try_into().ok().filter(|mac: &[u8; 6]| mac[0] & 1 == 0)
}

/// Plugs all cards in.
pub(crate) fn open(nets: &[NetArg]) -> vmm::Result<Vec<Box<dyn Device>>> {
    nets.iter()
        .enumerate()
        .map(|(number, net)| {
            let (link, name) = match &net.plug {
                Plug::Tap(name) => (Link::tap(name)?, name.clone()),
                Plug::Socket(path) => (Link::connect(path)?, path.display().to_string()),
            };
            let mac = net.mac.unwrap_or_else(|| derived(Path::new(&name), number));
            Ok(Box::new(Net::new(link, mac, number)) as Box<dyn Device>)
        })
        .collect()
}

/// A locally administered address, the same for the same place.
fn derived(place: &Path, number: usize) -> [u8; 6] {
    let hash = Sha256::digest(format!("{} {number}", place.display()));
    [0x02, hash[0], hash[1], hash[2], hash[3], hash[4]]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_is_plugged_in_somewhere() {
        let tap = Plug::Tap("tap0".into());
        assert_eq!(parse("tap=tap0"), Ok(NetArg { plug: tap.clone(), mac: None }));
        let mac = Some([2, 0, 0, 0, 0, 0xff]);
        assert_eq!(parse("mac=02:00:00:00:00:ff,tap=tap0"), Ok(NetArg { plug: tap, mac }));
        let socket = Plug::Socket("/run/passt".into());
        assert_eq!(parse("socket=/run/passt"), Ok(NetArg { plug: socket, mac: None }));
        for wrong in [
            "",
            "tap",
            "tap=",
            "tap=a,socket=b",
            "mac=02:00:00:00:00:ff",
            "tap=a,mac=01:00:00:00:00:00",
            "tap=a,mac=2:0:0:0:0:0",
            "user",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
