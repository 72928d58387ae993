use crate::undefined::{State, take};

const EL2H: u64 = 0x3C9;
const EL1H: u64 = 0x3C5;
const RW: u64 = 1 << 31;
const TGE: u64 = 1 << 27;
const E2H: u64 = 1 << 34;
/// SPAN: PSTATE.PAN stays as it is.
const SPAN: u64 = 1 << 23;

fn state(spsr: u64, hcr_el2: u64) -> State {
    State { spsr, hcr_el2, sctlr_el1: SPAN, sctlr_el2: SPAN, mte: false, nmi: false }
}

#[test]
fn each_level_takes_its_own_and_the_hypervisor_takes_the_rest() {
    // From, HCR_EL2: at EL2?, vector.
    let cases = [
        (0b1001, RW, true, 0x200),             // EL2h
        (0b1000, RW, true, 0x000),             // EL2t
        (0b0101, RW, false, 0x200),            // EL1h
        (0b0100, RW, false, 0x000),            // EL1t
        (0b0000, RW, false, 0x400),            // EL0
        (0b0000, RW | TGE | E2H, true, 0x400), // a host's process
        (0b1_0000, RW, false, 0x600),          // AArch32 process
        (0b1_0000, RW | TGE, true, 0x600),
        (0b1_0011, 0, true, 0x600), // AArch32 kernel
    ];
    for (spsr, hcr, el2, vector) in cases {
        let taken = take(&state(spsr, hcr));
        assert_eq!((taken.el2, taken.vector), (el2, vector), "{spsr:#x} {hcr:#x}");
        assert_eq!(taken.pstate, if el2 { EL2H } else { EL1H });
    }
}

#[test]
fn the_handler_starts_with_the_state_that_the_cpu_would_give_it() {
    let flags = 0xF << 28 | 1 << 24 | 1 << 22;
    // Flags, DIT and PAN stay; single step, IL, BTYPE, UAO and the like do not.
    let spsr = 0b0101 | flags | 1 << 21 | 1 << 20 | 0b11 << 10 | 1 << 23;
    assert_eq!(take(&state(spsr, RW)).pstate, EL1H | flags);
    let pan = State { sctlr_el1: 0, ..state(0b0000, RW) };
    assert_eq!(take(&pan).pstate, EL1H | 1 << 22);
    let ssbs = State { sctlr_el1: SPAN | 1 << 44, ..state(0b0000, RW) };
    assert_eq!(take(&ssbs).pstate, EL1H | 1 << 12);
    let tags = State { mte: true, nmi: true, ..state(0b1001, RW) };
    assert_eq!(take(&tags).pstate, EL2H | 1 << 25 | 1 << 13);
    let spurious = State { nmi: true, sctlr_el2: SPAN | 1 << 62, ..state(0b1001, RW) };
    assert_eq!(take(&spurious).pstate, EL2H);
}
