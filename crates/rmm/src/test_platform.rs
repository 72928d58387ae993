//! A machine for unit tests: memory with an owner per granule, and a guest made of closures.

extern crate std;

use core::fmt;
use core::sync::atomic::Ordering::Relaxed;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::boxed::Box;
use std::collections::VecDeque;
use std::sync::Mutex;
use std::vec::Vec;

use sha2::digest::generic_array::GenericArray;

use crate::config::Config;
use crate::context::{RecContext, word};
use crate::platform::{
    El1, El3Refused, Facts, GRANULE_SIZE, IdRegisters, LiveTimers, NsFault, Page, Platform, RealmExit,
};
use crate::sync::AtomicU16;
use crate::{DramBank, Rmm};

/// First byte of the machine's memory.
pub(crate) const BASE: u64 = 0x8000_0000;
/// Granules of memory.
pub(crate) const GRANULES: usize = 4096;
/// A second bank, whose addresses need LPA2.
pub(crate) const HIGH: u64 = 5 << 48;
/// Granules in it.
pub(crate) const HIGH_GRANULES: usize = 16;

/// What the guest does in one run.
pub(crate) type Step = Box<dyn FnOnce(&RecContext<'_>) -> RealmExit + Send>;

/// What the guest does whenever it runs.
pub(crate) type Habit = fn(&RecContext<'_>) -> RealmExit;

/// A zeroed granule.
pub(crate) fn new_page() -> Box<Page> {
    Box::new([const { AtomicU64::new(0) }; 512])
}

pub(crate) fn facts() -> Facts {
    Facts {
        id: IdRegisters {
            // LPA2.
            id_aa64mmfr0: 6 | 1 << 28 | 3 << 40,
            id_aa64mmfr1: 1 << 8 | 2 << 4,
            id_aa64mmfr2: 1 << 40,
            // PMUv3p5, SVE.
            id_aa64dfr0: 5 << 12 | 3 << 20 | 6 << 8 | 0xA,
            id_aa64pfr0: 1 << 32 | 2 << 28 | 0x22,
            id_aa64zfr0: 0x1234,
            ..IdRegisters::default()
        },
        // Five priority bits, 16-bit INTIDs, four list registers.
        ich_vtr: 4 << 29 | 3,
        // 128, 256, 512, 2048 bits.
        sve_lengths: 0b1000_0000_0000_1011,
        pmu_counters: 6,
        num_cpus: 4,
    }
}

pub(crate) fn test_config() -> Config {
    Config::new(&facts()).unwrap()
}

/// The machine.
pub(crate) struct TestPlatform {
    facts: Facts,
    memory: Vec<Box<Page>>,
    /// Who owns each granule; held while the host's side of it is accessed, as if every access were checked.
    realm_owned: Vec<Mutex<bool>>,
    /// What the guest will do next.
    pub(crate) script: Mutex<VecDeque<Step>>,
    /// Count of TLB invalidations.
    pub(crate) tlbis: AtomicUsize,
    /// If set, what the guest does when the script is empty.
    pub(crate) habit: Mutex<Option<Habit>>,
    /// How often debug registers and performance monitors were loaded.
    pub(crate) debug_loads: AtomicUsize,
    pub(crate) pmu_loads: AtomicUsize,
    /// Whether an interrupt is always pending.
    pub(crate) interrupts: AtomicBool,
    /// Whether hashes are accelerated.
    pub(crate) accelerated: AtomicBool,
}

impl TestPlatform {
    /// Low memory first.
    pub(crate) fn index(&self, pa: u64) -> usize {
        if pa >= HIGH {
            self.memory.len() - HIGH_GRANULES + usize::try_from((pa - HIGH) / GRANULE_SIZE).unwrap()
        } else {
            usize::try_from((pa - BASE) / GRANULE_SIZE).unwrap()
        }
    }

    /// All granules.
    pub(crate) fn granules(&self) -> impl Iterator<Item = u64> + use<> {
        let low = self.memory.len() - HIGH_GRANULES;
        let at = |base: u64, count: usize| (0..count as u64).map(move |n| base + n * GRANULE_SIZE);
        at(BASE, low).chain(at(HIGH, HIGH_GRANULES))
    }

    pub(crate) fn is_realm_owned(&self, pa: u64) -> bool {
        *self.realm_owned[self.index(pa)].lock().unwrap()
    }

    /// The granule, whoever owns it.
    pub(crate) fn raw(&self, pa: u64) -> &Page {
        &self.memory[self.index(pa)]
    }

    /// A host access: refused if the granule is not the host's.
    fn ns(&self, pa: u64, access: impl FnOnce(&[AtomicU64])) -> Result<(), NsFault> {
        let realm_owned = self.realm_owned[self.index(pa)].lock().unwrap();
        if *realm_owned {
            return Err(NsFault);
        }
        access(&self.raw(pa)[usize::try_from(pa % GRANULE_SIZE / 8).unwrap()..]);
        Ok(())
    }

    fn transfer(&self, pa: u64, to_realm: bool) -> Result<(), El3Refused> {
        let mut realm_owned = self.realm_owned[self.index(pa)].lock().unwrap();
        if *realm_owned == to_realm {
            return Err(El3Refused);
        }
        *realm_owned = to_realm;
        Ok(())
    }
}

impl Platform for TestPlatform {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn granule(&self, pa: u64) -> &Page {
        step();
        assert!(self.is_realm_owned(pa), "the RMM touches {pa:#x}, which it does not own");
        self.raw(pa)
    }

    fn zero(&self, pa: u64) {
        for word in self.granule(pa) {
            word.store(0, Relaxed);
        }
    }

    fn ns_read(&self, pa: u64, buf: &mut [u64]) -> Result<(), NsFault> {
        self.ns(pa, |words| {
            for (to, from) in buf.iter_mut().zip(words) {
                *to = from.load(Relaxed);
            }
        })
    }

    fn ns_write(&self, pa: u64, words: &[u64]) -> Result<(), NsFault> {
        self.ns(pa, |to| {
            for (to, &from) in to.iter().zip(words) {
                to.store(from, Relaxed);
            }
        })
    }

    fn ns_copy_granule(&self, src: u64, dst: u64) -> Result<(), NsFault> {
        let dst = self.granule(dst);
        self.ns(src, |words| {
            for (to, from) in dst.iter().zip(words) {
                to.store(from.load(Relaxed), Relaxed);
            }
        })
    }

    fn delegate(&self, pa: u64) -> Result<(), El3Refused> {
        self.transfer(pa, true)
    }

    fn undelegate(&self, pa: u64) -> Result<(), El3Refused> {
        self.transfer(pa, false)
    }

    fn publish_table_writes(&self) {
        step();
    }

    fn tlbi_ipa(&self, _vttbr: u64, _vtcr: u64, _ipa: u64, _level: i64) {
        self.tlbis.fetch_add(1, Relaxed);
    }

    fn tlbi_vmid(&self, _vttbr: u64, _vtcr: u64) {
        self.tlbis.fetch_add(1, Relaxed);
    }

    fn sha256_blocks(&self, state: &mut [u32; 8], blocks: &[[u8; 64]]) -> bool {
        if !self.accelerated.load(Relaxed) {
            return false;
        }
        for block in blocks {
            sha2::compress256(state, &[GenericArray::from(*block)]);
        }
        true
    }

    fn sha256_granule(&self, state: &mut [u32; 8], pa: u64) -> bool {
        let bytes: Vec<u8> =
            self.granule(pa).iter().flat_map(|word| word.load(Relaxed).to_le_bytes()).collect();
        bytes.chunks_exact(64).all(|block| self.sha256_blocks(state, &[block.try_into().unwrap()]))
    }

    fn sha512_blocks(&self, state: &mut [u64; 8], blocks: &[[u8; 128]]) -> bool {
        if !self.accelerated.load(Relaxed) {
            return false;
        }
        for block in blocks {
            sha2::compress512(state, &[GenericArray::from(*block)]);
        }
        true
    }

    fn sha512_granule(&self, state: &mut [u64; 8], pa: u64) -> bool {
        let bytes: Vec<u8> =
            self.granule(pa).iter().flat_map(|word| word.load(Relaxed).to_le_bytes()).collect();
        bytes.chunks_exact(128).all(|block| self.sha512_blocks(state, &[block.try_into().unwrap()]))
    }

    fn interrupt_pending(&self) -> bool {
        self.interrupts.load(Relaxed)
    }

    fn rec_load(&self, _cpu: usize, _ctx: &RecContext<'_>) {}

    fn rec_run(&self, _cpu: usize, ctx: &RecContext<'_>) -> RealmExit {
        let step = self.script.lock().unwrap().pop_front();
        let habit = *self.habit.lock().unwrap();
        match (step, habit) {
            (Some(step), _) => step(ctx),
            (None, Some(habit)) => habit(ctx),
            (None, None) => RealmExit::Irq,
        }
    }

    fn rec_save(&self, _cpu: usize, _ctx: &RecContext<'_>) {}

    fn el1(&self, _cpu: usize, ctx: &RecContext<'_>, register: El1) -> u64 {
        ctx.get(el1_word(register))
    }

    fn set_el1(&self, _cpu: usize, ctx: &RecContext<'_>, register: El1, value: u64) {
        ctx.set(el1_word(register), value);
    }

    fn timers(&self, _cpu: usize, ctx: &RecContext<'_>) -> LiveTimers {
        LiveTimers { cntv_ctl: ctx.get(word::CNTV_CTL), cntp_ctl: ctx.get(word::CNTP_CTL) }
    }

    fn debug_load(&self, _cpu: usize, _ctx: &RecContext<'_>) {
        self.debug_loads.fetch_add(1, Relaxed);
    }

    fn pmu_load(&self, _cpu: usize, _ctx: &RecContext<'_>) {
        self.pmu_loads.fetch_add(1, Relaxed);
    }

    fn log(&self, line: fmt::Arguments<'_>) {
        std::println!("{line}");
    }

    fn fatal(&self, reason: fmt::Arguments<'_>) -> ! {
        panic!("fatal: {reason}")
    }
}

fn el1_word(register: El1) -> usize {
    match register {
        El1::Vbar => word::VBAR_EL1,
        El1::Sctlr => word::SCTLR_EL1,
        El1::Elr => word::ELR_EL1,
        El1::Spsr => word::SPSR_EL1,
        El1::Esr => word::ESR_EL1,
        El1::Far => word::FAR_EL1,
        El1::Tcr => word::TCR_EL1,
        El1::Ttbr0 => word::TTBR0_EL1,
        El1::Ttbr1 => word::TTBR1_EL1,
    }
}

/// Another CPU may be faster here: what happens between two calls of the platform is not one step.
fn step() {
    #[cfg(feature = "explore")]
    shuttle::thread::yield_now();
}

/// An RMM on a fresh test machine with this many granules of low memory.
pub(crate) fn new_rmm(granules: usize) -> Rmm<'static, TestPlatform> {
    let all = granules + HIGH_GRANULES;
    let platform = TestPlatform {
        facts: facts(),
        memory: (0..all).map(|_| new_page()).collect(),
        realm_owned: (0..all).map(|_| Mutex::new(false)).collect(),
        script: Mutex::new(VecDeque::new()),
        tlbis: AtomicUsize::new(0),
        habit: Mutex::new(None),
        debug_loads: AtomicUsize::new(0),
        pmu_loads: AtomicUsize::new(0),
        interrupts: AtomicBool::new(false),
        accelerated: AtomicBool::new(false),
    };
    let metadata: Vec<AtomicU16> = (0..all).map(|_| AtomicU16::new(0)).collect();
    let bank = |base, granules| DramBank { base, size: granules as u64 * GRANULE_SIZE };
    let banks = [bank(BASE, granules), bank(HIGH, HIGH_GRANULES)];
    // One leak of a few pages per test.
    Rmm::new(platform, &banks, Vec::leak(metadata)).unwrap()
}
