//! The host's SMCs, watched: a command names only pages that its caller owns; and a test may answer in the RMM's place.

use super::SimKernel;
use crate::sync;
use cca_abi::rmi::fid;
use kvm_realm::kernel::SmcRegs;

impl SimKernel {
    /// Answers the command `fid` with `x0`, without asking the RMM, until told `None`.
    pub fn answer(&self, fid: u64, x0: Option<u64>) {
        let mut answers = self.shared.answers.lock().unwrap();
        match x0 {
            Some(x0) => drop(answers.insert(fid, x0)),
            None => drop(answers.remove(&fid)),
        }
    }

    /// Fails the machine if a command names a page that its caller does not own: one that is free, that is no memory,
    /// or that the process it belonged to has thrown away.
    fn check_rmi(&self, regs: &SmcRegs) {
        // Where the addresses of pages are; a descriptor has its page in bits 47:12.
        let named: &[usize] = match regs[0] {
            fid::DATA_CREATE => &[1, 2, 4],
            fid::REC_CREATE => &[1, 2, 3],
            fid::RTT_MAP_UNPROTECTED => &[1, 4],
            fid::REALM_CREATE
            | fid::DATA_CREATE_UNKNOWN
            | fid::RTT_CREATE
            | fid::REC_ENTER
            | fid::RTT_SET_RIPAS
            | fid::PSCI_COMPLETE => &[1, 2],
            fid::VERSION | fid::FEATURES => &[],
            _ => &[1],
        };
        let pages = &self.shared.pages;
        for &at in named {
            let is_desc = regs[0] == fid::RTT_MAP_UNPROTECTED && at == 4;
            let pa = if is_desc { regs[at] & 0xFFFF_FFFF_F000 } else { regs[at] };
            if !pages.is_allocated(pa) || is_desc && pages.is_retired(pa) {
                let name = cca_abi::rmi::name(regs[0]).unwrap_or("an unknown command");
                self.machine().report_violation(format!("{name} names {pa:#x} in x{at}, which is nobody's"));
            }
        }
    }

    /// An SMC on `cpu`, watched.
    pub(super) fn smc_on(&self, cpu: usize, regs: &mut SmcRegs) {
        sync::interleave();
        self.check_rmi(regs);
        let answer = self.shared.answers.lock().unwrap().get(&regs[0]).copied();
        match answer {
            Some(x0) => {
                regs.fill(0);
                regs[0] = x0;
            }
            None => self.machine().host_smc(cpu, regs),
        }
        sync::interleave();
    }
}
