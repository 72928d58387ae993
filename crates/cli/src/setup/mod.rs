//! Sets the machine up: once, cached, verified, and never more than what is missing.

pub(crate) mod apt;
pub(crate) mod doctor;
pub(crate) mod kernels;
pub(crate) mod newest;
pub(crate) mod rust;
pub(crate) mod tools;

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

pub(crate) use kernels::Unpacked;
pub(crate) use rust::Rust;

/// Everything that builds and runs need from outside the checkout.
#[derive(Debug, Clone)]
pub(crate) struct Environment {
    /// The emulator.
    pub(crate) qemu: PathBuf,
    /// Kernels and busybox.
    pub(crate) unpacked: Unpacked,
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
    Ok(Environment { qemu, unpacked, rust })
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
