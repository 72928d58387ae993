//! `realm lab --payload`: a bare-metal program at NS-EL2 in Linux's place.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use super::machine::Config;
use super::protocol::Io;
use super::session::Job;
use super::stages::Timeline;
use crate::args::{LabArgs, MachineArgs};
use crate::build::{self, Images};
use crate::setup::{self, Environment};

/// The machine's memory in MiB unless --host-memory says otherwise.
const MEMORY: u64 = 1024;
/// Where the monitor puts it unless told otherwise: the first byte of an Image, or of a raw binary.
const ADDRESS: u64 = 0x4200_0000;
/// Below is the device tree, and the memory that the RMM keeps.
const FREE_MEMORY: u64 = 0x4190_0000;
/// How several CPUs run unless --accel says otherwise. On one thread, a CPU that spins for another burns all of its time
/// slice first, which without a kernel's timer ticks is up to a second.
const THREADS: &str = "tcg,thread=multi";
/// Start of DRAM.
const DRAM: u64 = 0x4000_0000;
/// The name under which the monitor looks for another address.
const ADDRESS_ITEM: &str = "opt/kvm-realm/kernel-address";

/// What to boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Payload {
    /// The program: an arm64 Image, or raw code that begins with its first instruction.
    pub(crate) file: PathBuf,
    /// Where it goes, if not where a kernel would.
    pub(crate) address: Option<u64>,
}

/// What a file is, by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// It has the header that boot loaders of arm64 Linux know.
    Image,
    /// Anything else that could be code.
    Raw,
    /// A file for a loader that the monitor is not.
    Elf,
    /// QEMU unpacks it on the way: what arrives is not what lies here.
    Packed,
}

impl Payload {
    /// Reads `FILE[@ADDRESS]`; a file whose name has an `@` is found as it is.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        if !Path::new(text).is_file() {
            if let Some((file, address)) = text.rsplit_once('@') {
                let address = number(address)
                    .with_context(|| format!("{address:?} is no address: --payload FILE@0x50000000"))?;
                return Ok(Self { file: file.into(), address: Some(address) });
            }
        }
        Ok(Self { file: text.into(), address: None })
    }

    /// Fails, with the reason, for what the monitor would refuse or QEMU would change.
    fn check(&self, memory: u64) -> Result<()> {
        let name = self.file.display();
        let mut file = File::open(&self.file).with_context(|| format!("cannot open the payload {name}"))?;
        let size = file.metadata()?.len();
        let mut start = [0; 64];
        let known = file.read(&mut start)?;
        let kind = kind(&start[..known]);
        ensure!(size > 0, "the payload {name} is empty");
        let address = self.address.unwrap_or(ADDRESS);
        match kind {
            Kind::Elf => {
                bail!("the payload {name} is an ELF file: `objcopy -O binary` makes one that can be loaded")
            }
            Kind::Packed => bail!("the payload {name} is compressed: unpack it first"),
            Kind::Image => {
                ensure!(address % 0x20_0000 == 0, "{address:#x}: an arm64 Image needs a multiple of 2 MiB");
            }
            Kind::Raw => ensure!(address % 0x1000 == 0, "{address:#x}: a payload needs a multiple of 4 KiB"),
        }
        let end = DRAM + (memory << 20);
        ensure!(
            address >= FREE_MEMORY && address < end && size <= end - address,
            "{name}, {size} bytes at {address:#x}, is not within the machine's free memory \
             ({FREE_MEMORY:#x} to {end:#x}; --host-memory changes its size)"
        );
        Ok(())
    }
}

fn kind(start: &[u8]) -> Kind {
    if start.get(56..60) == Some(b"ARM\x64") {
        Kind::Image
    } else if start.starts_with(b"\x7fELF") {
        Kind::Elf
    } else if start.starts_with(&[0x1f, 0x8b]) || start.get(4..8) == Some(b"zimg") {
        Kind::Packed
    } else {
        Kind::Raw
    }
}

/// A number in hexadecimal with `0x`, or decimal.
fn number(text: &str) -> Result<u64> {
    Ok(match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16)?,
        None => text.parse()?,
    })
}

/// `realm lab --payload`.
pub(crate) fn run(args: &LabArgs, payload: &str) -> Result<u8> {
    let payload = Payload::parse(payload)?;
    let mut timeline = Timeline::new();
    let environment = setup::ensure(args.machine.qemu.as_deref(), false)?;
    let images = build::build(&environment, &["monitor", "rmm"])?;
    timeline.mark("build");
    let config = config(&environment, &images, &args.machine, &payload, args.semihosting)?;
    let job = Job {
        verbose: args.verbose,
        progress: args.verbose,
        ..job(&config, Duration::from_secs(args.timeout), super::patience(&args.machine))
    };
    let (outcome, _) = super::execute(&config, &job, &mut timeline)?;
    if args.timings {
        eprint!("{}", timeline.table());
    }
    Ok(outcome.status)
}

/// The machine with a payload: no initramfs, and a reset resets.
pub(crate) fn config(
    environment: &Environment,
    images: &Images,
    machine: &MachineArgs,
    payload: &Payload,
    semihosting: bool,
) -> Result<Config> {
    ensure!(
        !super::without_firmware(machine),
        "--payload needs a firmware: without one QEMU starts only Linux at EL2"
    );
    ensure!(
        machine.host.is_none() && machine.host_kernel.is_none(),
        "--payload takes the host kernel's place: there is no --host and no --host-kernel"
    );
    let memory = machine.host_memory.unwrap_or(MEMORY);
    payload.check(memory)?;
    let base = super::config(environment, images, machine, None, None, PathBuf::new())?;
    let address = payload
        .address
        .map(|address| ["-fw_cfg".to_owned(), format!("name={ADDRESS_ITEM},string={address:#x}")]);
    Ok(Config {
        kernel: payload.file.clone(),
        initrd: None,
        cmdline: machine.host_cmdline.clone().unwrap_or_default(),
        memory,
        accel: base.accel.or((base.cpus > 1).then(|| THREADS.to_owned())),
        semihosting,
        reboot: true,
        extra: address.into_iter().flatten().chain(base.extra).collect(),
        ..base
    })
}

/// A job that shows what the payload prints, until it ends the machine.
pub(crate) fn job(config: &Config, timeout: Duration, patience: f64) -> Job {
    Job {
        argv: None,
        io: Io::Uart,
        module: false,
        events: false,
        milestones: super::firmware_milestones(config),
        timeout: Some(timeout),
        patience,
        verbose: false,
        progress: false,
        capture: false,
        check: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_is_a_file_and_maybe_an_address() {
        let parsed = |text| Payload::parse(text).unwrap();
        assert_eq!(parsed("a.bin"), Payload { file: "a.bin".into(), address: None });
        assert_eq!(parsed("a.bin@0x50000000"), Payload { file: "a.bin".into(), address: Some(0x5000_0000) });
        assert_eq!(parsed("a@b@1342177280"), Payload { file: "a@b".into(), address: Some(0x5000_0000) });
        assert!(Payload::parse("a.bin@there").is_err());
    }

    #[test]
    fn files_are_known_by_their_first_bytes() {
        let mut image = [0; 64];
        image[56..60].copy_from_slice(b"ARM\x64");
        assert_eq!(kind(&image), Kind::Image);
        assert_eq!(kind(b"\x7fELF\x02"), Kind::Elf);
        assert_eq!(kind(&[0x1f, 0x8b, 8]), Kind::Packed);
        assert_eq!(kind(&[0x1f, 0x20, 3, 0xd5]), Kind::Raw);
    }

    #[test]
    fn a_payload_that_cannot_be_loaded_is_refused_with_the_reason() {
        let file = std::env::temp_dir().join(format!("realm-payload-{}", std::process::id()));
        std::fs::write(&file, [0x1f, 0x20, 0x03, 0xd5]).unwrap();
        let at = |address| Payload { file: file.clone(), address };
        let refused = |address, memory| format!("{:#}", at(Some(address)).check(memory).unwrap_err());
        at(None).check(1024).unwrap();
        at(Some(0x7FFF_F000)).check(1024).unwrap();
        assert!(refused(0x5000_0004, 1024).contains("4 KiB"));
        assert!(refused(0x4010_0000, 1024).contains("free memory"));
        assert!(refused(0x8000_0000, 1024).contains("free memory"));
        std::fs::write(&file, b"\x7fELF").unwrap();
        assert!(refused(0x5000_0000, 1024).contains("objcopy"));
        std::fs::remove_file(&file).unwrap();
    }
}
