//! `--net` and `--publish`.

use std::path::{Path, PathBuf};
use std::process::Child;
use std::thread::JoinHandle;

use clap::Args;
use vmm::calls;
use vmm::link::Link;
use vmm::seccomp::Confinement;
use vmm::virtio::Device;
use vmm::virtio::net::Net;

/// The user-mode network of a machine that has the device.
const PASST: &str = "passt";

/// The flags.
#[derive(Args, Debug, Clone, Default)]
pub(crate) struct NetArgs {
    /// A network card: `user` for a network of its own behind this machine, which needs no privileges; `tap=NAME` for a
    /// tap interface; `socket=PATH` for what listens there, such as `passt --socket PATH`. `,mac=ADDRESS` sets its
    /// address (may be repeated)
    #[arg(long = "net", value_name = "PLUG[,mac=ADDRESS]", value_parser = parse)]
    pub(crate) cards: Vec<NetArg>,
    /// With --net user: connections to this machine's port HOST go to the guest's port GUEST. They are taken on
    /// 127.0.0.1 unless ADDRESS says otherwise; `/udp` forwards datagrams (may be repeated)
    #[arg(long, value_name = "[ADDRESS:]HOST:GUEST[/udp]", value_parser = parse_publish)]
    pub(crate) publish: Vec<Publish>,
}

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
    /// A network that a process of ours makes, with addresses, names and a way out.
    User,
    /// A tap interface.
    Tap(String),
    /// A user-mode network's socket.
    Socket(PathBuf),
}

/// A port of the guest that is reached by one of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Publish {
    /// Where this machine listens.
    pub(crate) address: std::net::Ipv4Addr,
    /// Its port.
    pub(crate) host: u16,
    /// The guest's port.
    pub(crate) guest: u16,
    /// Datagrams instead of connections.
    pub(crate) udp: bool,
}

impl NetArgs {
    /// Refuses what one flag alone cannot know.
    pub(crate) fn check(&self) -> Result<(), String> {
        let users = self.cards.iter().filter(|card| card.plug == Plug::User).count();
        if users == 0 && !self.publish.is_empty() {
            return Err(
                "--publish needs --net user: ports of other networks are reached by the guest's address"
                    .into(),
            );
        }
        if users > 1 {
            return Err("one --net user is enough: a second one would be the same network again".into());
        }
        Ok(())
    }
}

impl NetArg {
    /// The card's address: given, or derived from where it is plugged in.
    pub(crate) fn address(&self, number: usize) -> [u8; 6] {
        let place = match &self.plug {
            Plug::User => "user".to_owned(),
            Plug::Tap(name) => name.clone(),
            Plug::Socket(path) => path.display().to_string(),
        };
        self.mac.unwrap_or_else(|| derived(Path::new(&place), number))
    }
}

/// Parses `user`, `tap=NAME` or `socket=PATH`, and `mac=ADDRESS`.
pub(crate) fn parse(text: &str) -> Result<NetArg, String> {
    let (mut plug, mut mac) = (None, None);
    for word in text.split(',') {
        match word.split_once('=') {
            None if word == "user" && plug.is_none() => plug = Some(Plug::User),
            Some(("tap", name)) if plug.is_none() && !name.is_empty() => {
                plug = Some(Plug::Tap(name.to_owned()))
            }
            Some(("socket", path)) if plug.is_none() && !path.is_empty() => {
                plug = Some(Plug::Socket(path.into()))
            }
            Some(("mac", address)) => {
                mac = Some(parse_mac(address).ok_or("an address is six bytes such as 02:00:00:00:00:01")?);
            }
            _ => return Err(format!("`{word}` is none of user, tap=NAME, socket=PATH, mac=ADDRESS")),
        }
    }
    Ok(NetArg { plug: plug.ok_or("user, tap=NAME or socket=PATH is expected")?, mac })
}

/// Six bytes, and not a group's address.
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|byte| if byte.len() == 2 { u8::from_str_radix(byte, 16).ok() } else { None })
        .collect();
    bytes?.try_into().ok().filter(|mac: &[u8; 6]| mac[0] & 1 == 0)
}

/// Parses `[ADDRESS:]HOST:GUEST[/udp]`.
fn parse_publish(text: &str) -> Result<Publish, String> {
    let (ports, udp) = match text.split_once('/') {
        None | Some((_, "tcp")) => (text.trim_end_matches("/tcp"), false),
        Some((ports, "udp")) => (ports, true),
        Some(_) => return Err("only /tcp and /udp can be forwarded".into()),
    };
    let mut words = ports.rsplitn(3, ':');
    let mut port = || words.next()?.parse::<u16>().ok().filter(|port| *port > 0);
    let (Some(guest), Some(host)) = (port(), port()) else {
        return Err("two ports are expected, such as 8080:80".into());
    };
    let address = match words.next() {
        Some(address) => address.parse().map_err(|_| format!("`{address}` is no IPv4 address"))?,
        None => std::net::Ipv4Addr::LOCALHOST,
    };
    Ok(Publish { address, host, guest, udp })
}

/// Plugs all cards in.
pub(crate) fn open(nets: &NetArgs, confinement: Confinement) -> vmm::Result<Vec<Box<dyn Device>>> {
    nets.cards
        .iter()
        .enumerate()
        .map(|(number, net)| {
            let link = match &net.plug {
                Plug::User => passt(&nets.publish, confinement)?,
                Plug::Tap(name) => Link::tap(name)?,
                Plug::Socket(path) => Link::connect(path)?,
            };
            Ok(Box::new(Net::new(link, net.address(number), number)) as Box<dyn Device>)
        })
        .collect()
}

/// Starts passt, and says so if it fails.
fn passt(publish: &[Publish], confinement: Confinement) -> vmm::Result<Link> {
    let Some(program) = crate::command::find(PASST) else {
        return Err(vmm::Error::vmm(format!(
            "the user-mode network: {PASST} is not installed; install it (Debian: apt install {PASST}), or use \
             --net tap=NAME or socket=PATH"
        )));
    };
    let (link, child) = Link::passt(&program, &forwards(publish))?;
    watch(child, confinement)?;
    Ok(link)
}

/// Waits for passt's end in a thread that can do nothing else. That its card went away is no failure.
fn watch(mut child: Child, confinement: Confinement) -> vmm::Result<JoinHandle<()>> {
    confinement.prepare()?;
    let filter = confinement.helper(calls![wait4])?;
    let wait = move || {
        if let Err(error) = filter.enter() {
            return crate::ui::say(&format!("nobody watches {PASST}: {error}"));
        }
        if let Some(status) = child.wait().ok().filter(|status| !status.success()) {
            crate::ui::say(&format!("the guest has no network any more: {PASST} ended ({status})"));
        }
    };
    let thread = std::thread::Builder::new().name(PASST.into()).spawn(wait);
    thread.map_err(|error| vmm::Error::os(format_args!("a thread that watches {PASST}"), &error))
}

/// passt's flags for forwarded ports.
fn forwards(publish: &[Publish]) -> Vec<String> {
    publish
        .iter()
        .flat_map(|Publish { address, host, guest, udp }| {
            let flag = if *udp { "--udp-ports" } else { "--tcp-ports" };
            [flag.to_owned(), format!("{address}/{host}:{guest}")]
        })
        .collect()
}

/// A locally administered address, the same for the same place.
fn derived(place: &Path, number: usize) -> [u8; 6] {
    let hash = attest::measure::sha256(format!("{} {number}", place.display()).as_bytes());
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
        assert_eq!(parse("user"), Ok(NetArg { plug: Plug::User, mac: None }));
        for wrong in [
            "",
            "tap",
            "tap=",
            "tap=a,socket=b",
            "user,tap=a",
            "user=x",
            "mac=02:00:00:00:00:ff",
            "tap=a,mac=01:00:00:00:00:00",
            "tap=a,mac=2:0:0:0:0:0",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn ports_are_published_on_this_machine_alone_unless_an_address_says_more() {
        let port =
            |address: [u8; 4], host, guest, udp| Ok(Publish { address: address.into(), host, guest, udp });
        assert_eq!(parse_publish("8080:80"), port([127, 0, 0, 1], 8080, 80, false));
        assert_eq!(parse_publish("0.0.0.0:53:53/udp"), port([0, 0, 0, 0], 53, 53, true));
        assert_eq!(parse_publish("8080:80/tcp"), port([127, 0, 0, 1], 8080, 80, false));
        for wrong in ["", "80", "80:", "0:80", "80:65536", "x:1:2", "1:2/sctp", "1:2:3:4"] {
            assert!(parse_publish(wrong).is_err(), "{wrong}");
        }
        assert_eq!(forwards(&[parse_publish("8080:80").unwrap()]), ["--tcp-ports", "127.0.0.1/8080:80"]);
    }

    #[test]
    fn whoever_waits_for_a_network_that_breaks_needs_no_more_calls_than_it_may_make() {
        let child = std::process::Command::new("sh").args(["-c", "exit 3"]).spawn().unwrap();
        watch(child, Confinement::On).unwrap().join().unwrap();
    }

    #[test]
    fn ports_are_those_of_the_one_user_network() {
        let nets = |cards: &[&str], publish: &[&str]| NetArgs {
            cards: cards.iter().map(|card| parse(card).unwrap()).collect(),
            publish: publish.iter().map(|port| parse_publish(port).unwrap()).collect(),
        };
        nets(&["user", "tap=a"], &["1:2"]).check().unwrap();
        assert!(nets(&["tap=a"], &["1:2"]).check().is_err());
        assert!(nets(&["user", "user"], &[]).check().is_err());
    }
}
