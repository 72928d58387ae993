//! Configuration through device attributes.

use super::*;
use crate::vgic::AttrError;

const REGION: u64 = 5;

fn fresh() -> TestGic {
    TestGic::new(Limits { ipa_bits: 32 })
}

fn region(count: u64, base: u64, index: u64) -> u64 {
    count << 52 | base | index
}

#[test]
fn addresses_are_checked() {
    let gic = fresh();
    assert_eq!(gic.get_attr(0, 2, 0), Ok(u64::MAX));
    assert_eq!(gic.set_attr(0, 2, 0x1000), Err(AttrError::Invalid));
    assert_eq!(gic.set_attr(0, 2, 1 << 32), Err(AttrError::TooBig));
    assert_eq!(gic.set_attr(0, 2, 0xffff_ffff_ffff_0000), Err(AttrError::Invalid));
    assert_eq!(gic.set_attr(0, 2, DIST), Ok(()));
    assert_eq!(gic.set_attr(0, 2, DIST), Err(AttrError::Exists));
    assert_eq!(gic.get_attr(0, 2, 0), Ok(DIST));
    assert_eq!(gic.set_attr(0, 3, REDISTS), Ok(()));
    assert_eq!(gic.set_attr(0, 3, REDISTS), Err(AttrError::Exists));
    assert_eq!(gic.set_attr(0, REGION, region(1, REDISTS, 0)), Err(AttrError::Invalid));
}

#[test]
fn gicv2_addresses_and_unknown_groups_do_not_exist() {
    let gic = fresh();
    assert_eq!(gic.attr_size(0, 0), Err(AttrError::Missing));
    assert_eq!(gic.attr_size(0, 4), Err(AttrError::Missing));
    assert_eq!(gic.attr_size(2, 0), Err(AttrError::Missing));
    assert_eq!(gic.attr_size(4, 3), Err(AttrError::Missing));
    assert_eq!(gic.attr_size(1, 0), Err(AttrError::Unsupported));
    assert_eq!(gic.set_attr(6, 0, 0), Err(AttrError::Unsupported));
    assert_eq!(gic.attr_size(0, 3), Ok(8));
    assert_eq!(gic.attr_size(3, 0), Ok(4));
    assert_eq!(gic.attr_size(4, 0), Ok(0));
}

#[test]
fn the_number_of_interrupts_is_set_once() {
    for wrong in [0, 32, 65, 1056, 0xffff_ffff] {
        assert_eq!(fresh().set_attr(3, 0, wrong), Err(AttrError::Invalid));
    }
    let gic = fresh();
    assert_eq!(gic.set_attr(3, 0, 1024), Ok(()));
    assert_eq!(gic.set_attr(3, 0, 1024), Err(AttrError::Busy));
    assert_eq!(gic.get_attr(3, 0, 0), Ok(1024));
    gic.set_attr(4, 0, 0).unwrap();
    assert_eq!(gic.set_spi(1019, true), Some(crate::vgic::VcpuSet::EMPTY));
    assert_eq!(gic.set_spi(1020, true), None);
}

#[test]
fn no_vcpu_comes_after_initialisation() {
    let gic = fresh();
    assert_eq!(gic.vcpu_added(0), Ok(0));
    gic.set_attr(4, 0, 0).unwrap();
    assert!(gic.is_initialised());
    assert_eq!(gic.vcpu_added(1), Err(AttrError::Busy));
    assert_eq!(gic.set_attr(3, 0, 64), Err(AttrError::Busy));
    assert_eq!(gic.set_attr(4, 0, 0), Ok(()));
}

#[test]
fn addresses_may_follow_initialisation_but_not_the_first_run() {
    let gic = fresh();
    gic.vcpu_added(0).unwrap();
    gic.set_attr(4, 0, 0).unwrap();
    assert_eq!(gic.start(), Err(AttrError::Missing));
    gic.set_attr(0, 2, DIST).unwrap();
    assert_eq!(gic.start(), Err(AttrError::Missing));
    gic.set_attr(0, 3, REDISTS).unwrap();
    assert_eq!(gic.mmio_read(DIST, 4), None);
    assert_eq!(gic.start(), Ok(()));
    assert_eq!(gic.start(), Ok(()));
    assert!(gic.mmio_read(DIST, 4).is_some());
    assert_eq!(gic.set_attr(0, 2, DIST), Err(AttrError::Busy));
}

#[test]
fn regions_hold_the_vcpus_in_order() {
    let gic = fresh();
    for vcpu in 0..3 {
        gic.vcpu_added(mpidr(vcpu)).unwrap();
    }
    assert_eq!(gic.set_attr(0, REGION, region(0, REDISTS, 0)), Err(AttrError::Invalid));
    assert_eq!(gic.set_attr(0, REGION, region(1, REDISTS, 0) | 1 << 12), Err(AttrError::Invalid));
    assert_eq!(gic.set_attr(0, REGION, region(1, REDISTS, 1)), Err(AttrError::Invalid));
    assert_eq!(gic.set_attr(0, REGION, region(2, REDISTS, 0)), Ok(()));
    assert_eq!(gic.set_attr(0, REGION, region(9, REDISTS + 0x2_0000, 1)), Err(AttrError::Invalid));
    assert_eq!(gic.set_attr(0, REGION, region(9, 0x5000_0000, 1)), Ok(()));
    assert_eq!(gic.get_attr(0, REGION, 1), Ok(region(9, 0x5000_0000, 1)));
    assert_eq!(gic.get_attr(0, REGION, 2), Err(AttrError::NoRegion));
    assert_eq!(gic.set_attr(0, 3, REDISTS), Err(AttrError::Invalid));
    gic.set_attr(0, 2, DIST).unwrap();
    gic.start().unwrap();
    let typer = |base: u64| gic.mmio_read(base + 8, 8).unwrap() & 0xffff_ff10;
    assert_eq!(typer(REDISTS), 0);
    assert_eq!(typer(REDISTS + 0x2_0000), 1 << 8 | 1 << 4);
    assert_eq!(typer(0x5000_0000), 2 << 8 | 1 << 4);
    assert_eq!(gic.mmio_read(0x5002_0000, 4), None);
}

#[test]
fn frames_that_overlap_or_do_not_suffice_are_refused_at_the_first_run() {
    let overlapping = fresh();
    overlapping.vcpu_added(0).unwrap();
    overlapping.set_attr(0, 2, DIST).unwrap();
    overlapping.set_attr(0, 3, DIST - 0x1_0000).unwrap();
    assert_eq!(overlapping.start(), Err(AttrError::Invalid));

    let short = fresh();
    short.vcpu_added(0).unwrap();
    short.vcpu_added(1).unwrap();
    short.set_attr(0, 2, DIST).unwrap();
    short.set_attr(0, REGION, region(1, REDISTS, 0)).unwrap();
    assert_eq!(short.start(), Err(AttrError::Missing));

    let beyond = fresh();
    beyond.vcpu_added(0).unwrap();
    beyond.vcpu_added(1).unwrap();
    beyond.set_attr(0, 2, DIST).unwrap();
    beyond.set_attr(0, 3, 0xfffe_0000).unwrap();
    assert_eq!(beyond.start(), Err(AttrError::TooBig));
}

#[test]
fn nothing_happens_before_initialisation() {
    let gic = fresh();
    gic.vcpu_added(0).unwrap();
    assert_eq!(gic.flush(0, 4), LrImage::EMPTY);
    assert!(gic.sync(0, &empty_exit()).kick.is_empty());
    assert!(!gic.has_pending(0));
    assert_eq!(gic.set_spi(32, true), None);
    assert_eq!(gic.set_ppi(0, 27, true), None);
}
