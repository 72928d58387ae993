//! What most scenarios begin and end with: a booted machine with a host on it, and the question whether everything
//! came back.

use crate::guest::Guest;
use crate::host::SimKernel;
use crate::machine::{Machine, Shape};
use crate::vmm::{Config, ENTRY, Vmm};
use cca_abi::kvm::{GENERATION_V2, Generation};
use kvm_realm::{System, SystemConfig};
use std::sync::Arc;

/// A machine, its host kernel, and the host core on it.
pub struct Bench {
    /// The machine.
    pub machine: Arc<Machine>,
    /// The kernel.
    pub kernel: SimKernel,
    /// The host core.
    pub system: Arc<System<SimKernel>>,
    /// Free pages before anybody did anything.
    free: usize,
}

impl Default for Bench {
    fn default() -> Self {
        Self::new()
    }
}

impl Bench {
    /// Boots.
    ///
    /// # Panics
    /// If the host core finds no RMM.
    #[must_use]
    pub fn new() -> Self {
        Self::of(GENERATION_V2)
    }

    /// Boots, with a host that speaks another generation of the ABI.
    ///
    /// # Panics
    /// If the host core finds no RMM.
    #[must_use]
    pub fn of(generation: Generation) -> Self {
        Self::on(Machine::boot(Shape::default()), generation)
    }

    /// A new host on a machine that has booted, and that nobody else uses.
    ///
    /// # Panics
    /// If the host core finds no RMM.
    #[must_use]
    pub fn on(machine: Arc<Machine>, generation: Generation) -> Self {
        let kernel = SimKernel::new(machine.clone());
        let system = System::probe(kernel.clone(), SystemConfig { generation })
            .unwrap_or_else(|error| panic!("the host core found no RMM: {error:?}"));
        let free = kernel.free_pages();
        Self { machine, kernel, system, free }
    }

    /// A VMM that has not made anything yet.
    #[must_use]
    pub fn vmm(&self, config: Config) -> Vmm {
        Vmm::new(&self.kernel, &self.system, config)
    }

    /// A VMM with a Realm that is ready to run whatever program is loaded.
    ///
    /// # Panics
    /// If a step fails.
    #[must_use]
    pub fn ready(&self, config: Config) -> Vmm {
        let mut vmm = self.vmm(config);
        if let Err((step, errno)) = vmm.build() {
            panic!("{step}: {errno}; log: {:#?}", self.machine.log_lines());
        }
        vmm
    }

    /// As [`Self::ready`], with the boot vCPU's program.
    ///
    /// # Panics
    /// If a step fails.
    #[must_use]
    pub fn built(&self, config: Config, script: impl Fn(&Guest) + Send + Sync + 'static) -> Vmm {
        self.machine.load_program(ENTRY, script);
        self.ready(config)
    }

    /// Ends the VMM's process and checks that nothing is missing.
    ///
    /// # Panics
    /// If a rule was broken, or something is missing.
    pub fn finish(&self, vmm: Vmm) {
        vmm.process.exit();
        drop(vmm);
        self.machine.assert_no_failures();
        self.machine.assert_all_memory_is_back();
        let log = || self.machine.log_lines();
        assert_eq!(self.kernel.free_pages(), self.free, "pages are missing; log: {:#?}", log());
        assert_eq!(self.system.live_vms(), 0, "a VM outlives its files; log: {:#?}", log());
        assert_eq!(self.system.stats().tables(), 0, "tables are still counted; log: {:#?}", log());
        assert_eq!(self.system.stats().leaked(), 0, "pages are lost; log: {:#?}", log());
        assert_eq!(self.system.stats().shared(), 0, "pages are still shared; log: {:#?}", log());
    }
}
