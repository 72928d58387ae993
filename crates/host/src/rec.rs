//! Realm Execution Contexts, and the page through which host and RMM exchange what a run needs.

use alloc::vec::Vec;
use core::mem::offset_of;

use cca_abi::rmi::{MAX_LRS, MAX_REC_AUX, REC_RUNNABLE, RecExit, RecParams, RecRun};

use crate::errno::{Errno, Result};
use crate::granule::Delegated;
use crate::kernel::{Fill, Kernel, Page, reserve};
use crate::rmi::Rmi;
use crate::vcpu::{Vcpu, VcpuState};
use crate::vgic::{ExitGic, LrImage};
use crate::vm::Vm;

/// A REC and the pages that belong to it.
pub struct Rec<K: Kernel> {
    rec: Delegated<K>,
    aux: Vec<Delegated<K>>,
    /// Shared with the RMM.
    pub run: RunPage<K>,
}

impl<K: Kernel> Rec<K> {
    /// Physical address: what RMI commands take.
    pub fn pa(&self) -> u64 {
        self.rec.pa()
    }
}

/// `RMI_REC_CREATE` for one vCPU, with the registers it was given.
pub(crate) fn create<K: Kernel>(
    vm: &Vm<K>,
    rd: u64,
    aux_count: usize,
    vcpu: &Vcpu<K>,
    state: &VcpuState<K>,
) -> Result<Rec<K>> {
    let rmi = &vm.rmi;
    let params_page = vm.kernel.alloc_page(Fill::Zeroed)?;
    let run = RunPage { page: vm.kernel.alloc_page(Fill::Zeroed)? };
    let mut aux = Vec::new();
    reserve(&mut aux, aux_count)?;
    let rec = rmi.new_delegated()?;

    // Field by field: a structure of 4 KiB is too much for a kernel stack.
    params_page.store_u64(offset_of!(RecParams, flags), if vcpu.is_on() { REC_RUNNABLE } else { 0 });
    params_page.store_u64(offset_of!(RecParams, mpidr), vcpu.mpidr());
    params_page.store_u64(offset_of!(RecParams, pc), state.pc);
    for (index, gpr) in state.gprs.iter().enumerate() {
        params_page.store_u64(offset_of!(RecParams, gprs) + 8 * index, *gpr);
    }
    params_page.store_u64(offset_of!(RecParams, num_aux), u64::try_from(aux_count).unwrap_or(0));

    let mut outcome = Ok(());
    for index in 0..aux_count.min(MAX_REC_AUX) {
        match rmi.new_delegated() {
            Ok(granule) => {
                params_page.store_u64(offset_of!(RecParams, aux) + 8 * index, granule.pa());
                aux.push(granule);
            }
            Err(errno) => {
                outcome = Err(errno);
                break;
            }
        }
    }
    if outcome.is_ok() {
        outcome = rmi.rec_create(rd, rec.pa(), params_page.pa()).map_err(|error| {
            rmi.log("create a REC", error);
            Errno::from(error)
        });
    }
    match outcome {
        Ok(()) => Ok(Rec { rec, aux, run }),
        Err(errno) => {
            for granule in aux {
                drop(rmi.undelegate(granule));
            }
            drop(rmi.undelegate(rec));
            Err(errno)
        }
    }
}

/// `RMI_REC_DESTROY`, and all pages back.
pub(crate) fn destroy<K: Kernel>(rmi: &Rmi<K>, rec: Rec<K>) {
    match rmi.rec_destroy(rec.rec.pa()) {
        Ok(()) => {
            for granule in rec.aux {
                drop(rmi.undelegate(granule));
            }
            drop(rmi.undelegate(rec.rec));
        }
        Err(error) => {
            for granule in rec.aux {
                rmi.leak(granule, error);
            }
            rmi.leak(rec.rec, error);
            // The RMM might still write to it.
            core::mem::forget(rec.run);
        }
    }
}

/// `RmiRecRun` in a page of its own. The RMM writes the second half during `REC_ENTER`; every value is loaded once.
pub struct RunPage<K: Kernel> {
    page: K::Page,
}

const fn enter(offset: usize) -> usize {
    offset_of!(RecRun, enter) + offset
}

const fn exit(offset: usize) -> usize {
    offset_of!(RecRun, exit) + offset
}

impl<K: Kernel> RunPage<K> {
    /// Physical address.
    pub fn pa(&self) -> u64 {
        self.page.pa()
    }

    /// `enter.flags`.
    pub(crate) fn set_flags(&self, flags: u64) {
        self.page.store_u64(enter(offset_of!(cca_abi::rmi::RecEnter, flags)), flags);
    }

    /// `enter.gprs[index]`.
    pub(crate) fn set_gpr(&self, index: usize, value: u64) {
        if index < 31 {
            self.page.store_u64(enter(offset_of!(cca_abi::rmi::RecEnter, gprs)) + 8 * index, value);
        }
    }

    /// `enter.gicv3_*`. Called with interrupts off.
    pub(crate) fn set_gic(&self, image: &LrImage, lrs: usize) {
        self.page.store_u64(enter(offset_of!(cca_abi::rmi::RecEnter, gicv3_hcr)), image.hcr);
        let first = enter(offset_of!(cca_abi::rmi::RecEnter, gicv3_lrs));
        for (index, lr) in image.lrs.iter().enumerate().take(lrs.min(MAX_LRS)) {
            self.page.store_u64(first + 8 * index, *lr);
        }
    }

    fn exit_u64(&self, offset: usize) -> u64 {
        self.page.load_u64(exit(offset))
    }

    pub(crate) fn exit_reason(&self) -> u8 {
        self.page.load_u8(exit(offset_of!(RecExit, exit_reason)))
    }

    pub(crate) fn esr(&self) -> u64 {
        self.exit_u64(offset_of!(RecExit, esr))
    }

    pub(crate) fn far(&self) -> u64 {
        self.exit_u64(offset_of!(RecExit, far))
    }

    pub(crate) fn hpfar(&self) -> u64 {
        self.exit_u64(offset_of!(RecExit, hpfar))
    }

    /// `exit.gprs[index]`.
    pub(crate) fn gpr(&self, index: usize) -> u64 {
        if index < 31 { self.exit_u64(offset_of!(RecExit, gprs) + 8 * index) } else { 0 }
    }

    /// `exit.gicv3_*`.
    pub(crate) fn gic(&self, lrs: usize) -> ExitGic {
        let mut gic = ExitGic {
            hcr: self.exit_u64(offset_of!(RecExit, gicv3_hcr)),
            lrs: [0; MAX_LRS],
            misr: self.exit_u64(offset_of!(RecExit, gicv3_misr)),
            vmcr: self.exit_u64(offset_of!(RecExit, gicv3_vmcr)),
        };
        for (index, lr) in gic.lrs.iter_mut().enumerate().take(lrs) {
            *lr = self.exit_u64(offset_of!(RecExit, gicv3_lrs) + 8 * index);
        }
        gic
    }

    /// Control and compare value of the virtual timer, then of the physical one.
    pub(crate) fn timers(&self) -> [(u64, u64); 2] {
        [
            (self.exit_u64(offset_of!(RecExit, cntv_ctl)), self.exit_u64(offset_of!(RecExit, cntv_cval))),
            (self.exit_u64(offset_of!(RecExit, cntp_ctl)), self.exit_u64(offset_of!(RecExit, cntp_cval))),
        ]
    }

    /// Whether a counter of the PMU has overflown.
    pub(crate) fn pmu_overflow(&self) -> bool {
        self.page.load_u8(exit(offset_of!(RecExit, pmu_ovf_status))) != 0
    }

    /// Base, top and value of a RIPAS change.
    pub(crate) fn ripas(&self) -> (u64, u64, u8) {
        (
            self.exit_u64(offset_of!(RecExit, ripas_base)),
            self.exit_u64(offset_of!(RecExit, ripas_top)),
            self.page.load_u8(exit(offset_of!(RecExit, ripas_value))),
        )
    }
}
