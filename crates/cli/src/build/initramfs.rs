//! The user spaces of host and guest: busybox, an init, and little else.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash as _, Hasher as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, bail};

use super::modules;
use crate::lab::cpio::Archive;
use crate::setup::Environment;

/// How many host archives are kept in the cache.
const KEPT: usize = 6;
/// What the default guest can load with `load-module`, beside what its kernel has built in.
const GUEST_MODULES: &[&str] =
    &["arm-cca-guest", "virtio-rng", "virtio_blk", "virtio_net", "vmw_vsock_virtio_transport"];
/// What the emulated host loads for devices that it has.
const HOST_MODULES: &[&str] = &["bridge", "tun", "virtio_blk", "virtio_net"];
/// Loads a module, in the guest and on the emulated host.
const LOAD_MODULE: &str = include_str!("../../guest/bin/load-module");
/// The same where nothing is left to load.
const ALL_BUILT_IN: &str = "#!/bin/sh\n";
/// The host's first program.
const HOST_INIT: &str = include_str!("../lab/host-init.sh");

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Directories, busybox, and the device nodes that exist before anything is mounted.
fn base(busybox: &Path) -> Result<Archive> {
    let mut archive = Archive::new();
    for directory in ["bin", "dev", "etc", "proc", "root", "run", "sbin", "sys", "tmp"] {
        archive.directory(directory);
    }
    archive.character_device("dev/console", 0o600, 5, 1);
    archive.character_device("dev/null", 0o666, 1, 3);
    archive.file("bin/busybox", 0o755, &read(busybox)?);
    archive.symlink("bin/sh", "busybox");
    Ok(archive)
}

/// The guest's default initramfs: busybox and what lies in `crates/cli/guest`.
pub(crate) fn guest(environment: &Environment, agent: &Path, product: &Path) -> Result<()> {
    let source = crate::paths::checkout()?.join("crates/cli/guest");
    if !source.join("init").is_file() {
        bail!("{} has no init", source.display());
    }
    let mut archive = base(&environment.unpacked.busybox)?;
    add_tree(&mut archive, &source, "")?;
    archive.file("sbin/realm-agent", 0o755, &read(agent)?);
    add_modules(&mut archive, &environment.unpacked.guest_modules, GUEST_MODULES)?;
    write_if_changed(product, &archive.finish())
}

/// What the machine boots with that installs packages: busybox, the driver for disks, and `init`.
pub(crate) fn installer(environment: &Environment, init: &str) -> Result<Vec<u8>> {
    let mut archive = base(&environment.unpacked.busybox)?;
    archive.file("init", 0o755, init.as_bytes());
    archive.file("bin/load-module", 0o755, LOAD_MODULE.as_bytes());
    add_modules(&mut archive, &environment.unpacked.guest_modules, &["virtio_blk"])?;
    Ok(archive.finish())
}

/// Adds kernel modules and the list that `load-module` reads.
fn add_modules(archive: &mut Archive, tree: &Path, wanted: &[&str]) -> Result<()> {
    for directory in ["lib", "lib/modules"] {
        archive.directory(directory);
    }
    let modules = modules::collect(tree, wanted)?;
    for (name, bytes) in &modules.files {
        archive.file(&format!("lib/modules/{name}.ko"), 0o644, bytes);
    }
    archive.file("lib/modules/order", 0o644, modules.order.as_bytes());
    Ok(())
}

/// Adds a directory's files in the order of their names; scripts keep being executable.
fn add_tree(archive: &mut Archive, directory: &Path, prefix: &str) -> Result<()> {
    let mut entries: Vec<PathBuf> =
        std::fs::read_dir(directory)?.flatten().map(|entry| entry.path()).collect();
    entries.sort();
    for path in entries {
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let name = format!("{prefix}{name}");
        if path.is_dir() {
            archive.directory(&name);
            add_tree(archive, &path, &format!("{name}/"))?;
        } else {
            let executable = name == "init" || path.metadata()?.permissions().mode() & 0o111 != 0;
            archive.file(&name, if executable { 0o755 } else { 0o644 }, &read(&path)?);
        }
    }
    Ok(())
}

/// Writes a file whole, and only if its contents are new.
pub(crate) fn write_if_changed(path: &Path, bytes: &[u8]) -> Result<()> {
    if std::fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let partial = path.with_extension(format!("partial-{}", std::process::id()));
    std::fs::write(&partial, bytes).with_context(|| format!("cannot write {}", partial.display()))?;
    std::fs::rename(&partial, path)?;
    Ok(())
}

/// What goes into a host's initramfs beside its base. Every part may be missing.
#[derive(Debug, Clone, Default)]
pub(crate) struct HostParts {
    /// The arm64 `realm`.
    pub(crate) realm: Option<PathBuf>,
    /// The module.
    pub(crate) module: Option<PathBuf>,
    /// The guest's kernel.
    pub(crate) kernel: Option<PathBuf>,
    /// The guest's initramfs.
    pub(crate) initrd: Option<PathBuf>,
    /// Files for the root directory.
    pub(crate) files: Vec<PathBuf>,
}

/// Gives the host's initramfs with these parts. One with the same inputs is taken from the cache.
pub(crate) fn host(environment: &Environment, parts: &HostParts) -> Result<PathBuf> {
    let mut inputs: Vec<(&str, &Path, u32)> = Vec::new();
    for (name, path, mode) in [
        ("realm", &parts.realm, 0o755),
        ("kvm_realm.ko", &parts.module, 0o644),
        ("guest/kernel", &parts.kernel, 0o644),
        ("guest/initrd", &parts.initrd, 0o644),
    ] {
        inputs.extend(path.as_deref().map(|path| (name, path, mode)));
    }
    for file in &parts.files {
        let name = file.file_name().and_then(|name| name.to_str()).context("a file without a name")?;
        inputs.push((name, file, 0o755));
    }

    // Tests run side by side, and want the same one.
    static MAKING: Mutex<()> = Mutex::new(());
    let _making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    let directory = crate::paths::cache()?.join("initrd");
    std::fs::create_dir_all(&directory)?;
    let product = directory.join(format!("host-{:016x}.cpio", fingerprint(environment, &inputs)?));
    if let Ok(file) = std::fs::File::open(&product) {
        // What is used is not old.
        let _ = file.set_modified(std::time::SystemTime::now());
        return Ok(product);
    }
    forget_old(&directory);
    let mut archive = base(&environment.unpacked.busybox)?;
    archive.file("init", 0o755, HOST_INIT.as_bytes());
    archive.directory("guest");
    if let Some(tree) = &environment.host.modules {
        archive.file("bin/load-module", 0o755, LOAD_MODULE.as_bytes());
        add_modules(&mut archive, tree, HOST_MODULES)?;
    } else {
        archive.file("bin/load-module", 0o755, ALL_BUILT_IN.as_bytes());
    }
    for (name, path, mode) in &inputs {
        archive.file(name, *mode, &read(path)?);
    }
    write_if_changed(&product, &archive.finish())?;
    Ok(product)
}

fn fingerprint(environment: &Environment, inputs: &[(&str, &Path, u32)]) -> Result<u64> {
    let mut hasher = DefaultHasher::new();
    (HOST_INIT, LOAD_MODULE, HOST_MODULES, &environment.host.release).hash(&mut hasher);
    let busybox = environment.unpacked.busybox.as_path();
    for (name, path) in inputs.iter().map(|(name, path, _)| (*name, *path)).chain([("busybox", busybox)]) {
        let data = path.metadata().with_context(|| format!("cannot read {}", path.display()))?;
        (name, path, data.len(), data.mtime(), data.mtime_nsec(), data.ino()).hash(&mut hasher);
    }
    Ok(hasher.finish())
}

fn forget_old(directory: &Path) {
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    let mut files: Vec<(std::time::SystemTime, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    files.sort();
    let surplus = files.len().saturating_sub(KEPT);
    for (_, old) in &files[..surplus] {
        let _ = std::fs::remove_file(old);
    }
}
