//! What a CCA token looks like: the CBOR of DEN0137 chapter A7, written piece by piece to wherever it is wanted.
//! Nothing is kept in memory: a token is made again for each window that is read of it.

use cca_abi::rmi::HashAlgorithm;
use zerocopy::IntoBytes;

use super::sign::Signature;
use crate::measurement::Measurement;

/// Bytes of an encoded COSE_Key.
pub(super) const KEY_LEN: usize = 107;
/// A P-384 public key, as COSE_Key.
pub(super) type Key = [u8; KEY_LEN];

const TAG_CCA_TOKEN: u64 = 399;
const TAG_COSE_SIGN1: u64 = 18;
const PLATFORM_TOKEN: u64 = 44234;
const REALM_TOKEN: u64 = 44241;

/// Claims of the Realm token.
mod claim {
    pub(super) const CHALLENGE: u64 = 10;
    pub(super) const PROFILE: u64 = 265;
    pub(super) const PERSONALIZATION_VALUE: u64 = 44235;
    pub(super) const HASH_ALGORITHM: u64 = 44236;
    pub(super) const PUBLIC_KEY: u64 = 44237;
    pub(super) const INITIAL_MEASUREMENT: u64 = 44238;
    pub(super) const EXTENSIBLE_MEASUREMENTS: u64 = 44239;
    pub(super) const PUBLIC_KEY_HASH_ALGORITHM: u64 = 44240;
}

const PROFILE: &str = "tag:arm.com,2023:realm#1.0.0";
/// {1: -35}: the algorithm is ES384.
const PROTECTED_HEADER: [u8; 4] = [0xA1, 0x01, 0x38, 0x22];

/// The COSE_Key of the point (x, y): {1: 2, -1: 2, -2: x, -3: y}.
pub(super) fn cose_key(x: &[u8; 48], y: &[u8; 48]) -> Key {
    let mut key = [0; KEY_LEN];
    key[..8].copy_from_slice(&[0xA4, 0x01, 0x02, 0x20, 0x02, 0x21, 0x58, 0x30]);
    key[8..56].copy_from_slice(x);
    key[56..59].copy_from_slice(&[0x22, 0x58, 0x30]);
    key[59..].copy_from_slice(y);
    key
}

/// Major types of CBOR.
mod major {
    pub(super) const UNSIGNED: u8 = 0;
    pub(super) const BYTES: u8 = 2;
    pub(super) const TEXT: u8 = 3;
    pub(super) const ARRAY: u8 = 4;
    pub(super) const MAP: u8 = 5;
    pub(super) const TAG: u8 = 6;
}

/// Writes CBOR: definite lengths, shortest heads.
struct Cbor<'s>(&'s mut dyn FnMut(&[u8]));

impl Cbor<'_> {
    fn head(&mut self, major: u8, value: u64) {
        let major = major << 5;
        let [a, b, c, d, e, f, g, h] = value.to_be_bytes();
        match value {
            0..24 => (self.0)(&[major | h]),
            24..0x100 => (self.0)(&[major | 24, h]),
            0x100..0x1_0000 => (self.0)(&[major | 25, g, h]),
            0x1_0000..0x1_0000_0000 => (self.0)(&[major | 26, e, f, g, h]),
            _ => (self.0)(&[major | 27, a, b, c, d, e, f, g, h]),
        }
    }

    fn string(&mut self, major: u8, bytes: &[u8]) {
        self.head(major, bytes.len() as u64);
        (self.0)(bytes);
    }

    fn claim(&mut self, label: u64, value: &[u8]) {
        self.head(major::UNSIGNED, label);
        self.string(major::BYTES, value);
    }

    fn text_claim(&mut self, label: u64, value: &str) {
        self.head(major::UNSIGNED, label);
        self.string(major::TEXT, value.as_bytes());
    }
}

/// The bytes of a measurement that its algorithm gives.
fn digest(algorithm: HashAlgorithm, value: &Measurement) -> &[u8] {
    value.as_bytes().get(..algorithm.digest_len()).unwrap_or_default()
}

/// Bytes that `write` writes.
fn length(write: impl FnOnce(&mut dyn FnMut(&[u8]))) -> u64 {
    let mut length = 0u64;
    write(&mut |bytes| length = length.wrapping_add(bytes.len() as u64));
    length
}

/// Everything that a token says.
pub(super) struct Token<'a> {
    pub(super) platform_token: &'a [u8],
    pub(super) key: &'a Key,
    pub(super) algorithm: HashAlgorithm,
    pub(super) challenge: [u64; 8],
    pub(super) rpv: [u64; 8],
    pub(super) rim: Measurement,
    pub(super) rems: [Measurement; 4],
}

impl Token<'_> {
    /// The Realm token's claims.
    fn claims(&self, to: &mut dyn FnMut(&[u8])) {
        let digest = |value| digest(self.algorithm, value);
        let algorithm = match self.algorithm {
            HashAlgorithm::Sha256 => "sha-256",
            HashAlgorithm::Sha512 => "sha-512",
        };
        let mut cbor = Cbor(to);
        cbor.head(major::MAP, 8);
        cbor.claim(claim::CHALLENGE, self.challenge.as_bytes());
        cbor.claim(claim::PERSONALIZATION_VALUE, self.rpv.as_bytes());
        cbor.claim(claim::PUBLIC_KEY, self.key);
        cbor.text_claim(claim::HASH_ALGORITHM, algorithm);
        cbor.text_claim(claim::PUBLIC_KEY_HASH_ALGORITHM, "sha-256");
        cbor.text_claim(claim::PROFILE, PROFILE);
        cbor.claim(claim::INITIAL_MEASUREMENT, digest(&self.rim));
        cbor.head(major::UNSIGNED, claim::EXTENSIBLE_MEASUREMENTS);
        cbor.head(major::ARRAY, self.rems.len() as u64);
        for rem in &self.rems {
            cbor.string(major::BYTES, digest(rem));
        }
    }

    /// What the Realm attestation key signs: COSE's `Sig_structure`.
    pub(super) fn to_be_signed(&self, to: &mut dyn FnMut(&[u8])) {
        let claims = length(|to| self.claims(to));
        let mut cbor = Cbor(to);
        cbor.head(major::ARRAY, 4);
        cbor.string(major::TEXT, b"Signature1");
        cbor.string(major::BYTES, &PROTECTED_HEADER);
        cbor.string(major::BYTES, &[]);
        cbor.head(major::BYTES, claims);
        self.claims(cbor.0);
    }

    /// The Realm token: a COSE_Sign1.
    fn realm_token(&self, signature: &Signature, to: &mut dyn FnMut(&[u8])) {
        let claims = length(|to| self.claims(to));
        let mut cbor = Cbor(to);
        cbor.head(major::TAG, TAG_COSE_SIGN1);
        cbor.head(major::ARRAY, 4);
        cbor.string(major::BYTES, &PROTECTED_HEADER);
        cbor.head(major::MAP, 0);
        cbor.head(major::BYTES, claims);
        self.claims(cbor.0);
        cbor.string(major::BYTES, signature.as_bytes());
    }

    /// The whole token.
    pub(super) fn write(&self, signature: &Signature, to: &mut dyn FnMut(&[u8])) {
        let realm_token = length(|to| self.realm_token(signature, to));
        let mut cbor = Cbor(to);
        cbor.head(major::TAG, TAG_CCA_TOKEN);
        cbor.head(major::MAP, 2);
        cbor.claim(PLATFORM_TOKEN, self.platform_token);
        cbor.head(major::UNSIGNED, REALM_TOKEN);
        cbor.head(major::BYTES, realm_token);
        self.realm_token(signature, cbor.0);
    }

    /// The whole token's length, which no signature changes.
    pub(super) fn len(&self) -> u64 {
        length(|to| self.write(&[0; 12], to))
    }
}
