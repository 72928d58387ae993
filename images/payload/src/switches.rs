//! All registers on both sides of every switch: full of values before each kind of call, compared after it.

use cca_abi::rmi::fid;
use cca_abi::{psci, rmi, rmm_el3, smccc};

use crate::entry::smc_timed;
use crate::guest::Guest;
use crate::{check, pool, registers, smc_all, vectors};

/// A granule that is given away and taken back.
const GRANULE: u64 = 600;

pub(crate) fn all() {
    general();
    let plain: [(&str, &str, &dyn Fn()); 3] = [
        ("version-keeps-system-registers", "version-keeps-vectors", &|| {
            smc_timed(fid::VERSION, [rmi::VERSION_1_0, 0, 0, 0, 0]);
        }),
        ("delegate-keeps-system-registers", "delegate-keeps-vectors", &|| {
            smc_timed(fid::GRANULE_DELEGATE, [pool(GRANULE), 0, 0, 0, 0]);
            smc_timed(fid::GRANULE_UNDELEGATE, [pool(GRANULE), 0, 0, 0, 0]);
        }),
        ("psci-keeps-system-registers", "psci-keeps-vectors", &|| {
            smc_timed(psci::fid::AFFINITY_INFO_64, [0; 5]);
        }),
    ];
    for (registers, vectors, call) in plain {
        registers::survive(registers, false, call);
        vectors::survive(vectors, call);
    }
    let guest = Guest::new(|create| {
        registers::survive("hashing-keeps-system-registers", false, &mut *create);
        vectors::survive("hashing-keeps-vectors", create);
    });
    let Some(guest) = guest else { return };
    let filled = guest.fill(1);
    if filled.iter().all(|&word| word == 0) {
        check("realm-fills-its-registers", Err(format_args!("it told nothing")));
    }
    registers::survive("realm-keeps-the-hosts-registers", true, || {
        guest.dump();
        guest.fill(2);
    });
    vectors::survive("realm-keeps-the-hosts-vectors", || {
        guest.dump();
        guest.fill(3);
    });
    vectors::nothing_above("realm-leaves-nothing-above-the-vector-length", || {
        guest.fill(4);
    });
    // The other side: whatever the host writes, the Realm finds what it wrote itself.
    let filled = guest.fill(5);
    let mut lost = None;
    let mut look = || {
        let found = guest.dump();
        lost = lost.or((0..found.len()).find(|&n| filled[n] != found[n]).map(|n| (n, filled[n], found[n])));
    };
    registers::survive("realm-keeps-the-hosts-registers-again", true, &mut look);
    vectors::survive("realm-keeps-the-hosts-vectors-again", &mut look);
    match lost {
        None => check("realm-keeps-its-own-registers", Ok(())),
        Some((n, wanted, got)) => {
            check(
                "realm-keeps-its-own-registers",
                Err(format_args!("word {n}: {wanted:#x} became {got:#x}")),
            );
        }
    }
    guest.destroy();
}

/// x0 to x30: what is no result comes back as it was, and no result register holds anything but a result, zero, or what
/// the caller had there.
fn general() {
    /// A call, its argument, and how many results it has.
    type Case = (u64, u64, usize);
    let cases: [Case; 9] = [
        (fid::VERSION, rmi::VERSION_1_0, 3),
        (fid::FEATURES, 0, 2),
        (fid::GRANULE_DELEGATE, pool(GRANULE), 1),
        (fid::GRANULE_UNDELEGATE, pool(GRANULE), 1),
        (fid::GRANULE_DELEGATE, 1, 1),
        (psci::fid::VERSION, 0, 1),
        (smccc::VERSION, 0, 1),
        (rmm_el3::fid::GTSI_DELEGATE, pool(GRANULE), 1),
        (0xC300_FF42, 0, 1),
    ];
    let mut wrong = None;
    for (fid, argument, results) in cases {
        let given: [u64; 31] = core::array::from_fn(|n| match n {
            0 => fid,
            1 => argument,
            _ => registers::pattern(n),
        });
        let mut now = given;
        // SAFETY: the calls touch only memory of the pool, and all registers are given back.
        unsafe { smc_all(&raw mut now) };
        let strange = (results..31).find(|&n| now[n] != given[n] && (n > 3 || now[n] != 0));
        wrong = wrong.or(strange.map(|n| (fid, n, now[n])));
    }
    match wrong {
        None => check("calls-keep-general-registers", Ok(())),
        Some((fid, n, value)) => {
            check("calls-keep-general-registers", Err(format_args!("{fid:#x} left {value:#x} in x{n}")));
        }
    }
}
