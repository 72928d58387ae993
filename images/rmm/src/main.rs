//! The RMM image: what the portable core needs of a machine, at Realm EL2.
//!
//! Boot: `entry` (cold or warm) → [`rmm_cold_start`] (manifest, page tables, per-CPU slots) → [`run_primary`]
//! (core, BOOT_COMPLETE) → [`serve`]. Every other CPU: `entry` → [`rmm_warm_start`] → [`serve`].
#![no_std]
#![no_main]

#[macro_use]
mod regs;

mod attestation;
mod console;
mod debug;
mod el3;
mod entry;
mod fatal;
mod fp;
mod gic;
mod hash;
mod layout;
mod memory;
mod mmu;
mod percpu;
mod platform;
mod pmu;
mod vectors;
mod world;

use cca_abi::rmm_el3::{BootStatus, MemoryBank, version_major, version_minor};
use core::cell::UnsafeCell;
use core::sync::atomic::AtomicU16;
use layout::{Bump, CARVE_OUT_SIZE, MAX_CPUS, NS_ALIAS, SLOT_SIZE, STACK_SIZE};
use mmu::{NoMemory, Tables};
use platform::Machine;
use rmm::{DramBank, Rmm};
use rmm_boot::manifest;

/// What the first half of a cold boot leaves for the second.
struct Boot {
    cpu: u64,
    cpus: u64,
    banks: [MemoryBank; manifest::MAX_BANKS],
    num_banks: usize,
    metadata: u64,
    metadata_len: usize,
    console: u64,
    shared: u64,
    version: u64,
}

/// A value that the primary writes during its boot and everybody reads afterwards.
struct BootCell<T>(UnsafeCell<Option<T>>);
// SAFETY: written by the primary before any other CPU enters the image; `T` is shared afterwards.
unsafe impl<T: Sync> Sync for BootCell<T> {}

static BOOT: BootCell<Boot> = BootCell(UnsafeCell::new(None));
static RMM: BootCell<Rmm<'static, Machine>> = BootCell(UnsafeCell::new(None));

/// The primary's cold boot, on the boot table and the boot stack.
#[unsafe(no_mangle)]
extern "C" fn rmm_cold_start(cpu: u64, version: u64, cpus: u64, shared: u64, _token: u64) -> ! {
    match prepare(cpu, version, cpus, shared) {
        Ok((stack, state)) => {
            let (ttbr, tcr, sctlr) = (state.ttbr, state.tcr, state.sctlr);
            // SAFETY: the primary is alone; the tables map everything that `run_primary` needs, and `stack` is
            // the top of this CPU's stack in them.
            unsafe {
                entry::publish(state);
                entry::rmm_switch_tables(ttbr, tcr, sctlr, stack, run_primary, cpu)
            }
        }
        Err(status) => {
            el3::boot_complete(status, 0);
            fatal::park()
        }
    }
}

/// Checks EL3's words and builds everything that outlives the boot.
fn prepare(cpu: u64, version: u64, cpus: u64, shared: u64) -> Result<(u64, entry::BootState), BootStatus> {
    // Family 0.x before 0.2 does not switch the pointer authentication keys, which a REC would leak then.
    let known = match version_major(version) {
        0 => version_minor(version) >= 2,
        2 => true,
        _ => false,
    };
    if !known || version >> 31 != 0 {
        return Err(BootStatus::VersionNotValid);
    }
    if cpus == 0 || cpus > MAX_CPUS {
        return Err(BootStatus::CpusOutOfRange);
    }
    if cpu >= cpus {
        return Err(BootStatus::CpuIdOutOfRange);
    }
    // The entry code has mapped it if it is below 512 GiB.
    if shared == 0 || shared & 0xFFF != 0 || shared >> 39 != 0 {
        return Err(BootStatus::InvalidSharedBuffer);
    }
    let mmfr0 = read_reg!("id_aa64mmfr0_el1");
    // SAFETY: EL3 gave this page to us for reading the manifest; nobody writes it while we boot.
    let page = unsafe { &*(shared as *const [u8; 4096]) };
    let machine = manifest::parse(page, shared, mmu::pa_limit(mmfr0))?;

    let image = layout::image();
    let mut end = image.start + CARVE_OUT_SIZE;
    if shared > image.start && shared < end {
        end = shared;
    }
    let no_memory = |_: NoMemory| BootStatus::NoMemory;
    let mut memory = Bump::new(image.end, end);
    let mut tables = Tables::new(&mut memory).map_err(no_memory)?;

    // Slots are aligned to their size; the pages between data and stack stay unmapped.
    let slots = tables.memory().take(cpus * SLOT_SIZE, SLOT_SIZE).ok_or(BootStatus::NoMemory)?;
    for at in (slots..slots + cpus * SLOT_SIZE).step_by(0x1_0000) {
        // SAFETY: just taken.
        unsafe { core::ptr::write_bytes(at as *mut u64, 0, percpu::DATA_SIZE as usize / 8) };
        tables.map(at, at, percpu::DATA_SIZE, mmu::DATA).map_err(no_memory)?;
        let stack = at + SLOT_SIZE - STACK_SIZE;
        tables.map(stack, stack, STACK_SIZE, mmu::DATA).map_err(no_memory)?;
    }

    let banks = &machine.banks[..machine.num_banks];
    let mut granules: u64 = 0;
    for bank in banks {
        granules += bank.size / 4096;
    }
    // Two bytes a granule. On a large machine that is more than the RMM has of its own; EL3 may have more.
    let metadata_size = (granules * 2 + 4095) & !4095;
    let mut reserved = (0, 0);
    const FOR_TABLES: u64 = 1 << 20;
    let fits = tables.memory().room() >= metadata_size + FOR_TABLES;
    let own_memory = if fits { tables.memory().take(metadata_size, 4096) } else { None };
    let metadata = match own_memory {
        Some(own) => own,
        None => {
            let pa = el3::reserve(metadata_size).ok_or(BootStatus::NoMemory)?;
            // The boot table maps only the gigabytes that the entry code knew.
            let mapped = |pa: u64| [image.start, end, shared].iter().any(|known| known >> 30 == pa >> 30);
            if !mapped(pa) || !mapped(pa + metadata_size - 1) || metadata_size > 1 << 30 {
                return Err(BootStatus::NoMemory);
            }
            reserved = (pa, pa + metadata_size);
            pa
        }
    };
    // SAFETY: just taken.
    unsafe { core::ptr::write_bytes(metadata as *mut u16, 0, granules as usize) };
    tables.map(metadata, metadata, metadata_size, mmu::DATA).map_err(no_memory)?;

    tables.map(image.start, image.start, image.text_end - image.start, mmu::TEXT).map_err(no_memory)?;
    let constants = image.rodata_end - image.text_end;
    tables.map(image.text_end, image.text_end, constants, mmu::CONSTANTS).map_err(no_memory)?;
    tables
        .map(image.rodata_end, image.rodata_end, image.end - image.rodata_end, mmu::DATA)
        .map_err(no_memory)?;
    tables.map(shared, shared, 4096, mmu::DATA).map_err(no_memory)?;
    if machine.console != 0 {
        tables.map(machine.console, machine.console, 4096, mmu::DEVICE).map_err(no_memory)?;
    }
    let own = (image.start, end);
    for bank in banks {
        map_bank(&mut tables, bank, [own, (shared, shared + 4096), reserved]).map_err(no_memory)?;
    }

    let state = entry::BootState {
        ready: 1,
        ttbr: tables.root(),
        tcr: mmu::tcr(mmfr0),
        mair: mmu::MAIR,
        sctlr: mmu::SCTLR,
        slots,
        cpus,
    };
    let boot = Boot {
        cpu,
        cpus,
        banks: machine.banks,
        num_banks: machine.num_banks,
        metadata,
        metadata_len: granules as usize,
        console: machine.console,
        shared,
        version,
    };
    // SAFETY: the primary is alone.
    unsafe { *BOOT.0.get() = Some(boot) };
    Ok((slots + (cpu + 1) * SLOT_SIZE, state))
}

/// Maps both views of a bank, without the RMM's own memory and EL3's shared page: an EL3 that counts them as DRAM
/// must not make us see our own text writable.
fn map_bank(tables: &mut Tables<'_>, bank: &MemoryBank, mut holes: [(u64, u64); 3]) -> Result<(), NoMemory> {
    holes.sort_unstable();
    let (mut at, end) = (bank.base, bank.base + bank.size);
    for (from, to) in holes {
        let stop = from.clamp(at, end);
        map_views(tables, at, stop)?;
        at = to.clamp(at, end);
    }
    map_views(tables, at, end)
}

fn map_views(tables: &mut Tables<'_>, from: u64, to: u64) -> Result<(), NoMemory> {
    if from < to {
        tables.map(from, from, to - from, mmu::DATA)?;
        tables.map(from + NS_ALIAS, from, to - from, mmu::NS_DATA)?;
    }
    Ok(())
}

/// The rest of the primary's boot, on the final tables and its own stack.
extern "C" fn run_primary(cpu: u64) -> ! {
    percpu::init(cpu);
    world::init_features();
    gic::init();
    world::init_cpu();
    // SAFETY: the primary is alone, `prepare` has written it.
    let Some(boot) = (unsafe { (*BOOT.0.get()).take() }) else { fatal::park() };
    console::set(boot.console);
    let mut banks = [DramBank { base: 0, size: 0 }; manifest::MAX_BANKS];
    for (to, from) in banks.iter_mut().zip(&boot.banks) {
        *to = DramBank { base: from.base, size: from.size };
    }
    // SAFETY: zeroed memory that `prepare` set aside for this and mapped.
    let metadata =
        unsafe { core::slice::from_raw_parts(boot.metadata as *const AtomicU16, boot.metadata_len) };
    let machine = Machine::new(boot.cpus as usize);
    match Rmm::new(machine, &banks[..boot.num_banks], metadata) {
        Ok(mut rmm) => {
            // SAFETY: the primary is alone, and `prepare` has mapped the page.
            match unsafe { attestation::fetch(boot.shared, boot.version) } {
                Ok(attestation) => rmm.set_attestation(attestation),
                Err(error) => console::line(format_args!("no attestation: {error}")),
            }
            // SAFETY: the primary is alone.
            unsafe { *RMM.0.get() = Some(rmm) };
        }
        Err(error) => {
            console::line(format_args!("cannot start: {error:?}"));
            el3::boot_complete(BootStatus::ManifestDataError, 0);
            fatal::park()
        }
    }
    let mut megabytes: u64 = 0;
    for bank in &boot.banks[..boot.num_banks] {
        megabytes += bank.size >> 20;
    }
    console::line(format_args!(
        "ready on CPU {}: {megabytes} MiB in {} bank(s), {} CPUs at most",
        boot.cpu, boot.num_banks, boot.cpus
    ));
    serve(cpu)
}

/// Every other CPU, and any CPU that was off.
#[unsafe(no_mangle)]
extern "C" fn rmm_warm_start(cpu: u64, _token: u64) -> ! {
    percpu::init(cpu);
    world::init_cpu();
    serve(cpu)
}

/// Answers RMI commands for ever.
fn serve(cpu: u64) -> ! {
    // SAFETY: written before BOOT_COMPLETE of the primary, never changed.
    let Some(rmm) = (unsafe { (*RMM.0.get()).as_ref() }) else { fatal::park() };
    // The token is the CPU's own slot: never zero, which would mean "not booted".
    let mut registers = el3::boot_complete(BootStatus::Success, read_reg!("tpidr_el2"));
    let index = cpu as usize;
    loop {
        rmm.handle_rmi(index, &mut registers);
        el3::request_complete(&mut registers);
    }
}
