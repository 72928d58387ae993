//! The guest's network cards on the emulated machine. QEMU gives the host a card for each, plugged into what the user
//! named on this machine, and a bridge on the host joins that card with the tap interface of the Realm's.

use std::os::fd::{AsRawFd as _, OwnedFd};

use anyhow::{Result, ensure};
use vmm::link::Link;

use crate::run::nets::{NetArg, NetArgs, Plug, Publish};

/// As many cards as QEMU's root bus has room for beside disks and ports.
const MOST: usize = 8;

/// Joins card N of the host with the Realm's tap interface N, for the first argument's number of cards, and goes on
/// as the program that follows.
const JOIN: &str = "cards=$1; shift; n=0\n\
    fail() { echo \"realm: error: the emulated host's network: $*\" >&2; exit 125; }\n\
    for module in bridge tun; do load-module $module || fail \"no module $module\"; done\n\
    echo 1 2>/dev/null >/proc/sys/net/ipv6/conf/default/disable_ipv6\n\
    while [ $n -lt $cards ]; do\n\
    \ttunctl -t realm$n >/dev/null && brctl addbr bridge$n &&\n\
    \t\tbrctl addif bridge$n eth$n && brctl addif bridge$n realm$n || fail \"cannot join eth$n and realm$n\"\n\
    \tfor part in eth$n realm$n bridge$n; do ip link set $part up || fail \"$part stays down\"; done\n\
    \tn=$((n + 1))\n\
    done\n\
    exec \"$@\"";

/// QEMU's words for the cards, and the files that it is to find open: what a card is plugged into is opened here, so that
/// a mistake is told in the same words as on a machine with the device. (QEMU goes on without a network where nobody listens
/// at a socket.)
pub(super) fn cards(nets: &NetArgs) -> Result<(Vec<String>, Vec<OwnedFd>)> {
    nets.check().map_err(anyhow::Error::msg)?;
    ensure!(nets.cards.len() <= MOST, "the emulated machine takes {MOST} network cards at most");
    let (mut words, mut files) = (Vec::new(), Vec::new());
    for (number, card) in nets.cards.iter().enumerate() {
        let file = match &card.plug {
            Plug::User => None,
            Plug::Tap(name) => Some(Link::tap(name)?.into_fd()),
            Plug::Socket(path) => Some(Link::connect(path)?.into_fd()),
        };
        words.push("-netdev".to_owned());
        words.push(netdev(number, card, &nets.publish, file.as_ref()));
        words.extend(["-device".to_owned(), format!("virtio-net-pci,netdev=card{number},romfile=")]);
        files.extend(file);
    }
    Ok((words, files))
}

fn netdev(number: usize, card: &NetArg, publish: &[Publish], file: Option<&OwnedFd>) -> String {
    let file = file.map_or(-1, |file| file.as_raw_fd());
    match &card.plug {
        Plug::User => publish.iter().fold(format!("user,id=card{number}"), |words, port| {
            let protocol = if port.udp { "udp" } else { "tcp" };
            format!("{words},hostfwd={protocol}:{}:{}-:{}", port.address, port.host, port.guest)
        }),
        Plug::Tap(_) => format!("tap,id=card{number},fd={file}"),
        Plug::Socket(_) => format!("stream,id=card{number},server=off,addr.type=fd,addr.str={file}"),
    }
}

/// The words for `realm run` on the host, one for each card.
pub(super) fn inner(nets: &NetArgs) -> Vec<String> {
    let address = |card: &NetArg, number| card.address(number).map(|byte| format!("{byte:02x}")).join(":");
    nets.cards
        .iter()
        .enumerate()
        .map(|(number, card)| format!("tap=realm{number},mac={}", address(card, number)))
        .collect()
}

/// What to start on the host so that `argv` finds its cards joined.
pub(super) fn joined(nets: &NetArgs, argv: Vec<String>) -> Vec<String> {
    if nets.cards.is_empty() {
        return argv;
    }
    let count = nets.cards.len().to_string();
    ["/bin/sh", "-c", JOIN, "join", &count].map(str::to_owned).into_iter().chain(argv).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::nets::parse;

    #[test]
    fn each_plug_has_its_counterpart_in_qemu() {
        let directory = std::env::temp_dir().join(format!("realm-nets-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("net");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let socket = format!("socket={},mac=02:00:00:00:00:01", path.display());
        let nets = NetArgs {
            cards: ["user", &socket].map(|text| parse(text).unwrap()).to_vec(),
            publish: vec![Publish { address: [127, 0, 0, 1].into(), host: 8080, guest: 80, udp: false }],
        };
        let (words, files) = cards(&nets).unwrap();
        assert_eq!(words[1], "user,id=card0,hostfwd=tcp:127.0.0.1:8080-:80");
        let number = files[0].as_raw_fd();
        assert_eq!(words[5], format!("stream,id=card1,server=off,addr.type=fd,addr.str={number}"));
        let tap = parse("tap=lab").unwrap();
        assert_eq!(netdev(2, &tap, &[], Some(&files[0])), format!("tap,id=card2,fd={number}"));
        assert_eq!(inner(&nets)[1], "tap=realm1,mac=02:00:00:00:00:01");
        assert_eq!(joined(&nets, vec!["x".into()])[4..], ["2", "x"]);
        assert_eq!(joined(&NetArgs::default(), vec!["x".into()]), ["x"]);
        std::fs::remove_file(path).unwrap();
        let error = cards(&nets).unwrap_err().to_string();
        assert!(error.contains("passt --socket"), "{error}");
        std::fs::remove_dir_all(directory).unwrap();
    }
}
