//! The group of P-384, as much as a signature needs: multiples of the generator and inverses, in slices whose
//! state is a few words. Field and scalar arithmetic are those of the `p384` crate; what is here is the order in
//! which they are called, because that crate computes a product in one go and shows no projective coordinates.
//!
//! Nothing here branches on, or is indexed by, a secret.

use p384::elliptic_curve::ff::PrimeField;
use p384::elliptic_curve::subtle::{Choice, ConditionallySelectable, ConstantTimeEq};
use p384::{FieldBytes, FieldElement, NistP384};
use primeorder::PrimeCurveParams;

/// Bits of a scalar, in [`ROWS`] rows of [`COLUMNS`].
const ROWS: usize = 4;
/// Steps of one multiplication: a doubling and an addition each.
pub(super) const COLUMNS: usize = 96;

/// A point (X : Y : Z); the neutral one is (0 : 1 : 0).
#[derive(Clone, Copy)]
pub(super) struct Point {
    pub(super) x: FieldElement,
    pub(super) y: FieldElement,
    pub(super) z: FieldElement,
}

fn triple(value: FieldElement) -> FieldElement {
    value.double() + value
}

impl Point {
    pub(super) const NEUTRAL: Self =
        Self { x: FieldElement::ZERO, y: FieldElement::ONE, z: FieldElement::ZERO };

    fn generator() -> Self {
        let (x, y) = NistP384::GENERATOR;
        Self { x, y, z: FieldElement::ONE }
    }

    /// The sum, for all pairs of points alike (Renes, Costello, Batina 2015, with a = -3).
    fn add(&self, other: &Self) -> Self {
        let b = NistP384::EQUATION_B;
        let (xx, yy, zz) = (self.x * other.x, self.y * other.y, self.z * other.z);
        let xy = (self.x + self.y) * (other.x + other.y) - xx - yy;
        let yz = (self.y + self.z) * (other.y + other.z) - yy - zz;
        let xz = (self.x + self.z) * (other.x + other.z) - xx - zz;
        let u = triple(xz - b * zz);
        let v = triple(b * xz - xx - triple(zz));
        let w = triple(xx - zz);
        Self { x: xy * (yy + u) - yz * v, y: w * v + (yy - u) * (yy + u), z: yz * (yy - u) + xy * w }
    }

    /// The sum with itself.
    fn double(&self) -> Self {
        let b = NistP384::EQUATION_B;
        let (xx, yy, zz) = (self.x.square(), self.y.square(), self.z.square());
        let xy = (self.x * self.y).double();
        let yz = (self.y * self.z).double();
        let xz = (self.x * self.z).double();
        let u = triple(xz - b * zz);
        let v = triple(b * xz - xx - triple(zz));
        let w = triple(xx - zz);
        Self { x: xy * (yy + u) - yz * v, y: w * v + (yy - u) * (yy + u), z: (yz * yy).double().double() }
    }

    fn select(a: &Self, b: &Self, choice: Choice) -> Self {
        Self {
            x: FieldElement::conditional_select(&a.x, &b.x, choice),
            y: FieldElement::conditional_select(&a.y, &b.y, choice),
            z: FieldElement::conditional_select(&a.z, &b.z, choice),
        }
    }
}

/// Sums of the generator's multiples by 2^0, 2^96, 2^192 and 2^288: entry `n` has those whose bit is set in `n`.
/// 2 KiB that are computed once.
pub struct Comb([Point; 1 << ROWS]);

impl Comb {
    /// A table that is not filled yet.
    pub const EMPTY: Self = Self([Point::NEUTRAL; 1 << ROWS]);

    /// Computes the table, in its place.
    pub(super) fn fill(&mut self) {
        let mut multiple = Point::generator();
        for row in 0..ROWS {
            if let Some((lower, upper)) = self.0.split_at_mut_checked(1 << row) {
                for (to, from) in upper.iter_mut().zip(lower) {
                    *to = from.add(&multiple);
                }
            }
            for _ in 0..COLUMNS {
                multiple = multiple.double();
            }
        }
    }

    /// Step `column` (0 to [`COLUMNS`] - 1, ascending) of multiplying the generator by `scalar`, big-endian.
    /// The first step starts from the neutral point; the product is there after the last.
    pub(super) fn step(&self, sum: &Point, scalar: &FieldBytes, column: usize) -> Point {
        let mut index = 0u8;
        // From the most significant row to the least.
        for row in scalar.chunks_exact(COLUMNS / 8) {
            let byte = row.get(column / 8).copied().unwrap_or(0);
            index = index << 1 | byte << (column % 8) >> 7;
        }
        let mut term = Point::NEUTRAL;
        for (n, entry) in (0..1 << ROWS).zip(&self.0) {
            term = Point::select(&term, entry, n.ct_eq(&index));
        }
        sum.double().add(&term)
    }
}

/// Steps of one inversion.
pub(super) const INVERSION_STEPS: usize = 6;
/// Bytes of the exponent in each of them, two windows of four bits each.
const STEP_BYTES: usize = 48 / INVERSION_STEPS;

/// The modulus of `F` less two, big-endian: the exponent that inverts.
pub(super) fn inverting_exponent<F: PrimeField<Repr = FieldBytes>>() -> FieldBytes {
    // -2, which is the modulus less two.
    (-F::ONE - F::ONE).to_repr()
}

/// Step `step` (ascending) of raising `base` to the power of `exponent`, which is public. The first step starts
/// from one.
pub(super) fn power_step<F: PrimeField<Repr = FieldBytes>>(
    power: F,
    base: F,
    exponent: &FieldBytes,
    step: usize,
) -> F {
    let mut multiples = [F::ONE; 16];
    let mut last = F::ONE;
    for multiple in multiples.iter_mut().skip(1) {
        last *= base;
        *multiple = last;
    }
    let mut power = power;
    for byte in exponent.chunks_exact(STEP_BYTES).nth(step).unwrap_or_default() {
        for digit in [byte >> 4, byte & 15] {
            power = power.square().square().square().square() * multiples[usize::from(digit & 15)];
        }
    }
    power
}

#[cfg(test)]
mod tests {
    use super::*;
    use p384::elliptic_curve::ff::Field;
    use p384::elliptic_curve::sec1::ToEncodedPoint;
    use p384::{ProjectivePoint, Scalar};

    fn invert<F: PrimeField<Repr = FieldBytes>>(value: F) -> F {
        (0..INVERSION_STEPS)
            .fold(F::ONE, |power, step| power_step(power, value, &inverting_exponent::<F>(), step))
    }

    #[test]
    fn inverses_are_those_of_the_crate() {
        for n in [1u64, 2, 3, 0xFFFF_FFFF_FFFF_FFFF] {
            let (field, scalar) = (FieldElement::from_u64(n), Scalar::from(n));
            assert_eq!(invert(field), Field::invert(&field).unwrap());
            assert_eq!(invert(scalar), Field::invert(&scalar).unwrap());
        }
    }

    #[test]
    fn multiples_of_the_generator_are_those_of_the_crate() {
        let mut comb = Comb::EMPTY;
        comb.fill();
        let mut scalar = Scalar::from(1u64);
        for n in 0..40 {
            let bytes = scalar.to_repr();
            let product = (0..COLUMNS).fold(Point::NEUTRAL, |sum, at| comb.step(&sum, &bytes, at));
            let inverse = invert(product.z);
            let expected = (ProjectivePoint::GENERATOR * scalar).to_affine().to_encoded_point(false);
            assert_eq!((product.x * inverse).to_bytes().as_slice(), expected.x().unwrap().as_slice());
            assert_eq!((product.y * inverse).to_bytes().as_slice(), expected.y().unwrap().as_slice());
            // 1, then -1, then numbers without a pattern.
            scalar = if n == 0 { -scalar } else { scalar.square() + Scalar::from(7u64) };
        }
    }

    #[test]
    fn zero_times_the_generator_is_the_neutral_point() {
        let mut comb = Comb::EMPTY;
        comb.fill();
        let zero = FieldBytes::default();
        let product = (0..COLUMNS).fold(Point::NEUTRAL, |sum, at| comb.step(&sum, &zero, at));
        assert!(bool::from(product.z.is_zero()));
    }
}
