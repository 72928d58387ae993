//! ES384 in slices. A signature takes millions of instructions; one slice takes some ten thousand, and everything
//! that one leaves for the next is in a few words of memory that the caller provides.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use p384::elliptic_curve::Curve;
use p384::elliptic_curve::bigint::ArrayEncoding;
use p384::elliptic_curve::ff::PrimeField;
use p384::elliptic_curve::ops::Reduce;
use p384::{FieldBytes, FieldElement, NistP384, NonZeroScalar, Scalar, U384};
use sha2::Sha384;

use super::curve::{COLUMNS, Comb, INVERSION_STEPS, Point, inverting_exponent, power_step};
use super::token::{Key, cose_key};

/// Words of a number.
const NUMBER: usize = 6;
/// r and s, big-endian bytes.
pub(super) type Signature = [u64; 2 * NUMBER];
/// A SHA-384 value.
pub(super) type Digest = FieldBytes;

/// Words of a signature in the making.
mod word {
    use super::NUMBER;
    pub(super) const PHASE: usize = 0;
    pub(super) const STEP: usize = 1;
    /// The message's hash.
    pub(super) const DIGEST: usize = 2;
    /// The secret number k.
    pub(super) const NONCE: usize = DIGEST + NUMBER;
    /// A sum of points, or a power.
    pub(super) const X: usize = NONCE + NUMBER;
    pub(super) const Y: usize = X + NUMBER;
    pub(super) const Z: usize = Y + NUMBER;
    pub(super) const R: usize = Z + NUMBER;
    pub(super) const S: usize = R + NUMBER;
    pub(super) const END: usize = S + NUMBER;
}

/// Words that a signature needs while it is made.
pub(super) const WORDS: usize = word::END;

/// Doublings and additions in one slice.
const COLUMNS_PER_SLICE: usize = 4;

/// What the next slice does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
enum Phase {
    /// Nothing has been done.
    New = 0,
    /// k times the generator.
    Multiply = 1,
    /// 1 / Z, for the product's x.
    InvertZ = 2,
    /// 1 / k.
    InvertNonce = 3,
    /// R and S are the signature.
    Done = 4,
}

/// A signature in the making.
pub(super) struct Progress<'a> {
    words: &'a [AtomicU64; WORDS],
}

impl<'a> Progress<'a> {
    /// The one in `words`, which have been zero at first.
    pub(super) fn new(words: &'a [AtomicU64; WORDS]) -> Self {
        Self { words }
    }

    fn phase(&self) -> Phase {
        match self.words[word::PHASE].load(Relaxed) {
            0 => Phase::New,
            1 => Phase::Multiply,
            2 => Phase::InvertZ,
            3 => Phase::InvertNonce,
            _ => Phase::Done,
        }
    }

    /// Goes on with the first step of `phase`.
    fn start(&self, phase: Phase) {
        self.words[word::PHASE].store(phase as u64, Relaxed);
        self.words[word::STEP].store(0, Relaxed);
    }

    /// Takes `count` steps: the first one's number, and whether they are the last of `all`.
    fn advance(&self, count: usize, all: usize) -> (usize, bool) {
        let step = self.words[word::STEP].load(Relaxed);
        let next = step.wrapping_add(count as u64);
        self.words[word::STEP].store(next, Relaxed);
        (usize::try_from(step).unwrap_or(all), next >= all as u64)
    }

    /// The words from `at` on.
    fn words(&self, at: usize) -> &[AtomicU64] {
        self.words.get(at..).unwrap_or_default()
    }

    fn bytes(&self, at: usize) -> FieldBytes {
        let mut bytes = FieldBytes::default();
        for (to, word) in bytes.chunks_exact_mut(8).zip(self.words(at)) {
            for (to, byte) in to.iter_mut().zip(word.load(Relaxed).to_le_bytes()) {
                *to = byte;
            }
        }
        bytes
    }

    fn set_bytes(&self, at: usize, bytes: &FieldBytes) {
        for (from, word) in bytes.chunks_exact(8).zip(self.words(at)) {
            word.store(from.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)), Relaxed);
        }
    }

    fn number<F: PrimeField<Repr = FieldBytes>>(&self, at: usize) -> F {
        // Always a number that `set_number` has stored.
        Option::from(F::from_repr(self.bytes(at))).unwrap_or(F::ZERO)
    }

    fn set_number<F: PrimeField<Repr = FieldBytes>>(&self, at: usize, number: F) {
        self.set_bytes(at, &number.to_repr());
    }

    fn point(&self) -> Point {
        Point { x: self.number(word::X), y: self.number(word::Y), z: self.number(word::Z) }
    }

    fn set_point(&self, point: &Point) {
        self.set_number(word::X, point.x);
        self.set_number(word::Y, point.y);
        self.set_number(word::Z, point.z);
    }

    /// The signature, if it is there.
    pub(super) fn signature(&self) -> Option<Signature> {
        let mut signature = Signature::default();
        for (to, word) in signature.iter_mut().zip(self.words(word::R)) {
            *to = word.load(Relaxed);
        }
        (self.phase() == Phase::Done).then_some(signature)
    }

    /// Forgets everything.
    pub(super) fn wipe(&self) {
        for word in self.words {
            word.store(0, Relaxed);
        }
    }

    /// One step of raising the number at Z, to the power that is at Y; the result when it is there.
    fn invert<F: PrimeField<Repr = FieldBytes>>(&self, base: F) -> Option<F> {
        let (step, last) = self.advance(1, INVERSION_STEPS);
        let power = if step == 0 { F::ONE } else { self.number(word::Y) };
        let power = power_step(power, base, &inverting_exponent::<F>(), step);
        self.set_number(word::Y, power);
        last.then_some(power)
    }
}

/// A key that signs.
pub(super) struct Signer<'m> {
    scalar: Scalar,
    comb: &'m Comb,
    key: Key,
}

impl<'m> Signer<'m> {
    /// The signer of a private key, big-endian, with a table for its use; `None` if it is zero or not below the group's order.
    pub(super) fn new(private_key: &[u8; 48], comb: &'m mut Comb) -> Option<Self> {
        let bytes = FieldBytes::from(*private_key);
        let scalar: NonZeroScalar = Option::from(NonZeroScalar::from_repr(bytes))?;
        comb.fill();
        let point = (0..COLUMNS).fold(Point::NEUTRAL, |sum, at| comb.step(&sum, &bytes, at));
        let exponent = inverting_exponent::<FieldElement>();
        let inverse = (0..INVERSION_STEPS)
            .fold(FieldElement::ONE, |power, step| power_step(power, point.z, &exponent, step));
        let key = cose_key(&(point.x * inverse).to_bytes().into(), &(point.y * inverse).to_bytes().into());
        Some(Self { scalar: *scalar, comb, key })
    }

    /// The public key.
    pub(super) fn key(&self) -> &Key {
        &self.key
    }

    /// One slice of the signature that `progress` is about. `digest` says what is signed; it is asked once.
    pub(super) fn slice(&self, progress: &Progress<'_>, digest: impl FnOnce() -> Digest) {
        match progress.phase() {
            Phase::New => {
                let digest = digest();
                progress.set_bytes(word::DIGEST, &digest);
                let hash = Scalar::reduce_bytes(&digest).to_repr();
                let order = NistP384::ORDER.to_be_byte_array();
                // Nobody can make it repeat for two messages, and no source of randomness can be bad.
                let nonce = rfc6979::generate_k::<Sha384, _>(&self.scalar.to_repr(), &order, &hash, &[]);
                progress.set_bytes(word::NONCE, &nonce);
                progress.set_point(&Point::NEUTRAL);
                progress.start(Phase::Multiply);
            }
            Phase::Multiply => {
                let nonce = progress.bytes(word::NONCE);
                let (first, last) = progress.advance(COLUMNS_PER_SLICE, COLUMNS);
                let sum = (0..COLUMNS_PER_SLICE)
                    .fold(progress.point(), |sum, n| self.comb.step(&sum, &nonce, first.wrapping_add(n)));
                progress.set_point(&sum);
                if last {
                    progress.start(Phase::InvertZ);
                }
            }
            Phase::InvertZ => {
                if let Some(inverse) = progress.invert::<FieldElement>(progress.number(word::Z)) {
                    let x = progress.number::<FieldElement>(word::X) * inverse;
                    // Zero with a probability of 2^-384.
                    let r = <Scalar as Reduce<U384>>::reduce_bytes(&x.to_bytes());
                    progress.set_number(word::R, r);
                    progress.start(Phase::InvertNonce);
                }
            }
            Phase::InvertNonce => {
                if let Some(inverse) = progress.invert::<Scalar>(progress.number(word::NONCE)) {
                    let hash = Scalar::reduce_bytes(&progress.bytes(word::DIGEST));
                    let r = progress.number::<Scalar>(word::R);
                    let s = inverse * (hash + r * self.scalar);
                    let done = (progress.bytes(word::R), s.to_repr());
                    progress.wipe();
                    progress.set_bytes(word::R, &done.0);
                    progress.set_bytes(word::S, &done.1);
                    progress.start(Phase::Done);
                }
            }
            Phase::Done => {}
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use p384::ecdsa::signature::hazmat::PrehashSigner;
    use p384::ecdsa::{Signature as Expected, SigningKey};
    use sha2::Digest as _;
    use zerocopy::IntoBytes;

    #[test]
    fn signatures_are_those_of_the_crate_whatever_is_signed() {
        for n in 0..8u8 {
            let private: [u8; 48] = Sha384::digest([n]).into();
            let mut comb = Comb::EMPTY;
            let signer = Signer::new(&private, &mut comb).unwrap();
            let key = SigningKey::from_slice(&private).unwrap();
            let digest = Sha384::digest([n, 1]);
            let words = [const { AtomicU64::new(0) }; WORDS];
            let progress = Progress::new(&words);
            let mut slices = 0;
            while progress.signature().is_none() {
                signer.slice(&progress, || digest);
                slices += 1;
            }
            let expected: Expected = key.sign_prehash(&digest).unwrap();
            assert_eq!(progress.signature().unwrap().as_bytes(), expected.to_bytes().as_slice());
            assert_eq!(slices, 1 + COLUMNS / COLUMNS_PER_SLICE + 2 * INVERSION_STEPS);
            let public = key.verifying_key().to_encoded_point(false);
            assert_eq!(signer.key()[8..56], public.as_bytes()[1..49]);
            assert_eq!(signer.key()[59..], public.as_bytes()[49..]);
            // Nothing but the signature is left, above all not the nonce.
            assert!(words[word::DIGEST..word::R].iter().all(|word| word.load(Relaxed) == 0));
        }
    }

    #[test]
    fn what_is_no_private_key_is_refused() {
        for bytes in [[0; 48], [0xFF; 48], NistP384::ORDER.to_be_byte_array().into()] {
            let mut comb = Comb::EMPTY;
            assert!(Signer::new(&bytes, &mut comb).is_none());
        }
    }
}
