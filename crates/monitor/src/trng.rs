//! The true random number generator of SMCCC, version 1.0, over the CPU's entropy source.
//!
//! Every 64 bits come from a reseeded RNDR, which the architecture calls full entropy. A source that sticks is
//! found by a repetition count over all CPUs: two equal samples in a row happen once in 2^64 by chance, so from then
//! on there is no entropy any more.

use cca_abi::smccc::{NOT_SUPPORTED, trng};

use crate::platform::{Platform, Regs};
use crate::sync::{AtomicBool, AtomicU64, Ordering};

const UUID: u128 = 0x6b76_6d2d_7265_4c6d_a06c_6d21_7472_6e67;

#[derive(Debug)]
pub(crate) struct Trng {
    present: bool,
    failed: AtomicBool,
    last: AtomicU64,
}

impl Trng {
    pub(crate) fn new(present: bool) -> Self {
        Self { present, failed: AtomicBool::new(false), last: AtomicU64::new(0) }
    }

    fn sample(&self, platform: &impl Platform) -> Option<u64> {
        let sample = platform.random()?;
        if self.last.swap(sample, Ordering::AcqRel) == sample {
            self.failed.store(true, Ordering::Release);
        }
        (!self.failed.load(Ordering::Acquire)).then_some(sample)
    }

    /// Whether a function of this service exists; all of its functions are mandatory.
    pub(crate) fn has(&self, function: u64) -> bool {
        let known = [trng::VERSION, trng::FEATURES, trng::GET_UUID, trng::RND_32, trng::RND_64];
        self.present && known.contains(&function)
    }

    /// Handles a call that [`Trng::has`] knows.
    pub(crate) fn call(&self, platform: &impl Platform, function: u64, regs: &mut Regs) {
        match function {
            trng::VERSION => regs[0] = trng::VERSION_1_0,
            trng::FEATURES => regs[0] = if self.has(regs[1] & 0xFFFF_FFFF) { 0 } else { NOT_SUPPORTED },
            trng::GET_UUID => {
                for (i, register) in regs.iter_mut().take(4).enumerate() {
                    // Four words, the first one lowest; each in the byte order of the text.
                    let [.., a, b, c, d] = (UUID >> (96 - 32 * i)).to_be_bytes();
                    *register = u64::from(u32::from_le_bytes([a, b, c, d]));
                }
            }
            trng::RND_32 => self.random(platform, regs, regs[1] & 0xFFFF_FFFF, trng::MAX_BITS_32),
            _ => self.random(platform, regs, regs[1], trng::MAX_BITS_64),
        }
    }

    /// `wanted` bits in x3, x2, x1, the lowest in x3; the rest of them zero.
    fn random(&self, platform: &impl Platform, regs: &mut Regs, wanted: u64, max: u64) {
        let width = max / 3;
        let mut words = [0; 3];
        let mut status = 0;
        if wanted == 0 || wanted > max {
            status = trng::INVALID_PARAMETERS;
        } else {
            for (word, first) in words.iter_mut().zip((0..3).map(|i| i * width)) {
                let bits = wanted.saturating_sub(first).min(width);
                if bits == 0 {
                    break;
                }
                match self.sample(platform) {
                    Some(sample) => *word = sample >> (64 - bits),
                    None => status = trng::NO_ENTROPY,
                }
            }
        }
        if status != 0 {
            words = [0; 3];
        }
        (regs[0], regs[1], regs[2], regs[3]) = (status, words[2], words[1], words[0]);
    }
}
