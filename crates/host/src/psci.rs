//! PSCI calls of a Realm. The RMM does the part that the Realm must be able to trust; the host does what concerns its
//! own threads.
//!
//! `CPU_ON` is completed with the RMM before the target's thread may enter its REC. A vCPU that switches itself off
//! while another switches it on is the one race that the host cannot decide: the RMM has an order, and the host saw
//! only the results. Then the vCPU simply enters again, and the RMM's refusal means that it is off.

use crate::sync::Ordering::SeqCst;

use cca_abi::kvm;
use cca_abi::psci::{Code, fid};

use crate::errno::{Errno, Result};
use crate::kernel::Kernel;
use crate::run::{Next, Runner};
use crate::smccc::Action;
use crate::vcpu::{Vcpu, VcpuFile};
use crate::vm::Vm;

/// Aff3, Aff2, Aff1, Aff0 of `MPIDR_EL1`.
const AFFINITY: u64 = 0xFF_00FF_FFFF;

impl<K: Kernel> Vm<K> {
    fn vcpu_by_mpidr(&self, mpidr: u64) -> Option<&Vcpu<K>> {
        // No vCPU number is large enough for Aff3.
        self.vcpus().map(AsRef::as_ref).find(|vcpu| vcpu.mpidr() == mpidr & AFFINITY)
    }

    /// The guest has ended: no vCPU enters again.
    fn stop(&self) {
        self.stopped.store(true, SeqCst);
        for vcpu in self.vcpus() {
            vcpu.kick();
        }
    }
}

impl<K: Kernel> Runner<'_, K> {
    /// `switched_on` is the vCPU's counter from before the entry.
    pub(crate) fn psci_exit(&mut self, switched_on: u32) -> Result<Next> {
        let rec = self.state.rec.as_ref().ok_or(Errno::EPERM)?;
        let (function, argument) = (rec.run.gpr(0) & 0xFFFF_FFFF, rec.run.gpr(1));
        let action = self.vm.smccc.lock().action(function);
        match function {
            _ if action == Action::ToUser => Ok(self.call_exit(function, false)),
            fid::CPU_ON_32 | fid::CPU_ON_64 if action == Action::Deny => {
                self.complete(argument, Code::Denied)?;
                Ok(Next::Enter)
            }

            fid::CPU_SUSPEND_32 | fid::CPU_SUSPEND_64 => {
                self.state.waiting = true;
                Ok(Next::Enter)
            }
            fid::CPU_OFF => {
                let _power = self.vm.power.lock();
                if self.vcpu.switched_on.load(SeqCst) == switched_on {
                    self.vcpu.set_power(false);
                } else {
                    self.state.maybe_off = true;
                }
                Ok(Next::Enter)
            }
            fid::CPU_ON_32 | fid::CPU_ON_64 => {
                let target = self.complete(argument, Code::Success)?;
                {
                    let _power = self.vm.power.lock();
                    target.switched_on.fetch_add(1, SeqCst);
                    target.set_power(true);
                }
                target.kick();
                Ok(Next::Enter)
            }
            fid::AFFINITY_INFO_32 | fid::AFFINITY_INFO_64 => {
                self.complete(argument, Code::Success)?;
                Ok(Next::Enter)
            }
            fid::SYSTEM_OFF => {
                self.vm.stop();
                Ok(self.system_event(kvm::exit::SYSTEM_EVENT_SHUTDOWN))
            }
            fid::SYSTEM_RESET => {
                self.vm.stop();
                Ok(self.system_event(kvm::exit::SYSTEM_EVENT_RESET))
            }
            other => {
                self.vm.log_error(format_args!("rmm: PSCI function {other:#x} was handed to the host"));
                Ok(Next::Enter)
            }
        }
    }

    /// Allows or denies a call that concerns the vCPU with this MPIDR.
    fn complete(&self, mpidr: u64, code: Code) -> Result<&Vcpu<K>> {
        let calling = self.vcpu.rec().ok_or(Errno::ENXIO)?;
        let target = self.vm.vcpu_by_mpidr(mpidr);
        let Some((target, rec)) = target.and_then(|vcpu| Some((vcpu, vcpu.rec()?))) else {
            self.vm
                .log_error(format_args!("realm: PSCI call for a vCPU that is not there, MPIDR {mpidr:#x}"));
            return Err(Errno::ENXIO);
        };
        self.vm.rmi.psci_complete(calling, rec, code.to_register()).map_err(|error| {
            self.vm.rmi.log("complete a PSCI call", error);
            Errno::from(error)
        })?;
        Ok(target)
    }
}

impl<K: Kernel> VcpuFile<K> {
    /// `KVM_ARM_VCPU_RMM_PSCI_COMPLETE`, for a VMM that decides about PSCI calls itself.
    pub(crate) fn psci_complete(&self, args: &kvm::RmmPsciComplete) -> Result {
        if args.padding != [0; 3] {
            return Err(Errno::EINVAL);
        }
        let _vcpu = self.vcpu.state.lock();
        let target = self.vm.vcpu_by_mpidr(args.target_mpidr).ok_or(Errno::EINVAL)?;
        let (Some(calling), Some(rec)) = (self.vcpu.rec(), target.rec()) else { return Err(Errno::EINVAL) };
        // A 32-bit PSCI code.
        let status = i64::from(i32::from_ne_bytes(args.psci_status.to_ne_bytes()));
        self.vm.rmi.psci_complete(calling, rec, u64::from_ne_bytes(status.to_ne_bytes())).map_err(
            |error| {
                self.vm.rmi.log("complete a PSCI call", error);
                Errno::EINVAL
            },
        )?;
        Ok(0)
    }
}
