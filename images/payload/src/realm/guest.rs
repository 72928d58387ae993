//! What runs inside a Realm at EL1: entry, vectors, and how a program talks to the test that drives it.
//!
//! A Realm gets a copy of this whole image at the image's own address, so its programs are functions of the image, and
//! a name that a program reports is the same string on both sides. Its RECs' stacks and host call pages follow.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use cca_abi::rsi;

use crate::GRANULE;
use crate::entry::smc;

/// Two pages of stack per REC.
pub(super) const STACKS: u64 = 0x4210_0000;
pub(super) const STACK_PAGES: u64 = 2;
/// A page per REC for host calls.
pub(super) const CALLS: u64 = 0x4211_0000;
/// RAM without a page, up to [`RAM_END`].
pub(super) const FREE: u64 = 0x4212_0000;
/// End of what RIPAS calls RAM.
pub(super) const RAM_END: u64 = FREE + 4 * GRANULE;
/// IPA width.
pub(super) const S2SZ: u64 = 36;
/// The half that the host shares.
pub(super) const SHARED: u64 = 1 << (S2SZ - 1);

/// What a host call is about, in its first register.
pub(super) mod call {
    /// The program waits at a step: number and two values; it gets one value back.
    pub(in crate::realm) const STEP: u64 = 1;
    /// A check failed: address and length of its name, seen and wanted value.
    pub(in crate::realm) const FAILED: u64 = 2;
    /// The program has ended: number of checks that held.
    pub(in crate::realm) const DONE: u64 = 3;
}

global_asm!(
    r#"
.section .text.realm, "ax"
// x0: the program, x1: its argument. After a CPU_ON, x0 is the context identifier.
.global realm_start
realm_start:
    mov     x19, x0
    mov     x20, x1
    mrs     x2, mpidr_el1
    and     x2, x2, #0xf
    ldr     x3, ={stacks}
    add     x2, x2, #1
    add     x3, x3, x2, lsl #13
    mov     sp, x3
    ldr     x3, =realm_vectors
    msr     vbar_el1, x3
    ldr     x3, =(3 << 24 | 3 << 20 | 3 << 16)  // CPACR_EL1.SMEN, FPEN, ZEN
    msr     cpacr_el1, x3
    isb
    mov     x0, x20
    blr     x19
1:  mov     x0, #8                      // PSCI SYSTEM_OFF
    movk    x0, #0x8400, lsl #16
    smc     #0
    b       1b

.macro realm_vector kind
    .balign 128
    sub     sp, sp, #192
    stp     x0, x1, [sp]
    mov     x0, #\kind
    b       realm_exception
.endm
.balign 2048
.global realm_vectors
realm_vectors:
.irp kind,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    realm_vector \kind
.endr
realm_exception:
    stp     x2, x3, [sp, #16]
    stp     x4, x5, [sp, #32]
    stp     x6, x7, [sp, #48]
    stp     x8, x9, [sp, #64]
    stp     x10, x11, [sp, #80]
    stp     x12, x13, [sp, #96]
    stp     x14, x15, [sp, #112]
    stp     x16, x17, [sp, #128]
    stp     x18, x29, [sp, #144]
    str     x30, [sp, #160]
    mrs     x1, esr_el1
    mrs     x2, elr_el1
    mrs     x3, far_el1
    mov     x4, x30
    bl      realm_el1_exception
    msr     elr_el1, x0
    ldp     x2, x3, [sp, #16]
    ldp     x4, x5, [sp, #32]
    ldp     x6, x7, [sp, #48]
    ldp     x8, x9, [sp, #64]
    ldp     x10, x11, [sp, #80]
    ldp     x12, x13, [sp, #96]
    ldp     x14, x15, [sp, #112]
    ldp     x16, x17, [sp, #128]
    ldp     x18, x29, [sp, #144]
    ldr     x30, [sp, #160]
    ldp     x0, x1, [sp]
    add     sp, sp, #192
    eret
"#,
    stacks = const STACKS,
);

unsafe extern "C" {
    pub(super) fn realm_start();
}

/// Checks that held, of all RECs of this Realm.
static PASSED: AtomicU64 = AtomicU64::new(0);
/// An exception is expected.
static EXPECTED: AtomicBool = AtomicBool::new(false);
static CAUGHT: AtomicU64 = AtomicU64::new(NONE);
static CAUGHT_FAR: AtomicU64 = AtomicU64::new(0);
static CAUGHT_KIND: AtomicU64 = AtomicU64::new(0);
/// The last interrupt, plus one.
static INTERRUPT: AtomicU64 = AtomicU64::new(0);

/// No exception: no syndrome has all bits set.
const NONE: u64 = u64::MAX;

/// This REC's number.
pub(super) fn rec() -> u64 {
    let mpidr: u64;
    // SAFETY: reads an identification register.
    unsafe { asm!("mrs {}, mpidr_el1", out(reg) mpidr, options(nomem, nostack)) };
    mpidr & 0xF
}

fn host_call(arguments: [u64; 5]) -> u64 {
    let page = CALLS + rec() * GRANULE;
    let at = core::ptr::with_exposed_provenance_mut::<u64>(page as usize);
    // SAFETY: the REC's own page, which is no Rust object.
    unsafe {
        at.write_volatile(0);
        for (n, value) in arguments.into_iter().enumerate() {
            at.add(n + 1).write_volatile(value);
        }
        let status = smc(rsi::fid::HOST_CALL, page, 0, 0)[0];
        if status == 0 { at.add(1).read_volatile() } else { NONE }
    }
}

/// Lets the host do its part.
pub(super) fn step(number: u64, values: [u64; 2]) -> u64 {
    host_call([call::STEP, number, values[0], values[1], 0])
}

/// The program's last act.
pub(super) fn done() {
    host_call([call::DONE, PASSED.load(Relaxed), 0, 0, 0]);
}

pub(super) fn expect(name: &'static str, seen: u64, wanted: u64) {
    if seen == wanted {
        PASSED.fetch_add(1, Relaxed);
    } else {
        host_call([call::FAILED, name.as_ptr().addr() as u64, name.len() as u64, seen, wanted]);
    }
}

#[unsafe(no_mangle)]
extern "C" fn realm_el1_exception(kind: u64, esr: u64, elr: u64, far: u64, lr: u64) -> u64 {
    const BREAKPOINT: u64 = 0x31;
    const WATCHPOINT: u64 = 0x35;
    const INSTRUCTION_ABORT: u64 = 0x21;
    if kind & 3 == 1 {
        interrupt();
        return elr;
    }
    CAUGHT.store(esr, Relaxed);
    CAUGHT_FAR.store(far, Relaxed);
    CAUGHT_KIND.store(kind, Relaxed);
    if !EXPECTED.swap(false, Relaxed) {
        expect("no-exception-in-the-realm", esr, elr);
        done();
    }
    match esr >> 26 {
        // SAFETY: the program that set them expects no more.
        BREAKPOINT => unsafe { asm!("msr dbgbcr0_el1, xzr", "isb", options(nostack)) },
        // SAFETY: as above.
        WATCHPOINT => unsafe { asm!("msr dbgwcr0_el1, xzr", "isb", options(nostack)) },
        INSTRUCTION_ABORT => return lr,
        _ => return elr + 4,
    }
    elr
}

/// Takes what the interface offers, and silences its source.
fn interrupt() {
    let intid: u64;
    // SAFETY: the virtual CPU interface, and the sources that this Realm's programs use.
    unsafe {
        asm!("mrs {}, S3_0_C12_C12_0", "isb", out(reg) intid, options(nostack));
        match intid {
            27 => asm!("msr cntv_ctl_el0, {}", in(reg) 2_u64, options(nostack)),
            30 => asm!("msr cntp_ctl_el0, {}", in(reg) 2_u64, options(nostack)),
            23 => asm!("msr pmovsclr_el0, {}", in(reg) u64::from(u32::MAX), options(nostack)),
            _ => {}
        }
        asm!("isb", "msr S3_0_C12_C12_1, {}", "isb", in(reg) intid, options(nostack));
    }
    INTERRUPT.store(intid + 1, Relaxed);
}

/// Switches the virtual CPU interface on.
pub(super) fn enable_interrupts() {
    // SAFETY: ICC_SRE_EL1, ICC_PMR_EL1, ICC_IGRPEN1_EL1, PSTATE.I.
    unsafe {
        asm!("msr S3_0_C12_C12_5, {}", "isb", in(reg) 7_u64, options(nostack));
        asm!("msr S3_0_C4_C6_0, {}", in(reg) 0xF0_u64, options(nostack));
        asm!("msr S3_0_C12_C12_7, {}", "isb", "msr daifclr, #2", in(reg) 1_u64, options(nostack));
    }
}

/// Waits for an interrupt; gives its number.
pub(super) fn wait_for_interrupt() -> u64 {
    for _ in 0..20_000_000 {
        let seen = INTERRUPT.swap(0, Relaxed);
        if seen != 0 {
            return seen - 1;
        }
    }
    NONE
}

/// Runs what may take one exception; gives its syndrome, or all ones if there was none.
pub(super) fn catch(attempt: impl FnOnce()) -> u64 {
    CAUGHT.store(NONE, Relaxed);
    EXPECTED.store(true, Relaxed);
    attempt();
    EXPECTED.store(false, Relaxed);
    CAUGHT.load(Relaxed)
}

/// FAR_EL1 of the exception caught last.
pub(super) fn caught_far() -> u64 {
    CAUGHT_FAR.load(Relaxed)
}

/// The vector of the exception caught last, 0 to 15.
pub(super) fn caught_kind() -> u64 {
    CAUGHT_KIND.load(Relaxed)
}
