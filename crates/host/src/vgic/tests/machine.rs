//! A machine with devices and a guest around the GIC, and an account of what the guest must be told.
//!
//! vCPUs run, exit, and sleep in WFI as the run loop lets them: a sleeping vCPU wakes only by a kick, and a
//! running one looks at its interrupts again only after an exit.

use std::vec::Vec;

use super::cpu_interface::{CpuInterface, priority_of};
use super::*;
use crate::vgic::VcpuSet;

/// A random sequence (xorshift).
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }

    pub(super) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    Out,
    Running,
    Sleeping,
}

/// An interrupt as the guest and the devices know it.
#[derive(Clone)]
pub(super) struct Source {
    pub(super) intid: u32,
    /// The vCPU whose private interrupt it is.
    pub(super) private_to: Option<usize>,
    pub(super) edge: bool,
    pub(super) line: bool,
    pub(super) enabled: bool,
    pub(super) priority: u8,
    pub(super) target: usize,
    pub(super) active_at: Option<usize>,
    /// The vCPU that has ended it and not exited since: the host cannot know yet.
    ended_at: Option<usize>,
    /// An edge came, and no acknowledgement since.
    pub(super) unserved: bool,
    pub(super) raises: usize,
    pub(super) acks: usize,
}

/// An interrupt that a vCPU is handling.
#[derive(Clone, Copy, Debug)]
pub(super) struct Handling {
    source: usize,
    lowered: bool,
    dropped: bool,
}

pub(super) struct GuestCpu {
    pub(super) interface: CpuInterface,
    pub(super) phase: Phase,
    kicked: bool,
    pub(super) handling: Vec<Handling>,
}

pub(super) struct Machine {
    pub(super) gic: TestGic,
    pub(super) cpus: Vec<GuestCpu>,
    pub(super) sources: Vec<Source>,
    pub(super) groups_forwarded: bool,
    nr_lrs: usize,
}

impl Machine {
    /// `nr_spis` SPIs, of which every second is edge-triggered; SGIs 0 to 3 and the timer's PPI.
    pub(super) fn new(nr_vcpus: usize, nr_lrs: usize, nr_spis: u32, split_eoi: bool) -> Machine {
        let gic = gic(nr_vcpus);
        let mut sources = Vec::new();
        let source = |intid, private_to: Option<usize>, edge| Source {
            intid,
            private_to,
            edge,
            line: false,
            enabled: true,
            priority: 0,
            target: private_to.unwrap_or(0),
            active_at: None,
            ended_at: None,
            unserved: false,
            raises: 0,
            acks: 0,
        };
        for vcpu in 0..nr_vcpus {
            sources.extend((0..4).map(|sgi| source(sgi, Some(vcpu), true)));
            sources.push(source(27, Some(vcpu), false));
        }
        sources.extend((32..32 + nr_spis).map(|spi| source(spi, None, spi % 2 == 0)));
        for source in &sources {
            if source.private_to.is_none() && source.edge {
                set_edge(&gic, source.intid);
            }
            write_bit(&gic, source.target, ISENABLER, source.intid);
        }
        let cpu = || GuestCpu {
            interface: CpuInterface::new(nr_lrs, split_eoi),
            phase: Phase::Out,
            kicked: false,
            handling: Vec::new(),
        };
        let cpus = (0..nr_vcpus).map(|_| cpu()).collect();
        let mut machine = Machine { gic, cpus, sources, groups_forwarded: true, nr_lrs };
        machine.open_interfaces();
        machine
    }

    /// Enables everything at the CPU interfaces, as only a running guest can.
    pub(super) fn open_interfaces(&mut self) {
        for vcpu in 0..self.cpus.len() {
            if self.cpus[vcpu].interface.is_open() {
                continue;
            }
            if self.cpus[vcpu].phase != Phase::Running {
                self.cpus[vcpu].phase = Phase::Out;
                self.enter(vcpu);
            }
            self.cpus[vcpu].interface.open();
        }
    }

    pub(super) fn kick(&mut self, set: &VcpuSet) {
        for vcpu in set.iter() {
            self.cpus[vcpu].kicked = true;
        }
    }

    /// Drives the line of a source, or sends an edge.
    pub(super) fn drive(&mut self, index: usize, level: bool) {
        let source = &mut self.sources[index];
        source.line = level;
        if level && source.edge {
            source.unserved = true;
            source.raises += 1;
        }
        let set = match source.private_to {
            Some(vcpu) => self.gic.set_ppi(vcpu, source.intid, level),
            None => self.gic.set_spi(source.intid, level),
        };
        self.kick(&set.unwrap());
    }

    /// Sends an SGI to one vCPU, which is the private source `index`.
    pub(super) fn send_sgi(&mut self, from: usize, index: usize) {
        let source = &mut self.sources[index];
        source.unserved = true;
        source.raises += 1;
        let to = source.private_to.unwrap() as u64;
        let value = u64::from(source.intid) << 24 | 1 << (to & 0xf) | (to >> 4) << 16;
        let set = self.gic.sysreg_write(from, SGI1R_WRITE, value).unwrap();
        self.kick(&set);
    }

    pub(super) fn enter(&mut self, vcpu: usize) {
        assert_eq!(self.cpus[vcpu].phase, Phase::Out);
        self.cpus[vcpu].kicked = false;
        self.cpus[vcpu].phase = Phase::Running;
        let image = self.gic.flush(vcpu, self.nr_lrs);
        self.cpus[vcpu].interface.enter(&image);
        assert_eq!(self.cpus[vcpu].interface.misr(), 0, "the run would end at once: {image:x?}");
        self.check_image(vcpu, &image);
    }

    pub(super) fn exit(&mut self, vcpu: usize) {
        assert_eq!(self.cpus[vcpu].phase, Phase::Running);
        self.cpus[vcpu].phase = Phase::Out;
        for source in &mut self.sources {
            source.ended_at = source.ended_at.filter(|ender| *ender != vcpu);
        }
        let outcome = self.gic.sync(vcpu, &self.cpus[vcpu].interface.exit());
        self.kick(&outcome.kick);
    }

    fn is_lent_elsewhere(&self, vcpu: usize, intid: u32) -> bool {
        self.cpus.iter().enumerate().any(|(other, cpu)| {
            other != vcpu
                && cpu.phase == Phase::Running
                && cpu.interface.lrs().iter().any(|lr| state_of(*lr) != 0 && intid_of(*lr) == intid)
        })
    }

    /// Compares list registers with what the guest must be told.
    fn check_image(&self, vcpu: usize, image: &LrImage) {
        let find = |intid| image.lrs.iter().find(|lr| state_of(**lr) != 0 && intid_of(**lr) == intid);
        let full = image.lrs[..self.nr_lrs].iter().all(|lr| state_of(*lr) != 0);
        let worst =
            image.lrs.iter().filter(|lr| state_of(**lr) == LR_PENDING).map(|lr| priority_of(*lr)).max();
        let mut counted = 0;
        for source in &self.sources {
            let private_elsewhere = source.private_to.is_some_and(|owner| owner != vcpu);
            if private_elsewhere {
                continue;
            }
            let forwarded = source.enabled && self.groups_forwarded && source.target == vcpu;
            let may_pend = forwarded && if source.edge { source.raises > source.acks } else { source.line };
            let must_pend = forwarded && if source.edge { source.unserved } else { source.line };
            let active = source.active_at == Some(vcpu);
            match find(source.intid) {
                Some(lr) => {
                    counted += 1;
                    assert_eq!(lr & LR_ACTIVE != 0, active, "{} {lr:x}", source.intid);
                    assert!(lr & LR_PENDING == 0 || may_pend, "{} {lr:x}", source.intid);
                    assert!(
                        !must_pend || lr & LR_PENDING != 0 || (active && !source.edge),
                        "{} {lr:x}",
                        source.intid
                    );
                    assert!(source.edge || lr & LR_EOI != 0);
                }
                None if active => {
                    assert!(full, "active interrupt {} has no list register", source.intid);
                    assert!(image.hcr & 1 << 2 != 0, "its end is not noticed");
                }
                // One that is active elsewhere, or was until its end, has to wait for that vCPU.
                None if must_pend
                    && !self.is_lent_elsewhere(vcpu, source.intid)
                    && source.active_at.or(source.ended_at).is_none() =>
                {
                    assert!(full, "interrupt {} is lost", source.intid);
                    assert!(image.hcr & (1 << 3 | 1 << 6) != 0, "its turn is not noticed");
                    assert!(worst.is_some_and(|worst| worst <= source.priority), "the wrong one waits");
                }
                None => (),
            }
        }
        let occupied = image.lrs.iter().filter(|lr| state_of(**lr) != 0).count();
        assert_eq!(counted, occupied, "a list register of an interrupt that nobody sent");
    }

    /// Lets the guest take the signalled interrupt, if there is one.
    pub(super) fn acknowledge(&mut self, vcpu: usize) -> bool {
        let Some(intid) = self.cpus[vcpu].interface.acknowledge() else { return false };
        let found = self
            .sources
            .iter()
            .position(|source| source.intid == intid && source.private_to.is_none_or(|owner| owner == vcpu));
        let index = found.unwrap();
        let source = &mut self.sources[index];
        assert_eq!(source.active_at, None, "interrupt {intid} is handled already");
        source.active_at = Some(vcpu);
        source.acks += 1;
        source.unserved = false;
        assert!(!source.edge || source.acks <= source.raises, "interrupt {intid} was delivered twice");
        self.cpus[vcpu].handling.push(Handling { source: index, lowered: false, dropped: false });
        true
    }

    /// The next step of the innermost handler: satisfy the device, then end the interrupt.
    pub(super) fn handle(&mut self, vcpu: usize, satisfy: bool, pick: usize) {
        let split = self.cpus[vcpu].interface.split_eoi;
        let Some(last) = self.cpus[vcpu].handling.iter().rposition(|handling| !handling.dropped) else {
            // Only deactivations are left, in any order.
            let n = self.cpus[vcpu].handling.len();
            if n != 0 {
                self.deactivate(vcpu, pick % n);
            }
            return;
        };
        let handling = self.cpus[vcpu].handling[last];
        let source = self.sources[handling.source].clone();
        if !source.edge && !handling.lowered {
            self.cpus[vcpu].handling[last].lowered = true;
            if satisfy {
                // A write to the device: the line changes before the vCPU continues.
                self.exit(vcpu);
                self.drive(handling.source, false);
                self.enter(vcpu);
            }
            return;
        }
        self.cpus[vcpu].interface.end(source.intid);
        if split {
            self.cpus[vcpu].handling[last].dropped = true;
        } else {
            self.cpus[vcpu].handling.pop();
            self.sources[handling.source].active_at = None;
            self.sources[handling.source].ended_at = Some(vcpu);
        }
    }

    fn deactivate(&mut self, vcpu: usize, at: usize) {
        let handling = self.cpus[vcpu].handling.remove(at);
        let intid = self.sources[handling.source].intid;
        self.sources[handling.source].active_at = None;
        self.sources[handling.source].ended_at = Some(vcpu);
        if self.cpus[vcpu].interface.traps_deactivate() {
            self.exit(vcpu);
            let set = self.gic.sysreg_write(vcpu, DIR_WRITE, intid.into()).unwrap();
            self.kick(&set);
            self.enter(vcpu);
        } else {
            self.cpus[vcpu].interface.deactivate(intid);
        }
    }

    /// What the run loop and the hardware do by themselves. Whether anything happened.
    pub(super) fn schedule(&mut self, vcpu: usize) -> bool {
        let cpu = &mut self.cpus[vcpu];
        match cpu.phase {
            Phase::Out => self.enter(vcpu),
            Phase::Running if cpu.kicked || cpu.interface.misr() != 0 => self.exit(vcpu),
            Phase::Sleeping if cpu.kicked => cpu.phase = Phase::Out,
            Phase::Running | Phase::Sleeping => return false,
        }
        true
    }

    /// The guest has nothing to do.
    pub(super) fn wait_for_interrupt(&mut self, vcpu: usize) {
        self.exit(vcpu);
        if !self.gic.has_pending(vcpu) && !self.cpus[vcpu].kicked {
            self.cpus[vcpu].phase = Phase::Sleeping;
        }
    }

    /// Runs until every vCPU sleeps, and checks that nothing is left.
    pub(super) fn settle(&mut self) {
        for _ in 0..200_000 {
            if self.cpus.iter().all(|cpu| cpu.phase == Phase::Sleeping && !cpu.kicked) {
                break;
            }
            for vcpu in 0..self.cpus.len() {
                if self.schedule(vcpu) || self.cpus[vcpu].phase != Phase::Running {
                    continue;
                }
                if self.acknowledge(vcpu) {
                } else if !self.cpus[vcpu].handling.is_empty() {
                    self.handle(vcpu, true, 0);
                } else {
                    self.wait_for_interrupt(vcpu);
                }
            }
        }
        for (vcpu, cpu) in self.cpus.iter().enumerate() {
            assert_eq!(cpu.phase, Phase::Sleeping, "vCPU {vcpu} does not come to rest");
        }
        for source in &self.sources {
            assert!(!source.unserved, "edge of {} at {} lost", source.intid, source.target);
            assert!(source.edge || !source.line, "level of {} at {} lost", source.intid, source.target);
            assert_eq!(source.active_at, None);
        }
    }
}

/// ESR of a write of ICC_SGI1R_EL1 and of ICC_DIR_EL1.
pub(super) const SGI1R_WRITE: u64 = 0x18 << 26 | 1 << 25 | 3 << 20 | 5 << 17 | 12 << 10 | 11 << 1;
pub(super) const DIR_WRITE: u64 = 0x18 << 26 | 1 << 25 | 3 << 20 | 1 << 17 | 12 << 10 | 11 << 1;
