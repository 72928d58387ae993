//! `realm run` where `/dev/kvm-realm` is: builds a Realm from a kernel and an initramfs, runs it, and hands
//! its console, or the output and the status of one command, to the caller.

use std::os::fd::RawFd;
use std::path::PathBuf;

/// What to run and where its output goes. Plain data: the command line's parser fills it in.
#[derive(Debug, Clone)]
pub struct RunOptions {
    /// The KVM device to use, `/dev/kvm-realm` unless told otherwise.
    pub device: PathBuf,
    /// The guest's kernel: an arm64 Image, raw, gzipped, or as an EFI zboot file.
    pub kernel: PathBuf,
    /// The guest's initramfs.
    pub initrd: Option<PathBuf>,
    /// The guest's whole command line; `None` means the default for the kind of run.
    pub cmdline: Option<String>,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Number of virtual CPUs.
    pub cpus: u32,
    /// Run this command (with `sh -c`) instead of an interactive shell.
    pub exec: Option<String>,
    /// Where stage events go, one JSON object per line.
    pub events_fd: Option<RawFd>,
    /// A file that receives everything the guest prints on its console.
    pub console_log: Option<PathBuf>,
    /// Show the guest's console on stderr when a command is executed.
    pub verbose: bool,
    /// Run an ordinary virtual machine on `/dev/kvm` instead of a Realm; for tests of everything around it.
    pub plain: bool,
}

impl Default for RunOptions {
    fn default() -> Self {
        Self {
            device: PathBuf::from("/dev/kvm-realm"),
            kernel: PathBuf::from("/guest/kernel"),
            initrd: None,
            cmdline: None,
            memory_mib: 512,
            cpus: 1,
            exec: None,
            events_fd: None,
            console_log: None,
            verbose: false,
            plain: false,
        }
    }
}

/// Runs the guest until it ends and returns the status that the process should exit with: the executed
/// command's own, 0 for an interactive Realm that was powered off.
pub fn run_on_device(opts: &RunOptions) -> anyhow::Result<u8> {
    let _ = opts;
    anyhow::bail!("running a Realm on {} is not there yet", opts.device.display())
}
