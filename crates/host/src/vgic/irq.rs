//! One interrupt: what the distributor knows about it, and its way into a list register and back.

/// Priorities have five bits, the architecture's minimum for a virtual CPU interface; so no priority has
/// bits that `ICH_LR<n>_EL2` does not implement.
pub(super) const PRIORITY_MASK: u8 = 0xf8;

/// How a line makes an interrupt pending (`GICD_ICFGR<n>`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Trigger {
    /// Pending as long as the line is asserted.
    Level,
    /// Pending from an edge on until acknowledged.
    Edge,
}

/// Which interrupt groups are enabled, in `GICD_CTLR` or at a CPU interface.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Groups {
    pub(super) group0: bool,
    pub(super) group1: bool,
}

impl Groups {
    pub(super) fn allow(self, irq: &Irq) -> bool {
        if irq.group1 { self.group1 } else { self.group0 }
    }
}

/// What a list register holds of an interrupt.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Held {
    pub(super) pending: bool,
    pub(super) active: bool,
    /// End of interrupt has to cause an exit.
    pub(super) notify: bool,
}

impl Held {
    pub(super) fn is_empty(self) -> bool {
        !self.pending && !self.active
    }
}

/// An interrupt that a list register has at the moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Loan {
    held: Held,
    /// The pending latch went into the list register, and comes back if the interrupt is not taken.
    latch: bool,
    /// The guest cleared the pending state meanwhile.
    drop_pending: bool,
    /// The guest cleared the active state meanwhile.
    drop_active: bool,
}

/// The state of one SGI, PPI or SPI.
#[derive(Clone, Copy, Debug)]
pub(super) struct Irq {
    pub(super) enabled: bool,
    pub(super) group1: bool,
    pub(super) trigger: Trigger,
    priority: u8,
    /// The line's level, for level-triggered interrupts.
    line: bool,
    /// An edge, an SGI, or `ISPENDR` wrote it.
    latch: bool,
    active: bool,
    /// The priority it had when it became active: the order in which active interrupts end.
    active_priority: u8,
    loan: Option<Loan>,
}

impl Irq {
    pub(super) fn new(trigger: Trigger) -> Irq {
        Irq {
            enabled: false,
            group1: true,
            trigger,
            priority: 0,
            line: false,
            latch: false,
            active: false,
            active_priority: 0,
            loan: None,
        }
    }

    pub(super) fn priority(&self) -> u8 {
        self.priority
    }

    pub(super) fn active_priority(&self) -> u8 {
        self.active_priority
    }

    pub(super) fn set_priority(&mut self, priority: u8) {
        self.priority = priority & PRIORITY_MASK;
    }

    /// Pending in the distributor; what a list register holds does not count.
    pub(super) fn is_pending(&self) -> bool {
        self.latch || (self.trigger == Trigger::Level && self.line)
    }

    pub(super) fn is_active(&self) -> bool {
        self.active
    }

    pub(super) fn is_loaned(&self) -> bool {
        self.loan.is_some()
    }

    /// What `ISPENDR` and `ICPENDR` read.
    pub(super) fn reads_pending(&self) -> bool {
        self.is_pending() || self.loan.is_some_and(|loan| loan.held.pending && !loan.drop_pending)
    }

    /// Whether it could be signalled, given the groups that the distributor forwards.
    pub(super) fn is_deliverable(&self, groups: Groups) -> bool {
        self.enabled && self.is_pending() && groups.allow(self)
    }

    /// Drives the line. Whether somebody has to look at the interrupt.
    pub(super) fn set_line(&mut self, level: bool) -> bool {
        match self.trigger {
            Trigger::Edge => {
                if level {
                    self.latch = true;
                }
                level
            }
            Trigger::Level => {
                let rises = level && !self.line;
                self.line = level;
                // A list register of a level-triggered interrupt exits at the end of the interrupt, and
                // then the line is sampled again.
                rises && self.loan.is_none()
            }
        }
    }

    /// `ISPENDR`, or the arrival of an SGI.
    pub(super) fn set_latch(&mut self) {
        self.latch = true;
    }

    /// `ICPENDR`.
    pub(super) fn clear_latch(&mut self) {
        self.latch = false;
        if let Some(loan) = &mut self.loan {
            loan.drop_pending = true;
        }
    }

    /// `ISACTIVER`.
    pub(super) fn set_active(&mut self) {
        if !self.active {
            self.active = true;
            self.active_priority = self.priority;
        }
        if let Some(loan) = &mut self.loan {
            loan.drop_active = false;
        }
    }

    /// `ICACTIVER`, an end of interrupt outside list registers, or `ICC_DIR_EL1`.
    pub(super) fn clear_active(&mut self) {
        self.active = false;
        if let Some(loan) = &mut self.loan {
            loan.drop_active = true;
        }
    }

    /// What a list register would hold. `may_pend` is false while the interrupt is active at one vCPU and
    /// routed to another: then it can be signalled only after it has ended.
    pub(super) fn offer(&self, groups: Groups, may_pend: bool) -> Held {
        let deliverable = self.is_deliverable(groups);
        // An active level-triggered interrupt is sampled again when it ends. With both states in the list
        // register it would be signalled once more, even if the handler has lowered the line.
        let pending = deliverable && may_pend && !(self.trigger == Trigger::Level && self.active);
        let notify = self.trigger == Trigger::Level || (deliverable && !pending);
        Held { pending, active: self.active, notify }
    }

    /// Hands the interrupt to a list register.
    pub(super) fn lend(&mut self, held: Held) {
        let latch = held.pending && self.latch;
        if held.pending {
            self.latch = false;
        }
        self.loan = Some(Loan { held, latch, drop_pending: false, drop_active: false });
    }

    /// Takes the interrupt back from a list register which now says `pending` and `active`. Whether the
    /// guest has ended it.
    pub(super) fn take_back(&mut self, pending: bool, active: bool) -> bool {
        let Some(loan) = self.loan.take() else { return false };
        if loan.latch && pending && !loan.drop_pending {
            self.latch = true;
        }
        if active && !loan.held.active {
            self.active_priority = self.priority;
        }
        // An ISACTIVER write while the list register was loaded without the active state stays.
        let set_meanwhile = self.active && !loan.held.active;
        self.active = (active && !loan.drop_active) || set_meanwhile;
        !pending && !active
    }

    /// Takes the interrupt back as it was lent.
    pub(super) fn take_back_untouched(&mut self) {
        if let Some(loan) = self.loan {
            self.take_back(loan.held.pending, loan.held.active);
        }
    }
}
