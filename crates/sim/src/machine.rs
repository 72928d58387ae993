//! The machine: memory, CPUs, and the monitor and RMM running on them.
//!
//! CPUs are slots: a host thread takes a free one for the time of an SMC or a stay in a guest, as a scheduler would
//! give it one. On the slot the SMC goes to the monitor, from there to the RMM, whose own SMCs go to the monitor
//! again; all of it is the real code of the cores, running at once on as many slots as threads call.

use crate::guest::{Program, Running, Steps};
use crate::memory::{DRAM_BASE, Memory, PAGE_SIZE, Pas, SECURE_BASE};
use crate::realm::RealmWorld;
use crate::root::RootWorld;
use crate::stage2::Tlb;
use monitor::gpt::{Geometry, Gpi, Gpt, Region};
use monitor::{Action, Monitor, Regs, World};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, OnceLock};

/// The RMM's carve-out, as on QEMU's machine: not delegable.
pub const CARVE_OUT: (u64, u64) = (DRAM_BASE + 0x10_0000, 0x10_0000);
/// First byte of what the host's allocator owns.
pub const HOST_BASE: u64 = CARVE_OUT.0 + CARVE_OUT.1;

/// As an entry point: all at which nothing else is loaded. Without it, a vCPU that starts where no program is fails the
/// test; a hostile VMM can start one anywhere.
pub const ELSEWHERE: u64 = u64::MAX;

/// Shape of a machine.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// CPUs.
    pub cpus: usize,
    /// Bytes of DRAM.
    pub dram: u64,
    /// List registers of each CPU, 1 to 16.
    pub list_registers: u64,
}

impl Default for Shape {
    fn default() -> Self {
        Self { cpus: 4, dram: 32 << 20, list_registers: 4 }
    }
}

struct Firmware {
    monitor: Monitor,
    rmm: rmm::Rmm<'static, RealmWorld>,
}

/// A booted machine.
pub struct Machine {
    memory: Memory,
    tlb: Tlb,
    counter: AtomicU64,
    cpus: Vec<Cpu>,
    free: Mutex<Vec<usize>>,
    freed: Condvar,
    programs: Mutex<HashMap<u64, Program>>,
    running: Mutex<HashMap<u64, Running>>,
    next_script: AtomicU64,
    firmware: OnceLock<Firmware>,
    log: Mutex<Vec<String>>,
    failures: Mutex<Vec<String>>,
    smcs: AtomicU64,
}

#[derive(Default)]
struct Cpu {
    interrupt: AtomicBool,
}

impl Machine {
    /// Boots monitor and RMM.
    ///
    /// # Panics
    /// If one of them refuses to boot.
    #[must_use]
    pub fn boot(shape: Shape) -> Arc<Self> {
        let machine = Arc::new(Self {
            memory: Memory::new(shape.dram),
            tlb: Tlb::default(),
            counter: AtomicU64::new(1),
            cpus: (0..shape.cpus).map(|_| Cpu::default()).collect(),
            free: Mutex::new((0..shape.cpus).rev().collect()),
            freed: Condvar::new(),
            programs: Mutex::default(),
            running: Mutex::default(),
            next_script: AtomicU64::new(1),
            firmware: OnceLock::new(),
            log: Mutex::default(),
            failures: Mutex::default(),
            smcs: AtomicU64::new(0),
        });
        let root = machine.root();
        let geometry = Geometry {
            l0: SECURE_BASE + 0x10_0000,
            l1_pool: SECURE_BASE + 0x20_0000,
            l1_pool_size: 0x20_0000,
            pps_bits: 40,
            l0_bits: 30,
        };
        let regions = [
            Region { base: SECURE_BASE, size: crate::memory::SECURE_SIZE, gpi: Gpi::Root },
            Region { base: DRAM_BASE, size: shape.dram, gpi: Gpi::NonSecure },
            Region { base: CARVE_OUT.0, size: CARVE_OUT.1, gpi: Gpi::Realm },
        ];
        let gpt = Gpt::build(&root, geometry, &regions).expect("the tables fit");
        // 40 bits, write-back, inner shareable, 4 KiB, enabled.
        machine.memory.set_granule_protection(0x1_3502, geometry.l0 >> 12);
        let config = monitor::Config {
            cpus: shape.cpus,
            carve_out: monitor::manifest::Bank { base: CARVE_OUT.0, size: CARVE_OUT.1 },
            shared_page: CARVE_OUT.0 + CARVE_OUT.1 - PAGE_SIZE,
            measured: monitor::attest::Measured::default(),
            reserve: monitor::manifest::Bank { base: CARVE_OUT.0, size: 0 },
            rmm: true,
            interface: monitor::Interface::V2_0,
            id: monitor::enables::IdRegs::default(),
        };
        let monitor = Monitor::new(config, gpt);
        let banks = [rmm::DramBank { base: HOST_BASE, size: DRAM_BASE + shape.dram - HOST_BASE }];
        let metadata: Vec<AtomicU16> =
            (0..rmm::metadata_len(&banks).expect("banks")).map(|_| AtomicU16::new(0)).collect();
        let rmm = rmm::Rmm::new(
            RealmWorld::new(machine.clone(), shape.list_registers),
            &banks,
            Vec::leak(metadata),
        )
        .unwrap_or_else(|error| panic!("the RMM refused to boot: {error:?}"));
        assert!(machine.firmware.set(Firmware { monitor, rmm }).is_ok(), "booted once");
        for cpu in 0..shape.cpus {
            let monitor = &machine.firmware().monitor;
            let start = if cpu == 0 { monitor.start_primary((0, 0)) } else { monitor.start_cpu(cpu) };
            assert!(start.realm.is_some(), "the RMM boots on every CPU");
            let mut registers: Regs = [0; 31];
            registers[0] = cca_abi::rmm_el3::fid::BOOT_COMPLETE;
            let action = machine.firmware().monitor.handle_smc(&root, cpu, World::Realm, &mut registers);
            assert_eq!(action, Action::BootNormal);
        }
        machine
    }

    fn root(self: &Arc<Self>) -> RootWorld {
        RootWorld::new(self.clone())
    }

    fn firmware(&self) -> &Firmware {
        self.firmware.get().expect("booted")
    }

    /// Its memory.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Its TLBs.
    #[must_use]
    pub fn tlb(&self) -> &Tlb {
        &self.tlb
    }

    /// How many CPUs it has.
    #[must_use]
    pub fn cpus(&self) -> usize {
        self.cpus.len()
    }

    /// The system counter. It moves only when something happens.
    #[must_use]
    pub fn counter(&self) -> u64 {
        self.counter.load(Relaxed)
    }

    /// Lets time pass.
    pub fn advance(&self, ticks: u64) {
        self.counter.fetch_add(ticks, Relaxed);
    }

    /// Lets time pass until `deadline`, if that lies ahead.
    pub fn advance_to(&self, deadline: u64) {
        self.counter.fetch_max(deadline, Relaxed);
    }

    /// SMCs that the host has made.
    #[must_use]
    pub fn smc_count(&self) -> u64 {
        self.smcs.load(Relaxed)
    }

    /// Runs `work` on a CPU: the next that is free.
    pub fn on_cpu<T>(&self, work: impl FnOnce(usize) -> T) -> T {
        let cpu = self.take_cpu();
        let slot = Slot { machine: self, cpu };
        work(slot.cpu)
    }

    #[cfg(not(feature = "explore"))]
    fn take_cpu(&self) -> usize {
        let mut free = self.free.lock().unwrap();
        loop {
            match free.pop() {
                Some(cpu) => return cpu,
                None => free = self.freed.wait(free).unwrap(),
            }
        }
    }

    /// The machine outlives a schedule, so it has no locks that belong to one.
    #[cfg(feature = "explore")]
    fn take_cpu(&self) -> usize {
        loop {
            let cpu = self.free.lock().unwrap().pop();
            match cpu {
                Some(cpu) => return cpu,
                None => crate::sync::yield_now(),
            }
        }
    }

    /// Raises an interrupt for the host on `cpu`.
    pub fn interrupt(&self, cpu: usize) {
        self.cpus[cpu].interrupt.store(true, SeqCst);
    }

    /// The host takes what is pending on `cpu`; so does an exit from the Realm world on the way.
    pub(crate) fn clear_interrupt(&self, cpu: usize) {
        self.cpus[cpu].interrupt.store(false, SeqCst);
    }

    /// Whether an interrupt is pending on `cpu`.
    pub(crate) fn take_interrupt(&self, cpu: usize) -> bool {
        self.cpus[cpu].interrupt.load(SeqCst)
    }

    /// An SMC of the host on `cpu`: monitor, RMM, and back.
    ///
    /// # Panics
    /// On an action that the host of this machine never causes (power control).
    pub fn host_smc(self: &Arc<Self>, cpu: usize, registers: &mut [u64; 18]) {
        self.smcs.fetch_add(1, Relaxed);
        self.advance(1);
        let root = self.root();
        let firmware = self.firmware();
        let mut regs: Regs = [0; 31];
        regs[..18].copy_from_slice(registers);
        match firmware.monitor.handle_smc(&root, cpu, World::NonSecure, &mut regs) {
            Action::Resume => {}
            Action::ToRealm => {
                let mut call = std::array::from_fn(|n| regs[n]);
                firmware.rmm.handle_rmi(cpu, &mut call);
                // The RMM's SMC back, as its image makes it: results behind the function identifier.
                let mut back: Regs = [0; 31];
                back[0] = cca_abi::rmm_el3::fid::REQ_COMPLETE;
                back[1..9].copy_from_slice(&call);
                let action = firmware.monitor.handle_smc(&root, cpu, World::Realm, &mut back);
                assert_eq!(action, Action::ToNormal);
                regs[..8].copy_from_slice(&back[1..9]);
            }
            action => panic!("host: unexpected {action:?}"),
        }
        registers.copy_from_slice(&regs[..18]);
    }

    /// An SMC of the RMM to EL3.
    pub(crate) fn realm_smc(self: &Arc<Self>, registers: &mut [u64; 18]) {
        let mut regs: Regs = [0; 31];
        regs[..18].copy_from_slice(registers);
        let action = self.firmware().monitor.handle_smc(&self.root(), 0, World::Realm, &mut regs);
        assert_eq!(action, Action::Resume);
        registers.copy_from_slice(&regs[..18]);
    }

    /// Places a guest program at an entry point.
    pub fn load_program(&self, entry: u64, script: impl Fn(&crate::guest::Guest) + Send + Sync + 'static) {
        self.programs.lock().unwrap().insert(entry, Program::Script(Arc::new(script)));
    }

    /// Places a guest program at an entry point that has no thread: `start` makes, for each vCPU that starts there, what
    /// says the next operation.
    pub fn load_steps(&self, entry: u64, start: impl Fn() -> Steps + Send + Sync + 'static) {
        self.programs.lock().unwrap().insert(entry, Program::Steps(Arc::new(start)));
    }

    pub(crate) fn program(&self, entry: u64) -> Option<Program> {
        let programs = self.programs.lock().unwrap();
        programs.get(&entry).or_else(|| programs.get(&ELSEWHERE)).cloned()
    }

    pub(crate) fn take_running(&self, id: u64) -> Option<Running> {
        self.running.lock().unwrap().remove(&id)
    }

    pub(crate) fn put_running(&self, id: u64, running: Running) -> u64 {
        let id = if id == 0 { self.next_script.fetch_add(1, Relaxed) } else { id };
        self.running.lock().unwrap().insert(id, running);
        id
    }

    /// A line of one of the worlds.
    pub fn log(&self, line: String) {
        self.log.lock().unwrap().push(line);
    }

    /// Forgets all lines.
    pub fn forget_log(&self) {
        self.log.lock().unwrap().clear();
    }

    /// All lines so far.
    #[must_use]
    pub fn log_lines(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    pub(crate) fn report_guest_failure(&self, text: String) {
        self.failures.lock().unwrap().push(format!("guest: {text}"));
    }

    /// Remembers that a rule was broken where no panic is possible.
    pub(crate) fn report_violation(&self, text: String) {
        self.failures.lock().unwrap().push(text);
    }

    /// Fails if a guest script panicked or a rule was broken.
    ///
    /// # Panics
    /// With what went wrong.
    pub fn assert_no_failures(&self) {
        let failures = self.failures.lock().unwrap();
        assert!(failures.is_empty(), "{failures:#?}\nlog: {:#?}", self.log_lines());
    }

    /// Fails unless everything that a host may own is Non-secure, in the granule protection tables' own words.
    ///
    /// # Panics
    /// With the first granule that is not.
    pub fn assert_all_memory_is_back(&self) {
        let mut pa = HOST_BASE;
        while pa < DRAM_BASE + self.memory.dram_size() {
            assert!(
                self.memory.check(Pas::NonSecure, pa).is_ok(),
                "granule {pa:#x} did not come back (GPI {:x?})\nlog: {:#?}",
                self.memory.gpi(pa),
                self.log_lines()
            );
            pa += PAGE_SIZE;
        }
    }
}

/// A CPU in use; free again when dropped.
struct Slot<'a> {
    machine: &'a Machine,
    cpu: usize,
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.machine.clear_interrupt(self.cpu);
        self.machine.free.lock().unwrap().push(self.cpu);
        self.machine.freed.notify_one();
    }
}
