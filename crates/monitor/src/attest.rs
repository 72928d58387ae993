//! Keys and the platform token.
//!
//! This machine has no fuses, so its root of trust is a development root: keys are derived from fixed labels,
//! and anybody can derive them. What the token says is true all the same: the measurements are those of the
//! monitor and the RMM that run, the challenge is the RMM's, and the signature verifies.

use p384::ecdsa::signature::Signer;
use p384::ecdsa::{Signature, SigningKey};
use sha2::{Digest, Sha256, Sha384};

/// SHA-256 of what was loaded.
pub type Measurement = [u8; 32];

/// Bytes of a P-384 private scalar.
pub const KEY_SIZE: usize = 48;
/// Enough for every token that [`platform_token`] makes.
pub const TOKEN_MAX: usize = 1024;

const IAK_LABEL: &[u8] = b"kvm-realm development root: initial attestation key";
const RAK_LABEL: &[u8] = b"kvm-realm development root: realm attestation key";
const IMPLEMENTATION: &[u8] = b"kvm-realm monitor on QEMU virt";
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Measurements of the software that the token vouches for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Measured {
    /// The monitor's code and constants.
    pub monitor: Measurement,
    /// The RMM's image as it was loaded.
    pub rmm: Measurement,
}

fn derive(label: &[u8], binding: &[u8]) -> SigningKey {
    let mut counter = 0_u8;
    loop {
        let scalar =
            Sha384::new().chain_update(label).chain_update(binding).chain_update([counter]).finalize();
        // Fails only for zero and for what is not below the group's order: one in 2^190.
        if let Ok(key) = SigningKey::from_slice(&scalar) {
            return key;
        }
        counter = counter.wrapping_add(1);
    }
}

/// The realm attestation key's private scalar, bound to the RMM that gets it.
pub fn realm_key(rmm: &Measurement) -> [u8; KEY_SIZE] {
    derive(RAK_LABEL, rmm).to_bytes().into()
}

/// The public half of the key that signs platform tokens: uncompressed SEC1 point.
pub fn platform_public_key() -> [u8; 97] {
    public_key(&derive(IAK_LABEL, b""))
}

fn public_key(key: &SigningKey) -> [u8; 97] {
    let mut out = [0; 97];
    let point = key.verifying_key().to_encoded_point(false);
    if let Some(bytes) = point.as_bytes().get(..97) {
        out.copy_from_slice(bytes);
    }
    out
}

/// CBOR, as much as a token needs. Running out of room is remembered and reported at the end.
struct Cbor<const N: usize> {
    bytes: [u8; N],
    len: usize,
    full: bool,
}

impl<const N: usize> Cbor<N> {
    const fn new() -> Self {
        Self { bytes: [0; N], len: 0, full: false }
    }

    fn raw(&mut self, data: &[u8]) {
        match self.len.checked_add(data.len()).and_then(|end| self.bytes.get_mut(self.len..end)) {
            Some(room) => {
                room.copy_from_slice(data);
                self.len += data.len();
            }
            None => self.full = true,
        }
    }

    fn head(&mut self, major: u8, value: usize) {
        let major = major << 5;
        match u16::try_from(value).map(u16::to_be_bytes) {
            Ok([0, low]) if low < 24 => self.raw(&[major | low]),
            Ok([0, low]) => self.raw(&[major | 24, low]),
            Ok([high, low]) => self.raw(&[major | 25, high, low]),
            Err(_) => self.full = true,
        }
    }

    fn uint(&mut self, value: usize) {
        self.head(0, value);
    }
    fn bstr(&mut self, data: &[u8]) {
        self.head(2, data.len());
        self.raw(data);
    }
    fn text(&mut self, text: &str) {
        self.head(3, text.len());
        self.raw(text.as_bytes());
    }
    fn array(&mut self, items: usize) {
        self.head(4, items);
    }
    fn map(&mut self, pairs: usize) {
        self.head(5, pairs);
    }

    fn done(&self) -> Option<&[u8]> {
        if self.full { None } else { self.bytes.get(..self.len) }
    }
}

/// Protected header of both tokens: {alg: ES384}.
const ES384_HEADER: [u8; 4] = [0xA1, 0x01, 0x38, 0x22];
/// Tag 18, COSE_Sign1.
const COSE_SIGN1: u8 = 0xD2;
/// "Secured", implementation-defined part 3: a development root.
const LIFECYCLE: usize = 0x3003;

mod claim {
    pub(super) const CHALLENGE: usize = 10;
    pub(super) const INSTANCE_ID: usize = 256;
    pub(super) const PROFILE: usize = 265;
    pub(super) const LIFECYCLE: usize = 2395;
    pub(super) const IMPLEMENTATION_ID: usize = 2396;
    pub(super) const SW_COMPONENTS: usize = 2399;
    pub(super) const CONFIG: usize = 2401;
    pub(super) const HASH_ALGORITHM: usize = 2402;
}

fn claims(key: &SigningKey, measured: &Measured, challenge: &[u8]) -> Cbor<768> {
    let mut c = Cbor::new();
    c.map(8);
    c.uint(claim::PROFILE);
    c.text("tag:arm.com,2023:cca_platform#1.0.0");
    c.uint(claim::CHALLENGE);
    c.bstr(challenge);
    c.uint(claim::IMPLEMENTATION_ID);
    c.bstr(&Sha256::digest(IMPLEMENTATION));
    c.uint(claim::INSTANCE_ID);
    let mut instance = [1; 33];
    instance[1..].copy_from_slice(&Sha256::digest(public_key(key)));
    c.bstr(&instance);
    c.uint(claim::CONFIG);
    c.bstr(b"qemu-virt x-rme");
    c.uint(claim::LIFECYCLE);
    c.uint(LIFECYCLE);
    c.uint(claim::HASH_ALGORITHM);
    c.text("sha-256");
    c.uint(claim::SW_COMPONENTS);
    c.array(2);
    let signer = Sha256::digest(public_key(key));
    for (name, measurement) in [("monitor", &measured.monitor), ("rmm", &measured.rmm)] {
        c.map(4);
        c.uint(1);
        c.text(name);
        c.uint(2);
        c.bstr(measurement);
        c.uint(4);
        c.text(VERSION);
        c.uint(5);
        c.bstr(&signer);
    }
    c
}

/// A CCA platform token for `challenge`: COSE_Sign1 with ES384. `None` only if it became too large.
pub fn platform_token(measured: &Measured, challenge: &[u8], out: &mut [u8; TOKEN_MAX]) -> Option<usize> {
    let key = derive(IAK_LABEL, b"");
    let claims = claims(&key, measured, challenge);
    let payload = claims.done()?;
    let mut signed = Cbor::<TOKEN_MAX>::new();
    signed.array(4);
    signed.text("Signature1");
    signed.bstr(&ES384_HEADER);
    signed.bstr(b"");
    signed.bstr(payload);
    let signature: Signature = key.sign(signed.done()?);
    let signature = signature.to_bytes();
    let mut token = Cbor::<TOKEN_MAX>::new();
    token.raw(&[COSE_SIGN1]);
    token.array(4);
    token.bstr(&ES384_HEADER);
    token.map(0);
    token.bstr(payload);
    token.bstr(&signature);
    let bytes = token.done()?;
    out.get_mut(..bytes.len())?.copy_from_slice(bytes);
    Some(bytes.len())
}

/// The platform token that is on its way to the RMM.
#[derive(Debug)]
pub(crate) struct Pending {
    bytes: [u8; TOKEN_MAX],
    len: usize,
    sent: usize,
}

impl Pending {
    pub(crate) const fn new() -> Self {
        Self { bytes: [0; TOKEN_MAX], len: 0, sent: 0 }
    }

    /// Starts over with a new token.
    pub(crate) fn start(&mut self, measured: &Measured, challenge: &[u8]) -> bool {
        let len = platform_token(measured, challenge, &mut self.bytes);
        self.len = len.unwrap_or(0);
        self.sent = 0;
        len.is_some()
    }

    /// The next piece of at most `room` bytes and what remains after it; `None` if there is nothing to send.
    pub(crate) fn next(&mut self, room: usize) -> Option<(&[u8], usize)> {
        let end = self.len.min(self.sent.saturating_add(room));
        let hunk = self.bytes.get(self.sent..end).filter(|hunk| !hunk.is_empty())?;
        self.sent = end;
        Some((hunk, self.len - end))
    }
}
