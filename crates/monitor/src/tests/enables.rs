use crate::World;
use crate::enables::{IdRegs, feature};

/// `-cpu max,x-rme=on` of QEMU 10.0.2, as measured.
pub(crate) fn max() -> IdRegs {
    IdRegs {
        pfr0: 0x1311_0011_2111_2222,
        pfr1: 0x0000_0010_0100_0121,
        pfr2: 0,
        mmfr0: 0x2100_0323_1020_1126,
        mmfr1: 0x0110_1120_1031_2122,
        mmfr2: 0x1221_0111_1201_1011,
        mmfr3: 0x1000_0000_0000_0000,
        mmfr4: 0,
        dfr0: 0x1000_0000_1030_560A,
        isar0: 0x1221_1111_1021_2120,
        isar1: 0x0111_2111_1021_1502,
        isar2: 0x0000_0000_0011_0012,
        smfr0: 1 << 63,
    }
}

#[test]
fn todays_cpu_model_gets_the_constants_of_the_reference() {
    let id = max();
    assert_eq!(id.scr_el3(World::NonSecure), 0x0000_0240_1A03_0731);
    assert_eq!(id.scr_el3(World::Realm), 0x4000_0240_1A03_0731);
    assert_eq!(id.cptr_el3() & (1 << 8 | 1 << 10 | 1 << 12), 1 << 8 | 1 << 12);
    assert_eq!(id.zcr_el3(), Some(0xF));
    assert_eq!(id.smcr_el3(), Some(0x8000_000F));
    assert_eq!(id.pps(), 2);
    assert_ne!(id.features() & feature::USUAL, 0);
    assert_eq!(id.features() & feature::RARE, 0);
}

#[test]
fn newer_features_are_enabled_when_the_cpu_has_them() {
    let newer = IdRegs { mmfr3: 0x1111_1111, pfr1: 0x0000_1010_0100_0121, ..max() };
    let scr = newer.scr_el3(World::NonSecure);
    for (bit, name) in
        [(39, "GCSEn"), (43, "TCR2En"), (44, "SCTLR2En"), (45, "PIEn"), (46, "AIEn"), (49, "MECEn")]
    {
        assert_ne!(scr & 1 << bit, 0, "{name}");
    }
    let features = newer.features();
    assert_ne!(features & feature::RARE, 0);
    assert_eq!(features & feature::USUAL, 0);
    assert_ne!(features & feature::TCR2, 0);
}

#[test]
fn a_cpu_without_vectors_has_no_vector_registers() {
    let bare = IdRegs { pfr0: 0x0010_0000_0000_2222, ..IdRegs::default() };
    assert_eq!((bare.zcr_el3(), bare.smcr_el3()), (None, None));
    assert_eq!(bare.scr_el3(World::NonSecure), 0x731);
    assert_eq!(bare.features() & !feature::AARCH32, 0);
}

#[test]
fn what_a_world_may_use_is_what_its_enables_say() {
    const API: u64 = 1 << 17;
    for id in [max(), IdRegs::default(), newer()] {
        for world in [World::NonSecure, World::Realm] {
            let enabled = id.scr_el3(world) & 0x3FFF_FFFF_FFFE_0000 & !API | id.scr_el3(world) & 1 << 16;
            let available = id.availability(0x1E_1100, world).unwrap();
            assert_eq!(available & !(1 << 15 | 1 << 40), enabled, "SCR_EL3 of {world:?}");
            // Enables as they are, traps turned round.
            let cptr = id.availability(0x1E_1140, world).unwrap();
            let known = 1 << 8 | 1 << 10 | 1 << 12 | 1 << 20 | 1 << 30;
            assert_eq!(cptr ^ (1 << 10 | 1 << 20 | 1 << 30), id.cptr_el3() & known);
            assert!(id.availability(0x1E_1320, world).is_some());
        }
        assert_eq!(id.availability(0x1E_A500, World::Realm), None);
    }
    assert!(max().availability(0x1E_1100, World::Realm).unwrap() & 1 << 40 != 0, "RNDR is there");
    assert_eq!(max().availability(0x1E_1320, World::Realm), Some(1 << 6 | 1 << 9 | 1 << 10 | 1 << 27));
}

#[test]
fn the_realm_world_gets_nothing_that_is_not_switched() {
    let (normal, realm) = (newer().scr_el3(World::NonSecure), newer().scr_el3(World::Realm));
    // ATA, EnFPM, RCWMASKEn, AIEn: the host's alone.
    for bit in [26, 42, 46, 50] {
        assert!(normal & 1 << bit != 0 && realm & 1 << bit == 0, "bit {bit}");
    }
    // GCSEn, TCR2En, SCTLR2En, PIEn, MECEn, FGTEn2: both worlds'.
    for bit in [39, 43, 44, 45, 49, 59] {
        assert!(normal & realm & 1 << bit != 0, "bit {bit}");
    }
    assert_eq!((normal | realm) & 1 << 47, 0, "128-bit registers are nobody's");
}

/// A CPU with everything that the monitor knows.
fn newer() -> IdRegs {
    IdRegs {
        pfr0: max().pfr0,
        pfr1: 0x0001_1010_0200_0321,
        pfr2: 1 << 32,
        mmfr0: max().mmfr0 & !(0xF << 56) | 2 << 56,
        mmfr3: 0x11_1111_1111,
        ..max()
    }
}
