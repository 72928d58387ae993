//! What EL3 does with an exception that should not have come to it: the instruction is undefined for whoever tried
//! it, and its own exception level, or the hypervisor above it, gets told.
//!
//! This happens when a world uses a feature that EL3 does not enable for it. It is that world's problem, not the
//! machine's.

/// ESR of "unknown reason", for a 32-bit instruction.
pub const ESR_UNKNOWN: u64 = 1 << 25;

/// Where and how the exception is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// At EL2; otherwise at EL1.
    pub el2: bool,
    /// Offset of the vector.
    pub vector: u64,
    /// SPSR_EL3 that enters the handler.
    pub pstate: u64,
}

/// What decides.
#[derive(Clone, Copy, Debug, Default)]
pub struct State {
    /// SPSR_EL3: where it came from.
    pub spsr: u64,
    /// HCR_EL2.
    pub hcr_el2: u64,
    /// SCTLR_EL1.
    pub sctlr_el1: u64,
    /// SCTLR_EL2.
    pub sctlr_el2: u64,
    /// The CPU has tag checks that can be overridden.
    pub mte: bool,
    /// The CPU has non-maskable interrupts.
    pub nmi: bool,
}

const AARCH32: u64 = 1 << 4;
const HCR_TGE: u64 = 1 << 27;
const HCR_RW: u64 = 1 << 31;
const HCR_E2H: u64 = 1 << 34;

/// Takes an exception from below EL3 as "undefined instruction".
pub fn take(state: &State) -> Taken {
    let from = state.spsr >> 2 & 3;
    let aarch32 = state.spsr & AARCH32 != 0;
    // Levels of AArch32 modes: user mode is EL0, everything else EL1 (EL2 has none here).
    let (from, on_own_stack) =
        if aarch32 { (u64::from(state.spsr & 0xF != 0), true) } else { (from, state.spsr & 1 == 1) };
    let tge = state.hcr_el2 & HCR_TGE != 0;
    // An EL1 that is AArch32 takes nothing in AArch64.
    let el2 = from == 2 || tge || state.hcr_el2 & HCR_RW == 0;
    let same_level = from == if el2 { 2 } else { 1 };
    let vector = match (same_level, aarch32, on_own_stack) {
        (true, _, false) => 0x000,
        (true, _, true) => 0x200,
        (false, false, _) => 0x400,
        (false, true, _) => 0x600,
    };
    let sctlr = if el2 { state.sctlr_el2 } else { state.sctlr_el1 };
    // N, Z, C, V, DIT and PAN stay; D, A, I, F are masked; EL2h or EL1h.
    let mut pstate = state.spsr & (0xF << 28 | 1 << 24 | 1 << 22);
    if aarch32 {
        // DIT and PAN are elsewhere in an AArch32 SPSR.
        pstate = state.spsr & (0xF << 28 | 1 << 22) | (state.spsr >> 21 & 1) << 24;
    }
    pstate |= 0b1111 << 6 | if el2 { 0b1001 } else { 0b0101 };
    let host_regime = !el2 || state.hcr_el2 & HCR_E2H != 0 && tge;
    if host_regime && sctlr >> 23 & 1 == 0 {
        pstate |= 1 << 22;
    }
    if sctlr >> 44 & 1 == 1 {
        pstate |= 1 << 12;
    }
    if state.mte {
        pstate |= 1 << 25;
    }
    if state.nmi && sctlr >> 62 & 1 == 0 {
        pstate |= 1 << 13;
    }
    Taken { el2, vector, pstate }
}
