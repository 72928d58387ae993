//! Devices behind their registers, driven by the rules and against them.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::testing::{Driver, Part, RAM, Script};
use super::{Device, block::Block, console, fs::Fs, net::Net, rng::Rng};
use crate::disk::{Disk, Format};
use crate::layout::RAM_BASE;
use crate::mailbox::mailbox;
use crate::pci::Function;
use crate::share::folder::Folder;

const ALL: u64 = u64::MAX;

/// A file that goes away with the test.
struct Scratch(std::path::PathBuf);

impl Scratch {
    fn new(name: &str, bytes: &[u8]) -> Self {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("realm-{}-{number}-{name}", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0).or_else(|_| std::fs::remove_dir_all(&self.0));
    }
}

fn raw_disk(sectors: usize) -> (Scratch, Box<dyn Device>) {
    let file = Scratch::new("disk", &vec![0; sectors * 512]);
    let disk = Disk::open(&file.0, Format::Raw, false).unwrap();
    (file, Box::new(Block::new(disk, 0)))
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    header
}

/// Does one request; gives its status byte.
fn request(driver: &mut Driver, kind: u32, sector: u64, out: &[u8], space: usize) -> (u8, Vec<u8>) {
    let head = header(kind, sector);
    let mut parts = vec![Part::Read(&head)];
    if !out.is_empty() {
        parts.push(Part::Read(out));
    }
    if space > 0 {
        parts.push(Part::Write(space));
    }
    parts.push(Part::Write(1));
    let at = driver.give(0, &parts);
    driver.take(0).expect("the request comes back");
    let data = if space > 0 { driver.bytes(at[at.len() - 2], space) } else { Vec::new() };
    (driver.bytes(at[at.len() - 1], 1)[0], data)
}

#[test]
fn a_disk_reads_what_was_written_and_refuses_what_is_outside() {
    let (file, device) = raw_disk(64);
    let mut driver = Driver::new(device);
    driver.start(ALL);
    assert_eq!(u64::from_le_bytes(driver.get(0x2000)), 64);
    let data: Vec<u8> = (0..2048u32).map(|n| n.to_le_bytes()[0] ^ 0x5a).collect();
    assert_eq!(request(&mut driver, 1, 7, &data, 0).0, 0);
    assert_eq!(request(&mut driver, 0, 7, &[], 2048), (0, data.clone()));
    assert_eq!(request(&mut driver, 4, 0, &[], 0).0, 0);
    assert_eq!(std::fs::read(&file.0).unwrap()[7 * 512..7 * 512 + 2048], data[..]);
    // The last sector, one after it, an overflowing one, half a sector, an unknown request.
    assert_eq!(request(&mut driver, 0, 63, &[], 512).0, 0);
    assert_eq!(request(&mut driver, 0, 63, &[], 1024).0, 1);
    assert_eq!(request(&mut driver, 1, u64::MAX, &data, 0).0, 1);
    assert_eq!(request(&mut driver, 0, u64::MAX / 512, &[], 512).0, 1);
    assert_eq!(request(&mut driver, 0, 0, &[], 100).0, 1);
    assert_eq!(request(&mut driver, 99, 0, &[], 512).0, 2);
    // Zeroes and discards.
    let mut range = 7u64.to_le_bytes().to_vec();
    range.extend(2u32.to_le_bytes());
    range.extend([0; 4]);
    assert_eq!(request(&mut driver, 13, 0, &range, 0).0, 0);
    let expected = [vec![0; 1024], data[1024..].to_vec()].concat();
    assert_eq!(request(&mut driver, 0, 7, &[], 2048), (0, expected));
    // "May unmap" is for zeroes alone, other flags are unknown, and there is one segment.
    for (kind, flags, status) in [(13, 1, 0), (13, 2, 2), (11, 1, 2), (11, 0x8000_0000u32, 2)] {
        range[12..].copy_from_slice(&flags.to_le_bytes());
        assert_eq!(request(&mut driver, kind, 0, &range, 0).0, status, "{kind} {flags:#x}");
    }
    range[12..].fill(0);
    for kind in [11, 13] {
        assert_eq!(request(&mut driver, kind, 0, &[&range[..], &range[..]].concat(), 0).0, 1);
        assert_eq!(request(&mut driver, kind, 0, &range[..12], 0).0, 1);
    }
    range[..8].copy_from_slice(&64u64.to_le_bytes());
    assert_eq!(request(&mut driver, 11, 0, &range, 0).0, 1);
    assert!(driver.reports.lock().unwrap().is_empty());
}

#[test]
fn a_read_only_disk_is_not_written() {
    let file = Scratch::new("ro", &[7; 1024]);
    let disk = Disk::open(&file.0, Format::Raw, true).unwrap();
    let mut driver = Driver::new(Box::new(Block::new(disk, 0)));
    driver.start(ALL);
    assert_eq!(request(&mut driver, 1, 0, &[1; 512], 0).0, 1);
    assert_eq!(request(&mut driver, 0, 0, &[], 512), (0, vec![7; 512]));
    let mut range = vec![0; 8];
    range.extend(1u32.to_le_bytes());
    range.extend([0; 4]);
    assert_eq!(request(&mut driver, 13, 0, &range, 0).0, 1);
    assert_eq!(request(&mut driver, 11, 0, &range, 0).0, 1);
    assert_eq!(std::fs::read(&file.0).unwrap(), [7; 1024]);
}

#[test]
fn two_writers_of_one_disk_are_refused() {
    let file = Scratch::new("locked", &[0; 512]);
    let _first = Disk::open(&file.0, Format::Raw, false).unwrap();
    assert!(Disk::open(&file.0, Format::Raw, false).is_err());
    assert!(Disk::open(&file.0, Format::Raw, true).is_err());
}

#[test]
fn a_qcow2_image_keeps_what_was_written() {
    let file = Scratch::new("disk.qcow2", &[]);
    crate::disk::create_qcow2(&file.0, 8 << 20).unwrap();
    let open = |read_only| Box::new(Block::new(Disk::open(&file.0, Format::Qcow2, read_only).unwrap(), 0));
    let data: Vec<u8> = (0..200_000u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
    let data = &data[..199_680];
    let mut driver = Driver::new(open(false));
    driver.start(ALL);
    assert_eq!(u64::from_le_bytes(driver.get(0x2000)), (8 << 20) / 512);
    assert_eq!(request(&mut driver, 1, 1001, data, 0).0, 0);
    let mut range = 1001u64.to_le_bytes().to_vec();
    range.extend(1u32.to_le_bytes());
    range.extend([0; 4]);
    assert_eq!(request(&mut driver, 11, 0, &range, 0).0, 0);
    assert_eq!(request(&mut driver, 13, 0, &range, 0).0, 0);
    assert_eq!(request(&mut driver, 4, 0, &[], 0).0, 0);
    drop(driver);
    let mut driver = Driver::new(open(true));
    driver.start(ALL);
    let expected = [vec![0; 512], data[512..].to_vec()].concat();
    assert_eq!(request(&mut driver, 0, 1001, &[], data.len()), (0, expected));
    assert_eq!(request(&mut driver, 1, 1001, &data[..512], 0).0, 1);
}

#[test]
fn random_bytes_come() {
    let mut driver = Driver::new(Box::new(Rng));
    driver.start(ALL);
    let at = driver.give(0, &[Part::Write(64)]);
    assert_eq!(driver.take(0), Some(64));
    assert_ne!(driver.bytes(at[0], 64), [0; 64]);
}

#[test]
fn rings_and_buffers_in_private_memory_are_the_guests_mistake() {
    let private = RAM_BASE + RAM / 2;
    let mut driver = Driver::new(Box::new(Rng));
    driver.start(ALL);
    for address in [private, private - 1, RAM_BASE - 8, u64::MAX - 3, 1 << 32] {
        driver.give_raw(0, &[(address, 16, 2)]);
        assert_eq!(driver.take(0), None, "{address:#x}");
        assert!(driver.reports.lock().unwrap().pop().is_some(), "{address:#x}");
        assert_eq!(driver.status() & 64, 64, "the device needs a reset");
        driver.start(ALL);
        assert_eq!(driver.status(), 15);
    }
    // The same buffer at the shared alias of a shared address works.
    driver.give_raw(0, &[((RAM_BASE + 0x8_0000) | 1 << 32, 16, 2)]);
    assert_eq!(driver.take(0), Some(16));
    // Rings in private memory: the device does not come up.
    driver.reset();
    driver.put(20, &[3]);
    for half in 0..2u32 {
        driver.put(8, &half.to_le_bytes());
        driver.put(12, &[0u32, 3][usize::try_from(half).unwrap()].to_le_bytes());
    }
    driver.put(20, &[11]);
    for offset in [32, 40, 48] {
        driver.put(offset, &private.to_le_bytes());
    }
    driver.put(28, &[1, 0]);
    driver.put(20, &[15]);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
    let report = loop {
        if let Some(report) = driver.reports.lock().unwrap().pop() {
            break report;
        }
        assert!(std::time::Instant::now() < deadline);
        std::thread::yield_now();
    };
    assert!(report.contains("not in shared memory"), "{report}");
    assert_eq!(driver.status() & 64, 64);
}

#[test]
fn a_driver_that_refuses_bounce_buffers_is_refused() {
    let driver = Driver::new(Box::new(Rng));
    driver.put(20, &[3]);
    driver.put(8, &1u32.to_le_bytes());
    driver.put(12, &1u32.to_le_bytes());
    driver.put(20, &[11]);
    assert_eq!(driver.status() & 8, 0);
}

type Heard = Arc<Mutex<Vec<u8>>>;

fn terminal() -> (Box<dyn Device>, crate::mailbox::Sender<console::Size>, Heard) {
    let (sender, input) = mailbox().unwrap();
    let heard = Heard::default();
    let sink = heard.clone();
    let ports = ["", "stream"].map(|name| {
        let sink = sink.clone();
        console::Port {
            name,
            sink: Box::new(move |bytes: &[u8]| {
                sink.lock().unwrap().extend(bytes);
                if bytes == b"question" { b"answer".to_vec() } else { Vec::new() }
            }),
            source: None,
        }
    });
    (Box::new(console::Console::new(ports.into(), input, Some((24, 80)))), sender, heard)
}

fn message(port: u32, event: u16, value: u16) -> Vec<u8> {
    [port.to_le_bytes().to_vec(), event.to_le_bytes().to_vec(), value.to_le_bytes().to_vec()].concat()
}

#[test]
fn a_console_introduces_its_ports_and_carries_their_bytes() {
    let (device, sizes, heard) = terminal();
    let mut driver = Driver::new(device);
    driver.start(ALL);
    let hear = |driver: &mut Driver| {
        let at = driver.give(2, &[Part::Write(64)]);
        let len = driver.take(2).expect("a message");
        driver.bytes(at[0], len)
    };
    driver.give(3, &[Part::Read(&message(0, 0, 1))]);
    assert_eq!(hear(&mut driver), message(0, 1, 0));
    assert_eq!(hear(&mut driver), message(1, 1, 0));
    driver.give(3, &[Part::Read(&message(0, 3, 1))]);
    assert_eq!(hear(&mut driver), message(0, 4, 1));
    assert_eq!(hear(&mut driver), [message(0, 5, 0), vec![80, 0, 24, 0]].concat());
    assert_eq!(hear(&mut driver), message(0, 6, 1));
    driver.give(3, &[Part::Read(&message(1, 3, 1))]);
    assert_eq!(hear(&mut driver), [message(1, 7, 1), b"stream".to_vec()].concat());
    assert_eq!(hear(&mut driver), message(1, 6, 1));
    driver.give(3, &[Part::Read(&message(1, 6, 1))]);
    // Output, and an answer to it.
    driver.give(5, &[Part::Read(b"question")]);
    driver.take(5).unwrap();
    assert_eq!(*heard.lock().unwrap(), b"question");
    let at = driver.give(4, &[Part::Write(4)]);
    assert_eq!(driver.take(4), Some(4));
    assert_eq!(driver.bytes(at[0], 4), b"answ");
    // The terminal changes.
    sizes.send((50, 132));
    assert_eq!(hear(&mut driver), [message(0, 5, 0), vec![132, 0, 50, 0]].concat());
    assert!(driver.reports.lock().unwrap().is_empty());
}

#[test]
fn a_slow_reader_gets_all_of_a_long_input() {
    // The terminal's keys, and a command's input.
    read_slowly(0, 0);
    read_slowly(1, 4);
}

fn read_slowly(number: u32, queue: usize) {
    let (sender, input) = mailbox().unwrap();
    drop(sender);
    let (reader, mut writer) = std::io::pipe().unwrap();
    let mut reader = Some(reader.into());
    let ports = [0, 1].map(|port| {
        let source = if port == number { reader.take() } else { None };
        console::Port { name: "", sink: Box::new(|_: &[u8]| Vec::new()), source }
    });
    let mut driver = Driver::new(Box::new(console::Console::new(ports.into(), input, None)));
    driver.start(ALL);
    driver.give(3, &[Part::Read(&message(number, 6, 1))]);
    driver.take(3).unwrap();
    let sent: Vec<u8> = (0..20_000u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
    let all = sent.clone();
    let thread = std::thread::spawn(move || std::io::Write::write_all(&mut writer, &all));
    let mut got = Vec::new();
    while got.len() < sent.len() {
        let at = driver.give(queue, &[Part::Write(700)]);
        let len = driver.take(queue).expect("more input");
        got.extend(driver.bytes(at[0], len));
    }
    assert_eq!(got, sent);
    thread.join().unwrap().unwrap();
    // The end of it comes as a message.
    let at = driver.give(2, &[Part::Write(64)]);
    let len = driver.take(2).expect("a message");
    assert_eq!(driver.bytes(at[0], len), message(number, 6, 0));
}

#[test]
fn frames_go_both_ways() {
    use std::io::{Read as _, Write as _};
    let (near, mut far) = std::os::unix::net::UnixStream::pair().unwrap();
    let link = crate::link::Link::stream(near).unwrap();
    let mut driver = Driver::new(Box::new(Net::new(link, [2, 0, 0, 0, 0, 1], 0)));
    driver.start(ALL);
    assert_eq!(driver.get::<8>(0x2000), [2, 0, 0, 0, 0, 1, 1, 0]);
    let frame: Vec<u8> = (0..60).collect();
    driver.give(1, &[Part::Read(&[0; 12]), Part::Read(&frame)]);
    driver.take(1).unwrap();
    let mut sent = [0; 64];
    far.read_exact(&mut sent).unwrap();
    assert_eq!(sent[4..], frame[..]);
    // A frame that comes before there is a buffer waits for one.
    for _ in 0..2 {
        far.write_all(&60u32.to_be_bytes()).unwrap();
        far.write_all(&frame).unwrap();
    }
    std::thread::sleep(std::time::Duration::from_millis(20));
    for _ in 0..2 {
        let at = driver.give(0, &[Part::Write(1526)]);
        assert_eq!(driver.take(0), Some(72));
        assert_eq!(driver.bytes(at[0] + 12, 60), frame);
    }
    // One that does not fit is lost; the next one comes.
    far.write_all(&60u32.to_be_bytes()).unwrap();
    far.write_all(&frame).unwrap();
    driver.give(0, &[Part::Write(50)]);
    assert_eq!(driver.take(0), Some(0));
    driver.give(1, &[Part::Read(&[0; 5])]);
    assert_eq!(driver.take(1), None);
    assert!(driver.reports.lock().unwrap()[0].contains("too short"));
}

fn shared_folder() -> Scratch {
    let scratch = Scratch::new("folder", &[]);
    std::fs::remove_file(&scratch.0).unwrap();
    std::fs::create_dir(&scratch.0).unwrap();
    std::fs::write(scratch.0.join("file"), "hello").unwrap();
    scratch
}

#[test]
fn a_folder_is_asked_through_queues_and_answers_where_there_is_room() {
    let folder = shared_folder();
    let server = || Box::new(Folder::open(&folder.0, false).unwrap());
    assert!(Fs::new("", server()).is_err() && Fs::new(&"x".repeat(37), server()).is_err());
    let mut driver = Driver::new(Box::new(Fs::new("tag", server()).unwrap()));
    driver.start(ALL);
    assert_eq!(driver.get::<40>(0x2000)[..4], *b"tag\0");
    assert_eq!(driver.get::<4>(0x2000 + 36), [1, 0, 0, 0]);
    let ask = |opcode: u32, body: &[u8]| {
        let mut request = u32::try_from(40 + body.len()).unwrap().to_le_bytes().to_vec();
        request.extend(opcode.to_le_bytes());
        request.extend(5u64.to_le_bytes());
        request.extend(1u64.to_le_bytes());
        request.extend([0; 16]);
        request.extend(body);
        request
    };
    let at = driver.give(1, &[Part::Read(&ask(1, b"file\0")), Part::Write(16), Part::Write(128)]);
    assert_eq!(driver.take(1), Some(144));
    assert_eq!(driver.bytes(at[1], 16), [&144u32.to_le_bytes()[..], &[0; 4], &5u64.to_le_bytes()].concat());
    // Something to forget has no answer; too little room gets an error instead of a piece.
    driver.give(0, &[Part::Read(&ask(2, &1u64.to_le_bytes()))]);
    assert_eq!(driver.take(0), Some(0));
    let at = driver.give(1, &[Part::Read(&ask(1, b"file\0")), Part::Write(100)]);
    assert_eq!(driver.take(1), Some(16));
    assert_eq!(driver.bytes(at[1] + 4, 4), (-34i32).to_le_bytes());
    driver.give(1, &[Part::Read(&ask(1, b"file\0"))]);
    assert_eq!(driver.take(1), Some(0));
    assert!(driver.reports.lock().unwrap().is_empty());
}

fn any_device(kind: u8) -> (Option<Scratch>, Box<dyn Device>) {
    match kind {
        0 => (None, Box::new(Rng)),
        1 => (None, terminal().0),
        2 => {
            let (near, _far) = std::os::unix::net::UnixStream::pair().unwrap();
            (None, Box::new(Net::new(crate::link::Link::stream(near).unwrap(), [2; 6], 0)))
        }
        3 => {
            let folder = shared_folder();
            let device = Fs::new("tag", Box::new(Folder::open(&folder.0, false).unwrap())).unwrap();
            (Some(folder), Box::new(device))
        }
        _ => {
            let (file, device) = raw_disk(64);
            (Some(file), device)
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases()))]

    /// Nothing that a guest writes anywhere ends anything but the device that it is written to, and a reset brings
    /// that one back.
    #[test]
    fn no_guest_can_break_a_device(
        kind in 0..5u8,
        features in any::<u64>(),
        script in proptest::collection::vec(any::<u8>(), 1..600),
    ) {
        let (_file, device) = any_device(kind);
        let mut driver = Driver::new(device);
        driver.start(features | super::REQUIRED_FEATURES);
        driver.play(&mut Script(&script));
        // Still there, and as good as new.
        driver.device.config_write(4, &[6, 0]).unwrap();
        driver.start(ALL);
        prop_assert_eq!(driver.status(), 15);
        if kind == 0 {
            driver.reports.lock().unwrap().clear();
            driver.give(0, &[Part::Write(8)]);
            prop_assert_eq!(driver.take(0), Some(8));
        }
    }
}

/// How many cases: few by default, as many as `REALM_FUZZ_CASES` says for a long run.
fn cases() -> u32 {
    std::env::var("REALM_FUZZ_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(200)
}
