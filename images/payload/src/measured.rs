//! The Realm Initial Measurement that a history should have, by a hash that shares nothing with the RMM's: the RMM
//! hashes with the CPU's instructions.

use cca_abi::rmi::HashAlgorithm;
use sha2::{Digest, Sha256, Sha512};

/// A measurement as RSI_MEASUREMENT_READ gives it.
pub(crate) type Words = [u64; 8];

/// The measurement so far.
pub(crate) struct Rim {
    algorithm: HashAlgorithm,
    pub(crate) value: Words,
}

fn hash<D: Digest>(count: usize, word: impl Fn(usize) -> u64) -> Words {
    let mut digest = D::new();
    for n in 0..count {
        digest.update(word(n).to_le_bytes());
    }
    let mut value = Words::default();
    for (to, bytes) in value.iter_mut().zip(digest.finalize().chunks(8)) {
        *to = bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    }
    value
}

impl Rim {
    /// Of a Realm whose parameters have these words.
    pub(crate) fn new(algorithm: HashAlgorithm, params: impl Fn(usize) -> u64) -> Self {
        let mut rim = Self { algorithm, value: [0; 8] };
        // What is not measured comes behind the hash algorithm.
        rim.value = rim.hash(512, |n| if n <= 0x30 / 8 { params(n) } else { 0 });
        rim
    }

    fn hash(&self, count: usize, word: impl Fn(usize) -> u64) -> Words {
        match self.algorithm {
            HashAlgorithm::Sha256 => hash::<Sha256>(count, word),
            HashAlgorithm::Sha512 => hash::<Sha512>(count, word),
        }
    }

    fn extend(&mut self, kind: u64, first: u64, second: u64, content: Words) {
        let value = self.value;
        self.value = self.hash(32, |n| match n {
            0 => kind,
            1 => 0x100,
            2..10 => value[n - 2],
            10 => first,
            11 => second,
            12..20 => content[n - 12],
            _ => 0,
        });
    }

    /// A page became RAM.
    pub(crate) fn ripas(&mut self, base: u64) {
        self.extend(2, base, base + 0x1000, [0; 8]);
    }

    /// A page got contents, which are measured or not.
    pub(crate) fn data(&mut self, ipa: u64, words: Option<impl Fn(usize) -> u64>) {
        let measured = words.is_some();
        let content = words.map_or([0; 8], |words| self.hash(512, words));
        self.extend(0, ipa, measured.into(), content);
    }

    /// A runnable REC with this program counter and no registers.
    pub(crate) fn rec(&mut self, pc: u64) {
        let content = self.hash(512, |n| match n {
            0 => 1,
            0x40 => pc,
            _ => 0,
        });
        // Here the content follows the old measurement.
        let [first, second, rest @ ..] = content;
        let mut words = [0; 8];
        words[..6].copy_from_slice(&rest);
        self.extend(1, first, second, words);
    }
}
