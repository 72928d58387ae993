//! A host kernel that looks for mistakes: Debian's source of the default host's version, configured as Debian's cloud kernel
//! and by `linux/debug.config`, built here. Tests run on it what must not make a kernel complain.

use std::collections::hash_map::DefaultHasher;
use std::fs::File;
use std::hash::{Hash as _, Hasher as _};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::apt::{self, Suites};
use super::hosts::Host;
use super::kernels::{HOST_SERIES, Unpacked};
use super::tools::{self, KERNEL_TOOLS};
use crate::{command, ui};

/// What the configuration has otherwise than Debian's.
const FRAGMENT: &str = include_str!("../../../../linux/debug.config");
/// The prefix of the cross compiler's programs.
const CROSS: &str = "aarch64-linux-gnu-";
/// How many objects a build has, roughly.
const OBJECTS: u32 = 1_400;
/// How often a build says how far it is.
const PROGRESS: Duration = Duration::from_secs(60);
/// What building a module needs of a kernel's tree, beside the kernel itself. All else is removed: it takes gigabytes.
const KEPT: &[&str] = &[
    ".config",
    "Makefile",
    "Module.symvers",
    "arch/arm64/Makefile",
    "arch/arm64/include",
    "arch/arm64/boot/Image",
    "include",
    "scripts",
];

/// The kernel for `unpacked`'s host, if it was built before.
pub(crate) fn recorded(cache: &Path, unpacked: &Unpacked) -> Option<Host> {
    let tree = tree(cache, unpacked).ok()?;
    let release = std::fs::read_to_string(tree.join("include/config/kernel.release")).ok()?;
    Some(Host {
        release: release.trim().to_owned(),
        kernel: tree.join("arch/arm64/boot/Image"),
        headers: tree,
        modules: None,
        debug: true,
    })
}

/// Makes sure that it is there. Building it takes long; what an interrupted build has done is kept.
pub(crate) fn ensure(cache: &Path, unpacked: &Unpacked) -> Result<Host> {
    if let Some(host) = recorded(cache, unpacked) {
        return Ok(host);
    }
    let tree = tree(cache, unpacked)?;
    make(cache, unpacked, &tree).context("set-up of the debug kernel")?;
    recorded(cache, unpacked).context("the debug kernel's tree is not complete")
}

/// Where it lies: one directory for each version, configuration and compiler.
fn tree(cache: &Path, unpacked: &Unpacked) -> Result<PathBuf> {
    let mut hasher = DefaultHasher::new();
    let compiler = command::output(Command::new(format!("{CROSS}gcc")).arg("-dumpfullversion"))?;
    (FRAGMENT, KEPT, compiler).hash(&mut hasher);
    Ok(cache.join("debug-host").join(format!("{}_{:016x}", unpacked.host_release, hasher.finish())))
}

fn make(cache: &Path, unpacked: &Unpacked, tree: &Path) -> Result<()> {
    tools::install_missing(cache, KERNEL_TOOLS)?;
    let mut work = tree.as_os_str().to_owned();
    work.push(".build");
    let work = PathBuf::from(work);
    if !work.join("Makefile").is_file() {
        source(cache, unpacked, &work)?;
    }
    configure(unpacked, &work)?;
    build(&work)?;
    let step = ui::step("keeping what modules need of the debug kernel");
    let mut partial = tree.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let _ = std::fs::remove_dir_all(&partial);
    std::fs::create_dir_all(&partial)?;
    command::output(
        Command::new("cp").current_dir(&work).args(["-a", "--parents", "-t"]).arg(&partial).args(KEPT),
    )?;
    std::fs::rename(&partial, tree)?;
    std::fs::remove_dir_all(&work)?;
    step.done();
    Ok(())
}

/// Debian's source of the host kernel's version, unpacked.
fn source(cache: &Path, unpacked: &Unpacked, work: &Path) -> Result<()> {
    let apt = apt::archive()?.open(Suites::Own, cache)?;
    let name = format!("linux-source-{}", HOST_SERIES.trim_end_matches('.'));
    let packages = apt.show(&name)?;
    let version = unpacked.host_version();
    let Some(package) = packages.iter().find(|package| Some(package.version.as_str()) == version) else {
        bail!(
            "the Debian archive has no {name} {} any more: `realm setup --update` fetches the kernel that it has now",
            version.unwrap_or("of the host kernel's version")
        );
    };
    let mut place = work.as_os_str().to_owned();
    place.push(".source");
    let place = PathBuf::from(place);
    apt.unpack(std::slice::from_ref(package), &place).context("cannot unpack the kernel's source")?;
    let step = ui::step("unpacking the kernel's source");
    let archive = place.join(format!("usr/src/{name}.tar.xz"));
    command::output(Command::new("tar").arg("-C").arg(&place).arg("-xf").arg(&archive))?;
    std::fs::rename(place.join(&name), work)?;
    std::fs::remove_dir_all(&place)?;
    step.done();
    Ok(())
}

/// Debian's configuration without modules, then ours; an option of ours that the kernel does not take is an error.
fn configure(unpacked: &Unpacked, work: &Path) -> Result<()> {
    let debian = unpacked.host_root.join(format!("boot/config-{}", unpacked.host_release));
    let debian = std::fs::read_to_string(&debian)
        .with_context(|| format!("cannot read the kernel's configuration {}", debian.display()))?;
    let wanted = merge(&debian, FRAGMENT);
    let (file, stamp) = (work.join(".config"), work.join(".config.wanted"));
    // Asked for already: writing it again would build everything anew.
    if file.is_file() && std::fs::read(&stamp).is_ok_and(|old| old == wanted.as_bytes()) {
        return Ok(());
    }
    std::fs::write(&file, &wanted)?;
    command::output(kernel_make(work).arg("olddefconfig"))?;
    let lost = lost(FRAGMENT, &std::fs::read_to_string(&file)?);
    ensure!(
        lost.is_empty(),
        "this kernel's configuration has no such thing as linux/debug.config wants: {}",
        lost.join(", ")
    );
    std::fs::write(&stamp, &wanted)?;
    Ok(())
}

/// Debian's lines, whose modules are left out, then those of the fragment, which count.
fn merge(debian: &str, fragment: &str) -> String {
    let mut text = String::new();
    for line in debian.lines() {
        match line.strip_suffix("=m") {
            Some(name) => text.push_str(&format!("# {name} is not set\n")),
            None => {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
    text + fragment
}

/// What the fragment switches on and the configuration does not have. What it switches off may be needed by others.
fn lost<'a>(fragment: &'a str, config: &str) -> Vec<&'a str> {
    fragment
        .lines()
        .filter(|line| line.starts_with("CONFIG_"))
        .filter(|line| !config.lines().any(|have| have == *line))
        .collect()
}

fn kernel_make(work: &Path) -> Command {
    let mut make = Command::new("make");
    make.current_dir(work).args(["ARCH=arm64", &format!("CROSS_COMPILE={CROSS}")]);
    make.env_remove("MAKEFLAGS").env_remove("MAKELEVEL").env("LC_ALL", "C").env("KBUILD_BUILD_USER", "realm");
    make
}

/// Builds the kernel; says once a minute how far it is. What make prints is in `build.log`.
fn build(work: &Path) -> Result<()> {
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let log = work.join("build.log");
    let mut file = File::create(&log)?;
    let step =
        ui::step(&format!("building the debug kernel, with {jobs} compilers at once; this takes long"));
    let mut make = kernel_make(work);
    make.arg(format!("-j{jobs}")).args(["Image", "modules"]).stdin(Stdio::null());
    make.stdout(Stdio::piped()).stderr(file.try_clone()?);
    let mut child = make.spawn().context("cannot run make")?;
    let output = BufReader::new(child.stdout.take().context("make has no output")?);
    let (start, mut said, mut objects) = (Instant::now(), Instant::now(), 0_u32);
    for line in output.lines() {
        let line = line?;
        writeln!(file, "{line}")?;
        objects += u32::from(line.trim_start().starts_with("CC "));
        if said.elapsed() >= PROGRESS {
            said = Instant::now();
            ui::say(&format!(
                "the debug kernel: {objects} of some {OBJECTS} objects after {} min",
                start.elapsed().as_secs() / 60
            ));
        }
    }
    let status = child.wait()?;
    if !status.success() {
        let text = std::fs::read(&log).unwrap_or_default();
        bail!(
            "the kernel's build failed ({status}); all of what it said: {}\n{}",
            log.display(),
            command::tail(&String::from_utf8_lossy(&text), 25)
        );
    }
    step.done();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fragment_comes_last_and_modules_are_left_out() {
        let merged = merge("CONFIG_A=y\nCONFIG_B=m\n# CONFIG_C is not set\n", "CONFIG_B=y\n");
        assert_eq!(merged, "CONFIG_A=y\n# CONFIG_B is not set\n# CONFIG_C is not set\nCONFIG_B=y\n");
    }

    #[test]
    fn an_option_that_the_kernel_did_not_take_is_noticed() {
        let fragment = "# why\nCONFIG_A=y\nCONFIG_B=17\n# CONFIG_C is not set\n";
        assert_eq!(lost(fragment, "CONFIG_A=y\nCONFIG_B=16\nCONFIG_C=y\n"), ["CONFIG_B=17"]);
    }

    #[test]
    fn what_tests_count_on_is_looked_for() {
        for option in
            ["PROVE_LOCKING", "PROVE_RCU", "DEBUG_ATOMIC_SLEEP", "DEBUG_LIST", "DEBUG_OBJECTS", "KASAN"]
        {
            assert!(FRAGMENT.contains(&format!("\nCONFIG_{option}=y\n")), "{option}");
        }
    }
}
