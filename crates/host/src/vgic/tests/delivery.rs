//! Single cases of delivery, one after the other through flush and sync.

use super::machine::{DIR_WRITE, SGI1R_WRITE};
use super::*;
use crate::vgic::{LrFault, VcpuSet};

fn only(vcpu: usize) -> VcpuSet {
    let mut set = VcpuSet::EMPTY;
    set.insert(vcpu);
    set
}

fn listed(image: &LrImage) -> std::vec::Vec<u32> {
    image.lrs.iter().filter(|lr| state_of(**lr) != 0).map(|lr| intid_of(*lr)).collect()
}

/// The vCPU's CPU interface is open, as far as the host knows.
fn open(gic: &TestGic, vcpu: usize) {
    gic.flush(vcpu, 4);
    gic.sync(vcpu, &empty_exit());
}

#[test]
fn a_level_is_signalled_again_when_it_outlasts_its_handling() {
    let gic = gic(1);
    write_bit(&gic, 0, ISENABLER, 40);
    assert_eq!(gic.set_spi(40, true), Some(only(0)));
    let image = gic.flush(0, 4);
    assert_eq!(image.lrs[0], LR_PENDING | 1 << 60 | LR_EOI | 40);
    // Taken: it stays active, and not pending, though the line is high.
    let mut exit = exit_of(&image);
    exit.lrs[0] = LR_ACTIVE | 1 << 60 | LR_EOI | 40;
    assert!(gic.sync(0, &exit).ended.is_empty());
    assert!(read_bit(&gic, 0, ISACTIVER, 40));
    assert_eq!(state_of(gic.flush(0, 4).lrs[0]), LR_ACTIVE);
    // Ended: resampled.
    exit.lrs[0] = 1 << 60 | LR_EOI | 40;
    let outcome = gic.sync(0, &exit);
    assert_eq!(outcome.ended.iter().collect::<std::vec::Vec<_>>(), [40]);
    assert!(gic.has_pending(0));
    assert_eq!(state_of(gic.flush(0, 4).lrs[0]), LR_PENDING);
    // Lowered while it is in a list register and not taken: gone.
    gic.set_spi(40, false).unwrap();
    gic.sync(0, &exit_of(&image));
    assert!(!gic.has_pending(0));
    assert_eq!(gic.flush(0, 4), LrImage::EMPTY);
}

#[test]
fn an_edge_during_the_handling_of_the_last_one_is_kept() {
    let gic = gic(1);
    set_edge(&gic, 40);
    write_bit(&gic, 0, ISENABLER, 40);
    gic.set_spi(40, true).unwrap();
    let image = gic.flush(0, 4);
    assert_eq!(image.lrs[0], LR_PENDING | 1 << 60 | 40);
    assert_eq!(gic.set_spi(40, true), Some(only(0)), "a running vCPU must look again");
    let mut exit = exit_of(&image);
    exit.lrs[0] = LR_ACTIVE | 1 << 60 | 40;
    gic.sync(0, &exit);
    assert_eq!(state_of(gic.flush(0, 4).lrs[0]), LR_ACTIVE | LR_PENDING);
    exit.lrs[0] = 0;
    gic.sync(0, &exit);
    assert_eq!(gic.flush(0, 4), LrImage::EMPTY);
}

#[test]
fn clearing_pending_reaches_a_list_register() {
    let gic = gic(2);
    set_edge(&gic, 40);
    write_bit(&gic, 0, ISENABLER, 40);
    gic.set_spi(40, true).unwrap();
    let image = gic.flush(0, 4);
    assert!(read_bit(&gic, 0, ISPENDR, 40));
    assert_eq!(write_bit(&gic, 1, ICPENDR, 40), only(0), "vCPU 0 must give it back");
    assert!(!read_bit(&gic, 0, ISPENDR, 40));
    gic.sync(0, &exit_of(&image));
    assert_eq!(gic.flush(0, 4), LrImage::EMPTY);
}

#[test]
fn clearing_active_reaches_a_list_register() {
    let gic = gic(2);
    set_edge(&gic, 40);
    write_bit(&gic, 0, ISACTIVER, 40);
    assert!(read_bit(&gic, 0, ICACTIVER, 40));
    let image = gic.flush(0, 4);
    assert_eq!(state_of(image.lrs[0]), LR_ACTIVE);
    assert_eq!(write_bit(&gic, 1, ICACTIVER, 40), only(0));
    gic.sync(0, &exit_of(&image));
    assert!(!read_bit(&gic, 0, ISACTIVER, 40));
    assert_eq!(gic.flush(0, 4), LrImage::EMPTY);
}

#[test]
fn software_makes_a_level_interrupt_pending_once() {
    let gic = gic(1);
    write_bit(&gic, 0, ISENABLER, 41);
    write_bit(&gic, 0, ISPENDR, 41);
    let image = gic.flush(0, 4);
    assert_eq!(listed(&image), [41]);
    gic.sync(0, &exit_of(&image));
    assert_eq!(listed(&gic.flush(0, 4)), [41], "not taken yet");
    gic.sync(0, &empty_exit());
    assert_eq!(gic.flush(0, 4), LrImage::EMPTY);
}

#[test]
fn a_new_route_applies_once_the_list_register_is_back() {
    let gic = gic(2);
    write_bit(&gic, 0, ISENABLER, 40);
    gic.set_spi(40, true).unwrap();
    let image = gic.flush(0, 4);
    assert_eq!(route(&gic, 40, 1), only(0));
    assert_eq!(gic.flush(1, 4), LrImage::EMPTY, "never at two vCPUs");
    assert_eq!(gic.sync(0, &exit_of(&image)).kick, only(1));
    assert_eq!(listed(&gic.flush(1, 4)), [40]);
    assert_eq!(gic.flush(0, 4), LrImage::EMPTY);
}

#[test]
fn an_active_interrupt_ends_where_it_was_taken() {
    let gic = gic(2);
    set_edge(&gic, 40);
    write_bit(&gic, 0, ISENABLER, 40);
    gic.set_spi(40, true).unwrap();
    let image = gic.flush(0, 4);
    let mut exit = exit_of(&image);
    exit.lrs[0] = LR_ACTIVE | 1 << 60 | 40;
    gic.sync(0, &exit);
    route(&gic, 40, 1);
    assert_eq!(gic.set_spi(40, true), Some(only(0)));
    // Its end must exit, so that vCPU 1 gets the next one.
    assert_eq!(gic.flush(0, 4).lrs[0] & (LR_PENDING | LR_ACTIVE | LR_EOI), LR_ACTIVE | LR_EOI);
    assert_eq!(gic.flush(1, 4), LrImage::EMPTY);
    assert_eq!(gic.sync(0, &empty_exit()).kick, only(1));
    assert_eq!(listed(&gic.flush(1, 4)), [40]);
}

#[test]
fn a_sleeping_vcpu_wakes_only_for_what_would_be_signalled() {
    let gic = gic(1);
    write_bit(&gic, 0, ISENABLER, 40);
    set_priority(&gic, 0, 40, 0x80);
    gic.set_spi(40, true).unwrap();
    for (vmcr, expected) in [
        (0x88 << 24 | 0b10, true),
        (0x80 << 24 | 0b10, false),
        (0xf8 << 24 | 0b01, false),
        (0xf8 << 24, false),
        (0xf8 << 24 | 0b11, true),
    ] {
        let image = gic.flush(0, 4);
        gic.sync(0, &ExitGic { vmcr, ..exit_of(&image) });
        assert_eq!(gic.has_pending(0), expected, "{vmcr:x}");
    }
    write_bit(&gic, 0, ICENABLER, 40);
    assert!(!gic.has_pending(0));
    write_bit(&gic, 0, ISENABLER, 40);
    gic.mmio_write(DIST, 4, 0b01).unwrap();
    assert!(!gic.has_pending(0));
    // As group 0 it is forwarded again.
    gic.mmio_write(DIST + 0x84, 4, 0).unwrap();
    assert!(gic.has_pending(0));
    let image = gic.flush(0, 4);
    assert_eq!(image.lrs[0] & 1 << 60, 0);
}

#[test]
fn interrupts_of_a_closed_group_do_not_fill_the_list_registers() {
    let gic = gic(1);
    gic.mmio_write(DIST + 0x84, 4, !0xff).unwrap();
    for intid in 32..44 {
        write_bit(&gic, 0, ISENABLER, intid);
        set_priority(&gic, 0, intid, if intid < 40 { 0 } else { 0xa0 });
        gic.set_spi(intid, true).unwrap();
    }
    let image = gic.flush(0, 4);
    gic.sync(0, &ExitGic { vmcr: 0xf8 << 24 | 0b10, ..exit_of(&image) });
    let image = gic.flush(0, 4);
    assert_eq!(listed(&image), [40, 41, 42, 43]);
    // Enabling group 0 at the CPU interface exits.
    assert_eq!(image.hcr, 1 << 4);
}

#[test]
fn ends_outside_list_registers_are_counted_from_the_innermost() {
    let gic = gic(1);
    open(&gic, 0);
    for (intid, priority) in [(40, 0xa0), (41, 0x80), (42, 0x60)] {
        set_edge(&gic, intid);
        set_priority(&gic, 0, intid, priority);
        write_bit(&gic, 0, ISACTIVER, intid);
    }
    set_edge(&gic, 50);
    set_priority(&gic, 0, 50, 0x20);
    write_bit(&gic, 0, ISENABLER, 50);
    gic.set_spi(50, true).unwrap();
    let image = gic.flush(0, 2);
    assert_eq!(listed(&image), [42, 50]);
    assert_eq!(image.hcr, 1 << 2);
    // The guest takes and ends 50, ends 42 and then 41.
    gic.sync(0, &ExitGic { hcr: image.hcr | 1 << 27, ..empty_exit() });
    assert!(!read_bit(&gic, 0, ISACTIVER, 41));
    assert!(!read_bit(&gic, 0, ISACTIVER, 42));
    assert_eq!(listed(&gic.flush(0, 2)), [40]);
    // A count without such interrupts changes nothing.
    gic.sync(0, &ExitGic { hcr: 31 << 27, ..empty_exit() });
    assert_eq!(gic.flush(0, 2), LrImage::EMPTY);
}

#[test]
fn deactivations_outside_list_registers_are_trapped_when_they_are_separate() {
    let gic = gic(1);
    let split = VMCR_OPEN | 1 << 9;
    gic.flush(0, 4);
    gic.sync(0, &ExitGic { vmcr: split, ..empty_exit() });
    for intid in 40..43 {
        write_bit(&gic, 0, ISACTIVER, intid);
    }
    let image = gic.flush(0, 2);
    assert_eq!(image.hcr, 1 << 2 | 1 << 14);
    gic.sync(0, &ExitGic { vmcr: split, ..exit_of(&image) });
    assert!(gic.sysreg_write(0, DIR_WRITE, 42).is_some());
    assert_eq!(listed(&gic.flush(0, 2)), [40, 41]);
}

#[test]
fn what_was_not_entered_is_not_lost() {
    let gic = gic(1);
    set_edge(&gic, 40);
    write_bit(&gic, 0, ISENABLER, 40);
    gic.set_spi(40, true).unwrap();
    let image = gic.flush(0, 4);
    gic.cancel(0);
    assert_eq!(gic.flush(0, 4), image);
    // A flush whose counterpart was forgotten.
    assert_eq!(gic.flush(0, 4), image);
    // An exit that speaks of other interrupts.
    let mut exit = exit_of(&image);
    exit.lrs[0] = LR_ACTIVE | 99;
    gic.sync(0, &exit);
    assert_eq!(gic.flush(0, 4), image);
}

#[test]
fn sgis_reach_those_who_are_addressed() {
    let gic = gic(18);
    for vcpu in 0..18 {
        write_bit(&gic, vcpu, ISENABLER, 5);
    }
    let send = |value: u64| gic.sysreg_write(1, SGI1R_WRITE, 5 << 24 | value).unwrap();
    let targets = |set: VcpuSet| set.iter().collect::<std::vec::Vec<_>>();
    assert_eq!(targets(send(0b101)), [0, 2]);
    assert_eq!(targets(send(1 << 16 | 0b10)), [17]);
    assert_eq!(targets(send(1 << 44 | 0b1)), []);
    assert_eq!(targets(send(2 << 16 | 0b1)), []);
    assert_eq!(targets(send(1 << 40)).len(), 17);
    assert!(!read_bit(&gic, 1, ISPENDR, 5), "not to itself");
    assert!(read_bit(&gic, 17, ISPENDR, 5));
    assert_eq!(listed(&gic.flush(2, 4)), [5]);
    // To itself, by address.
    assert_eq!(targets(send(0b10)), [1]);
}

#[test]
fn group_0_sgis_do_not_come_as_group_1() {
    let gic = gic(1);
    write_bit(&gic, 0, ISENABLER, 5);
    let sgi0r = SGI1R_WRITE ^ (5 ^ 7) << 17;
    assert!(gic.sysreg_write(0, sgi0r, 5 << 24 | 1).unwrap().is_empty());
    gic.mmio_write(REDISTS + SGI_FRAME + 0x80, 4, !(1 << 5)).unwrap();
    assert_eq!(gic.sysreg_write(0, sgi0r, 5 << 24 | 1), Some(only(0)));
}

#[test]
fn only_writes_of_the_gics_registers_are_taken() {
    let gic = gic(1);
    assert_eq!(gic.sysreg_write(0, SGI1R_WRITE | 1, 0), None);
    assert_eq!(gic.sysreg_write(0, SGI1R_WRITE ^ 1 << 10, 0), None);
    assert_eq!(gic.sysreg_write(0, SGI1R_WRITE ^ 1 << 26, 0), None);
    assert_eq!(gic.sysreg_write(0, 0, 0), None);
    assert_eq!(gic.sysreg_write(9, DIR_WRITE, u64::MAX), Some(VcpuSet::EMPTY));
}

#[test]
fn an_interrupt_for_anybody_goes_to_one_that_is_awake() {
    let gic = gic(2);
    write_bit(&gic, 0, ISENABLER, 40);
    gic.mmio_write(DIST + IROUTER + 40 * 8, 8, 1 << 31).unwrap();
    assert_eq!(gic.set_spi(40, true), Some(only(0)));
    assert_eq!(gic.mmio_write(REDISTS + 0x14, 4, 0b10), Some(only(1)));
    assert_eq!(listed(&gic.flush(1, 4)), [40]);
    assert_eq!(gic.flush(0, 4), LrImage::EMPTY);
}

#[test]
fn an_interrupt_for_nobody_waits_for_a_route() {
    let gic = gic(1);
    write_bit(&gic, 0, ISENABLER, 40);
    route(&gic, 40, 9);
    assert_eq!(gic.set_spi(40, true), Some(VcpuSet::EMPTY));
    assert_eq!(gic.flush(0, 4), LrImage::EMPTY);
    assert_eq!(route(&gic, 40, 0), only(0));
    assert_eq!(listed(&gic.flush(0, 4)), [40]);
}

#[test]
fn without_list_registers_everything_waits() {
    let gic = gic(1);
    write_bit(&gic, 0, ISENABLER, 40);
    gic.set_spi(40, true).unwrap();
    assert_eq!(gic.flush(0, 0), LrImage::EMPTY);
    assert_eq!(listed(&gic.flush(0, 99)), [40]);
}

#[test]
fn an_illegal_image_is_named() {
    let image = |lr0: u64, lr1: u64| {
        let mut image = LrImage::EMPTY;
        (image.lrs[0], image.lrs[1]) = (lr0, lr1);
        image
    };
    let pending = |rest| LR_PENDING | rest;
    assert_eq!(image(pending(40), pending(41)).validate(2), Ok(()));
    assert_eq!(image(pending(40), pending(40)).validate(2), Err(LrFault::Duplicate(1)));
    assert_eq!(image(40, pending(40)).validate(2), Ok(()));
    assert_eq!(image(pending(40), pending(41)).validate(1), Err(LrFault::Unimplemented(1)));
    assert_eq!(image(pending(1020), 0).validate(2), Err(LrFault::Vintid(0)));
    assert_eq!(image(pending(1 << 61 | 40), 0).validate(2), Err(LrFault::Hw(0)));
    assert_eq!(image(pending(4 << 48 | 40), 0).validate(2), Err(LrFault::Priority(0)));
    assert_eq!(image(pending(1 << 40 | 40), 0).validate(2), Err(LrFault::Pintid(0)));
    assert_eq!(LrImage { hcr: 1, ..LrImage::EMPTY }.validate(2), Err(LrFault::Hcr));
}
