//! Granules all over the machine's memory, up to its last one, however large it is.

use cca_abi::rmi::{Status, fid};

use crate::entry::smc;
use crate::{GRANULE, check, dtb, expect, is_gpf, line, probe_read, probe_write};

/// Start of DRAM, and of what the payload does not use.
const DRAM: u64 = 0x4000_0000;
const FREE: u64 = 0x6000_0000;
const GIB: u64 = 1 << 30;

/// Gives granules away and takes them back, wherever the device tree at `tree` says that memory is ours.
pub(crate) fn all(tree: u64) {
    let end = dtb::memory_end(tree);
    line(format_args!("memory ends at {end:#x}, {} GiB", (end - DRAM) >> 30));
    let gib = (DRAM / GIB + 1..=end / GIB).map(|n| n * GIB);
    let mut wrong = None;
    let mut count = 0;
    // On both sides of every boundary of a table of level 1, at the end, and in the middle of a block of 2 MiB.
    let places = gib.flat_map(|boundary| [boundary - GRANULE, boundary, boundary + 0x12_3000]);
    for pa in places.chain([end - GRANULE, FREE]).filter(|&pa| pa >= FREE && pa < end) {
        if dtb::is_reserved(tree, pa) || dtb::is_reserved(tree, pa ^ GRANULE) {
            continue;
        }
        count += 1;
        wrong = wrong.or(one(pa).err().map(|why| (pa, why)));
    }
    match wrong {
        None => check("granules-everywhere", Ok(())),
        Some((pa, (step, got))) => {
            check("granules-everywhere", Err(format_args!("{pa:#x}: {step} gave {got:#x}")));
        }
    }
    line(format_args!("{count} granules were delegated and returned"));
    expect(
        "beyond-memory-refused",
        smc(fid::GRANULE_DELEGATE, end, 0, 0)[0],
        Status::ErrorInput.to_register(),
    );
}

fn one(pa: u64) -> Result<(), (&'static str, u64)> {
    const PATTERN: u64 = 0x5A5A_0000_A5A5_0000;
    let good = |step, got| if got == 0 { Ok(()) } else { Err((step, got)) };
    probe_write(pa, PATTERN ^ pa).map_err(|esr| ("writing", esr))?;
    good("DELEGATE", smc(fid::GRANULE_DELEGATE, pa, 0, 0)[0])?;
    match probe_read(pa) {
        Err(esr) if is_gpf(esr) => {}
        Ok(value) => return Err(("reading", value)),
        Err(esr) => return Err(("reading", esr)),
    }
    // Its neighbour stays the host's.
    let neighbour = pa ^ GRANULE;
    probe_read(neighbour).map_err(|esr| ("reading its neighbour", esr))?;
    good("UNDELEGATE", smc(fid::GRANULE_UNDELEGATE, pa, 0, 0)[0])?;
    match probe_read(pa) {
        Ok(0) => Ok(()),
        Ok(value) => Err(("reading it again", value)),
        Err(esr) => Err(("reading it again", esr)),
    }
}
