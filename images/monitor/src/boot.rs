//! What the first CPU does once: load, describe, protect.

use monitor::attest::{Measured, Measurement};
use monitor::dtb::{Dtb, DtbError};
use monitor::enables::{IdRegs, pps_bits};
use monitor::gpt::{Geometry, Gpi, Gpt, Region};
use monitor::manifest::{self, Bank, CONSOLE_PL011, ConsoleInfo, MAX_BANKS, ManifestPage};
use monitor::options;
use monitor::{Config, Interface, MAX_CPUS, Monitor, Platform};

use sha2::{Digest, Sha256};

use crate::fatal::fatal;
use crate::fwcfg::{self, DmaError, Item};
use crate::hw::Machine;
use crate::{clean_to_poc, layout, pagetable, sysreg, uart};

const PAGE: u64 = 4096;
const ARM64_MAGIC: u32 = 0x644D_5241;

/// What the first CPU goes on with.
pub struct Boot {
    pub monitor: &'static Monitor,
    /// The kernel's entry and x0.
    pub kernel: (u64, u64),
    /// The RMM's entry.
    pub rmm: u64,
    pub interface: Interface,
}

/// Loads everything and turns granule protection on.
pub fn first_cpu(id: &IdRegs) -> Boot {
    uart::line(format_args!("stage reset cntpct={}", Machine.counter()));
    if !pagetable::in_order() {
        fatal(format_args!("the page tables are not where the image's linker script must put them"));
    }
    // SAFETY: QEMU left the tree there, 1 MiB of mapped memory that nobody else uses before the kernel runs.
    let bytes = unsafe {
        let start = core::ptr::with_exposed_provenance_mut(layout::DTB as usize);
        core::slice::from_raw_parts_mut(start, layout::DTB_SIZE as usize)
    };
    let mut dtb = described(Dtb::new(bytes));
    let mut banks = [Bank::default(); MAX_BANKS];
    let count = described(dtb.memory(&mut banks));
    let banks = banks.get(..count).unwrap_or_default();
    let cpus = described(dtb.cpu_count());
    let dram_end = banks.iter().find(|b| b.base == layout::DTB).map_or(0, |b| b.base + b.size);
    let dram = banks.iter().map(|bank| bank.size).sum();
    let reserve = layout::reserve(dram);
    // Loaded things lie between the carve-out and the reserve if that is above them.
    let room_end = if reserve.base > layout::KERNEL { dram_end.min(reserve.base) } else { dram_end };

    let interface = interface();
    let rmm = rmm_address();
    let measurement = load_rmm(rmm);
    let (kernel, initrd) = load_kernel(room_end);
    described(dtb.add_psci());
    described(dtb.reserve(b"rmm@40100000", layout::CARVE_OUT));
    described(dtb.reserve(b"rmm-reserve", reserve));
    if let Some(initrd) = initrd {
        described(dtb.set_initrd(initrd.base, initrd.base + initrd.size));
    }

    let (gpt, geometry) = tables(id, banks, reserve);
    let mut delegable = [Bank::default(); MAX_BANKS];
    let count = manifest::delegable(banks, &[layout::CARVE_OUT, reserve], gpt.limit(), &mut delegable);
    write_manifest(interface, delegable.get(..count).unwrap_or_default());
    clean_to_poc(layout::DTB, layout::DTB_SIZE);
    if gpt.limit() < banks.iter().map(|bank| bank.base + bank.size).max().unwrap_or(0) {
        uart::line(format_args!(
            "memory from {:#x} on stays the host's: no room for its tables",
            gpt.limit()
        ));
    }
    sysreg::enable_gpc(geometry.l0, id.pps());
    if cpus > MAX_CPUS {
        uart::line(format_args!("{cpus} CPUs, only {MAX_CPUS} of them can be used"));
    }
    let config = Config {
        cpus,
        shared_page: layout::SHARED_PAGE,
        carve_out: layout::CARVE_OUT,
        reserve,
        measured: Measured { monitor: measure_self(), rmm: measurement.unwrap_or_default() },
        rmm: measurement.is_some(),
        interface,
        id: *id,
    };
    let (major, minor) = interface.numbers();
    uart::line(format_args!("{} MiB, RMM at {rmm:#x}, interface {major}.{minor}", dram >> 20));
    Boot { monitor: place(Monitor::new(config, gpt)), kernel: (kernel, layout::DTB), rmm, interface }
}

/// Which version of the RMM-EL3 interface the user wants.
fn interface() -> Interface {
    const NAME: &str = "opt/kvm-realm/rmm-el3";
    let Some(item) = transferred("file directory", fwcfg::file(NAME.as_bytes())) else {
        return Interface::V2_0;
    };
    let text = transferred("interface version", item.start());
    match Interface::parse(&text) {
        Some(interface) => interface,
        None => fatal(format_args!("fw_cfg {NAME} is neither 2.0 nor 0.x nor one of 0.3 to 0.8")),
    }
}

/// Where the user wants the RMM: at the usual place, or somewhere else in its memory, which only an image that is
/// independent of its position survives.
fn rmm_address() -> u64 {
    const NAME: &str = "opt/kvm-realm/rmm-address";
    const LAST: u64 = layout::SHARED_PAGE - 0x100_0000;
    let Some(item) = transferred("file directory", fwcfg::file(NAME.as_bytes())) else {
        return layout::RMM;
    };
    let text = transferred("RMM's address", item.start());
    match options::address(&text) {
        Some(address) if address % 0x1_0000 == 0 && (layout::RMM..=LAST).contains(&address) => address,
        _ => {
            fatal(format_args!("fw_cfg {NAME} is no multiple of 64 KiB from {:#x} to {LAST:#x}", layout::RMM))
        }
    }
}

fn place(monitor: Monitor) -> &'static Monitor {
    static mut PLACE: core::mem::MaybeUninit<Monitor> = core::mem::MaybeUninit::uninit();
    // SAFETY: only the first CPU comes here, once; afterwards there are only shared references.
    unsafe {
        let place = &raw mut PLACE;
        (*place).write(monitor)
    }
}

fn described<T>(result: Result<T, DtbError>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => fatal(format_args!("device tree at {:#x}: {error:?}", layout::DTB)),
    }
}

fn transferred<T>(what: &str, result: Result<T, DmaError>) -> T {
    match result {
        Ok(value) => value,
        Err(DmaError) => fatal(format_args!("fw_cfg: reading the {what} failed")),
    }
}

/// Loads the RMM, if there is one, and measures it.
fn load_rmm(address: u64) -> Option<Measurement> {
    let Some(image) = transferred("file directory", fwcfg::file(b"opt/kvm-realm/rmm")) else {
        uart::line(format_args!("no RMM was given (fw_cfg opt/kvm-realm/rmm); every RMI call returns -1"));
        return None;
    };
    if image.size == 0 || u64::from(image.size) > layout::SHARED_PAGE - address {
        fatal(format_args!("the RMM's {} bytes do not fit its memory", image.size));
    }
    transferred("RMM", image.load(address));
    // SAFETY: the RMM's memory is mapped read-only, the device is done with it and the RMM does not run yet.
    let measurement = unsafe { measure(address, u64::from(image.size)) };
    uart::line(format_args!("stage rmm-load cntpct={}", Machine.counter()));
    Some(measurement)
}

/// SHA-256 of mapped memory.
///
/// # Safety
/// Nobody writes there meanwhile.
unsafe fn measure(base: u64, size: u64) -> Measurement {
    // SAFETY: the caller's promise.
    let bytes = unsafe {
        core::slice::from_raw_parts(core::ptr::with_exposed_provenance::<u8>(base as usize), size as usize)
    };
    Sha256::digest(bytes).into()
}

/// The monitor's own code and constants.
fn measure_self() -> Measurement {
    unsafe extern "C" {
        static __text_start: u8;
        static __text_end: u8;
        static __rodata_start: u8;
        static __rodata_end: u8;
    }
    let range = |start: *const u8, end: *const u8| {
        // SAFETY: the linker script's limits of what is mapped and never written.
        unsafe { core::slice::from_raw_parts(start, end.addr() - start.addr()) }
    };
    let text = range(&raw const __text_start, &raw const __text_end);
    let rodata = range(&raw const __rodata_start, &raw const __rodata_end);
    Sha256::new().chain_update(text).chain_update(rodata).finalize().into()
}

/// Where the kernel goes.
fn kernel_address() -> u64 {
    let Some(item) = transferred("file directory", fwcfg::file(b"opt/kvm-realm/kernel-address")) else {
        return layout::KERNEL;
    };
    let text = transferred("kernel's address", item.start());
    match options::address(&text) {
        // What comes behind the carve-out is the reserve, unless that lies elsewhere.
        Some(address) if address % PAGE == 0 && address >= layout::KERNEL => address,
        _ => fatal(format_args!("fw_cfg opt/kvm-realm/kernel-address is no address for a kernel")),
    }
}

/// Loads kernel and initial RAM disk; returns the kernel's entry and the disk's range. What has no arm64 header is a
/// program that begins with its first byte.
fn load_kernel(dram_end: u64) -> (u64, Option<Bank>) {
    let kernel = transferred("kernel's size", fwcfg::kernel());
    let base = kernel_address();
    let room = dram_end.saturating_sub(base);
    if kernel.size == 0 || u64::from(kernel.size) > room {
        fatal(format_args!("no kernel (-kernel), or one of {} bytes that does not fit", kernel.size));
    }
    let header = transferred("kernel's header", kernel.start());
    let word = |at: usize| header[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let (text_offset, image_size) =
        if word(56) & 0xFFFF_FFFF == u64::from(ARM64_MAGIC) { (word(8), word(16)) } else { (0, 0) };
    let size = image_size.max(u64::from(kernel.size));
    if text_offset >= 0x20_0000 || size > room.saturating_sub(text_offset) {
        fatal(format_args!("the kernel's header asks for {size:#x} bytes at offset {text_offset:#x}"));
    }
    let start = base + text_offset;
    transferred("kernel", kernel.load(start));
    (start, load_initrd(start + size, dram_end))
}

fn load_initrd(after: u64, dram_end: u64) -> Option<Bank> {
    let initrd: Item = transferred("initrd's size", fwcfg::initrd());
    if initrd.size == 0 {
        return None;
    }
    let base = (after + PAGE - 1) & !(PAGE - 1);
    let size = u64::from(initrd.size);
    if base + size > dram_end {
        fatal(format_args!("the initrd's {size} bytes do not fit behind the kernel"));
    }
    transferred("initrd", initrd.load(base));
    Some(Bank { base, size })
}

fn write_manifest(interface: Interface, banks: &[Bank]) {
    let console = ConsoleInfo {
        base: layout::UART0,
        map_pages: 1,
        name: CONSOLE_PL011,
        clk_in_hz: 1,
        baud_rate: 115_200,
        flags: 0,
    };
    let manifest = ManifestPage::new(interface.manifest_version(), layout::SHARED_PAGE, banks, console);
    for offset in (0..PAGE as usize).step_by(64) {
        Machine.shared_page_write(offset, &[0; 64]);
    }
    for (offset, bytes) in manifest.pieces() {
        Machine.shared_page_write(offset, bytes);
    }
    clean_to_poc(layout::SHARED_PAGE, PAGE);
}

fn tables(id: &IdRegs, banks: &[Bank], reserve: Bank) -> (Gpt, Geometry) {
    let geometry = Geometry {
        l0: layout::GPT,
        l1_pool: layout::GPT_L1_POOL,
        l1_pool_size: layout::SECURE_RAM + layout::SECURE_RAM_SIZE - layout::GPT_L1_POOL,
        pps_bits: pps_bits(id.pps()),
        l0_bits: sysreg::l0_bits(),
    };
    let region = |base, size, gpi| Region { base, size, gpi };
    let mut regions = [region(0, 0, Gpi::Any); MAX_BANKS + 3];
    for (slot, bank) in regions.iter_mut().zip(banks) {
        *slot = region(bank.base, bank.size, Gpi::NonSecure);
    }
    regions[MAX_BANKS] = region(layout::CARVE_OUT.base, layout::CARVE_OUT.size, Gpi::Realm);
    regions[MAX_BANKS + 1] = region(reserve.base, reserve.size, Gpi::Realm);
    regions[MAX_BANKS + 2] = region(layout::SECURE_RAM, layout::SECURE_RAM_SIZE, Gpi::Root);
    let gpt = match Gpt::build(&Machine, geometry, &regions) {
        Ok(gpt) => gpt,
        Err(error) => fatal(format_args!("granule protection tables: {error:?}")),
    };
    clean_to_poc(layout::GPT, gpt.l1_end() - layout::GPT);
    (gpt, geometry)
}
