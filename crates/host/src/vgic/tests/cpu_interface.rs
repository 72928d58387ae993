//! A virtual CPU interface, as the architecture describes it, for the part that list registers drive.

use std::vec::Vec;

use super::{ExitGic, LR_ACTIVE, LR_EOI, LR_PENDING, LrImage, MAX_LRS, intid_of, state_of};

const UIE: u64 = 1 << 1;
const LRENPIE: u64 = 1 << 2;
const NPIE: u64 = 1 << 3;
const VGRP0EIE: u64 = 1 << 4;
const VGRP0DIE: u64 = 1 << 5;
const VGRP1EIE: u64 = 1 << 6;
const VGRP1DIE: u64 = 1 << 7;
const TDIR: u64 = 1 << 14;

pub(super) struct CpuInterface {
    lrs: [u64; MAX_LRS],
    nr_lrs: usize,
    hcr: u64,
    eoi_count: u64,
    /// Active priorities, the running one last.
    active: Vec<u8>,
    pub(super) pmr: u8,
    pub(super) group0: bool,
    pub(super) group1: bool,
    pub(super) split_eoi: bool,
}

impl CpuInterface {
    pub(super) fn new(nr_lrs: usize, split_eoi: bool) -> CpuInterface {
        CpuInterface {
            lrs: [0; MAX_LRS],
            nr_lrs,
            hcr: 0,
            eoi_count: 0,
            active: Vec::new(),
            pmr: 0,
            group0: false,
            group1: false,
            split_eoi,
        }
    }

    pub(super) fn open(&mut self) {
        (self.pmr, self.group0, self.group1) = (0xf8, true, true);
    }

    pub(super) fn is_open(&self) -> bool {
        (self.pmr, self.group0, self.group1) == (0xf8, true, true)
    }

    pub(super) fn enter(&mut self, image: &LrImage) {
        image.validate(self.nr_lrs).unwrap();
        self.lrs = image.lrs;
        self.hcr = image.hcr;
        self.eoi_count = 0;
    }

    pub(super) fn exit(&self) -> ExitGic {
        let vmcr = u64::from(self.pmr) << 24
            | u64::from(self.split_eoi) << 9
            | u64::from(self.group1) << 1
            | u64::from(self.group0);
        ExitGic { hcr: self.hcr | self.eoi_count << 27, lrs: self.lrs, misr: self.misr(), vmcr }
    }

    pub(super) fn misr(&self) -> u64 {
        let implemented = &self.lrs[..self.nr_lrs];
        let ended = implemented.iter().any(|lr| state_of(*lr) == 0 && lr & LR_EOI != 0);
        let valid = implemented.iter().filter(|lr| state_of(**lr) != 0).count();
        let no_pending = !implemented.iter().any(|lr| state_of(*lr) == LR_PENDING);
        u64::from(ended)
            | if valid < 2 { self.hcr & UIE } else { 0 }
            | if self.eoi_count != 0 { self.hcr & LRENPIE } else { 0 }
            | if no_pending { self.hcr & NPIE } else { 0 }
            | self.hcr & if self.group0 { VGRP0EIE } else { VGRP0DIE }
            | self.hcr & if self.group1 { VGRP1EIE } else { VGRP1DIE }
    }

    /// The list register whose interrupt is signalled now.
    fn highest(&self) -> Option<usize> {
        let running = self.active.last().copied().unwrap_or(0xff);
        (0..self.nr_lrs)
            .filter(|&i| {
                let lr = self.lrs[i];
                let group_enabled = if lr & 1 << 60 != 0 { self.group1 } else { self.group0 };
                let priority = priority_of(lr);
                state_of(lr) == LR_PENDING && group_enabled && priority < self.pmr && priority < running
            })
            .min_by_key(|&i| priority_of(self.lrs[i]))
    }

    pub(super) fn is_signalled(&self) -> bool {
        self.highest().is_some()
    }

    /// Reads ICC_IAR: takes the signalled interrupt.
    pub(super) fn acknowledge(&mut self) -> Option<u32> {
        let i = self.highest()?;
        let lr = &mut self.lrs[i];
        *lr = *lr & !LR_PENDING | LR_ACTIVE;
        self.active.push(priority_of(*lr));
        Some(intid_of(*lr))
    }

    /// Writes ICC_EOIR: priority drop, and deactivation unless that is separate.
    pub(super) fn end(&mut self, intid: u32) {
        self.active.pop().unwrap();
        if !self.split_eoi {
            self.deactivate(intid);
        }
    }

    /// Whether a write of ICC_DIR exits.
    pub(super) fn traps_deactivate(&self) -> bool {
        self.hcr & TDIR != 0
    }

    pub(super) fn deactivate(&mut self, intid: u32) {
        let holder = self.lrs.iter_mut().find(|lr| **lr & LR_ACTIVE != 0 && intid_of(**lr) == intid);
        match holder {
            Some(lr) => *lr &= !LR_ACTIVE,
            None => self.eoi_count += 1,
        }
    }

    pub(super) fn lrs(&self) -> &[u64] {
        &self.lrs[..self.nr_lrs]
    }
}

pub(super) fn priority_of(lr: u64) -> u8 {
    (lr >> 48) as u8
}
