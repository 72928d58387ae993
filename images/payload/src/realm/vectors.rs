//! Are vector registers of host and Realms kept apart: FP, SVE at several lengths, streaming mode?

use core::arch::{asm, global_asm};
use core::ops::ControlFlow;

use super::build::{Realm, Wish};
use super::guest::{catch, done, expect, step};
use crate::{check, expect as host_expect};

/// Z0–Z31, P0–P15 and FFR at the longest.
const BYTES: usize = 32 * 256 + 17 * 32;

#[repr(align(16))]
struct Buffer([u64; BYTES / 8]);

/// Where registers are put to be looked at; one CPU at a time.
static mut BUFFER: Buffer = Buffer([0; BYTES / 8]);

global_asm!(
    r#"
.arch_extension sve
.section .text.realm_vectors, "ax"
// x0: seed.
.global sve_fill
sve_fill:
    .irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    index   z\n\().d, x0, #(\n % 15 + 1)
    add     x0, x0, #0x101
    .endr
    index   z31.b, w0, #5
    ptrue   p7.b
    .irp n,0,1,2,3,4,5,6,8,9,10,11,12,13,14
    cmplt   p\n\().b, p7/z, z31.b, #(\n - 8)
    .endr
    index   z31.d, x0, #3
    ret
// FFR becomes the first x0 bytes.
.global sve_fill_ffr
sve_fill_ffr:
    setffr
    whilelo p15.b, xzr, x0
    wrffr   p15.b
    ret
// x0: buffer, x1: FFR too?
.global sve_store
sve_store:
    .irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    str     z\n, [x0, #\n, mul vl]
    .endr
    addvl   x0, x0, #31
    addvl   x0, x0, #1
    .irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    str     p\n, [x0, #\n, mul vl]
    .endr
    cbz     x1, 1f
    rdffr   p0.b
    str     p0, [x0, #16, mul vl]
    ldr     p0, [x0]
1:  ret
.global sve_bytes
sve_bytes:
    rdvl    x0, #1
    ret
"#
);

unsafe extern "C" {
    fn sve_fill(seed: u64);
    fn sve_fill_ffr(bytes: u64);
    fn sve_store(to: *mut u64, ffr: bool);
    fn sve_bytes() -> u64;
}

/// A number that depends on every bit of all vector registers at the present length.
fn digest(ffr: bool) -> u64 {
    let buffer = &raw mut BUFFER;
    let mut digest = 0u64;
    // SAFETY: one CPU at a time; the buffer takes the longest vectors.
    unsafe {
        let words = (&raw mut (*buffer).0).cast::<u64>();
        for n in 0..BYTES / 8 {
            words.add(n).write_volatile(0);
        }
        sve_store(words, ffr);
        for n in 0..BYTES / 8 {
            digest = digest.rotate_left(5).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ words.add(n).read_volatile();
        }
    }
    digest
}

/// (ZCR_EL1, bytes)
fn lengths(zcr: u64) -> (u64, u64) {
    let now;
    // SAFETY: only changes the vector length.
    unsafe {
        asm!("msr S3_0_C1_C2_0, {0}", "isb", "mrs {0}, S3_0_C1_C2_0", inout(reg) zcr => now, options(nostack));
        (now, sve_bytes())
    }
}

fn id_register_sve() -> (u64, u64) {
    let (pfr0, zfr0): (u64, u64);
    // SAFETY: reads ID registers.
    unsafe {
        asm!("mrs {}, S3_0_C0_C4_0", "mrs {}, S3_0_C0_C4_4", out(reg) pfr0, out(reg) zfr0, options(nostack))
    };
    (pfr0 >> 32 & 0xF, zfr0)
}

/// With SVE of `bytes` at most.
extern "C" fn with_sve(bytes: u64) {
    let (sve, zfr0) = id_register_sve();
    expect("pfr0-shows-sve", u64::from(sve != 0), 1);
    expect("zfr0-is-shown", u64::from(zfr0 != 0), 1);
    expect("vectors-are-as-long-as-configured", lengths(0xF).1, bytes);
    expect("vectors-can-be-short", lengths(0).1, 16);
    let (zcr, _) = lengths(0xF);
    for round in 0..3u64 {
        // SAFETY: vector registers, which compiled code does not use.
        unsafe {
            sve_fill(0x5EC2_0000 * (round + 1));
            sve_fill_ffr(bytes - 3 - round);
        }
        let before = digest(true);
        step(round, [0, 0]);
        expect("sve-survives", digest(true), before);
        // SAFETY: reads a register.
        let now: u64 = unsafe {
            let now;
            asm!("mrs {}, S3_0_C1_C2_0", out(reg) now, options(nostack));
            now
        };
        expect("zcr-survives", now, zcr);
    }
    expect("sme-is-undefined", catch(smstart), 1 << 25);
    done();
}

fn smstart() {
    // SAFETY: MSR SVCRSM, #1.
    unsafe { asm!(".inst 0xd503437f", options(nostack)) };
}

/// Without SVE: FP and Advanced SIMD only.
extern "C" fn without_sve(_: u64) {
    expect("pfr0-hides-sve", id_register_sve().0, 0);
    expect("zfr0-is-zero", id_register_sve().1, 0);
    let (mut low, mut high): (u64, u64);
    for round in 0..3u64 {
        // SAFETY: a vector register.
        unsafe {
            asm!(".arch_extension fp", "fmov d31, {0}", "fmov v31.d[1], {0}", in(reg) 0x1234_5678 + round, options(nostack));
        }
        step(round, [0, 0]);
        // SAFETY: as above.
        unsafe {
            asm!(".arch_extension fp", "fmov {0}, d31", "fmov {1}, v31.d[1]", out(reg) low, out(reg) high, options(nostack));
        }
        expect("fp-survives", low, 0x1234_5678 + round);
        expect("fp-survives", high, 0x1234_5678 + round);
        // RDVL X0, #1
        expect(
            "sve-is-undefined",
            // SAFETY: as above.
            catch(|| unsafe { asm!(".inst 0x04bf5020", out("x0") _, options(nostack)) }),
            1 << 25,
        );
        // SAFETY: an access that is undefined.
        expect(
            "zcr-is-undefined",
            catch(|| unsafe { asm!("mrs {}, S3_0_C1_C2_0", out(reg) _, options(nostack)) }),
            1 << 25,
        );
        expect("sme-is-undefined", catch(smstart), 1 << 25);
    }
    done();
}

/// The host's vector length and mode.
fn host_mode(zcr: u64, streaming: bool) {
    let smcr: u64 = 1 << 31 | 3;
    // SAFETY: CPTR_EL2 without traps, ZCR_EL2, SMCR_EL2 with FA64, SVCR; nothing compiled uses vectors.
    unsafe {
        asm!("msr cptr_el2, {}", "isb", in(reg) 0x22FF_u64, options(nostack));
        asm!("msr S3_4_C1_C2_0, {}", "msr S3_4_C1_C2_6, {}", "isb", in(reg) zcr, in(reg) smcr, options(nostack));
        asm!("msr S3_3_C4_C2_2, {}", "isb", in(reg) u64::from(streaming), options(nostack));
    }
}

/// One entry, around which the host's registers must not change.
fn keep(realm: &Realm, streaming: bool, seed: u64) -> ControlFlow<()> {
    // SAFETY: as in `host_mode`.
    unsafe {
        sve_fill(seed);
        sve_fill_ffr(seed % 13 + 1);
    }
    let before = digest(true);
    realm.step(0)?;
    let svcr: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mrs {}, S3_3_C4_C2_2", out(reg) svcr, options(nostack)) };
    if digest(true) != before || svcr != u64::from(streaming) {
        check(
            "host-keeps-its-vectors",
            Err(format_args!("streaming: {streaming}, seed {seed:#x}, SVCR {svcr:#x}")),
        );
    }
    ControlFlow::Continue(())
}

pub(super) fn suite() -> ControlFlow<()> {
    for (vl, bytes) in [(15, 256), (1, 32), (0, 16)] {
        let long = Realm::new(Wish { sve_vl: Some(vl), ..Wish::default() }, with_sve, bytes)?;
        let plain = Realm::new(Wish { slot: 1, ..Wish::default() }, without_sve, 0)?;
        for (n, (zcr, streaming)) in [(3, false), (15, false), (0, true)].into_iter().enumerate() {
            host_mode(zcr, streaming);
            keep(&long, streaming, 0xA000 + n as u64)?;
            keep(&plain, streaming, 0xB000 + n as u64)?;
        }
        host_mode(1, false);
        long.finish(0, "realm-has-sve")?;
        plain.finish(0, "realm-has-no-sve")?;
        long.destroy()?;
        plain.destroy()?;
    }
    check("host-keeps-its-vectors", Ok(()));
    residue()
}

/// Leaves ones everywhere.
extern "C" fn ones(_: u64) {
    lengths(0xF);
    // SAFETY: a vector register.
    unsafe { asm!(".arch_extension sve", "mov z7.b, #-1", "ptrue p7.b", options(nostack)) };
    step(0, [0, 0]);
    done();
}

/// What a Realm with long vectors left must not appear when the host makes its own longer.
fn residue() -> ControlFlow<()> {
    let realm = Realm::new(Wish { sve_vl: Some(15), ..Wish::default() }, ones, 0)?;
    host_mode(0, false);
    realm.step(0)?;
    host_mode(15, false);
    let buffer = &raw mut BUFFER;
    // SAFETY: as in `digest`.
    let left = unsafe {
        let words = (&raw mut (*buffer).0).cast::<u64>();
        sve_store(words, false);
        (7 * 32 + 2..8 * 32).any(|n| words.add(n).read_volatile() == u64::MAX)
    };
    host_expect("nothing-of-a-realm-in-longer-vectors", u64::from(left), 0);
    host_mode(15, false);
    realm.destroy()
}
