//! The dispatch of RMI commands.

use cca_abi::rmi::{Status, VERSION_1_0, fid};
use cca_abi::smccc;

use crate::Rmm;
use crate::answer::{Answer, Failure, one};
use crate::platform::Platform;

impl<P: Platform> Rmm<'_, P> {
    /// Handles one RMI command of the host on CPU `cpu`.
    ///
    /// `regs` are the host's X0–X7; on return they are what the host shall see there. X1–X3 are results or zero;
    /// X4–X7 come back as they were unless the command has a result there.
    pub fn handle_rmi(&self, cpu: usize, regs: &mut [u64; 8]) {
        let id = smccc::fid(regs[0]);
        if id == fid::VERSION {
            // Here, so that the shortest call does not pay for the others' registers and stack.
            let status = if regs[1] == VERSION_1_0 { Status::Success } else { Status::ErrorInput };
            // Only 1.0 is there, so it is both the lower and the higher answer.
            regs[..4].copy_from_slice(&[status.to_register(), VERSION_1_0, VERSION_1_0, 0]);
        } else {
            self.command(cpu, id, regs);
        }
    }

    /// Every command but RMI_VERSION.
    #[inline(never)]
    fn command(&self, cpu: usize, id: u64, regs: &mut [u64; 8]) {
        let [_, x1, x2, x3, x4, x5, ..] = *regs;
        let answer: Answer = match id {
            fid::FEATURES => Ok(one(if x1 == 0 { self.config.features0() } else { 0 })),
            fid::GRANULE_DELEGATE => self.granule_delegate(x1),
            fid::GRANULE_UNDELEGATE => self.granule_undelegate(x1),
            fid::DATA_CREATE => self.data_create(x1, x2, x3, x4, x5),
            fid::DATA_CREATE_UNKNOWN => self.data_create_unknown(x1, x2, x3),
            fid::DATA_DESTROY => self.data_destroy(x1, x2),
            fid::REALM_ACTIVATE => self.realm_activate(x1),
            fid::REALM_CREATE => self.realm_create(x1, x2),
            fid::REALM_DESTROY => self.realm_destroy(x1),
            fid::REC_AUX_COUNT => self.rec_aux_count(x1),
            fid::REC_CREATE => self.rec_create(x1, x2, x3),
            fid::REC_DESTROY => self.rec_destroy(x1),
            fid::REC_ENTER => self.rec_enter(cpu, x1, x2),
            fid::RTT_CREATE => self.rtt_create(x1, x2, x3, x4),
            fid::RTT_DESTROY => self.rtt_destroy(x1, x2, x3),
            fid::RTT_FOLD => self.rtt_fold(x1, x2, x3),
            fid::RTT_READ_ENTRY => self.rtt_read_entry(x1, x2, x3),
            fid::RTT_MAP_UNPROTECTED => self.rtt_map_unprotected(x1, x2, x3, x4),
            fid::RTT_UNMAP_UNPROTECTED => self.rtt_unmap_unprotected(x1, x2, x3),
            fid::RTT_INIT_RIPAS => self.rtt_init_ripas(x1, x2, x3),
            fid::RTT_SET_RIPAS => self.rtt_set_ripas(x1, x2, x3, x4),
            fid::PSCI_COMPLETE => self.psci_complete(x1, x2, x3),
            _ => {
                regs[0] = smccc::NOT_SUPPORTED;
                return;
            }
        };
        let (status, outputs) = match answer {
            Ok(outputs) => (Status::Success, outputs),
            Err(Failure { status, outputs }) => (status, outputs),
        };
        regs[0] = status.to_register();
        regs[1..4].copy_from_slice(&outputs[..3]);
        if id == fid::RTT_READ_ENTRY {
            regs[4] = outputs[3];
        }
    }
}
