//! One run from the first instruction to the last: console, control channel, signals, deadlines.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use anyhow::Context;
use vmm::bus::Sink;
use vmm::control::{Control, Event, Request};
use vmm::machine::Machine;
use vmm::mailbox::{Sender, mailbox};
use vmm::runner::{Ending, Runner};
use vmm::terminal::{self, Escape, Keys, RawTerminal};
use vmm::{Error, Layer};

use super::RunOptions;
use super::events::Events;

/// How long a guest that has delivered its status may take to switch itself off.
const POWER_OFF_PATIENCE: Duration = Duration::from_secs(10);

const STDIN: RawFd = 0;

enum Notice {
    FirstOutput,
    Ready,
    /// The command's status, and how much it printed.
    Status(u8, u64),
    Ended(vmm::Result<Ending>),
}

/// Runs `machine` to its end.
pub(super) fn run(opts: &RunOptions, machine: Machine, events: &Events) -> anyhow::Result<u8> {
    let signals = signals()?;
    let (notify, notices) = mailbox()?;
    let interactive = opts.exec.is_none();
    let request = match &opts.exec {
        Some(command) => Request::Exec { command: command.clone(), mark: mark()? },
        None => Request::Shell { size: terminal::size(STDIN).or_else(told_size) },
    };
    let log = opts
        .console_log
        .as_ref()
        .map(|path| File::create(path).with_context(|| format!("creating {}", path.display())))
        .transpose()?;
    let terminal = if interactive { RawTerminal::enter(STDIN)? } else { None };

    let ended = notify.clone();
    let mut runner = Runner::start(
        machine,
        console(interactive, opts.verbose, log, notify.clone()),
        control(Control::new(request), notify.clone()),
        Box::new(move |ending| ended.send(Notice::Ended(ending))),
    )?;

    let mut state = Session { events, interactive, status: None, deadline: None };
    // Where something else than a terminal is at the other end, that one knows what its user's keys mean.
    let mut escape = terminal.is_some().then(Escape::default);
    let mut input = interactive;
    let result = loop {
        let mut fds = [notices.fd(), signals.as_raw_fd(), if input { STDIN } else { -1 }]
            .map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
        poll(&mut fds, state.deadline)?;
        if fds[1].revents != 0 {
            // Leave at once: a CPU's thread may be waiting for somebody to read its output. The kernel cleans up.
            std::mem::forget(runner);
            return Ok(128 + signal_number(&signals));
        }
        if let Some(result) = notices.drain().into_iter().find_map(|notice| state.handle(notice)) {
            break result;
        }
        if state.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            break Ok(());
        }
        if fds[2].revents != 0 {
            let typed = read_input();
            // At the end of input the guest goes on without.
            input = !typed.is_empty();
            let keys = match &mut escape {
                Some(escape) => escape.filter(&typed),
                None => Keys { bytes: typed, leave: false },
            };
            if keys.leave {
                break Ok(());
            }
            runner.send(&keys.bytes)?;
        }
    };
    runner.stop();
    drop(terminal);
    // The last bytes of output may have come with the stop.
    for notice in notices.drain() {
        if let Notice::Status(status, _) = notice {
            state.status = Some(status);
        }
    }
    match result? {
        () if interactive => Ok(0),
        () => state.status.ok_or_else(|| {
            Error::new(Layer::Guest, "it ended before the command did (its console says more)").into()
        }),
    }
}

struct Session<'a> {
    events: &'a Events,
    interactive: bool,
    status: Option<u8>,
    deadline: Option<Instant>,
}

impl Session<'_> {
    /// `Some` ends the run: with a failure, or with what the guest has told so far.
    fn handle(&mut self, notice: Notice) -> Option<anyhow::Result<()>> {
        match notice {
            Notice::FirstOutput => self.events.stage("guest-first-output"),
            Notice::Ready => self.events.stage("guest-init"),
            Notice::Status(status, printed) => {
                self.status = Some(status);
                self.deadline = Some(Instant::now() + POWER_OFF_PATIENCE);
                self.events.command_done(status, printed);
            }
            Notice::Ended(Ok(Ending::PowerOff)) => return Some(Ok(())),
            // A Realm cannot be started again as it was; for a shell, a restart is a way to leave.
            Notice::Ended(Ok(Ending::Reset)) if self.interactive => return Some(Ok(())),
            Notice::Ended(Ok(Ending::Reset)) => {
                return Some(Err(
                    Error::new(Layer::Guest, "it restarted itself (its console says why)").into()
                ));
            }
            Notice::Ended(Ok(Ending::Crash)) => {
                return Some(Err(Error::new(Layer::Guest, "it crashed (its console says why)").into()));
            }
            Notice::Ended(Err(error)) => return Some(Err(error.into())),
        }
        None
    }
}

/// Where the guest's console goes.
fn console(interactive: bool, verbose: bool, mut log: Option<File>, notify: Sender<Notice>) -> Sink {
    let mut first = true;
    Box::new(move |bytes| {
        if std::mem::take(&mut first) {
            notify.send(Notice::FirstOutput);
        }
        // A reader that has gone away, or a full disk, does not end the run.
        if interactive {
            let mut stdout = std::io::stdout().lock();
            let _ = stdout.write_all(bytes).and_then(|()| stdout.flush());
        } else if verbose {
            let _ = std::io::stderr().write_all(bytes);
        }
        if let Some(log) = &mut log {
            let _ = log.write_all(bytes);
        }
        Vec::new()
    })
}

/// Where the guest's control channel goes.
fn control(mut control: Control, notify: Sender<Notice>) -> Sink {
    let mut printed = 0_u64;
    Box::new(move |bytes| {
        let (events, reply) = control.receive(bytes);
        for event in events {
            match event {
                Event::Ready => notify.send(Notice::Ready),
                Event::Output(output) => {
                    let mut stdout = std::io::stdout().lock();
                    let _ = stdout.write_all(&output).and_then(|()| stdout.flush());
                    printed += u64::try_from(output.len()).unwrap_or(0);
                }
                Event::Status(status) => notify.send(Notice::Status(status, printed)),
            }
        }
        reply
    })
}

/// The terminal's size when it is further away: whoever starts us says it in the way that shells do.
fn told_size() -> Option<(u16, u16)> {
    let number = |name| std::env::var(name).ok()?.parse().ok().filter(|number| *number > 0);
    Some((number("LINES")?, number("COLUMNS")?))
}

/// A word that no output contains by accident.
fn mark() -> anyhow::Result<String> {
    let mut bytes = [0u8; 16];
    // SAFETY: the buffer is as long as the call is told. So few bytes come at once or not at all.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    anyhow::ensure!(usize::try_from(got) == Ok(bytes.len()), "there are no random bytes");
    Ok(bytes.iter().fold(String::from("end-"), |word, byte| format!("{word}{byte:02x}")))
}

/// Takes the signals that should end the run in order, as a file.
fn signals() -> anyhow::Result<OwnedFd> {
    // SAFETY: a zeroed set is valid storage for `sigemptyset`; the other calls get that set. The threads of the CPUs
    // start later and inherit the mask.
    let fd = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            libc::sigaddset(&raw mut set, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC)
    };
    anyhow::ensure!(fd >= 0, "signalfd: {}", std::io::Error::last_os_error());
    // SAFETY: the descriptor has just been made, and only we know it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn signal_number(signals: &OwnedFd) -> u8 {
    // SAFETY: a zeroed structure is valid, and the kernel fills at most that one.
    let info = unsafe {
        let mut info: libc::signalfd_siginfo = std::mem::zeroed();
        libc::read(signals.as_raw_fd(), (&raw mut info).cast(), size_of::<libc::signalfd_siginfo>());
        info
    };
    u8::try_from(info.ssi_signo).unwrap_or(0)
}

fn poll(fds: &mut [libc::pollfd], deadline: Option<Instant>) -> anyhow::Result<()> {
    let timeout = deadline.map_or(-1, |deadline| {
        let left = deadline.saturating_duration_since(Instant::now()).as_millis() + 1;
        libc::c_int::try_from(left).unwrap_or(libc::c_int::MAX)
    });
    let count = libc::nfds_t::try_from(fds.len()).unwrap_or(0);
    // SAFETY: the slice is valid for its length.
    let status = unsafe { libc::poll(fds.as_mut_ptr(), count, timeout) };
    let error = std::io::Error::last_os_error();
    anyhow::ensure!(status >= 0 || error.kind() == std::io::ErrorKind::Interrupted, "poll: {error}");
    Ok(())
}

/// What has been typed; nothing when the input has ended.
fn read_input() -> Vec<u8> {
    let mut buffer = [0u8; 1024];
    // SAFETY: the buffer is as long as the call is told.
    let got = unsafe { libc::read(STDIN, buffer.as_mut_ptr().cast(), buffer.len()) };
    buffer[..usize::try_from(got).unwrap_or(0)].to_vec()
}
