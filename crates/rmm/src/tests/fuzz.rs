//! Random commands against the specification as a program ([`super::model`]), with the machine looked at after every
//! one: status, outputs and exit reason are allowed; every granule's state and count and every RTT entry are the
//! model's; no page is mapped twice; the RMM has written to no host memory but the run page's second half; what it
//! has freed is zero.
//!
//! `REALM_FUZZ_SECONDS` makes it run that long instead of a moment; `REALM_FUZZ_SEED` chooses where it begins.

use core::sync::atomic::Ordering::Relaxed;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use std::vec::Vec;

use cca_abi::psci;
use cca_abi::rmi::fid;
use cca_abi::rsi;

use super::host::{Host, SHARED};
use super::model::{Action, Command, Model};
use super::std;
use crate::GranuleState as State;
use crate::entry::{Entry, Format};
use crate::level::Level;
use crate::platform::{Platform, RealmExit};
use crate::test_platform::BASE;

/// Granules in play.
pub(super) const POOL: u64 = 64;

/// A small generator; quality does not matter, repeatability does.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn seeded(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::try_from(self.below(from.len() as u64)).unwrap()]
    }

    /// A granule in the state that the command wants, or one time in eight any.
    fn granule(&mut self, model: &Model, state: State) -> u64 {
        let wanted: Vec<u64> = model.all(state).into_iter().filter(|pa| *pa < BASE + POOL * 4096).collect();
        if wanted.is_empty() || self.below(8) == 0 {
            BASE + self.below(POOL) * 4096
        } else {
            self.pick(&wanted)
        }
    }

    fn ipa(&mut self) -> u64 {
        let odd = self.pick(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8]);
        self.pick(&[0, 0, 0, 0, SHARED, SHARED, SHARED * 2])
            + self.pick(&[0, 0, 0, 0x1000, 0x2000, 0x20_0000, 0x20_0000, 0x4000_0000])
            + odd
    }

    fn table_ipa(&mut self) -> u64 {
        self.pick(&[0, 0, 0, SHARED, SHARED]) + self.pick(&[0, 0, 0, 0x20_0000, 0x4000_0000])
    }
}

/// The next command.
pub(super) fn command(random: &mut Random, model: &Model) -> Command {
    use State::{Data, Delegated, Rd, Rec, Undelegated};
    let mut granule = |state| random.granule(model, state);
    let (rd, fresh, fresh2) = (granule(Rd), granule(Delegated), granule(Delegated));
    let (ns, rec) = (granule(Undelegated), granule(Rec));
    let _ = Data;
    let level = random.pick(&[1, 2, 2, 2, 3, 3, 3, 3, 3, 4, u64::MAX]);
    let ipa = random.ipa();
    let table_ipa = random.table_ipa();
    let mut params = Vec::new();
    let mut action = Action::Irq;
    // What ends lives is rare.
    let rare = random.below(8) == 0;
    let (fid, args) = match random.below(34) {
        0..=3 => (fid::GRANULE_DELEGATE, [ns, 0, 0, 0, 0]),
        4 if rare => (fid::GRANULE_UNDELEGATE, [fresh, 0, 0, 0, 0]),
        5 => {
            params = [fresh2, random.below(3)].to_vec();
            (fid::REALM_CREATE, [fresh, ns, 0, 0, 0])
        }
        6 if rare => (fid::REALM_DESTROY, [rd, 0, 0, 0, 0]),
        7 if rare => (fid::REALM_ACTIVATE, [rd, 0, 0, 0, 0]),
        8..=10 => {
            params = [random.below(4).min(1), model.next_index(rd).unwrap_or(0)].to_vec();
            params.extend((0..crate::aux::count(None)).map(|_| random.granule(model, Delegated)));
            (fid::REC_CREATE, [rd, fresh, ns, 0, 0])
        }
        11 if rare => (fid::REC_DESTROY, [rec, 0, 0, 0, 0]),
        12..=16 => {
            let base = random.table_ipa() + 0x1000 * random.below(3);
            action = match random.below(8) {
                0 | 1 => Action::Irq,
                2..=4 => Action::StateSet {
                    base,
                    top: base + random.pick(&[0, 8, 0x1000, 0x3000, 0x20_0000, 0x4000_0000]),
                    ripas: random.below(3),
                    flags: random.below(2),
                },
                5 if rare => random.pick(&[Action::CpuOff, Action::CpuOff, Action::SystemOff]),
                5 => Action::Touch { ipa: random.table_ipa() & (SHARED - 1) },
                6 => Action::CpuOn { target: random.below(3) },
                _ => Action::CpuOn { target: 1 },
            };
            (fid::REC_ENTER, [rec, ns, 0, 0, 0])
        }
        4 | 6 | 7 | 17 => (fid::DATA_CREATE, [rd, fresh, ipa, ns, random.below(2)]),
        18 => (fid::DATA_CREATE_UNKNOWN, [rd, fresh, ipa, 0, 0]),
        19 => (fid::DATA_DESTROY, [rd, ipa & !8, 0, 0, 0]),
        20 | 21 => (fid::RTT_CREATE, [rd, fresh, table_ipa, level, 0]),
        11 | 24 => (fid::RTT_DESTROY, [rd, table_ipa, level, 0, 0]),
        25 => (fid::RTT_FOLD, [rd, table_ipa, level, 0, 0]),
        23 | 26 => {
            let desc = random.pick(&[0x4000_0000, 0x4020_0000, 0x4000_1000, 0x4000_0001])
                | random.pick(&[4, 5, 6, 7]) << 2
                | random.below(4) << 6;
            (fid::RTT_MAP_UNPROTECTED, [rd, ipa | random.pick(&[SHARED, 0]), level, desc, 0])
        }
        22 | 27 => (fid::RTT_UNMAP_UNPROTECTED, [rd, ipa, level, 0, 0]),
        28 => (fid::RTT_READ_ENTRY, [rd, ipa, level, 0, 0]),
        29 => {
            let top = ipa + random.pick(&[0, 8, 0x1000, 0x3000, 0x20_0000, 0x4000_0000]);
            (fid::RTT_INIT_RIPAS, [rd, ipa, top, 0, 0])
        }
        30..=32 => match model.request(rec) {
            Some((owner, base, top)) if random.below(8) != 0 => {
                (fid::RTT_SET_RIPAS, [owner, rec, base, random.pick(&[top, top, base + 0x1000]), 0])
            }
            _ => (fid::RTT_SET_RIPAS, [rd, rec, ipa, ipa + 0x1000, 0]),
        },
        _ => {
            let target = model.pending(rec).unwrap_or(fresh);
            (fid::PSCI_COMPLETE, [rec, target, random.pick(&[0, psci::Code::Denied.to_register(), 7]), 0, 0])
        }
    };
    Command { fid, args, params, action }
}

/// Puts into memory what the command will find there.
pub(super) fn prepare(host: &Host, command: &Command) {
    let write = |pa: u64, offset: usize, value: u64| {
        let _ = host.rmm.platform().ns_write(pa + offset as u64, &[value]);
    };
    let words = match command.fid {
        fid::REALM_CREATE => Host::realm_words(command.params[0], 0, command.params[1]),
        fid::REC_CREATE => {
            // The model counts; an MPIDR has four bits of its first affinity field.
            let index = command.params[1];
            let mut words = Host::rec_words(&command.params[2..], index & 0xF | (index >> 4) << 8);
            words.push((0, command.params[0]));
            words
        }
        fid::REC_ENTER => (0..512).map(|n| (8 * n, 0)).collect(),
        _ => return,
    };
    let at = if command.fid == fid::REC_CREATE { command.args[2] } else { command.args[1] };
    if command.fid != fid::REC_ENTER {
        (0..512).for_each(|n| write(at, 8 * n, 0));
    }
    words.into_iter().for_each(|(offset, value)| write(at, offset, value));
    if command.fid == fid::REC_ENTER {
        script(host, command.action);
    }
}

fn script(host: &Host, action: Action) {
    host.rmm.platform().script.lock().unwrap().clear();
    match action {
        Action::Irq => {}
        Action::StateSet { base, top, ripas, flags } => {
            host.guest_smc(rsi::fid::IPA_STATE_SET, &[base, top, ripas, flags]);
        }
        Action::Touch { ipa } => {
            host.guest(move |_| RealmExit::Sync { esr: 0x24 << 26 | 7, far: ipa, hpfar: ipa >> 8 });
        }
        Action::CpuOn { target } => host.guest_smc(psci::fid::CPU_ON_64, &[target, 0, 0]),
        Action::CpuOff => host.guest_smc(psci::fid::CPU_OFF, &[]),
        Action::SystemOff => host.guest_smc(psci::fid::SYSTEM_OFF, &[]),
    }
}

type Memory = BTreeMap<u64, Vec<u64>>;

pub(super) fn pool() -> impl Iterator<Item = u64> {
    (0..POOL).map(|n| BASE + n * 4096)
}

fn words(host: &Host, pa: u64) -> Vec<u64> {
    host.rmm.platform().raw(pa).iter().map(|word| word.load(Relaxed)).collect()
}

/// What the host owns.
fn host_memory(host: &Host) -> Memory {
    pool().filter(|&pa| host.state(pa) == State::Undelegated).map(|pa| (pa, words(host, pa))).collect()
}

/// The invariants that need no model.
fn invariants(host: &Host, before: &Memory, run_page: Option<u64>) {
    let mut mapped = BTreeSet::new();
    for pa in pool() {
        let state = host.state(pa);
        assert_eq!(state != State::Undelegated, host.rmm.platform().is_realm_owned(pa), "{pa:#x} {state:?}");
        match state {
            State::Undelegated => {
                let now = words(host, pa);
                match before.get(&pa) {
                    None => assert!(now.iter().all(|&word| word == 0), "{pa:#x} comes back wiped"),
                    Some(then) if run_page == Some(pa) => assert_eq!(now[..256], then[..256]),
                    Some(then) => assert!(now == *then, "{pa:#x} is the host's and has changed"),
                }
            }
            State::Delegated => assert!(words(host, pa).iter().all(|&word| word == 0), "{pa:#x} is wiped"),
            State::Rtt => {
                // A page descriptor at level 3 and a table descriptor look alike: both must point somewhere once.
                for word in words(host, pa) {
                    let target = match Entry::decode(word, Level::L2, Format::Bits48) {
                        Entry::Table(pa) if word >> 55 & 1 == 0 => pa,
                        Entry::Assigned(pa, _) => pa,
                        _ => continue,
                    };
                    assert!(mapped.insert(target), "{target:#x} has two owners");
                    assert!(matches!(host.state(target), State::Data | State::Rtt), "{target:#x}");
                }
            }
            _ => {}
        }
    }
}

/// A life of so many commands; returns how many of each command succeeded.
fn life(seed: u64, commands: u64, succeeded: &mut BTreeMap<u64, u64>) {
    let mut random = Random::seeded(seed);
    let host = Host::with_granules(usize::try_from(POOL).unwrap());
    let mut model = Model::new(pool());
    for step in 0..commands {
        let command = command(&mut random, &model);
        prepare(&host, &command);
        let before = host_memory(&host);
        let verdict = model.run(&command);
        let regs = host.registers(command.fid, &command.args);
        let told = || std::format!("seed {seed}, step {step}: {command:x?} gave {regs:x?}");
        if verdict.allowed.is_empty() {
            assert_eq!(regs[0], 0, "{}", told());
            *succeeded.entry(command.fid).or_default() += 1;
        } else {
            assert!(verdict.allowed.contains(&regs[0]), "{} instead of {:x?}", told(), verdict.allowed);
        }
        // A failure for another reason than the walk has no outputs.
        if verdict.allowed.is_empty() || regs[0] & 0xFF == 4 {
            let last = if command.fid == fid::RTT_READ_ENTRY { regs[4] } else { verdict.outputs[3] };
            assert_eq!([regs[1], regs[2], regs[3], last], verdict.outputs, "{}", told());
        } else {
            assert_eq!(regs[1..4], [0; 3], "{}", told());
        }
        let run_page = verdict.exit.map(|exit| {
            let run = command.args[1];
            assert_eq!(words(&host, run)[256] & 0xFF, u64::from(exit), "{}", told());
            run
        });
        invariants(&host, &before, run_page);
        model.check(&host);
    }
}

#[test]
fn random_commands_do_what_the_specification_says() {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let seconds = number("REALM_FUZZ_SECONDS");
    let mut seed = number("REALM_FUZZ_SEED").unwrap_or(1);
    let mut succeeded = BTreeMap::new();
    let start = Instant::now();
    let (mut lives, mut calls) = (0, 0);
    while seconds.map_or(lives < 10, |seconds| start.elapsed() < Duration::from_secs(seconds)) {
        life(seed, 2000, &mut succeeded);
        (seed, lives, calls) = (seed + 1, lives + 1, calls + 2000);
    }
    let rate = calls * 1000 / u64::try_from(start.elapsed().as_millis()).unwrap().max(1);
    std::println!("{calls} calls in {lives} lives, {rate} per second");
    for (fid, count) in &succeeded {
        std::println!("{count:8} successes of {}", cca_abi::rmi::name(*fid).unwrap_or("?"));
    }
    // A command that never succeeds would be tested in name only.
    assert_eq!(succeeded.len(), 20, "every command succeeds now and then");
}
