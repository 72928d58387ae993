//! Vector, predicate and matrix registers: at several vector lengths, outside and inside of streaming mode, they must be
//! after a call what they were before, and nothing of a Realm's may ever be in them.

use core::arch::{asm, global_asm};

use crate::registers::Features;
use crate::{GRANULE, check, pool};

global_asm!(
    r#"
.arch_extension fp
.arch_extension sve
.arch_extension sme
// x0: buffer of 32 Z, FFR, 16 P; at the current vector length.
.global vectors_load
vectors_load:
    mov     x1, x0
    addvl   x1, x1, #31
    addvl   x1, x1, #1
    ldr     p0, [x1, #16, mul vl]
    cbz     x2, 1f
    wrffr   p0.b
1:
.irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    ldr     p\n, [x1, #\n, mul vl]
.endr
.irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    ldr     z\n, [x0, #\n, mul vl]
.endr
    ret

.global vectors_store
vectors_store:
    mov     x1, x0
    addvl   x1, x1, #31
    addvl   x1, x1, #1
.irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    str     p\n, [x1, #\n, mul vl]
.endr
    cbz     x2, 1f
    rdffr   p0.b
    str     p0, [x1, #16, mul vl]
1:
.irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    str     z\n, [x0, #\n, mul vl]
.endr
    ret

// x0: buffer, x1: rows of ZA.
.global matrix_load
matrix_load:
    mov     w12, #0
1:  ldr     za[w12, 0], [x0]
    addsvl  x0, x0, #1
    add     w12, w12, #1
    cmp     w12, w1
    b.lo    1b
    ret

.global matrix_store
matrix_store:
    mov     w12, #0
1:  str     za[w12, 0], [x0]
    addsvl  x0, x0, #1
    add     w12, w12, #1
    cmp     w12, w1
    b.lo    1b
    ret

// x0: buffer of 32 Q, for CPUs without SVE.
.global simd_load
simd_load:
.irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    ldr     q\n, [x0], #16
.endr
    ret
.global simd_store
simd_store:
.irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    str     q\n, [x0], #16
.endr
    ret
"#
);

unsafe extern "C" {
    // x2: whether FFR can be used.
    fn vectors_load(buffer: u64, unused: u64, ffr: u64);
    fn vectors_store(buffer: u64, unused: u64, ffr: u64);
    fn matrix_load(buffer: u64, rows: u64);
    fn matrix_store(buffer: u64, rows: u64);
    fn simd_load(buffer: u64);
    fn simd_store(buffer: u64);
}

/// Two buffers of 128 KiB in the pool: what is loaded, what is found.
const LOADED: u64 = 640;
const FOUND: u64 = 672;
/// The matrix lies behind the vectors in each buffer.
const MATRIX: u64 = 8 * GRANULE;

fn word(base: u64, n: u64) -> u64 {
    // SAFETY: within the buffers, which are no Rust objects.
    unsafe { core::ptr::with_exposed_provenance::<u64>((base + n * 8) as usize).read_volatile() }
}

fn fill(base: u64, bytes: u64, seed: u64) {
    for n in 0..bytes / 8 {
        let value = (n + seed).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        // SAFETY: as for `word`.
        unsafe {
            core::ptr::with_exposed_provenance_mut::<u64>((base + n * 8) as usize).write_volatile(value);
        }
    }
}

/// Sets the vector length as near to `len` as the CPU has; gives it in bytes.
fn set_length(len: u64) -> u64 {
    let bytes;
    // SAFETY: changes vector registers only.
    unsafe {
        asm!(
            ".arch_extension sve", "msr S3_4_C1_C2_0, {len}", "isb", "rdvl {bytes}, #1",
            len = in(reg) len, bytes = out(reg) bytes, options(nostack)
        );
    }
    bytes
}

/// Streaming mode and matrix on (3), matrix on (2), or off (0).
fn set_streaming(mode: u64) {
    // SAFETY: changes vector registers only.
    unsafe { asm!("msr S3_3_C4_C2_2, {}", "isb", in(reg) mode, options(nostack)) };
}

/// Sets the streaming vector length with all that the CPU has; gives it in bytes.
fn set_streaming_length(features: &Features, len: u64) -> u64 {
    let value = len | u64::from(features.fa64) << 31 | u64::from(features.sme2) << 30;
    let bytes;
    // SAFETY: changes vector registers only.
    unsafe {
        asm!(
            ".arch_extension sme", "msr S3_4_C1_C2_6, {value}", "isb", "rdsvl {bytes}, #1",
            value = in(reg) value, bytes = out(reg) bytes, options(nostack)
        );
    }
    bytes
}

/// What is compared: 32 vectors, 16 predicates and FFR of an eighth of that.
fn bytes(length: u64) -> u64 {
    32 * length + 17 * length / 8
}

/// The first word that differs, of `count` from `start` on.
fn differs(start: u64, count: u64) -> Option<(u64, u64, u64)> {
    let words = |n| (n, word(pool(LOADED), n), word(pool(FOUND), n));
    (start..start + count).map(words).find(|(_, loaded, found)| loaded != found)
}

/// A word that changed: where, its number, what was loaded and found.
type Wrong = Option<(&'static str, (u64, u64, u64))>;

/// Runs `calls` with all vectors full, in every mode and at several lengths.
pub(crate) fn survive(name: &str, mut calls: impl FnMut()) {
    let features = Features::read();
    let wrong = if features.sve { scalable(&mut calls) } else { simd(&mut calls) };
    let wrong = if features.sme { wrong.or(streaming(&features, &mut calls)) } else { wrong };
    report(name, wrong);
}

/// 32 registers of 128 bits.
fn simd(calls: &mut impl FnMut()) -> Wrong {
    let (loaded, found) = (pool(LOADED), pool(FOUND));
    fill(loaded, 512, 1);
    // SAFETY: no code of this program uses these registers.
    unsafe { simd_load(loaded) };
    calls();
    // SAFETY: as above.
    unsafe { simd_store(found) };
    differs(0, 64).map(|word| ("SIMD", word))
}

fn scalable(calls: &mut impl FnMut()) -> Wrong {
    let (loaded, found) = (pool(LOADED), pool(FOUND));
    let mut wrong = None;
    for len in [0, 1, 3, 15] {
        let length = set_length(len);
        fill(loaded, bytes(length), len);
        ffr_like(loaded + 32 * length + 16 * length / 8, length / 8);
        // SAFETY: no code of this program uses these registers.
        unsafe { vectors_load(loaded, 0, 1) };
        calls();
        // SAFETY: as above.
        unsafe { vectors_store(found, 0, 1) };
        wrong = wrong.or(differs(0, bytes(length) / 8).map(|word| ("SVE", word)));
    }
    wrong
}

/// With a live matrix, then also in streaming mode.
fn streaming(features: &Features, calls: &mut impl FnMut()) -> Wrong {
    let (loaded, found) = (pool(LOADED), pool(FOUND));
    let mut wrong = None;
    for (mode, what) in [(2, "ZA is live"), (3, "streaming mode")] {
        for len in [0, 3] {
            set_length(0);
            let rows = set_streaming_length(features, len);
            set_streaming(mode);
            let vectors = if mode == 3 { 32 * rows } else { 512 };
            fill(loaded, vectors, 7 + len);
            fill(loaded + MATRIX, rows * rows, 9 + len);
            // SAFETY: no code of this program uses these registers.
            unsafe {
                matrix_load(loaded + MATRIX, rows);
                vectors_load(loaded, 0, 0);
            }
            calls();
            let now: u64;
            // SAFETY: as above.
            unsafe { asm!("mrs {}, S3_3_C4_C2_2", out(reg) now, options(nostack)) };
            if now == mode {
                // SAFETY: as above; both are what they were, so that there is something to store.
                unsafe {
                    vectors_store(found, 0, 0);
                    matrix_store(found + MATRIX, rows);
                }
                let changed = differs(0, vectors / 8).or(differs(MATRIX / 8, rows * rows / 8));
                wrong = wrong.or(changed.map(|word| (what, word)));
            } else {
                wrong = wrong.or(Some((what, (u64::MAX, mode, now))));
            }
            set_streaming(0);
        }
    }
    wrong
}

/// All elements up to some point: what FFR can hold.
fn ffr_like(at: u64, bytes: u64) {
    for n in 0..bytes {
        // SAFETY: as for `word`.
        unsafe {
            core::ptr::with_exposed_provenance_mut::<u8>((at + n) as usize)
                .write_volatile(if n < bytes / 2 { 0xFF } else { 0 });
        }
    }
}

fn report(name: &str, wrong: Wrong) {
    match wrong {
        None => check(name, Ok(())),
        Some((what, (n, loaded, found))) => {
            check(name, Err(format_args!("{what}: word {n}: {loaded:#x} became {found:#x}")));
        }
    }
}

/// Bits above the current vector length, which a longer one shows again, are the host's own or zero after `calls`.
pub(crate) fn nothing_above(name: &str, mut calls: impl FnMut()) {
    if !Features::read().sve {
        return;
    }
    let (loaded, found) = (pool(LOADED), pool(FOUND));
    let length = set_length(15);
    fill(loaded, bytes(length), 3);
    ffr_like(loaded + 32 * length + 16 * length / 8, length / 8);
    // SAFETY: no code of this program uses these registers.
    unsafe { vectors_load(loaded, 0, 1) };
    set_length(0);
    calls();
    set_length(15);
    // SAFETY: as above.
    unsafe { vectors_store(found, 0, 1) };
    // What a longer predicate shows of a shorter one is no whole word: only vectors are looked at.
    let words = |n| (n, word(loaded, n), word(found, n));
    let strange = |(n, loaded, found): &(u64, u64, u64)| {
        let low = n * 8 % length < 16;
        loaded != found && (low || *found != 0)
    };
    report(name, (0..32 * length / 8).map(words).find(strange).map(|word| ("above", word)));
}
