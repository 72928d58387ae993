//! Builds everything that runs on the emulated machine: firmware, module, the arm64 `realm`.
//!
//! Cargo and make decide what is out of date; here is only which of their products goes where.

pub(crate) mod initramfs;
mod modules;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::args::BuildArgs;
use crate::command::{self, output};
use crate::setup::Environment;
use crate::setup::rust::{BARE, LINUX};
use crate::ui;

/// What can be built by itself.
const PARTS: &[&str] = &["monitor", "rmm", "payload", "module", "realm", "agent", "initramfs"];

/// The monitor's package.
const MONITOR: &str = "monitor-image";
/// The agent's package.
const AGENT: &str = "agent-image";
/// Bytes that the monitor's image may have.
const MONITOR_LIMIT: u64 = 128 << 10;

/// Where the products lie.
#[derive(Debug, Clone)]
pub(crate) struct Images {
    /// The EL3 monitor.
    pub(crate) monitor: PathBuf,
    /// The RMM.
    pub(crate) rmm: PathBuf,
    /// The NS-EL2 test payload.
    pub(crate) payload: PathBuf,
    /// The module.
    pub(crate) module: PathBuf,
    /// The arm64 `realm`, static and stripped.
    pub(crate) realm: PathBuf,
    /// The guest's agent, static and stripped.
    pub(crate) agent: PathBuf,
    /// The guest's default initramfs.
    pub(crate) guest_initrd: PathBuf,
}

/// Where products lie, built or not.
pub(crate) fn images(environment: &Environment) -> Result<Images> {
    let directory = crate::paths::target()?.join("realm-images");
    Ok(Images {
        monitor: directory.join("monitor.bin"),
        rmm: directory.join("rmm.bin"),
        payload: directory.join("payload.bin"),
        module: directory.join("module").join(&environment.host.release).join("kvm_realm.ko"),
        realm: directory.join("realm"),
        agent: directory.join("realm-agent"),
        guest_initrd: directory.join("guest-initrd.cpio"),
    })
}

/// `realm build`.
pub(crate) fn run(args: &BuildArgs) -> Result<u8> {
    for part in &args.only {
        if !PARTS.contains(&part.as_str()) {
            bail!("there is no part {part}: one of {}", PARTS.join(", "));
        }
    }
    let environment = crate::setup::ensure(None, false)?;
    let parts: Vec<&str> =
        if args.only.is_empty() { PARTS.to_vec() } else { args.only.iter().map(String::as_str).collect() };
    let images = build(&environment, &parts)?;
    let products = [
        ("monitor", &images.monitor),
        ("rmm", &images.rmm),
        ("payload", &images.payload),
        ("module", &images.module),
        ("realm", &images.realm),
        ("agent", &images.agent),
        ("initramfs", &images.guest_initrd),
    ];
    let built = products.into_iter().filter(|(part, _)| parts.contains(part));
    if args.json {
        let built: serde_json::Map<_, _> =
            built.map(|(part, path)| (part.to_owned(), path.display().to_string().into())).collect();
        println!("{}", serde_json::Value::from(built));
        return Ok(0);
    }
    built.for_each(|(_, path)| println!("{}", path.display()));
    Ok(0)
}

/// Builds all that a Realm on the emulated machine needs; the test payload is not among it.
pub(crate) fn for_run(environment: &Environment) -> Result<Images> {
    build(environment, &["monitor", "rmm", "module", "realm", "initramfs"])
}

/// Builds some parts.
pub(crate) fn build(environment: &Environment, parts: &[&str]) -> Result<Images> {
    let images = images(environment)?;
    let directory = images.monitor.parent().context("no place for images")?;
    std::fs::create_dir_all(directory)?;
    let _lock = crate::setup::lock(directory)?;
    for &part in parts {
        match part {
            "monitor" => firmware(environment, MONITOR, "the monitor", &images.monitor)?,
            "rmm" => firmware(environment, "rmm-image", "the RMM", &images.rmm)?,
            "payload" => firmware(environment, "payload-image", "the test payload", &images.payload)?,
            "module" => module(environment, &images.module)?,
            "realm" => realm(environment, &images.realm)?,
            "agent" => agent(environment, &images.agent)?,
            "initramfs" => {
                agent(environment, &images.agent)?;
                initramfs::guest(environment, &images.agent, &images.guest_initrd)?;
            }
            other => bail!("there is no part {other}"),
        }
    }
    Ok(images)
}

/// Says what is built: at once when it is the first time, afterwards only if it took a while.
fn announced(what: &str, product: &Path, work: impl FnOnce(bool) -> Result<()>) -> Result<()> {
    let first = !product.exists();
    if first {
        ui::say(&format!("building {what} ..."));
    }
    let start = Instant::now();
    work(first).with_context(|| format!("cannot build {what}"))?;
    if start.elapsed() > Duration::from_secs(2) {
        ui::say(&format!("built {what} in {}", ui::seconds(start.elapsed())));
    }
    Ok(())
}

/// Runs cargo for a package; its progress is shown when there will be much of it.
fn cargo(cargo: Command, package: &str, target: &str, show: bool) -> Result<()> {
    cargo_into(&crate::paths::target()?, cargo, package, target, show)
}

fn cargo_into(directory: &Path, mut cargo: Command, package: &str, target: &str, show: bool) -> Result<()> {
    cargo.current_dir(crate::paths::checkout()?).args([
        "build",
        "--profile",
        profile(package),
        "-p",
        package,
        "--target",
        target,
    ]);
    cargo.arg("--target-dir").arg(directory);
    if !(show && ui::fancy()) {
        cargo.arg("--quiet");
    }
    command::loud(&mut cargo)
}

/// The profile that a package is built in.
fn profile(package: &str) -> &'static str {
    if [MONITOR, AGENT].contains(&package) { "monitor" } else { "release" }
}

/// Where cargo leaves an image's ELF file.
pub(crate) fn firmware_elf(package: &str) -> Result<PathBuf> {
    Ok(crate::paths::target()?.join(BARE).join(profile(package)).join(package))
}

/// An image: compiled, then turned from ELF into the bytes that lie in memory.
fn firmware(environment: &Environment, package: &str, what: &str, image: &Path) -> Result<()> {
    announced(what, image, |first| {
        cargo(environment.rust.cargo(&environment.rust.bare), package, BARE, first)?;
        let elf = firmware_elf(package)?;
        output(Command::new("aarch64-linux-gnu-objcopy").args(["-O", "binary"]).arg(&elf).arg(image))?;
        let size = std::fs::metadata(image)?.len();
        if package == MONITOR && size > MONITOR_LIMIT {
            bail!("the monitor has {size} bytes, more than the {MONITOR_LIMIT} that it promises");
        }
        Ok(())
    })
}

/// The module: the Rust side as a static library, then the kernel's own build.
fn module(environment: &Environment, module: &Path) -> Result<()> {
    announced("the kernel module", module, |first| {
        let rust = &environment.rust;
        let (target, command) = if environment.host.debug {
            (crate::paths::target()?.join("kasan"), rust.cargo_with_kasan())
        } else {
            (crate::paths::target()?, rust.cargo(&rust.bare))
        };
        cargo_into(&target, command, "kvm-realm-glue", BARE, first)?;
        let library = target.join(BARE).join("release/libkvm_realm_glue.a");
        // One directory for each kernel: objects of another one must not be taken for ours.
        let work = module.parent().context("no place for the module")?;
        std::fs::create_dir_all(work)?;
        let mut make = Command::new("make");
        make.arg("-C").arg(crate::paths::checkout()?.join("linux/kvm_realm"));
        make.arg(format!("HEADERS={}", environment.host.headers.display()));
        make.arg(format!("RUSTLIB={}", library.display()));
        make.arg(format!("OUT={}", work.display()));
        make.arg(format!("RELEASE={}", environment.host.release));
        make.env_remove("MAKEFLAGS").env_remove("MAKELEVEL");
        output(&mut make).map(drop)
    })
}

/// This crate for arm64, without its symbols.
fn realm(environment: &Environment, realm: &Path) -> Result<()> {
    announced("realm for arm64", realm, |first| {
        cargo(environment.rust.cargo(&environment.rust.linux), "realm", LINUX, first)?;
        let binary = crate::paths::target()?.join(LINUX).join("release/realm");
        output(Command::new("aarch64-linux-gnu-strip").arg("-o").arg(realm).arg(&binary))?;
        Ok(())
    })
}

/// What authors of VMMs read, to see it run.
const EXAMPLES: [&str; 2] = ["tiny", "interrupts"];

/// The examples for arm64, static and stripped. Only tests need them.
pub(crate) fn examples(environment: &Environment) -> Result<Vec<PathBuf>> {
    let directory = images(environment)?.realm.with_file_name("examples");
    std::fs::create_dir_all(&directory)?;
    let target = crate::paths::target()?;
    let mut cargo = environment.rust.cargo(&environment.rust.linux);
    cargo.current_dir(crate::paths::checkout()?).args(["build", "--quiet", "--release", "-p", "vmm"]);
    for name in EXAMPLES {
        cargo.args(["--example", name]);
    }
    cargo.args(["--target", LINUX]).arg("--target-dir").arg(&target);
    command::loud(&mut cargo)?;
    let stripped = |name: &str| {
        let to = directory.join(name);
        let binary = target.join(LINUX).join("release/examples").join(name);
        output(Command::new("aarch64-linux-gnu-strip").arg("-o").arg(&to).arg(&binary))?;
        Ok(to)
    };
    EXAMPLES.iter().map(|name| stripped(name)).collect()
}

/// The guest's agent. A disk image that is to have one takes it from here, as `/usr/sbin/realm-agent`, with
/// `images/agent/realm-agent.service` as its unit.
fn agent(environment: &Environment, agent: &Path) -> Result<()> {
    announced("the guest's agent", agent, |first| {
        cargo(environment.rust.cargo(&environment.rust.bare), AGENT, BARE, first)?;
        let partial = agent.with_extension("partial");
        output(Command::new("aarch64-linux-gnu-strip").arg("-o").arg(&partial).arg(firmware_elf(AGENT)?))?;
        initramfs::write_if_changed(agent, &std::fs::read(&partial)?)?;
        std::fs::remove_file(&partial)?;
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(agent, std::fs::Permissions::from_mode(0o755))?;
        Ok(())
    })
}
