//! EL3's control registers, from what the CPU says it has.
//!
//! Every enable follows an ID register, never a constant: a newer CPU model that gains a feature would
//! otherwise trap the host's first use of it to EL3.

use crate::platform::World;

/// The ID registers that decide.
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct IdRegs {
    pub pfr0: u64,
    pub pfr1: u64,
    pub pfr2: u64,
    pub mmfr0: u64,
    pub mmfr1: u64,
    pub mmfr2: u64,
    pub mmfr3: u64,
    pub mmfr4: u64,
    pub dfr0: u64,
    pub isar0: u64,
    pub isar1: u64,
    pub isar2: u64,
    /// ID_AA64SMFR0_EL1; only read where there is SME.
    pub smfr0: u64,
}

/// Groups of registers that exist only with a feature; bit numbers are known to the world switch.
pub mod feature {
    /// CONTEXTIDR_EL2, TTBR1_EL2.
    pub const VHE: u64 = 1 << 0;
    /// VDISR_EL2, VSESR_EL2.
    pub const RAS: u64 = 1 << 1;
    /// HFGxTR_EL2, HFGITR_EL2, HDFGxTR_EL2.
    pub const FGT: u64 = 1 << 2;
    /// CNTPOFF_EL2.
    pub const ECV: u64 = 1 << 3;
    /// SCXTNUM_EL2.
    pub const CSV2: u64 = 1 << 4;
    /// HCRX_EL2.
    pub const HCX: u64 = 1 << 5;
    /// The pointer authentication keys.
    pub const PAUTH: u64 = 1 << 6;
    /// VNCR_EL2.
    pub const NV2: u64 = 1 << 7;
    /// DBGVCR32_EL2.
    pub const AARCH32: u64 = 1 << 8;
    /// At least one of the following: none of them exists on the CPU model of today.
    pub const RARE: u64 = 1 << 9;
    /// TFSR_EL2.
    pub const MTE: u64 = 1 << 10;
    /// HDFGxTR2_EL2, HFGxTR2_EL2, HFGITR2_EL2.
    pub const FGT2: u64 = 1 << 11;
    /// TCR2_EL2.
    pub const TCR2: u64 = 1 << 12;
    /// SCTLR2_EL2.
    pub const SCTLR2: u64 = 1 << 13;
    /// PIR_EL2, PIRE0_EL2.
    pub const S1PIE: u64 = 1 << 14;
    /// POR_EL2.
    pub const S1POE: u64 = 1 << 15;
    /// S2PIR_EL2.
    pub const S2PIE: u64 = 1 << 16;
    /// GCSCR_EL2, GCSPR_EL2.
    pub const GCS: u64 = 1 << 17;
    /// All of the first nine and none of the rare ones: one test instead of ten in the world switch.
    pub const USUAL: u64 = 1 << 18;
    /// At least one of the following two.
    pub const OTHER: u64 = 1 << 19;
    /// ACTLR_EL2, AFSR0_EL2, AFSR1_EL2, AMAIR_EL2, HACR_EL2: set by the image if any of them holds a value.
    pub const IMPLEMENTATION_DEFINED: u64 = 1 << 20;
    /// ICC_SRE_EL2, ICH_HCR_EL2, ICH_VMCR_EL2: EL3's in family 0.x of the RMM-EL3 interface.
    pub const GIC: u64 = 1 << 21;
}

const fn field(reg: u64, lsb: u32) -> u64 {
    reg >> lsb & 0xF
}

/// The bits whose condition holds.
fn bits(list: &[(bool, u32)]) -> u64 {
    list.iter().filter(|(on, _)| *on).fold(0, |all, (_, bit)| all | 1 << bit)
}

impl IdRegs {
    fn sve(&self) -> bool {
        field(self.pfr0, 32) >= 1
    }
    fn sme(&self) -> u64 {
        field(self.pfr1, 24)
    }
    fn mte2(&self) -> bool {
        field(self.pfr1, 8) >= 2
    }
    fn fgt(&self) -> u64 {
        field(self.mmfr0, 56)
    }
    fn pauth(&self) -> bool {
        // APA, API, GPA, GPI of ISAR1; APA3, GPA3 of ISAR2.
        self.isar1 & 0xFF00_0FF0 != 0 || self.isar2 & 0xFF00 != 0
    }
    fn permission_indirection(&self) -> bool {
        self.mmfr3 & 0x00FF_FF00 != 0
    }

    /// The register groups that the world switch has to move.
    pub fn features(&self) -> u64 {
        use feature as f;
        let rare = [
            (self.mte2(), f::MTE),
            (self.fgt() >= 2, f::FGT2),
            (field(self.mmfr3, 0) >= 1, f::TCR2),
            (field(self.mmfr3, 4) >= 1, f::SCTLR2),
            (field(self.mmfr3, 8) >= 1, f::S1PIE),
            (field(self.mmfr3, 12) >= 1, f::S2PIE),
            (field(self.mmfr3, 16) >= 1, f::S1POE),
            (field(self.pfr1, 44) >= 1, f::GCS),
        ];
        let usual = [
            (field(self.mmfr1, 8) >= 1, f::VHE),
            (field(self.pfr0, 28) >= 1, f::RAS),
            (self.fgt() >= 1, f::FGT),
            (field(self.mmfr0, 60) >= 2, f::ECV),
            (field(self.pfr0, 56) >= 2, f::CSV2),
            (field(self.mmfr1, 40) >= 1, f::HCX),
            (self.pauth(), f::PAUTH),
            (field(self.mmfr2, 24) >= 2, f::NV2),
            (field(self.pfr0, 4) >= 2, f::AARCH32),
        ];
        let masks =
            |list: &[(bool, u64)]| list.iter().filter(|(on, _)| *on).fold(0, |all, (_, mask)| all | mask);
        let rare = masks(&rare);
        let all_usual = usual.iter().all(|(on, _)| *on);
        masks(&usual)
            | rare
            | if rare != 0 {
                f::RARE
            } else if all_usual {
                f::USUAL
            } else {
                0
            }
    }

    /// Whether the CPU has RNDR.
    pub fn rndr(&self) -> bool {
        field(self.isar0, 60) >= 1
    }

    /// Whether the CPU has memory encryption contexts.
    pub fn mec(&self) -> bool {
        field(self.mmfr3, 28) >= 1
    }

    /// Enables for the Normal world and for both worlds. What has EL2 registers is for both only if the world
    /// switch moves them; what only the host may use needs no switch, its registers stay where they are.
    fn scr_features(&self, world: World) -> u64 {
        let normal = world == World::NonSecure;
        bits(&[
            (self.pauth(), 16),                         // APK
            (self.pauth(), 17),                         // API
            (field(self.pfr0, 56) >= 2, 25),            // EnSCXT
            (normal && self.mte2(), 26),                // ATA
            (self.fgt() >= 1, 27),                      // FGTEn
            (field(self.mmfr0, 60) >= 2, 28),           // ECVEn
            (normal && field(self.pfr0, 44) >= 2, 35),  // AMVOFFEN
            (normal && field(self.isar1, 60) >= 3, 36), // EnAS0
            (normal && field(self.isar1, 60) >= 3, 37), // ADEn
            (field(self.mmfr1, 40) >= 1, 38),           // HXEn
            (field(self.pfr1, 44) >= 1, 39),            // GCSEn
            (self.sme() >= 1, 41),                      // EnTP2
            (normal && field(self.pfr1, 48) >= 1, 42),  // RCWMASKEn
            (field(self.mmfr3, 0) >= 1, 43),            // TCR2En
            (field(self.mmfr3, 4) >= 1, 44),            // SCTLR2En
            (self.permission_indirection(), 45),        // PIEn
            (normal && field(self.mmfr3, 24) >= 1, 46), // AIEn
            (self.mec(), 49),                           // MECEn
            (normal && field(self.pfr2, 32) >= 1, 50),  // EnFPM
            (normal && field(self.pfr1, 60) >= 1, 53),  // PFAREn
            (normal && field(self.mmfr4, 32) >= 1, 54), // SRMASKEn
            (self.fgt() >= 2, 59),                      // FGTEn2
            (normal && field(self.mmfr1, 0) >= 4, 60),  // HDBSSEn
            (normal && field(self.mmfr4, 12) >= 1, 61), // HACDBSEn
        ])
    }

    /// SCR_EL3 while `world` runs. D128En (47) stays clear: the world switch moves 64 bits of a register.
    pub fn scr_el3(&self, world: World) -> u64 {
        self.scr_features(world)
            | bits(&[
                (true, 0),                       // NS: set in both worlds
                (true, 4),                       // RES1
                (true, 5),                       // RES1
                (true, 8),                       // HCE
                (true, 9),                       // SIF
                (true, 10),                      // RW
                (world != World::NonSecure, 62), // NSE
            ])
    }

    /// What SMCCC_ARCH_FEATURE_AVAILABILITY says of a register, named by its encoding: a set bit is a feature that
    /// `world` can use. Bits that trap are turned round. `None` for registers that it says nothing of.
    pub fn availability(&self, register: u64, world: World) -> Option<u64> {
        const SCR_EL3: u64 = 0x1E_1100;
        const CPTR_EL3: u64 = 0x1E_1140;
        const MDCR_EL3: u64 = 0x1E_1320;
        const API: u64 = 1 << 17;
        match register {
            // API goes with APK. RAS error records are never trapped, random numbers neither.
            SCR_EL3 => Some(
                self.scr_features(world) & !API | bits(&[(field(self.pfr0, 28) >= 1, 15), (self.rndr(), 40)]),
            ),
            // TFP: vectors are always there.
            CPTR_EL3 => Some(bits(&[
                (self.sve(), 8),
                (true, 10),
                (self.sme() >= 1, 12),
                (field(self.dfr0, 4) != 0, 20),
                (field(self.pfr0, 44) != 0, 30),
            ])),
            // TPM, EnPM2, TDA, TDOSA, NSPB, TTRF, NSTB, TDCC, SBRBE, EBWE. Profiling and trace are the host's.
            MDCR_EL3 => {
                let normal = world == World::NonSecure;
                Some(bits(&[
                    (self.pmu() >= 1, 6),
                    (self.pmu() >= 9, 7),
                    (true, 9),
                    (true, 10),
                    (normal && field(self.dfr0, 32) >= 1, 12),
                    (field(self.dfr0, 40) >= 1, 19),
                    (normal && field(self.dfr0, 44) >= 1, 24),
                    (self.fgt() >= 1, 27),
                    (normal && field(self.dfr0, 52) >= 1, 32),
                    (self.debug_8_9(), 43),
                ]))
            }
            _ => None,
        }
    }

    /// The PMU's version; zero for none, and for one that is not Arm's.
    fn pmu(&self) -> u64 {
        match field(self.dfr0, 8) {
            0xF => 0,
            version => version,
        }
    }

    fn debug_8_9(&self) -> bool {
        field(self.dfr0, 0) >= 0xB
    }

    /// CPTR_EL3, the same for both worlds: nothing is trapped that exists.
    pub fn cptr_el3(&self) -> u64 {
        bits(&[
            (self.sve(), 8),                 // EZ
            (self.sme() >= 1, 12),           // ESM
            (field(self.dfr0, 4) == 0, 20),  // TTA: no trace unit
            (field(self.pfr0, 44) == 0, 30), // TAM: no activity monitors
        ])
    }

    /// MDCR_EL3, the same for both worlds: the host has debug and PMU, nothing counts at EL3.
    pub fn mdcr_el3(&self) -> u64 {
        const SPD32_DISABLED: u64 = 0b10 << 14;
        const SDD: u64 = 1 << 16;
        const SCCD: u64 = 1 << 23;
        const MCCD: u64 = 1 << 34;
        let pmu = self.pmu();
        let mut value = SPD32_DISABLED | SDD;
        for (on, bits) in [
            (pmu >= 6, SCCD),                        // PMUv3p5
            (pmu >= 7, MCCD),                        // PMUv3p7
            (pmu >= 9, 1 << 7),                      // EnPM2
            (field(self.dfr0, 32) >= 1, 0b11 << 12), // NSPB: profiling buffer for the host
            (field(self.dfr0, 44) >= 1, 0b11 << 24), // NSTB: trace buffer for the host
            (field(self.dfr0, 52) >= 1, 0b01 << 32), // SBRBE
            (self.debug_8_9(), 1 << 43),             // EBWE
        ] {
            if on {
                value |= bits;
            }
        }
        value
    }

    /// ZCR_EL3: the longest vectors, or nothing where there is no SVE.
    pub fn zcr_el3(&self) -> Option<u64> {
        self.sve().then_some(0xF)
    }

    /// SMCR_EL3: the longest vectors, all instructions, ZT0; nothing where there is no SME.
    pub fn smcr_el3(&self) -> Option<u64> {
        let fa64 = self.smfr0 & 1 << 63 != 0;
        let ezt0 = self.sme() >= 2;
        (self.sme() >= 1).then_some(0xF | u64::from(fa64) << 31 | u64::from(ezt0) << 30)
    }

    /// GPCCR_EL3.PPS: 1 TiB, or all that the CPU can address if that is less.
    pub fn pps(&self) -> u64 {
        (self.mmfr0 & 0xF).min(2)
    }
}

/// log2 of the bytes that a GPCCR_EL3.PPS value below 4 means.
pub const fn pps_bits(pps: u64) -> u32 {
    match pps {
        0 => 32,
        1 => 36,
        2 => 40,
        _ => 42,
    }
}
