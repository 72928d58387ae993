//! The few A64 instructions that calls and stack frames are made of.

/// What an instruction does, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Instruction {
    /// BL, or a branch (also conditional) to this offset from the instruction.
    Jump(i64),
    /// BLR or BR.
    Indirect,
    /// SP goes down by so many bytes.
    Push(u64),
    /// SP goes down by the value of a register.
    PushRegister,
    /// ADRP: the register is the instruction's page plus this offset.
    Page { register: u32, offset: i64 },
    /// ADR: the register is the instruction's address plus this offset.
    Address { register: u32, offset: i64 },
    /// ADD of an immediate.
    Add { to: u32, from: u32, immediate: u64 },
    /// Anything else.
    Other,
}

/// `width` bits of `word` at `shift`, sign-extended.
fn signed(word: u32, shift: u32, width: u32) -> i64 {
    let top = (word >> shift) << (32 - width);
    i64::from(i32::from_ne_bytes(top.to_ne_bytes()) >> (32 - width))
}

const SP: u32 = 31;

/// Decodes one instruction.
pub(super) fn decode(word: u32) -> Instruction {
    use Instruction::{Add, Address, Indirect, Jump, Other, Page, Push, PushRegister};
    let register = word & 31;
    let second = word >> 5 & 31;
    let immediate12 = u64::from(word >> 10 & 0xFFF) << if word >> 22 & 1 == 1 { 12 } else { 0 };
    if word & 0x7C00_0000 == 0x1400_0000 {
        return Jump(signed(word, 0, 26) * 4);
    }
    // B.cond; CBZ, CBNZ; TBZ, TBNZ.
    if word & 0xFF00_0010 == 0x5400_0000 || word & 0x7E00_0000 == 0x3400_0000 {
        return Jump(signed(word, 5, 19) * 4);
    }
    if word & 0x7E00_0000 == 0x3600_0000 {
        return Jump(signed(word, 5, 14) * 4);
    }
    // BR, BLR; also with pointer authentication.
    if word & 0xFF9F_0000 == 0xD61F_0000 && word >> 21 & 3 <= 1 {
        return Indirect;
    }
    // SUB SP, SP, #imm.
    if word & 0xFF80_0000 == 0xD100_0000 && register == SP && second == SP {
        return Push(immediate12);
    }
    // SUB SP, SP, Xm.
    if word & 0xFFE0_0000 == 0xCB20_0000 && register == SP && second == SP {
        return PushRegister;
    }
    // Pre-indexed STP of X, D and Q registers.
    for (pattern, scale) in [(0xA980_0000, 8), (0x6D80_0000, 8), (0xAD80_0000, 16)] {
        if word & 0xFFC0_0000 == pattern && second == SP {
            return Push((signed(word, 15, 7) * -scale).max(0).unsigned_abs());
        }
    }
    // Pre-indexed STR of X and D registers.
    if matches!(word & 0xFFE0_0C00, 0xF800_0C00 | 0xFC00_0C00) && second == SP {
        return Push((-signed(word, 12, 9)).max(0).unsigned_abs());
    }
    let offset21 = signed(word, 5, 19) << 2 | i64::from(word >> 29 & 3);
    match word & 0x9F00_0000 {
        0x9000_0000 => return Page { register, offset: offset21 << 12 },
        0x1000_0000 => return Address { register, offset: offset21 },
        _ => {}
    }
    if word & 0xFF80_0000 == 0x9100_0000 {
        return Add { to: register, from: second, immediate: immediate12 };
    }
    Other
}

#[cfg(test)]
mod tests {
    use super::*;
    use Instruction::{Add, Address, Indirect, Jump, Other, Page, Push, PushRegister};

    #[test]
    fn calls_and_branches_are_seen() {
        assert_eq!(decode(0x9400_0004), Jump(16), "bl .+16");
        assert_eq!(decode(0x97FF_FFFF), Jump(-4), "bl .-4");
        assert_eq!(decode(0x1400_0001), Jump(4), "b .+4");
        assert_eq!(decode(0x5400_0041), Jump(8), "b.ne .+8");
        assert_eq!(decode(0xB400_0060), Jump(12), "cbz x0, .+12");
        assert_eq!(decode(0x3638_0040), Jump(8), "tbz w0, #7, .+8");
        assert_eq!(decode(0xD63F_0100), Indirect, "blr x8");
        assert_eq!(decode(0xD61F_0120), Indirect, "br x9");
        assert_eq!(decode(0xD65F_03C0), Other, "ret");
    }

    #[test]
    fn frames_are_measured() {
        assert_eq!(decode(0xD101_03FF), Push(64), "sub sp, sp, #64");
        assert_eq!(decode(0xD140_0BFF), Push(0x2000), "sub sp, sp, #2, lsl #12");
        assert_eq!(decode(0xA9BA_7BFD), Push(96), "stp x29, x30, [sp, #-96]!");
        assert_eq!(decode(0xF81F_0FFE), Push(16), "str x30, [sp, #-16]!");
        assert_eq!(decode(0x6DBD_2FEA), Push(48), "stp d10, d11, [sp, #-48]!");
        assert_eq!(decode(0xCB29_63FF), PushRegister, "sub sp, sp, x9");
        assert_eq!(decode(0x9101_03FF), Add { to: 31, from: 31, immediate: 64 }, "add sp, sp, #64");
        assert_eq!(decode(0xA8C1_7BFD), Other, "ldp x29, x30, [sp], #16");
    }

    #[test]
    fn addresses_are_computed() {
        assert_eq!(decode(0xB000_0001), Page { register: 1, offset: 0x1000 });
        assert_eq!(decode(0x1000_0082), Address { register: 2, offset: 16 });
        assert_eq!(decode(0x9100_4041), Add { to: 1, from: 2, immediate: 16 });
    }
}
