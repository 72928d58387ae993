//! Calls that nobody knows, or that are malformed: they all get an answer, the right one, and nothing else.

use core::arch::asm;

use cca_abi::psci::{self, Code};
use cca_abi::rmi::{self, fid};
use cca_abi::{rmm_el3, smccc};

use crate::entry::{smc, smc_timed};
use crate::{check, expect, pool, secondary_start};

const SVE_HINT: u64 = 1 << 16;

/// Everything.
pub(crate) fn all() {
    unknown();
    services();
    malformed();
    entries();
}

/// Every owner, both widths, fast and yielding, with function numbers at the edges of what is known.
fn unknown() {
    const FUNCTIONS: [u64; 14] =
        [0x0FF, 0x14F, 0x18F, 0x190, 0x1AF, 0x1B0, 0x1B1, 0x1B4, 0x1BB, 0x1CE, 0x1CF, 0x2D0, 0x402, 0xFFFF];
    let mut wrong = None;
    for owner in 0..64 {
        for kind in [0, 1 << 30, 1 << 31, 3 << 30] {
            for function in FUNCTIONS {
                let call = kind | owner << 24 | function;
                let answer = smc_timed(call, [pool(1), 2, 3, 4, 5]).x;
                if answer[0] != smccc::NOT_SUPPORTED {
                    wrong = wrong.or(Some((call, answer[0])));
                }
            }
        }
    }
    answered("unknown-functions-are-refused", wrong);
}

/// What only the RMM may ask for, and 32-bit and reserved forms of what exists.
fn services() {
    let mut wrong = None;
    let reserved = (17..24).map(|bit| fid::VERSION | 1 << bit);
    let calls = [
        rmm_el3::fid::GTSI_DELEGATE,
        rmm_el3::fid::GTSI_UNDELEGATE,
        rmm_el3::fid::REQ_COMPLETE,
        // Without bit 30, without bit 31.
        fid::VERSION & !(1 << 30),
        fid::VERSION & !(1 << 31),
        fid::GRANULE_DELEGATE & !(1 << 30),
    ];
    for call in calls.into_iter().chain(reserved) {
        let answer = smc_timed(call, [rmi::VERSION_1_0, 0, 0, 0, 0]).x[0];
        if answer != smccc::NOT_SUPPORTED {
            wrong = wrong.or(Some((call, answer)));
        }
    }
    answered("other-worlds-functions-are-refused", wrong);
    let hinted = smc(fid::VERSION | SVE_HINT, rmi::VERSION_1_0, 0, 0)[0];
    expect("sve-hint-changes-nothing", hinted, 0);
    let hinted = smc(psci::fid::VERSION | SVE_HINT, 0, 0, 0)[0];
    expect("sve-hint-changes-nothing-for-psci", hinted, psci::VERSION_1_1);
}

/// Immediates other than zero, and identifiers with bits above 32: answered somehow, and the machine goes on.
fn malformed() {
    let (immediate, high): (u64, u64);
    // SAFETY: calls without effect on memory.
    unsafe {
        asm!(
            "smc #1", inout("x0") psci::fid::VERSION => immediate,
            out("x1") _, out("x2") _, out("x3") _, options(nostack)
        );
        asm!(
            "smc #0", inout("x0") psci::fid::VERSION | 0xABCD << 32 => high,
            out("x1") _, out("x2") _, out("x3") _, options(nostack)
        );
    }
    let known = |answer| matches!(answer, psci::VERSION_1_1 | smccc::NOT_SUPPORTED);
    answered("immediates-are-survived", (!known(immediate)).then_some((1, immediate)));
    answered("high-bits-are-survived", (!known(high)).then_some((psci::fid::VERSION, high)));
}

/// Where a CPU may not begin.
fn entries() {
    let good = secondary_start as *const () as u64;
    let delegated = pool(2);
    let status = smc(fid::GRANULE_DELEGATE, delegated, 0, 0)[0];
    let mut wrong = (status != 0).then_some((delegated, status));
    let cases = [0x0E00_0000, 0x0904_0000, 0x4010_0000, 0x418F_F000, delegated, 1 << 47, !3, good | 1];
    for entry in cases {
        for target in [1, 0] {
            let answer = smc(psci::fid::CPU_ON_64, target, entry, 0)[0];
            let there = smc(psci::fid::AFFINITY_INFO_64, target, 0, 0)[0] <= 2;
            let allowed = [Code::InvalidAddress, Code::AlreadyOn].map(Code::to_register);
            if there && (target == 1 && answer != allowed[0] || !allowed.contains(&answer)) {
                wrong = wrong.or(Some((entry, answer)));
            }
        }
    }
    let status = smc(fid::GRANULE_UNDELEGATE, delegated, 0, 0)[0];
    wrong = wrong.or((status != 0).then_some((delegated, status)));
    answered("entries-outside-of-the-hosts-memory-are-refused", wrong);
}

fn answered(name: &str, wrong: Option<(u64, u64)>) {
    match wrong {
        None => check(name, Ok(())),
        Some((what, answer)) => check(name, Err(format_args!("{what:#x} gave {answer:#x}"))),
    }
}
