//! SHA-256 and SHA-512 with the CPU's instructions.
//!
//! The vector registers belong to whoever ran before (the host, or a REC), so those that are used are put aside
//! at full vector length and brought back.

use crate::fp;
use crate::percpu;
use crate::world::features;
use core::arch::global_asm;

unsafe extern "C" {
    fn rmm_sha256(state: *mut u32, data: *const u8, blocks: u64, scratch: *mut u8, sve: u64);
    fn rmm_sha512(state: *mut u64, data: *const u8, blocks: u64, scratch: *mut u8, sve: u64);
}

/// Runs `hash` with a scratch area for 32 vector registers of any length and whether they are SVE's; false if the
/// CPU cannot do it now.
fn with_vectors(hash: impl FnOnce(*mut u8, u64)) -> bool {
    let features = features();
    let cpu = percpu::this();
    fp::open();
    // These instructions do not exist in streaming mode.
    let streaming = features.sme && read_reg!(svcr!()) & 1 != 0;
    if !streaming {
        hash(cpu.scratch.as_mut_ptr(), u64::from(features.sve));
    }
    fp::close(cpu);
    !streaming
}

/// Folds `blocks` 64-byte blocks at `data` into `state`; false if the CPU cannot do it now.
///
/// # Safety
/// `data` points to that many readable bytes.
pub(crate) unsafe fn sha256(state: &mut [u32; 8], data: *const u8, blocks: u64) -> bool {
    features().sha256
        && with_vectors(|scratch, sve| {
            // SAFETY: the caller answers for `data`; the scratch area is large enough.
            unsafe { rmm_sha256(state.as_mut_ptr(), data, blocks, scratch, sve) }
        })
}

/// Folds `blocks` 128-byte blocks at `data` into `state`; false if the CPU cannot do it now.
///
/// # Safety
/// `data` points to that many readable bytes.
pub(crate) unsafe fn sha512(state: &mut [u64; 8], data: *const u8, blocks: u64) -> bool {
    features().sha512
        && with_vectors(|scratch, sve| {
            // SAFETY: as in `sha256`.
            unsafe { rmm_sha512(state.as_mut_ptr(), data, blocks, scratch, sve) }
        })
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

global_asm!(
    r#"
    .arch_extension fp
    .arch_extension simd
    .arch_extension sve
    .arch_extension sha3
    .pushsection .rodata.sha512, "a"
    .balign 16
    .Lsha512_k:
    .quad 0x428a2f98d728ae22, 0x7137449123ef65cd, 0xb5c0fbcfec4d3b2f, 0xe9b5dba58189dbbc
    .quad 0x3956c25bf348b538, 0x59f111f1b605d019, 0x923f82a4af194f9b, 0xab1c5ed5da6d8118
    .quad 0xd807aa98a3030242, 0x12835b0145706fbe, 0x243185be4ee4b28c, 0x550c7dc3d5ffb4e2
    .quad 0x72be5d74f27b896f, 0x80deb1fe3b1696b1, 0x9bdc06a725c71235, 0xc19bf174cf692694
    .quad 0xe49b69c19ef14ad2, 0xefbe4786384f25e3, 0x0fc19dc68b8cd5b5, 0x240ca1cc77ac9c65
    .quad 0x2de92c6f592b0275, 0x4a7484aa6ea6e483, 0x5cb0a9dcbd41fbd4, 0x76f988da831153b5
    .quad 0x983e5152ee66dfab, 0xa831c66d2db43210, 0xb00327c898fb213f, 0xbf597fc7beef0ee4
    .quad 0xc6e00bf33da88fc2, 0xd5a79147930aa725, 0x06ca6351e003826f, 0x142929670a0e6e70
    .quad 0x27b70a8546d22ffc, 0x2e1b21385c26c926, 0x4d2c6dfc5ac42aed, 0x53380d139d95b3df
    .quad 0x650a73548baf63de, 0x766a0abb3c77b2a8, 0x81c2c92e47edaee6, 0x92722c851482353b
    .quad 0xa2bfe8a14cf10364, 0xa81a664bbc423001, 0xc24b8b70d0f89791, 0xc76c51a30654be30
    .quad 0xd192e819d6ef5218, 0xd69906245565a910, 0xf40e35855771202a, 0x106aa07032bbd1b8
    .quad 0x19a4c116b8d2d0c8, 0x1e376c085141ab53, 0x2748774cdf8eeb99, 0x34b0bcb5e19b48a8
    .quad 0x391c0cb3c5c95a63, 0x4ed8aa4ae3418acb, 0x5b9cca4f7763e373, 0x682e6ff3d6b2b8a3
    .quad 0x748f82ee5defb2fc, 0x78a5636f43172f60, 0x84c87814a1f0ab72, 0x8cc702081a6439ec
    .quad 0x90befffa23631e28, 0xa4506cebde82bde9, 0xbef9a3f7b2c67915, 0xc67178f2e372532b
    .quad 0xca273eceea26619c, 0xd186b8c721c0c207, 0xeada7dd6cde0eb1e, 0xf57d4f7fee6ed178
    .quad 0x06f067aa72176fba, 0x0a637dc5a2c898a6, 0x113f9804bef90dae, 0x1b710b35131c471b
    .quad 0x28db77f523047d84, 0x32caab7b40c72493, 0x3c9ebe0a15c9bebc, 0x431d67c49c100d4c
    .quad 0x4cc5d4becb3e42b6, 0x597f299cfc657e2a, 0x5fcb6fab3ad6faec, 0x6c44198c4a475817
    .popsection

    // Two rounds. a to d: the state, two words in each; t: where the third quarter of the new one goes; w: the
    // message words. Afterwards the state is in d, a, t, c, and b is free.
    .macro sha512_rounds a, b, c, d, t, w
        ldr     q24, [x6], #16
        add     v5.2d, v24.2d, v\w\().2d
        ext     v6.16b, v\c\().16b, v\d\().16b, #8
        ext     v5.16b, v5.16b, v5.16b, #8
        ext     v7.16b, v\b\().16b, v\c\().16b, #8
        add     v\d\().2d, v\d\().2d, v5.2d
        sha512h q\d, q6, v7.2d
        add     v\t\().2d, v\b\().2d, v\d\().2d
        sha512h2 q\d, q\b, v\a\().2d
    .endm
    // As above, and the message words that are due sixteen rounds later.
    .macro sha512_schedule a, b, c, d, t, w, w1, w4, w5, w7
        sha512_rounds \a, \b, \c, \d, \t, \w
        ext     v5.16b, v\w4\().16b, v\w5\().16b, #8
        sha512su0 v\w\().2d, v\w1\().2d
        sha512su1 v\w\().2d, v\w7\().2d, v5.2d
    .endm

    .pushsection .text.sha512, "ax"
    // x0 state, x1 data, x2 blocks, x3 scratch, x4 SVE?
    .global rmm_sha512
    rmm_sha512:
        cbz     x2, 9f
        cbz     x4, 1f
    .irp n,0,1,2,3,4,5,6,7,16,17,18,19,20,21,22,23,24,25,26,27
        str     z\n, [x3, #\n, mul vl]
    .endr
        b       2f
    1:
    .irp n,0,1,2,3,4,5,6,7,16,17,18,19,20,21,22,23,24,25,26,27
        str     q\n, [x3, #(\n * 16)]
    .endr
    2:
        adrp    x5, .Lsha512_k
        add     x5, x5, :lo12:.Lsha512_k
        ldp     q0, q1, [x0]
        ldp     q2, q3, [x0, #32]
    3:
        mov     x6, x5
        ldp     q16, q17, [x1]
        ldp     q18, q19, [x1, #32]
        ldp     q20, q21, [x1, #64]
        ldp     q22, q23, [x1, #96]
        add     x1, x1, #128
    .irp n,16,17,18,19,20,21,22,23
        rev64   v\n\().16b, v\n\().16b
    .endr
        sha512_schedule 0, 1, 2, 3, 4, 16, 17, 20, 21, 23
        sha512_schedule 3, 0, 4, 2, 1, 17, 18, 21, 22, 16
        sha512_schedule 2, 3, 1, 4, 0, 18, 19, 22, 23, 17
        sha512_schedule 4, 2, 0, 1, 3, 19, 20, 23, 16, 18
        sha512_schedule 1, 4, 3, 0, 2, 20, 21, 16, 17, 19
        sha512_schedule 0, 1, 2, 3, 4, 21, 22, 17, 18, 20
        sha512_schedule 3, 0, 4, 2, 1, 22, 23, 18, 19, 21
        sha512_schedule 2, 3, 1, 4, 0, 23, 16, 19, 20, 22
        sha512_schedule 4, 2, 0, 1, 3, 16, 17, 20, 21, 23
        sha512_schedule 1, 4, 3, 0, 2, 17, 18, 21, 22, 16
        sha512_schedule 0, 1, 2, 3, 4, 18, 19, 22, 23, 17
        sha512_schedule 3, 0, 4, 2, 1, 19, 20, 23, 16, 18
        sha512_schedule 2, 3, 1, 4, 0, 20, 21, 16, 17, 19
        sha512_schedule 4, 2, 0, 1, 3, 21, 22, 17, 18, 20
        sha512_schedule 1, 4, 3, 0, 2, 22, 23, 18, 19, 21
        sha512_schedule 0, 1, 2, 3, 4, 23, 16, 19, 20, 22
        sha512_schedule 3, 0, 4, 2, 1, 16, 17, 20, 21, 23
        sha512_schedule 2, 3, 1, 4, 0, 17, 18, 21, 22, 16
        sha512_schedule 4, 2, 0, 1, 3, 18, 19, 22, 23, 17
        sha512_schedule 1, 4, 3, 0, 2, 19, 20, 23, 16, 18
        sha512_schedule 0, 1, 2, 3, 4, 20, 21, 16, 17, 19
        sha512_schedule 3, 0, 4, 2, 1, 21, 22, 17, 18, 20
        sha512_schedule 2, 3, 1, 4, 0, 22, 23, 18, 19, 21
        sha512_schedule 4, 2, 0, 1, 3, 23, 16, 19, 20, 22
        sha512_schedule 1, 4, 3, 0, 2, 16, 17, 20, 21, 23
        sha512_schedule 0, 1, 2, 3, 4, 17, 18, 21, 22, 16
        sha512_schedule 3, 0, 4, 2, 1, 18, 19, 22, 23, 17
        sha512_schedule 2, 3, 1, 4, 0, 19, 20, 23, 16, 18
        sha512_schedule 4, 2, 0, 1, 3, 20, 21, 16, 17, 19
        sha512_schedule 1, 4, 3, 0, 2, 21, 22, 17, 18, 20
        sha512_schedule 0, 1, 2, 3, 4, 22, 23, 18, 19, 21
        sha512_schedule 3, 0, 4, 2, 1, 23, 16, 19, 20, 22
        sha512_rounds   2, 3, 1, 4, 0, 16
        sha512_rounds   4, 2, 0, 1, 3, 17
        sha512_rounds   1, 4, 3, 0, 2, 18
        sha512_rounds   0, 1, 2, 3, 4, 19
        sha512_rounds   3, 0, 4, 2, 1, 20
        sha512_rounds   2, 3, 1, 4, 0, 21
        sha512_rounds   4, 2, 0, 1, 3, 22
        sha512_rounds   1, 4, 3, 0, 2, 23
        ldp     q24, q25, [x0]
        ldp     q26, q27, [x0, #32]
        add     v0.2d, v0.2d, v24.2d
        add     v1.2d, v1.2d, v25.2d
        add     v2.2d, v2.2d, v26.2d
        add     v3.2d, v3.2d, v27.2d
        stp     q0, q1, [x0]
        stp     q2, q3, [x0, #32]
        subs    x2, x2, #1
        b.ne    3b
        cbz     x4, 4f
    .irp n,0,1,2,3,4,5,6,7,16,17,18,19,20,21,22,23,24,25,26,27
        ldr     z\n, [x3, #\n, mul vl]
    .endr
        ret
    4:
    .irp n,0,1,2,3,4,5,6,7,16,17,18,19,20,21,22,23,24,25,26,27
        ldr     q\n, [x3, #(\n * 16)]
    .endr
    9:  ret
    .popsection
    "#
);
