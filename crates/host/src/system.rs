//! The device node: what this machine can do, and making VMs.

use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::fmt;

use cca_abi::kvm::{self, Generation, ioctl, run};
use cca_abi::rmi::{Features0, VERSION_1_0};
use cca_abi::smccc::NOT_SUPPORTED;

use crate::caps;
use crate::errno::{Errno, Result};
use crate::files::FileObject;
use crate::kernel::{Kernel, LogLevel, Mutex, reserve};
use crate::lock::guarded;
use crate::rmi::{Rmi, RmiError};
use crate::rtt::Geometry;
use crate::stats::Stats;
use crate::vm::Vm;

/// This module's version: major in bits 23:16, minor in 15:8, patch in 7:0.
pub const MODULE_VERSION: i64 = {
    const fn number(text: &str) -> i64 {
        let (bytes, mut at, mut value) = (text.as_bytes(), 0, 0);
        while at < bytes.len() && bytes[at].is_ascii_digit() {
            value = value * 10 + (bytes[at] - b'0') as i64;
            at += 1;
        }
        value
    }
    number(env!("CARGO_PKG_VERSION_MAJOR")) << 16
        | number(env!("CARGO_PKG_VERSION_MINOR")) << 8
        | number(env!("CARGO_PKG_VERSION_PATCH"))
};

const ID_AA64MMFR1_EL1: u16 = 0xC039;

/// Choices of whoever loads the module.
#[derive(Clone, Copy, Debug)]
pub struct SystemConfig {
    /// The numbers that moved between versions of the ABI.
    pub generation: Generation,
}

impl Default for SystemConfig {
    fn default() -> Self {
        Self { generation: kvm::GENERATION_V2 }
    }
}

/// Why there can be no Realms on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeError {
    /// The firmware does not know RMI.
    NoRmm,
    /// The RMM speaks other versions only.
    Version {
        /// Lowest `RMI_VERSION` it speaks.
        lower: u64,
        /// Highest.
        higher: u64,
    },
    /// It failed otherwise.
    Rmi(RmiError),
}

impl fmt::Display for ProbeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoRmm => f.write_str("RMM: no RMI: this machine cannot run Realms"),
            Self::Version { lower, higher } => write!(
                f,
                "RMM: it speaks RMI {}.{} to {}.{}, not 1.0",
                lower >> 16,
                lower & 0xFFFF,
                higher >> 16,
                higher & 0xFFFF
            ),
            Self::Rmi(error) => write!(f, "RMM: {error}"),
        }
    }
}

/// VMIDs of Realms: a space of their own, apart from that of the kernel's VMs. Number 0 is not used.
pub(crate) struct Vmids {
    used: [u64; Self::WORDS],
    limit: u16,
}

impl Vmids {
    const WORDS: usize = 64;

    fn new(bits: u32) -> Self {
        Self { used: [0; Self::WORDS], limit: if bits > 8 { 4096 } else { 256 } }
    }

    fn place(vmid: u16) -> (usize, u64) {
        (usize::from(vmid / 64) % Self::WORDS, 1 << (vmid % 64))
    }

    pub(crate) fn take(&mut self) -> Option<u16> {
        let vmid = (1..self.limit).find(|vmid| {
            let (word, bit) = Self::place(*vmid);
            self.used[word] & bit == 0
        })?;
        let (word, bit) = Self::place(vmid);
        self.used[word] |= bit;
        Some(vmid)
    }

    pub(crate) fn give_back(&mut self, vmid: u16) {
        let (word, bit) = Self::place(vmid);
        self.used[word] &= !bit;
    }
}

/// The whole: one per module.
pub struct System<K: Kernel> {
    kernel: K,
    config: SystemConfig,
    rmi: Rmi<K>,
    version: u64,
    features: Features0,
    pub(crate) vmids: Mutex<K, Vmids>,
    /// All VMs, and where some were.
    vms: Mutex<K, Vec<Weak<Vm<K>>>>,
}

impl<K: Kernel> System<K> {
    /// Looks for an RMM that speaks RMI 1.0.
    ///
    /// # Errors
    /// If there is none; the module should then not load.
    pub fn probe(kernel: K, config: SystemConfig) -> core::result::Result<Arc<Self>, ProbeError> {
        let rmi = Rmi::for_system(kernel.clone(), Arc::new(Stats::default()));
        let (answer, lower, higher) = rmi.version(VERSION_1_0);
        if let Err(error) = answer {
            return Err(match error.status() {
                Some(_) => ProbeError::Version { lower, higher },
                None if error.x0 == NOT_SUPPORTED || error.x0 == 0xFFFF_FFFF => ProbeError::NoRmm,
                None => ProbeError::Rmi(error),
            });
        }
        let features = Features0(rmi.features(0).map_err(ProbeError::Rmi)?);
        // VMIDBits: 2 stands for 16.
        let vmid_bits = if (kernel.id_register(ID_AA64MMFR1_EL1) >> 4) & 0xF == 2 { 16 } else { 8 };
        Ok(Arc::new(Self {
            vmids: guarded(c"system.vmids", Vmids::new(vmid_bits)),
            vms: guarded(c"system.vms", Vec::new()),
            kernel,
            config,
            rmi,
            version: lower,
            features,
        }))
    }

    /// `RMI_VERSION`'s answer: major in bits 30:16, minor in 15:0.
    pub fn rmi_version(&self) -> u64 {
        self.version
    }

    /// The RMM's feature register 0.
    pub fn features(&self) -> Features0 {
        self.features
    }

    /// Counters of everything.
    pub fn stats(&self) -> &Stats {
        self.rmi.stats()
    }

    /// VMs that exist.
    pub fn live_vms(&self) -> u64 {
        self.stats().vms()
    }

    /// The numbers of the ABI.
    pub fn generation(&self) -> &Generation {
        &self.config.generation
    }

    pub(crate) fn rmi(&self) -> &Rmi<K> {
        &self.rmi
    }

    /// The kernel under it.
    pub fn kernel(&self) -> &K {
        &self.kernel
    }

    /// Widest address space a VM can have.
    pub fn ipa_limit(&self) -> u32 {
        u32::try_from(self.features.s2sz()).unwrap_or(0).min(48)
    }

    /// The longest vector of a Realm, in units of 128 bits; 0 without SVE.
    pub fn sve_max_vq(&self) -> u32 {
        if self.features.sve() { u32::try_from(self.features.sve_vl()).unwrap_or(0) + 1 } else { 0 }
    }

    /// Whether Realms can have a PMU: the RMM offers one, and the kernel lets us mask its interrupt.
    pub fn has_pmu(&self) -> bool {
        self.features.pmu() && self.kernel.can_mask_pmu()
    }

    /// Most vCPUs of a VM.
    pub fn max_vcpus(&self) -> u32 {
        // At most 2^n − 1 RECs, 15 as the largest n.
        let recs = 1u32.checked_shl(u32::try_from(self.features.max_recs_order()).unwrap_or(0)).unwrap_or(1);
        recs.saturating_sub(1).clamp(1, 512)
    }

    /// Takes all Realms down, because the machine is about to start another kernel, to which all memory must belong.
    pub fn shutdown(&self) {
        let mut at = 0;
        loop {
            // Not under the lock: the last reference may go here.
            let vm = match self.vms.lock().get(at) {
                Some(vm) => vm.upgrade(),
                None => return,
            };
            if let Some(vm) = vm {
                vm.end();
            }
            at += 1;
        }
    }

    /// An ioctl on the device node.
    ///
    /// # Errors
    /// As the KVM ABI says; `EINVAL` for an unknown one.
    pub fn ioctl(self: &Arc<Self>, command: u32, argument: u64) -> Result {
        match command {
            ioctl::GET_API_VERSION if argument == 0 => Ok(kvm::API_VERSION),
            ioctl::CHECK_EXTENSION => caps::check(self, None, argument),
            ioctl::GET_VCPU_MMAP_SIZE if argument == 0 => {
                i64::try_from(run::MMAP_SIZE).map_err(|_| Errno::EINVAL)
            }
            ioctl::CREATE_VM => self.create_vm(argument),
            _ => Err(Errno::EINVAL),
        }
    }

    fn create_vm(self: &Arc<Self>, vm_type: u64) -> Result {
        if vm_type & !(kvm::VM_TYPE_MASK | kvm::VM_TYPE_IPA_SIZE_MASK) != 0 {
            return Err(Errno::EINVAL);
        }
        if vm_type & kvm::VM_TYPE_MASK != kvm::VM_TYPE_REALM {
            self.rmi.say(
                LogLevel::Info,
                format_args!("vm: type {vm_type:#x} is no Realm: use the kernel's own KVM"),
            );
            return Err(Errno::EINVAL);
        }
        let bits = match u32::try_from(vm_type & kvm::VM_TYPE_IPA_SIZE_MASK).map_err(|_| Errno::EINVAL)? {
            0 => 40,
            bits => bits,
        };
        if bits > self.ipa_limit() {
            return Err(Errno::EINVAL);
        }
        let vm = Vm::new(self.clone(), Geometry::new(bits)?)?;
        {
            let mut vms = self.vms.lock();
            vms.retain(|vm| vm.strong_count() != 0);
            reserve(&mut vms, 1)?;
            vms.push(Arc::downgrade(&vm));
        }
        self.kernel.install_fd("kvm-realm-vm", FileObject::Vm(vm), 0).map(i64::from)
    }
}
