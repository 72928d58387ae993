//! A command and its streams.

use core::ffi::CStr;
use core::ptr;

use crate::files::{self, PATH_MAX};
use crate::protocol::{LONGEST, TERMINAL, WINDOW, kind};
use crate::server::{NONSENSE, fail, receive, send, text};
use crate::sys::{self, Disposition, EAGAIN, Errno, Fd, Fork, Result, Wait, event};

/// Arguments, or variables, that a command may have.
const MAX_TEXTS: usize = 1024;
/// Where commands are, unless the variable PATH says something else.
const PATH: &CStr = c"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const DEFAULT_PATH: &CStr = c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const NOT_FOUND: Errno = Errno(2);

const SIGHUP: u8 = 1;
const SIGTERM: u8 = 15;
const LAST_SIGNAL: u8 = 64;

/// What was asked for. The lists point into the request and end with a null pointer.
struct Wanted<'a> {
    terminal: Option<(u16, u16)>,
    arguments: [*const u8; MAX_TEXTS + 1],
    variables: [*const u8; MAX_TEXTS + 1],
    program: &'a CStr,
    /// The directories in which to look for it.
    path: &'a [u8],
}

/// A command that runs.
struct Running {
    process: usize,
    watch: Fd,
    /// Our ends of its streams. A terminal is output, and input in `input`'s place.
    input: Option<Fd>,
    output: Option<Fd>,
    errors: Option<Fd>,
    terminal: bool,
}

/// Runs a command to its end.
pub(crate) fn run(connection: &Fd, contents: &[u8]) -> Result {
    let wanted = Wanted::parse(contents)?;
    let mut running = match start(&wanted) {
        Ok(running) => running,
        Err(errno) => return fail(connection, errno, wanted.program.to_bytes()),
    };
    let ended = running.relay(connection);
    if ended != Ok(true) {
        // The command does not outlive who asked for it.
        let _ = sys::kill(running.process, true, SIGHUP);
        let _ = sys::kill(running.process, true, SIGTERM);
    }
    ended.map(|_| ())
}

impl<'a> Wanted<'a> {
    fn parse(contents: &'a [u8]) -> Result<Self> {
        let ([flags, r0, r1, c0, c1, n0, n1], mut rest) = contents.split_first_chunk().ok_or(NONSENSE)?;
        let size = (u16::from_le_bytes([*r0, *r1]), u16::from_le_bytes([*c0, *c1]));
        let mut wanted = Self {
            terminal: (flags & TERMINAL != 0).then_some(size),
            arguments: [ptr::null(); MAX_TEXTS + 1],
            variables: [ptr::null(); MAX_TEXTS + 1],
            program: c"",
            path: PATH.to_bytes(),
        };
        let count = usize::from(u16::from_le_bytes([*n0, *n1]));
        for place in wanted.arguments.get_mut(..count.min(MAX_TEXTS)).unwrap_or_default() {
            let (argument, more) = text(rest)?;
            if wanted.program.is_empty() {
                wanted.program = argument;
            }
            *place = argument.as_ptr().cast();
            rest = more;
        }
        if count > MAX_TEXTS || wanted.program.is_empty() {
            return Err(NONSENSE);
        }
        let mut number = 0;
        while !rest.is_empty() {
            let (variable, more) = text(rest)?;
            let places = wanted.variables.get_mut(..MAX_TEXTS - 1).unwrap_or_default();
            *places.get_mut(number).ok_or(NONSENSE)? = variable.as_ptr().cast();
            if let Some(directories) = variable.to_bytes().strip_prefix(b"PATH=") {
                wanted.path = directories;
            }
            (number, rest) = (number + 1, more);
        }
        if wanted.path == PATH.to_bytes() {
            *wanted.variables.get_mut(number).ok_or(NONSENSE)? = DEFAULT_PATH.as_ptr().cast();
        }
        Ok(wanted)
    }

    /// Becomes the program. Returns only if that failed, with the reason.
    fn execute(&self) -> Errno {
        let execute = |path: &CStr| {
            // SAFETY: both lists were filled with texts that end with a zero, and their last element stays null.
            unsafe { sys::execute(path, &self.arguments, &self.variables) }
        };
        if self.program.to_bytes().contains(&b'/') {
            return execute(self.program);
        }
        let mut reason = NOT_FOUND;
        for directory in self.path.split(|byte| *byte == b':') {
            let mut buffer = [0; PATH_MAX];
            let Ok(path) = files::join(directory, self.program, &mut buffer) else { continue };
            let errno = execute(path);
            // A file that cannot be run says more than one that is not there.
            if errno != NOT_FOUND {
                reason = errno;
            }
        }
        reason
    }
}

/// Starts a command.
fn start(wanted: &Wanted<'_>) -> Result<Running> {
    let (report, reporter) = sys::pipe()?;
    let mut running = Streams::new(wanted.terminal)?;
    // SAFETY: a session has one thread.
    let process = match unsafe { sys::fork() }? {
        Fork::Child => {
            let errno = running.become_command(wanted);
            let _ = sys::write_all(&reporter, &errno.0.to_le_bytes());
            sys::exit(127)
        }
        Fork::Parent(process) => process,
    };
    drop(reporter);
    running.theirs = [None, None, None];
    let mut errno = [0; 4];
    // The pipe is closed without a word when the program runs.
    if sys::read_exact(&report, &mut errno)? {
        let _ = sys::wait(process);
        return Err(Errno(u32::from_le_bytes(errno)));
    }
    let watch = sys::watch(process)?;
    let [input, output, errors] = running.ours;
    if let Some(input) = &input {
        sys::set_nonblocking(input)?;
    }
    Ok(Running { process, watch, input, output, errors, terminal: wanted.terminal.is_some() })
}

/// Both ends of a command's input, output and errors.
struct Streams {
    ours: [Option<Fd>; 3],
    theirs: [Option<Fd>; 3],
    terminal: bool,
}

impl Streams {
    fn new(terminal: Option<(u16, u16)>) -> Result<Self> {
        if let Some((rows, columns)) = terminal {
            let (master, slave) = sys::terminal(rows, columns)?;
            let input = sys::duplicate(&master)?;
            return Ok(Self {
                ours: [Some(input), Some(master), None],
                theirs: [Some(slave), None, None],
                terminal: true,
            });
        }
        let (their_input, input) = sys::pipe()?;
        let (output, their_output) = sys::pipe()?;
        let (errors, their_errors) = sys::pipe()?;
        Ok(Self {
            ours: [Some(input), Some(output), Some(errors)],
            theirs: [Some(their_input), Some(their_output), Some(their_errors)],
            terminal: false,
        })
    }

    /// In the new process: takes the streams, forgets what the agent is like, and becomes the program.
    fn become_command(&self, wanted: &Wanted<'_>) -> Errno {
        let [input, output, errors] = &self.theirs;
        let terminal = input.as_ref().filter(|_| self.terminal);
        let prepared = sys::lead_session(terminal).and_then(|()| {
            for (fd, to) in [(input, 0), (output, 1), (errors, 2)] {
                if let Some(fd) = fd.as_ref().or(terminal) {
                    sys::duplicate_to(fd, to)?;
                }
            }
            for signal in 1..=LAST_SIGNAL {
                let _ = sys::on_signal(signal, Disposition::Default);
            }
            sys::unblock_signals()
        });
        if let Err(errno) = prepared {
            return errno;
        }
        let _ = sys::chdir(c"/root");
        wanted.execute()
    }
}

/// Input that the command has not taken.
struct Pending {
    bytes: [u8; WINDOW],
    start: usize,
    len: usize,
    /// No more will come.
    ended: bool,
}

impl Pending {
    /// `false` if there is no room: the host did not keep to the window.
    fn add(&mut self, more: &[u8]) -> bool {
        if more.is_empty() {
            self.ended = true;
        }
        if more.len() > WINDOW - self.len {
            return false;
        }
        for (index, byte) in more.iter().enumerate() {
            if let Some(place) = self.bytes.get_mut((self.start + self.len + index) % WINDOW) {
                *place = *byte;
            }
        }
        self.len += more.len();
        true
    }

    fn first(&self) -> &[u8] {
        self.bytes.get(self.start..WINDOW.min(self.start + self.len)).unwrap_or_default()
    }

    fn taken(&mut self, count: usize) {
        self.start = (self.start + count) % WINDOW;
        self.len = self.len.saturating_sub(count);
    }
}

impl Running {
    /// Moves bytes until the command has ended; `false` if the host went away before.
    fn relay(&mut self, connection: &Fd) -> Result<bool> {
        let mut buffer = [0; LONGEST];
        let mut pending = Pending { bytes: [0; WINDOW], start: 0, len: 0, ended: false };
        loop {
            let to_write = if pending.len > 0 { event::WRITE } else { 0 };
            let mut list = [
                Wait::on(Some(connection), event::READ),
                Wait::on(self.input.as_ref(), to_write),
                Wait::on(self.output.as_ref(), event::READ),
                Wait::on(self.errors.as_ref(), event::READ),
                Wait::on(Some(&self.watch), event::READ),
            ];
            sys::poll(&mut list, false)?;
            let [host, input, output, errors, end] = list.map(|wait| wait.happened());
            if end {
                return self.finish(connection, &mut buffer).map(|()| true);
            }
            if output {
                forward(connection, kind::OUTPUT, &mut self.output, &mut buffer)?;
            }
            if errors {
                forward(connection, kind::ERROR, &mut self.errors, &mut buffer)?;
            }
            if host && !self.hear(connection, &mut buffer, &mut pending)? {
                return Ok(false);
            }
            if input || host {
                self.feed(connection, &mut pending)?;
            }
        }
    }

    /// A frame of the host; `false` if it is gone.
    fn hear(&mut self, connection: &Fd, buffer: &mut [u8; LONGEST], pending: &mut Pending) -> Result<bool> {
        let Some((what, contents)) = receive(connection, buffer)? else { return Ok(false) };
        match (what, &*contents) {
            (kind::INPUT, bytes) => {
                if !pending.add(bytes) {
                    return Err(NONSENSE);
                }
            }
            (kind::SIZE, [r0, r1, c0, c1]) => {
                if let (true, Some(terminal)) = (self.terminal, &self.output) {
                    let (rows, columns) = (u16::from_le_bytes([*r0, *r1]), u16::from_le_bytes([*c0, *c1]));
                    let _ = sys::set_size(terminal, rows, columns);
                }
            }
            (kind::SIGNAL, [signal @ 1..=LAST_SIGNAL]) => {
                let _ = sys::kill(self.process, true, *signal);
            }
            _ => return Err(NONSENSE),
        }
        Ok(true)
    }

    /// Gives the command what it takes of its input.
    fn feed(&mut self, connection: &Fd, pending: &mut Pending) -> Result {
        let mut taken = 0;
        while pending.len > 0 {
            let written = match &self.input {
                Some(input) => sys::write(input, pending.first()),
                // Nobody reads it: let it go, so that the host is not held up.
                None => Ok(pending.first().len()),
            };
            match written {
                Ok(count) => {
                    pending.taken(count);
                    taken += count;
                }
                Err(EAGAIN) => break,
                Err(_) => self.input = None,
            }
        }
        if pending.ended && pending.len == 0 && !self.terminal {
            self.input = None;
        }
        if taken > 0 {
            send(connection, kind::CREDIT, &u32::try_from(taken).unwrap_or(0).to_le_bytes())?;
        }
        Ok(())
    }

    /// The command has ended: what it printed before follows, and its status.
    fn finish(&mut self, connection: &Fd, buffer: &mut [u8; LONGEST]) -> Result {
        let (status, signal) = sys::wait(self.process)?;
        for (what, stream) in [(kind::OUTPUT, &mut self.output), (kind::ERROR, &mut self.errors)] {
            // Something that it left behind may hold the stream open: what is there now is what counts.
            while stream.is_some() {
                let mut list = [Wait::on(stream.as_ref(), event::READ)];
                if sys::poll(&mut list, true)? == 0 {
                    break;
                }
                forward(connection, what, stream, buffer)?;
            }
        }
        send(connection, kind::EXIT, &[status, signal])
    }
}

/// Sends what a stream has; closes it at its end.
fn forward(connection: &Fd, what: u8, stream: &mut Option<Fd>, buffer: &mut [u8; LONGEST]) -> Result {
    let Some(fd) = stream else { return Ok(()) };
    match sys::read(fd, buffer) {
        Ok(count @ 1..) => send(connection, what, buffer.get(..count).unwrap_or_default()),
        Err(EAGAIN) => Ok(()),
        // A terminal's end is an error.
        Ok(0) | Err(_) => {
            *stream = None;
            Ok(())
        }
    }
}
