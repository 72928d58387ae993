//! GRANULE_DELEGATE and GRANULE_UNDELEGATE.

use cca_abi::rmi::Status;

use crate::Rmm;
use crate::answer::{Answer, NONE};
use crate::granule::State;
use crate::platform::Platform;

impl<P: Platform> Rmm<'_, P> {
    /// RMI_GRANULE_DELEGATE.
    pub(crate) fn granule_delegate(&self, addr: u64) -> Answer {
        let granule = self.granules.lock_named(addr, State::Undelegated)?;
        // gran_gpt: EL3 refuses anything that is not Non-secure.
        self.platform.delegate(addr).map_err(|_| Status::ErrorInput)?;
        self.wipe_to_delegated(&granule);
        Ok(NONE)
    }

    /// RMI_GRANULE_UNDELEGATE. The granule has been zero since it became DELEGATED.
    pub(crate) fn granule_undelegate(&self, addr: u64) -> Answer {
        let granule = self.granules.lock_named(addr, State::Delegated)?;
        if self.platform.undelegate(addr).is_err() {
            // EL3 has no reason to; keep the granule rather than stop the machine.
            self.platform.log(format_args!("EL3 refused to undelegate {addr:#x}"));
            return Err(Status::ErrorInput.into());
        }
        granule.set_state(State::Undelegated);
        Ok(NONE)
    }
}
