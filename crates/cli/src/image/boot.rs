//! `--kernel-from-disk`: kernel and initramfs out of a disk's /boot, without mounting it and without being root.
//!
//! A guest may have written anything to its disk: `ext4-view` has no unsafe code and takes nothing for granted, and what
//! it finds is as good as any other kernel: the Realm's measurement says what was started.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};
use attest::measure::sha256;
use ext4_view::{Ext4, Ext4Read};
use vmm::disk::Disk;

use super::partitions::{self, Part};
use crate::args::RunArgs;
use crate::build::initramfs::write_if_changed;
use crate::run::disks::DiskArg;
use crate::run::options::to_hex;
use crate::ui;

/// No kernel and no initramfs is larger.
const LARGEST: u64 = 512 << 20;
/// How kernels are called, up to their release.
const KERNELS: [&str; 3] = ["vmlinuz-", "Image-", "vmlinux-"];
/// How the initramfs of a release is called: Debian's way, Fedora's, openSUSE's, Alpine's.
const INITRDS: [(&str, &str); 4] =
    [("initrd.img-", ""), ("initramfs-", ".img"), ("initrd-", ""), ("initramfs-", "")];
/// Which file makes a file system the root.
const ROOT_MARKS: [&str; 3] = ["/usr/lib/os-release", "/etc/os-release", "/sbin/init"];
/// A terminal that nobody can type on needs no login.
const NO_LOGIN_ON_SERIAL: &str = "systemd.mask=serial-getty@ttyS0.service";

/// What a disk boots with.
pub(super) struct Boot {
    /// The kernel's release, as its file's name says.
    pub(super) release: String,
    pub(super) kernel: Vec<u8>,
    pub(super) initrd: Vec<u8>,
    /// The root file system's identifier, if one was recognized.
    pub(super) root: Option<String>,
}

/// Puts the first disk's kernel and initramfs into the place of those that a user names, where that is asked for.
pub(crate) fn resolve(mut args: RunArgs) -> Result<RunArgs> {
    if !args.kernel_from_disk {
        return Ok(args);
    }
    ensure!(
        args.exec.is_none(),
        "--exec needs this project's initramfs, whose first program takes the command: a disk's own system has a \
         login instead"
    );
    let disk = args.disks.first().context("--kernel-from-disk needs a --disk to take it from")?;
    let name = disk.path.display().to_string();
    let boot = find(disk).with_context(|| format!("--kernel-from-disk: {name}"))?;
    let own = args.cmdline.take().unwrap_or_default();
    let mut words = vec![NO_LOGIN_ON_SERIAL.to_owned()];
    if !own.split_whitespace().any(|word| word.starts_with("root=")) {
        let root = boot.root.with_context(|| {
            format!("{name} has no ext4 file system that looks like a root: name it with --cmdline root=...")
        })?;
        words.insert(0, format!("root=UUID={root} ro"));
    }
    words.extend(Some(own).filter(|own| !own.is_empty()));
    args.cmdline = Some(words.join(" "));
    ui::say(&format!(
        "{name} boots {} ({}, initramfs {})",
        boot.release,
        ui::size(u64::try_from(boot.kernel.len())?),
        ui::size(u64::try_from(boot.initrd.len())?),
    ));
    let place = std::path::absolute(&disk.path)?;
    let directory =
        crate::paths::cache()?.join("boot").join(to_hex(&sha256(place.as_os_str().as_encoded_bytes())[..8]));
    std::fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let keep = |name: &str, bytes: &[u8]| -> Result<Option<PathBuf>> {
        let path = directory.join(name);
        write_if_changed(&path, bytes)?;
        Ok(Some(path))
    };
    args.initrd = keep("initrd", &boot.initrd)?;
    args.kernel = keep("kernel", &boot.kernel)?;
    Ok(args)
}

/// Reads a part of a disk for the file system's reader.
struct Window {
    disk: std::rc::Rc<Disk>,
    part: Part,
}

impl Ext4Read for Window {
    fn read(
        &mut self,
        start: u64,
        to: &mut [u8],
    ) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let len = u64::try_from(to.len())?;
        if start.checked_add(len).is_none_or(|end| end > self.part.size) {
            return Err("the file system reaches beyond its partition".into());
        }
        Ok(self.disk.read(to, self.part.start + start)?)
    }
}

/// Looks through all file systems of a disk.
pub(super) fn find(arg: &DiskArg) -> Result<Boot> {
    let disk = std::rc::Rc::new(Disk::open(&arg.path, arg.format, true)?);
    let parts = partitions::find(&disk)?;
    let mut newest: Option<(Candidate, usize)> = None;
    let mut systems = Vec::new();
    let mut root = None;
    for part in &parts {
        let window = Window { disk: disk.clone(), part: *part };
        let Ok(system) = Ext4::load(Box::new(window)) else { continue };
        if root.is_none() && ROOT_MARKS.iter().any(|path| exists(&system, path)) {
            root = Some(system.uuid().to_string());
        }
        // In a partition of its own, what is in /boot lies at the top.
        for directory in ["/boot", "/"] {
            for candidate in candidates(&system, directory) {
                if newest.as_ref().is_none_or(|(best, _)| order(&best.release) < order(&candidate.release)) {
                    newest = Some((candidate, systems.len()));
                }
            }
        }
        systems.push(system);
    }
    if systems.is_empty() {
        bail!(
            "it has no ext4 file system (looked at {} {})",
            parts.len(),
            if parts.len() == 1 { "place" } else { "places" }
        );
    }
    let (candidate, index) = newest.context("there is no kernel with its initramfs in its /boot")?;
    let system = systems.get(index).context("a file system is gone")?;
    Ok(Boot {
        kernel: read(system, &candidate.kernel)?,
        initrd: read(system, &candidate.initrd)?,
        release: candidate.release,
        root,
    })
}

/// A kernel with its initramfs.
struct Candidate {
    release: String,
    kernel: String,
    initrd: String,
}

fn candidates(system: &Ext4, directory: &str) -> Vec<Candidate> {
    let Ok(entries) = system.read_dir(directory) else { return Vec::new() };
    let names: Vec<String> = entries
        .map_while(std::result::Result::ok)
        .filter_map(|entry| entry.file_name().as_str().ok().map(str::to_owned))
        .collect();
    let path = |name: &str| format!("{}/{name}", directory.trim_end_matches('/'));
    let mut found = Vec::new();
    for name in &names {
        let Some(release) = KERNELS.iter().find_map(|prefix| name.strip_prefix(prefix)) else { continue };
        let initrd = INITRDS
            .iter()
            .map(|(before, after)| format!("{before}{release}{after}"))
            .find(|name| names.contains(name));
        if let Some(initrd) = initrd {
            found.push(Candidate { release: release.to_owned(), kernel: path(name), initrd: path(&initrd) });
        }
    }
    found
}

/// Orders releases by their numbers, and by the rest where these are equal.
fn order(release: &str) -> (Vec<u64>, &str) {
    let numbers = release.split(|byte: char| !byte.is_ascii_digit()).filter_map(|number| number.parse().ok());
    (numbers.collect(), release)
}

fn exists(system: &Ext4, path: &str) -> bool {
    // A link may lead nowhere yet still be there.
    system.symlink_metadata(path).is_ok()
}

fn read(system: &Ext4, path: &str) -> Result<Vec<u8>> {
    let size = system.metadata(path).with_context(|| format!("cannot read {path}"))?.len();
    ensure!(size <= LARGEST, "{path} has {size} bytes: that is no kernel and no initramfs");
    system.read(path).with_context(|| format!("cannot read {path}"))
}

#[cfg(test)]
mod tests {
    use super::super::partitions::tests::{scratch, with_gpt};
    use super::*;
    use std::path::Path;
    use std::process::Command;
    use vmm::disk::Format;

    /// A file system with these files, made by mke2fs.
    fn ext4(files: &[(&str, &[u8])]) -> Vec<u8> {
        let (tree, image) = (scratch("tree"), scratch("ext4"));
        for (name, bytes) in files {
            let path = tree.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
        let program = crate::command::find("mke2fs").expect("the tests need mke2fs (Debian: e2fsprogs)");
        let mut command = Command::new(program);
        command.args(["-q", "-F", "-t", "ext4", "-U", "11111111-2222-3333-4444-555555555555", "-d"]);
        crate::command::output(command.arg(&tree).arg(&image).arg("8M")).unwrap();
        let bytes = std::fs::read(&image).unwrap();
        std::fs::remove_dir_all(tree).unwrap();
        std::fs::remove_file(image).unwrap();
        bytes
    }

    fn boot(bytes: &[u8], format: Format) -> Result<Boot> {
        let path = scratch("disk");
        match format {
            Format::Raw => std::fs::write(&path, bytes).unwrap(),
            Format::Qcow2 => {
                vmm::disk::create_qcow2(&path, u64::try_from(bytes.len()).unwrap()).unwrap();
                let mut disk = Disk::open(&path, format, false).unwrap();
                disk.write(bytes, 0).unwrap();
                disk.flush().unwrap();
            }
        }
        let found = find(&DiskArg { path: path.clone(), format, read_only: false });
        std::fs::remove_file(path).unwrap();
        found
    }

    const DEBIAN: [(&str, &[u8]); 7] = [
        ("etc/os-release", b"ID=debian"),
        ("boot/vmlinuz-6.12.9-arm64", b"old"),
        ("boot/initrd.img-6.12.9-arm64", b"old"),
        ("boot/vmlinuz-6.12.100-arm64", b"kernel"),
        ("boot/initrd.img-6.12.100-arm64", b"initramfs"),
        ("boot/vmlinuz-7.0-without-initramfs", b"x"),
        ("boot/config-9.9", b"x"),
    ];

    fn check(found: Boot) {
        assert_eq!(found.release, "6.12.100-arm64");
        assert_eq!((&found.kernel[..], &found.initrd[..]), (&b"kernel"[..], &b"initramfs"[..]));
        assert_eq!(found.root.as_deref(), Some("11111111-2222-3333-4444-555555555555"));
    }

    #[test]
    fn the_newest_kernel_is_found_on_a_bare_file_system_of_either_format() {
        let bytes = ext4(&DEBIAN);
        check(boot(&bytes, Format::Raw).unwrap());
        check(boot(&bytes, Format::Qcow2).unwrap());
    }

    #[test]
    fn a_boot_partition_and_a_root_partition_are_put_together() {
        let mut disk = with_gpt(24, &[(2048, 16_384), (20_480, 16_384)]);
        let top: Vec<(&str, &[u8])> = DEBIAN[1..]
            .iter()
            .map(|(name, bytes)| (Path::new(name).file_name().unwrap().to_str().unwrap(), *bytes))
            .collect();
        disk[2048 * 512..][..8 << 20].copy_from_slice(&ext4(&top));
        disk[20_480 * 512..][..8 << 20].copy_from_slice(&ext4(&DEBIAN[..1]));
        check(boot(&disk, Format::Raw).unwrap());
    }

    #[test]
    fn a_disk_without_a_kernel_says_what_is_missing() {
        let said = |bytes: &[u8]| format!("{:#}", boot(bytes, Format::Raw).err().unwrap());
        assert!(said(&vec![0; 1 << 20]).contains("no ext4"));
        assert!(said(&ext4(&DEBIAN[..1])).contains("no kernel"));
    }

    #[test]
    fn a_broken_file_system_is_an_error_or_data() {
        let bytes = ext4(&DEBIAN);
        for seed in 0..60usize {
            let mut broken = bytes.clone();
            for step in 0..40usize {
                // Superblock, group descriptors and the first inode tables.
                let at = (seed * 7919 + step * 104_729) % (256 << 10);
                broken[1024 + at] ^= u8::try_from((seed + step) % 255).unwrap() + 1;
            }
            let _ = boot(&broken, Format::Raw);
        }
    }
}
