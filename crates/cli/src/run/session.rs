//! One run from the first instruction to the last: console, control channel, devices, signals, deadlines.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use serde_json::json;
use vmm::bus::Sink;
use vmm::control::{Control, Event, PORTS, Request};
use vmm::machine::Machine;
use vmm::mailbox::{Sender, mailbox};
use vmm::runner::{Ending, Runner};
use vmm::terminal::{self, Escape, Keys, RawTerminal};
use vmm::virtio::Device;
use vmm::virtio::console::{Console, Port};
use vmm::virtio::rng::Rng;
use vmm::virtio::vsock::{Handle, Vsock};
use vmm::{Error, Layer};

use super::RunOptions;
use super::events::Events;
use super::launch::{self, Check, Verdict};
use crate::life::api;
use crate::life::hub::Hub;
use crate::life::owner::Owner;
use crate::life::vsock::VsockArg;
use crate::log::Capped;

/// How long a guest that has delivered its status may take to switch itself off.
const POWER_OFF_PATIENCE: Duration = Duration::from_secs(10);

const STDIN: RawFd = 0;
/// `SIGWINCH`.
const WINDOW_CHANGED: u8 = 28;

enum Notice {
    FirstOutput,
    Ready,
    /// The Realm's token, or why there is none.
    Token(Result<String, String>),
    /// The command's status, and how much it printed.
    Status(u8, u64),
    Ended(vmm::Result<Ending>),
    /// Somebody asked for the end through the control socket.
    Stopped,
}

/// Where everything goes that the guest prints on serial port and terminal.
type Screen = Arc<Mutex<Box<dyn FnMut(&[u8]) + Send>>>;

/// Runs `machine` to its end.
pub(super) fn run(
    opts: &RunOptions,
    machine: Machine,
    mut devices: Vec<Box<dyn Device>>,
    events: &Events,
    check: Option<&Check>,
    owner: &mut Owner,
) -> anyhow::Result<u8> {
    let signals = signals()?;
    let (notify, notices) = mailbox()?;
    let interactive = opts.exec.is_none() && !opts.launch.attest;
    let request = match &opts.exec {
        Some(command) => Request::Exec(command.clone()),
        None if opts.launch.attest => Request::Off,
        None => Request::Shell,
    };
    let asks = check.filter(|_| opts.launch.wants_token());
    let nonce = asks.map(|check| check.nonce().to_owned()).or_else(|| opts.launch.report.clone());
    let conversation = Control::new(request.clone()).with_report(nonce);
    let log = opts
        .console_log
        .as_ref()
        .map(|path| Capped::create(path).with_context(|| format!("creating {}", path.display())))
        .transpose()?;
    let size = terminal::size(STDIN).or_else(told_size);
    let terminal = if interactive { RawTerminal::enter(STDIN)? } else { None };

    let (resize, sizes) = mailbox()?;
    let (keyboard, typed) = UnixStream::pair()?;
    let hub = Arc::new(Hub::new(keyboard, resize)?);
    let (go, gone) = UnixStream::pair()?;
    go.set_nonblocking(true)?;
    let screen = screen(interactive, opts.verbose, log, notify.clone(), hub.clone());
    let printed = Arc::new(AtomicU64::new(0));
    let sinks: [Sink; 5] = [
        show(&screen),
        Box::new(|_| Vec::new()),
        stream(std::io::stdout(), printed.clone()),
        stream(std::io::stderr(), Arc::default()),
        control(conversation, notify.clone(), printed),
    ];
    // What is typed; the command's input; what init is told when its token was judged.
    let input = if interactive { None } else { Some(own_stdin()?) };
    let sources = [Some(typed.into()), input, None, None, Some(gone.into())];
    let ports = PORTS.into_iter().zip(sinks).zip(sources);
    let ports = ports.map(|((name, sink), source)| Port { name, sink, source }).collect();
    devices.insert(0, Box::new(Console::new(ports, sizes, size)));
    devices.insert(1, Box::new(Rng));
    let vsock = vsock(opts, &mut devices)?;
    let stop = notify.clone();
    let control = api::Machine {
        config: description(opts, owner),
        memory: opts.memory_mib << 20,
        hub: hub.clone(),
        vsock,
        stop: Box::new(move || stop.send(Notice::Stopped)),
    };
    let control = Arc::new(control);
    opts.confinement.prepare()?;
    for socket in owner.sockets() {
        api::serve(&socket, control.clone(), opts.confinement)?;
    }

    let ended = notify.clone();
    let report = |text: &str| eprintln!("realm: guest: {text}");
    let mut runner = Runner::start(
        machine,
        show(&screen),
        devices,
        Arc::new(report),
        opts.confinement,
        Box::new(move |ending| ended.send(Notice::Ended(ending))),
    )?;
    // From here on a guest talks to us.
    opts.confinement.main()?.enter()?;

    owner.running();
    let attest = opts.launch.attest;
    let foreign = opts.verdict_fd.filter(|_| opts.launch.report.is_some());
    let mut state = Session {
        events,
        owner,
        interactive,
        attest,
        check: asks,
        foreign,
        request,
        go,
        status: None,
        deadline: None,
    };
    // Where something else than a terminal is at the other end, that one knows what its user's keys mean.
    let mut escape = terminal.is_some().then(Escape::default);
    let mut input = interactive;
    let mut unsent = Vec::new();
    let result = loop {
        // A pipe waits until the guest has taken what came before.
        let (source, event) = match (input, unsent.is_empty()) {
            (_, false) => (hub.keyboard(), libc::POLLOUT),
            (true, true) => (STDIN, libc::POLLIN),
            (false, true) => (-1, libc::POLLIN),
        };
        let mut fds = [
            (notices.fd(), libc::POLLIN),
            (signals.as_raw_fd(), libc::POLLIN),
            (source, event),
            (state.foreign.unwrap_or(-1), libc::POLLIN),
        ]
        .map(|(fd, events)| libc::pollfd { fd, events, revents: 0 });
        poll(&mut fds, state.deadline)?;
        let signal = if fds[1].revents != 0 { signal_number(&signals) } else { 0 };
        if signal == WINDOW_CHANGED {
            if let Some((rows, columns)) = terminal::size(STDIN) {
                hub.resize(rows, columns);
            }
            continue;
        }
        if signal != 0 {
            // Leave at once: a thread may be waiting for somebody to read its output. The kernel cleans up.
            std::mem::forget(runner);
            return Ok(128 + signal);
        }
        if let Some(result) = notices.drain().into_iter().find_map(|notice| state.handle(notice)) {
            break result;
        }
        if fds[3].revents != 0 {
            if let Err(error) = state.foreign_verdict() {
                break Err(error);
            }
        }
        if state.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            break Ok(());
        }
        if fds[2].revents == 0 {
            continue;
        }
        if unsent.is_empty() {
            let typed = read_some(STDIN);
            // At the end of input the guest goes on without.
            input = !typed.is_empty();
            let keys = match &mut escape {
                Some(escape) => escape.filter(&typed),
                None => Keys { bytes: typed, leave: false },
            };
            if keys.leave {
                break Ok(());
            }
            unsent = keys.bytes;
        }
        unsent.drain(..hub.type_in(&unsent));
        // Keys do not wait, because some of them are for us: where a terminal's buffer is full, they are lost.
        if escape.is_some() {
            unsent.clear();
        }
    };
    if interactive {
        events.memory();
    }
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

/// Puts the guest's sockets among the devices.
fn vsock(opts: &RunOptions, devices: &mut Vec<Box<dyn Device>>) -> vmm::Result<Option<Handle>> {
    let VsockArg::On { cid, socket } = opts.vsock() else { return Ok(None) };
    let (device, handle) = Vsock::new(cid, socket.as_deref())?;
    devices.push(Box::new(device));
    Ok(Some(handle))
}

/// What `vm.info` shows of the flags.
fn description(opts: &RunOptions, owner: &Owner) -> serde_json::Value {
    let disks = opts.disks.iter().map(|disk| json!({ "path": disk.path, "readonly": disk.read_only }));
    json!({
        "name": owner.name(),
        "cpus": { "boot_vcpus": opts.cpus, "max_vcpus": opts.cpus },
        "memory": { "size": opts.memory_mib << 20 },
        "payload": { "kernel": opts.kernel, "initramfs": opts.initrd, "cmdline": opts.cmdline },
        "disks": disks.collect::<Vec<_>>(),
        "net": opts.nets.cards.len(),
        "vsock": match opts.vsock() {
            VsockArg::On { cid, socket } => json!({ "cid": cid, "socket": socket }),
            VsockArg::Off => serde_json::Value::Null,
        },
        "realm": !opts.plain,
    })
}

struct Session<'a> {
    events: &'a Events,
    owner: &'a mut Owner,
    interactive: bool,
    /// Whether a token is all that is wanted.
    attest: bool,
    check: Option<&'a Check>,
    /// Where the verdict comes from if somebody else judges.
    foreign: Option<RawFd>,
    /// What init is asked to do once its token was judged, and the way there.
    request: Request,
    go: UnixStream,
    status: Option<u8>,
    deadline: Option<Instant>,
}

impl Session<'_> {
    /// `Some` ends the run: with a failure, or with what the guest has told so far.
    fn handle(&mut self, notice: Notice) -> Option<anyhow::Result<()>> {
        match notice {
            Notice::FirstOutput => self.events.stage("guest-first-output"),
            Notice::Ready => self.events.stage("guest-init"),
            Notice::Token(answer) => {
                let answer = answer.as_deref().map_err(String::as_str);
                self.events.token(answer);
                match self.check.map(|check| check.judge(answer)) {
                    Some(Verdict::Stop(why)) => return Some(Err(Error::new(Layer::Rmm, why).into())),
                    Some(Verdict::Go { say, measured }) => {
                        launch::say(&say);
                        measured.into_iter().for_each(|digits| self.owner.measured(digits));
                        if let Err(error) = self.go_on() {
                            return Some(Err(error));
                        }
                    }
                    None => {}
                }
            }
            Notice::Status(status, printed) => {
                self.status = Some(status);
                self.deadline = Some(Instant::now() + POWER_OFF_PATIENCE);
                self.events.memory();
                self.events.command_done(status, printed);
            }
            Notice::Stopped if self.interactive => return Some(Ok(())),
            Notice::Stopped => return Some(Err(Error::vmm("somebody ended the Realm").into())),
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

    /// The Realm is the right one: has init do what was asked for.
    fn go_on(&mut self) -> anyhow::Result<()> {
        // The longest command fits into a socket's buffer.
        self.go.write_all(&self.request.line()).context("telling the guest's init to go on")?;
        if self.attest {
            self.handle(Notice::Status(0, 0));
        }
        Ok(())
    }

    /// Whoever got the token has judged it: one byte says go; the end says that nobody will. Who finds the wrong Realm
    /// ends us.
    fn foreign_verdict(&mut self) -> anyhow::Result<()> {
        let said = self.foreign.take().map(read_some).unwrap_or_default();
        if said.is_empty() {
            return Err(Error::vmm("whoever was to judge the Realm's token has gone away").into());
        }
        self.go_on()
    }
}

/// What shows the guest's console to whom it concerns.
fn screen(
    interactive: bool,
    verbose: bool,
    mut log: Option<Capped>,
    notify: Sender<Notice>,
    hub: Arc<Hub>,
) -> Screen {
    let mut first = true;
    Arc::new(Mutex::new(Box::new(move |bytes| {
        if std::mem::take(&mut first) {
            notify.send(Notice::FirstOutput);
        }
        hub.output(bytes);
        // A reader that has gone away, or a full disk, does not end the run.
        if interactive {
            let mut stdout = std::io::stdout().lock();
            let _ = stdout.write_all(bytes).and_then(|()| stdout.flush());
        } else if verbose {
            let _ = std::io::stderr().write_all(bytes);
        }
        if let Some(log) = &mut log {
            let _ = log.write(bytes);
        }
    })))
}

/// A port that is shown on the screen.
fn show(screen: &Screen) -> Sink {
    let screen = screen.clone();
    Box::new(move |bytes| {
        (screen.lock().unwrap_or_else(PoisonError::into_inner))(bytes);
        Vec::new()
    })
}

/// A port whose bytes go on unchanged.
fn stream(mut to: impl Write + Send + 'static, printed: Arc<AtomicU64>) -> Sink {
    Box::new(move |bytes| {
        let _ = to.write_all(bytes).and_then(|()| to.flush());
        printed.fetch_add(u64::try_from(bytes.len()).unwrap_or(0), Ordering::SeqCst);
        Vec::new()
    })
}

/// The conversation with init.
fn control(mut control: Control, notify: Sender<Notice>, printed: Arc<AtomicU64>) -> Sink {
    Box::new(move |bytes| {
        let (events, reply) = control.receive(bytes);
        for event in events {
            notify.send(match event {
                Event::Ready => Notice::Ready,
                Event::Token(answer) => Notice::Token(answer),
                Event::Status(status) => Notice::Status(status, printed.load(Ordering::SeqCst)),
            });
        }
        reply
    })
}

/// Standard input as a file of its own.
fn own_stdin() -> anyhow::Result<OwnedFd> {
    // SAFETY: a system call without pointers; the new descriptor is checked and owned.
    unsafe {
        let fd = libc::fcntl(STDIN, libc::F_DUPFD_CLOEXEC, 3);
        if fd >= 0 {
            return Ok(OwnedFd::from_raw_fd(fd));
        }
    }
    // Whoever started us closed it.
    Ok(File::open("/dev/null")?.into())
}

/// The terminal's size when it is further away: whoever starts us says it in the way that shells do.
fn told_size() -> Option<(u16, u16)> {
    let number = |name| std::env::var(name).ok()?.parse().ok().filter(|number| *number > 0);
    Some((number("LINES")?, number("COLUMNS")?))
}

/// Takes the signals that should end the run in order, as a file.
fn signals() -> anyhow::Result<OwnedFd> {
    // SAFETY: a zeroed set is valid storage for `sigemptyset`; the other calls get that set. The threads of the CPUs
    // start later and inherit the mask.
    let fd = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGWINCH] {
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

/// What can be read without waiting where something is; nothing at the end.
fn read_some(from: RawFd) -> Vec<u8> {
    let mut buffer = [0u8; 1024];
    // SAFETY: the buffer is as long as the call is told.
    let got = unsafe { libc::read(from, buffer.as_mut_ptr().cast(), buffer.len()) };
    buffer[..usize::try_from(got).unwrap_or(0)].to_vec()
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::fd::IntoRawFd as _;

    use super::*;
    use crate::run::launch::{LaunchArgs, Prediction};
    use crate::run::manifest::tests::manifest;

    fn session<'a>(check: Option<&'a Check>, request: Request) -> (Session<'a>, UnixStream) {
        let (go, gone) = UnixStream::pair().unwrap();
        go.set_nonblocking(true).unwrap();
        gone.set_nonblocking(true).unwrap();
        let session = Session {
            events: Box::leak(Box::new(Events::new(None))),
            owner: Box::leak(Box::new(Owner::nobody())),
            interactive: false,
            attest: false,
            check,
            foreign: None,
            request,
            go,
            status: None,
            deadline: None,
        };
        (session, gone)
    }

    /// What init is told.
    fn told(init: &mut UnixStream) -> Vec<u8> {
        let mut bytes = Vec::new();
        let _ = init.read_to_end(&mut bytes);
        bytes
    }

    fn check(strict: bool) -> Check {
        let args = LaunchArgs { check: strict, ..LaunchArgs::default() };
        let make = || Ok(manifest(cca_abi::kvm::rme::HASH_SHA256));
        Check::new(&args, Prediction::start(make, vec![]).unwrap()).unwrap()
    }

    #[test]
    fn the_longest_command_starts_after_the_verdict() {
        let command = Request::Exec("x".repeat(vmm::control::MAX_COMMAND));
        let easy = check(false);
        let (mut session, mut init) = session(Some(&easy), command.clone());
        assert!(session.handle(Notice::Ready).is_none());
        assert!(told(&mut init).is_empty());
        assert!(session.handle(Notice::Token(Err("no driver".into()))).is_none());
        assert_eq!(told(&mut init), command.line());
    }

    #[test]
    fn the_wrong_realm_gets_no_command() {
        let strict = check(true);
        let (mut session, mut init) = session(Some(&strict), Request::Shell);
        assert!(session.handle(Notice::Token(Ok("AAAA".into()))).is_some_and(|result| result.is_err()));
        assert!(told(&mut init).is_empty());
    }

    #[test]
    fn somebody_elses_verdict_is_waited_for() {
        for (verdict, line) in [(&b"\n"[..], &b"shell\n"[..]), (b"", b"")] {
            let (mut session, mut init) = session(None, Request::Shell);
            let (mut judge, foreign) = UnixStream::pair().unwrap();
            session.foreign = Some(foreign.into_raw_fd());
            assert!(session.handle(Notice::Token(Ok("AAAA".into()))).is_none());
            assert!(told(&mut init).is_empty());
            judge.write_all(verdict).unwrap();
            drop(judge);
            assert_eq!(session.foreign_verdict().is_ok(), !verdict.is_empty());
            assert_eq!(told(&mut init), line);
        }
    }
}
