//! Measurement: the hash, the three RIM descriptors, and the extension of REMs (specification section on
//! Realm measurement).

use cca_abi::rmi::{HashAlgorithm, RealmParams, RecParams};
use sha2::digest::generic_array::GenericArray;
use zerocopy::{FromBytes, IntoBytes};

use crate::platform::{Page, Platform};
use core::sync::atomic::Ordering::Relaxed;

/// A measurement register: 64 bytes as words, byte 0 lowest. A SHA-256 value occupies the first four words.
pub(crate) type Measurement = [u64; 8];

const _: () = assert!(cfg!(target_endian = "little"), "structures are laid out little-endian");

const SHA256_INIT: [u32; 8] =
    [0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19];
const SHA512_INIT: [u64; 8] = [
    0x6a09e667f3bcc908,
    0xbb67ae8584caa73b,
    0x3c6ef372fe94f82b,
    0xa54ff53a5f1d36f1,
    0x510e527fade682d1,
    0x9b05688c2b3e6c1f,
    0x1f83d9abfb41bd6b,
    0x5be0cd19137e2179,
];

/// Messages up to this length, all descriptors among them, are padded in a copy and hashed by one call.
const SHORT: usize = 256;

const DESC_DATA: u64 = 0;
const DESC_REC: u64 = 1;
const DESC_RIPAS: u64 = 2;
const DESC_LEN: u64 = 0x100;

/// Computes measurements with what the platform offers.
pub(crate) struct Hasher<'p, P> {
    platform: &'p P,
    algorithm: HashAlgorithm,
}

impl<'p, P: Platform> Hasher<'p, P> {
    pub(crate) fn new(platform: &'p P, algorithm: HashAlgorithm) -> Self {
        Self { platform, algorithm }
    }

    /// The hash of some bytes, at most a granule of them.
    pub(crate) fn bytes(&self, bytes: &[u8]) -> Measurement {
        let mut hash = Hash::new(self.algorithm);
        // Whole blocks of both kinds.
        let whole = if bytes.len() <= SHORT { 0 } else { bytes.len() & !127 };
        let (blocks, rest) = bytes.split_at_checked(whole).unwrap_or_default();
        hash.compress(self.platform, blocks);
        hash.finish(self.platform, rest, bytes.len())
    }

    /// The hash of the RMM's granule at `pa`.
    pub(crate) fn granule(&self, pa: u64) -> Measurement {
        let mut hash = Hash::new(self.algorithm);
        hash.granule(self.platform, pa);
        hash.finish(self.platform, &[], 4096)
    }

    /// The initial RIM: the hash of the measured part of the parameters, values as the host gave them. What is not
    /// measured is cleared.
    pub(crate) fn rim_init(&self, params: &mut RealmParams) -> Measurement {
        let (flags, s2sz, sve_vl) = (params.flags, params.s2sz, params.sve_vl);
        let (num_bps, num_wps) = (params.num_bps, params.num_wps);
        let (pmu_num_ctrs, hash_algo) = (params.pmu_num_ctrs, params.hash_algo);
        params.as_mut_bytes().fill(0);
        params.flags = flags;
        params.s2sz = s2sz;
        params.sve_vl = sve_vl;
        params.num_bps = num_bps;
        params.num_wps = num_wps;
        params.pmu_num_ctrs = pmu_num_ctrs;
        params.hash_algo = hash_algo;
        self.bytes(params.as_bytes())
    }

    /// The RIM after DATA_CREATE; `content` is zero if the host did not ask to measure it.
    pub(crate) fn rim_data(
        &self,
        rim: &Measurement,
        ipa: u64,
        flags: u64,
        content: &Measurement,
    ) -> Measurement {
        let mut descriptor = descriptor(DESC_DATA, rim);
        descriptor[10] = ipa;
        descriptor[11] = flags;
        descriptor[12..20].copy_from_slice(content);
        self.bytes(descriptor.as_bytes())
    }

    /// The RIM after REC_CREATE of a runnable REC. What is not measured of its parameters is cleared.
    pub(crate) fn rim_rec(&self, rim: &Measurement, params: &mut RecParams) -> Measurement {
        let (flags, pc, gprs) = (params.flags, params.pc, params.gprs);
        params.as_mut_bytes().fill(0);
        params.flags = flags;
        params.pc = pc;
        params.gprs = gprs;
        let mut descriptor = descriptor(DESC_REC, rim);
        descriptor[10..18].copy_from_slice(&self.bytes(params.as_bytes()));
        self.bytes(descriptor.as_bytes())
    }

    /// The RIM after one entry's RIPAS became RAM by RTT_INIT_RIPAS.
    pub(crate) fn rim_ripas(&self, rim: &Measurement, base: u64, top: u64) -> Measurement {
        let mut descriptor = descriptor(DESC_RIPAS, rim);
        descriptor[10] = base;
        descriptor[11] = top;
        self.bytes(descriptor.as_bytes())
    }

    /// A REM extended by the first `size` (at most 64) bytes of `value`.
    pub(crate) fn rem_extend(&self, old: &Measurement, value: &Measurement, size: usize) -> Measurement {
        let old = old.as_bytes().get(..self.algorithm.digest_len()).unwrap_or_default();
        let value = value.as_bytes().get(..size).unwrap_or_default();
        let mut message = [0u8; 128];
        let length = old.len().wrapping_add(value.len());
        for (to, from) in message.iter_mut().zip(old.iter().chain(value)) {
            *to = *from;
        }
        self.bytes(message.get(..length).unwrap_or_default())
    }
}

fn descriptor(kind: u64, rim: &Measurement) -> [u64; 32] {
    let mut descriptor = [0u64; 32];
    descriptor[0] = kind;
    descriptor[1] = DESC_LEN;
    descriptor[2..10].copy_from_slice(rim);
    descriptor
}

/// A hash in the making.
enum Hash {
    Sha256([u32; 8]),
    Sha512([u64; 8]),
}

impl Hash {
    fn new(algorithm: HashAlgorithm) -> Self {
        match algorithm {
            HashAlgorithm::Sha256 => Self::Sha256(SHA256_INIT),
            HashAlgorithm::Sha512 => Self::Sha512(SHA512_INIT),
        }
    }

    /// Bytes in a block.
    fn block(&self) -> usize {
        match self {
            Self::Sha256(_) => 64,
            Self::Sha512(_) => 128,
        }
    }

    /// Folds whole blocks, in one call of the platform: each has a price.
    fn compress<P: Platform>(&mut self, platform: &P, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        match self {
            Self::Sha256(state) => {
                let blocks = <[[u8; 64]]>::ref_from_bytes(bytes).unwrap_or_default();
                if !platform.sha256_blocks(state, blocks) {
                    for block in blocks {
                        sha2::compress256(state, &[GenericArray::from(*block)]);
                    }
                }
            }
            Self::Sha512(state) => {
                let blocks = <[[u8; 128]]>::ref_from_bytes(bytes).unwrap_or_default();
                if !platform.sha512_blocks(state, blocks) {
                    for block in blocks {
                        sha2::compress512(state, &[GenericArray::from(*block)]);
                    }
                }
            }
        }
    }

    /// Folds the RMM's granule at `pa`.
    fn granule<P: Platform>(&mut self, platform: &P, pa: u64) {
        let done = match self {
            Self::Sha256(state) => platform.sha256_granule(state, pa),
            Self::Sha512(state) => platform.sha512_granule(state, pa),
        };
        if done {
            return;
        }
        let page: &Page = platform.granule(pa);
        for words in page.chunks_exact(16) {
            let mut block = [0u64; 16];
            for (to, from) in block.iter_mut().zip(words) {
                *to = from.load(Relaxed);
            }
            match self {
                Self::Sha256(state) => {
                    for half in block.as_bytes().chunks_exact(64) {
                        sha2::compress256(state, &[*GenericArray::from_slice(half)]);
                    }
                }
                Self::Sha512(state) => {
                    sha2::compress512(state, &[*GenericArray::from_slice(block.as_bytes())]);
                }
            }
        }
    }

    /// Pads and finishes: `rest`, at most [`SHORT`] bytes, is what is left of a message of `length` bytes.
    fn finish<P: Platform>(mut self, platform: &P, rest: &[u8], length: usize) -> Measurement {
        let mut padded = [0u8; SHORT + 128];
        // A one bit, and the length in an eighth of a block.
        let block = self.block();
        let end = rest.len().wrapping_add(1 + block / 8).div_ceil(block).wrapping_mul(block);
        if let Some(message) = padded.get_mut(..end) {
            if let Some((start, padding)) = message.split_at_mut_checked(rest.len()) {
                start.copy_from_slice(rest);
                if let Some(mark) = padding.first_mut() {
                    *mark = 0x80;
                }
            }
            // Messages here are at most a granule long.
            if let Some(bits) = message.last_chunk_mut() {
                *bits = (length as u64).wrapping_mul(8).to_be_bytes();
            }
            self.compress(platform, message);
        }
        let mut out = Measurement::default();
        match self {
            Self::Sha256(state) => {
                for (bytes, word) in out.as_mut_bytes().chunks_exact_mut(4).zip(state) {
                    bytes.copy_from_slice(&word.to_be_bytes());
                }
            }
            Self::Sha512(state) => out = state.map(u64::swap_bytes),
        }
        out
    }
}
