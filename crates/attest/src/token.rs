//! What a CCA token says: DEN0137 chapter A7, read strictly. That something can be read says nothing about whether
//! it is true; see [`crate::verify`].

use std::fmt;

use ciborium::Value;
use coset::{CoseSign1, TaggedCborSerializable as _, iana};
use serde::Serialize;

use crate::cbor::{Map, describe, item};

/// Longer files are no tokens.
pub const MAX_LEN: usize = 1 << 16;

const CCA_TOKEN: u64 = 399;
const PLATFORM_TOKEN: i128 = 44234;
const REALM_TOKEN: i128 = 44241;
/// Lengths of the hashes that CCA knows.
const DIGESTS: &[usize] = &[32, 48, 64];

/// What makes something no CCA token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Malformed {
    /// Where.
    pub at: String,
    /// What should be there.
    pub expected: String,
    /// What is there.
    pub found: String,
}

impl Malformed {
    pub(crate) fn new(at: &str, expected: &str, found: &str) -> Self {
        Self { at: at.into(), expected: expected.into(), found: found.into() }
    }
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: expected {}, found {}", self.at, self.expected, self.found)
    }
}

impl std::error::Error for Malformed {}

/// Bytes that are shown as hexadecimal digits.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Bytes(pub Vec<u8>);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&crate::text::hex(&self.0))
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Bytes {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// One piece of the platform's software.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Software {
    /// What it is.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its hash.
    pub measurement: Bytes,
    /// Its version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Hash of the key that signed it.
    pub signer: Bytes,
    /// The measurement's algorithm, if it is not that of the platform.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hash_algorithm: Option<String>,
}

/// The platform token's claims.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlatformClaims {
    /// Which claims there are and what they mean.
    pub profile: String,
    /// The hash of the Realm attestation key.
    pub challenge: Bytes,
    /// The kind of machine.
    pub implementation_id: Bytes,
    /// The machine.
    pub instance_id: Bytes,
    /// How it is configured.
    pub config: Bytes,
    /// Its security life cycle.
    pub lifecycle: u16,
    /// The algorithm of measurements.
    pub hash_algorithm: String,
    /// Its software.
    pub software: Vec<Software>,
    /// Who verifies such tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verification_service: Option<String>,
}

/// The Realm token's claims.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RealmClaims {
    /// Which claims there are and what they mean.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub profile: Option<String>,
    /// What the Realm passed to RSI_ATTESTATION_TOKEN_INIT.
    pub challenge: Bytes,
    /// The Realm Personalization Value.
    pub personalization_value: Bytes,
    /// The Realm's hash algorithm.
    pub hash_algorithm: String,
    /// The Realm attestation key, a COSE_Key.
    pub public_key: Bytes,
    /// The algorithm whose hash of that key is the platform's challenge.
    pub public_key_hash_algorithm: String,
    /// The Realm Initial Measurement.
    pub initial_measurement: Bytes,
    /// The Realm Extensible Measurements.
    pub extensible_measurements: [Bytes; 4],
}

/// A CCA token, taken apart.
#[derive(Debug, Clone)]
pub struct CcaToken {
    /// What the platform says.
    pub platform: PlatformClaims,
    /// What the RMM says about the Realm.
    pub realm: RealmClaims,
    pub(crate) platform_signed: CoseSign1,
    pub(crate) realm_signed: CoseSign1,
    /// The Realm attestation key's coordinates.
    pub(crate) realm_key: [Vec<u8>; 2],
}

impl CcaToken {
    /// Reads a token.
    ///
    /// # Errors
    /// The first thing that makes it none.
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        const AT: &str = "CCA token";
        if bytes.len() > MAX_LEN {
            return Err(Malformed::new(AT, "at most 64 KiB", &format!("{} bytes", bytes.len())));
        }
        let parts = match item(AT, bytes)? {
            Value::Tag(CCA_TOKEN, parts) => *parts,
            other => return Err(Malformed::new(AT, "tag 399", &describe(&other))),
        };
        let mut parts = Map::new(AT, parts)?;
        let platform_signed =
            signed(AT, "platform token", &parts.bytes(PLATFORM_TOKEN, "platform token", &[])?)?;
        let realm_signed = signed(AT, "Realm token", &parts.bytes(REALM_TOKEN, "Realm token", &[])?)?;
        let platform = platform_claims(payload("platform token", &platform_signed)?)?;
        let realm = realm_claims(payload("Realm token", &realm_signed)?)?;
        let realm_key = cose_key(&realm.public_key.0)?;
        Ok(Self { platform, realm, platform_signed, realm_signed, realm_key })
    }
}

/// A COSE_Sign1 with ES384 and nothing unprotected.
fn signed(outer: &str, name: &str, bytes: &[u8]) -> Result<CoseSign1, Malformed> {
    let at = format!("{outer}, {name}");
    let wrong = |expected: &str, found: &str| Malformed::new(&at, expected, found);
    item(&at, bytes)?;
    let signed = CoseSign1::from_tagged_slice(bytes)
        .map_err(|error| wrong("a COSE_Sign1 with tag 18", &format!("{error}")))?;
    let es384 = coset::RegisteredLabelWithPrivate::Assigned(iana::Algorithm::ES384);
    let header = &signed.protected.header;
    if header.alg.as_ref() != Some(&es384) {
        return Err(wrong("algorithm ES384", &format!("{:?}", header.alg)));
    }
    if !header.crit.is_empty() {
        return Err(wrong("no critical header", "one"));
    }
    if signed.signature.len() != 96 {
        return Err(wrong("a signature of 96 bytes", &format!("{} bytes", signed.signature.len())));
    }
    Ok(signed)
}

fn payload(name: &str, signed: &CoseSign1) -> Result<Map, Malformed> {
    let payload =
        signed.payload.as_deref().ok_or_else(|| Malformed::new(name, "a payload", "a detached one"))?;
    Map::new(name, item(name, payload)?)
}

fn platform_claims(mut claims: Map) -> Result<PlatformClaims, Malformed> {
    let mut software = Vec::new();
    for (n, component) in claims.array(2399, "software components")?.into_iter().enumerate() {
        let mut component = Map::new(&format!("platform token, software component {n}"), component)?;
        software.push(Software {
            name: component.optional_text(1, "type")?,
            measurement: Bytes(component.bytes(2, "measurement", DIGESTS)?),
            version: component.optional_text(4, "version")?,
            signer: Bytes(component.bytes(5, "signer", DIGESTS)?),
            hash_algorithm: component.optional_text(6, "hash algorithm")?,
        });
    }
    if software.is_empty() {
        return Err(Malformed::new("platform token, software components", "at least one", "none"));
    }
    Ok(PlatformClaims {
        profile: claims.text(265, "profile")?,
        challenge: Bytes(claims.bytes(10, "challenge", DIGESTS)?),
        implementation_id: Bytes(claims.bytes(2396, "implementation id", &[32])?),
        instance_id: Bytes(claims.bytes(256, "instance id", &[33])?),
        config: Bytes(claims.bytes(2401, "config", &[])?),
        lifecycle: claims.u16(2395, "life cycle")?,
        hash_algorithm: claims.text(2402, "hash algorithm")?,
        software,
        verification_service: claims.optional_text(2400, "verification service")?,
    })
}

fn realm_claims(mut claims: Map) -> Result<RealmClaims, Malformed> {
    let hash_algorithm = claims.text(44236, "hash algorithm")?;
    let len = match hash_algorithm.as_str() {
        "sha-256" => 32,
        "sha-384" => 48,
        "sha-512" => 64,
        other => {
            return Err(Malformed::new(
                "Realm token, hash algorithm",
                "sha-256 or sha-512",
                &format!("{other:?}"),
            ));
        }
    };
    let at = "Realm token, extensible measurements";
    let mut rems = Vec::new();
    for rem in claims.array(44239, "extensible measurements")? {
        match rem {
            Value::Bytes(bytes) if bytes.len() == len => rems.push(Bytes(bytes)),
            other => return Err(Malformed::new(at, &format!("{len} bytes each"), &describe(&other))),
        }
    }
    let count = rems.len();
    Ok(RealmClaims {
        profile: claims.optional_text(265, "profile")?,
        challenge: Bytes(claims.bytes(10, "challenge", &[64])?),
        personalization_value: Bytes(claims.bytes(44235, "personalization value", &[64])?),
        public_key: Bytes(claims.bytes(44237, "public key", &[])?),
        public_key_hash_algorithm: claims.text(44240, "public key hash algorithm")?,
        initial_measurement: Bytes(claims.bytes(44238, "initial measurement", &[len])?),
        extensible_measurements: rems
            .try_into()
            .map_err(|_| Malformed::new(at, "four", &count.to_string()))?,
        hash_algorithm,
    })
}

/// The coordinates of a COSE_Key on P-384.
fn cose_key(bytes: &[u8]) -> Result<[Vec<u8>; 2], Malformed> {
    const AT: &str = "Realm token, public key";
    let mut key = Map::new(AT, item(AT, bytes)?)?;
    if key.u16(1, "type")? != 2 {
        return Err(Malformed::new(AT, "an elliptic curve point", "another type of key"));
    }
    if key.u16(-1, "curve")? != 2 {
        return Err(Malformed::new(AT, "the curve P-384", "another curve"));
    }
    Ok([key.bytes(-2, "x", &[48])?, key.bytes(-3, "y", &[48])?])
}
