//! The lab's program on the emulated host: loads the module, starts what it is told to, relays streams.
//!
//! It is this same crate built for arm64, started by the host initramfs. It makes no decisions: what to run comes
//! over the control port, and everything that happens goes back there.

use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};

use super::protocol::{Event, Io, Request, VERDICT_FD, encode, port};

/// Where the host initramfs puts the module.
const MODULE: &str = "/kvm_realm.ko";
/// The module's device.
const DEVICE: &str = "/dev/kvm-realm";
/// The program's file descriptor for events.
const EVENTS_FD: i32 = 3;
/// How long a stream may stay open after its program ended: a child left behind may still hold it.
const DRAIN: Duration = Duration::from_secs(3);

/// The control port's sending side, shared by the relays.
#[derive(Clone)]
struct Control(Arc<Mutex<File>>);

impl Control {
    fn send(&self, event: &Event) {
        if let Ok(mut port) = self.0.lock() {
            let _ = port.write_all(&encode(event));
        }
    }
}

/// Serves requests until the machine is switched off.
pub(crate) fn serve() -> Result<u8> {
    let port = open_port(port::CONTROL)?;
    let control = Control(Arc::new(Mutex::new(port.try_clone()?)));
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    control.send(&Event::Hello { kernel: kernel.trim().to_owned() });
    // Whoever is asked for before the VMM listens hears that nobody does.
    let tunnel = open_port(port::TUNNEL)?;
    let accept = || crate::life::socket::connect(Path::new(crate::life::owner::INNER_SOCKET));
    crate::life::tunnel::Tunnel::start(tunnel.try_clone()?, tunnel, Some(Box::new(accept)));
    let verdict: Verdict = Arc::default();
    let mut requests = BufReader::new(port);
    let mut line = String::new();
    loop {
        line.clear();
        if requests.read_line(&mut line)? == 0 {
            // Nobody holds the other end of the port, now or for ever.
            std::thread::sleep(Duration::from_millis(50));
            continue;
        }
        match serde_json::from_str(&line) {
            Ok(Request::PowerOff) => power_off(),
            Ok(Request::Go) => {
                // A program that has ended meanwhile needs no verdict.
                let way = verdict.lock().ok().and_then(|mut verdict| verdict.take());
                let _ = way.map(|mut way| way.write_all(b"\n"));
            }
            Ok(Request::Start { argv, io, module, events, size }) => {
                let (control, verdict) = (control.clone(), verdict.clone());
                let verdict = events.then_some(verdict);
                std::thread::spawn(move || {
                    let event = start(&control, &argv, io, module, verdict, size).unwrap_or_else(|error| {
                        control.send(&Event::Error { layer: "host".to_owned(), error: format!("{error:#}") });
                        Event::Exit { status: 125, stdout_bytes: 0 }
                    });
                    control.send(&event);
                });
            }
            Err(error) => {
                let error = format!("the lab's agent does not understand a request: {error}");
                control.send(&Event::Error { layer: "host".to_owned(), error });
            }
        }
    }
}

/// The way to the program that waits for a verdict on its Realm's token.
type Verdict = Arc<Mutex<Option<File>>>;

/// Runs one program to its end. With a place for its `verdict` it is one that tells events.
fn start(
    control: &Control,
    argv: &[String],
    io: Io,
    module: bool,
    verdict: Option<Verdict>,
    size: Option<(u16, u16)>,
) -> Result<Event> {
    if module {
        if let Err(error) = load_module() {
            control.send(&Event::Error { layer: "module".to_owned(), error: format!("{error:#}") });
            return Ok(Event::Exit { status: 125, stdout_bytes: 0 });
        }
        control.send(&Event::Module);
    }
    let (program, arguments) = argv.split_first().context("nothing to start")?;
    let mut command = Command::new(program);
    command.args(arguments);
    if let Some((rows, columns)) = size {
        command.env("LINES", rows.to_string()).env("COLUMNS", columns.to_string());
    }
    let mut done = Vec::new();
    let copied = Arc::new(AtomicU64::new(0));

    // What the program tells, and the ends of pipes that are its own.
    let (mut told, mut given) = (None, Vec::new());
    if let Some(verdict) = verdict {
        let ((reader, writer), (answer, way)) = (pipe()?, pipe()?);
        command.args(["--events-fd", &EVENTS_FD.to_string()]);
        pass(&mut command, [(writer.as_raw_fd(), EVENTS_FD), (answer.as_raw_fd(), VERDICT_FD)]);
        told = Some(File::from(reader));
        given.extend([writer, answer]);
        *verdict.lock().unwrap_or_else(PoisonError::into_inner) = Some(way.into());
    }
    match io {
        Io::Exec => command.stdin(open_port(port::STDIN)?).stdout(Stdio::piped()).stderr(Stdio::piped()),
        Io::Console => {
            let console = open_port(port::CONSOLE)?;
            let output = console.try_clone()?;
            command.stdin(console).stdout(output).stderr(Stdio::piped())
        }
        Io::Terminal => {
            let terminal = open_terminal(size)?;
            own_session(&mut command);
            command.stdin(terminal.try_clone()?).stdout(terminal.try_clone()?).stderr(terminal)
        }
        Io::Uart => bail!("a payload's job came to an agent"),
    };
    let mut child = command.spawn().with_context(|| format!("cannot start {program}"))?;
    drop(command);
    drop(given);
    if let Some(told) = told {
        let control = control.clone();
        done.push(relay(move || relay_events(told, &control)));
    }
    if let Some(errors) = child.stderr.take() {
        let control = control.clone();
        done.push(relay(move || relay_log(errors, &control)));
    }
    if let Some(output) = child.stdout.take() {
        let mut stdout = open_port(port::STDOUT)?;
        let copied = copied.clone();
        done.push(relay(move || copy(output, &mut stdout, &copied)));
    }
    let status = child.wait().context("cannot wait for the program")?;
    let deadline = Instant::now() + DRAIN;
    for receiver in done {
        let _ = receiver.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    }
    let status = match (status.code(), status.signal()) {
        (Some(code), _) => u8::try_from(code).unwrap_or(125),
        (None, Some(signal)) => u8::try_from(128 + signal).unwrap_or(125),
        (None, None) => 125,
    };
    Ok(Event::Exit { status, stdout_bytes: copied.load(Ordering::SeqCst) })
}

/// Runs `work` in a thread and gives something to wait on.
fn relay(work: impl FnOnce() + Send + 'static) -> Receiver<()> {
    let (sender, receiver): (Sender<()>, _) = channel();
    std::thread::spawn(move || {
        work();
        let _ = sender.send(());
    });
    receiver
}

fn relay_events(reader: File, control: &Control) {
    for line in BufReader::new(reader).lines().map_while(std::result::Result::ok) {
        let value: serde_json::Value = match serde_json::from_str(&line) {
            Ok(value) => value,
            Err(_) => continue,
        };
        let text = |key: &str| value.get(key).and_then(|value| value.as_str()).map(str::to_owned);
        let number = |key: &str| value.get(key).and_then(serde_json::Value::as_u64);
        let event = if let Some(stage) = text("stage") {
            control.send(&Event::Stage { stage, ns: number("ns").unwrap_or(0) });
            match (number("status"), number("stdout_bytes")) {
                (Some(status), Some(stdout_bytes)) => {
                    Event::Result { status: u8::try_from(status).unwrap_or(125), stdout_bytes }
                }
                _ => continue,
            }
        } else if let Some(error) = text("error") {
            Event::Error { layer: text("layer").unwrap_or_else(|| "vmm".to_owned()), error }
        } else {
            Event::Note { value }
        };
        control.send(&event);
    }
}

fn relay_log(reader: impl Read, control: &Control) {
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    while matches!(reader.read_until(b'\n', &mut line), Ok(count) if count > 0) {
        let text = String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']).to_owned();
        control.send(&Event::Log { text });
        line.clear();
    }
}

fn copy(mut from: impl Read, to: &mut File, copied: &AtomicU64) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..count]).is_err() {
            return;
        }
        copied.fetch_add(u64::try_from(count).unwrap_or(0), Ordering::SeqCst);
    }
}

/// Loads the module and waits for its device. The error carries what the kernel's log says about it.
fn load_module() -> Result<()> {
    if Path::new(DEVICE).exists() {
        return Ok(());
    }
    let module = File::open(MODULE).with_context(|| format!("cannot open {MODULE}"))?;
    // SAFETY: finit_module takes a live descriptor, a string and flags; it touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, module.as_raw_fd(), c"".as_ptr(), 0) };
    if result != 0 {
        let error = std::io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EEXIST) {
            return Err(anyhow!("the kernel refused {MODULE}: {error}{}", module_log()));
        }
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    while !Path::new(DEVICE).exists() {
        if Instant::now() > deadline {
            bail!("{MODULE} is loaded but {DEVICE} did not appear{}", module_log());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// What the kernel's log says about the module.
fn module_log() -> String {
    let Ok(log) = Command::new("dmesg").output() else { return String::new() };
    let log = String::from_utf8_lossy(&log.stdout).into_owned();
    let lines: Vec<&str> =
        log.lines().filter(|line| line.contains("kvm-realm") || line.contains("kvm_realm")).collect();
    lines[lines.len().saturating_sub(5)..].iter().map(|line| format!("; {line}")).collect()
}

fn open_port(name: &str) -> Result<File> {
    let path = format!("/dev/virtio-ports/{name}");
    OpenOptions::new().read(true).write(true).open(&path).with_context(|| format!("cannot open {path}"))
}

fn open_terminal(size: Option<(u16, u16)>) -> Result<File> {
    let terminal =
        OpenOptions::new().read(true).write(true).open("/dev/hvc0").context("cannot open /dev/hvc0")?;
    if let Some((rows, columns)) = size {
        let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the ioctl reads one winsize.
        unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &size) };
    }
    Ok(terminal)
}

/// Makes the program the leader of a session whose terminal is its standard input: job control works.
fn own_session(command: &mut Command) {
    // SAFETY: setsid and ioctl are async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 1) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
}

/// Gives descriptors to a program, each with the number that it has to have there.
fn pass(command: &mut Command, descriptors: [(i32, i32); 2]) {
    // SAFETY: between fork and exec only dup2 is called, which is async-signal-safe; whoever owns the descriptors keeps
    // them until the program was started, and if not, dup2 refuses them.
    unsafe {
        command.pre_exec(move || {
            let given = descriptors.iter().all(|(ours, its)| libc::dup2(*ours, *its) >= 0);
            if given { Ok(()) } else { Err(std::io::Error::last_os_error()) }
        });
    }
}

/// A pipe whose ends have higher numbers than those that programs are given.
fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    let (mut ends, mut high) = ([0; 2], [-1; 2]);
    // SAFETY: pipe2 writes two descriptors, which nobody else owns, and fcntl makes another of each.
    unsafe {
        if libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) != 0 {
            return Err(std::io::Error::last_os_error()).context("cannot make a pipe");
        }
        let ends = ends.map(|end| OwnedFd::from_raw_fd(end));
        for (high, end) in high.iter_mut().zip(&ends) {
            *high = libc::fcntl(end.as_raw_fd(), libc::F_DUPFD_CLOEXEC, VERDICT_FD + 1);
            if *high < 0 {
                return Err(std::io::Error::last_os_error()).context("cannot make a pipe");
            }
        }
        Ok((OwnedFd::from_raw_fd(high[0]), OwnedFd::from_raw_fd(high[1])))
    }
}

fn power_off() -> ! {
    // SAFETY: plain system calls; nothing of this machine outlives them.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
    }
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}
