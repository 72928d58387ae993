//! The two EL1 timers of a vCPU, as far as the host sees them: after each exit their outputs become interrupt lines,
//! and while the vCPU sleeps their deadlines wake it. Offsets are zero in a Realm.

/// PPI of the EL1 virtual timer unless user space says otherwise.
pub const DEFAULT_VIRTUAL_PPI: u32 = 27;
/// PPI of the EL1 physical timer unless user space says otherwise.
pub const DEFAULT_PHYSICAL_PPI: u32 = 30;

const ENABLE: u64 = 1;
const IMASK: u64 = 2;
const ISTATUS: u64 = 4;

/// State of both timers at the last exit, the virtual one first.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timers {
    timers: [(u64, u64); 2],
    lines: [bool; 2],
}

impl Timers {
    /// What an exit reported. Returns the lines.
    pub fn exited(&mut self, timers: [(u64, u64); 2]) -> [bool; 2] {
        self.timers = timers;
        self.lines = timers.map(|(ctl, _)| ctl & (ENABLE | IMASK | ISTATUS) == ENABLE | ISTATUS);
        self.lines
    }

    fn armed((ctl, _): (u64, u64)) -> bool {
        ctl & (ENABLE | IMASK) == ENABLE
    }

    /// When the next line that is low now will rise.
    pub fn deadline(&self) -> Option<u64> {
        let waiting =
            self.timers.iter().zip(self.lines).filter(|(timer, line)| Self::armed(**timer) && !line);
        waiting.map(|((_, cval), _)| *cval).min()
    }

    /// Lets time pass without the vCPU. Returns the lines.
    pub fn at(&mut self, now: u64) -> [bool; 2] {
        for (timer, line) in self.timers.iter().zip(&mut self.lines) {
            if Self::armed(*timer) && now >= timer.1 {
                *line = true;
            }
        }
        self.lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wfi_wakes_for_the_earlier_of_two_timers_and_for_none_that_is_masked() {
        let mut timers = Timers::default();
        assert_eq!(timers.deadline(), None);
        assert_eq!(timers.exited([(ENABLE, 500), (ENABLE, 300)]), [false, false]);
        assert_eq!(timers.deadline(), Some(300));
        assert_eq!(timers.at(299), [false, false]);
        assert_eq!(timers.at(300), [false, true]);
        assert_eq!(timers.deadline(), Some(500));
        timers.exited([(ENABLE | IMASK, 500), (0, 300)]);
        assert_eq!(timers.deadline(), None);
        assert_eq!(timers.exited([(ENABLE | ISTATUS, 1), (ENABLE | IMASK | ISTATUS, 1)]), [true, false]);
    }
}
