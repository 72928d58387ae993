//! Exceptions that the RMM makes a REC take at EL1.

use crate::config::field;
use crate::context::{RecContext, word};
use crate::platform::{El1, Platform};

/// ESR: instruction length bit.
const ESR_IL: u64 = 1 << 25;
const ESR_EC_SHIFT: u32 = 26;

const PSTATE_EL1H: u64 = 0b0101;
const PSTATE_DAIF: u64 = 0xF << 6;
const PSTATE_SSBS: u64 = 1 << 12;
const PSTATE_PAN: u64 = 1 << 22;
const PSTATE_DIT: u64 = 1 << 24;
const PSTATE_TCO: u64 = 1 << 25;
const PSTATE_NZCV: u64 = 0xF << 28;
const PSTATE_AARCH32: u64 = 1 << 4;

pub(crate) const SCTLR_M: u64 = 1;
const SCTLR_SPAN: u64 = 1 << 23;
const SCTLR_DSSBS: u64 = 1 << 44;

/// Exception class of an abort: from EL0; plus one from EL1.
const EC_INSTRUCTION_ABORT: u64 = 0x20;
const EC_DATA_ABORT: u64 = 0x24;

/// Fault status codes.
const FSC_EXTERNAL_ABORT: u64 = 0x10;
/// Address size fault: the level, except for this one.
const FSC_ADDRESS_SIZE_MINUS_1: u64 = 0x29;

/// Whether the REC was at EL0.
fn from_el0(pstate: u64) -> bool {
    pstate & 0xF == 0 || pstate & PSTATE_AARCH32 != 0
}

/// Offset of the synchronous vector for an exception taken with `pstate`.
fn vector(pstate: u64) -> u64 {
    if pstate & PSTATE_AARCH32 != 0 {
        0x600
    } else {
        match pstate & 0xF {
            0 => 0x400,
            4 => 0x000,
            _ => 0x200,
        }
    }
}

/// PSTATE after an exception to EL1 taken with `pstate`.
fn entry_pstate(pstate: u64, sctlr: u64, has_tco: bool) -> u64 {
    let pan = if sctlr & SCTLR_SPAN == 0 { PSTATE_PAN } else { pstate & PSTATE_PAN };
    let ssbs = if sctlr & SCTLR_DSSBS != 0 { PSTATE_SSBS } else { 0 };
    let tco = if has_tco { PSTATE_TCO } else { 0 };
    PSTATE_EL1H | PSTATE_DAIF | pan | ssbs | tco | pstate & (PSTATE_DIT | PSTATE_NZCV)
}

/// A synchronous exception into the loaded REC, at its PC.
fn take<P: Platform>(platform: &P, cpu: usize, ctx: &RecContext<'_>, esr: u64) {
    let pstate = ctx.get(word::PSTATE);
    let sctlr = platform.el1(cpu, ctx, El1::Sctlr);
    let has_tco = field(platform.facts().id.id_aa64pfr1, 8, 4) >= 2;
    platform.set_el1(cpu, ctx, El1::Esr, esr);
    platform.set_el1(cpu, ctx, El1::Elr, ctx.pc());
    platform.set_el1(cpu, ctx, El1::Spsr, pstate);
    let vbar = platform.el1(cpu, ctx, El1::Vbar);
    ctx.set(word::PC, vbar.wrapping_add(vector(pstate)));
    ctx.set(word::PSTATE, entry_pstate(pstate, sctlr, has_tco));
}

/// An Unknown (undefined instruction) exception at the PC.
pub(crate) fn undefined<P: Platform>(platform: &P, cpu: usize, ctx: &RecContext<'_>) {
    take(platform, cpu, ctx, ESR_IL);
}

/// A Synchronous External Abort for the access that `esr` and `far` (of the abort to EL2) describe.
pub(crate) fn external_abort<P: Platform>(
    platform: &P,
    cpu: usize,
    ctx: &RecContext<'_>,
    esr: u64,
    far: u64,
) {
    const EA: u64 = 1 << 9;
    abort(platform, cpu, ctx, esr, far, EA | FSC_EXTERNAL_ABORT);
}

/// An Address Size Fault for an access beyond the Realm's address space, at the given level of stage 1.
pub(crate) fn address_size_fault<P: Platform>(
    platform: &P,
    cpu: usize,
    ctx: &RecContext<'_>,
    esr: u64,
    far: u64,
    level: i64,
) {
    abort(platform, cpu, ctx, esr, far, u64::try_from(level).unwrap_or(FSC_ADDRESS_SIZE_MINUS_1));
}

fn abort<P: Platform>(platform: &P, cpu: usize, ctx: &RecContext<'_>, esr: u64, far: u64, fault: u64) {
    platform.set_el1(cpu, ctx, El1::Far, far);
    take(platform, cpu, ctx, abort_syndrome(ctx.get(word::PSTATE), esr, fault));
}

/// ESR_EL1 of an abort: what is the Realm's own business (IL, SET, WnR, CM) and the fault given.
fn abort_syndrome(pstate: u64, esr: u64, fault: u64) -> u64 {
    const KEPT: u64 = ESR_IL | 3 << 11 | 1 << 8 | 1 << 6;
    let is_data = field(esr, ESR_EC_SHIFT, 6) == EC_DATA_ABORT;
    let lower = if is_data { EC_DATA_ABORT } else { EC_INSTRUCTION_ABORT };
    let class = lower + u64::from(!from_el0(pstate));
    class << ESR_EC_SHIFT | esr & KEPT | fault
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_are_chosen_by_the_interrupted_state() {
        assert_eq!(vector(0x3C5), 0x200);
        assert_eq!(vector(0x3C4), 0x000);
        assert_eq!(vector(0), 0x400);
        assert_eq!(vector(0x10), 0x600);
    }

    #[test]
    fn pan_is_set_when_the_realm_does_not_keep_it() {
        assert_eq!(entry_pstate(0, 0, false), 0x3C5 | PSTATE_PAN);
        assert_eq!(entry_pstate(PSTATE_NZCV | 1 << 21 | 1 << 20, SCTLR_SPAN, false), 0x3C5 | PSTATE_NZCV);
        assert_eq!(entry_pstate(0, SCTLR_SPAN | SCTLR_DSSBS, true), 0x3C5 | PSTATE_SSBS | PSTATE_TCO);
    }

    #[test]
    fn an_external_abort_names_the_level_it_came_from_and_no_register() {
        // A load to X5 by an EL1 instruction, translation fault at level 3.
        let esr = 0x24 << 26 | ESR_IL | 1 << 24 | 3 << 22 | 5 << 16 | 1 << 15 | 0x07;
        assert_eq!(abort_syndrome(0x3C5, esr, 1 << 9 | 0x10), 0x9600_0210);
        assert_eq!(abort_syndrome(0, esr, 1 << 9 | 0x10), 0x9200_0210);
        assert_eq!(abort_syndrome(0x3C5, 0x20 << 26 | ESR_IL | 0x07, 1 << 9 | 0x10), 0x8600_0210);
    }
}
