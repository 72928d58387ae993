//! Kernels that can be the emulated machine's host: the default, the newest; one of our own making is in `debug.rs`.
//!
//! The default is fetched by every set-up; any other only when it is asked for.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::apt::{self, Apt, Archive, Suites};
use super::kernels::{self, Unpacked};
use crate::{command, ui};

/// Which of Debian's kernels is the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Series {
    /// The newest 6.12 of this machine's own release
    #[default]
    #[value(name = "6.12")]
    Own,
    /// The newest in Debian's backports of the current stable: the one that is the guest's
    Newest,
    /// 6.12 built here to look for mistakes (lockdep, KASAN and the like): slow, for tests
    Debug,
}

/// A kernel and what belongs to it.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    /// Its release, as `uname -r` gives it.
    pub(crate) release: String,
    /// The kernel itself.
    pub(crate) kernel: PathBuf,
    /// The directory in which its header packages were unpacked, or a tree in which it was built: the module is built
    /// against them.
    pub(crate) headers: PathBuf,
    /// The directory of its modules; none if all is built in.
    pub(crate) modules: Option<PathBuf>,
    /// Whether it looks for mistakes, and so needs more memory and time.
    pub(crate) debug: bool,
}

/// The host that every set-up fetches.
pub(crate) fn default(unpacked: &Unpacked) -> Host {
    let modules = unpacked.host_root.join("lib/modules").join(&unpacked.host_release).join("kernel");
    Host {
        release: unpacked.host_release.clone(),
        kernel: unpacked.host_kernel.clone(),
        headers: unpacked.host_root.clone(),
        modules: Some(modules),
        debug: false,
    }
}

fn directory(cache: &Path, unpacked: &Unpacked) -> PathBuf {
    cache.join("newest-host").join(&unpacked.guest_release)
}

/// Written last: with it, the headers and all programs that they need are there.
const READY: &str = "ready";

/// The newest host's release, if it was fetched before.
pub(crate) fn recorded(cache: &Path, unpacked: &Unpacked) -> Option<String> {
    directory(cache, unpacked).join(READY).is_file().then(|| unpacked.guest_release.clone())
}

/// Makes sure that the newest host is there. Kernel and modules are the guest's own; its headers are fetched.
pub(crate) fn newest(cache: &Path, unpacked: &Unpacked) -> Result<Host> {
    let root = directory(cache, unpacked);
    if !root.join(READY).is_file() {
        fetch(cache, unpacked, &root)
            .with_context(|| format!("set-up of {} as host", unpacked.guest_release))?;
    }
    Ok(Host {
        release: unpacked.guest_release.clone(),
        kernel: unpacked.guest_kernel.clone(),
        headers: root,
        modules: Some(unpacked.guest_modules.clone()),
        debug: false,
    })
}

fn fetch(cache: &Path, unpacked: &Unpacked, root: &Path) -> Result<()> {
    let archive = apt::archive()?;
    let suite = archive.open(Suites::StableBackports, cache)?.codename()?;
    let backports = archive.open(Suites::Backports(&suite), cache)?;
    let release = &unpacked.guest_release;
    let Some(packages) = kernels::header_packages(&backports, release)? else {
        bail!(
            "Debian's {suite} has no headers for {release} any more: `realm setup --update` fetches the kernel \
             that it has now"
        );
    };
    ui::say(&format!("host kernel: the headers of Debian's {release}"));
    backports.unpack(&packages, root).context("cannot unpack the kernel's headers")?;
    let stable = suite.strip_suffix("-backports").unwrap_or(&suite);
    adapt(cache, &archive, stable, root)?;
    std::fs::write(root.join(READY), "")?;
    Ok(())
}

/// The programs of the kernel's build were linked against the C library of their own release. Those that this machine's
/// cannot run are started with that one, which is unpacked beside them.
fn adapt(cache: &Path, archive: &Archive, suite: &str, root: &Path) -> Result<()> {
    let foreign: Vec<PathBuf> = programs(root)?.into_iter().filter(|program| !starts(program)).collect();
    if foreign.is_empty() {
        return Ok(());
    }
    let apt = archive.open(Suites::Stable(suite), cache)?;
    let libraries = c_library(&apt, root)?;
    for program in foreign {
        let mut elf = program.clone().into_os_string();
        elf.push(".elf");
        std::fs::rename(&program, &elf)?;
        let (loader, triplet) = apt::loader();
        let script = format!(
            "#!/bin/sh\nexec '{}' --library-path '{}' \"$0.elf\" \"$@\"\n",
            quoted(&libraries.join(loader)),
            quoted(&libraries.join("usr/lib").join(triplet)),
        );
        std::fs::write(&program, script)?;
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
        command::output(Command::new(&program).env("LD_TRACE_LOADED_OBJECTS", "1"))
            .context("a program of the kernel's build does not run on this machine")?;
    }
    Ok(())
}

fn quoted(path: &Path) -> String {
    path.display().to_string().replace('\'', r"'\''")
}

/// The suite's C library, unpacked below `root`.
fn c_library(apt: &Apt, root: &Path) -> Result<PathBuf> {
    let package = apt.choose("libc6")?;
    let libraries = root.join("libc");
    apt.unpack(std::slice::from_ref(&package), &libraries).context("cannot unpack the C library")?;
    Ok(libraries.canonicalize()?)
}

/// The programs that building a module starts.
fn programs(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for kbuild in std::fs::read_dir(root.join("usr/lib"))?.flatten() {
        for part in ["scripts/basic", "scripts/mod"] {
            let Ok(files) = std::fs::read_dir(kbuild.path().join(part)) else { continue };
            found.extend(files.flatten().map(|file| file.path()).filter(|path| is_elf(path)));
        }
    }
    Ok(found)
}

fn is_elf(path: &Path) -> bool {
    let mut magic = [0; 4];
    File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && magic == *b"\x7fELF"
}

/// Whether the machine's loader finds all that a program needs: it complains, but its status says nothing.
fn starts(program: &Path) -> bool {
    command::collect(Command::new(program).env("LD_TRACE_LOADED_OBJECTS", "1"))
        .is_ok_and(|found| found.status.success() && found.stderr.is_empty())
}
