//! Firmware and RMM images that a user brings: refused with the reason where the machine would only stay dark.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};

use crate::args::MachineArgs;

/// The flash device that a firmware starts in.
const FLASH: u64 = 64 << 20;
/// What the RMM's image may take of its memory; the rest of its 24 MiB is the page that it shares with EL3.
const RMM_MEMORY: u64 = 0x017F_F000;
/// How a Firmware Image Package begins.
const FIP: &[u8] = &0xAA64_0001_u32.to_le_bytes();
/// Where TF-A's flash image for this machine has its package, behind BL1.
const FIP_IN_FLASH: u64 = 0x4_0000;

/// Looks at what --firmware and --rmm name.
pub(crate) fn check(args: &MachineArgs) -> Result<()> {
    let firmware = args.firmware.as_deref().filter(|path| *path != Path::new(super::NO_FIRMWARE));
    let has_package = firmware.map(check_firmware).transpose()?.unwrap_or(false);
    if let Some(rmm) = &args.rmm {
        check_rmm(rmm)?;
        if let (true, Some(firmware)) = (has_package, firmware) {
            bail!(
                "{} holds a firmware image package, and takes its RMM from there: --rmm would change nothing",
                firmware.display()
            );
        }
    }
    Ok(())
}

/// Whether the firmware has a package with its own RMM.
fn check_firmware(path: &Path) -> Result<bool> {
    let (mut file, size, start) = open("firmware", path)?;
    let name = path.display();
    ensure!(
        !start.starts_with(b"\x7fELF"),
        "the firmware {name} is an ELF file: QEMU puts raw bytes into flash"
    );
    ensure!(
        !start.starts_with(FIP),
        "the firmware {name} is a firmware image package alone: flash begins with BL1, and has the package at \
         {FIP_IN_FLASH:#x} (docs/interop.md says how to put them together)"
    );
    ensure!(size <= FLASH, "the firmware {name} has {size} bytes, flash has {FLASH}");
    let mut magic = [0; 4];
    let there = file.seek(SeekFrom::Start(FIP_IN_FLASH)).and_then(|_| file.read_exact(&mut magic)).is_ok();
    Ok(there && magic == FIP)
}

fn check_rmm(path: &Path) -> Result<()> {
    let (_, size, start) = open("RMM", path)?;
    let name = path.display();
    ensure!(
        !start.starts_with(b"\x7fELF"),
        "the RMM {name} is an ELF file: EL3 enters the first byte of a raw image (TF-RMM: rmm.img)"
    );
    ensure!(size <= RMM_MEMORY, "the RMM {name} has {size} bytes, its memory has {RMM_MEMORY}");
    Ok(())
}

/// Opens a file and reads its first bytes.
fn open(what: &str, path: &Path) -> Result<(File, u64, [u8; 4])> {
    let name = path.display();
    let mut file = File::open(path).with_context(|| format!("cannot open the {what} {name}"))?;
    let data = file.metadata()?;
    ensure!(data.is_file(), "the {what} {name} is no file");
    let mut start = [0; 4];
    file.read_exact(&mut start).with_context(|| format!("the {what} {name} is empty"))?;
    Ok((file, data.len(), start))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, content: &[u8]) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("realm-images-{}-{name}", std::process::id()));
        std::fs::write(&path, content).unwrap();
        path
    }

    #[test]
    fn images_of_the_wrong_form_are_refused_with_the_reason() {
        let refused = |firmware: Option<&Path>, rmm: Option<&Path>| {
            let args = MachineArgs {
                firmware: firmware.map(Path::to_owned),
                rmm: rmm.map(Path::to_owned),
                ..MachineArgs::default()
            };
            check(&args).map_err(|error| format!("{error:#}")).err().unwrap_or_default()
        };
        let elf = file("elf", b"\x7fELF\x02\x01");
        let package = file("fip", &[FIP, &[0; 60]].concat());
        let mut flash = vec![0; 0x4_0000];
        flash.extend_from_slice(FIP);
        let flash = file("flash", &flash);
        let raw = file("raw", &[0x1f, 0x20, 0x03, 0xd5]);
        let none = file("empty", b"");
        assert!(refused(Some(&elf), None).contains("ELF"));
        assert!(refused(None, Some(&elf)).contains("rmm.img"));
        assert!(refused(Some(&package), None).contains("BL1"));
        assert!(refused(Some(&flash), Some(&raw)).contains("--rmm would change nothing"));
        assert!(refused(Some(&none), None).contains("empty"));
        assert!(refused(None, Some(Path::new("/nonexistent"))).contains("cannot open the RMM"));
        assert_eq!(refused(Some(&flash), None), "");
        assert_eq!(refused(Some(&raw), Some(&raw)), "");
        assert_eq!(refused(Some(Path::new("none")), None), "");
        for path in [elf, package, flash, raw, none] {
            std::fs::remove_file(path).unwrap();
        }
    }
}
