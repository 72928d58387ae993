//! The vCPU file: its ioctls except `KVM_RUN`, which is [`crate::run`].

use crate::sync::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use alloc::sync::Arc;

use cca_abi::kvm::{self, ioctl, mp_state, vcpu_feature};
use cca_abi::rmi::Ripas;

use crate::caps;
use crate::errno::{Errno, Result};
use crate::events::View;
use crate::fault::Fault;
use crate::kernel::{Fill, Kernel, Mutex, PAGE_SIZE, Page, VcpuThread, read_user, write_user};
use crate::lock::guarded;
use crate::realm::RealmState;
use crate::rec::Rec;
use crate::timer::Timers;
use crate::vm::Vm;

/// `KVM_ARM_VCPU_SVE`, as argument of `KVM_ARM_VCPU_FINALIZE`.
const FINALIZE_SVE: u32 = vcpu_feature::SVE;

/// What the next entry must tell the RMM about the last exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pending {
    /// Nothing.
    None,
    /// User space is to supply so many bytes for the load with this syndrome.
    MmioRead(usize, u64),
    /// The access was emulated; with the value, if it was a load.
    Emulated(Option<u64>),
    /// The access failed: external abort.
    Sea,
    /// A host call was answered: the registers are in [`VcpuState::host_call`].
    HostCall,
    /// The RIPAS change was refused.
    RipasRejected,
    /// The RIPAS change of this range is to be carried out before the next entry.
    RipasChange(u64, u64, Ripas),
}

/// What only the thread that holds a vCPU may see.
pub struct VcpuState<K: Kernel> {
    /// Features given by `KVM_ARM_VCPU_INIT`.
    pub features: Option<u32>,
    /// `KVM_ARM_VCPU_FINALIZE` for the REC was done.
    pub finalized: bool,
    /// Longest vector, in units of 128 bits, if the vCPU has SVE.
    pub sve_vq: u8,
    /// `KVM_ARM_VCPU_FINALIZE` for SVE was done.
    pub sve_finalized: bool,
    /// The PMU's interrupt was set on this vCPU.
    pub pmu_irq_set: bool,
    /// Its PMU was initialised.
    pub pmu_ready: bool,
    /// x0 to x7 for the first entry.
    pub gprs: [u64; 8],
    /// PC for the first entry.
    pub pc: u64,
    /// From activation on.
    pub rec: Option<Rec<K>>,
    /// For the next entry.
    pub pending: Pending,
    /// The Realm's registers after a host call, or with a PSCI call that user space answers.
    pub host_call: [u64; 31],
    /// User space was told of a call; whether it may also change the registers.
    pub user_call: Option<bool>,
    /// Whether `pending` is the answer to an access that user space emulates, and which may thus still fail.
    pub user_mmio: bool,
    /// Signals blocked during `KVM_RUN`.
    pub signal_mask: Option<u64>,
    /// Timers at the last exit.
    pub timers: Timers,
    /// Timer lines as the vGIC knows them.
    pub timer_lines: [bool; 2],
    /// The PMU's line.
    pub pmu_line: bool,
    /// What it has seen of the VM's eventfds.
    pub(crate) events: View<K>,
    /// The vCPU is asleep in WFI.
    pub waiting: bool,
    /// It has switched itself off, but another vCPU may have switched it on again at the same time.
    pub maybe_off: bool,
}

impl<K: Kernel> VcpuState<K> {
    /// The vector length that the Realm must have, in units of 128 bits; `None` without SVE.
    pub(crate) fn sve_choice(&self) -> Option<u8> {
        self.has(vcpu_feature::SVE).then_some(self.sve_vq)
    }
}

/// One vCPU. Owned by its VM.
pub struct Vcpu<K: Kernel> {
    /// Number given by user space.
    pub id: u32,
    /// Place in the VM's table, and number in the vGIC.
    pub index: usize,
    pub(crate) thread: K::VcpuThread,
    /// `struct kvm_run`, mapped by user space, which may write anything into it at any time.
    pub(crate) run: K::Page,
    pub(crate) state: Mutex<K, VcpuState<K>>,
    /// Physical address of the REC; 0 if there is none.
    rec: AtomicU64,
    /// `mp_state`.
    power: AtomicU32,
    /// How often another vCPU switched this one on.
    pub(crate) switched_on: AtomicU32,
    /// There is news for the thread.
    pub(crate) news: AtomicBool,
    pub(crate) has_file: AtomicBool,
}

impl<K: Kernel> Vcpu<K> {
    pub(crate) fn new(kernel: &K, id: u32, index: usize, sve_vq: u32) -> Result<Self> {
        Ok(Self {
            id,
            index,
            thread: kernel.new_vcpu_thread(),
            run: kernel.alloc_page(Fill::Zeroed)?,
            state: guarded(
                c"vcpu.state",
                VcpuState {
                    features: None,
                    finalized: false,
                    sve_vq: u8::try_from(sve_vq).unwrap_or(0),
                    sve_finalized: false,
                    pmu_irq_set: false,
                    pmu_ready: false,
                    gprs: [0; 8],
                    pc: 0,
                    rec: None,
                    pending: Pending::None,
                    host_call: [0; 31],
                    user_call: None,
                    user_mmio: false,
                    signal_mask: None,
                    timers: Timers::default(),
                    timer_lines: [false; 2],
                    pmu_line: false,
                    events: View::default(),
                    waiting: false,
                    maybe_off: false,
                },
            ),
            rec: AtomicU64::new(0),
            power: AtomicU32::new(mp_state::RUNNABLE),
            switched_on: AtomicU32::new(0),
            news: AtomicBool::new(false),
            has_file: AtomicBool::new(false),
        })
    }

    /// Affinity: the one that the RMM demands of the REC with this number, in the fields of `RmiRecMpidr` and of
    /// `MPIDR_EL1` alike.
    pub fn mpidr(&self) -> u64 {
        let id = u64::from(self.id);
        id & 0xF | (id >> 4 & 0xFF) << 8 | (id >> 12 & 0xFF) << 16
    }

    /// Makes the thread look for news. Any context.
    pub fn kick(&self) {
        self.news.store(true, Ordering::SeqCst);
        self.thread.kick();
    }

    /// Physical address of the REC.
    pub(crate) fn rec(&self) -> Option<u64> {
        Some(self.rec.load(Ordering::Acquire)).filter(|pa| *pa != 0)
    }

    pub(crate) fn set_rec(&self, pa: Option<u64>) {
        self.rec.store(pa.unwrap_or(0), Ordering::Release);
    }

    /// Whether the vCPU is powered on.
    pub fn is_on(&self) -> bool {
        self.power.load(Ordering::SeqCst) == mp_state::RUNNABLE
    }

    pub(crate) fn set_power(&self, on: bool) {
        self.power.store(if on { mp_state::RUNNABLE } else { mp_state::STOPPED }, Ordering::SeqCst);
    }
}

/// The file of a vCPU.
pub struct VcpuFile<K: Kernel> {
    pub(crate) vm: Arc<Vm<K>>,
    pub(crate) vcpu: Arc<Vcpu<K>>,
}

impl<K: Kernel> VcpuFile<K> {
    /// Physical address of page `index` of the file's mapping: `kvm_run`, then the VM's coalesced ring. Valid as
    /// long as the file is open.
    pub fn mmap_page(&self, index: usize) -> Option<u64> {
        match index {
            0 => Some(self.vcpu.run.pa()),
            1 => Some(self.vm.ring.pa()),
            _ => None,
        }
    }

    /// An ioctl on the vCPU file.
    ///
    /// # Errors
    /// As the KVM ABI says; `EIO` from another process; `ENOTTY` for an unknown one.
    pub fn ioctl(&self, command: u32, argument: u64) -> Result {
        self.vm.check_process()?;
        let kernel = &self.vm.kernel;
        if command == self.vm.system.generation().psci_complete {
            return self.psci_complete(&read_user(kernel, argument)?);
        }
        match command {
            ioctl::RUN if argument == 0 => self.run(),
            ioctl::ARM_VCPU_INIT => self.init(&read_user(kernel, argument)?),
            ioctl::ARM_VCPU_FINALIZE => self.finalize(read_user(kernel, argument)?),
            ioctl::GET_ONE_REG => self.get_one_reg(&read_user(kernel, argument)?),
            ioctl::SET_ONE_REG => self.set_one_reg(&read_user(kernel, argument)?),
            ioctl::GET_REG_LIST => self.list_regs(argument),
            ioctl::GET_MP_STATE => {
                let state = self.vcpu.power.load(Ordering::SeqCst);
                write_user(kernel, argument, &state)?;
                Ok(0)
            }
            ioctl::SET_MP_STATE => self.set_mp_state(read_user(kernel, argument)?),
            ioctl::SET_SIGNAL_MASK => self.set_signal_mask(argument),
            ioctl::GET_VCPU_EVENTS => {
                let mut events: kvm::VcpuEvents = zerocopy::FromZeros::new_zeroed();
                events.ext_dabt_pending = u8::from(matches!(self.vcpu.state.lock().pending, Pending::Sea));
                write_user(kernel, argument, &events)?;
                Ok(0)
            }
            ioctl::SET_VCPU_EVENTS => self.set_events(&read_user(kernel, argument)?),
            ioctl::PRE_FAULT_MEMORY => self.pre_fault(argument),
            ioctl::HAS_DEVICE_ATTR | ioctl::SET_DEVICE_ATTR | ioctl::GET_DEVICE_ATTR => {
                self.device_attr(command, &read_user(kernel, argument)?)
            }
            ioctl::RUN | ioctl::SET_GUEST_DEBUG => Err(Errno::EINVAL),
            _ => Err(Errno::ENOTTY),
        }
    }

    fn init(&self, init: &kvm::VcpuInit) -> Result {
        const POWER_OFF: u32 = 1 << vcpu_feature::POWER_OFF;
        const PSCI: u32 = 1 << vcpu_feature::PSCI_0_2;
        const SVE: u32 = 1 << vcpu_feature::SVE;
        const PMU: u32 = 1 << vcpu_feature::PMU_V3;
        const PTRAUTH: u32 = 1 << vcpu_feature::PTRAUTH_ADDRESS | 1 << vcpu_feature::PTRAUTH_GENERIC;
        let rec = 1 << self.vm.system.generation().vcpu_rec;

        let features = init.features[0];
        let known = ((1 << (vcpu_feature::HAS_EL2 + 1)) - 1) | rec;
        if features & !known != 0 || init.features[1..].iter().any(|word| *word != 0) {
            return Err(Errno::ENOENT);
        }
        let pairs = features & PTRAUTH == 0 || features & PTRAUTH == PTRAUTH;
        let ptrauth = features & PTRAUTH == 0 || caps::has_pointer_authentication(&self.vm.kernel);
        if init.target != kvm::TARGET_GENERIC_V8
            || features & !(POWER_OFF | PSCI | SVE | PMU | PTRAUTH | rec) != 0
            || (features & SVE != 0 && self.vm.system.sve_max_vq() == 0)
            || (features & PMU != 0 && !self.vm.system.has_pmu())
            || !pairs
            || !ptrauth
        {
            return Err(Errno::EINVAL);
        }
        let mut state = self.vcpu.state.lock();
        if state.features.is_some_and(|before| (before ^ features) & !POWER_OFF != 0) {
            return Err(Errno::EINVAL);
        }
        state.features = Some(features);
        // A REC keeps its registers; before there is one, this is the architectural reset.
        if !state.finalized {
            state.gprs = [0; 8];
            state.pc = 0;
        }
        if state.rec.is_none() {
            self.vcpu.set_power(features & POWER_OFF == 0);
        }
        Ok(0)
    }

    /// The REC itself is created at activation, when the order of all is known.
    fn finalize(&self, what: u32) -> Result {
        let mut state = self.vcpu.state.lock();
        let features = state.features.ok_or(Errno::ENOEXEC)?;
        if what == FINALIZE_SVE {
            if !state.has(vcpu_feature::SVE) {
                return Err(Errno::EINVAL);
            }
            if state.sve_finalized {
                return Err(Errno::EPERM);
            }
            state.sve_finalized = true;
            return Ok(0);
        }
        if what != self.vm.system.generation().vcpu_rec {
            return Err(Errno::EINVAL);
        }
        if self.vm.realm_state() != RealmState::New {
            return Err(Errno::ENOENT);
        }
        // The Realm's vectors and PMU are those of the vCPUs that it was created with.
        let alike = self.vm.realm_extras() == (state.sve_choice(), state.has(vcpu_feature::PMU_V3));
        if features & (1 << vcpu_feature::PSCI_0_2) == 0 || !alike {
            return Err(Errno::EINVAL);
        }
        if state.has(vcpu_feature::SVE) && !state.sve_finalized {
            return Err(Errno::EPERM);
        }
        if state.finalized {
            return Err(Errno::EPERM);
        }
        state.finalized = true;
        Ok(0)
    }

    /// `KVM_PRE_FAULT_MEMORY`: gives the Realm the pages of a range, each by the face that its attribute names, as if it
    /// had touched them. User space is told what is left of the range; it is an error only if nothing was done.
    fn pre_fault(&self, argument: u64) -> Result {
        let vm = &*self.vm;
        let asked: kvm::PreFaultMemory = read_user(&vm.kernel, argument)?;
        let end = asked.gpa.checked_add(asked.size).ok_or(Errno::EINVAL)?;
        let crooked = asked.gpa % PAGE_SIZE != 0 || asked.size % PAGE_SIZE != 0 || asked.size == 0;
        if crooked || asked.flags != 0 || asked.padding != [0; 5] {
            return Err(Errno::EINVAL);
        }
        if vm.realm_state() != RealmState::Active {
            // Before that, a page without contents could not be populated any more.
            return Err(Errno::EPERM);
        }
        let mut left = asked;
        let mut result = Ok(0);
        while left.gpa < end && result.is_ok() {
            let private = vm.memory.lock().private.contains(left.gpa);
            let fault = if private { vm.private_fault(left.gpa) } else { vm.shared_fault(left.gpa) };
            result = match fault {
                Ok(Fault::Resolved) => {
                    left.gpa += PAGE_SIZE;
                    left.size -= PAGE_SIZE;
                    if vm.kernel.is_killed() {
                        Err(Errno::EINTR)
                    } else {
                        self.vcpu.thread.prepare().map(|()| 0)
                    }
                }
                Ok(Fault::NoSlot) => Err(Errno::ENOENT),
                Ok(Fault::ToUser) => Err(Errno::EFAULT),
                Err(errno) => Err(errno),
            };
        }
        write_user(&vm.kernel, argument, &left)?;
        if left.size < asked.size { Ok(0) } else { result }
    }

    fn set_mp_state(&self, state: u32) -> Result {
        let _vcpu = self.vcpu.state.lock();
        match state {
            mp_state::RUNNABLE => self.vcpu.set_power(true),
            mp_state::STOPPED => self.vcpu.set_power(false),
            _ => return Err(Errno::EINVAL),
        }
        self.vcpu.kick();
        Ok(0)
    }

    fn set_signal_mask(&self, argument: u64) -> Result {
        let kernel = &self.vm.kernel;
        let mask = if argument == 0 {
            None
        } else {
            if read_user::<_, u32>(kernel, argument)? != 8 {
                return Err(Errno::EINVAL);
            }
            Some(read_user::<_, u64>(kernel, argument.checked_add(4).ok_or(Errno::EFAULT)?)?)
        };
        self.vcpu.state.lock().signal_mask = mask;
        Ok(0)
    }

    /// A Realm takes an external abort as the answer to an access that user space was asked to emulate, and nothing
    /// else.
    fn set_events(&self, events: &kvm::VcpuEvents) -> Result {
        if events.serror_pending != 0 || events.serror_has_esr != 0 || events.ext_dabt_pending > 1 {
            return Err(Errno::EINVAL);
        }
        if events.pad != [0; 5] || events.reserved != [0; 12] {
            return Err(Errno::EINVAL);
        }
        if events.ext_dabt_pending == 0 {
            return Ok(0);
        }
        let mut state = self.vcpu.state.lock();
        if !state.user_mmio {
            return Err(Errno::EINVAL);
        }
        state.pending = Pending::Sea;
        state.user_mmio = false;
        Ok(0)
    }
}
