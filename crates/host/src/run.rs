//! `KVM_RUN`: enter the REC, take back what it left, do what its exit asks for, again and again until user space must
//! be asked.

use crate::sync::Ordering::{Relaxed, SeqCst};

use cca_abi::kvm::{self, run, vcpu_feature};
use cca_abi::rmi::{ExitReason, MAX_LRS, Ripas, Status, enter_flags};

use crate::errno::{Errno, Result};
use crate::fault::{Fault, RipasChange};
use crate::hostcall;
use crate::irqchip::VmVgic;
use crate::kernel::{Entry, Kernel, LogLevel, PAGE_SIZE, Page, Trace, VcpuThread};
use crate::mmio::loaded;
use crate::realm::RealmState;
use crate::rmi::Rmi;
use crate::smccc::Action;
use crate::vcpu::{Pending, Vcpu, VcpuFile, VcpuState};
use crate::vm::Vm;

/// What follows an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// The vCPU goes on.
    Enter,
    /// User space must be asked: `kvm_run` says what.
    ToUser,
    /// The same, and `KVM_RUN` fails with `EFAULT`, as KVM does for memory faults.
    Fault,
}

/// One call of `KVM_RUN`.
pub(crate) struct Runner<'a, K: Kernel> {
    pub(crate) vm: &'a Vm<K>,
    pub(crate) vcpu: &'a Vcpu<K>,
    pub(crate) vgic: &'a VmVgic<K>,
    pub(crate) state: &'a mut VcpuState<K>,
    lrs: usize,
}

impl<K: Kernel> VcpuFile<K> {
    /// `KVM_RUN`.
    pub(crate) fn run(&self) -> Result {
        let (vm, vcpu) = (&*self.vm, &*self.vcpu);
        let mut guard = vcpu.state.lock();
        let state = &mut *guard;
        if state.features.is_none() {
            return Err(Errno::ENOEXEC);
        }
        if state.rec.is_none() || vm.realm_state() != RealmState::Active {
            return Err(Errno::EPERM);
        }
        let vgic = vm.vgic().ok_or(Errno::EOPNOTSUPP)?;
        vgic.start().map_err(|error| {
            vm.log_error(format_args!("vgic: it cannot start as configured: {error:?}"));
            Errno::EINVAL
        })?;
        vm.has_run.store(true, Relaxed);
        vcpu.run.store_u32(run::EXIT_REASON, kvm::exit::UNKNOWN);

        if state.has(vcpu_feature::PMU_V3) && !state.pmu_ready {
            return Err(Errno::EINVAL);
        }
        if let Pending::MmioRead(len, esr) = state.pending {
            let value = (0..len.min(8))
                .rev()
                .fold(0, |value, byte| value << 8 | u64::from(vcpu.run.load_u8(run::MMIO_DATA + byte)));
            state.pending = Pending::Emulated(Some(loaded(esr, value)));
        }
        state.user_mmio = false;
        state.user_call = None;
        if vcpu.run.load_u8(run::IMMEDIATE_EXIT) != 0 {
            vcpu.run.store_u32(run::EXIT_REASON, kvm::exit::INTR);
            return Err(Errno::EINTR);
        }

        let old_mask = state.signal_mask.map(|mask| vm.kernel.set_signal_mask(mask));
        let lrs = usize::try_from(vm.system.features().gicv3_num_lrs() + 1).unwrap_or(1).min(MAX_LRS);
        vcpu.thread.begin();
        let result = Runner { vm, vcpu, vgic, state, lrs }.run();
        vcpu.thread.end();
        if let Some(mask) = old_mask {
            vm.kernel.set_signal_mask(mask);
        }
        result
    }
}

impl<K: Kernel> Runner<'_, K> {
    fn run(&mut self) -> Result {
        loop {
            match self.step() {
                Ok(Next::Enter) => {}
                Ok(Next::ToUser) => return Ok(0),
                Ok(Next::Fault) => return Err(Errno::EFAULT),
                Err(errno) => {
                    if errno == Errno::EINTR {
                        self.set_exit(kvm::exit::INTR);
                    }
                    return Err(errno);
                }
            }
        }
    }

    fn set_exit(&self, reason: u32) {
        self.vcpu.run.store_u32(run::EXIT_REASON, reason);
    }

    fn may_run(vm: &Vm<K>, vcpu: &Vcpu<K>) -> bool {
        vcpu.is_on() && !vm.stopped.load(SeqCst)
    }

    /// One entry at most.
    fn step(&mut self) -> Result<Next> {
        self.vcpu.thread.prepare()?;
        if self.vm.is_ending() {
            return Err(Errno::EIO);
        }
        let (vm, vcpu, vgic, lrs) = (self.vm, self.vcpu, self.vgic, self.lrs);
        if !Self::may_run(vm, vcpu) {
            vcpu.news.store(false, SeqCst);
            vcpu.thread
                .block(None, &mut || vcpu.news.load(SeqCst) || vm.is_ending() || Self::may_run(vm, vcpu))?;
            return Ok(Next::Enter);
        }
        if self.state.waiting {
            return self.wait();
        }

        if let Pending::RipasChange(base, top, ripas) = self.state.pending {
            // What cannot be done, the Realm asks for again.
            let pa = self.state.rec.as_ref().ok_or(Errno::EPERM)?.pa();
            self.state.pending = match self.vm.change_ripas(pa, base, top, ripas)? {
                RipasChange::Rejected => Pending::RipasRejected,
                RipasChange::Changed(_) | RipasChange::Unbacked => Pending::None,
            };
        }

        let rec = self.state.rec.as_ref().ok_or(Errno::EPERM)?;
        let mut flags = enter_flags::TRAP_WFI;
        match &self.state.pending {
            Pending::None | Pending::MmioRead(..) | Pending::RipasChange(..) => {}
            Pending::Emulated(value) => {
                flags |= enter_flags::EMUL_MMIO;
                rec.run.set_gpr(0, value.unwrap_or(0));
            }
            Pending::Sea => flags |= enter_flags::INJECT_SEA,
            Pending::HostCall => {
                for (index, value) in self.state.host_call.iter().enumerate() {
                    rec.run.set_gpr(index, *value);
                }
            }
            Pending::RipasRejected => flags |= enter_flags::RIPAS_RESPONSE_REJECT,
        }
        rec.run.set_flags(flags);

        let switched_on = vcpu.switched_on.load(SeqCst);
        let mut flushed = false;
        let mut regs = Rmi::<K>::rec_enter_regs(rec.pa(), rec.run.pa());
        // News that came before the store is seen by what follows it; news after it is seen by the load, or its kick
        // ends the run.
        let entry = vcpu.thread.enter(&mut regs, self.state.pmu_line, &mut || {
            vcpu.news.store(false, SeqCst);
            if vm.is_ending() || !Self::may_run(vm, vcpu) {
                return false;
            }
            let image = vgic.flush(vcpu.index, lrs);
            flushed = true;
            debug_assert_eq!(image.validate(lrs), Ok(()));
            rec.run.set_gic(&image, lrs);
            !vcpu.news.load(SeqCst)
        });
        if entry == Entry::Refused {
            if flushed {
                vm.irqs.kick(&vgic.cancel(vcpu.index));
            }
            return Ok(Next::Enter);
        }
        if let Err(error) = vm.rmi.rec_entered(&regs) {
            vm.irqs.kick(&vgic.cancel(vcpu.index));
            return self.not_entered(error, switched_on);
        }
        self.state.maybe_off = false;
        self.state.pending = Pending::None;
        let reason = rec.run.exit_reason();
        vm.rmi.each_stats(|stats| stats.count_exit(reason));

        let gic = rec.run.gic(lrs);
        let timers = rec.run.timers();
        let overflow = rec.run.pmu_overflow();
        // HPFAR's FIPA, bits 43:4, is the address from bit 12 on.
        let (esr, ipa) = (rec.run.esr(), (rec.run.hpfar() & 0xFFF_FFFF_FFF0) << 8);
        vm.kernel.trace(Trace::Exit { vcpu: vcpu.id, reason, esr, ipa });
        let outcome = vgic.sync(vcpu.index, &gic);
        vm.irqs.kick(&outcome.kick);
        if !outcome.ended.is_empty() {
            vm.events.ended(&mut self.state.events, &vm.irqs, outcome.ended.iter());
        }
        let lines = self.state.timers.exited(timers);
        self.drive_timers(lines);
        if overflow != self.state.pmu_line {
            self.state.pmu_line = overflow;
            // Nobody else waits for this vCPU's own interrupt.
            let _ = vgic.set_ppi(vcpu.index, vm.pmu_irq.load(Relaxed), overflow);
        }

        match ExitReason::try_from(reason) {
            Ok(ExitReason::Irq | ExitReason::Fiq) => Ok(Next::Enter),
            Ok(ExitReason::SError) => {
                vm.log_error(format_args!("realm: SError on vCPU {}", vcpu.id));
                Ok(Next::Enter)
            }
            Ok(ExitReason::Sync) => self.sync_exit(),
            Ok(ExitReason::Psci) => self.psci_exit(switched_on),
            Ok(ExitReason::RipasChange) => self.ripas_exit(),
            Ok(ExitReason::HostCall) => {
                let rec = self.state.rec.as_ref().ok_or(Errno::EPERM)?;
                for (index, gpr) in self.state.host_call.iter_mut().enumerate() {
                    *gpr = rec.run.gpr(index);
                }
                self.state.pending = Pending::HostCall;
                let function = self.state.host_call[0];
                match vm.smccc.lock().action(function) {
                    Action::Handle => hostcall::handle(&mut self.state.host_call),
                    Action::Deny => self.state.host_call[0] = cca_abi::smccc::NOT_SUPPORTED,
                    Action::ToUser => return Ok(self.call_exit(function, true)),
                }
                Ok(Next::Enter)
            }
            Err(other) => {
                vm.log_error(format_args!("rmm: unknown REC exit reason {other}"));
                Err(Errno::ENXIO)
            }
        }
    }

    /// `REC_ENTER` did not run the REC.
    fn not_entered(&mut self, error: crate::rmi::RmiError, switched_on: u32) -> Result<Next> {
        match error.status() {
            Some(Status::ErrorRealm(1)) => {
                // Another vCPU is on its way to user space with the news.
                self.vm.stopped.store(true, SeqCst);
                Ok(Next::Enter)
            }
            Some(Status::ErrorRec) if self.state.maybe_off => {
                let _power = self.vm.power.lock();
                if self.vcpu.switched_on.load(SeqCst) == switched_on {
                    self.state.maybe_off = false;
                    self.vcpu.set_power(false);
                }
                Ok(Next::Enter)
            }
            _ => {
                self.vm.rmi.log("enter a REC", error);
                Err(Errno::ENXIO)
            }
        }
    }

    fn drive_timers(&mut self, lines: [bool; 2]) {
        for (which, level) in lines.into_iter().enumerate() {
            if self.state.timer_lines[which] == level {
                continue;
            }
            self.state.timer_lines[which] = level;
            let ppi = self.vm.timer_irqs[which].load(Relaxed);
            // Nobody else waits for this vCPU's own interrupt.
            let _ = self.vgic.set_ppi(self.vcpu.index, ppi, level);
        }
    }

    /// WFI: sleeps until an interrupt can be signalled, a timer expires, or there is other news.
    fn wait(&mut self) -> Result<Next> {
        let (vm, vcpu, vgic) = (self.vm, self.vcpu, self.vgic);
        let lines = self.state.timers.at(vm.kernel.counter());
        self.drive_timers(lines);
        let deadline = self.state.timers.deadline();
        vcpu.news.store(false, SeqCst);
        let slept = vcpu.thread.block(deadline, &mut || {
            vcpu.news.load(SeqCst) || vm.is_ending() || vgic.has_pending(vcpu.index)
        });
        // Waking without reason is allowed; going on sleeping after a signal is not needed.
        self.state.waiting = false;
        slept?;
        let lines = self.state.timers.at(vm.kernel.counter());
        self.drive_timers(lines);
        Ok(Next::Enter)
    }

    /// Tells user space of a call. The answer to a host call is what the registers then hold.
    pub(crate) fn call_exit(&mut self, function: u64, host_call: bool) -> Next {
        if let Some(rec) = &self.state.rec {
            for (index, gpr) in self.state.host_call.iter_mut().enumerate() {
                *gpr = rec.run.gpr(index);
            }
        }
        let page = &self.vcpu.run;
        page.store_u64(run::HYPERCALL_NR, function);
        for (n, argument) in self.state.host_call[1..7].iter().enumerate() {
            page.store_u64(run::HYPERCALL_ARGS + 8 * n, *argument);
        }
        page.store_u64(run::HYPERCALL_RET, 0);
        page.store_u64(run::HYPERCALL_FLAGS, if host_call { 0 } else { kvm::exit::HYPERCALL_SMC });
        self.state.user_call = Some(host_call);
        self.set_exit(kvm::exit::HYPERCALL);
        Next::ToUser
    }

    pub(crate) fn memory_fault(&self, gpa: u64, size: u64, private: bool, fails: bool) -> Next {
        let page = &self.vcpu.run;
        page.store_u64(run::MEMORY_FAULT_FLAGS, if private { kvm::exit::MEMORY_FAULT_PRIVATE } else { 0 });
        page.store_u64(run::MEMORY_FAULT_GPA, gpa);
        page.store_u64(run::MEMORY_FAULT_SIZE, size);
        self.set_exit(kvm::exit::MEMORY_FAULT);
        if fails { Next::Fault } else { Next::ToUser }
    }

    pub(crate) fn system_event(&self, event: u32) -> Next {
        let page = &self.vcpu.run;
        page.store_u32(run::SYSTEM_EVENT_TYPE, event);
        page.store_u32(run::SYSTEM_EVENT_NDATA, 1);
        page.store_u64(run::SYSTEM_EVENT_DATA, 0);
        self.set_exit(kvm::exit::SYSTEM_EVENT);
        Next::ToUser
    }

    pub(crate) fn mmio_exit(&mut self, gpa: u64, len: usize, store: Option<u64>, esr: u64) -> Next {
        let page = &self.vcpu.run;
        page.store_u64(run::MMIO_PHYS_ADDR, gpa);
        page.store_bytes(run::MMIO_DATA, &store.unwrap_or(0).to_le_bytes());
        page.store_u32(run::MMIO_LEN, u32::try_from(len).unwrap_or(0));
        page.store_u8(run::MMIO_IS_WRITE, u8::from(store.is_some()));
        self.set_exit(kvm::exit::MMIO);
        self.state.pending =
            if store.is_some() { Pending::Emulated(None) } else { Pending::MmioRead(len, esr) };
        self.state.user_mmio = true;
        Next::ToUser
    }

    fn sync_exit(&mut self) -> Result<Next> {
        let rec = self.state.rec.as_ref().ok_or(Errno::EPERM)?;
        let esr = rec.run.esr();
        match esr >> 26 & 0x3F {
            EC_WFX => {
                // 0 WFI, 1 WFE, 2 WFIT, 3 WFET. Only the trap of WFI is set; one with a timeout returns early.
                if esr & 0b11 == 0 {
                    self.state.waiting = true;
                }
                Ok(Next::Enter)
            }
            EC_SYSREG => {
                let value = rec.run.gpr(0);
                match self.vgic.sysreg_write(self.vcpu.index, esr, value) {
                    Some(kicked) => {
                        self.vm.irqs.kick(&kicked);
                        Ok(Next::Enter)
                    }
                    None => {
                        self.vm.log_error(format_args!(
                            "realm: access to an unknown system register, ESR {esr:#x}"
                        ));
                        Err(Errno::ENXIO)
                    }
                }
            }
            ec @ (EC_DATA_ABORT | EC_INSTRUCTION_ABORT) => {
                // FIPA, bits 43:4, is the address from bit 12 on.
                let ipa = (rec.run.hpfar() & 0xFFF_FFFF_FFF0) << 8;
                let offset = rec.run.far() & (PAGE_SIZE - 1);
                let value = rec.run.gpr(0);
                self.abort(esr, ec == EC_DATA_ABORT, ipa, offset, value)
            }
            _ => {
                self.vm.log_error(format_args!("rmm: unexpected synchronous exit, ESR {esr:#x}"));
                Err(Errno::ENXIO)
            }
        }
    }

    fn abort(&mut self, esr: u64, data: bool, ipa: u64, offset: u64, value: u64) -> Result<Next> {
        match esr & 0x3F {
            // An external abort: the RMM has told the Realm.
            0x10 | 0x13..=0x17 => return Ok(Next::Enter),
            // Translation, access flag and permission faults, of any level.
            0x04..=0x0F | 0x2B => {}
            // Granule protection: the VMM shared a page that is not the host's to share.
            0x23..=0x28 => {
                self.state.pending = Pending::Sea;
                return Ok(Next::Enter);
            }
            other => {
                self.vm.log_error(format_args!("realm: abort with fault status {other:#x} at {ipa:#x}"));
                return Err(Errno::EFAULT);
            }
        }
        let fails = self.vm.system.generation().fault_is_efault;
        let shared_bit = self.vm.geometry.shared_bit();
        let gpa = ipa & !shared_bit;
        if ipa & shared_bit == 0 {
            return Ok(match self.traced(gpa, false, self.vm.private_fault(gpa))? {
                Fault::Resolved => Next::Enter,
                Fault::ToUser | Fault::NoSlot => self.memory_fault(gpa, PAGE_SIZE, true, fails),
            });
        }
        if !data {
            // The RMM answers these itself.
            return Err(Errno::ENXIO);
        }
        // Devices first: they need no lock of the VM.
        if let Some(next) = self.device(esr, gpa | offset, value) {
            return Ok(next);
        }
        match self.traced(gpa, true, self.vm.shared_fault(gpa))? {
            Fault::Resolved => Ok(Next::Enter),
            Fault::ToUser => Ok(self.memory_fault(gpa, PAGE_SIZE, false, fails)),
            Fault::NoSlot => Ok(self.mmio(esr, gpa | offset, value)),
        }
    }

    fn traced(&self, gpa: u64, shared: bool, fault: Result<Fault>) -> Result<Fault> {
        let outcome = match fault {
            Ok(Fault::Resolved) => 0,
            Ok(Fault::ToUser) => 1,
            Ok(Fault::NoSlot) => 2,
            Err(_) => 3,
        };
        self.vm.kernel.trace(Trace::Fault { vcpu: self.vcpu.id, gpa, shared, outcome });
        fault
    }

    fn ripas_exit(&mut self) -> Result<Next> {
        let rec = self.state.rec.as_ref().ok_or(Errno::EPERM)?;
        let (base, top, value) = rec.run.ripas();
        let ripas = match Ripas::try_from(u64::from(value)) {
            Ok(ripas @ (Ripas::Empty | Ripas::Ram)) => ripas,
            _ => {
                self.vm.log_error(format_args!("rmm: RIPAS change to {value}"));
                return Err(Errno::ENXIO);
            }
        };
        let (ram, generation) = (ripas == Ripas::Ram, *self.vm.system.generation());
        if generation.ripas_on_next_run {
            if let Some(end) = self.vm.ripas_range(base, top)? {
                self.state.pending = Pending::RipasChange(base, end, ripas);
                return Ok(self.memory_fault(base, end - base, ram, generation.ripas_is_efault));
            }
        }
        match self.vm.change_ripas(rec.pa(), base, top, ripas)? {
            RipasChange::Changed(reached) if reached > base => {
                Ok(self.memory_fault(base, reached - base, ram, generation.ripas_is_efault))
            }
            RipasChange::Changed(_) | RipasChange::Unbacked => Ok(Next::Enter),
            RipasChange::Rejected => {
                self.vm.rmi.say(
                    LogLevel::Debug,
                    format_args!("realm: no memory slot backs {base:#x}, which is to become RAM"),
                );
                self.state.pending = Pending::RipasRejected;
                Ok(Next::Enter)
            }
        }
    }
}

const EC_WFX: u64 = 0x01;
const EC_SYSREG: u64 = 0x18;
const EC_INSTRUCTION_ABORT: u64 = 0x20;
const EC_DATA_ABORT: u64 = 0x24;
