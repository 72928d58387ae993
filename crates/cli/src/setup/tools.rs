//! Programs that must be installed on the machine: what they are for, which version, which package.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::apt::{self, Suites};
use crate::command::{collect, find};

/// The oldest QEMU whose FEAT_RME is complete enough.
pub(crate) const QEMU_AT_LEAST: (u32, u32) = (9, 2);
/// The emulator.
pub(crate) const QEMU: &str = "qemu-system-aarch64";

/// Something that must be installed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tool {
    /// What `doctor` calls it, and the program if there is one.
    pub(crate) name: &'static str,
    /// A file that shows it is there, for what is no program.
    file: Option<&'static str>,
    /// Debian's package.
    pub(crate) package: &'static str,
    /// What for.
    pub(crate) purpose: &'static str,
}

const fn program(name: &'static str, package: &'static str, purpose: &'static str) -> Tool {
    Tool { name, file: None, package, purpose }
}

/// Everything but QEMU, whose version matters.
pub(crate) const TOOLS: &[Tool] = &[
    program("cc", "gcc", "links programs for this machine"),
    program("make", "make", "runs the kernel's build of the module"),
    program(
        "aarch64-linux-gnu-gcc",
        "gcc-aarch64-linux-gnu",
        "compiles the module's C file, links arm64 programs",
    ),
    program(
        "aarch64-linux-gnu-objcopy",
        "binutils-aarch64-linux-gnu",
        "makes firmware images from ELF files",
    ),
    Tool {
        name: "arm64 C library",
        file: Some("/usr/aarch64-linux-gnu/lib/libc.a"),
        package: "libc6-dev-arm64-cross",
        purpose: "is linked into the arm64 realm",
    },
    program("dpkg-deb", "dpkg", "unpacks kernels"),
];

/// What building a whole kernel needs beside those.
pub(crate) const KERNEL_TOOLS: &[Tool] = &[
    program("bc", "bc", "computes constants of the kernel's clocks"),
    program("bison", "bison", "makes the parser of the kernel's configuration"),
    program("flex", "flex", "makes the scanner of the kernel's configuration"),
    program("xz", "xz-utils", "unpacks the kernel's source"),
];

impl Tool {
    /// Its version or place, if it is there.
    pub(crate) fn found(&self) -> Option<String> {
        if let Some(file) = self.file {
            // On an arm64 machine the machine's own C library serves.
            return [file, "/usr/lib/aarch64-linux-gnu/libc.a"]
                .iter()
                .find(|path| Path::new(path).is_file())
                .map(|path| (*path).to_owned());
        }
        let path = find(self.name)?;
        let version = collect(Command::new(&path).arg("--version")).ok()?;
        let text = String::from_utf8_lossy(&version.stdout).into_owned();
        Some(text.lines().next().unwrap_or("present").to_owned())
    }
}

/// QEMU and its version, if it is there.
pub(crate) fn qemu(program: &Path) -> Option<(PathBuf, String, (u32, u32))> {
    let path = find(&program.to_string_lossy())?;
    let text = collect(Command::new(&path).arg("--version")).ok()?;
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    let line = text.lines().next()?.to_owned();
    let version = parse_version(&line)?;
    Some((path, line, version))
}

/// `QEMU emulator version 10.0.2 (Debian ...)`.
fn parse_version(line: &str) -> Option<(u32, u32)> {
    let mut numbers = line.split_once("version ")?.1.split(['.', ' ']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Installs those of some tools that are missing.
pub(crate) fn install_missing(cache: &Path, tools: &[Tool]) -> Result<()> {
    let missing: Vec<&str> =
        tools.iter().filter(|tool| tool.found().is_none()).map(|tool| tool.package).collect();
    if !missing.is_empty() {
        let state = apt::archive()?.open(Suites::Install, cache)?;
        state.install(&missing, None).context("cannot install what the builds need")?;
    }
    for tool in tools {
        if tool.found().is_none() {
            bail!("{} is still missing after installing the package {}", tool.name, tool.package);
        }
    }
    Ok(())
}

/// Makes sure that every tool is installed, and gives QEMU's path.
pub(crate) fn ensure(cache: &Path, chosen: Option<&Path>) -> Result<PathBuf> {
    install_missing(cache, TOOLS)?;
    let found = qemu(chosen.unwrap_or(Path::new(QEMU)));
    let good = found.as_ref().is_some_and(|(_, _, version)| *version >= QEMU_AT_LEAST);
    if let (Some(chosen), false) = (chosen, good) {
        let what = found.map_or("does not run".to_owned(), |(_, line, _)| format!("is `{line}`"));
        bail!("{} {what}: QEMU {}.{} or newer is needed", chosen.display(), QEMU_AT_LEAST.0, QEMU_AT_LEAST.1);
    }
    if !good {
        let archive = apt::archive()?;
        let state = archive.open(Suites::Install, cache)?;
        // Debian 12's own QEMU is too old, Debian 13's is not.
        let backports = format!("{}-backports", archive.release().codename);
        let suite = (archive.release().version < 13).then_some(backports.as_str());
        state.install(&["qemu-system-arm"], suite).context("cannot install QEMU")?;
    }
    match qemu(chosen.unwrap_or(Path::new(QEMU))) {
        Some((path, _, version)) if version >= QEMU_AT_LEAST => Ok(path),
        Some((_, line, _)) => bail!("after installing qemu-system-arm there is still `{line}`"),
        None => bail!("{QEMU} is still missing after installing qemu-system-arm"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemus_version_is_two_numbers() {
        assert_eq!(parse_version("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)"), Some((10, 0)));
        assert_eq!(parse_version("QEMU emulator version 7.2.17"), Some((7, 2)));
        assert!((7, 2) < QEMU_AT_LEAST && (10, 0) >= QEMU_AT_LEAST);
    }
}
