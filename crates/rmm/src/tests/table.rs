//! Tables of conditions, and the engine that tries them: every failure condition of a command alone, every pair of
//! two at once, and success. Each attempt is made on a fresh machine of which a complete picture is taken before and
//! after.
//!
//! - A condition alone gives its status and outputs, and changes nothing.
//! - Of two at once, the one that the specification puts first is seen; where it puts none first, one of the two.
//!   Nothing changes.
//! - Success changes no granule outside the command's footprint.

use core::sync::atomic::Ordering::Relaxed;
use std::string::String;
use std::vec::Vec;

use cca_abi::rmi::fid;
use cca_abi::rsi;

use super::host::{Host, SHARED, TestRealm, TestRec};
use super::std;
use crate::platform::RealmExit;

/// An address that is not DRAM.
pub(super) const OUTSIDE: u64 = 0x1000;
/// RMI statuses.
pub(super) const INPUT: u64 = 1;
pub(super) const REALM: u64 = 2;
pub(super) const REALM_1: u64 = 0x102;
pub(super) const REC: u64 = 3;

/// RMI_ERROR_RTT.
pub(super) const fn rtt(level: u64) -> u64 {
    level << 8 | 4
}

/// What the world of every attempt looks like. The Realm has a 34-bit address space from level 1, and:
///
/// | IPA | what |
/// |---|---|
/// | 0x0 | UNASSIGNED, EMPTY |
/// | 0x1000 | UNASSIGNED, RAM |
/// | 0x2000 | ASSIGNED, RAM |
/// | 0x3000 | UNASSIGNED, DESTROYED |
/// | 0x4000 | ASSIGNED, EMPTY |
/// | 0x5000 | ASSIGNED, RAM: what a guest's RSI command uses |
/// | 0x20_0000 | an empty level 3 table |
/// | 0x4000_0000 | no level 2 table; EMPTY |
/// | SHARED + 0x0 | UNASSIGNED_NS |
/// | SHARED + 0x1000 | ASSIGNED_NS |
/// | SHARED + 0x20_0000 | a block, ASSIGNED_NS |
/// | SHARED + 0x4000_0000 | no level 2 table |
pub(super) struct World {
    pub(super) host: Host,
    pub(super) realm: TestRealm,
    /// The Realm's RECs: runnable, not runnable.
    pub(super) recs: [TestRec; 2],
    /// Another Realm with a REC.
    pub(super) other: (TestRealm, TestRec),
    /// Granules by state.
    pub(super) fresh: u64,
    pub(super) fresh2: u64,
    pub(super) ns: u64,
    pub(super) ns2: u64,
    /// The pages at 0x2000, 0x4000 and 0x5000.
    pub(super) data: [u64; 3],
    /// Parameters of the command, in an NS granule.
    pub(super) params: u64,
    /// X1… of the command.
    pub(super) args: [u64; 10],
    /// Which of them is a level.
    pub(super) level_at: usize,
}

/// Everything that a command could change.
#[derive(PartialEq)]
pub(super) struct Picture {
    granules: Vec<(u64, Vec<u64>, bool, u16)>,
    vmids: Vec<u64>,
}

/// A command in the table.
pub(super) struct Command {
    pub(super) name: &'static str,
    pub(super) fid: u64,
    /// Makes the world one in which the command with `args` succeeds.
    pub(super) ready: fn(&mut World),
    /// X1… of success.
    pub(super) outputs: fn(&World) -> Vec<u64>,
    /// Granules that success changes; all others stay as they are.
    pub(super) footprint: fn(&World) -> Vec<u64>,
    /// What else success means.
    pub(super) effects: fn(&World),
    pub(super) failures: &'static [Failure],
    /// Pairs of lists: each of the first precedes each of the second.
    pub(super) order: &'static [(&'static [&'static str], &'static [&'static str])],
}

/// A failure condition: its label, what makes it true, the status, and X1…X4.
pub(super) struct Failure(
    pub(super) &'static str,
    pub(super) fn(&mut World),
    pub(super) u64,
    pub(super) fn(&World) -> [u64; 4],
);

/// A failure without outputs.
pub(super) const fn fails(label: &'static str, when: fn(&mut World), status: u64) -> Failure {
    Failure(label, when, status, |_| [0; 4])
}

impl World {
    pub(super) fn new() -> Self {
        let host = Host::with_granules(160);
        let realm = host.realm();
        let recs = [host.rec(&realm, 0, true), host.rec(&realm, 1, false)];
        let other = host.realm_with(1, 8);
        let other_rec = host.rec(&other, 0, true);
        host.tables(&realm, 0, 3);
        host.tables(&realm, 0x20_0000, 3);
        host.tables(&realm, SHARED, 3);
        host.ok(fid::RTT_INIT_RIPAS, &[realm.rd, 0x1000, 0x2000]);
        let data = [0x2000, 0x4000, 0x5000].map(|ipa| {
            if ipa == 0x4000 {
                let data = host.delegated();
                host.ok(fid::DATA_CREATE_UNKNOWN, &[realm.rd, data, ipa]);
                data
            } else {
                host.page(&realm, ipa)
            }
        });
        host.page(&realm, 0x3000);
        host.ok(fid::DATA_DESTROY, &[realm.rd, 0x3000]);
        host.ok(fid::RTT_MAP_UNPROTECTED, &[realm.rd, SHARED + 0x1000, 3, 0x4000_0000 | 6 << 2 | 3 << 6]);
        host.ok(fid::RTT_MAP_UNPROTECTED, &[realm.rd, SHARED + 0x20_0000, 2, 0x4000_0000 | 6 << 2 | 3 << 6]);
        let (fresh, fresh2) = (host.delegated(), host.delegated());
        let (ns, ns2, params) = (host.alloc(), host.alloc(), host.alloc());
        host.write_ns(ns, &[0xA5; 4096]);
        Self {
            realm,
            recs,
            other: (other, other_rec),
            fresh,
            fresh2,
            ns,
            ns2,
            data,
            params,
            args: [0; 10],
            level_at: 2,
            host,
        }
    }

    pub(super) fn activate(&self) {
        self.host.activate(&self.realm);
    }

    /// Sets words of the parameter granule.
    pub(super) fn write(&self, words: &[(usize, u64)]) {
        for &(offset, value) in words {
            self.host.write_ns_word(self.params, offset, value);
        }
    }

    /// The table at `level` that covers `ipa`, as RTT_READ_ENTRY shows it.
    pub(super) fn table(&self, ipa: u64, level: u64) -> u64 {
        let span = cca_abi::rmi::entry_span(level as i64 - 1);
        self.host.read_entry(&self.realm, ipa & !(span - 1), level - 1)[2]
    }

    pub(super) fn entry(&self, ipa: u64, level: u64) -> [u64; 4] {
        self.host.read_entry(&self.realm, ipa, level)
    }

    /// Every granule of the REC, and its run page.
    pub(super) fn rec_granules(&self) -> Vec<u64> {
        [self.recs[0].rec, self.recs[0].aux, self.recs[0].run].to_vec()
    }

    /// The Realm asks for a change of RIPAS.
    pub(super) fn request(&self, base: u64, top: u64, ripas: u64, flags: u64) {
        self.host.guest_smc(rsi::fid::IPA_STATE_SET, &[base, top, ripas, flags]);
        assert_eq!(self.host.enter_ok(&self.recs[0]).exit_reason, 4);
    }

    pub(super) fn picture(&self) -> Picture {
        let platform = self.host.rmm.platform();
        let granule = |pa| {
            let words = platform.raw(pa).iter().map(|word| word.load(Relaxed)).collect();
            (pa, words, platform.is_realm_owned(pa), self.host.rmm.granules.raw(pa))
        };
        Picture {
            granules: platform.granules().map(granule).collect(),
            vmids: self.host.rmm.vmids.raw().collect(),
        }
    }

    /// Issues the command; returns X0 and X1….
    fn call(&self, command: &Command) -> (u64, Vec<u64>) {
        if (rsi::fid::VERSION..=rsi::fid::HOST_CALL).contains(&command.fid) {
            return self.call_rsi(command.fid);
        }
        let mut arguments = self.args;
        arguments[5..7].copy_from_slice(&[0x55, 0x66]);
        let regs = self.host.registers(command.fid, &arguments[..7]);
        assert_eq!(regs[5..], [self.args[4], 0x55, 0x66], "X5–X7 are preserved");
        if command.fid != fid::RTT_READ_ENTRY {
            assert_eq!(regs[4], self.args[3], "X4 is preserved");
            return (regs[0], regs[1..4].to_vec());
        }
        (regs[0], regs[1..5].to_vec())
    }

    /// REC 0 issues the command. If it does not come back to the REC, the exit reason (+ 0x100) stands for X0.
    pub(super) fn call_rsi(&self, fid: u64) -> (u64, Vec<u64>) {
        use std::sync::{Arc, Mutex};
        let seen = Arc::new(Mutex::new(None));
        let result = Arc::clone(&seen);
        self.host.guest_smc(fid, &self.args);
        self.host.guest(move |ctx| {
            *result.lock().unwrap() = Some((0..9).map(|n| ctx.gpr(n)).collect::<Vec<u64>>());
            RealmExit::Irq
        });
        let exit = self.host.enter_ok(&self.recs[0]);
        let back = seen.lock().unwrap().take();
        self.host.rmm.platform().script.lock().unwrap().clear();
        match back {
            Some(regs) => (regs[0], regs[1..].to_vec()),
            None => (0x100 + u64::from(exit.exit_reason), Vec::new()),
        }
    }
}

impl Picture {
    /// Granules that are not the same in both, without those in `but`.
    pub(super) fn difference(&self, other: &Self, but: &[u64]) -> Vec<u64> {
        assert!(self.vmids == other.vmids || !but.is_empty(), "VMIDs changed");
        self.granules
            .iter()
            .zip(&other.granules)
            .filter(|(before, after)| before != after && !but.contains(&before.0))
            .map(|(before, _)| before.0)
            .collect()
    }
}

/// Tries everything in the table; returns the number of attempts.
pub(super) fn check(command: &Command) -> usize {
    let is_rsi = (rsi::fid::VERSION..=rsi::fid::HOST_CALL).contains(&command.fid);
    let world = || {
        let mut world = World::new();
        (command.ready)(&mut world);
        world
    };
    // What a guest's call changes in any case: its registers and the run page.
    let always = |world: &World| if is_rsi { world.rec_granules() } else { Vec::new() };
    let unchanged = |world: &World, before: &Picture, what: &str| {
        let changed = before.difference(&world.picture(), &always(world));
        assert!(changed.is_empty(), "{}: {what} changed {changed:x?}", command.name);
    };
    let mut attempts = 0;

    // Success.
    let mut good = world();
    let expected = (command.outputs)(&good);
    let mut footprint = (command.footprint)(&good);
    footprint.extend(always(&good));
    let before = good.picture();
    let (status, outputs) = good.call(command);
    assert_eq!(status, 0, "{}", command.name);
    let changed = before.difference(&good.picture(), &footprint);
    assert!(changed.is_empty(), "{}: success changed {changed:x?} too", command.name);
    assert_eq!(outputs[..expected.len()], expected, "{}: outputs", command.name);
    assert!(outputs[expected.len()..].iter().all(|&output| output == 0) || is_rsi, "{}", command.name);
    (command.effects)(&mut good);
    attempts += 1;

    // Each failure.
    for Failure(label, when, status, outputs) in command.failures {
        let mut world = world();
        when(&mut world);
        let expected = outputs(&world);
        let before = world.picture();
        let (seen, seen_outputs) = world.call(command);
        assert_eq!(seen, *status, "{}: {label}", command.name);
        for (n, value) in seen_outputs.iter().enumerate().take(4) {
            assert!(is_rsi || *value == expected[n], "{}: {label}: X{} is {value:#x}", command.name, n + 1);
        }
        unchanged(&world, &before, label);
        attempts += 1;
    }

    // Each pair.
    let precedes = |first: &str, second: &str| {
        command.order.iter().any(|(a, b)| a.contains(&first) && b.contains(&second))
    };
    for (n, first) in command.failures.iter().enumerate() {
        for second in &command.failures[n + 1..] {
            let mut world = world();
            (second.1)(&mut world);
            (first.1)(&mut world);
            let before = world.picture();
            let (seen, _) = world.call(command);
            let pair: String = std::format!("{} and {}", first.0, second.0);
            let allowed = if precedes(first.0, second.0) {
                [first.2, first.2]
            } else if precedes(second.0, first.0) {
                [second.2, second.2]
            } else {
                [first.2, second.2]
            };
            assert!(allowed.contains(&seen), "{}: {pair}: {seen:#x}", command.name);
            unchanged(&world, &before, &pair);
            attempts += 1;
        }
    }
    // A label in the order that no condition has would test nothing.
    for (a, b) in command.order {
        for label in a.iter().chain(*b) {
            assert!(command.failures.iter().any(|failure| failure.0 == *label), "{}: {label}", command.name);
        }
    }
    attempts
}
