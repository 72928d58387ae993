//! SHA-256 with the CPU's instructions.
//!
//! The vector registers belong to whoever ran before (the host, or a REC), so those that are used are put aside
//! at full vector length and brought back. The constants stay in registers for a whole granule.

use crate::fp;
use crate::percpu;
use crate::world::features;
use core::arch::global_asm;

unsafe extern "C" {
    fn rmm_sha256(state: *mut u32, data: *const u8, blocks: u64, scratch: *mut u8, sve: u64);
}

/// Folds `blocks` 64-byte blocks at `data` into `state`; false if the CPU cannot do it now.
///
/// # Safety
/// `data` points to that many readable bytes.
pub(crate) unsafe fn sha256(state: &mut [u32; 8], data: *const u8, blocks: u64) -> bool {
    let features = features();
    if !features.sha256 {
        return false;
    }
    let cpu = percpu::this();
    fp::open();
    // These instructions do not exist in streaming mode.
    let streaming = features.sme && read_reg!(svcr!()) & 1 != 0;
    if !streaming {
        // SAFETY: the caller answers for `data`; the scratch area takes 32 registers of any length.
        unsafe {
            rmm_sha256(state.as_mut_ptr(), data, blocks, cpu.scratch.as_mut_ptr(), u64::from(features.sve));
        }
    }
    fp::close(cpu);
    !streaming
}

global_asm!(
    r#"
    .arch_extension fp
    .arch_extension simd
    .arch_extension sve
    .arch_extension sha2
    .pushsection .rodata.sha256, "a"
    .balign 16
    .Lsha256_k:
    .word 0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5
    .word 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174
    .word 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da
    .word 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967
    .word 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85
    .word 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070
    .word 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3
    .word 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2
    .popsection

    // Four rounds. w: the message words, k: the constants.
    .macro sha256_rounds w, k
        add     v8.4s, v\w\().4s, v\k\().4s
        mov     v9.16b, v0.16b
        sha256h q0, q1, v8.4s
        sha256h2 q1, q9, v8.4s
    .endm
    // As above, and the message words that are due sixteen rounds later.
    .macro sha256_schedule w, x, y, z, k
        add     v8.4s, v\w\().4s, v\k\().4s
        sha256su0 v\w\().4s, v\x\().4s
        mov     v9.16b, v0.16b
        sha256h q0, q1, v8.4s
        sha256h2 q1, q9, v8.4s
        sha256su1 v\w\().4s, v\y\().4s, v\z\().4s
    .endm

    .pushsection .text.sha256, "ax"
    // x0 state, x1 data, x2 blocks, x3 scratch, x4 SVE?
    .global rmm_sha256
    rmm_sha256:
        cbz     x2, 9f
        cbz     x4, 1f
    .irp n,0,1,2,3,4,5,6,7,8,9,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
        str     z\n, [x3, #\n, mul vl]
    .endr
        b       2f
    1:
    .irp n,0,1,2,3,4,5,6,7,8,9,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
        str     q\n, [x3, #(\n * 16)]
    .endr
    2:
        adrp    x5, .Lsha256_k
        add     x5, x5, :lo12:.Lsha256_k
        ldp     q16, q17, [x5]
        ldp     q18, q19, [x5, #32]
        ldp     q20, q21, [x5, #64]
        ldp     q22, q23, [x5, #96]
        ldp     q24, q25, [x5, #128]
        ldp     q26, q27, [x5, #160]
        ldp     q28, q29, [x5, #192]
        ldp     q30, q31, [x5, #224]
        ldp     q0, q1, [x0]
    3:
        ldp     q4, q5, [x1]
        ldp     q6, q7, [x1, #32]
        add     x1, x1, #64
        mov     v2.16b, v0.16b
        mov     v3.16b, v1.16b
        rev32   v4.16b, v4.16b
        rev32   v5.16b, v5.16b
        rev32   v6.16b, v6.16b
        rev32   v7.16b, v7.16b
        sha256_schedule 4, 5, 6, 7, 16
        sha256_schedule 5, 6, 7, 4, 17
        sha256_schedule 6, 7, 4, 5, 18
        sha256_schedule 7, 4, 5, 6, 19
        sha256_schedule 4, 5, 6, 7, 20
        sha256_schedule 5, 6, 7, 4, 21
        sha256_schedule 6, 7, 4, 5, 22
        sha256_schedule 7, 4, 5, 6, 23
        sha256_schedule 4, 5, 6, 7, 24
        sha256_schedule 5, 6, 7, 4, 25
        sha256_schedule 6, 7, 4, 5, 26
        sha256_schedule 7, 4, 5, 6, 27
        sha256_rounds 4, 28
        sha256_rounds 5, 29
        sha256_rounds 6, 30
        sha256_rounds 7, 31
        add     v0.4s, v0.4s, v2.4s
        add     v1.4s, v1.4s, v3.4s
        subs    x2, x2, #1
        b.ne    3b
        stp     q0, q1, [x0]
        cbz     x4, 4f
    .irp n,0,1,2,3,4,5,6,7,8,9,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
        ldr     z\n, [x3, #\n, mul vl]
    .endr
        ret
    4:
    .irp n,0,1,2,3,4,5,6,7,8,9,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
        ldr     q\n, [x3, #(\n * 16)]
    .endr
    9:  ret
    .popsection
    "#
);
