//! The same code in every order of its steps that two or three CPUs can take: `shuttle` runs them one step at a time
//! and chooses who goes next. `REALM_SCHEDULES` is how many orders each of the random explorations tries.
//!
//! `cargo test -p monitor --features explore`

use shuttle::sync::Arc;
use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use shuttle::{check_dfs, check_random, thread};
use std::fmt;
use std::sync::Mutex;
use std::vec::Vec;

use cca_abi::psci::{AFFINITY_OFF, AFFINITY_ON, AFFINITY_ON_PENDING, Code};

use crate::gpt::{Geometry, Gpi, Gpt, Region, TransitionError};
use crate::psci::Psci;
use crate::{Pas, Platform};

fn schedules() -> usize {
    std::env::var("REALM_SCHEDULES").ok().and_then(|n| n.parse().ok()).unwrap_or(300)
}

/// Orders in a systematic exploration, at most.
fn many() -> Option<usize> {
    Some(schedules().saturating_mul(40))
}

fn state(psci: &Psci, cpu: u64) -> i64 {
    i64::try_from(psci.affinity_info(cpu, 0).unwrap()).unwrap()
}

/// Two CPUs turn on a third, which is on its way off: exactly one of them wins, the target finds the winner's entry,
/// and nobody sees a state that the machine does not have.
#[test]
fn a_cpu_that_goes_off_is_turned_on_once_with_the_winners_entry() {
    check_dfs(
        || {
            let psci = Arc::new(Psci::new(2));
            let released = Arc::new(AtomicU64::new(0));
            // CPU 1 is on.
            assert_eq!(psci.cpu_on(1, 0, 0), Ok(1));
            psci.set_on(1);
            let callers: Vec<_> = [10_u64, 20]
                .map(|n| {
                    let (psci, released) = (psci.clone(), released.clone());
                    thread::spawn(move || match psci.cpu_on(1, n, n + 1) {
                        Ok(target) => {
                            assert_eq!(target, 1);
                            // What the image does then: the release word.
                            released.fetch_add(n, SeqCst);
                            n
                        }
                        Err(Code::AlreadyOn | Code::OnPending) => 0,
                        Err(other) => panic!("{other:?}"),
                    })
                })
                .into_iter()
                .collect();
            // CPU 1: off, then parked until it is released, if it is.
            psci.set_off(1);
            let winners: Vec<u64> =
                callers.into_iter().map(|call| call.join().unwrap()).filter(|n| *n != 0).collect();
            match released.load(SeqCst) {
                0 => {
                    assert!(winners.is_empty());
                    assert_eq!(state(&psci, 1), AFFINITY_OFF);
                }
                n => {
                    assert_eq!(winners, [n]);
                    assert_eq!(state(&psci, 1), AFFINITY_ON_PENDING);
                    assert_eq!(psci.entry(1), (n, n + 1));
                    psci.set_on(1);
                    assert_eq!(state(&psci, 1), AFFINITY_ON);
                }
            }
        },
        many(),
    );
}

/// A CPU goes off and on twice while another one asks and turns it on as often as it may: no release is lost, none is
/// doubled, and an entry is never read half.
#[test]
fn off_and_on_in_a_loop_loses_no_release() {
    check_random(
        || {
            let psci = Arc::new(Psci::new(2));
            let release = Arc::new(AtomicU64::new(0));
            let done = Arc::new(AtomicBool::new(false));
            let target = {
                let (psci, release, done) = (psci.clone(), release.clone(), done.clone());
                thread::spawn(move || {
                    for _ in 0..3 {
                        while release.swap(0, SeqCst) == 0 {
                            thread::yield_now();
                        }
                        let (entry, context) = psci.entry(1);
                        assert_eq!(entry + 1, context, "half an entry");
                        psci.set_on(1);
                        psci.set_off(1);
                    }
                    done.store(true, SeqCst);
                })
            };
            let mut turned_on = 0;
            while !done.load(SeqCst) {
                if turned_on < 3 && psci.cpu_on(1, turned_on * 8, turned_on * 8 + 1) == Ok(1) {
                    assert_eq!(release.swap(1, SeqCst), 0, "released twice");
                    turned_on += 1;
                }
                thread::yield_now();
            }
            target.join().unwrap();
            assert_eq!(turned_on, 3);
        },
        schedules(),
    );
}

const L0: u64 = 0x1000;
const L1: u64 = 0x2_0000;
const BLOCK: u64 = 1 << 30;
/// One gigabyte of blocks of 32 MiB is what the tables of these tests describe.
const GEOMETRY: Geometry =
    Geometry { l0: L0, l1_pool: L1, l1_pool_size: 0x4_0000, pps_bits: 32, l0_bits: 30 };

/// Tables whose every access is a step, and a CPU that remembers what it finds in them.
struct Machine {
    tables: Mutex<Vec<u64>>,
    step: AtomicU64,
    remembered: Mutex<Vec<(u64, u64, u64)>>,
}

impl Machine {
    fn new() -> Self {
        Self {
            tables: Mutex::new(std::vec![0; 0xC000]),
            step: AtomicU64::new(0),
            remembered: Mutex::default(),
        }
    }

    fn with<T>(&self, pa: u64, f: impl FnOnce(&mut u64) -> T) -> T {
        f(&mut self.tables.lock().unwrap()[usize::try_from(pa / 8).unwrap()])
    }

    /// A CPU's access to memory; what it learns counts for the whole block.
    fn walk(&self, pa: u64) {
        self.step.fetch_add(1, SeqCst);
        let at = L1 + ((pa & (BLOCK - 1)) >> 16) * 8;
        let descriptor = self.with(at, |d| *d);
        let size = match (descriptor & 0xF, descriptor >> 8 & 3) {
            (1, 1) => 1 << 21,
            (1, 2) => 1 << 25,
            (1, _) => 1 << 29,
            _ => 1 << 12,
        };
        let gpi =
            if size == 1 << 12 { descriptor >> ((pa >> 12 & 0xF) * 4) & 0xF } else { descriptor >> 4 & 0xF };
        self.remembered.lock().unwrap().push((pa & !(size - 1), size, gpi));
    }

    fn believes_non_secure(&self, pa: u64) -> bool {
        let covers = |base: u64, size: u64| pa.wrapping_sub(base) < size;
        self.remembered
            .lock()
            .unwrap()
            .iter()
            .any(|&(b, s, gpi)| covers(b, s) && gpi == Gpi::NonSecure as u64)
    }
}

impl Platform for Machine {
    fn gpt_load(&self, pa: u64) -> u64 {
        self.step.fetch_add(1, SeqCst);
        self.with(pa, |d| *d)
    }
    fn gpt_store(&self, pa: u64, descriptor: u64) {
        // Every 16th store is a step: a division makes hundreds.
        if pa % 128 == 0 {
            self.step.fetch_add(1, SeqCst);
        }
        self.with(pa, |d| *d = descriptor);
    }
    fn gpt_compare_exchange(&self, pa: u64, old: u64, new: u64) -> Result<(), u64> {
        self.step.fetch_add(1, SeqCst);
        self.with(pa, |d| {
            if *d == old {
                *d = new;
                Ok(())
            } else {
                Err(*d)
            }
        })
    }
    fn gpt_invalidate(&self, base: u64, log2_size: u32) {
        self.step.fetch_add(1, SeqCst);
        let end = base + (1 << log2_size);
        self.remembered.lock().unwrap().retain(|&(at, size, _)| at + size <= base || end <= at);
    }
    fn flush_granule(&self, _pa: u64, _pas: Pas) {}
    fn shared_page_read(&self, _offset: usize, _out: &mut [u8]) {}
    fn shared_page_write(&self, _offset: usize, _data: &[u8]) {}
    fn release_cpu(&self, _cpu: usize) {}
    fn random(&self) -> Option<u64> {
        None
    }
    fn print(&self, _line: fmt::Arguments<'_>) {}
    fn counter(&self) -> u64 {
        0
    }
}

fn tables() -> (Arc<Machine>, Arc<Gpt>) {
    let machine = Arc::new(Machine::new());
    // 32 MiB blocks: the region leaves no aligned 512 MiB.
    let region = Region { base: BLOCK, size: 0x1000_0000, gpi: Gpi::NonSecure };
    let gpt = Gpt::build(&*machine, GEOMETRY, &[region]).unwrap();
    (machine, Arc::new(gpt))
}

/// Two CPUs delegate in the same contiguous block, which the first of them has to divide, while a third one uses
/// memory of the block all the time. When a delegation is over, nobody remembers the granule as the host's, and
/// nobody learns it again.
#[test]
fn no_cpu_keeps_a_divided_blocks_old_protection() {
    check_random(
        || {
            let (machine, gpt) = tables();
            let walker = {
                let machine = machine.clone();
                thread::spawn(move || {
                    for i in 1..8 {
                        machine.walk(BLOCK + i * 0x3F_0000);
                    }
                })
            };
            let cpus: Vec<_> = [0x1000_u64, 0x1F_5000]
                .map(|offset| {
                    let (machine, gpt) = (machine.clone(), gpt.clone());
                    thread::spawn(move || {
                        let pa = BLOCK + offset;
                        gpt.delegate(&*machine, pa).unwrap();
                        for _ in 0..2 {
                            assert!(
                                !machine.believes_non_secure(pa),
                                "{pa:#x} is still the host's for somebody"
                            );
                            thread::yield_now();
                        }
                    })
                })
                .into_iter()
                .collect();
            cpus.into_iter().for_each(|cpu| cpu.join().unwrap());
            walker.join().unwrap();
            for (offset, gpi) in [(0x1000, Gpi::Realm), (0x1F_5000, Gpi::Realm), (0x2000, Gpi::NonSecure)] {
                assert_eq!(gpt.lookup(&*machine, BLOCK + offset), Some(gpi));
            }
        },
        schedules(),
    );
}

/// Neighbours in one descriptor, and the same granule from two CPUs.
#[test]
fn transitions_of_neighbours_do_not_undo_each_other() {
    check_random(
        || {
            let (machine, gpt) = tables();
            let wins = Arc::new(AtomicU64::new(0));
            let cpus: Vec<_> = (0..3_u64)
                .map(|cpu| {
                    let (machine, gpt, wins) = (machine.clone(), gpt.clone(), wins.clone());
                    thread::spawn(move || {
                        let own = BLOCK + 0x1000 * (cpu + 1);
                        gpt.delegate(&*machine, own).unwrap();
                        match gpt.delegate(&*machine, BLOCK) {
                            Ok(()) => drop(wins.fetch_add(1, SeqCst)),
                            Err(error) => assert_eq!(error, TransitionError::BadPas),
                        }
                        gpt.undelegate(&*machine, own).unwrap();
                    })
                })
                .collect();
            cpus.into_iter().for_each(|cpu| cpu.join().unwrap());
            assert_eq!(wins.load(SeqCst), 1);
            assert_eq!(gpt.lookup(&*machine, BLOCK), Some(Gpi::Realm));
            for cpu in 1..4 {
                assert_eq!(gpt.lookup(&*machine, BLOCK + cpu * 0x1000), Some(Gpi::NonSecure));
            }
        },
        schedules(),
    );
}
