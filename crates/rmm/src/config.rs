//! What this machine's RMM offers, derived once from the hardware's facts.

use cca_abi::rmi::{HashAlgorithm, RealmParams, realm_flags};

use crate::aux;
use crate::entry::Format;
use crate::level::Level;
use crate::platform::{Facts, GRANULE_SIZE};

/// Most bits of an IPA or PA without LPA2.
const MAX_ADDRESS_BITS: u64 = 48;
/// Most bits with it.
const MAX_LPA2_BITS: u64 = 52;
/// Least bits of a Realm's IPA space.
const MIN_IPA_BITS: u64 = 32;
/// A Realm has at most 2^10 − 1 RECs.
pub(crate) const MAX_RECS_ORDER: u64 = 10;
/// … exactly.
pub(crate) const MAX_RECS: u64 = (1 << MAX_RECS_ORDER) - 1;

/// VTCR_EL2: RES1, NSA, inner shareable, write-back walks.
const VTCR_BASE: u64 = 0xC000_3500;
const VTCR_VS: u64 = 1 << 19;
/// VTCR_EL2.DS: 52-bit descriptors (LPA2).
const VTCR_DS: u64 = 1 << 32;
/// VTCR_EL2.SL2: the start level is −1.
const VTCR_SL2: u64 = 1 << 33;
/// VTCR_EL2.PS of 48 bits.
const PS_48_BITS: u64 = 5;

/// Extracts `width` bits at `shift`.
pub(crate) const fn field(value: u64, shift: u32, width: u32) -> u64 {
    value.wrapping_shr(shift) & !u64::MAX.wrapping_shl(width)
}

/// The offer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Config {
    pub(crate) pa_bits: u64,
    /// Whether stage 2 can have 52-bit addresses.
    pub(crate) lpa2: bool,
    pub(crate) vmid16: bool,
    pub(crate) num_bps: u64,
    pub(crate) num_wps: u64,
    /// SVE vector lengths: bit n for (n + 1) × 128 bits.
    pub(crate) sve_lengths: u16,
    /// PMU event counters for Realms; `None` if there is no PMU that can be kept from counting at EL2 (PMUv3p5).
    pub(crate) pmu_counters: Option<u64>,
    /// A Realm's PMU may be without event counters (FEAT_HPMN0).
    hpmn0: bool,
    /// All event counters: HPMN while no Realm's PMU is loaded.
    pub(crate) host_counters: u64,
    /// List registers (the real number, 1 to 16).
    pub(crate) num_lrs: usize,
    /// Bits of a list register's priority that are not implemented.
    pub(crate) lr_priority_res0: u64,
    /// Width of an INTID in bits (16 or 24).
    pub(crate) intid_bits: u32,
    /// VTCR_EL2.PS with LPA2.
    ps: u64,
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
        // Stage 2's own field, or stage 1's where it says "the same".
        let lpa2 = match field(id.id_aa64mmfr0, 40, 4) {
            0 => field(id.id_aa64mmfr0, 28, 4) == 1,
            stage2 => stage2 == 3,
        };
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
        let host_counters = u64::from(facts.pmu_counters);
        let has_pmu = matches!(field(id.id_aa64dfr0, 8, 4), 6..=14) && host_counters != 0;
        Some(Self {
            pa_bits,
            lpa2,
            vmid16,
            // The RMM's context holds 16 of each.
            num_bps: num_bps.min(15),
            num_wps: num_wps.min(15),
            sve_lengths: facts.sve_lengths,
            pmu_counters: has_pmu.then_some(host_counters),
            hpmn0: field(id.id_aa64dfr0, 60, 4) != 0,
            host_counters,
            num_lrs: num_lrs.min(16),
            lr_priority_res0: 0xFF & !(0xFF00u64 >> priority_bits),
            intid_bits,
            ps: field(id.id_aa64mmfr0, 0, 4),
            vtcr_base: VTCR_BASE | if vmid16 { VTCR_VS } else { 0 },
        })
    }

    /// Widest IPA space.
    pub(crate) fn s2sz(&self) -> u64 {
        self.widest(self.lpa2)
    }

    fn widest(&self, lpa2: bool) -> u64 {
        self.pa_bits.min(if lpa2 { MAX_LPA2_BITS } else { MAX_ADDRESS_BITS })
    }

    /// Feature register 0.
    pub(crate) fn features0(&self) -> u64 {
        let sve = match self.sve_lengths.checked_ilog2() {
            Some(longest) => 1 << 9 | u64::from(longest) << 10,
            None => 0,
        };
        let pmu = self.pmu_counters.map_or(0, |counters| 1 << 26 | counters << 27);
        self.s2sz()
            | u64::from(self.lpa2) << 8
            | sve
            | pmu
            | self.num_bps << 14
            | self.num_wps << 20
            | 1 << 32
            | 1 << 33
            | (self.num_lrs as u64).wrapping_sub(1) << 34
            | MAX_RECS_ORDER << 38
    }

    /// Checks the parameters of a Realm that need nothing but this offer (params_valid, params_supp,
    /// rtt_num_level, rtt_align and the range part of vmid_valid).
    pub(crate) fn check_realm(&self, params: &RealmParams) -> Option<RealmShape> {
        let ipa_width = u64::from(params.s2sz);
        let lpa2 = params.flags & realm_flags::LPA2 != 0;
        let num_bps = u64::from(params.num_bps);
        let num_wps = u64::from(params.num_wps);
        if (lpa2 && !self.lpa2)
            || !(MIN_IPA_BITS..=self.widest(lpa2)).contains(&ipa_width)
            || num_bps == 0
            || num_bps > self.num_bps
            || num_wps == 0
            || num_wps > self.num_wps
            || (!self.vmid16 && params.vmid > 0xFF)
        {
            return None;
        }
        let zcr = if params.flags & realm_flags::SVE != 0 { Some(self.sve(params.sve_vl)?) } else { None };
        let pmu_counters =
            if params.flags & realm_flags::PMU != 0 { Some(self.pmu(params.pmu_num_ctrs)?) } else { None };
        let hash = HashAlgorithm::try_from(params.hash_algo).ok()?;
        let start_level = u64::try_from(params.rtt_level_start).map_or_else(
            |_| (params.rtt_level_start == -1 && lpa2).then_some(Level::Minus1),
            Level::from_number,
        )?;
        let tables = start_tables(ipa_width, start_level, self.pa_bits, lpa2)?;
        let size = tables.wrapping_mul(GRANULE_SIZE);
        if u64::from(params.rtt_num_start) != tables || params.rtt_base & size.wrapping_sub(1) != 0 {
            return None;
        }
        let format = if lpa2 { Format::Bits52 } else { Format::Bits48 };
        let rtt_end = params.rtt_base.checked_add(size)?;
        if !format.fits(rtt_end.wrapping_sub(GRANULE_SIZE)) {
            return None;
        }
        let start = match start_level {
            Level::Minus1 => VTCR_SL2,
            Level::L0 => 2 << 6,
            Level::L1 => 1 << 6,
            Level::L2 => 0 << 6,
            Level::L3 => 3 << 6,
        };
        let size = if lpa2 { self.ps << 16 | VTCR_DS } else { self.ps.min(PS_48_BITS) << 16 };
        let vtcr = self.vtcr_base | size | start | 64u64.wrapping_sub(ipa_width);
        Some(RealmShape {
            ipa_width,
            start_level,
            rtt_base: params.rtt_base,
            rtt_end,
            tables,
            format,
            hash,
            vtcr,
            zcr,
            pmu_counters,
            aux_count: aux::count(zcr),
        })
    }

    /// ZCR_EL2 that gives vectors of exactly (`vl` + 1) × 128 bits; `None` if the CPU would give others.
    fn sve(&self, vl: u8) -> Option<u64> {
        (vl < 16 && self.sve_lengths >> vl & 1 != 0).then_some(u64::from(vl))
    }

    /// The number of event counters, if a Realm can have so many.
    fn pmu(&self, counters: u8) -> Option<u64> {
        let counters = u64::from(counters);
        let most = self.pmu_counters?;
        (counters <= most && (counters != 0 || self.hpmn0)).then_some(counters)
    }
}

/// The checked, derived part of a Realm's parameters.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RealmShape {
    pub(crate) ipa_width: u64,
    pub(crate) start_level: Level,
    pub(crate) rtt_base: u64,
    pub(crate) rtt_end: u64,
    pub(crate) tables: u64,
    pub(crate) format: Format,
    pub(crate) hash: HashAlgorithm,
    pub(crate) vtcr: u64,
    pub(crate) aux_count: u64,
    /// ZCR_EL2 for a Realm with SVE.
    pub(crate) zcr: Option<u64>,
    /// Event counters for a Realm with PMU.
    pub(crate) pmu_counters: Option<u64>,
}

/// How many concatenated start tables an IPA space of `width` bits needs at `level`; `None` if the architecture
/// does not allow the pair.
fn start_tables(width: u64, level: Level, pa_bits: u64, lpa2: bool) -> Option<u64> {
    if level == Level::L0 && pa_bits < 44 {
        return None;
    }
    // One table, and the most that may be concatenated in bits: none at level −1, at level 0 with LPA2 only.
    let (one, more) = match level {
        Level::Minus1 => (MAX_LPA2_BITS, 0),
        Level::L0 if !lpa2 => (MAX_ADDRESS_BITS, 0),
        Level::L0 => (MAX_ADDRESS_BITS, 4),
        Level::L1 => (39, 4),
        Level::L2 => (30, 4),
        Level::L3 => (21, 4),
    };
    // An address space that fits in one entry begins a level further down.
    let least = u64::from(level.span_shift());
    if width <= least || width > one.wrapping_add(more) {
        return None;
    }
    Some(1u64.wrapping_shl(u32::try_from(width.saturating_sub(one)).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_tables_are_those_of_the_specification() {
        use Level::{L0, L1, L2, L3, Minus1};
        // The whole table: every width that is accepted at a level, with its number of tables.
        let accepted = |level: Level, lpa2: bool| {
            (0..=64).filter_map(move |width| Some((width, start_tables(width, level, 52, lpa2)?)))
        };
        let expected = |from: u64, one: u64, to: u64| {
            (from..=to).map(move |width| (width, 1u64 << width.saturating_sub(one)))
        };
        assert!(accepted(Minus1, true).eq(expected(49, 52, 52)));
        assert!(accepted(L0, true).eq(expected(40, 48, 52)));
        for lpa2 in [false, true] {
            assert!(accepted(L1, lpa2).eq(expected(31, 39, 43)));
            assert!(accepted(L2, lpa2).eq(expected(22, 30, 34)));
            assert!(accepted(L3, lpa2).eq(expected(13, 21, 25)));
        }
        assert!(accepted(L0, false).eq(expected(40, 48, 48)));
        assert_eq!(start_tables(40, L0, 42, true), None, "level 0 needs 44 bits of physical address");
    }

    #[test]
    fn lpa2_is_what_stage_2_says_or_stage_1_where_it_is_silent() {
        for (tgran4, tgran4_2, expected) in [
            (1u64, 3u64, true),
            (0, 3, true),
            (1, 2, false),
            (1, 1, false),
            (1, 0, true),
            (0, 0, false),
            (15, 0, false),
        ] {
            let mut facts = crate::test_platform::facts();
            facts.id.id_aa64mmfr0 = 6 | tgran4 << 28 | tgran4_2 << 40;
            let config = Config::new(&facts).unwrap();
            assert_eq!(config.lpa2, expected, "{tgran4} {tgran4_2}");
            assert_eq!(config.s2sz(), if expected { 52 } else { 48 });
        }
    }

    #[test]
    fn fields_are_cut_out() {
        assert_eq!(field(0xABCD, 4, 8), 0xBC);
        assert_eq!(field(u64::MAX, 60, 4), 0xF);
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
