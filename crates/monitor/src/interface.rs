//! Which version of the RMM-EL3 interface is offered. EL3 speaks first: the RMM takes the version or refuses to boot.
//!
//! | | family 0.x (0.3 to 0.8) | 2.0 |
//! |---|---|---|
//! | results of a command that reach the host | x1 to x5 as x0 to x4 | x1 to x8 as x0 to x7 |
//! | ICC_SRE_EL2, ICH_HCR_EL2, ICH_VMCR_EL2 | switched by EL3 | left alone by EL3, kept by the RMM |
//! | RMI functions 0x1D0 to 0x2CF | unknown | forwarded |
//! | activation token (boot) | zero | what the CPU's last boot left |
//! | manifest | 0.3, from 0.6 on 0.5 | 0.5 |

use cca_abi::rmm_el3::{MANIFEST_VERSION_0_3, MANIFEST_VERSION_0_5, VERSION_0_8, VERSION_2_0};

/// A version that can be offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interface(u64);

impl Interface {
    /// 2.0, the default.
    pub const V2_0: Self = Self(VERSION_2_0);
    /// 0.8, the last of its family.
    pub const V0_8: Self = Self(VERSION_0_8);

    /// What a user calls it: a version, or the name of a family. White space and NULs at the end do not count.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let end = text.iter().rposition(|c| !c.is_ascii_whitespace() && *c != 0).map_or(0, |last| last + 1);
        match text.get(..end)? {
            b"2.0" | b"2.x" | b"2" => Some(Self::V2_0),
            b"0.x" | b"0" => Some(Self::V0_8),
            [b'0', b'.', minor @ b'3'..=b'8'] => Some(Self(u64::from(minor - b'0'))),
            _ => None,
        }
    }

    /// The version word of the boot registers.
    pub const fn version(self) -> u64 {
        self.0
    }

    /// Major and minor number.
    pub const fn numbers(self) -> (u64, u64) {
        (self.0 >> 16, self.0 & 0xFFFF)
    }

    /// Whether this is version 2.0, not family 0.x.
    pub const fn is_2(self) -> bool {
        self.0 >> 16 == 2
    }

    /// Whether EL3 moves ICC_SRE_EL2, ICH_HCR_EL2 and ICH_VMCR_EL2 with the worlds.
    pub const fn el3_switches_gic(self) -> bool {
        !self.is_2()
    }

    /// Whether services exist that came with `0.minor`.
    pub(crate) const fn since(self, minor: u64) -> bool {
        self.is_2() || self.0 >= minor
    }

    /// The manifest's version.
    pub const fn manifest_version(self) -> u32 {
        if self.since(6) { MANIFEST_VERSION_0_5 } else { MANIFEST_VERSION_0_3 }
    }
}
