//! What this machine's RMM offers, derived once from the hardware's facts.

use cca_abi::rmi::{HashAlgorithm, RealmParams, realm_flags};

use crate::entry::span_shift;
use crate::platform::Facts;

/// Most bits of an IPA or PA without LPA2, which this RMM does not offer.
const MAX_ADDRESS_BITS: u64 = 48;
/// Least bits of a Realm's IPA space.
const MIN_IPA_BITS: u64 = 32;
/// A Realm has at most 2^10 − 1 RECs.
pub(crate) const MAX_RECS_ORDER: u64 = 10;

/// VTCR_EL2: RES1, NSA, inner shareable, write-back walks.
const VTCR_BASE: u64 = 0xC000_3500;
const VTCR_VS: u64 = 1 << 19;

/// Extracts `width` bits at `shift`.
pub(crate) const fn field(value: u64, shift: u32, width: u32) -> u64 {
    value >> shift & ((1 << width) - 1)
}

/// The offer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Config {
    pub(crate) pa_bits: u64,
    pub(crate) vmid16: bool,
    pub(crate) num_bps: u64,
    pub(crate) num_wps: u64,
    /// List registers (the real number, 1 to 16).
    pub(crate) num_lrs: usize,
    /// Bits of a list register's priority that are not implemented.
    pub(crate) lr_priority_res0: u64,
    /// Width of an INTID in bits (16 or 24).
    pub(crate) intid_bits: u32,
    vtcr_base: u64,
}

impl Config {
    /// Reads the facts; `None` if the CPU cannot host Realms with this RMM.
    pub(crate) fn new(facts: &Facts) -> Option<Self> {
        let id = &facts.id;
        let pa_bits = match field(id.id_aa64mmfr0, 0, 4) {
            0 => 32,
            1 => 36,
            2 => 40,
            3 => 42,
            4 => 44,
            5 => 48,
            6 => 52,
            _ => return None,
        };
        // Stage 2 forced write-back and the virtualization host extension.
        let fwb = field(id.id_aa64mmfr2, 40, 4) != 0;
        let vhe = field(id.id_aa64mmfr1, 8, 4) != 0;
        if !fwb || !vhe {
            return None;
        }
        let vmid16 = field(id.id_aa64mmfr1, 4, 4) == 2;
        let count = |low: u64, high: u64| match (low, high) {
            (15, 0) => 15,
            (15, more) => more,
            (few, _) => few,
        };
        let num_bps = count(field(id.id_aa64dfr0, 12, 4), field(id.id_aa64dfr1, 8, 8));
        let num_wps = count(field(id.id_aa64dfr0, 20, 4), field(id.id_aa64dfr1, 16, 8));
        let num_lrs = usize::try_from(field(facts.ich_vtr, 0, 5)).ok()? + 1;
        let priority_bits = u32::try_from(field(facts.ich_vtr, 29, 3)).ok()? + 1;
        let intid_bits = if field(facts.ich_vtr, 23, 3) == 0 { 16 } else { 24 };
        // VTCR_EL2.PS without LPA2: 48 bits at most.
        let ps = field(id.id_aa64mmfr0, 0, 4).min(5);
        Some(Self {
            pa_bits,
            vmid16,
            // The RMM's context holds 16 of each.
            num_bps: num_bps.min(15),
            num_wps: num_wps.min(15),
            num_lrs: num_lrs.min(16),
            lr_priority_res0: 0xFF & !(0xFF00u64 >> priority_bits),
            intid_bits,
            vtcr_base: VTCR_BASE | ps << 16 | if vmid16 { VTCR_VS } else { 0 },
        })
    }

    /// Widest IPA space.
    pub(crate) fn s2sz(&self) -> u64 {
        self.pa_bits.min(MAX_ADDRESS_BITS)
    }

    /// Feature register 0.
    pub(crate) fn features0(&self) -> u64 {
        // LPA2, SVE and PMU are not offered: their bits stay zero.
        self.s2sz()
            | self.num_bps << 14
            | self.num_wps << 20
            | 1 << 32
            | 1 << 33
            | (self.num_lrs as u64 - 1) << 34
            | MAX_RECS_ORDER << 38
    }

    /// Checks the parameters of a Realm that need nothing but this offer (params_valid, params_supp,
    /// rtt_num_level, rtt_align and the range part of vmid_valid).
    pub(crate) fn check_realm(&self, params: &RealmParams) -> Option<RealmShape> {
        let ipa_width = u64::from(params.s2sz);
        let unsupported = realm_flags::LPA2 | realm_flags::SVE | realm_flags::PMU;
        let num_bps = u64::from(params.num_bps);
        let num_wps = u64::from(params.num_wps);
        if params.flags & unsupported != 0
            || !(MIN_IPA_BITS..=self.s2sz()).contains(&ipa_width)
            || num_bps == 0
            || num_bps > self.num_bps
            || num_wps == 0
            || num_wps > self.num_wps
            || (!self.vmid16 && params.vmid > 0xFF)
        {
            return None;
        }
        let hash = HashAlgorithm::try_from(params.hash_algo).ok()?;
        let start_level = u32::try_from(params.rtt_level_start).ok().filter(|&level| level <= 3)?;
        let tables = start_tables(ipa_width, start_level, self.pa_bits)?;
        if u64::from(params.rtt_num_start) != tables || params.rtt_base % (tables * 4096) != 0 {
            return None;
        }
        // SL0 for the start levels 0 to 3.
        let sl0 = match start_level {
            0 => 2,
            1 => 1,
            2 => 0,
            _ => 3,
        };
        let vtcr = self.vtcr_base | (64 - ipa_width) | sl0 << 6;
        Some(RealmShape { ipa_width, start_level, tables, hash, vtcr })
    }
}

/// The checked, derived part of a Realm's parameters.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RealmShape {
    pub(crate) ipa_width: u64,
    pub(crate) start_level: u32,
    pub(crate) tables: u64,
    pub(crate) hash: HashAlgorithm,
    pub(crate) vtcr: u64,
}

/// How many concatenated start tables an IPA space of `width` bits needs at `level`; `None` if the architecture
/// does not allow the pair.
fn start_tables(width: u64, level: u32, pa_bits: u64) -> Option<u64> {
    if level == 0 && pa_bits < 44 {
        return None;
    }
    let shift = u64::from(span_shift(level));
    let least = shift + 1;
    // Up to 16 tables may be concatenated, but not at level 0 (without LPA2).
    let most = shift + 9 + if level > 0 { 4 } else { 0 };
    if !(least..=most).contains(&width) {
        return None;
    }
    Some(1 << width.saturating_sub(shift + 9))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_tables_are_those_of_the_specification() {
        for (width, level, expected) in [
            (32, 2, Some(4)),
            (34, 2, Some(16)),
            (35, 2, None),
            (32, 1, Some(1)),
            (39, 1, Some(1)),
            (40, 1, Some(2)),
            (42, 1, Some(8)),
            (43, 1, Some(16)),
            (44, 1, None),
            (40, 0, Some(1)),
            (39, 0, None),
            (48, 0, Some(1)),
            (32, 3, None),
        ] {
            assert_eq!(start_tables(width, level, 52), expected, "{width} bits from level {level}");
        }
        assert_eq!(start_tables(40, 0, 42), None);
    }

    #[test]
    fn priority_bits_become_a_mask() {
        let mut facts = Facts::default();
        facts.id.id_aa64mmfr0 = 5;
        facts.id.id_aa64mmfr1 = 1 << 8;
        facts.id.id_aa64mmfr2 = 1 << 40;
        facts.ich_vtr = 4 << 29 | 3;
        let config = Config::new(&facts).unwrap();
        assert_eq!(config.lr_priority_res0, 0b111);
        assert_eq!(config.num_lrs, 4);
    }
}
