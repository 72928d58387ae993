//! RMI, command by command, as in the specification: failure conditions by their labels, orderings, effects,
//! footprints. [`super::table`] says how the tables are tried.

use cca_abi::rmi::fid;
use std::vec;
use std::vec::Vec;

use super::host::{Host, SHARED};
use super::std;
use super::table::{Command, Failure, INPUT, OUTSIDE, REALM, REALM_1, REC, World, check, fails, rtt};
use crate::GranuleState as State;

/// The three conditions of an RD argument in X1.
const RD_ALIGN: Failure = fails("rd_align", |w| w.args[0] |= 8, INPUT);
const RD_BOUND: Failure = fails("rd_bound", |w| w.args[0] = OUTSIDE, INPUT);
const RD_STATE: Failure = fails("rd_state", |w| w.args[0] = w.fresh2, INPUT);
const RD: &[&str] = &["rd_align", "rd_bound", "rd_state"];

fn nothing(_: &World) -> Vec<u64> {
    vec![]
}

fn no_effect(_: &World) {}

const GRANULE_DELEGATE: Command = Command {
    name: "GRANULE_DELEGATE",
    fid: fid::GRANULE_DELEGATE,
    ready: |w| w.args[0] = w.ns,
    outputs: nothing,
    footprint: |w| vec![w.ns],
    effects: |w| {
        assert_eq!(w.host.state(w.ns), State::Delegated);
        assert!(w.host.rmm.platform().is_realm_owned(w.ns), "the GPT entry is GPT_REALM");
    },
    failures: &[
        fails("gran_align", |w| w.args[0] |= 8, INPUT),
        fails("gran_bound", |w| w.args[0] = OUTSIDE, INPUT),
        fails("gran_state", |w| w.args[0] = w.fresh, INPUT),
        fails(
            "gran_gpt",
            |w| crate::platform::Platform::delegate(w.host.rmm.platform(), w.ns).unwrap_or(()),
            INPUT,
        ),
    ],
    order: &[],
};

const GRANULE_UNDELEGATE: Command = Command {
    name: "GRANULE_UNDELEGATE",
    fid: fid::GRANULE_UNDELEGATE,
    ready: |w| w.args[0] = w.fresh,
    outputs: nothing,
    footprint: |w| vec![w.fresh],
    effects: |w| {
        assert_eq!(w.host.state(w.fresh), State::Undelegated);
        assert!(!w.host.rmm.platform().is_realm_owned(w.fresh));
    },
    failures: &[
        fails("gran_align", |w| w.args[0] |= 8, INPUT),
        fails("gran_bound", |w| w.args[0] = OUTSIDE, INPUT),
        fails("gran_state: UNDELEGATED", |w| w.args[0] = w.ns, INPUT),
        fails("gran_state: RD", |w| w.args[0] = w.realm.rd, INPUT),
        fails("gran_state: REC", |w| w.args[0] = w.recs[0].rec, INPUT),
        fails("gran_state: REC_AUX", |w| w.args[0] = w.recs[0].aux, INPUT),
        fails("gran_state: DATA", |w| w.args[0] = w.data[0], INPUT),
        fails("gran_state: RTT", |w| w.args[0] = w.realm.rtt, INPUT),
    ],
    order: &[],
};

const DATA_CREATE: Command = Command {
    name: "DATA_CREATE",
    fid: fid::DATA_CREATE,
    ready: |w| w.args[..5].copy_from_slice(&[w.realm.rd, w.fresh, 0x1000, w.ns, 1]),
    outputs: nothing,
    // The RD for its measurement.
    footprint: |w| vec![w.realm.rd, w.fresh, w.table(0x1000, 3)],
    effects: |w| {
        assert_eq!(w.host.state(w.fresh), State::Data);
        assert_eq!(w.entry(0x1000, 3), [3, 1, w.fresh, 1]);
    },
    failures: &[
        fails("src_align", |w| w.args[3] |= 8, INPUT),
        fails("src_bound", |w| w.args[3] = OUTSIDE, INPUT),
        fails("src_pas", |w| w.args[3] = w.fresh2, INPUT),
        fails(
            "src_pas: behind the RMM's back",
            |w| crate::platform::Platform::delegate(w.host.rmm.platform(), w.ns).unwrap_or(()),
            INPUT,
        ),
        fails("data_align", |w| w.args[1] |= 8, INPUT),
        fails("data_bound", |w| w.args[1] = OUTSIDE, INPUT),
        fails("data_state", |w| w.args[1] = w.ns2, INPUT),
        fails("data_bound2", |w| w.args[1] = w.host.high(), INPUT),
        RD_ALIGN,
        RD_BOUND,
        RD_STATE,
        fails("rd is data", |w| w.args[0] = w.args[1], INPUT),
        fails("ipa_align", |w| w.args[2] |= 8, INPUT),
        fails("ipa_bound", |w| w.args[2] |= SHARED, INPUT),
        fails("realm_state", |w| w.activate(), REALM),
        fails("rtt_walk", |w| w.args[2] |= 0x4000_0000, rtt(1)),
        fails("rtte_state", |w| w.args[2] = w.args[2] & !0x1FFF | 0x2000, rtt(3)),
    ],
    order: &[(RD, &["realm_state", "rtt_walk", "rtte_state"]), (&["ipa_bound"], &["rtt_walk", "rtte_state"])],
};

const DATA_CREATE_UNKNOWN: Command = Command {
    name: "DATA_CREATE_UNKNOWN",
    fid: fid::DATA_CREATE_UNKNOWN,
    ready: |w| {
        w.activate();
        w.args[..3].copy_from_slice(&[w.realm.rd, w.fresh, 0x1000]);
    },
    outputs: nothing,
    footprint: |w| vec![w.fresh, w.table(0x1000, 3)],
    effects: |w| {
        assert_eq!(w.host.state(w.fresh), State::Data);
        assert_eq!(w.entry(0x1000, 3), [3, 1, w.fresh, 1]);
    },
    failures: &[
        fails("data_align", |w| w.args[1] |= 8, INPUT),
        fails("data_bound", |w| w.args[1] = OUTSIDE, INPUT),
        fails("data_state", |w| w.args[1] = w.ns2, INPUT),
        fails("data_bound2", |w| w.args[1] = w.host.high(), INPUT),
        RD_ALIGN,
        RD_BOUND,
        RD_STATE,
        fails("ipa_align", |w| w.args[2] |= 8, INPUT),
        fails("ipa_bound", |w| w.args[2] |= SHARED, INPUT),
        fails("rtt_walk", |w| w.args[2] |= 0x4000_0000, rtt(1)),
        fails("rtte_state", |w| w.args[2] = w.args[2] & !0x1FFF | 0x2000, rtt(3)),
    ],
    order: &[(RD, &["rtt_walk", "rtte_state"]), (&["ipa_bound"], &["rtt_walk", "rtte_state"])],
};

const DATA_DESTROY: Command = Command {
    name: "DATA_DESTROY",
    fid: fid::DATA_DESTROY,
    ready: |w| {
        w.activate();
        w.args[..2].copy_from_slice(&[w.realm.rd, 0x2000]);
    },
    // The next live entry.
    outputs: |w| vec![w.data[0], 0x4000],
    footprint: |w| vec![w.data[0], w.table(0x2000, 3)],
    effects: |w| {
        assert_eq!(w.host.state(w.data[0]), State::Delegated);
        assert_eq!(w.entry(0x2000, 3), [3, 0, 0, 2], "DESTROYED");
    },
    failures: &[
        RD_ALIGN,
        RD_BOUND,
        RD_STATE,
        fails("ipa_align", |w| w.args[1] |= 8, INPUT),
        fails("ipa_bound", |w| w.args[1] |= SHARED, INPUT),
        Failure("rtt_walk", |w| w.args[1] |= 0x4000_0000, rtt(1), |_| [0, SHARED, 0, 0]),
        Failure("rtte_state", |w| w.args[1] &= !0x3000, rtt(3), |_| [0, 0x2000, 0, 0]),
    ],
    order: &[(RD, &["rtt_walk", "rtte_state"]), (&["ipa_bound"], &["rtt_walk", "rtte_state"])],
};

const PSCI_COMPLETE: Command = Command {
    name: "PSCI_COMPLETE",
    fid: fid::PSCI_COMPLETE,
    ready: |w| {
        w.activate();
        // REC 0 turns REC 1 on.
        w.host.guest_smc(cca_abi::psci::fid::CPU_ON_64, &[1, 0x8000, 0xC0]);
        assert_eq!(w.host.enter_ok(&w.recs[0]).exit_reason, 3);
        w.args[..3].copy_from_slice(&[w.recs[0].rec, w.recs[1].rec, 0]);
    },
    outputs: nothing,
    footprint: |w| vec![w.recs[0].rec, w.recs[0].aux, w.recs[1].rec, w.recs[1].aux],
    effects: |w| {
        let caller = w.host.ctx(&w.recs[0]);
        assert_eq!((0..4).map(|n| caller.gpr(n)).collect::<Vec<_>>(), [0; 4]);
        let target = w.host.ctx(&w.recs[1]);
        assert_eq!((target.pc(), target.gpr(0)), (0x8000, 0xC0));
        assert!((1..31).all(|n| target.gpr(n) == 0));
        assert_eq!(w.host.enter_ok(&w.recs[1]).exit_reason, 1, "it runs");
        assert_eq!(w.host.enter_ok(&w.recs[0]).exit_reason, 1, "the request is over");
    },
    failures: &[
        fails("alias", |w| w.args[1] = w.args[0], INPUT),
        fails("calling_align", |w| w.args[0] |= 8, INPUT),
        fails("calling_bound", |w| w.args[0] = OUTSIDE, INPUT),
        fails("calling_state", |w| w.args[0] = w.fresh, INPUT),
        fails("target_align", |w| w.args[1] |= 8, INPUT),
        fails("target_bound", |w| w.args[1] = OUTSIDE, INPUT),
        fails("target_state", |w| w.args[1] = w.fresh2, INPUT),
        fails("pending", |w| w.args.swap(0, 1), INPUT),
        fails("owner", |w| w.args[1] = w.other.1.rec, INPUT),
        fails(
            "target",
            |w| {
                w.host.ctx(&w.recs[0]).set_gpr(1, 0);
            },
            INPUT,
        ),
        fails("status", |w| w.args[2] = 1, INPUT),
        fails("status: ALREADY_ON is not the host's to say", |w| w.args[2] = u64::MAX - 3, INPUT),
    ],
    order: &[],
};

const REALM_ACTIVATE: Command = Command {
    name: "REALM_ACTIVATE",
    fid: fid::REALM_ACTIVATE,
    ready: |w| w.args[0] = w.realm.rd,
    outputs: nothing,
    footprint: |w| vec![w.realm.rd],
    effects: |w| assert_eq!(w.host.enter_ok(&w.recs[0]).exit_reason, 1, "its RECs run"),
    failures: &[RD_ALIGN, RD_BOUND, RD_STATE, fails("realm_state", |w| w.activate(), REALM)],
    order: &[(RD, &["realm_state"])],
};

const REALM_DESTROY: Command = Command {
    name: "REALM_DESTROY",
    fid: fid::REALM_DESTROY,
    ready: |w| {
        w.host.ok(fid::REC_DESTROY, &[w.other.1.rec]);
        w.args[0] = w.other.0.rd;
    },
    outputs: nothing,
    footprint: |w| vec![w.other.0.rd, w.other.0.rtt],
    effects: |w| {
        assert_eq!(w.host.state(w.other.0.rd), State::Delegated);
        assert_eq!(w.host.state(w.other.0.rtt), State::Delegated);
        w.host.realm_with(0, 8);
    },
    failures: &[
        RD_ALIGN,
        RD_BOUND,
        RD_STATE,
        fails(
            "realm_live: a REC",
            |w| {
                w.host.rec(&w.other.0, 1, true);
            },
            REALM,
        ),
        fails("realm_live: a table", |w| w.host.tables(&w.other.0, 0, 2), REALM),
    ],
    order: &[(RD, &["realm_live: a REC", "realm_live: a table"])],
};

const REALM_CREATE: Command = Command {
    name: "REALM_CREATE",
    fid: fid::REALM_CREATE,
    ready: |w| {
        w.write(&Host::realm_words(w.fresh, 0, 9));
        let rd = w.host.delegated();
        w.args[..2].copy_from_slice(&[rd, w.params]);
    },
    outputs: nothing,
    footprint: |w| vec![w.args[0], w.fresh],
    effects: |w| {
        assert_eq!(w.host.state(w.args[0]), State::Rd);
        assert_eq!(w.host.state(w.fresh), State::Rtt);
        for (ipa, ripas) in [(0, 0), (SHARED, 0)] {
            assert_eq!(w.host.ok(fid::RTT_READ_ENTRY, &[w.args[0], ipa, 1]), [1, 0, 0, ripas]);
        }
    },
    failures: &[
        fails("params_align", |w| w.args[1] |= 8, INPUT),
        fails("params_bound", |w| w.args[1] = OUTSIDE, INPUT),
        fails("params_pas", |w| w.args[1] = w.fresh2, INPUT),
        fails("params_valid: hash_algo", |w| w.write(&[(0x30, 2)]), INPUT),
        fails("params_supp: s2sz too wide", |w| w.write(&[(0x8, 53)]), INPUT),
        fails(
            "params_supp: s2sz too wide without LPA2",
            |w| w.write(&[(0x8, 49), (0x810, 0), (0x818, 2)]),
            INPUT,
        ),
        fails("params_supp: s2sz too narrow", |w| w.write(&[(0x8, 31)]), INPUT),
        fails("params_supp: sve_vl", |w| w.write(&[(0x0, 2), (0x10, 15 + 1)]), INPUT),
        fails("params_supp: pmu_num_ctrs", |w| w.write(&[(0x0, 4), (0x28, 31)]), INPUT),
        fails("params_supp: num_bps", |w| w.write(&[(0x18, 6)]), INPUT),
        fails("params_supp: num_bps reserved", |w| w.write(&[(0x18, 0)]), INPUT),
        fails("params_supp: num_wps", |w| w.write(&[(0x20, 4)]), INPUT),
        fails("params_supp: num_wps reserved", |w| w.write(&[(0x20, 0)]), INPUT),
        fails("alias", |w| w.write(&[(0x808, w.args[0] & !0xFFF)]), INPUT),
        fails("rd_align", |w| w.args[0] |= 8, INPUT),
        fails("rd_bound", |w| w.args[0] = OUTSIDE, INPUT),
        fails("rd_state", |w| w.args[0] = w.ns2, INPUT),
        fails("rtt_align", |w| w.write(&[(0x808, w.fresh | 8)]), INPUT),
        fails("rtt_num_level: too many tables", |w| w.write(&[(0x818, 2)]), INPUT),
        fails("rtt_num_level: none", |w| w.write(&[(0x818, 0)]), INPUT),
        fails("rtt_num_level: start level", |w| w.write(&[(0x810, 3)]), INPUT),
        fails("rtt_num_level: level -1 without LPA2", |w| w.write(&[(0x810, u64::MAX)]), INPUT),
        fails("rtt_state", |w| w.write(&[(0x808, w.ns)]), INPUT),
        fails("rtt_state: not delegable", |w| w.write(&[(0x808, OUTSIDE)]), INPUT),
        fails("rtt_state: beyond the address space", |w| w.write(&[(0x808, !0xFFF)]), INPUT),
        fails("vmid_valid: in use", |w| w.write(&[(0x800, 7)]), INPUT),
    ],
    order: &[],
};

const REC_AUX_COUNT: Command = Command {
    name: "REC_AUX_COUNT",
    fid: fid::REC_AUX_COUNT,
    ready: |w| w.args[0] = w.realm.rd,
    outputs: |_| vec![1],
    footprint: nothing,
    effects: no_effect,
    failures: &[RD_ALIGN, RD_BOUND, RD_STATE],
    order: &[],
};

const REC_CREATE: Command = Command {
    name: "REC_CREATE",
    fid: fid::REC_CREATE,
    ready: |w| {
        let aux = w.host.delegated();
        w.write(&Host::rec_words(&[aux], 2));
        w.write(&[(0, 1)]);
        w.args[..4].copy_from_slice(&[w.realm.rd, w.fresh, w.params, 0]);
        w.args[9] = aux;
    },
    outputs: nothing,
    footprint: |w| vec![w.realm.rd, w.fresh, w.args[9]],
    effects: |w| {
        assert_eq!(w.host.state(w.fresh), State::Rec);
        assert_eq!(w.host.state(w.args[9]), State::RecAux);
        w.activate();
        w.host.ok(fid::REC_ENTER, &[w.fresh, w.ns2]);
    },
    failures: &[
        fails("params_align", |w| w.args[2] |= 8, INPUT),
        fails("params_bound", |w| w.args[2] = OUTSIDE, INPUT),
        fails("params_pas", |w| w.args[2] = w.fresh2, INPUT),
        fails("rec_align", |w| w.args[1] |= 8, INPUT),
        fails("rec_bound", |w| w.args[1] = OUTSIDE, INPUT),
        fails("rec_state", |w| w.args[1] = w.ns2, INPUT),
        RD_ALIGN,
        RD_BOUND,
        RD_STATE,
        fails("realm_state", |w| w.activate(), REALM),
        fails("mpidr_index: one too far", |w| w.write(&[(0x100, 3)]), INPUT),
        fails("mpidr_index: again", |w| w.write(&[(0x100, 1)]), INPUT),
        fails("num_aux: none", |w| w.write(&[(0x800, 0)]), INPUT),
        fails(
            "num_aux: two",
            |w| {
                let second = w.host.delegated();
                w.write(&[(0x800, 2), (0x810, second)]);
            },
            INPUT,
        ),
        fails("num_aux: more than a list holds", |w| w.write(&[(0x800, 17)]), INPUT),
        fails("aux_align", |w| w.write(&[(0x808, w.args[9] | 8)]), INPUT),
        fails("aux_alias: the REC", |w| w.write(&[(0x808, w.fresh)]), INPUT),
        fails("aux_alias: the RD", |w| w.write(&[(0x808, w.realm.rd)]), INPUT),
        fails("aux_state", |w| w.write(&[(0x808, w.ns2)]), INPUT),
        fails("aux_state: not delegable", |w| w.write(&[(0x808, OUTSIDE)]), INPUT),
    ],
    order: &[(RD, &["realm_state"])],
};

const REC_DESTROY: Command = Command {
    name: "REC_DESTROY",
    fid: fid::REC_DESTROY,
    ready: |w| {
        w.activate();
        w.args[0] = w.recs[0].rec;
    },
    outputs: nothing,
    // The RD for its count.
    footprint: |w| vec![w.recs[0].rec, w.recs[0].aux, w.realm.rd],
    effects: |w| {
        assert_eq!(w.host.state(w.recs[0].rec), State::Delegated);
        assert_eq!(w.host.state(w.recs[0].aux), State::Delegated);
    },
    failures: &[
        fails("rec_align", |w| w.args[0] |= 8, INPUT),
        fails("rec_bound", |w| w.args[0] = OUTSIDE, INPUT),
        fails("rec_gran_state", |w| w.args[0] = w.fresh, INPUT),
        // Its count says that it runs.
        fails("rec_state", |w| w.set_running(true), REC),
    ],
    order: &[(&["rec_bound", "rec_gran_state"], &["rec_state"])],
};

const REC_ENTER: Command = Command {
    name: "REC_ENTER",
    fid: fid::REC_ENTER,
    ready: |w| {
        w.activate();
        w.args[..2].copy_from_slice(&[w.recs[0].rec, w.recs[0].run]);
    },
    outputs: nothing,
    footprint: World::rec_granules,
    effects: no_effect,
    failures: &[
        fails("run_align", |w| w.args[1] |= 8, INPUT),
        fails("run_bound", |w| w.args[1] = OUTSIDE, INPUT),
        fails("run_pas", |w| w.args[1] = w.fresh2, INPUT),
        fails("rec_align", |w| w.args[0] |= 8, INPUT),
        fails("rec_bound", |w| w.args[0] = OUTSIDE, INPUT),
        fails("rec_gran_state", |w| w.args[0] = w.fresh, INPUT),
        fails(
            "realm_new",
            |w| {
                if w.args[0] == w.recs[0].rec {
                    w.args[0] = w.other.1.rec;
                }
            },
            REALM,
        ),
        fails(
            "system_off",
            |w| {
                w.host.guest_smc(cca_abi::psci::fid::SYSTEM_OFF, &[]);
                w.host.enter(&w.recs[0]);
            },
            REALM_1,
        ),
        fails("rec_state", |w| w.set_running(true), REC),
        fails(
            "rec_runnable",
            |w| {
                if w.args[0] == w.recs[0].rec {
                    w.args[0] = w.recs[1].rec;
                }
            },
            REC,
        ),
        fails("rec_mmio", |w| w.host.write_ns_word(w.recs[0].run, 0, 1), REC),
        fails("rec_gicv3: hcr", |w| w.host.write_ns_word(w.recs[0].run, 0x300, 1), REC),
        fails("rec_gicv3: lr", |w| w.host.write_ns_word(w.recs[0].run, 0x308, 1 << 61), REC),
        fails(
            "rec_psci",
            |w| {
                w.host.guest_smc(cca_abi::psci::fid::AFFINITY_INFO_64, &[1, 0]);
                w.host.enter(&w.recs[0]);
            },
            REC,
        ),
    ],
    order: &[(
        &["rec_align", "rec_bound", "rec_gran_state", "run_align", "run_bound", "run_pas"],
        &[
            "realm_new",
            "system_off",
            "rec_state",
            "rec_runnable",
            "rec_mmio",
            "rec_gicv3: hcr",
            "rec_gicv3: lr",
            "rec_psci",
        ],
    )],
};

const LEVEL_BOUND: Failure = fails("level_bound: the start level", |w| w.set_level(1), INPUT);
const LEVEL_BOUND_4: Failure = fails("level_bound: 4", |w| w.set_level(4), INPUT);
const LEVEL_BOUND_NEGATIVE: Failure = fails("level_bound: -1", |w| w.set_level(u64::MAX), INPUT);
const LEVEL: &[&str] = &["level_bound: the start level", "level_bound: 4", "level_bound: -1", "ipa_bound"];

const RTT_CREATE: Command = Command {
    name: "RTT_CREATE",
    fid: fid::RTT_CREATE,
    ready: |w| {
        w.activate();
        w.level_at = 3;
        w.args[..4].copy_from_slice(&[w.realm.rd, w.fresh, 0x40_0000, 3]);
    },
    outputs: nothing,
    footprint: |w| vec![w.fresh, w.table(0x40_0000, 2)],
    effects: |w| {
        assert_eq!(w.host.state(w.fresh), State::Rtt);
        assert_eq!(w.entry(0x40_0000, 2), [2, 2, w.fresh, 0]);
        assert_eq!(w.entry(0x40_0000, 3), [3, 0, 0, 0]);
    },
    failures: &[
        RD_ALIGN,
        RD_BOUND,
        RD_STATE,
        LEVEL_BOUND,
        LEVEL_BOUND_4,
        LEVEL_BOUND_NEGATIVE,
        fails("ipa_align", |w| w.args[2] |= 0x1000, INPUT),
        fails("ipa_bound", |w| w.args[2] |= SHARED * 2, INPUT),
        fails("rtt_align", |w| w.args[1] |= 8, INPUT),
        fails("rtt_bound", |w| w.args[1] = OUTSIDE, INPUT),
        fails("rtt_state", |w| w.args[1] = w.ns, INPUT),
        fails("rtt_bound2", |w| w.args[1] = w.host.high(), INPUT),
        fails("rtt_walk", |w| w.args[2] |= 0x4000_0000, rtt(1)),
        fails("rtte_state", |w| w.args[2] &= !0x40_0000, rtt(2)),
    ],
    order: &[(RD, &["rtt_walk", "rtte_state"]), (LEVEL, &["rtt_walk", "rtte_state"])],
};

const RTT_DESTROY: Command = Command {
    name: "RTT_DESTROY",
    fid: fid::RTT_DESTROY,
    ready: |w| {
        w.activate();
        w.args[..3].copy_from_slice(&[w.realm.rd, 0x20_0000, 3]);
    },
    // Nothing is live behind it in the parent.
    outputs: |w| vec![w.table(0x20_0000, 3), 0x4000_0000],
    footprint: |w| vec![w.table(0x20_0000, 3), w.table(0x20_0000, 2)],
    effects: |w| assert_eq!(w.entry(0x20_0000, 2), [2, 0, 0, 2], "DESTROYED"),
    failures: &[
        RD_ALIGN,
        RD_BOUND,
        RD_STATE,
        LEVEL_BOUND,
        LEVEL_BOUND_4,
        LEVEL_BOUND_NEGATIVE,
        fails("ipa_align", |w| w.args[1] |= 0x1000, INPUT),
        fails("ipa_bound", |w| w.args[1] |= SHARED * 2, INPUT),
        Failure("rtt_walk", |w| w.args[1] |= 0x4000_0000, rtt(1), |_| [0, SHARED, 0, 0]),
        Failure(
            "rtte_state",
            |w| w.args[1] = w.args[1] & !0x20_0000 | 0x40_0000,
            rtt(2),
            |_| [0, 0x4000_0000, 0, 0],
        ),
        Failure("rtt_live", |w| w.args[1] &= !0x20_0000, rtt(3), |w| [0, w.args[1], 0, 0]),
    ],
    order: &[(RD, &["rtt_walk", "rtte_state", "rtt_live"]), (LEVEL, &["rtt_walk", "rtte_state"])],
};

const RTT_FOLD: Command = Command {
    name: "RTT_FOLD",
    fid: fid::RTT_FOLD,
    ready: |w| {
        w.activate();
        w.args[..3].copy_from_slice(&[w.realm.rd, 0x20_0000, 3]);
    },
    outputs: |w| vec![w.table(0x20_0000, 3)],
    footprint: |w| vec![w.table(0x20_0000, 3), w.table(0x20_0000, 2)],
    effects: |w| assert_eq!(w.entry(0x20_0000, 2), [2, 0, 0, 0], "EMPTY as before"),
    failures: &[
        RD_ALIGN,
        RD_BOUND,
        RD_STATE,
        LEVEL_BOUND,
        LEVEL_BOUND_4,
        LEVEL_BOUND_NEGATIVE,
        fails("ipa_align", |w| w.args[1] |= 0x1000, INPUT),
        fails("ipa_bound", |w| w.args[1] |= SHARED * 2, INPUT),
        fails("rtt_walk", |w| w.args[1] |= 0x4000_0000, rtt(1)),
        fails("rtte_state", |w| w.args[1] = w.args[1] & !0x20_0000 | 0x40_0000, rtt(2)),
        fails("rtt_homo", |w| w.args[1] &= !0x20_0000, rtt(3)),
    ],
    order: &[(RD, &["rtt_walk", "rtte_state", "rtt_homo"]), (LEVEL, &["rtt_walk", "rtte_state"])],
};

const RTT_INIT_RIPAS: Command = Command {
    name: "RTT_INIT_RIPAS",
    fid: fid::RTT_INIT_RIPAS,
    ready: |w| w.args[..3].copy_from_slice(&[w.realm.rd, 0x20_0000, 0x20_3000]),
    outputs: |_| vec![0x20_3000],
    footprint: |w| vec![w.realm.rd, w.table(0x20_0000, 3)],
    effects: |w| {
        assert_eq!(w.entry(0x20_2000, 3), [3, 0, 0, 1]);
        assert_eq!(w.entry(0x20_3000, 3), [3, 0, 0, 0]);
    },
    failures: &[
        RD_ALIGN,
        RD_BOUND,
        RD_STATE,
        fails("size_valid", |w| w.args[2] = w.args[1] & !0xFFF, INPUT),
        fails("top_bound", |w| w.args[2] = SHARED + 0x1000, INPUT),
        fails("realm_state", |w| w.activate(), REALM),
        fails("base_align", |w| w.args[1] |= 8, rtt(3)),
        fails("rtte_state", |w| w.args[1] = 0x2000, rtt(3)),
        fails("top_gran_align", |w| w.args[2] |= 8, INPUT),
        fails("no_progress", |w| w.args[1..3].copy_from_slice(&[0x4000_0000, 0x4000_1000]), rtt(1)),
    ],
    order: &[
        (RD, &["realm_state", "base_align", "rtte_state", "no_progress"]),
        (&["top_gran_align"], &["no_progress"]),
    ],
};

const RTT_MAP_UNPROTECTED: Command = Command {
    name: "RTT_MAP_UNPROTECTED",
    fid: fid::RTT_MAP_UNPROTECTED,
    ready: |w| {
        w.activate();
        w.args[..4].copy_from_slice(&[w.realm.rd, SHARED, 3, 0x4000_0000 | 7 << 2 | 1 << 6]);
    },
    outputs: nothing,
    footprint: |w| vec![w.table(SHARED, 3)],
    effects: |w| assert_eq!(w.entry(SHARED, 3), [3, 1, 0x4000_0000 | 7 << 2 | 1 << 6, 0]),
    failures: &[
        fails("attr_valid: a foreign bit", |w| w.args[3] |= 1, INPUT),
        fails("attr_valid: reserved MemAttr", |w| w.args[3] = w.args[3] & !(7 << 2) | 4 << 2, INPUT),
        RD_ALIGN,
        RD_BOUND,
        RD_STATE,
        fails("level_bound: 0", |w| w.args[2] = 0, INPUT),
        LEVEL_BOUND_4,
        LEVEL_BOUND_NEGATIVE,
        fails("addr_align", |w| w.args[2..4].copy_from_slice(&[2, 0x4000_1000]), INPUT),
        fails("addr_bound", |w| w.args[3] |= 1 << 48, INPUT),
        fails("ipa_align", |w| w.args[1] |= 8, INPUT),
        fails("ipa_bound: outside", |w| w.args[1] |= SHARED * 2, INPUT),
        fails("ipa_bound: protected", |w| w.args[1] &= !SHARED, INPUT),
        fails("rtt_walk", |w| w.args[1] |= 0x4000_0000, rtt(1)),
        fails("rtte_state", |w| w.args[1] |= 0x1000, rtt(3)),
    ],
    order: &[
        (RD, &["rtt_walk", "rtte_state"]),
        (
            &[
                "level_bound: 0",
                "level_bound: 4",
                "level_bound: -1",
                "ipa_bound: outside",
                "ipa_bound: protected",
            ],
            &["rtt_walk", "rtte_state"],
        ),
    ],
};

const RTT_UNMAP_UNPROTECTED: Command = Command {
    name: "RTT_UNMAP_UNPROTECTED",
    fid: fid::RTT_UNMAP_UNPROTECTED,
    ready: |w| {
        w.activate();
        w.args[..3].copy_from_slice(&[w.realm.rd, SHARED + 0x1000, 3]);
    },
    outputs: |_| vec![SHARED + 0x20_0000],
    footprint: |w| vec![w.table(SHARED, 3)],
    effects: |w| assert_eq!(w.entry(SHARED + 0x1000, 3), [3, 0, 0, 0]),
    failures: &[
        RD_ALIGN,
        RD_BOUND,
        RD_STATE,
        fails("level_bound: 0", |w| w.args[2] = 0, INPUT),
        LEVEL_BOUND_4,
        LEVEL_BOUND_NEGATIVE,
        fails("ipa_align", |w| w.args[1] |= 8, INPUT),
        fails("ipa_bound: outside", |w| w.args[1] |= SHARED * 2, INPUT),
        fails("ipa_bound: protected", |w| w.args[1] &= !SHARED, INPUT),
        Failure("rtt_walk", |w| w.args[1] |= 0x4000_0000, rtt(1), |_| [SHARED * 64, 0, 0, 0]),
        Failure(
            "rtt_walk: a block",
            |w| w.args[1] = w.args[1] & !0x1000 | 0x20_0000,
            rtt(2),
            |w| [w.args[1], 0, 0, 0],
        ),
        Failure("rtte_state", |w| w.args[1] &= !0x1000, rtt(3), |_| [SHARED + 0x1000, 0, 0, 0]),
    ],
    order: &[
        (RD, &["rtt_walk", "rtte_state", "rtt_walk: a block"]),
        (
            &[
                "level_bound: 0",
                "level_bound: 4",
                "level_bound: -1",
                "ipa_bound: outside",
                "ipa_bound: protected",
            ],
            &["rtt_walk", "rtte_state", "rtt_walk: a block"],
        ),
    ],
};

const RTT_READ_ENTRY: Command = Command {
    name: "RTT_READ_ENTRY",
    fid: fid::RTT_READ_ENTRY,
    ready: |w| {
        w.activate();
        w.args[..4].copy_from_slice(&[w.realm.rd, 0x2000, 3, 0x77]);
    },
    outputs: |w| vec![3, 1, w.data[0], 1],
    footprint: nothing,
    effects: |w| {
        for (ipa, level, entry) in [
            (0, 3, [3, 0, 0, 0]),
            (0x1000, 3, [3, 0, 0, 1]),
            (0x3000, 3, [3, 0, 0, 2]),
            (0x4000, 3, [3, 1, w.data[1], 0]),
            (0x4000_0000, 3, [1, 0, 0, 0]),
            (0, 1, [1, 2, w.table(0, 2), 0]),
            (SHARED, 3, [3, 0, 0, 0]),
            (SHARED + 0x1000, 3, [3, 1, 0x4000_0000 | 6 << 2 | 3 << 6, 0]),
            (SHARED + 0x20_0000, 3, [2, 1, 0x4000_0000 | 6 << 2 | 3 << 6, 0]),
        ] {
            assert_eq!(w.entry(ipa, level), entry, "{ipa:#x} at {level}");
        }
    },
    failures: &[
        RD_ALIGN,
        RD_BOUND,
        RD_STATE,
        fails("level_bound: 0", |w| w.args[2] = 0, INPUT),
        fails("level_bound: 4", |w| w.args[2] = 4, INPUT),
        fails("level_bound: -1", |w| w.args[2] = u64::MAX, INPUT),
        fails("ipa_align", |w| w.args[1] |= 8, INPUT),
        fails("ipa_bound", |w| w.args[1] |= SHARED * 2, INPUT),
    ],
    order: &[],
};

const RTT_SET_RIPAS: Command = Command {
    name: "RTT_SET_RIPAS",
    fid: fid::RTT_SET_RIPAS,
    ready: |w| {
        w.activate();
        w.request(0x1000, 0x5000, 0, 0);
        w.args[..4].copy_from_slice(&[w.realm.rd, w.recs[0].rec, 0x1000, 0x4000]);
    },
    // DESTROYED stops it.
    outputs: |_| vec![0x3000],
    footprint: |w| vec![w.recs[0].rec, w.table(0x1000, 3)],
    effects: |w| {
        assert_eq!(w.entry(0x1000, 3), [3, 0, 0, 0]);
        assert_eq!(w.entry(0x2000, 3), [3, 1, w.data[0], 0]);
        assert_eq!(w.entry(0x3000, 3), [3, 0, 0, 2]);
    },
    failures: &[
        RD_ALIGN,
        RD_BOUND,
        RD_STATE,
        fails("rec_align", |w| w.args[1] |= 8, INPUT),
        fails("rec_bound", |w| w.args[1] = OUTSIDE, INPUT),
        fails("rec_gran_state", |w| w.args[1] = w.fresh, INPUT),
        fails("rec_state", |w| w.set_running(true), REC),
        fails("rec_owner", |w| w.args[1] = w.other.1.rec, REC),
        fails("size_valid", |w| w.args[3] = w.args[2] & !0xFFF, INPUT),
        fails("base_bound", |w| w.args[2] = 0x2000, INPUT),
        fails("top_bound", |w| w.args[3] = 0x6000, INPUT),
        fails(
            "base_align",
            |w| {
                w.request(0x4000_1000, 0x8000_0000, 1, 0);
                w.args[2..4].copy_from_slice(&[0x4000_1000, 0x8000_0000]);
            },
            rtt(1),
        ),
        fails("top_gran_align", |w| w.args[3] |= 8, INPUT),
        fails(
            "no_progress",
            |w| {
                w.request(0x4000_0000, 0x4000_1000, 1, 0);
                w.args[2..4].copy_from_slice(&[0x4000_0000, 0x4000_1000]);
            },
            rtt(1),
        ),
        fails(
            "no_progress: DESTROYED",
            |w| {
                w.request(0x3000, 0x5000, 1, 0);
                w.args[2..4].copy_from_slice(&[0x3000, 0x5000]);
            },
            rtt(3),
        ),
    ],
    order: &[
        (RD, &["base_align", "no_progress", "no_progress: DESTROYED"]),
        (&["rec_bound", "rec_gran_state"], &["rec_state", "rec_owner"]),
        (&["base_bound"], &["base_align"]),
        (&["top_gran_align"], &["no_progress", "no_progress: DESTROYED"]),
    ],
};

impl World {
    /// The level argument: X4 of RTT_CREATE, X3 of the others.
    fn set_level(&mut self, level: u64) {
        let at = self.level_at;
        self.args[at] = level;
    }

    /// Makes REC 0 look as if another CPU ran it.
    fn set_running(&self, running: bool) {
        if let Ok(rec) = self.host.rmm.granules.lock_named(self.recs[0].rec, State::Rec) {
            if running && rec.count() == 0 {
                rec.get(1);
            }
        }
    }
}

macro_rules! tables {
    ($($test:ident: $command:ident,)*) => {$(
        #[test]
        fn $test() {
            check(&$command);
        }
    )*};
}

tables! {
    granule_delegate: GRANULE_DELEGATE,
    granule_undelegate: GRANULE_UNDELEGATE,
    data_create: DATA_CREATE,
    data_create_unknown: DATA_CREATE_UNKNOWN,
    data_destroy: DATA_DESTROY,
    psci_complete: PSCI_COMPLETE,
    realm_activate: REALM_ACTIVATE,
    realm_create: REALM_CREATE,
    realm_destroy: REALM_DESTROY,
    rec_aux_count: REC_AUX_COUNT,
    rec_create: REC_CREATE,
    rec_destroy: REC_DESTROY,
    rec_enter: REC_ENTER,
    rtt_create: RTT_CREATE,
    rtt_destroy: RTT_DESTROY,
    rtt_fold: RTT_FOLD,
    rtt_init_ripas: RTT_INIT_RIPAS,
    rtt_map_unprotected: RTT_MAP_UNPROTECTED,
    rtt_read_entry: RTT_READ_ENTRY,
    rtt_set_ripas: RTT_SET_RIPAS,
    rtt_unmap_unprotected: RTT_UNMAP_UNPROTECTED,
}
