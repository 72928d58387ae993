//! The emulated CCA machine: QEMU's command line, its consoles, its life and death.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use vmm::share::{folder::Folder, remote};

use super::protocol::{Lines, port};
use crate::run::shares::ShareArg;

/// How QEMU runs unless --accel says otherwise: one thread for all CPUs, because world switches and changes of a
/// granule's owner invalidate TLBs, which stops the threads of all others; and a clock that counts instructions (two
/// nanoseconds each), because with the real clock a slow machine spends its time on the timer ticks of two kernels.
/// An idle machine sleeps in real time.
const COUNTING: [&str; 2] = ["-icount", "shift=1,sleep=on"];

/// The CPU. With LPA2, Linux uses tables with one more level, whose walks cost a tenth of a Realm's boot.
const CPU: &str = "max,x-rme=on,lpa2=off";

/// The number of the first shared folder's port. Ports 0 and up are the consoles and streams; QEMU has 31.
const FIRST_SHARE: usize = 16;

/// Names of the files in a run directory.
pub(crate) mod log {
    /// UART0: host kernel, and the RMM's rare lines.
    pub(crate) const HOST: &str = "uart0-host.log";
    /// UART1: the monitor.
    pub(crate) const EL3: &str = "uart1-el3.log";
    /// The guest's console.
    pub(crate) const GUEST: &str = "guest-console.log";
    /// What QEMU says itself.
    pub(crate) const QEMU: &str = "qemu.log";
    /// What programs on the host print on standard error.
    pub(crate) const PROGRAM: &str = "host-programs.log";
    /// Everything that enters the Realm's initial measurement.
    pub(crate) const MANIFEST: &str = "launch.json";
    /// QEMU's command line, to repeat a run by hand.
    pub(crate) const COMMAND: &str = "command";
}

/// What to start.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    /// QEMU itself.
    pub(crate) qemu: PathBuf,
    /// Monitor and RMM; without them the kernel starts at EL2 on a machine without Realms.
    pub(crate) firmware: Option<(PathBuf, PathBuf)>,
    /// Whether that is our monitor, whose words we know.
    pub(crate) own_firmware: bool,
    /// The host kernel, or a payload in its place.
    pub(crate) kernel: PathBuf,
    /// The host's initramfs.
    pub(crate) initrd: Option<PathBuf>,
    /// The host kernel's command line.
    pub(crate) cmdline: String,
    /// CPUs.
    pub(crate) cpus: u32,
    /// MiB.
    pub(crate) memory: u64,
    /// More properties of the machine, `key=value`.
    pub(crate) machine_options: Vec<String>,
    /// More properties of the CPUs.
    pub(crate) cpu_options: Vec<String>,
    /// Which RMM-EL3 interface the monitor is to offer.
    pub(crate) rmm_el3: Option<String>,
    /// Whether the machine's programs may use semihosting: it opens the developer's files to them.
    pub(crate) semihosting: bool,
    /// Whether the machine starts again after a reset, instead of ending.
    pub(crate) reboot: bool,
    /// Folders of this machine that are served over ports of their own.
    pub(crate) shares: Vec<ShareArg>,
    /// QEMU's accelerator, if not the default way to run.
    pub(crate) accel: Option<String>,
    /// More arguments.
    pub(crate) extra: Vec<String>,
    /// Files that these arguments name by number.
    pub(crate) inherited: Vec<Arc<OwnedFd>>,
}

/// A machine that runs.
pub(crate) struct Machine {
    child: Child,
    /// The run directory.
    pub(crate) directory: PathBuf,
    /// The control port.
    pub(crate) control: UnixStream,
    /// The stdin port, until its end.
    pub(crate) stdin: Option<UnixStream>,
    /// The stdout port.
    pub(crate) stdout: UnixStream,
    /// The guest's console.
    pub(crate) console: UnixStream,
    /// The terminal hvc0.
    pub(crate) terminal: UnixStream,
    /// The port that carries connections, until somebody takes it.
    pub(crate) tunnel: Option<UnixStream>,
    /// When QEMU was started.
    pub(crate) started: Instant,
}

/// Starts a machine in a run directory.
pub(crate) fn start(config: &Config, directory: &Path) -> Result<Machine> {
    let mut command = Command::new(&config.qemu);
    let machine = if config.firmware.is_some() {
        "virt,secure=on,virtualization=on,gic-version=3"
    } else {
        "virt,virtualization=on,gic-version=3"
    };
    let cpu = if config.firmware.is_some() { CPU } else { "max" };
    // Memory counts when it is touched: a machine may have more than this one.
    let backend = format!("memory-backend-ram,id=memory,size={}M,reserve=off", config.memory);
    let with = |base: &str, options: &[String]| {
        options.iter().fold(base.to_owned(), |all, option| format!("{all},{option}"))
    };
    command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
    command.args(["-object", &backend]);
    command.args(["-M", &format!("{},memory-backend=memory", with(machine, &config.machine_options))]);
    command.args(["-cpu", &with(cpu, &config.cpu_options)]);
    command.args(["-smp", &config.cpus.to_string(), "-m", &format!("{}M", config.memory)]);
    if !config.reboot {
        command.arg("-no-reboot");
    }
    if config.semihosting {
        command.args(["-semihosting-config", "enable=on,target=native"]);
    }
    match &config.accel {
        Some(accel) => {
            command.args(["-accel", accel]);
        }
        None if config.extra.iter().any(|argument| argument == "-icount") => {}
        None => {
            command.args(COUNTING);
        }
    }
    command.args(["-monitor", "none"]);
    command.arg("-serial").arg(option("file:", &directory.join(log::HOST), ""));
    command.arg("-serial").arg(option("file:", &directory.join(log::EL3), ""));
    if let Some((monitor, rmm)) = &config.firmware {
        command.arg("-bios").arg(monitor);
        command.arg("-fw_cfg").arg(option("name=opt/kvm-realm/rmm,file=", rmm, ""));
        if let Some(family) = &config.rmm_el3 {
            command.args(["-fw_cfg", &format!("name=opt/kvm-realm/rmm-el3,string={family}")]);
        }
    }
    command.arg("-kernel").arg(&config.kernel);
    if let Some(initrd) = &config.initrd {
        command.arg("-initrd").arg(initrd);
    }
    if !config.cmdline.is_empty() {
        command.arg("-append").arg(&config.cmdline);
    }
    // Port 0 of the bus is reserved for the terminal; each port is one end of a socket pair, so that no path
    // can be too long for a socket's address and nobody else can connect.
    command.args(["-device", "virtio-serial-pci,id=ports,max_ports=31"]);
    let (terminal, far_terminal) = pair()?;
    let (control, far_control) = pair()?;
    let (stdout, far_stdout) = pair()?;
    let (stdin, far_stdin) = pair()?;
    let (console, far_console) = pair()?;
    let (tunnel, far_tunnel) = pair()?;
    let ends = [
        (&far_terminal, "terminal", None),
        (&far_control, "control", Some(port::CONTROL)),
        (&far_stdout, "stdout", Some(port::STDOUT)),
        (&far_console, "console", Some(port::CONSOLE)),
        (&far_stdin, "stdin", Some(port::STDIN)),
        (&far_tunnel, "tunnel", Some(port::TUNNEL)),
    ];
    for (number, (end, id, name)) in ends.iter().enumerate() {
        command.arg("-chardev").arg(format!("socket,id={id},fd={}", end.as_raw_fd()));
        command.arg("-device").arg(match name {
            None => format!("virtconsole,bus=ports.0,chardev={id},nr={number}"),
            Some(name) => format!("virtserialport,bus=ports.0,chardev={id},name={name},nr={number}"),
        });
    }
    let shares = config.shares.iter().map(serve).collect::<Result<Vec<_>>>()?;
    for (index, end) in shares.iter().enumerate() {
        let (id, number) = (format!("share{index}"), FIRST_SHARE + index);
        command.arg("-chardev").arg(format!("socket,id={id},fd={}", end.as_raw_fd()));
        let name = port::share(index);
        command.arg("-device");
        command.arg(format!("virtserialport,bus=ports.0,chardev={id},name={name},nr={number}"));
    }
    command.args(&config.extra);

    let files = config.inherited.iter().map(|file| &**file);
    let inherited: Vec<RawFd> =
        ends.iter().map(|(end, ..)| *end).chain(&shares).chain(files).map(|end| end.as_raw_fd()).collect();
    let parent = std::process::id();
    // SAFETY: only async-signal-safe calls between fork and exec; the descriptors outlive spawn.
    unsafe {
        command.pre_exec(move || {
            // QEMU never outlives us, however we end.
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            if u32::try_from(libc::getppid()) != Ok(parent) {
                libc::_exit(1);
            }
            // The terminal's signals are for us; we decide what becomes of the machine.
            libc::setpgid(0, 0);
            for &descriptor in &inherited {
                if libc::fcntl(descriptor, libc::F_SETFD, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    let errors = File::create(directory.join(log::QEMU)).context("cannot write to the run directory")?;
    let _ = File::create(directory.join(log::COMMAND))
        .and_then(|mut file| writeln!(file, "{}", crate::command::shown(&command)));
    let child = command
        .stdin(Stdio::null())
        .stdout(errors.try_clone()?)
        .stderr(errors)
        .spawn()
        .with_context(|| format!("cannot start {} (see `realm doctor`)", config.qemu.display()))?;
    for socket in [&control, &stdin, &stdout, &console, &terminal] {
        socket.set_nonblocking(true)?;
    }
    Ok(Machine {
        child,
        directory: directory.to_owned(),
        control,
        stdin: Some(stdin),
        stdout,
        console,
        terminal,
        tunnel: Some(tunnel),
        started: Instant::now(),
    })
}

/// Serves a folder in a thread of its own, until the machine has ended; gives the machine's end.
fn serve(share: &ShareArg) -> Result<OwnedFd> {
    let mut folder = Folder::open(&share.path, share.read_only)?;
    let (near, far) = pair()?;
    std::thread::Builder::new().name(format!("share-{}", share.tag)).spawn(move || {
        // The end of the stream, by whatever error, is the end of the machine.
        let _ = remote::serve(near, &mut folder);
    })?;
    Ok(far)
}

/// QEMU's options separate their parts with commas; a comma within one is doubled.
fn option(prefix: &str, path: &Path, suffix: &str) -> String {
    format!("{prefix}{}{suffix}", path.to_string_lossy().replace(',', ",,"))
}

fn pair() -> Result<(UnixStream, OwnedFd)> {
    let (near, far) = UnixStream::pair().context("cannot make a socket pair")?;
    Ok((near, far.into()))
}

impl Machine {
    /// QEMU's exit status, once it has ended.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits for QEMU to end by itself, and makes it end after `patience`.
    pub(crate) fn finish(&mut self, patience: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if let Some(status) = self.ended() {
                return Some(status);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.kill();
        None
    }

    /// Ends QEMU at once.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What is kept of a console at its beginning and, at least, before its end. QEMU appends without end, and a machine may run
/// for weeks.
const KEPT: (u64, u64) = (8 << 20, 32 << 20);

/// Follows a console's file while QEMU appends to it, and gives the room in its middle back.
pub(crate) struct Follow {
    path: PathBuf,
    file: Option<File>,
    offset: u64,
    lines: Lines,
    kept: (u64, u64),
    /// Where what was given back ends.
    hole: u64,
}

impl Follow {
    /// Follows `path` from its beginning; it need not exist yet.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, file: None, offset: 0, lines: Lines::default(), kept: KEPT, hole: 0 }
    }

    /// What was written since the last call, and the lines that this completed.
    pub(crate) fn poll(&mut self) -> (Vec<u8>, Vec<String>) {
        let mut bytes = Vec::new();
        if self.file.is_none() {
            self.file = File::options().read(true).write(true).open(&self.path).ok();
        }
        let Some(file) = &mut self.file else { return (bytes, Vec::new()) };
        if file.seek(SeekFrom::Start(self.offset)).is_err() || file.read_to_end(&mut bytes).is_err() {
            return (Vec::new(), Vec::new());
        }
        self.offset += u64::try_from(bytes.len()).unwrap_or(0);
        let (head, tail) = self.kept;
        if self.offset >= self.hole.max(head) + 2 * tail {
            self.hole = self.offset - tail;
            punch(file, head, self.hole);
        }
        let lines = self.lines.push(&bytes);
        (bytes, lines)
    }
}

/// Gives back what a file has between two offsets; it reads as zeroes. A file system that cannot, keeps it.
fn punch(file: &File, from: u64, to: u64) {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let (Ok(from), Ok(to)) = (libc::off_t::try_from(from), libc::off_t::try_from(to)) else { return };
    // SAFETY: a system call without pointers.
    unsafe { libc::fallocate(file.as_raw_fd(), mode, from, to - from) };
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn a_console_that_never_ends_keeps_its_beginning_and_its_end() {
        let path = std::env::temp_dir().join(format!("realm-follow-{}", std::process::id()));
        let mut writer = File::create(&path).unwrap();
        let mut follow = Follow { kept: (64 << 10, 128 << 10), ..Follow::new(path.clone()) };
        let mut seen = 0;
        for number in 0..40_000 {
            writeln!(writer, "line {number:032}").unwrap();
            if number % 100 == 99 {
                let (_, lines) = follow.poll();
                assert_eq!(lines.last().unwrap(), &format!("line {number:032}"));
                seen += lines.len();
            }
        }
        assert_eq!(seen, 40_000);
        let text = std::fs::read(&path).unwrap();
        let metadata = path.metadata().unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(metadata.len() > 1_500_000 && metadata.blocks() * 512 < 500_000, "{}", metadata.blocks());
        assert!(text.starts_with(b"line 0") && !text[..64 << 10].contains(&0));
        assert!(text.ends_with(b"39999\n") && !text[text.len() - (128 << 10)..].contains(&0));
    }
}
