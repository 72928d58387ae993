//! Talks with the guest's agent (crates/agent): commands, files, the power button.
//!
//! Whatever comes from there is the guest's word: frames are bounded, and nothing of them is more than bytes, numbers and
//! text for the user.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use anyhow::{Context as _, Result, bail, ensure};
use realm_agent::protocol::{self, LONGEST, TERMINAL, VERSION, WINDOW, kind};

pub(crate) use realm_agent::protocol::PORT;

/// The most input in one frame.
const PIECE: usize = 16 << 10;

/// A command for the guest.
#[derive(Debug, Default)]
pub(crate) struct Exec<'a> {
    /// Program and arguments.
    pub(crate) arguments: Vec<&'a str>,
    /// `NAME=VALUE`.
    pub(crate) variables: Vec<String>,
    /// Rows and columns of its terminal, if it is to have one.
    pub(crate) terminal: Option<(u16, u16)>,
}

/// How a session ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// With an exit status.
    Status(u8),
    /// By a signal.
    Signal(u8),
    /// It did not begin, or could not go on: the guest's error number, and what it was about.
    Failed(u32, String),
}

impl Ended {
    /// What a shell would say.
    pub(crate) fn status(&self) -> u8 {
        match self {
            Self::Status(status) => *status,
            Self::Signal(signal) => signal.saturating_add(128),
            Self::Failed(2, _) => 127,
            Self::Failed(13, _) => 126,
            Self::Failed(..) => crate::FAILURE,
        }
    }

    /// A failure as an error.
    pub(crate) fn check(&self) -> Result<()> {
        match self {
            Self::Status(0) => Ok(()),
            Self::Failed(errno, what) => {
                let reason = std::io::Error::from_raw_os_error(i32::try_from(*errno).unwrap_or(0));
                bail!("guest: {what}: {reason}")
            }
            other => bail!("guest: it ended with status {}", other.status()),
        }
    }
}

/// Sends frames; several threads may.
#[derive(Clone)]
pub(crate) struct Sender(Arc<Mutex<UnixStream>>);

impl Sender {
    fn send(&self, what: u8, contents: &[u8]) -> Result<()> {
        let frame = [&protocol::header(what, contents.len())[..], contents].concat();
        Ok(self.0.lock().unwrap_or_else(PoisonError::into_inner).write_all(&frame)?)
    }

    /// The terminal has another size.
    pub(crate) fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let [r0, r1] = rows.to_le_bytes();
        let [c0, c1] = columns.to_le_bytes();
        self.send(kind::SIZE, &[r0, r1, c0, c1])
    }
}

/// How much input may be sent.
#[derive(Clone)]
pub(crate) struct Credit(Arc<(Mutex<usize>, Condvar)>);

impl Credit {
    fn new() -> Self {
        Self(Arc::new((Mutex::new(WINDOW), Condvar::new())))
    }

    fn add(&self, more: usize) {
        let (credit, changed) = &*self.0;
        let mut credit = credit.lock().unwrap_or_else(PoisonError::into_inner);
        *credit = credit.saturating_add(more).min(WINDOW);
        changed.notify_all();
    }

    /// Waits until something may be sent; gives how much of `wanted`.
    fn take(&self, wanted: usize) -> usize {
        let (credit, changed) = &*self.0;
        let mut credit = credit.lock().unwrap_or_else(PoisonError::into_inner);
        while *credit == 0 {
            credit = changed.wait(credit).unwrap_or_else(PoisonError::into_inner);
        }
        let taken = wanted.min(*credit);
        *credit -= taken;
        taken
    }
}

/// A session whose request has been sent.
pub(crate) struct Session {
    stream: UnixStream,
    sender: Sender,
    credit: Credit,
}

impl Session {
    /// Greets the agent on a new connection and asks for something.
    fn new(mut stream: UnixStream, what: u8, contents: &[u8]) -> Result<Self> {
        ensure!(contents.len() <= LONGEST, "that is longer than the {LONGEST} bytes that an agent takes");
        let (hello, version) = receive(&mut stream)?;
        ensure!(hello == kind::HELLO, "guest: what listens there is not the agent");
        ensure!(version == VERSION.to_le_bytes(), "guest: its agent is of another version than this realm");
        let sender = Sender(Arc::new(Mutex::new(stream.try_clone()?)));
        sender.send(what, contents)?;
        Ok(Self { stream, sender, credit: Credit::new() })
    }

    /// Starts a command.
    pub(crate) fn exec(stream: UnixStream, exec: &Exec<'_>) -> Result<Self> {
        let (rows, columns) = exec.terminal.unwrap_or_default();
        let mut contents = vec![if exec.terminal.is_some() { TERMINAL } else { 0 }];
        contents.extend(rows.to_le_bytes());
        contents.extend(columns.to_le_bytes());
        contents.extend(u16::try_from(exec.arguments.len()).context("too many arguments")?.to_le_bytes());
        for text in exec.arguments.iter().copied().chain(exec.variables.iter().map(String::as_str)) {
            ensure!(!text.contains('\0'), "an argument has a zero byte");
            contents.extend(text.as_bytes());
            contents.push(0);
        }
        Self::new(stream, kind::EXEC, &contents)
    }

    /// What sends frames beside.
    pub(crate) fn sender(&self) -> Sender {
        self.sender.clone()
    }

    /// Sends a file's or a command's input from a thread of its own, to its end.
    pub(crate) fn feed(&self, input: impl Read + Send + 'static) {
        let (sender, credit) = (self.sender.clone(), self.credit.clone());
        std::thread::spawn(move || {
            // When the session is over nobody listens any more.
            let _ = feed(&sender, input, Some(&credit));
        });
    }

    /// Says that there is no input.
    pub(crate) fn no_input(&self) -> Result<()> {
        self.sender.send(kind::INPUT, &[])
    }

    /// Hands on what comes, to the session's end.
    pub(crate) fn finish(mut self, output: &mut dyn Write, errors: &mut dyn Write) -> Result<Ended> {
        loop {
            let (what, contents) = receive(&mut self.stream)?;
            match (what, &contents[..]) {
                (kind::OUTPUT, bytes) => output.write_all(bytes).and_then(|()| output.flush())?,
                (kind::ERROR, bytes) => errors.write_all(bytes).and_then(|()| errors.flush())?,
                (kind::CREDIT, [a, b, c, d]) => {
                    self.credit.add(usize::try_from(u32::from_le_bytes([*a, *b, *c, *d])).unwrap_or(0));
                }
                (kind::META, _) => {}
                (kind::EXIT, [status, 0]) => return Ok(Ended::Status(*status)),
                (kind::EXIT, [_, signal]) => return Ok(Ended::Signal(*signal)),
                (kind::FAILURE, [a, b, c, d, text @ ..]) => {
                    let errno = u32::from_le_bytes([*a, *b, *c, *d]);
                    return Ok(Ended::Failed(errno, String::from_utf8_lossy(text).into_owned()));
                }
                _ => bail!("guest: its agent says what makes no sense"),
            }
        }
    }
}

fn feed(sender: &Sender, mut input: impl Read, credit: Option<&Credit>) -> Result<()> {
    let mut buffer = vec![0; PIECE];
    loop {
        let count = match input.read(&mut buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error.into()),
        };
        let mut rest = &buffer[..count];
        while !rest.is_empty() {
            let piece = credit.map_or(rest.len(), |credit| credit.take(rest.len()));
            sender.send(kind::INPUT, &rest[..piece])?;
            rest = &rest[piece..];
        }
        if count == 0 {
            return sender.send(kind::INPUT, &[]);
        }
    }
}

/// Writes a file in the guest: `path`, or `name` in the directory `path`.
pub(crate) fn put(stream: UnixStream, mode: u32, path: &str, name: &str, file: impl Read) -> Result<()> {
    let mut contents = mode.to_le_bytes().to_vec();
    contents.extend([path.as_bytes(), b"\0", name.as_bytes(), b"\0"].concat());
    let session = Session::new(stream, kind::PUT, &contents)?;
    // A guest that cannot go on says why, and closes: its reason is worth more than that.
    let sent = feed(&session.sender, file, None);
    session.finish(&mut std::io::sink(), &mut std::io::sink())?.check()?;
    sent
}

/// Reads a file of the guest; `open` makes the place for it, given its mode and size.
pub(crate) fn get<W: Write>(
    stream: UnixStream,
    path: &str,
    open: impl FnOnce(u32, u64) -> Result<W>,
) -> Result<()> {
    let mut session = Session::new(stream, kind::GET, &[path.as_bytes(), b"\0"].concat())?;
    let (what, contents) = receive(&mut session.stream)?;
    let (mode, size) = match (what, &contents[..]) {
        (kind::META, [a, b, c, d, size @ ..]) => {
            let size = size.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            (u32::from_le_bytes([*a, *b, *c, *d]), size)
        }
        (kind::FAILURE, [a, b, c, d, text @ ..]) => {
            let errno = u32::from_le_bytes([*a, *b, *c, *d]);
            return Ended::Failed(errno, String::from_utf8_lossy(text).into_owned()).check();
        }
        _ => bail!("guest: its agent says what makes no sense"),
    };
    let mut file = open(mode, size)?;
    session.finish(&mut file, &mut std::io::sink())?.check()
}

/// Has the guest switched off. One that is gone before it has answered has done what it was asked for.
pub(crate) fn power_off(stream: &mut UnixStream) -> Result<()> {
    let session = Session::new(stream.try_clone()?, kind::POWER_OFF, &[])?;
    session.finish(&mut std::io::sink(), &mut std::io::sink()).map_or(Ok(()), |ended| ended.check())
}

fn receive(stream: &mut UnixStream) -> Result<(u8, Vec<u8>)> {
    let gone = "guest: its agent went away";
    let mut head = [0; 4];
    stream.read_exact(&mut head).context(gone)?;
    let (what, len) = protocol::parse(head).context("guest: its agent says what is longer than allowed")?;
    let mut contents = vec![0; len];
    stream.read_exact(&mut contents).context(gone)?;
    Ok((what, contents))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that says `frames` whatever it is asked.
    fn guest(frames: &[(u8, &[u8])]) -> UnixStream {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut bytes = Vec::new();
        for (what, contents) in frames {
            bytes.extend(protocol::header(*what, contents.len()));
            bytes.extend(*contents);
        }
        std::thread::spawn(move || {
            let _ = far.write_all(&bytes);
            let _ = far.shutdown(std::net::Shutdown::Write);
            let _ = std::io::copy(&mut far, &mut std::io::sink());
        });
        near
    }

    const HELLO: (u8, &[u8]) = (kind::HELLO, &[1, 0, 0, 0]);

    #[test]
    fn a_command_gives_its_output_and_its_status() {
        let exec = Exec { arguments: vec!["true"], ..Exec::default() };
        let frames = [HELLO, (kind::OUTPUT, b"out"), (kind::ERROR, b"err"), (kind::EXIT, &[3, 0])];
        let session = Session::exec(guest(&frames), &exec).unwrap();
        let (mut output, mut errors) = (Vec::new(), Vec::new());
        assert_eq!(session.finish(&mut output, &mut errors).unwrap(), Ended::Status(3));
        assert_eq!((&output[..], &errors[..]), (&b"out"[..], &b"err"[..]));
        assert_eq!((Ended::Signal(9).status(), Ended::Failed(2, String::new()).status()), (137, 127));
    }

    #[test]
    fn a_guest_that_lies_is_an_error() {
        let exec = Exec { arguments: vec!["true"], ..Exec::default() };
        for frames in [
            &[][..],
            &[(kind::OUTPUT, &b"x"[..])],
            &[(kind::HELLO, &[9, 0, 0, 0])],
            &[HELLO, (kind::EXIT, &[1])],
            &[HELLO, (kind::CREDIT, &[1])],
            &[HELLO, (kind::FAILURE, &[1])],
            &[HELLO, (b'?', b"")],
            &[HELLO, (kind::OUTPUT, b"x")],
        ] {
            let ended = Session::exec(guest(frames), &exec)
                .and_then(|session| session.finish(&mut std::io::sink(), &mut std::io::sink()));
            assert!(ended.is_err(), "{frames:?}");
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let frames = [HELLO, (kind::FAILURE, &b"\x02\0\0\0/no/file"[..])];
        let error = get(guest(&frames), "/no/file", |_, _| Ok(Vec::new())).unwrap_err().to_string();
        assert!(error.contains("/no/file") && error.contains("No such file"), "{error}");
    }
}
