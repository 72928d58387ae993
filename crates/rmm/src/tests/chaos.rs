//! Random commands, from one CPU and from several at once: nothing panics, nobody waits for ever, no granule gets
//! lost, and every table's count is right.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;
use std::thread;
use std::vec::Vec;

use cca_abi::rmi::{Status, fid};
use cca_abi::{psci, rsi};

use super::host::{Host, SHARED};
use super::std;
use crate::context::RecContext;
use crate::entry::{Entry, Format};
use crate::granule::State;
use crate::level::Level;
use crate::platform::{Platform, RealmExit};
use crate::test_platform::BASE;

/// Granules in play.
const POOL: u64 = 48;

/// A small generator; quality does not matter, repeatability does.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn pick(&mut self, from: &[u64]) -> u64 {
        from[usize::try_from(self.below(from.len() as u64)).unwrap()]
    }

    fn granule(&mut self) -> u64 {
        BASE + self.below(POOL) * 4096
    }

    fn ipa(&mut self) -> u64 {
        let half = self.pick(&[0, 0, 0, SHARED]);
        half + self.pick(&[0, 0, 0x1000, 0x2000, 0x20_0000, 0x4000_0000])
    }
}

static GUEST_SEED: AtomicU64 = AtomicU64::new(0x1234_5678_9ABC_DEF1);

/// A guest that does anything.
fn guest(ctx: &RecContext<'_>) -> RealmExit {
    let mut random = Random(GUEST_SEED.fetch_add(0x9E37_79B9_7F4A_7C15, Relaxed) | 1);
    random.next();
    let smc = RealmExit::Sync { esr: 0x17 << 26 | 1 << 25, far: 0, hpfar: 0 };
    let ipa = random.ipa();
    let call = |id: u64, args: [u64; 4]| {
        ctx.set_gpr(0, id);
        for (n, value) in args.into_iter().enumerate() {
            ctx.set_gpr(n + 1, value);
        }
        smc
    };
    let fault = RealmExit::Sync { esr: 0x24 << 26 | 0x0300_0007, far: ipa, hpfar: ipa >> 8 };
    match random.below(12) {
        0 => call(
            rsi::fid::IPA_STATE_SET,
            [ipa, ipa + 0x1000 * random.below(4), random.below(3), random.below(2)],
        ),
        1 => call(rsi::fid::IPA_STATE_GET, [ipa, ipa + 0x2000, 0, 0]),
        2 => call(rsi::fid::HOST_CALL, [ipa, 0, 0, 0]),
        3 => call(rsi::fid::REALM_CONFIG, [ipa, 0, 0, 0]),
        4 => call(rsi::fid::MEASUREMENT_EXTEND, [random.below(6), random.below(70), 0, 0]),
        5 => call(psci::fid::CPU_ON_64, [random.below(3), ipa, 0, 0]),
        6 => call(psci::fid::CPU_OFF, [0; 4]),
        7 => call(random.next(), [0; 4]),
        8 => RealmExit::Sync { esr: random.next() & 0xFFFF_FFFF, far: random.next(), hpfar: random.next() },
        9 => fault,
        10 => RealmExit::SError { esr: random.next() & 0xFFFF_FFFF | 1 << 26 },
        _ => RealmExit::Irq,
    }
}

/// A store by the host, which faults if the granule is not its own.
fn write(host: &Host, pa: u64, offset: usize, value: u64) {
    let _ = host.rmm.platform().ns_write(pa + offset as u64, &[value]);
}

/// Writes parameters that are right more often than not.
fn random_params(host: &Host, random: &mut Random, pa: u64, rec: bool) {
    let words: Vec<(usize, u64)> = if rec {
        let auxes: Vec<u64> = (0..crate::aux::count(None)).map(|_| random.granule()).collect();
        let mut words = Host::rec_words(&auxes, random.below(2));
        words.push((0, 1));
        words
    } else {
        Host::realm_words(random.granule(), random.below(2), random.below(3))
    };
    for (offset, value) in words {
        write(host, pa, offset, value);
    }
}

fn random_command(host: &Host, random: &mut Random) {
    let level = random.pick(&[1, 2, 2, 3, 3, 3, 4, u64::MAX]);
    let [a, b, c] = [0; 3].map(|_| random.granule());
    let ipa = random.ipa();
    let (id, args) = match random.below(24) {
        0..=4 => (fid::GRANULE_DELEGATE, [a, 0, 0, 0, 0]),
        5 => (fid::GRANULE_UNDELEGATE, [a, 0, 0, 0, 0]),
        6 => {
            random_params(host, random, b, false);
            (fid::REALM_CREATE, [a, b, 0, 0, 0])
        }
        7 => (fid::REALM_DESTROY, [a, 0, 0, 0, 0]),
        8 => (fid::REALM_ACTIVATE, [a, 0, 0, 0, 0]),
        9 => {
            random_params(host, random, c, true);
            (fid::REC_CREATE, [a, b, c, 0, 0])
        }
        10 => (fid::REC_DESTROY, [a, 0, 0, 0, 0]),
        11 | 12 => {
            write(host, b, 0, random.below(32));
            (fid::REC_ENTER, [a, b, 0, 0, 0])
        }
        13 => (fid::DATA_CREATE, [a, b, ipa, c, random.below(2)]),
        14 => (fid::DATA_CREATE_UNKNOWN, [a, b, ipa, 0, 0]),
        15 => (fid::DATA_DESTROY, [a, ipa, 0, 0, 0]),
        16 | 17 => (fid::RTT_CREATE, [a, b, ipa, level, 0]),
        18 => (fid::RTT_DESTROY, [a, ipa, level, 0, 0]),
        19 => (fid::RTT_FOLD, [a, ipa, level, 0, 0]),
        20 => (fid::RTT_MAP_UNPROTECTED, [a, ipa, level, b, 0]),
        21 => (fid::RTT_UNMAP_UNPROTECTED, [a, ipa, level, 0, 0]),
        22 => (fid::RTT_SET_RIPAS, [a, b, ipa, ipa + 0x1000, 0]),
        _ => match random.below(3) {
            0 => (fid::RTT_INIT_RIPAS, [a, ipa, ipa + 0x20_0000, 0, 0]),
            1 => (fid::PSCI_COMPLETE, [a, b, random.pick(&[0, psci::Code::Denied.to_register()]), 0, 0]),
            _ => (fid::RTT_READ_ENTRY, [a, ipa, level, 0, 0]),
        },
    };
    host.registers(id, &args);
}

/// Checks what must hold when nobody is inside the RMM. Returns how often each kind of granule was seen.
fn check(host: &Host) -> [usize; 7] {
    let mut seen = [0; 7];
    let mut referenced = 0;
    let mut children = 0;
    for n in 0..POOL {
        let pa = BASE + n * 4096;
        let state = host.state(pa);
        seen[state as usize] += 1;
        assert_eq!(state != State::Undelegated, host.rmm.platform().is_realm_owned(pa), "{pa:#x} {state:?}");
        let words = || host.rmm.platform().raw(pa).iter().map(|word| word.load(Relaxed));
        match state {
            State::Delegated => assert!(words().all(|word| word == 0), "{pa:#x} is not wiped"),
            State::Rtt => {
                let granule = host.rmm.granules.lock_named(pa, State::Rtt).unwrap();
                // Page descriptors and tables look alike; what they point to tells the level.
                let counted = words()
                    .filter(|&word| Entry::decode(word, Level::L2, Format::Bits48).is_counted())
                    .count();
                let ns_pages = words().filter(|&word| word & 3 == 3 && word & 1 << 55 != 0).count();
                assert_eq!(usize::from(granule.count()), counted - ns_pages, "{pa:#x}");
                for word in words().filter(|&word| word & 3 == 3 && word & 1 << 55 == 0) {
                    match host.state(word & 0xFFFF_FFFF_F000) {
                        State::Rtt => children += 1,
                        State::Data => referenced += 1,
                        other => panic!("an entry points to {other:?}"),
                    }
                }
                referenced += words().filter(|&word| word & 3 == 0 && word & 4 != 0).count();
            }
            State::Rd => {
                let granule = host.rmm.granules.lock_named(pa, State::Rd).unwrap();
                let recs = (0..POOL)
                    .map(|n| BASE + n * 4096)
                    .filter(|&rec| host.state(rec) == State::Rec && host.rmm.rec(rec).owner() == pa);
                assert_eq!(usize::from(granule.count()), recs.count());
            }
            _ => {}
        }
    }
    let [_, _, rds, recs, auxes, datas, rtts] = seen;
    assert_eq!(datas, referenced, "every page is mapped exactly once");
    assert_eq!(rtts, children + rds, "every table is hung somewhere; each Realm has one start table");
    assert_eq!(recs as u64 * crate::aux::count(None), auxes as u64);
    seen
}

/// Takes everything apart; afterwards every granule is the host's again.
fn tear_down(host: &Host) {
    let pool = || (0..POOL).map(|n| BASE + n * 4096);
    for rec in pool() {
        host.registers(fid::REC_DESTROY, &[rec]);
    }
    for rd in pool().filter(|&pa| host.state(pa) == State::Rd) {
        for level in [3u64, 2] {
            for half in [0, SHARED] {
                for ipa in [0, 0x20_0000, 0x4000_0000].map(|offset| half + offset) {
                    for page in [0, 0x1000, 0x2000] {
                        host.registers(fid::DATA_DESTROY, &[rd, ipa + page]);
                    }
                    host.registers(fid::RTT_DESTROY, &[rd, ipa, level]);
                }
            }
        }
        assert_eq!(host.status(fid::REALM_DESTROY, &[rd]), Status::Success);
    }
    for pa in pool() {
        host.registers(fid::GRANULE_UNDELEGATE, &[pa]);
        assert_eq!(host.state(pa), State::Undelegated);
    }
}

#[test]
fn random_commands_keep_every_granule_accounted_for() {
    let mut most = [0; 7];
    for seed in 1..=40u64 {
        let host = Host::new();
        *host.rmm.platform().habit.lock().unwrap() = Some(guest);
        let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        for _ in 0..20 {
            for _ in 0..400 {
                random_command(&host, &mut random);
            }
            for (most, now) in most.iter_mut().zip(check(&host)) {
                *most = now.max(*most);
            }
        }
        tear_down(&host);
    }
    assert!(most.iter().all(|&count| count > 0), "every kind of granule occurred: {most:?}");
}

#[test]
fn commands_from_several_cpus_neither_deadlock_nor_lose_granules() {
    for seed in 1..=8u64 {
        let host = Arc::new(Host::new());
        *host.rmm.platform().habit.lock().unwrap() = Some(guest);
        let cpus: Vec<_> = (0..4u64)
            .map(|cpu| {
                let host = Arc::clone(&host);
                thread::spawn(move || {
                    let mut random = Random((seed * 4 + cpu + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
                    for _ in 0..6000 {
                        random_command(&host, &mut random);
                    }
                })
            })
            .collect();
        for cpu in cpus {
            cpu.join().unwrap();
        }
        check(&host);
        tear_down(&host);
    }
}
