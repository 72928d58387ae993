//! The guest's network cards on the emulated machine. QEMU gives the host a card for each, plugged into what the user
//! named on this machine, and a bridge on the host joins that card with the tap interface of the Realm's.

use anyhow::{Context as _, Result, ensure};

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

/// QEMU's words for the cards.
pub(super) fn cards(nets: &NetArgs) -> Result<Vec<String>> {
    nets.check().map_err(anyhow::Error::msg)?;
    ensure!(nets.cards.len() <= MOST, "the emulated machine takes {MOST} network cards at most");
    let mut words = Vec::new();
    for (number, card) in nets.cards.iter().enumerate() {
        words.extend(["-netdev".to_owned(), netdev(number, card, &nets.publish)?]);
        words.extend(["-device".to_owned(), format!("virtio-net-pci,netdev=card{number},romfile=")]);
    }
    Ok(words)
}

fn netdev(number: usize, card: &NetArg, publish: &[Publish]) -> Result<String> {
    let quoted = |text: &str| text.replace(',', ",,");
    Ok(match &card.plug {
        Plug::User => publish.iter().fold(format!("user,id=card{number}"), |words, port| {
            let protocol = if port.udp { "udp" } else { "tcp" };
            format!("{words},hostfwd={protocol}:{}:{}-:{}", port.address, port.host, port.guest)
        }),
        Plug::Tap(name) => {
            format!("tap,id=card{number},ifname={},script=no,downscript=no", quoted(name))
        }
        Plug::Socket(path) => {
            let path = path.to_str().context("a socket's path is not UTF-8")?;
            format!("stream,id=card{number},server=off,addr.type=unix,addr.path={}", quoted(path))
        }
    })
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
        let nets = NetArgs {
            cards: ["user", "tap=lab,mac=02:00:00:00:00:01", "socket=/run/a"]
                .map(|text| parse(text).unwrap())
                .to_vec(),
            publish: vec![Publish { address: [127, 0, 0, 1].into(), host: 8080, guest: 80, udp: false }],
        };
        let words = cards(&nets).unwrap();
        assert_eq!(words[1], "user,id=card0,hostfwd=tcp:127.0.0.1:8080-:80");
        assert_eq!(words[5], "tap,id=card1,ifname=lab,script=no,downscript=no");
        assert_eq!(words[9], "stream,id=card2,server=off,addr.type=unix,addr.path=/run/a");
        assert_eq!(inner(&nets)[1], "tap=realm1,mac=02:00:00:00:00:01");
        assert_eq!(joined(&nets, vec!["x".into()])[4..], ["3", "x"]);
        assert_eq!(joined(&NetArgs::default(), vec!["x".into()]), ["x"]);
    }
}
