use crate::World;
use crate::enables::{IdRegs, feature};

/// `-cpu max,x-rme=on` of QEMU 10.0.2, as measured.
fn max() -> IdRegs {
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
