//! Sets the machine up: once, cached, verified, and never more than what is missing.

pub(crate) mod apt;
pub(crate) mod debug;
pub(crate) mod doctor;
pub(crate) mod hosts;
pub(crate) mod kernels;
pub(crate) mod newest;
pub(crate) mod rust;
pub(crate) mod tools;

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::args::MachineArgs;

pub(crate) use hosts::{Host, Series};
pub(crate) use kernels::Unpacked;
pub(crate) use rust::Rust;

/// Everything that builds and runs need from outside the checkout.
#[derive(Debug, Clone)]
pub(crate) struct Environment {
    /// The emulator.
    pub(crate) qemu: PathBuf,
    /// Kernels and busybox.
    pub(crate) unpacked: Unpacked,
    /// The emulated machine's own kernel.
    pub(crate) host: Host,
    /// Rust for arm64.
    pub(crate) rust: Rust,
}

/// Makes sure that everything is there.
pub(crate) fn ensure(qemu: Option<&Path>, update: bool) -> Result<Environment> {
    let cache = crate::paths::cache()?;
    std::fs::create_dir_all(&cache).with_context(|| format!("cannot make the cache {}", cache.display()))?;
    let _lock = lock(&cache)?;
    let qemu = tools::ensure(&cache, qemu).context("set-up of the machine's tools")?;
    let rust = rust::ensure(&cache).context("set-up of Rust for arm64")?;
    let unpacked = kernels::ensure(&cache, update).context("set-up of kernels and busybox")?;
    let host = hosts::default(&unpacked);
    Ok(Environment { qemu, unpacked, host, rust })
}

/// Makes sure that everything is there for the machine that `args` asks for.
pub(crate) fn for_machine(args: &MachineArgs) -> Result<Environment> {
    let environment = ensure(args.qemu.as_deref(), false)?;
    match args.host {
        Some(Series::Newest) => environment.on_the_newest_host(),
        Some(Series::Debug) => environment.on_the_debug_host(),
        Some(Series::Own) | None => Ok(environment),
    }
}

impl Environment {
    /// The same with the newest kernel as the machine's own.
    pub(crate) fn on_the_newest_host(&self) -> Result<Self> {
        let cache = crate::paths::cache()?;
        let _lock = lock(&cache)?;
        Ok(Self { host: hosts::newest(&cache, &self.unpacked)?, ..self.clone() })
    }

    /// The same with a kernel that looks for mistakes, which is built when it is first asked for.
    pub(crate) fn on_the_debug_host(&self) -> Result<Self> {
        let cache = crate::paths::cache()?;
        let _lock = lock(&cache)?;
        Ok(Self { host: debug::ensure(&cache, &self.unpacked)?, ..self.clone() })
    }
}

/// Two set-ups, or builds, at once would write over each other: the second waits for the first to let go of the
/// directory.
pub(crate) fn lock(directory: &Path) -> Result<File> {
    let file = File::create(directory.join("lock"))?;
    // SAFETY: flock takes a live descriptor; the lock ends with the file.
    unsafe {
        if libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) != 0 {
            crate::ui::say("another set-up or build is under way; waiting for it");
            libc::flock(file.as_raw_fd(), libc::LOCK_EX);
        }
    }
    Ok(file)
}
