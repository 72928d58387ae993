//! The frames as a guest's driver sees them.

use super::*;

#[test]
fn linux_finds_and_initialises_its_distributor() {
    let gic = gic(2);
    // gic_validate_dist_version: PIDR2.
    assert_eq!(gic.mmio_read(DIST + 0xffe8, 4).unwrap() & 0xf0, 0x30);
    // GICD_TYPER: ITLinesNumber for 128 INTIDs, no LPIs, no message-based SPIs, no extended SPIs.
    let typer = gic.mmio_read(DIST + 4, 4).unwrap();
    assert_eq!(typer & 0x1f, 3);
    assert_eq!(typer & (1 << 17 | 1 << 16 | 1 << 8), 0);
    // GICD_TYPER2, and no write in progress.
    assert_eq!(gic.mmio_read(DIST + 0xc, 4), Some(0));
    gic.mmio_write(DIST, 4, 0).unwrap();
    assert_eq!(gic.mmio_read(DIST, 4).unwrap() & 1 << 31, 0);
    // gic_dist_init: all SPIs group 1, level, default priority, disabled; then the enable bits.
    for offset in [0x84, 0x88, 0x8c] {
        gic.mmio_write(DIST + offset, 4, 0xffff_ffff).unwrap();
        assert_eq!(gic.mmio_read(DIST + offset, 4), Some(0xffff_ffff));
    }
    for intid in (32..128).step_by(4) {
        gic.mmio_write(DIST + IPRIORITYR + intid, 4, 0xa0a0_a0a0).unwrap();
        assert_eq!(gic.mmio_read(DIST + IPRIORITYR + intid, 4), Some(0xa0a0_a0a0));
    }
    gic.mmio_write(DIST, 4, 0x13).unwrap();
    assert_eq!(gic.mmio_read(DIST, 4), Some(0x53));
    // All SPIs to the boot CPU.
    gic.mmio_write(DIST + IROUTER + 32 * 8, 8, mpidr(1)).unwrap();
    assert_eq!(gic.mmio_read(DIST + IROUTER + 32 * 8, 8), Some(1));
}

#[test]
fn redistributors_say_whose_they_are_and_which_is_the_last() {
    let gic = gic(18);
    for vcpu in 0..18 {
        let base = REDISTS + 0x2_0000 * vcpu;
        assert_eq!(gic.mmio_read(base + 0xffe8, 4).unwrap() & 0xf0, 0x30);
        let typer = gic.mmio_read(base + 8, 8).unwrap();
        assert_eq!(typer >> 32, mpidr(vcpu as usize));
        assert_eq!(typer >> 8 & 0xffff, vcpu);
        assert_eq!(typer & 1 << 4 != 0, vcpu == 17);
        assert_eq!(typer & 0b1111, 0, "no LPIs of any kind");
        assert_eq!(gic.mmio_read(base + 12, 4), Some(typer >> 32));
    }
    assert_eq!(gic.mmio_read(REDISTS + 0x2_0000 * 18, 4), None);
}

#[test]
fn a_redistributor_wakes_and_sleeps() {
    let gic = gic(1);
    assert_eq!(gic.mmio_read(REDISTS + 0x14, 4), Some(0));
    gic.mmio_write(REDISTS + 0x14, 4, 0b010).unwrap();
    assert_eq!(gic.mmio_read(REDISTS + 0x14, 4), Some(0b110));
    gic.mmio_write(REDISTS + 0x14, 4, 0).unwrap();
    assert_eq!(gic.mmio_read(REDISTS + 0x14, 4), Some(0));
}

#[test]
fn private_interrupts_are_the_redistributors_alone() {
    let gic = gic(2);
    gic.mmio_write(DIST + ISENABLER, 4, 0xffff_ffff).unwrap();
    assert_eq!(gic.mmio_read(DIST + ISENABLER, 4), Some(0));
    assert_eq!(gic.mmio_read(REDISTS + SGI_FRAME + ISENABLER, 4), Some(0));
    write_bit(&gic, 1, ISENABLER, 27);
    assert!(read_bit(&gic, 1, ICENABLER, 27));
    assert!(!read_bit(&gic, 0, ISENABLER, 27));
    write_bit(&gic, 1, ICENABLER, 27);
    assert!(!read_bit(&gic, 1, ISENABLER, 27));
    // The SGI frame has no SPIs.
    gic.mmio_write(REDISTS + SGI_FRAME + ISENABLER + 4, 4, 1).unwrap();
    assert!(!read_bit(&gic, 0, ISENABLER, 32));
}

#[test]
fn sgis_stay_edge_triggered() {
    let gic = gic(1);
    let frame = REDISTS + SGI_FRAME;
    gic.mmio_write(frame + ICFGR, 4, 0).unwrap();
    assert_eq!(gic.mmio_read(frame + ICFGR, 4), Some(0xaaaa_aaaa));
    gic.mmio_write(frame + ICFGR + 4, 4, 0b10 << 4).unwrap();
    assert_eq!(gic.mmio_read(frame + ICFGR + 4, 4), Some(0b10 << 4));
}

#[test]
fn priorities_have_five_bits_and_are_accessible_as_bytes() {
    let gic = gic(1);
    gic.mmio_write(DIST + IPRIORITYR + 41, 1, 0xff).unwrap();
    assert_eq!(gic.mmio_read(DIST + IPRIORITYR + 41, 1), Some(0xf8));
    assert_eq!(gic.mmio_read(DIST + IPRIORITYR + 40, 4), Some(0xf800));
}

#[test]
fn routes_are_accessible_in_halves() {
    let gic = gic(1);
    let router = DIST + IROUTER + 40 * 8;
    gic.mmio_write(router, 4, 0x8012_3456).unwrap();
    gic.mmio_write(router + 4, 4, 0xffff_ff07).unwrap();
    assert_eq!(gic.mmio_read(router, 8), Some(0x07_8012_3456));
    assert_eq!(gic.mmio_read(router + 4, 4), Some(0x07));
}

#[test]
fn every_access_to_the_frames_is_answered_and_nothing_else_is() {
    let gic = gic(2);
    for len in [0, 1, 2, 3, 4, 8, 16] {
        for gpa in (DIST..DIST + 0x1_0000).chain(REDISTS..REDISTS + 0x2_0000) {
            assert!(gic.mmio_read(gpa, len).is_some());
        }
    }
    for gpa in (DIST..DIST + 0x1_0000).chain(REDISTS..REDISTS + 0x4_0000) {
        for len in [1, 2, 4, 8] {
            assert!(gic.mmio_write(gpa, len, u64::MAX).is_some());
        }
    }
    for vcpu in 0..2 {
        gic.flush(vcpu, 4).validate(4).unwrap();
    }
    assert_eq!(gic.mmio_read(DIST - 1, 4), gic.mmio_read(REDISTS - 1, 4));
    assert_eq!(gic.mmio_read(REDISTS - 1, 4), None);
    assert_eq!(gic.mmio_read(DIST + 0x1_0000, 4), None);
    assert_eq!(gic.mmio_write(u64::MAX, 8, 0), None);
}

#[test]
fn wrong_sizes_read_as_zero_and_write_nothing() {
    let gic = gic(1);
    write_bit(&gic, 0, ISENABLER, 40);
    assert_eq!(gic.mmio_read(DIST + ISENABLER + 4, 2), Some(0));
    assert_eq!(gic.mmio_read(DIST + ISENABLER + 4, 8), Some(0));
    assert_eq!(gic.mmio_read(DIST + ISENABLER + 5, 4), Some(0));
    gic.mmio_write(DIST + ICENABLER + 4, 1, 0xff).unwrap();
    gic.mmio_write(DIST + ICENABLER + 4, 8, u64::MAX).unwrap();
    assert!(read_bit(&gic, 0, ISENABLER, 40));
}

#[test]
fn interrupts_beyond_the_configured_number_do_not_exist() {
    let gic = gic(1);
    write_bit(&gic, 0, ISENABLER, 128);
    assert!(!read_bit(&gic, 0, ISENABLER, 128));
    assert_eq!(gic.set_spi(127, true), Some(crate::vgic::VcpuSet::EMPTY));
    assert_eq!(gic.set_spi(128, true), None);
    assert_eq!(gic.set_spi(31, true), None);
    assert_eq!(gic.set_spi(u32::MAX, true), None);
    assert_eq!(gic.set_ppi(0, 15, true), None);
    assert_eq!(gic.set_ppi(0, 32, true), None);
    assert_eq!(gic.set_ppi(1, 27, true), None);
}
