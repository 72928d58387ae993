//! Rust for arm64 with the toolchain that is there: its own targets, or a standard library built once.
//!
//! In this order: the target is installed; `rustup target add`; the standard library's source for exactly this
//! rustc (in the toolchain, from `rustup component add rust-src`, or Debian's `rust-src` of that version from
//! whichever suite has it), built once with `-Z build-std` into a sysroot in the cache. That build needs
//! `RUSTC_BOOTSTRAP`, and so does the module for a debug kernel; all else of ours is compiled with stable features and
//! `--sysroot`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::apt::{self, Suites};
use crate::command::{self, output};
use crate::ui;

/// For images and the module.
pub(crate) const BARE: &str = "aarch64-unknown-none-softfloat";
/// For the arm64 `realm`.
pub(crate) const LINUX: &str = "aarch64-unknown-linux-gnu";
/// Has each access to memory checked by KASAN, which the kernel's own code is compiled for: by calls, which every kernel with
/// KASAN takes. The library stays as it is; what of it is compiled into ours is checked as well.
const KASAN: &[&str] = &[
    "-Zsanitizer=kernel-address",
    "-Zsanitizer-recover=kernel-address",
    "-Zunstable-options",
    "-Cunsafe-allow-abi-mismatch=sanitizer",
    "-Cllvm-args=-asan-instrumentation-with-call-threshold=0",
    "-Cllvm-args=-asan-stack=0",
    "-Cllvm-args=-asan-globals=0",
];
/// How long rustup may take: without a network it gives up late.
const RUSTUP_PATIENCE: Duration = Duration::from_secs(180);

/// The compiler that is there.
#[derive(Debug, Clone)]
pub(crate) struct Toolchain {
    /// Its release, such as 1.95.0.
    pub(crate) release: String,
    /// Its commit, where it says so: two compilers of one release need two sysroots.
    commit: String,
    host: String,
    sysroot: PathBuf,
}

/// Asks rustc who it is.
pub(crate) fn toolchain() -> Result<Toolchain> {
    let text =
        output(Command::new("rustc").arg("-vV")).context("rustc does not work (see `realm doctor`)")?;
    let field = |name: &str| {
        text.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned())
    };
    let sysroot = output(Command::new("rustc").args(["--print", "sysroot"]))?;
    Ok(Toolchain {
        release: field("release:").context("rustc -vV gives no release")?,
        commit: field("commit-hash:").unwrap_or_default().chars().take(9).collect(),
        host: field("host:").context("rustc -vV gives no host")?,
        sysroot: PathBuf::from(sysroot.trim()),
    })
}

/// How to compile for one target.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    /// Its name.
    pub(crate) name: &'static str,
    /// The sysroot to pass, if it is not the toolchain's own.
    sysroot: Option<PathBuf>,
}

/// How to compile for both targets.
#[derive(Debug, Clone)]
pub(crate) struct Rust {
    /// For images and the module.
    pub(crate) bare: Target,
    /// For the arm64 `realm`.
    pub(crate) linux: Target,
}

/// Makes sure that both targets can be compiled for.
pub(crate) fn ensure(cache: &Path) -> Result<Rust> {
    let toolchain = toolchain()?;
    let bare = target(&toolchain, BARE, cache)?;
    let linux = target(&toolchain, LINUX, cache)?;
    Ok(Rust { bare, linux })
}

/// How a target would be compiled for now, if nothing had to be fetched; for `doctor`.
pub(crate) fn present(toolchain: &Toolchain, name: &'static str, cache: &Path) -> Option<(Target, String)> {
    if has_core(&toolchain.sysroot, name) {
        return Some((Target { name, sysroot: None }, "installed in the toolchain".to_owned()));
    }
    let private = private_sysroot(toolchain, cache);
    (stamp(&private, name).is_file() && has_core(&private, name)).then(|| {
        let how = format!("library built from source, {}", private.display());
        (Target { name, sysroot: Some(private) }, how)
    })
}

fn target(toolchain: &Toolchain, name: &'static str, cache: &Path) -> Result<Target> {
    if let Some((target, _)) = present(toolchain, name, cache) {
        return Ok(target);
    }
    if rustup(&["target", "add", name]) && has_core(&toolchain.sysroot, name) {
        return Ok(Target { name, sysroot: None });
    }
    let source = library_source(toolchain, cache)?;
    build_library(toolchain, name, &source, cache)?;
    Ok(Target { name, sysroot: Some(private_sysroot(toolchain, cache)) })
}

fn libraries(sysroot: &Path, target: &str) -> PathBuf {
    sysroot.join("lib/rustlib").join(target).join("lib")
}

fn has_core(sysroot: &Path, target: &str) -> bool {
    std::fs::read_dir(libraries(sysroot, target)).is_ok_and(|entries| {
        entries.flatten().any(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.starts_with("libcore-") && name.ends_with(".rlib")
        })
    })
}

fn private_sysroot(toolchain: &Toolchain, cache: &Path) -> PathBuf {
    let name = if toolchain.commit.is_empty() || toolchain.commit == "unknown" {
        toolchain.release.clone()
    } else {
        format!("{}-{}", toolchain.release, toolchain.commit)
    };
    cache.join("sysroot").join(name)
}

fn stamp(sysroot: &Path, target: &str) -> PathBuf {
    sysroot.join(format!("{target}.complete"))
}

/// Asks rustup for something; `false` where there is no rustup, no network, or no such thing.
fn rustup(arguments: &[&str]) -> bool {
    let Some(rustup) = command::find("rustup") else { return false };
    ui::say(&format!("trying `rustup {}`", arguments.join(" ")));
    let child = Command::new(rustup)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = child else { return false };
    let deadline = Instant::now() + RUSTUP_PATIENCE;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => {
                if !status.success() {
                    ui::say("rustup could not; looking for the standard library's source instead");
                }
                return status.success();
            }
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(50)),
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                ui::say("rustup took too long; looking for the standard library's source instead");
                return false;
            }
        }
    }
}

/// The `library` directory of exactly this compiler's source.
fn library_source(toolchain: &Toolchain, cache: &Path) -> Result<PathBuf> {
    let own = toolchain.sysroot.join("lib/rustlib/src/rust/library");
    let is_source = |path: &Path| path.join("core/src/lib.rs").is_file() && path.join("Cargo.lock").is_file();
    if is_source(&own) {
        return Ok(own);
    }
    let root = cache.join("rust-src").join(&toolchain.release);
    let packaged = root.join(format!("usr/src/rustc-{}/library", toolchain.release));
    if is_source(&packaged) {
        return Ok(packaged);
    }
    if rustup(&["component", "add", "rust-src"]) && is_source(&own) {
        return Ok(own);
    }
    let archive = apt::archive()?;
    let backports = archive.open(Suites::StableBackports, cache)?.codename()?;
    let everything = archive.open(Suites::Any(&backports), cache)?;
    let exact = everything
        .show("rust-src")?
        .into_iter()
        .find(|package| package.version.split(['+', '-', '~']).next() == Some(toolchain.release.as_str()));
    let Some(package) = exact else {
        bail!(
            "no standard library for arm64: rustup could not add the target {BARE}, and no suite of the Debian \
             archive has rust-src {version}. Next step: make `rustup target add {BARE} {LINUX}` work, or use a \
             toolchain whose version Debian has",
            version = toolchain.release
        );
    };
    everything.unpack(&[package], &root)?;
    if !is_source(&packaged) {
        bail!("Debian's rust-src {} does not hold {}", toolchain.release, packaged.display());
    }
    Ok(packaged)
}

/// Builds the standard library for a target into the private sysroot.
fn build_library(toolchain: &Toolchain, name: &'static str, source: &Path, cache: &Path) -> Result<()> {
    let step = ui::step(&format!("building Rust's standard library for {name} (once)"));
    let work = cache.join("build-std").join(&toolchain.release);
    std::fs::create_dir_all(work.join("src"))?;
    // Any crate will do: cargo builds the library as its dependency.
    std::fs::write(
        work.join("Cargo.toml"),
        "[package]\nname = \"sysroot\"\nversion = \"0.0.0\"\nedition = \"2021\"\n[workspace]\n\
         [profile.release]\npanic = \"abort\"\n",
    )?;
    std::fs::write(work.join("src/lib.rs"), "#![no_std]\n")?;
    let parts = if name == LINUX { "std,panic_abort" } else { "core,alloc" };
    let mut cargo = Command::new("cargo");
    clean_environment(&mut cargo);
    cargo
        .current_dir(&work)
        .args(["build", "-q", "--release", "--target", name, "-Z", &format!("build-std={parts}")])
        .arg("--target-dir")
        .arg(work.join("target"))
        .env("RUSTC_BOOTSTRAP", "1")
        .env("__CARGO_TESTS_ONLY_SRC_ROOT", source)
        .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", "aarch64-linux-gnu-gcc");
    output(&mut cargo).with_context(|| format!("cannot build the standard library for {name}"))?;

    let sysroot = private_sysroot(toolchain, cache);
    let destination = libraries(&sysroot, name);
    let _ = std::fs::remove_dir_all(&destination);
    std::fs::create_dir_all(&destination)?;
    for entry in std::fs::read_dir(work.join("target").join(name).join("release/deps"))?.flatten() {
        let file = entry.file_name();
        let text = file.to_string_lossy();
        let library = text.starts_with("lib") && (text.ends_with(".rlib") || text.ends_with(".rmeta"));
        if library && !text.starts_with("libsysroot-") {
            std::fs::copy(entry.path(), destination.join(&file))?;
        }
    }
    // Build scripts and procedural macros are still compiled for this machine.
    let host = sysroot.join("lib/rustlib").join(&toolchain.host);
    let _ = std::fs::remove_file(&host);
    std::os::unix::fs::symlink(toolchain.sysroot.join("lib/rustlib").join(&toolchain.host), &host)?;
    if !has_core(&sysroot, name) {
        bail!("the build of the standard library for {name} left no libcore in {}", destination.display());
    }
    std::fs::write(stamp(&sysroot, name), "")?;
    let _ = std::fs::remove_dir_all(work.join("target"));
    step.done();
    Ok(())
}

/// Takes away what a caller's environment would change about compiling for another machine.
fn clean_environment(cargo: &mut Command) {
    for variable in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_TARGET", "RUSTC_BOOTSTRAP"] {
        cargo.env_remove(variable);
    }
}

impl Rust {
    /// A cargo that compiles for `target` in the checkout.
    pub(crate) fn cargo(&self, target: &Target) -> Command {
        self.cargo_with(target, &[])
    }

    /// One that compiles for a kernel which checks accesses to memory. Its products need a directory of their own.
    pub(crate) fn cargo_with_kasan(&self) -> Command {
        let mut cargo = self.cargo_with(&self.bare, KASAN);
        cargo.env("RUSTC_BOOTSTRAP", "1");
        cargo
    }

    fn cargo_with(&self, target: &Target, more: &[&str]) -> Command {
        let mut cargo = Command::new("cargo");
        clean_environment(&mut cargo);
        let mut flags: Vec<String> = more.iter().map(|&flag| flag.to_owned()).collect();
        if let Some(sysroot) = &target.sysroot {
            flags.push(format!("--sysroot={}", sysroot.display()));
        }
        if target.name == LINUX {
            flags.extend(["-C".to_owned(), "target-feature=+crt-static".to_owned()]);
        }
        let variable = target.name.to_ascii_uppercase().replace('-', "_");
        cargo.env(format!("CARGO_TARGET_{variable}_RUSTFLAGS"), flags.join(" "));
        cargo.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", "aarch64-linux-gnu-gcc");
        cargo
    }
}
