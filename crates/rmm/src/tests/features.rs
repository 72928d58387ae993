//! SVE and PMU: what is offered, what a Realm may ask for, and what it then gets.

use cca_abi::rmi::{Features0, Status, fid};

use super::host::Host;
use crate::context::word;
use crate::platform::RealmExit;

const FLAGS: usize = 0x0;
const SVE_VL: usize = 0x10;
const COUNTERS: usize = 0x28;
const SVE: u64 = 1 << 1;
const PMU: u64 = 1 << 2;

/// REALM_CREATE with these parameters.
fn create(words: &[(usize, u64)]) -> Status {
    let host = Host::new();
    let (rd, rtt) = (host.delegated(), host.delegated());
    let mut all = Host::realm_words(rtt, 0, 7);
    all.extend_from_slice(words);
    host.status(fid::REALM_CREATE, &[rd, host.params(&all)])
}

#[test]
fn the_feature_register_says_what_the_cpu_has() {
    let features = Features0(Host::new().registers(fid::FEATURES, &[0])[1]);
    assert!(features.sve() && features.pmu());
    assert_eq!((features.sve_vl(), features.pmu_num_ctrs()), (15, 6));
    assert_eq!((features.num_bps(), features.num_wps()), (5, 3));
}

#[test]
fn a_vector_length_is_had_exactly_or_not_at_all() {
    for (vl, wanted) in [
        (0, Status::Success),
        (1, Status::Success),
        // 384 bits, which the CPU does not have.
        (2, Status::ErrorInput),
        (3, Status::Success),
        (15, Status::Success),
        (16, Status::ErrorInput),
        (0xFF, Status::ErrorInput),
    ] {
        assert_eq!(create(&[(FLAGS, SVE), (SVE_VL, vl)]), wanted, "{vl}");
        assert_eq!(create(&[(SVE_VL, vl)]), Status::Success, "{vl} without SVE is not looked at");
    }
}

#[test]
fn event_counters_are_had_or_refused() {
    for (counters, wanted) in [(1, Status::Success), (6, Status::Success)] {
        assert_eq!(create(&[(FLAGS, PMU), (COUNTERS, counters)]), wanted);
    }
    // None at all needs FEAT_HPMN0.
    for counters in [0, 7, 31, 0xFF] {
        assert_eq!(create(&[(FLAGS, PMU), (COUNTERS, counters)]), Status::ErrorInput);
        assert_eq!(create(&[(COUNTERS, counters)]), Status::Success);
    }
}

#[test]
fn a_rec_with_sve_has_memory_for_its_vectors() {
    for (vl, granules, high) in [(None, 1, 0), (Some(0), 2, 0x800), (Some(3), 2, 0x800), (Some(15), 3, 0)] {
        let host = Host::new();
        let realm = match vl {
            None => host.realm(),
            Some(vl) => host.realm_of(&[(FLAGS, SVE), (SVE_VL, vl)]),
        };
        assert_eq!(host.ok(fid::REC_AUX_COUNT, &[realm.rd])[0], granules);
        let rec = host.rec(&realm, 0, true);
        let ctx = host.ctx(&rec);
        let [low, second] = [word::SVE_Z, word::SVE_Z_HIGH].map(|n| ctx.get(n));
        match vl {
            None => assert_eq!((low, second), (0, 0)),
            Some(vl) => {
                assert_eq!(ctx.get(word::ZCR_EL2), vl);
                assert_eq!(low, rec.auxes[1]);
                assert_eq!(second, if high != 0 { low + high } else { rec.auxes[2] });
            }
        }
        host.ok(fid::REC_DESTROY, &[rec.rec]);
    }
}

#[test]
fn a_realms_monitors_trap_until_they_are_used_or_count() {
    const TRAPS: u64 = 3 << 5;
    const HPMN: u64 = 0x1F;
    let host = Host::new();
    let realm = host.realm_of(&[(FLAGS, PMU), (COUNTERS, 4)]);
    let rec = host.rec(&realm, 0, true);
    host.activate(&realm);
    host.guest(|ctx| {
        assert_eq!(ctx.get(word::MDCR_EL2) & (TRAPS | HPMN), TRAPS | 4);
        assert_eq!(ctx.get(word::PMUSERENR), 0);
        // MRS X5, PMCR_EL0
        RealmExit::Sync {
            esr: 0x18 << 26 | 3 << 20 | 9 << 10 | 12 << 1 | 3 << 14 | 5 << 5 | 1,
            far: 0,
            hpfar: 0,
        }
    });
    host.guest(|ctx| {
        assert_eq!(ctx.get(word::MDCR_EL2) & TRAPS, 0);
        ctx.set(word::PMCR, 0x61);
        ctx.set(word::PMCNTEN, 1);
        ctx.set(word::PMINTEN, 1);
        ctx.set(word::PMOVS, 1);
        RealmExit::Irq
    });
    assert_eq!(host.enter_ok(&rec).pmu_ovf_status, 1);
    // It counts: loaded at once.
    host.guest(|ctx| {
        assert_eq!(ctx.get(word::MDCR_EL2) & TRAPS, 0);
        ctx.set(word::PMOVS, 0);
        RealmExit::Irq
    });
    assert_eq!(host.enter_ok(&rec).pmu_ovf_status, 0);
    let loads = host.rmm.platform().pmu_loads.load(core::sync::atomic::Ordering::Relaxed);
    assert_eq!(loads, 2);
}

#[test]
fn without_a_pmu_all_counters_are_the_hosts_and_stopped() {
    let host = Host::new();
    let (_, rec) = host.active();
    host.guest(|ctx| {
        // TPM, TPMCR, HPMD, HCCD; not HPME; HPMN as large as it gets.
        let mdcr = ctx.get(word::MDCR_EL2);
        assert_eq!(mdcr & (3 << 5 | 1 << 17 | 1 << 23 | 1 << 7 | 0x1F), 3 << 5 | 1 << 17 | 1 << 23 | 6);
        assert_eq!(ctx.get(word::PMUSERENR), 1, "EL0's accesses come to the RMM");
        RealmExit::Irq
    });
    host.enter_ok(&rec);
}
