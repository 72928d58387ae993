//! `--vsock`.

use std::path::PathBuf;

/// A guest's address unless `cid=` says another one: the first that is not reserved.
const CID: u32 = 3;

/// The sockets between guest and host as the user wants them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum VsockArg {
    /// None.
    Off,
    /// A device.
    On {
        /// The guest's address.
        cid: u32,
        /// Where the host's programs connect.
        socket: Option<PathBuf>,
    },
}

impl VsockArg {
    /// What there is when nothing was said.
    pub(crate) const DEFAULT: Self = Self::On { cid: CID, socket: None };
}

/// Parses `off` and `cid=N,socket=PATH`, of which both may be missing.
pub(crate) fn parse(text: &str) -> Result<VsockArg, String> {
    if text == "off" {
        return Ok(VsockArg::Off);
    }
    let (mut cid, mut socket) = (None, None);
    for word in text.split(',') {
        match word.split_once('=') {
            Some(("cid", number)) if cid.is_none() => {
                let number = number.parse().ok().filter(|number| (3..u32::MAX).contains(number));
                cid = Some(number.ok_or("an address is a number from 3 on")?);
            }
            Some(("socket", path)) if socket.is_none() && !path.is_empty() => socket = Some(path.into()),
            _ => return Err(format!("`{word}` is none of cid=N, socket=PATH, off")),
        }
    }
    Ok(VsockArg::On { cid: cid.unwrap_or(CID), socket })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vsock_has_an_address_and_a_socket() {
        assert_eq!(parse("off"), Ok(VsockArg::Off));
        assert_eq!(parse("cid=7"), Ok(VsockArg::On { cid: 7, socket: None }));
        let both = VsockArg::On { cid: 9, socket: Some("/tmp/v".into()) };
        assert_eq!(parse("socket=/tmp/v,cid=9"), Ok(both));
        for wrong in ["", "on", "cid=2", "cid=4294967295", "cid=x", "cid=3,cid=4", "socket="] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
