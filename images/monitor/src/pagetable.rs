//! EL3's own translation tables: constants, identity, writable xor executable, stacks with guard pages.
//!
//! NSE (bit 11) and NS (bit 5) of a descriptor choose the physical address space that an access is made in;
//! with granule protection on, an access in the wrong one faults. Devices are open to everybody (GPI Any), so
//! EL3 uses them as Root.

use crate::{context, layout};

const VALID_BLOCK: u64 = 0b01;
const VALID_TABLE_OR_PAGE: u64 = 0b11;
/// Access flag, and AP[1], which is RES1 at EL3.
const ACCESSED: u64 = 1 << 10 | 1 << 6;
const INNER_SHAREABLE: u64 = 0b11 << 8;
const DEVICE: u64 = 0 << 2;
const NORMAL: u64 = 1 << 2;
const READ_ONLY: u64 = 1 << 7;
const EXECUTE_NEVER: u64 = 1 << 54;
const NS: u64 = 1 << 5;
const NSE: u64 = 1 << 11;

const ROOT: u64 = NSE;
const NON_SECURE: u64 = NS;
const REALM: u64 = NSE | NS;

const BLOCK_SIZE: u64 = 0x20_0000;
const PAGE_SIZE: u64 = 0x1000;

/// Attribute 0: Device-nGnRE; 1: Normal, write-back.
pub const MAIR_EL3: u64 = 0xFF04;
/// 39 bits of virtual addresses, 4 KiB granule, write-back inner-shareable walks, RES1 bits 31 and 23.
pub const TCR_EL3: u64 = 25 | 0b01 << 8 | 0b01 << 10 | 0b11 << 12 | 1 << 23 | 1 << 31;
/// RES1 bits and the instruction cache.
pub const SCTLR_EL3_OFF: u64 = 0x30C5_0830 | 1 << 12;
/// Translation, data cache, alignment check of SP; writable memory is never executable.
pub const SCTLR_EL3_ON: u64 = SCTLR_EL3_OFF | 1 << 0 | 1 << 2 | 1 << 3 | 1 << 19;

/// A table of 512 descriptors.
#[repr(C, align(4096))]
pub struct Table([u64; 512]);

// Tables point to tables in this same image, whose addresses are no constants for the compiler. They are
// constants for the linker script: the tables come first in `.rodata`, in this order.
const TABLES: u64 = layout::RODATA;

#[unsafe(no_mangle)]
#[unsafe(link_section = ".rodata.tables.0")]
static L1_TABLE: Table = Table(level1());
#[unsafe(no_mangle)]
#[unsafe(link_section = ".rodata.tables.1")]
static L2_LOW: Table = Table(level2_low());
#[unsafe(no_mangle)]
#[unsafe(link_section = ".rodata.tables.2")]
static L2_DRAM: Table = Table(level2_dram());
#[unsafe(no_mangle)]
#[unsafe(link_section = ".rodata.tables.3")]
static L3_IMAGE: Table = Table(level3_image());
#[unsafe(no_mangle)]
#[unsafe(link_section = ".rodata.tables.4")]
static L3_CPUS: Table = Table(level3_cpus());

/// Checks that the linker kept the order.
pub fn in_order() -> bool {
    let tables = [&L1_TABLE, &L2_LOW, &L2_DRAM, &L3_IMAGE, &L3_CPUS];
    (0..).zip(tables).all(|(i, table)| core::ptr::from_ref(table).addr() as u64 == place(i))
}

const fn place(table: u64) -> u64 {
    TABLES + table * PAGE_SIZE
}

const fn level1() -> [u64; 512] {
    let mut t = [0; 512];
    t[0] = place(1) | VALID_TABLE_OR_PAGE;
    t[1] = place(2) | VALID_TABLE_OR_PAGE;
    t
}

const MEMORY: u64 = ACCESSED | NORMAL | INNER_SHAREABLE;

/// Devices and secure RAM. Flash is not mapped any more: a stray write would put it into command mode.
const fn level2_low() -> [u64; 512] {
    let mut t = [0; 512];
    let device = VALID_BLOCK | ACCESSED | DEVICE | ROOT | EXECUTE_NEVER;
    let mut i = 0;
    while i < 512 {
        let pa = i as u64 * BLOCK_SIZE;
        t[i] = if pa >= 0x0800_0000 && pa < 0x0A00_0000 {
            pa | device
        } else if pa == layout::SECURE_RAM {
            place(3) | VALID_TABLE_OR_PAGE
        } else if pa == layout::CPUS {
            place(4) | VALID_TABLE_OR_PAGE
        } else if pa >= layout::GPT && pa < layout::SECURE_RAM + layout::SECURE_RAM_SIZE {
            pa | VALID_BLOCK | MEMORY | ROOT | EXECUTE_NEVER
        } else {
            0
        };
        i += 1;
    }
    t
}

/// Code, constants, data.
const fn level3_image() -> [u64; 512] {
    let mut t = [0; 512];
    let mut i = 0;
    while i < 512 {
        let pa = layout::SECURE_RAM + i as u64 * PAGE_SIZE;
        let access = if pa < layout::RODATA {
            READ_ONLY
        } else if pa < layout::DATA {
            READ_ONLY | EXECUTE_NEVER
        } else {
            EXECUTE_NEVER
        };
        t[i] = pa | VALID_TABLE_OR_PAGE | MEMORY | ROOT | access;
        i += 1;
    }
    t
}

/// The CPUs' blocks, without their guard pages.
const fn level3_cpus() -> [u64; 512] {
    let mut t = [0; 512];
    let mut i = 0;
    while i < 512 {
        let at = i * PAGE_SIZE as usize;
        let in_block = at % context::CPU_BLOCK_SIZE;
        let [a, b, c] = context::GUARDS;
        if in_block != a && in_block != b && in_block != c {
            t[i] = (layout::CPUS + at as u64) | VALID_TABLE_OR_PAGE | MEMORY | ROOT | EXECUTE_NEVER;
        }
        i += 1;
    }
    t
}

/// The start of DRAM: device tree, RMM image, shared page.
const fn level2_dram() -> [u64; 512] {
    let mut t = [0; 512];
    let ns = VALID_BLOCK | ACCESSED | NORMAL | INNER_SHAREABLE | NON_SECURE | EXECUTE_NEVER;
    t[0] = layout::DTB | ns;
    // The rest of the RMM's image is only read, to measure it; its first megabyte lies beside the device tree.
    // After that the Realm mapping is never used again.
    let realm = VALID_BLOCK | ACCESSED | NORMAL | INNER_SHAREABLE | REALM | READ_ONLY | EXECUTE_NEVER;
    let mut i = 1;
    while i < index(layout::SHARED_PAGE, 21) {
        t[i] = (layout::DTB + i as u64 * BLOCK_SIZE) | realm;
        i += 1;
    }
    // The 2 MiB of the shared page are all Realm memory; `hw` writes nothing of them but that page.
    let shared = index(layout::SHARED_PAGE, 21);
    t[shared] = (layout::DTB + shared as u64 * BLOCK_SIZE) | (realm & !READ_ONLY);
    t
}

const fn index(pa: u64, shift: u32) -> usize {
    (pa >> shift & 0x1FF) as usize
}
