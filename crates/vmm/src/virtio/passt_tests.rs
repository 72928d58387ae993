//! A true passt behind a network card, whose thread is confined as it is in a run.

use std::path::PathBuf;
use std::process::Child;
use std::time::{Duration, Instant};

use super::net::Net;
use super::testing::{Driver, Part};
use crate::link::Link;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
/// Where the frame's parts begin.
const IP: usize = 14;
const UDP: usize = IP + 20;
const DHCP: usize = UDP + 8;
const OPTIONS: usize = DHCP + 240;
const DISCOVER: u8 = 1;
const OFFER: u8 = 2;

/// A client's question for an address, to everybody.
fn discover() -> Vec<u8> {
    let mut frame = [&[0xff; 6][..], &MAC, &[8, 0]].concat();
    let options = [53, 1, DISCOVER, 255];
    let len = OPTIONS - IP + options.len();
    let field = |len: usize| u16::try_from(len).unwrap().to_be_bytes();
    let mut ip = [0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];
    ip[2..4].copy_from_slice(&field(len));
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let sum = !(sum + (sum >> 16));
    ip[10..12].copy_from_slice(&sum.to_be_bytes()[2..]);
    frame.extend(ip);
    frame.extend([0, 68, 0, 67]);
    frame.extend(field(len - 20));
    frame.extend([0, 0]);
    // A request over Ethernet, the transaction's number, and the wish for an answer to everybody.
    frame.extend([1, 1, 6, 0, 0x12, 0x34, 0x56, 0x78, 0, 0, 0x80, 0]);
    frame.extend([0; 16]);
    frame.extend(MAC);
    frame.resize(OPTIONS - 4, 0);
    frame.extend([99, 130, 83, 99]);
    frame.extend(options);
    frame
}

/// The address that a frame offers, if that is what it is.
fn offered(frame: &[u8]) -> Option<[u8; 4]> {
    let is = |at: usize, bytes: &[u8]| frame.get(at..at + bytes.len()) == Some(bytes);
    let answers = is(12, &[8, 0]) && is(IP + 9, &[17]) && is(UDP, &[0, 67, 0, 68]);
    if !answers || !is(DHCP + 4, &[0x12, 0x34, 0x56, 0x78]) {
        return None;
    }
    let options = frame.get(OPTIONS..)?;
    let offer = options.windows(3).any(|three| three == [53, 1, OFFER]);
    frame.get(DHCP + 16..DHCP + 20).filter(|_| offer)?.try_into().ok()
}

fn ends(mut child: Child) {
    let deadline = Instant::now() + Duration::from_secs(20);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < deadline, "passt outlives its card");
        std::thread::sleep(Duration::from_millis(10));
    };
    assert!(status.success(), "passt: {status}");
}

#[test]
fn passt_offers_the_guest_an_address_and_ends_with_its_card() {
    let places = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&places).map(|place| place.join("passt")).find(|path| path.is_file());
    let Some(program): Option<PathBuf> = found else {
        eprintln!("skipped: passt is not installed (Debian: apt install passt)");
        return;
    };
    let (link, child) = Link::passt(&program, &[]).unwrap();
    let mut driver = Driver::new(Box::new(Net::new(link, MAC, 0)));
    driver.start(u64::MAX);
    driver.give(1, &[Part::Read(&[0; 12]), Part::Read(&discover())]);
    driver.take(1).unwrap();
    // What else a network says comes in between.
    let offer = (0..20).find_map(|_| {
        let at = driver.give(0, &[Part::Write(2048)]);
        let len = driver.take(0).expect("a frame");
        offered(driver.bytes(at[0], len).get(12..).unwrap_or_default())
    });
    let address = offer.expect("passt offers an address");
    assert_ne!(address, [0; 4]);
    assert!(driver.reports.lock().unwrap().is_empty());
    drop(driver);
    ends(child);
}
