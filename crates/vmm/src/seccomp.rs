//! Which system calls each kind of thread may make (seccomp).
//!
//! A guest that takes over a thread of this process finds no more there than what that thread needs for its work: no
//! program can be started, no file opened, no other process touched. The filters are lists of what is allowed; the
//! main thread, which writes files and talks to users, has a list of what is not. Whoever makes another call ends the
//! process, and a line says which thread and which call it was.
//!
//! A device's list is what its [`Device::system_calls`](crate::virtio::Device::system_calls) says, beside
//! [`EVERY_THREAD`] and [`EVERY_DEVICE`].

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Arc;

use cca_abi::kvm::ioctl as kvm;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use crate::{Error, Result};

/// A system call that a thread may make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    name: &'static str,
    number: libc::c_long,
    only: Only,
}

/// With which arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Only {
    /// Any.
    Any,
    /// Argument and the values that it may have.
    Values(usize, &'static [u32]),
    /// Argument and bits that must not be set in it.
    Without(usize, u32),
    /// Argument that is our process's number.
    OurProcess(usize),
}

impl Call {
    /// A call with any arguments. [`calls!`](crate::calls) is shorter.
    #[must_use]
    pub const fn any(name: &'static str, number: libc::c_long) -> Self {
        Self { name, number, only: Only::Any }
    }

    /// `ioctl` with these requests alone.
    #[must_use]
    pub const fn ioctl(requests: &'static [u32]) -> Self {
        Self { name: "ioctl", number: libc::SYS_ioctl, only: Only::Values(1, requests) }
    }

    const fn only(self, only: Only) -> Self {
        Self { only, ..self }
    }
}

/// A list of system calls by their names: `calls![openat, fstat]`.
#[macro_export]
macro_rules! calls {
    ($($name:ident),* $(,)?) => { $crate::calls!(@list $($name)*) };
    (@list $($name:ident)*) => {
        const { &[$($crate::seccomp::Call::any(stringify!($name), $crate::calls!(@number $name))),*] }
    };
    (@number $name:ident) => { $crate::seccomp::numbers::$name };
}

/// The numbers of system calls that exist on arm64 and on x86-64; a list may name no others.
#[allow(missing_docs, non_upper_case_globals)]
pub mod numbers {
    macro_rules! numbers {
        ($($name:ident = $number:ident)*) => {
            $(pub const $name: libc::c_long = libc::$number;)*
            /// All of them, for messages.
            pub(super) const ALL: &[(&str, libc::c_long)] = &[$((stringify!($name), libc::$number)),*];
        };
    }
    numbers! {
        accept4 = SYS_accept4 add_key = SYS_add_key bind = SYS_bind bpf = SYS_bpf brk = SYS_brk chdir = SYS_chdir
        chroot = SYS_chroot clock_gettime = SYS_clock_gettime clock_nanosleep = SYS_clock_nanosleep
        clock_settime = SYS_clock_settime clone = SYS_clone clone3 = SYS_clone3 close = SYS_close
        connect = SYS_connect copy_file_range = SYS_copy_file_range delete_module = SYS_delete_module dup = SYS_dup
        dup3 = SYS_dup3 epoll_create1 = SYS_epoll_create1 epoll_ctl = SYS_epoll_ctl epoll_pwait = SYS_epoll_pwait
        eventfd2 = SYS_eventfd2 execve = SYS_execve execveat = SYS_execveat exit = SYS_exit
        exit_group = SYS_exit_group faccessat = SYS_faccessat faccessat2 = SYS_faccessat2 fadvise64 = SYS_fadvise64
        fallocate = SYS_fallocate fchdir = SYS_fchdir fchmod = SYS_fchmod fchmodat = SYS_fchmodat
        fchown = SYS_fchown fchownat = SYS_fchownat fcntl = SYS_fcntl fdatasync = SYS_fdatasync
        fgetxattr = SYS_fgetxattr finit_module = SYS_finit_module flistxattr = SYS_flistxattr flock = SYS_flock
        fremovexattr = SYS_fremovexattr fsetxattr = SYS_fsetxattr fstat = SYS_fstat fstatfs = SYS_fstatfs
        fsync = SYS_fsync ftruncate = SYS_ftruncate futex = SYS_futex getcwd = SYS_getcwd
        getdents64 = SYS_getdents64 geteuid = SYS_geteuid getpeername = SYS_getpeername getpid = SYS_getpid
        getrandom = SYS_getrandom getsockname = SYS_getsockname getsockopt = SYS_getsockopt gettid = SYS_gettid
        getuid = SYS_getuid getxattr = SYS_getxattr init_module = SYS_init_module ioctl = SYS_ioctl
        io_uring_enter = SYS_io_uring_enter io_uring_register = SYS_io_uring_register
        io_uring_setup = SYS_io_uring_setup kexec_file_load = SYS_kexec_file_load kexec_load = SYS_kexec_load
        keyctl = SYS_keyctl kill = SYS_kill linkat = SYS_linkat listen = SYS_listen lseek = SYS_lseek
        madvise = SYS_madvise memfd_create = SYS_memfd_create mkdirat = SYS_mkdirat mknodat = SYS_mknodat
        mmap = SYS_mmap mount = SYS_mount mprotect = SYS_mprotect mremap = SYS_mremap munmap = SYS_munmap
        nanosleep = SYS_nanosleep newfstatat = SYS_newfstatat open_by_handle_at = SYS_open_by_handle_at
        openat = SYS_openat openat2 = SYS_openat2 perf_event_open = SYS_perf_event_open
        personality = SYS_personality pidfd_getfd = SYS_pidfd_getfd pipe2 = SYS_pipe2 pivot_root = SYS_pivot_root
        ppoll = SYS_ppoll prctl = SYS_prctl pread64 = SYS_pread64 preadv = SYS_preadv preadv2 = SYS_preadv2
        process_vm_readv = SYS_process_vm_readv process_vm_writev = SYS_process_vm_writev ptrace = SYS_ptrace
        pwrite64 = SYS_pwrite64 pwritev = SYS_pwritev pwritev2 = SYS_pwritev2 read = SYS_read
        readlinkat = SYS_readlinkat readv = SYS_readv reboot = SYS_reboot recvfrom = SYS_recvfrom
        recvmsg = SYS_recvmsg renameat2 = SYS_renameat2 request_key = SYS_request_key
        restart_syscall = SYS_restart_syscall rt_sigaction = SYS_rt_sigaction rt_sigprocmask = SYS_rt_sigprocmask
        rt_sigreturn = SYS_rt_sigreturn sched_yield = SYS_sched_yield seccomp = SYS_seccomp
        sendmsg = SYS_sendmsg sendto = SYS_sendto setns = SYS_setns setsockopt = SYS_setsockopt
        settimeofday = SYS_settimeofday shutdown = SYS_shutdown sigaltstack = SYS_sigaltstack socket = SYS_socket
        socketpair = SYS_socketpair statfs = SYS_statfs statx = SYS_statx swapon = SYS_swapon
        symlinkat = SYS_symlinkat sync_file_range = SYS_sync_file_range syncfs = SYS_syncfs tgkill = SYS_tgkill
        tkill = SYS_tkill umask = SYS_umask umount2 = SYS_umount2 unlinkat = SYS_unlinkat unshare = SYS_unshare
        userfaultfd = SYS_userfaultfd utimensat = SYS_utimensat wait4 = SYS_wait4 write = SYS_write writev = SYS_writev
    }
}

const PROT_EXEC: u32 = libc::PROT_EXEC as u32;
const F_GETFD: u32 = libc::F_GETFD as u32;
const PR_GET_NAME: u32 = libc::PR_GET_NAME as u32;
const TCGETS: u32 = libc::TCGETS as u32;
const TCGETS2: u32 = libc::TCGETS2 as u32;
const TCSETS: u32 = libc::TCSETS as u32;
const TCSETS2: u32 = libc::TCSETS2 as u32;

/// What the standard library, the allocator and the way from a thread to its end need; and to read, write and close
/// what is open.
const EVERY_THREAD: &[&[Call]] = &[
    calls![
        brk,
        clock_gettime,
        clock_nanosleep,
        close,
        exit,
        exit_group,
        futex,
        getpid,
        getrandom,
        gettid,
        madvise,
        mremap,
        munmap,
        nanosleep,
        read,
        readv,
        restart_syscall,
        rt_sigprocmask,
        rt_sigreturn,
        sched_yield,
        sigaltstack,
        write,
        writev,
        ppoll,
    ],
    // What is in memory must not become code.
    &[
        Call::any("mmap", libc::SYS_mmap).only(Only::Without(2, PROT_EXEC)),
        Call::any("mprotect", libc::SYS_mprotect).only(Only::Without(2, PROT_EXEC)),
        Call::any("prctl", libc::SYS_prctl).only(Only::Values(0, &[PR_GET_NAME])),
        // The standard library looks whether what it closes is open.
        Call::any("fcntl", libc::SYS_fcntl).only(Only::Values(1, &[F_GETFD])),
        // A panic, which gives the terminal back too.
        Call::any("tgkill", libc::SYS_tgkill).only(Only::OurProcess(0)),
        Call::ioctl(&[TCGETS, TCGETS2, TCSETS, TCSETS2]),
    ],
    #[cfg(target_arch = "x86_64")]
    &[Call::any("poll", libc::SYS_poll)],
];

/// A CPU's thread: runs the guest, wires its devices, gives memory back; a serial port's output may go to a socket.
const CPU: &[&[Call]] = &[
    &[Call::ioctl(&[
        kvm::RUN,
        kvm::IRQ_LINE,
        kvm::SET_MEMORY_ATTRIBUTES,
        kvm::SET_VCPU_EVENTS,
        kvm::SET_GSI_ROUTING,
        kvm::IRQFD,
        kvm::IOEVENTFD,
    ])],
    calls![fallocate, sendto],
];

/// Every device's thread: waits, and raises interrupts. A message is a signal to an event; where it leads to, CPUs' threads
/// tell the kernel when the guest says so.
const EVERY_DEVICE: &[&[Call]] = &[&[Call::ioctl(&[kvm::IRQ_LINE])]];

/// What a device that does not say what it needs may do: talk over what is connected.
pub const DEVICE_DEFAULT: &[Call] = calls![recvfrom, recvmsg, sendmsg, sendto, shutdown];

/// What the main thread may not do any more once the guest runs.
const MAIN_DENIED: &[Call] = calls![
    add_key,
    bpf,
    chroot,
    clock_settime,
    delete_module,
    execve,
    execveat,
    finit_module,
    init_module,
    io_uring_enter,
    io_uring_register,
    io_uring_setup,
    kexec_file_load,
    kexec_load,
    keyctl,
    mount,
    open_by_handle_at,
    perf_event_open,
    personality,
    pidfd_getfd,
    pivot_root,
    process_vm_readv,
    process_vm_writev,
    ptrace,
    reboot,
    request_key,
    setns,
    settimeofday,
    swapon,
    umount2,
    unshare,
    userfaultfd,
];

/// Whether threads are confined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confinement {
    /// They are.
    On,
    /// They are not: for debugging.
    Off,
}

/// What a thread enters to be confined. Nothing leads out again.
#[derive(Clone, Debug)]
pub struct Filter(Option<Arc<BpfProgram>>);

impl Confinement {
    /// Makes the process ready, before its threads start: to say which call ended it, and to need no more calls than
    /// the lists have.
    pub fn prepare(self) -> Result<()> {
        settle_allocator();
        if self == Self::Off {
            return Ok(());
        }
        tame_panics();
        install_handler()
    }

    /// For a CPU's thread.
    pub fn cpu(self) -> Result<Filter> {
        self.allow(CPU.iter().copied())
    }

    /// For the thread of a device that needs these calls.
    pub fn device(self, calls: &[Call]) -> Result<Filter> {
        self.allow(EVERY_DEVICE.iter().copied().chain([calls]))
    }

    /// For a thread that has nothing to do with the guest: what every thread may, and these calls.
    pub fn helper(self, calls: &[Call]) -> Result<Filter> {
        self.allow(std::iter::once(calls))
    }

    /// For the main thread, once the guest runs.
    pub fn main(self) -> Result<Filter> {
        self.build(MAIN_DENIED.iter(), SeccompAction::Allow, SeccompAction::Trap)
    }

    fn allow<'a>(self, lists: impl Iterator<Item = &'a [Call]>) -> Result<Filter> {
        let calls = EVERY_THREAD.iter().copied().chain(lists).flatten();
        self.build(calls, SeccompAction::Trap, SeccompAction::Allow)
    }

    fn build<'a>(
        self,
        calls: impl Iterator<Item = &'a Call>,
        others: SeccompAction,
        these: SeccompAction,
    ) -> Result<Filter> {
        if self == Self::Off {
            return Ok(Filter(None));
        }
        let mut rules = BTreeMap::<i64, Option<Vec<SeccompRule>>>::new();
        for call in calls {
            let more = conditions(call.only)?;
            let rules = rules.entry(call.number).or_insert_with(|| Some(Vec::new()));
            // Without conditions any arguments will do, whatever other lists say.
            match (rules.as_mut(), more) {
                (Some(known), Some(more)) => known.extend(more),
                _ => *rules = None,
            }
        }
        let rules = rules.into_iter().map(|(number, rules)| (number, rules.unwrap_or_default())).collect();
        let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(|error| failed(&error))?;
        let filter = SeccompFilter::new(rules, others, these, arch).map_err(|error| failed(&error))?;
        Ok(Filter(Some(Arc::new(BpfProgram::try_from(filter).map_err(|error| failed(&error))?))))
    }
}

impl Filter {
    /// Confines the calling thread.
    pub fn enter(&self) -> Result<()> {
        let Some(program) = &self.0 else { return Ok(()) };
        CONFINED.set(true);
        seccompiler::apply_filter(program).map_err(|error| failed(&error))
    }
}

fn failed(error: &dyn std::fmt::Display) -> Error {
    Error::vmm(format!("confining a thread: {error} (`--no-seccomp` runs without)"))
}

/// One rule for each way in which the call may be made; nothing if any will do.
fn conditions(only: Only) -> Result<Option<Vec<SeccompRule>>> {
    let one = |argument: usize, operator, value: u32| {
        let argument = u8::try_from(argument).map_err(|error| failed(&error))?;
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value.into())
            .and_then(|condition| SeccompRule::new(vec![condition]))
            .map_err(|error| failed(&error))
    };
    Ok(Some(match only {
        Only::Any => return Ok(None),
        Only::Values(argument, values) => {
            values.iter().map(|value| one(argument, SeccompCmpOp::Eq, *value)).collect::<Result<_>>()?
        }
        Only::Without(argument, bits) => {
            vec![one(argument, SeccompCmpOp::MaskedEq(bits.into()), 0)?]
        }
        Only::OurProcess(argument) => vec![one(argument, SeccompCmpOp::Eq, std::process::id())?],
    }))
}

/// Keeps glibc's allocator from opening files later: it does so once to count the machine's CPUs when many threads
/// allocate, and once when memory that is not the main thread's shrinks. The former does not happen with a fixed number
/// of arenas, the latter happens here. Fixed thresholds also give large buffers back at once.
fn settle_allocator() {
    #[cfg(target_env = "gnu")]
    {
        const ARENAS: libc::c_int = 2;
        const THRESHOLD: libc::c_int = 1 << 20;
        static ONCE: std::sync::Once = std::sync::Once::new();
        ONCE.call_once(|| {
            // SAFETY: settings of the allocator's, which may be changed at any time.
            unsafe {
                libc::mallopt(libc::M_TRIM_THRESHOLD, THRESHOLD);
                libc::mallopt(libc::M_MMAP_THRESHOLD, THRESHOLD);
            }
            // A new thread has an arena of its own, as long as nobody has limited them.
            let shrink = || {
                let mut blocks: Vec<Vec<u8>> = (0..40).map(|_| Vec::with_capacity(100_000)).collect();
                std::hint::black_box(&mut blocks);
                while blocks.pop().is_some() {}
            };
            let _ = std::thread::spawn(shrink).join();
            // SAFETY: as above.
            unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS) };
        });
    }
}

thread_local! {
    static CONFINED: Cell<bool> = const { Cell::new(false) };
}

/// Keeps confined threads that panic from looking for the source code and the symbols of a backtrace, which their
/// filters forbid: what they had to say would be lost.
fn tame_panics() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if CONFINED.get() {
                let thread = std::thread::current();
                eprintln!(
                    "\r\nrealm: error: VMM: the thread `{}`: {info}\r",
                    thread.name().unwrap_or_default()
                );
            } else {
                usual(info);
            }
        }));
    });
}

/// The exit status of a process that one of our own faults has ended.
const STATUS: libc::c_int = 125;

fn install_handler() -> Result<()> {
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = forbidden;
    // SAFETY: a zeroed `sigaction` is a valid one; the handler has the signature that SA_SIGINFO asks for and makes
    // async-signal-safe calls only.
    let status = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut())
    };
    if status != 0 {
        return Err(Error::os("installing a signal handler", &std::io::Error::last_os_error()));
    }
    Ok(())
}

/// Says which thread made which call, and ends the process.
extern "C" fn forbidden(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    /// Where `siginfo_t` has the number of the call, on all 64-bit machines.
    const NUMBER: usize = 24;
    let mut line = Line { bytes: [0; 256], len: 0 };
    let mut name = [0u8; 16];
    // SAFETY: the kernel gives a whole `siginfo_t` of 128 bytes; the name has 16 bytes, as PR_GET_NAME wants.
    let number = unsafe {
        libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr());
        info.cast::<u8>().add(NUMBER).cast::<libc::c_int>().read_unaligned()
    };
    line.add(b"\r\nrealm: error: VMM: the thread `");
    line.add(name.split(|byte| *byte == 0).next().unwrap_or_default());
    line.add(b"` made the system call ");
    line.add_number(number.unsigned_abs());
    let known = numbers::ALL.iter().find(|(_, known)| *known == libc::c_long::from(number));
    if let Some((name, _)) = known {
        line.add(b" (");
        line.add(name.as_bytes());
        line.add(b")");
    }
    line.add(b", which is forbidden to it: a guest may have taken it over, or realm has a fault (`--no-seccomp` runs without)\r\n");
    crate::terminal::restore();
    // SAFETY: as many bytes as the call is told; `_exit` runs nothing of this process any more.
    unsafe {
        libc::write(2, line.bytes.as_ptr().cast(), line.len);
        libc::_exit(STATUS);
    }
}

/// Text without an allocator.
struct Line {
    bytes: [u8; 256],
    len: usize,
}

impl Line {
    fn add(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(place) = self.bytes.get_mut(self.len) {
                *place = *byte;
                self.len += 1;
            }
        }
    }

    fn add_number(&mut self, number: u32) {
        let mut rest = number;
        let mut digits = [0; 10];
        let mut first = digits.len();
        while first > 0 && (rest > 0 || first == digits.len()) {
            first -= 1;
            digits[first] = b'0' + u8::try_from(rest % 10).unwrap_or(0);
            rest /= 10;
        }
        self.add(&digits[first..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd as _;
    use std::process::Command;
    use std::sync::OnceLock;

    static EVENT: OnceLock<crate::eventfd::EventFd> = OnceLock::new();

    /// Runs the part of this test in a process of its own; gives status and standard error.
    fn alone(part: &str) -> (Option<i32>, String) {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "seccomp::tests::part", "--ignored", "--nocapture", "--test-threads=1"])
            .env("REALM_SECCOMP_PART", part)
            .env("RUST_BACKTRACE", "1")
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    fn ends(part: &str, thread: &str, call: &str) {
        let (status, text) = alone(part);
        assert_eq!(status, Some(STATUS), "{part}: {text}");
        assert!(text.contains(&format!("the thread `{thread}` made the system call ")), "{part}: {text}");
        assert!(text.contains(&format!("({call})")), "{part}: {text}");
    }

    #[test]
    fn a_thread_does_its_work_under_its_filter() {
        for part in ["cpu-works", "device-works", "many-work", "main-works", "off"] {
            let (status, text) = alone(part);
            assert_eq!(status, Some(0), "{part}: {text}");
        }
    }

    #[test]
    fn a_forbidden_call_ends_the_process_and_is_named() {
        ends("cpu-opens", "cpu0", "openat");
        ends("cpu-other-ioctl", "cpu0", "ioctl");
        ends("device-execs", "virtio-test", "execve");
        ends("device-makes-code", "virtio-test", "mprotect");
        ends("device-kills", "virtio-test", "kill");
        ends("device-kills-another", "virtio-test", "tgkill");
        ends("main-execs", "main", "execve");
    }

    #[test]
    fn a_confined_thread_that_panics_says_why() {
        let (status, text) = alone("device-panics");
        assert_ne!(status, Some(STATUS), "{text}");
        assert!(
            text.contains("the thread `virtio-test`: panicked at ") && text.contains("a fault of ours"),
            "{text}"
        );
    }

    /// Not a test by itself: a process that tries something.
    #[test]
    #[ignore = "a part of the other tests here"]
    fn part() {
        let Ok(part) = std::env::var("REALM_SECCOMP_PART") else { return };
        let confinement = if part == "off" { Confinement::Off } else { Confinement::On };
        confinement.prepare().unwrap();
        drop(EVENT.set(crate::eventfd::EventFd::new().unwrap()));
        let (filter, name) = match part.split('-').next().unwrap() {
            "cpu" => (confinement.cpu(), "cpu0"),
            "main" => (confinement.main(), "main"),
            _ => (confinement.device(DEVICE_DEFAULT), "virtio-test"),
        };
        let filter = filter.unwrap();
        // An allocator may have a look at the machine when threads become many.
        let count = if part == "many-work" { 30 } else { 1 };
        let all = std::sync::Barrier::new(count);
        std::thread::scope(|scope| {
            for _ in 0..count {
                let thread = std::thread::Builder::new().name(name.into()).spawn_scoped(scope, || {
                    filter.enter().unwrap();
                    attempt(&part);
                    all.wait();
                });
                drop(thread.unwrap());
            }
        });
    }

    fn attempt(part: &str) {
        match part {
            "main-works" => drop(std::fs::read("/proc/self/status").unwrap()),
            "off" | "cpu-opens" => drop(std::fs::File::open("/dev/null")),
            "cpu-works" | "device-works" | "many-work" => work(),
            "device-panics" => panic!("a fault of ours"),
            // SAFETY: system calls with valid arguments, none of which reaches anything if it is carried out.
            _ => unsafe {
                match part {
                    "cpu-other-ioctl" => drop(libc::ioctl(0, 0x5412)),
                    "device-kills" => drop(libc::kill(i32::MAX, 0)),
                    "device-kills-another" => drop(libc::syscall(libc::SYS_tgkill, 1, 1, 0)),
                    "device-makes-code" => {
                        let page = libc::mmap(std::ptr::null_mut(), 4096, 3, 0x22, -1, 0);
                        libc::mprotect(page, 4096, 5);
                    }
                    _ => drop(libc::execve(c"/nothing".as_ptr(), std::ptr::null(), std::ptr::null())),
                }
            },
        }
    }

    /// What threads do all day: memory large and small, events, locks, clocks, sockets, sleep.
    fn work() {
        let mut kept = Vec::new();
        for size in [1usize, 100, 10_000, 1 << 20, 8 << 20] {
            kept.push(vec![1u8; size]);
        }
        kept.reverse();
        drop(kept);
        let Some(event) = EVENT.get() else { return };
        event.signal();
        let mut fd = libc::pollfd { fd: event.fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd.
        assert!(unsafe { libc::poll(&raw mut fd, 1, 1000) } >= 0);
        event.take();
        let (sender, receiver) = std::sync::mpsc::channel();
        sender.send(std::time::Instant::now()).unwrap();
        assert!(receiver.recv().unwrap().elapsed().as_secs() < 100);
        assert!(receiver.recv_timeout(std::time::Duration::from_millis(5)).is_err());
        std::thread::yield_now();
        std::io::Write::write_all(&mut std::io::stderr(), b"text\n").unwrap();
        let mut random = [0u8; 16];
        // SAFETY: the buffer is as long as the call is told.
        assert_eq!(unsafe { libc::getrandom(random.as_mut_ptr().cast(), 16, 0) }, 16);
        drop(std::collections::HashMap::<u8, u8>::new());
        // SAFETY: a zeroed `termios` is a valid one; there is no such terminal.
        assert_eq!(unsafe { libc::tcsetattr(-1, libc::TCSANOW, &std::mem::zeroed()) }, -1);
        assert!(std::io::stderr().as_raw_fd() == 2);
    }
}
