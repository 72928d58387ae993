//! Connections through the muxer, and through the device with a driver.

use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::muxer::{BUFFER, HOST_CID, MAX_CONNECTIONS};
use super::packet::{NO_RECEIVE, NO_SEND, SIZE, STREAM, op};
use super::*;
use crate::virtio::testing::{Driver, Part};

const GUEST: u64 = 3;

/// A place for sockets that goes away with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("realm-vsock-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("v")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn packet(op: u16, guest: u32, host: u32) -> Header {
    Header {
        src_cid: GUEST,
        dst_cid: HOST_CID,
        src_port: guest,
        dst_port: host,
        kind: STREAM,
        op,
        buf_alloc: 1 << 18,
        ..Header::default()
    }
}

fn muxer() -> Muxer {
    Muxer::new(GUEST, None)
}

/// What the muxer gets, and the host's end.
fn pair() -> (UnixStream, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    (near, far)
}

fn words() -> Words {
    Words { accepted: b"yes {}\n".to_vec(), refused: b"no\n".to_vec() }
}

/// A host's end and the connection's key, established.
fn established(muxer: &mut Muxer, port: u32) -> (UnixStream, Key) {
    let (near, mut far) = pair();
    muxer.connect(port, near, words());
    let (request, _) = muxer.next(4096).unwrap();
    assert_eq!((request.op, request.dst_port, request.dst_cid), (op::REQUEST, port, GUEST));
    let key = (request.src_port, port);
    muxer.receive(&packet(op::RESPONSE, port, key.0), &[]);
    let line = format!("yes {}\n", key.0);
    let mut said = vec![0; line.len()];
    far.read_exact(&mut said).unwrap();
    assert_eq!(said, line.as_bytes());
    far.set_nonblocking(true).unwrap();
    (far, key)
}

/// What the muxer has for the guest after everything that is ready has been looked at.
fn packets(muxer: &mut Muxer) -> Vec<(Header, Vec<u8>)> {
    let keys: Vec<Key> = muxer.interests(true).filter(|entry| entry.1 >= 0).map(|entry| entry.0).collect();
    keys.into_iter().for_each(|key| muxer.ready(key));
    std::iter::from_fn(|| muxer.next(4096)).collect()
}

fn rw(key: Key, data: &[u8]) -> Header {
    Header { len: u32::try_from(data.len()).unwrap(), ..packet(op::RW, key.1, key.0) }
}

#[test]
fn a_guest_that_refuses_is_reported_to_who_waits() {
    let mut muxer = muxer();
    let (near, mut far) = pair();
    muxer.connect(7, near, words());
    let (request, _) = muxer.next(4096).unwrap();
    muxer.receive(&packet(op::RST, 7, request.src_port), &[]);
    let mut said = String::new();
    far.read_to_string(&mut said).unwrap();
    assert_eq!(said, "no\n");
    assert_eq!(muxer.next(4096), None);
}

#[test]
fn each_side_can_end_its_half() {
    let mut muxer = muxer();
    let (mut host, key) = established(&mut muxer, 9);
    host.write_all(b"question").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    let sent = packets(&mut muxer);
    assert_eq!((sent[0].0.op, &sent[0].1[..]), (op::RW, &b"question"[..]));
    assert_eq!((sent[1].0.op, sent[1].0.flags), (op::SHUTDOWN, NO_SEND));
    muxer.receive(&rw(key, b"answer"), b"answer");
    muxer.receive(&Header { flags: NO_SEND | NO_RECEIVE, ..packet(op::SHUTDOWN, key.1, key.0) }, &[]);
    host.set_nonblocking(false).unwrap();
    let mut answer = String::new();
    host.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
    assert_eq!(packets(&mut muxer)[0].0.op, op::RST);
    assert_eq!(muxer.interests(true).count(), 0);
}

#[test]
fn a_host_that_is_gone_ends_the_connection() {
    let mut muxer = muxer();
    let (host, _) = established(&mut muxer, 9);
    drop(host);
    let ops: Vec<u16> =
        [packets(&mut muxer), packets(&mut muxer)].concat().iter().map(|packet| packet.0.op).collect();
    assert_eq!(ops, [op::SHUTDOWN, op::RST]);
    // One that does not wait for the answer either.
    let (near, far) = pair();
    muxer.connect(7, near, words());
    muxer.next(4096).unwrap();
    drop(far);
    assert_eq!(packets(&mut muxer)[0].0.op, op::RST);
    assert_eq!(muxer.interests(true).count(), 0);
}

#[test]
fn nobody_is_sent_more_than_there_is_room_for() {
    let mut muxer = muxer();
    let (mut host, key) = established(&mut muxer, 9);
    muxer.receive(&Header { buf_alloc: 1000, ..packet(op::CREDIT_UPDATE, key.1, key.0) }, &[]);
    host.write_all(&[1; 3000]).unwrap();
    let count = |packets: &[(Header, Vec<u8>)]| packets.iter().map(|(_, data)| data.len()).sum::<usize>();
    assert_eq!(count(&packets(&mut muxer)), 1000);
    // A file that cannot be served is not waited for.
    assert_eq!(muxer.interests(true).next().unwrap().1, -1);
    muxer.receive(&Header { buf_alloc: 1000, fwd_cnt: 400, ..packet(op::CREDIT_UPDATE, key.1, key.0) }, &[]);
    assert_eq!(count(&packets(&mut muxer)), 400);
    // A guest that claims to have taken more than it was sent gains nothing.
    muxer.receive(&Header { buf_alloc: 1000, fwd_cnt: 9999, ..packet(op::CREDIT_UPDATE, key.1, key.0) }, &[]);
    assert_eq!(count(&packets(&mut muxer)), 0);

    // The other way round: the window is what we said, and ends the connection of who does not keep to it.
    let piece = [2; 4096];
    let mut sent = 0;
    while muxer.interests(true).next().is_some_and(|entry| entry.2 & libc::POLLOUT == 0) {
        muxer.receive(&rw(key, &piece), &piece);
        sent += piece.len();
        assert!(sent < 8 << 20, "the socket takes everything");
    }
    for _ in 0..usize::try_from(BUFFER).unwrap() / piece.len() {
        muxer.receive(&rw(key, &piece), &piece);
    }
    assert!(packets(&mut muxer).iter().any(|(header, _)| header.op == op::RST));
    assert_eq!(muxer.interests(true).count(), 0);
}

#[test]
fn connections_and_answers_are_bounded() {
    let mut muxer = muxer();
    let mut hosts = Vec::new();
    for _ in 0..MAX_CONNECTIONS + 10 {
        let (near, far) = pair();
        muxer.connect(1, near, words());
        hosts.push(far);
    }
    assert_eq!(muxer.interests(true).count(), MAX_CONNECTIONS);
    let mut said = String::new();
    hosts.last_mut().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(said, "no\n");
    for port in 0..10_000 {
        muxer.receive(&packet(op::RW, port, 5), &[]);
    }
    assert!(std::iter::from_fn(|| muxer.next(4096)).count() <= 256 + MAX_CONNECTIONS);
}

fn send(driver: &mut Driver, header: Header, data: &[u8]) {
    driver.give(1, &[Part::Read(&header.bytes()), Part::Read(data)][..if data.is_empty() { 1 } else { 2 }]);
    driver.take(1).expect("a packet is taken");
}

fn hear(driver: &mut Driver) -> (Header, Vec<u8>) {
    let at = driver.give(0, &[Part::Write(2048)]);
    let len = driver.take(0).expect("a packet comes");
    let bytes = driver.bytes(at[0], len);
    (Header::parse(bytes[..SIZE].try_into().unwrap()), bytes[SIZE..].to_vec())
}

#[test]
fn clients_and_services_of_the_host_talk_to_the_guest() {
    let scratch = Scratch::new();
    let (device, handle) = Vsock::new(3, Some(&scratch.socket())).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::mode(&scratch.socket().metadata().unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let mut driver = Driver::new(Box::new(device));
    // Before there is a driver, nobody waits in vain.
    let (near, mut far) = pair();
    handle.connect(5, near, b"yes\n", b"not yet\n");
    let mut said = String::new();
    far.read_to_string(&mut said).unwrap();
    assert_eq!(said, "not yet\n");
    driver.start(u64::MAX);
    assert_eq!(driver.get(0x2000), 3u64.to_le_bytes());

    // A client, whose first words come with its greeting.
    let mut client = UnixStream::connect(scratch.socket()).unwrap();
    client.write_all(b"CONNECT 52\nhello").unwrap();
    let (request, _) = hear(&mut driver);
    assert_eq!((request.op, request.dst_port), (op::REQUEST, 52));
    send(&mut driver, packet(op::RESPONSE, 52, request.src_port), &[]);
    assert_eq!(hear(&mut driver).1, b"hello");
    let answer = Header { len: 3, ..packet(op::RW, 52, request.src_port) };
    send(&mut driver, answer, b"you");
    let line = format!("OK {}\nyou", request.src_port);
    let mut said = vec![0; line.len()];
    client.read_exact(&mut said).unwrap();
    assert_eq!(said, line.as_bytes());

    // A service.
    let mut path = scratch.socket().into_os_string();
    path.push("_1234");
    let service = UnixListener::bind(&path).unwrap();
    send(&mut driver, packet(op::REQUEST, 99, 1234), &[]);
    assert_eq!(hear(&mut driver).0.op, op::RESPONSE);
    let (mut served, _) = service.accept().unwrap();
    served.write_all(b"welcome").unwrap();
    let (header, data) = hear(&mut driver);
    assert_eq!((header.src_port, header.dst_port, &data[..]), (1234, 99, &b"welcome"[..]));
    // Where there is none.
    send(&mut driver, packet(op::REQUEST, 99, 1235), &[]);
    assert_eq!(hear(&mut driver).0.op, op::RST);
    assert!(handle.counters().connections.load(Ordering::Relaxed) == 2);

    // Nonsense is not answered.
    for nonsense in ["GET / HTTP/1.1\n\n", "CONNECT\n", "CONNECT 1 2\n", "CONNECT -1\n"] {
        let mut client = UnixStream::connect(scratch.socket()).unwrap();
        client.write_all(nonsense.as_bytes()).unwrap();
        assert!(!matches!(client.read(&mut [0]), Ok(1..)), "{nonsense}");
    }
    assert!(driver.reports.lock().unwrap().is_empty());
    drop(driver);
    assert!(!scratch.socket().exists());
}

#[test]
fn a_socket_that_somebody_left_is_replaced_and_one_in_use_is_not() {
    let scratch = Scratch::new();
    drop(UnixListener::bind(scratch.socket()).unwrap());
    let _first = Vsock::new(3, Some(&scratch.socket())).unwrap();
    assert!(Vsock::new(3, Some(&scratch.socket())).is_err());
    for cid in [0, 1, 2, u32::MAX] {
        assert!(Vsock::new(cid, None).is_err());
    }
}

/// A guest that keeps to the rules: what it has received and how much of it it has taken.
struct Peer {
    key: Key,
    host: UnixStream,
    received: Vec<u8>,
    taken: u32,
    sent: u32,
    window: u32,
    forwarded: u32,
    to_host: Vec<u8>,
    at_host: Vec<u8>,
    from_host: Vec<u8>,
    blocked: VecDeque<u8>,
}

const WINDOW: u32 = 5000;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the order of events, every byte arrives once and in its place.
    #[test]
    fn streams_arrive_as_they_were_sent(steps in proptest::collection::vec((0..3usize, 0..5u8, 1..9000usize), 1..120)) {
        let mut muxer = muxer();
        let mut peers: Vec<Peer> = (0..3).map(|port| {
            let (host, key) = established(&mut muxer, port);
            muxer.receive(&Header { buf_alloc: WINDOW, ..packet(op::CREDIT_UPDATE, key.1, key.0) }, &[]);
            Peer { key, host, received: vec![], taken: 0, sent: 0, window: BUFFER, forwarded: 0, to_host: vec![],
                at_host: vec![], from_host: vec![], blocked: VecDeque::new() }
        }).collect();
        let mut counter = 0u32;
        let drain: Vec<(usize, u8, usize)> = (0..400).flat_map(|_| (0..3).flat_map(|who| [(who, 2, 9000), (who, 3, 9000), (who, 4, 9000)])).collect();
        for (who, what, size) in steps.into_iter().chain(drain) {
            let peer = &mut peers[who];
            let mut bytes = |len: usize| -> Vec<u8> {
                (0..len).map(|_| { counter = counter.wrapping_mul(1_664_525).wrapping_add(1_013_904_223); counter.to_le_bytes()[3] }).collect()
            };
            match what {
                // The host writes.
                0 => {
                    let more = bytes(size);
                    peer.from_host.extend(&more);
                    peer.blocked.extend(more);
                }
                // The guest writes what it may.
                1 => {
                    let room = usize::try_from(peer.window - peer.sent.wrapping_sub(peer.forwarded)).unwrap();
                    let data = bytes(size.min(room));
                    peer.sent = peer.sent.wrapping_add(u32::try_from(data.len()).unwrap());
                    peer.to_host.extend(&data);
                    let header = Header { buf_alloc: WINDOW, fwd_cnt: peer.taken, ..rw(peer.key, &data) };
                    muxer.receive(&header, &data);
                }
                // The host reads.
                2 => {
                    let mut buffer = vec![0; size];
                    while let Ok(count @ 1..) = peer.host.read(&mut buffer) {
                        peer.at_host.extend(&buffer[..count]);
                        if size < 5000 { break; }
                    }
                }
                // The guest takes, and says so.
                3 => {
                    peer.taken = u32::try_from(peer.received.len()).unwrap();
                    let header = Header { buf_alloc: WINDOW, fwd_cnt: peer.taken, ..packet(op::CREDIT_UPDATE, peer.key.1, peer.key.0) };
                    muxer.receive(&header, &[]);
                }
                _ => {}
            }
            let (first, _) = peer.blocked.as_slices();
            if let Ok(count) = peer.host.write(first) { peer.blocked.drain(..count); }
            for (header, data) in packets(&mut muxer) {
                prop_assert!(matches!(header.op, op::RW | op::CREDIT_UPDATE), "operation {}", header.op);
                let peer = peers.iter_mut().find(|peer| peer.key == (header.src_port, header.dst_port)).unwrap();
                peer.received.extend(&data);
                peer.forwarded = header.fwd_cnt;
                prop_assert_eq!(header.buf_alloc, BUFFER);
                prop_assert!(peer.received.len() - usize::try_from(peer.taken).unwrap() <= usize::try_from(WINDOW).unwrap());
            }
        }
        for peer in &peers {
            prop_assert_eq!(&peer.received, &peer.from_host);
            prop_assert_eq!(&peer.at_host, &peer.to_host);
        }
    }

    /// A guest may say anything.
    #[test]
    fn no_packet_breaks_anything(steps in proptest::collection::vec((any::<u16>(), 0..4u32, 0..4u32, any::<u32>(), any::<u32>(), prop_oneof![9 => 0..300usize, 1 => 60_000..70_000usize]), 1..200)) {
        let scratch = Scratch::new();
        let mut path = scratch.socket().into_os_string();
        path.push("_2");
        let _service = UnixListener::bind(&path).unwrap();
        let mut muxer = Muxer::new(GUEST, Some(scratch.socket()));
        let mut hosts = Vec::new();
        for (what, guest, host, a, b, len) in steps {
            if what % 16 == 15 {
                let (near, far) = pair();
                muxer.connect(guest, near, words());
                hosts.push(far);
            }
            let host = if what % 3 == 0 { (1 << 30) + host } else { host };
            let header = Header { buf_alloc: a, fwd_cnt: b, flags: a, len: u32::try_from(len).unwrap(),
                ..packet(what % 10, guest, host) };
            muxer.receive(&header, &vec![7; len]);
            if what % 5 == 0 { packets(&mut muxer); }
            if what % 7 == 0 { hosts.pop(); }
        }
        prop_assert!(muxer.interests(true).count() <= MAX_CONNECTIONS);
        muxer.clear();
        prop_assert_eq!(muxer.next(4096), None);
    }
}

#[test]
fn a_driver_that_lies_about_lengths_is_stopped_and_may_come_back() {
    let (device, _handle) = Vsock::new(3, None).unwrap();
    let mut driver = Driver::new(Box::new(device));
    for (header, data) in [
        (Header { len: 10, ..packet(op::RW, 1, 1) }.bytes(), &b"short"[..]),
        (Header { len: u32::MAX, ..packet(op::RW, 1, 1) }.bytes(), &b""[..]),
        (vec![0; 20], &b""[..]),
    ] {
        driver.start(u64::MAX);
        driver.give(1, &[Part::Read(&header), Part::Read(&[data, b"\0"].concat())]);
        let deadline = Instant::now() + Duration::from_secs(5);
        let told = |driver: &Driver| driver.status() & 64 != 0 && !driver.reports.lock().unwrap().is_empty();
        while !told(&driver) && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert_eq!(driver.status() & 64, 64);
        driver.reports.lock().unwrap().clear();
    }
    driver.start(u64::MAX);
    send(&mut driver, packet(op::RW, 1, 1), &[]);
    assert_eq!(hear(&mut driver).0.op, op::RST);
}
