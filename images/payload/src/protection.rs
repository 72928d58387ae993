//! Every way to run into a delegated granule, from EL2 and from EL1: which exception, with which status, and that
//! nothing of the granule's translation outlives its return.
//!
//! Except walks that meet one at level 2 or 3: QEMU (10.0 to 11.1 at least) takes the walk's level for one of the protection
//! table's, which has only 0 and 1, and stops itself on an assertion.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU64, Ordering};

use cca_abi::rmi::fid;

use crate::entry::smc;
use crate::{EXPECT, FAULT, GRANULE, RESUME, check, pool, probe_read, probe_write};

global_asm!(
    r#"
// Runs at EL1: a load, a store or a fetch at x0; comes back by an exception or a call. x1: what; gives ESR_EL1.
.global el1_access
el1_access:
    stp     x29, x30, [sp, #-16]!
    adr     x3, 9f
    ldr     x4, ={RESUME}
    str     x3, [x4]
    adr     x3, 1f
    msr     elr_el2, x3
    mov     x3, #0x3c5
    msr     spsr_el2, x3
    mov     x2, #0
    isb
    eret
1:  cbz     x1, 2f
    cmp     x1, #1
    b.eq    3f
    br      x0
2:  ldr     x3, [x0]
    hvc     #0
3:  str     x3, [x0]
    hvc     #0
9:  mov     x0, x2
    ldp     x29, x30, [sp], #16
    ret

.balign 2048
.global el1_vectors
el1_vectors:
.rept 16
    .balign 128
    mrs     x2, esr_el1
    hvc     #0
.endr

// A fetch at x0 from EL2, which comes back by its fault.
.global el2_fetch
el2_fetch:
    stp     x29, x30, [sp, #-16]!
    adr     x3, 1f
    ldr     x4, ={RESUME}
    str     x3, [x4]
    br      x0
1:  ldp     x29, x30, [sp], #16
    ret
"#,
    RESUME = sym RESUME,
);

unsafe extern "C" {
    fn el1_access(address: u64, what: u64) -> u64;
    fn el2_fetch(address: u64);
    static el1_vectors: u8;
}

const LOAD: u64 = 0;
const STORE: u64 = 1;
const FETCH: u64 = 2;

/// The granule that is given away, and tables: for each stage one of every level.
const DELEGATED: u64 = 760;
const TABLES: u64 = 761;

/// Addresses that the tables give to the delegated granule in one role each: as a table of level 1, and as a page.
const AS_LEVEL_1: u64 = 1 << 39;
const PAGE: u64 = 2 << 30;

/// Exception classes: of EL1, from EL1 to EL2, of EL2 itself.
const INSTRUCTION_FROM_BELOW: u64 = 0x20;
const INSTRUCTION: u64 = 0x21;
const DATA_FROM_BELOW: u64 = 0x24;
const DATA: u64 = 0x25;

const PROTECTION: u64 = 0x28;
/// Granule protection fault on a walk, at level 0; higher levels follow.
const ON_WALK: u64 = 0x24;
/// Translation fault at level 0.
const TRANSLATION: u64 = 0x04;
const WRITE: u64 = 1 << 6;

const HCR_RW: u64 = 1 << 31;
const HCR_VM: u64 = 1;
const HCR_GPF: u64 = 1 << 48;

/// The last EL1 exception's ESR; not zero means that EL1 took it.
static TAKEN_AT_EL1: AtomicU64 = AtomicU64::new(0);

fn put(page: u64, index: u64, value: u64) {
    let _ = probe_write(pool(page) + index * 8, value);
}

/// Identity for the first two GiB, then the roles. `device` and `memory` are attributes of blocks and pages.
fn build(first: u64, device: u64, memory: u64) -> u64 {
    for page in first..first + 4 {
        for index in 0..512 {
            put(page, index, 0);
        }
    }
    let table = |page: u64| pool(page) | 3;
    put(first, 0, table(first + 1));
    put(first, AS_LEVEL_1 >> 39, table(DELEGATED));
    put(first + 1, 0, device | 1);
    put(first + 1, 1, 1 << 30 | memory | 1);
    put(first + 1, PAGE >> 30, table(first + 2));
    put(first + 2, 0, table(first + 3));
    put(first + 3, 0, pool(DELEGATED) | memory | 3);
    put(first + 3, 1, pool(DELEGATED - 1) | memory | 3);
    pool(first)
}

fn expect_fault(name: &str, got: u64, class: u64, status: u64) {
    let bits = if class == DATA || class == DATA_FROM_BELOW { 0x3F | WRITE } else { 0x3F };
    if got >> 26 & 0x3F == class && got & bits == status {
        check(name, Ok(()));
    } else {
        check(name, Err(format_args!("ESR {got:#x}, expected class {class:#x} and status {status:#x}")));
    }
}

fn read_fault(address: u64) -> u64 {
    probe_read(address).err().unwrap_or(0)
}

fn write_fault(address: u64) -> u64 {
    probe_write(address, 1).err().unwrap_or(0)
}

/// A fetch from EL2.
fn fetch_fault(address: u64) -> u64 {
    FAULT.store(0, Ordering::Relaxed);
    EXPECT.store(true, Ordering::Relaxed);
    // SAFETY: the fault comes back.
    unsafe { el2_fetch(address) };
    EXPECT.store(false, Ordering::Relaxed);
    FAULT.load(Ordering::Relaxed)
}

/// An access from EL1: the ESR of whoever took the exception, EL1 before EL2; 0 if it worked.
fn from_el1(what: u64, address: u64) -> u64 {
    FAULT.store(0, Ordering::Relaxed);
    EXPECT.store(true, Ordering::Relaxed);
    // SAFETY: runs a few instructions at EL1, which come back.
    let at_el1 = unsafe { el1_access(address, what) };
    EXPECT.store(false, Ordering::Relaxed);
    TAKEN_AT_EL1.store(at_el1, Ordering::Relaxed);
    let at_el2 = FAULT.load(Ordering::Relaxed);
    // A call is how EL1 comes back after all went well, or after it took an exception itself.
    match (at_el1, at_el2 >> 26) {
        (0, 0x16) => 0,
        (0, _) => at_el2,
        _ => at_el1,
    }
}

/// Everything: with translation off at EL2, with translation on there, at EL1, and with a second stage below.
pub(crate) fn all() {
    let delegated = pool(DELEGATED);
    // A branch back to where the fetch came from, if it were allowed: `ret`.
    let _ = probe_write(delegated, 0xD65F_03C0);
    let status = smc(fid::GRANULE_DELEGATE, delegated, 0, 0)[0];
    if status != 0 {
        check("faults", Err(format_args!("delegate gave {status:#x}")));
        return;
    }
    expect_fault("el2-read-faults", read_fault(delegated), DATA, PROTECTION);
    expect_fault("el2-write-faults", write_fault(delegated + GRANULE - 8), DATA, PROTECTION | WRITE);
    expect_fault("el2-fetch-faults", fetch_fault(delegated), INSTRUCTION, PROTECTION);
    // Attributes: access flag, inner shareable; stage 1: index 0 or 1, EL2's AP is RES1 in bit 6.
    const STAGE_1_DEVICE: u64 = 1 << 10;
    const STAGE_1_MEMORY: u64 = 1 << 10 | 3 << 8 | 1 << 2;
    let stage1 = build(TABLES, STAGE_1_DEVICE, STAGE_1_MEMORY);
    // Second stage: readable, writable, device or write-back.
    let stage2 = build(TABLES + 4, 1 << 10 | 3 << 6, 1 << 10 | 3 << 8 | 3 << 6 | 0xF << 2);
    at_el2(stage1);
    at_el1(stage1);
    below_stage_2(stage2);
    let status = smc(fid::GRANULE_UNDELEGATE, delegated, 0, 0)[0];
    if status != 0 {
        check("faults", Err(format_args!("undelegate gave {status:#x}")));
    }
    // An empty table now, whose walk is not remembered as anything else.
    with_el2_translation(stage1, || {
        expect_fault("undelegated-table-is-empty", read_fault(AS_LEVEL_1), DATA, TRANSLATION + 1);
        expect_fault("undelegated-page-is-readable", read_fault(PAGE), 0, 0);
    });
}

fn with_el2_translation(table: u64, work: impl FnOnce()) {
    let (old_sctlr, old_tcr, old_ttbr, old_mair): (u64, u64, u64, u64);
    // 48 bits of address, 4 KiB, write-back, 40 bits of output; RES1 bits.
    let tcr: u64 = 1 << 31 | 1 << 23 | 2 << 16 | 3 << 12 | 1 << 10 | 1 << 8 | 16;
    // SAFETY: the tables map this program where it is.
    unsafe {
        asm!(
            "mrs {old_sctlr}, sctlr_el2", "mrs {old_tcr}, tcr_el2", "mrs {old_ttbr}, ttbr0_el2",
            "mrs {old_mair}, mair_el2",
            "msr tcr_el2, {tcr}", "msr ttbr0_el2, {table}", "msr mair_el2, {mair}",
            "dsb sy", "isb", "tlbi alle2", "dsb sy", "isb",
            "orr {tmp}, {old_sctlr}, #1", "msr sctlr_el2, {tmp}", "isb",
            old_sctlr = out(reg) old_sctlr, old_tcr = out(reg) old_tcr, old_ttbr = out(reg) old_ttbr,
            old_mair = out(reg) old_mair, tcr = in(reg) tcr, table = in(reg) table, mair = in(reg) 0xFF00_u64,
            tmp = out(reg) _,
        );
    }
    work();
    // SAFETY: as it was.
    unsafe {
        asm!(
            "msr sctlr_el2, {0}", "isb", "tlbi alle2", "dsb sy", "isb",
            "msr tcr_el2, {1}", "msr ttbr0_el2, {2}", "msr mair_el2, {3}", "isb",
            in(reg) old_sctlr, in(reg) old_tcr, in(reg) old_ttbr, in(reg) old_mair,
        );
    }
}

fn at_el2(table: u64) {
    with_el2_translation(table, || {
        expect_fault("el2-walk-faults", read_fault(AS_LEVEL_1), DATA, ON_WALK + 1);
        expect_fault("el2-walk-for-a-write-faults", write_fault(AS_LEVEL_1), DATA, (ON_WALK + 1) | WRITE);
        expect_fault("el2-walk-for-a-fetch-faults", fetch_fault(AS_LEVEL_1), INSTRUCTION, ON_WALK + 1);
        expect_fault("el2-translated-read-faults", read_fault(PAGE), DATA, PROTECTION);
        expect_fault("el2-translated-write-faults", write_fault(PAGE), DATA, PROTECTION | WRITE);
        expect_fault("el2-translated-fetch-faults", fetch_fault(PAGE), INSTRUCTION, PROTECTION);
        expect_fault("el2-neighbour-is-readable", read_fault(PAGE + GRANULE), 0, 0);
    });
}

/// Sets EL1 up to run with or without tables of its own; gives what HCR_EL2 was.
fn set_el1(hcr: u64, table: Option<u64>) {
    const SCTLR_RES1: u64 = 0x30D0_0800;
    let tcr: u64 = 2 << 32 | 1 << 23 | 3 << 12 | 1 << 10 | 1 << 8 | 16;
    let sctlr = SCTLR_RES1 | u64::from(table.is_some());
    // SAFETY: nothing runs at EL1 but what this file starts.
    unsafe {
        asm!(
            "msr hcr_el2, {hcr}", "msr tcr_el1, {tcr}", "msr ttbr0_el1, {table}", "msr mair_el1, {mair}",
            "msr vbar_el1, {vectors}", "msr sctlr_el1, {sctlr}",
            "dsb sy", "isb", "tlbi alle1", "dsb sy", "isb",
            hcr = in(reg) hcr, tcr = in(reg) tcr, table = in(reg) table.unwrap_or(0), mair = in(reg) 0xFF00_u64,
            vectors = in(reg) (&raw const el1_vectors).addr(), sctlr = in(reg) sctlr,
        );
    }
}

fn at_el1(table: u64) {
    let delegated = pool(DELEGATED);
    set_el1(HCR_RW, None);
    expect_fault("el1-read-faults-at-el1", from_el1(LOAD, delegated), DATA, PROTECTION);
    taken_at_el1("el1-takes-its-own-faults", true);
    expect_fault("el1-fetch-faults-at-el1", from_el1(FETCH, delegated), INSTRUCTION, PROTECTION);
    set_el1(HCR_RW | HCR_GPF, None);
    expect_fault("el1-write-faults-at-el2", from_el1(STORE, delegated), DATA_FROM_BELOW, PROTECTION | WRITE);
    taken_at_el1("el2-takes-el1s-faults", false);
    set_el1(HCR_RW, Some(table));
    expect_fault("el1-walk-faults", from_el1(LOAD, AS_LEVEL_1), DATA, ON_WALK + 1);
    expect_fault("el1-walk-for-a-fetch-faults", from_el1(FETCH, AS_LEVEL_1), INSTRUCTION, ON_WALK + 1);
    expect_fault("el1-translated-write-faults", from_el1(STORE, PAGE), DATA, PROTECTION | WRITE);
    expect_fault("el1-neighbour-is-readable", from_el1(LOAD, PAGE + GRANULE), 0, 0);
    // At EL1 its vectors would fault as well.
    set_el1(HCR_RW | HCR_GPF, Some(delegated));
    expect_fault("el1-first-table-faults", from_el1(LOAD, delegated), INSTRUCTION_FROM_BELOW, ON_WALK);
    set_el1(HCR_RW, None);
}

fn taken_at_el1(name: &str, wanted: bool) {
    let got = TAKEN_AT_EL1.load(Ordering::Relaxed) != 0;
    if got == wanted {
        check(name, Ok(()));
    } else {
        check(name, Err(format_args!("the other exception level took it")));
    }
}

fn below_stage_2(table: u64) {
    // 48 bits of address from level 0 on, 48 bits of output.
    let vtcr: u64 = 1 << 31 | 5 << 16 | 3 << 12 | 1 << 10 | 1 << 8 | 2 << 6 | 16;
    let tables = |table: u64| {
        // SAFETY: the second stage is for EL1, which only this file runs.
        unsafe { asm!("msr vtcr_el2, {}", "msr vttbr_el2, {}", "isb", in(reg) vtcr, in(reg) table) };
        set_el1(HCR_RW | HCR_VM, None);
    };
    tables(table);
    expect_fault("stage-2-walk-faults", from_el1(LOAD, AS_LEVEL_1), DATA_FROM_BELOW, ON_WALK + 1);
    let fetch = from_el1(FETCH, AS_LEVEL_1);
    expect_fault("stage-2-walk-for-a-fetch-faults", fetch, INSTRUCTION_FROM_BELOW, ON_WALK + 1);
    // The final address is EL1's matter, unless EL2 asks for it.
    expect_fault("stage-2-output-faults-at-el1", from_el1(LOAD, PAGE), DATA, PROTECTION);
    set_el1(HCR_RW | HCR_VM | HCR_GPF, None);
    expect_fault("stage-2-read-faults", from_el1(LOAD, PAGE), DATA_FROM_BELOW, PROTECTION);
    expect_fault("stage-2-write-faults", from_el1(STORE, PAGE), DATA_FROM_BELOW, PROTECTION | WRITE);
    expect_fault("stage-2-fetch-faults", from_el1(FETCH, PAGE), INSTRUCTION_FROM_BELOW, PROTECTION);
    expect_fault("stage-2-neighbour-is-readable", from_el1(LOAD, PAGE + GRANULE), 0, 0);
    tables(pool(DELEGATED));
    expect_fault("stage-2-first-table-faults", from_el1(LOAD, PAGE), INSTRUCTION_FROM_BELOW, ON_WALK);
    set_el1(HCR_RW, None);
    // SAFETY: as above.
    unsafe { asm!("msr vttbr_el2, xzr", "tlbi alle1", "dsb sy", "isb") };
}
