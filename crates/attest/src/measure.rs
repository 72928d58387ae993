//! Predicts the Realm Initial Measurement from what a host does before it activates a Realm (DEN0137 chapter A6):
//! the same calls in the same order give the same value, without anything being booted.
//!
//! The measurement depends on the shape of the translation tables: every entry that RTT_INIT_RIPAS changes is
//! measured. [`Rim::init_ripas`] goes the way of Linux and of this project's host side: the largest entries that fit.

use cca_abi::rmi::{DATA_MEASURE_CONTENT, HashAlgorithm, REC_RUNNABLE, RealmParams, RecParams, entry_span};
use sha2::{Digest, Sha256, Sha512};
use zerocopy::{FromZeros as _, IntoBytes as _};

/// A measurement: 64 bytes, of which SHA-256 uses the first 32.
pub type Measurement = [u8; 64];

/// The level of page entries.
const PAGE_LEVEL: i64 = 3;
/// The first level that any Realm has.
const FIRST_LEVEL: i64 = -1;
const PAGE: u64 = 4096;

const DATA: u8 = 0;
const REC: u8 = 1;
const RIPAS: u8 = 2;

/// A descriptor's fields behind its head and the old measurement.
const FIELDS: usize = 0x50;

/// A measurement that grows call by call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rim {
    algorithm: HashAlgorithm,
    value: Measurement,
}

impl Rim {
    /// RMI_REALM_CREATE. Of the parameters only those are used that are measured.
    #[must_use]
    pub fn create(params: &RealmParams) -> Option<Self> {
        let algorithm = HashAlgorithm::try_from(params.hash_algo).ok()?;
        let mut measured = RealmParams::new_zeroed();
        measured.flags = params.flags;
        measured.s2sz = params.s2sz;
        measured.sve_vl = params.sve_vl;
        measured.num_bps = params.num_bps;
        measured.num_wps = params.num_wps;
        measured.pmu_num_ctrs = params.pmu_num_ctrs;
        measured.hash_algo = params.hash_algo;
        Some(Self { algorithm, value: hash(algorithm, measured.as_bytes()) })
    }

    /// The measurement: 32 or 64 bytes.
    #[must_use]
    pub fn value(&self) -> &[u8] {
        &self.value[..self.algorithm.digest_len()]
    }

    /// The hash that [`Self::data`] takes, of a page.
    #[must_use]
    pub fn page_digest(&self, page: &[u8; 4096]) -> Measurement {
        hash(self.algorithm, page)
    }

    fn extend(&mut self, kind: u8, fill: impl FnOnce(&mut [u8])) {
        let mut descriptor = [0; 256];
        descriptor[0] = kind;
        descriptor[0x8..0x10].copy_from_slice(&256u64.to_le_bytes());
        descriptor[0x10..FIELDS].copy_from_slice(&self.value);
        fill(&mut descriptor[FIELDS..]);
        self.value = hash(self.algorithm, &descriptor);
    }

    /// RMI_RTT_INIT_RIPAS of one entry at `level`.
    pub fn init_ripas_entry(&mut self, base: u64, level: i64) {
        let top = base.wrapping_add(entry_span(level));
        self.extend(RIPAS, |fields| {
            fields[..8].copy_from_slice(&base.to_le_bytes());
            fields[8..16].copy_from_slice(&top.to_le_bytes());
        });
    }

    /// RMI_RTT_INIT_RIPAS of a range whose tables do not exist yet, in the largest entries that fit, in a Realm whose
    /// tables start at `start_level`. `None` if the range is not made of pages.
    #[must_use]
    pub fn init_ripas(&mut self, base: u64, top: u64, start_level: i64) -> Option<()> {
        if base % PAGE != 0 || top % PAGE != 0 || base > top {
            return None;
        }
        let mut at = base;
        while at < top {
            let fits = |level: &i64| at % entry_span(*level) == 0 && top - at >= entry_span(*level);
            let level = (start_level.max(FIRST_LEVEL)..=PAGE_LEVEL).find(fits)?;
            self.init_ripas_entry(at, level);
            at += entry_span(level);
        }
        Some(())
    }

    /// RMI_DATA_CREATE of a page, with the hash of its contents if they are measured.
    pub fn data(&mut self, ipa: u64, content: Option<&Measurement>) {
        let flags = if content.is_some() { DATA_MEASURE_CONTENT } else { 0 };
        self.extend(DATA, |fields| {
            fields[..8].copy_from_slice(&ipa.to_le_bytes());
            fields[8..16].copy_from_slice(&flags.to_le_bytes());
            fields[16..80].copy_from_slice(content.unwrap_or(&[0; 64]));
        });
    }

    /// RMI_REC_CREATE of a runnable REC. Others are not measured.
    pub fn rec(&mut self, pc: u64, gprs: &[u64; 8]) {
        let mut measured = RecParams::new_zeroed();
        measured.flags = REC_RUNNABLE;
        measured.pc = pc;
        measured.gprs = *gprs;
        let content = hash(self.algorithm, measured.as_bytes());
        self.extend(REC, |fields| fields[..64].copy_from_slice(&content));
    }
}

/// SHA-256: what a platform's software is measured with.
#[must_use]
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

fn hash(algorithm: HashAlgorithm, bytes: &[u8]) -> Measurement {
    let mut out = [0; 64];
    match algorithm {
        HashAlgorithm::Sha256 => out[..32].copy_from_slice(&Sha256::digest(bytes)),
        HashAlgorithm::Sha512 => out.copy_from_slice(&Sha512::digest(bytes)),
    }
    out
}
