//! `KVM_ARM_VM_SMCCC_FILTER`: which calls of the guest are user space's.

use alloc::vec::Vec;

use cca_abi::kvm::{self, smccc_action};

use crate::errno::{Errno, Result};
use crate::kernel::reserve;

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The module answers.
    Handle,
    /// As if there were no such function.
    Deny,
    /// `KVM_EXIT_HYPERCALL`.
    ToUser,
}

/// Most ranges of a filter.
const MAX_RANGES: usize = 64;

/// Arm's own functions, of both widths: what they say about the machine, nobody else may say (as in KVM).
const ARCHITECTURE: [(u32, u32); 2] = [(0x8000_0000, 0x8000_FFFF), (0xC000_0000, 0xC000_FFFF)];

/// The filter of one VM: disjoint ranges of functions. What is in none is handled.
#[derive(Default)]
pub struct Filter {
    ranges: Vec<(u32, u32, Action)>,
}

impl Filter {
    /// Adds a range.
    ///
    /// # Errors
    /// `EINVAL` for an empty or overflowing range, an unknown action or reserved fields; `EEXIST` if it overlaps
    /// another or the architecture's; `ENOSPC` if there are too many; `ENOMEM`.
    pub fn add(&mut self, filter: &kvm::SmcccFilter) -> Result<()> {
        let action = match filter.action {
            smccc_action::HANDLE => Action::Handle,
            smccc_action::DENY => Action::Deny,
            smccc_action::FWD_TO_USER => Action::ToUser,
            _ => return Err(Errno::EINVAL),
        };
        let last = filter.nr_functions.checked_sub(1).and_then(|more| filter.base.checked_add(more));
        let last = last.filter(|_| filter.pad == [0; 15]).ok_or(Errno::EINVAL)?;
        let overlaps = |from: u32, to: u32| filter.base <= to && from <= last;
        if ARCHITECTURE.iter().any(|(from, to)| overlaps(*from, *to))
            || self.ranges.iter().any(|(from, to, _)| overlaps(*from, *to))
        {
            return Err(Errno::EEXIST);
        }
        if self.ranges.len() == MAX_RANGES {
            return Err(Errno::ENOSPC);
        }
        reserve(&mut self.ranges, 1)?;
        self.ranges.push((filter.base, last, action));
        Ok(())
    }

    /// What to do with a call of `function`.
    #[must_use]
    pub fn action(&self, function: u64) -> Action {
        let Ok(function) = u32::try_from(function) else { return Action::Handle };
        let found = self.ranges.iter().find(|(from, to, _)| (*from..=*to).contains(&function));
        found.map_or(Action::Handle, |(_, _, action)| *action)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(base: u32, nr_functions: u32, action: u8) -> kvm::SmcccFilter {
        kvm::SmcccFilter { base, nr_functions, action, pad: [0; 15] }
    }

    #[test]
    fn ranges_do_not_overlap_and_the_rest_is_handled() {
        let mut filter = Filter::default();
        assert_eq!(filter.add(&range(0x8400_0000, 0x20, smccc_action::FWD_TO_USER)), Ok(()));
        assert_eq!(filter.add(&range(0x8400_001F, 1, smccc_action::DENY)), Err(Errno::EEXIST));
        assert_eq!(filter.add(&range(0x8400_0020, 1, smccc_action::DENY)), Ok(()));
        assert_eq!(filter.add(&range(0, 0, smccc_action::DENY)), Err(Errno::EINVAL));
        for (base, count) in [(0x8000_0000, 1), (0x7FFF_FFFF, 2), (0x8000_FFFF, 1), (0xC000_0001, 1)] {
            let architecture = range(base, count, smccc_action::FWD_TO_USER);
            assert_eq!(filter.add(&architecture), Err(Errno::EEXIST), "{base:#x}");
        }
        assert_eq!(filter.add(&range(u32::MAX, 2, smccc_action::DENY)), Err(Errno::EINVAL));
        assert_eq!(filter.add(&range(1, 1, 3)), Err(Errno::EINVAL));
        let mut reserved = range(1, 1, 0);
        reserved.pad[7] = 1;
        assert_eq!(filter.add(&reserved), Err(Errno::EINVAL));
        assert_eq!(filter.action(0x8400_0003), Action::ToUser);
        assert_eq!(filter.action(0x8400_0020), Action::Deny);
        assert_eq!(filter.action(0x8400_0021), Action::Handle);
        assert_eq!(filter.action(u64::MAX), Action::Handle);
    }
}
