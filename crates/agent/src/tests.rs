//! Sessions of real processes, over a socket pair in the vsock's place.

use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, IntoRawFd as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::protocol::{LONGEST, TERMINAL, WINDOW, header, kind, parse};
use crate::server;
use crate::sys::{self, Fd, Fork};

/// One session at a time: a process that is forked holds what other tests have open.
static ALONE: Mutex<()> = Mutex::new(());

struct Client {
    stream: UnixStream,
    process: usize,
    _alone: MutexGuard<'static, ()>,
}

impl Client {
    fn new() -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let (near, far) = UnixStream::pair().unwrap();
        let other = near.as_raw_fd();
        // SAFETY: the copy makes kernel calls only.
        let process = match unsafe { sys::fork() }.unwrap() {
            Fork::Child => {
                // SAFETY: these are the copy's own.
                let connection = unsafe {
                    drop(Fd::from_raw(other));
                    Fd::from_raw(far.into_raw_fd())
                };
                server::session(&connection);
                drop(connection);
                sys::exit(0)
            }
            Fork::Parent(process) => process,
        };
        drop(far);
        near.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut client = Self { stream: near, process, _alone: alone };
        assert_eq!(client.receive(), (kind::HELLO, 1u32.to_le_bytes().to_vec()));
        client
    }

    fn send(&mut self, what: u8, contents: &[u8]) {
        self.stream.write_all(&header(what, contents.len())).unwrap();
        self.stream.write_all(contents).unwrap();
    }

    fn receive(&mut self) -> (u8, Vec<u8>) {
        let mut head = [0; 4];
        self.stream.read_exact(&mut head).unwrap();
        let (what, len) = parse(head).unwrap();
        let mut contents = vec![0; len];
        self.stream.read_exact(&mut contents).unwrap();
        (what, contents)
    }

    fn exec(flags: u8, arguments: &[&str], variables: &[&str]) -> Self {
        let mut client = Self::new();
        let mut contents = vec![flags, 40, 0, 100, 0];
        contents.extend(u16::try_from(arguments.len()).unwrap().to_le_bytes());
        for text in arguments.iter().chain(variables) {
            contents.extend(text.as_bytes());
            contents.push(0);
        }
        client.send(kind::EXEC, &contents);
        client
    }

    /// Everything to the end: output, errors, the last frame.
    fn finish(mut self) -> (String, String, (u8, Vec<u8>)) {
        let (mut output, mut errors) = (Vec::new(), Vec::new());
        loop {
            match self.receive() {
                (kind::OUTPUT, bytes) => output.extend(bytes),
                (kind::ERROR, bytes) => errors.extend(bytes),
                (kind::CREDIT, _) => {}
                last => {
                    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
                    return (text(&output), text(&errors), last);
                }
            }
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        let _ = sys::wait(self.process);
    }
}

#[test]
fn a_command_has_streams_and_a_status() {
    let client = Client::exec(
        0,
        &["sh", "-c", "echo out; echo err >&2; echo \"[$0$1$#]\" $WORD; exit 7", "", ""],
        &["WORD=w"],
    );
    let (output, errors, last) = client.finish();
    assert_eq!((output.as_str(), errors.as_str()), ("out\n[1] w\n", "err\n"));
    assert_eq!(last, (kind::EXIT, vec![7, 0]));
}

#[test]
fn the_signal_that_ends_a_command_is_told() {
    let mut client = Client::exec(0, &["sleep", "100"], &[]);
    client.send(kind::SIGNAL, &[15]);
    assert_eq!(client.finish().2, (kind::EXIT, vec![0, 15]));
}

#[test]
fn what_cannot_be_run_is_an_error_with_a_name() {
    for (program, errno) in [("no-such-program", 2u32), ("/etc/passwd", 13), ("/etc", 13), ("/no/where", 2)] {
        let (_, _, last) = Client::exec(0, &[program], &[]).finish();
        let expected = [&errno.to_le_bytes()[..], program.as_bytes()].concat();
        assert_eq!(last, (kind::FAILURE, expected));
    }
}

#[test]
fn input_has_a_window_and_an_end() {
    let mut client = Client::exec(0, &["sh", "-c", "sleep 0.2; wc -c"], &[]);
    let (mut sent, mut credit) = (0, WINDOW);
    while sent < 300_000 {
        let piece = credit.min(30_000).min(300_000 - sent);
        if piece > 0 {
            client.send(kind::INPUT, &vec![b'x'; piece]);
            sent += piece;
            credit -= piece;
            continue;
        }
        let (what, contents) = client.receive();
        assert_eq!(what, kind::CREDIT);
        credit += usize::try_from(u32::from_le_bytes(contents.try_into().unwrap())).unwrap();
        assert!(credit <= WINDOW);
    }
    client.send(kind::INPUT, &[]);
    let (output, _, last) = client.finish();
    assert_eq!((output.trim(), last), ("300000", (kind::EXIT, vec![0, 0])));
}

#[test]
fn input_that_nobody_reads_holds_nobody_up() {
    let mut client = Client::exec(0, &["sleep", "100"], &[]);
    client.send(kind::INPUT, &vec![0; LONGEST]);
    client.send(kind::SIGNAL, &[9]);
    assert_eq!(client.finish().2, (kind::EXIT, vec![0, 9]));
    // More than the window is against the rules, and ends the session.
    let mut client = Client::exec(0, &["sleep", "100"], &[]);
    for _ in 0..4 {
        // The last of them may come when it has ended.
        let frame = [&header(kind::INPUT, LONGEST)[..], &[0; LONGEST]].concat();
        let _ = client.stream.write_all(&frame);
    }
    assert_eq!(client.finish().2.0, kind::FAILURE);
}

#[test]
fn a_terminal_has_a_size_and_control_keys() {
    let script = "stty size; trap 'echo caught; exit 3' INT; echo ready; while :; do sleep 0.1; done";
    let mut client = Client::exec(TERMINAL, &["sh", "-c", script], &["TERM=linux"]);
    let mut seen = String::new();
    while !seen.contains("ready") {
        let (what, bytes) = client.receive();
        assert_eq!(what, kind::OUTPUT);
        seen.push_str(&String::from_utf8_lossy(&bytes));
    }
    assert!(seen.starts_with("40 100"), "{seen}");
    client.send(kind::SIZE, &[50, 0, 132, 0]);
    client.send(kind::INPUT, b"\x03");
    let (output, _, last) = client.finish();
    assert!(output.contains("caught"), "{output}");
    assert_eq!(last, (kind::EXIT, vec![3, 0]));
}

#[test]
fn a_command_does_not_outlive_its_host() {
    let mark = format!("{}", 1_000_000 + std::process::id());
    let client = Client::exec(0, &["sh", "-c", "sleep $0 & wait", &mark], &[]);
    let running = || {
        std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            line == format!("sleep\0{mark}\0").as_bytes()
        })
    };
    let wait_for = |wanted: bool| {
        for _ in 0..500 {
            if running() == wanted {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the command runs: {}", !wanted);
    };
    wait_for(true);
    drop(client);
    wait_for(false);
}

#[test]
fn files_come_and_go_with_their_permissions() {
    let directory = std::env::temp_dir().join(format!("realm-agent-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let contents: Vec<u8> = (0..200_000u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
    let put = |path: &str, name: &str| {
        let mut client = Client::new();
        let mut request = 0o750u32.to_le_bytes().to_vec();
        request.extend([path.as_bytes(), b"\0", name.as_bytes(), b"\0"].concat());
        client.send(kind::PUT, &request);
        for piece in contents.chunks(50_000) {
            client.send(kind::INPUT, piece);
        }
        client.send(kind::INPUT, &[]);
        client.finish().2
    };
    // By a name of its own, and into a directory.
    assert_eq!(put(directory.join("a").to_str().unwrap(), "b"), (kind::EXIT, vec![0, 0]));
    assert_eq!(put(directory.to_str().unwrap(), "b"), (kind::EXIT, vec![0, 0]));
    for name in ["a", "b"] {
        assert_eq!(std::fs::read(directory.join(name)).unwrap(), contents);
        let mode = std::fs::metadata(directory.join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o750);
    }
    let get = |path: &str| {
        let mut client = Client::new();
        client.send(kind::GET, &[path.as_bytes(), b"\0"].concat());
        client
    };
    let mut client = get(directory.join("a").to_str().unwrap());
    let (what, meta) = client.receive();
    assert_eq!(
        (what, &meta[..4], &meta[4..]),
        (kind::META, &0o750u32.to_le_bytes()[..], &200_000u64.to_le_bytes()[..])
    );
    let mut got = Vec::new();
    loop {
        match client.receive() {
            (kind::OUTPUT, bytes) => got.extend(bytes),
            last => break assert_eq!(last, (kind::EXIT, vec![0, 0])),
        }
    }
    assert_eq!(got, contents);
    drop(client);
    for (path, errno) in [(directory.to_str().unwrap(), 21u32), ("/no/such/file", 2)] {
        assert_eq!(
            get(path).finish().2,
            (kind::FAILURE, [&errno.to_le_bytes()[..], path.as_bytes()].concat())
        );
    }
    std::fs::remove_dir_all(directory).unwrap();
}

#[test]
fn nonsense_ends_the_session_and_nothing_else() {
    for (what, contents) in [
        (kind::EXEC, &b""[..]),
        (kind::EXEC, &[0; 7]),
        (kind::EXEC, &[0, 0, 0, 0, 0, 9, 0, b'a', 0]),
        (kind::EXEC, &[0, 0, 0, 0, 0, 0xff, 0xff, b'a', 0]),
        (kind::EXEC, &[0, 0, 0, 0, 0, 1, 0, b'a']),
        (kind::PUT, b"abc"),
        (kind::PUT, b"\0\0\0\0a\0b"),
        (kind::GET, b"a"),
        (kind::INPUT, b"a"),
        (0, b""),
    ] {
        let mut client = Client::new();
        client.send(what, contents);
        let (last, contents) = client.finish().2;
        assert_eq!((last, &contents[..4]), (kind::FAILURE, &71u32.to_le_bytes()[..]), "{what}");
    }
    // A frame that is longer than any.
    let mut client = Client::new();
    client.stream.write_all(&[kind::GET, 0xff, 0xff, 0xff]).unwrap();
    assert_eq!(client.finish().2.0, kind::FAILURE);
}

/// What `connect` does with its streams, over a socket pair in the vsock's place.
fn joined(input: &UnixStream, output: &UnixStream) -> (UnixStream, usize) {
    let (host, guest) = UnixStream::pair().unwrap();
    let [input, output, connection, other] = [input, output, &guest, &host].map(|end| end.as_raw_fd());
    // SAFETY: the copy makes kernel calls only.
    let process = match unsafe { sys::fork() }.unwrap() {
        // SAFETY: these descriptors are the copy's own.
        Fork::Child => unsafe {
            drop(Fd::from_raw(other));
            let streams = [connection, input, output].map(|fd| Fd::from_raw(fd));
            let result = crate::connect::join(&streams[0], &streams[1], &streams[2]);
            sys::exit(u8::from(result.is_err()))
        },
        Fork::Parent(process) => process,
    };
    host.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    (host, process)
}

#[test]
fn a_connection_carries_both_directions_and_ends_with_the_host() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (input, guest_input) = UnixStream::pair().unwrap();
    let (mut output, guest_output) = UnixStream::pair().unwrap();
    let (mut host, process) = joined(&guest_input, &guest_output);
    drop((guest_input, guest_output));
    // More than any buffer on the way holds, in both directions at once: nobody waits for the other.
    let bytes: Vec<u8> = (0..3_000_000u32).map(|n| n.to_le_bytes()[0]).collect();
    let mut answer = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            (&input).write_all(&bytes).unwrap();
            input.shutdown(std::net::Shutdown::Write).unwrap();
        });
        scope.spawn(|| output.read_to_end(&mut answer).unwrap());
        let mut echo = [0; 1000];
        loop {
            match host.read(&mut echo).unwrap() {
                0 => break,
                count => host.write_all(&echo[..count]).unwrap(),
            }
        }
        host.write_all(b"that was all").unwrap();
        drop(host);
    });
    assert_eq!(sys::wait(process), Ok((0, 0)));
    assert!(answer.starts_with(&bytes) && answer.ends_with(b"that was all"));
}

#[test]
fn a_host_that_hangs_up_ends_a_connection_whose_input_goes_on() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (_input, guest_input) = UnixStream::pair().unwrap();
    let (mut output, guest_output) = UnixStream::pair().unwrap();
    let (mut host, process) = joined(&guest_input, &guest_output);
    drop((guest_input, guest_output));
    host.write_all(b"bye").unwrap();
    drop(host);
    assert_eq!(sys::wait(process), Ok((0, 0)));
    let mut answer = String::new();
    output.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "bye");
}
