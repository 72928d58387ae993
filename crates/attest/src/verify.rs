//! Whether a token is true, and whether it is what somebody expects: one named check after the other, each with what
//! it expected and what it found.

use p384::ecdsa::signature::Verifier as _;
use p384::ecdsa::{Signature, VerifyingKey};
use serde::Serialize;
use sha2::{Digest as _, Sha256, Sha384, Sha512};

use crate::root::Root;
use crate::text::{hex, same};
use crate::token::{CcaToken, PlatformClaims, RealmClaims};

/// The profile of a platform token.
pub const PLATFORM_PROFILE: &str = "tag:arm.com,2023:cca_platform#1.0.0";
/// The profile of a Realm token.
pub const REALM_PROFILE: &str = "tag:arm.com,2023:realm#1.0.0";

/// What is expected of a token. What is not given is not checked, and the report says so.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    /// The keys that may sign the platform token. Without any, nothing verifies.
    pub roots: Vec<Root>,
    /// The challenge, 64 bytes.
    pub challenge: Option<Vec<u8>>,
    /// The initial measurement.
    pub rim: Option<Vec<u8>>,
    /// The extensible measurements, each if given.
    pub rems: [Option<Vec<u8>>; 4],
    /// The Realm Personalization Value, 64 bytes.
    pub personalization_value: Option<Vec<u8>>,
    /// Measurements of platform software by type: each has to be there.
    pub software: Vec<(String, Vec<u8>)>,
    /// Life cycles other than "secured" are accepted too.
    pub any_lifecycle: bool,
}

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It holds.
    Passed,
    /// It does not hold.
    Failed,
    /// Nobody said what to expect, or a check before it failed.
    NotChecked,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Its name.
    pub name: &'static str,
    /// How it ended.
    pub outcome: Outcome,
    /// What was expected.
    pub expected: String,
    /// What was found.
    pub found: String,
}

/// What came out.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Whether no check failed.
    pub verified: bool,
    /// Whether the platform token is signed by a key whose private half everybody knows.
    pub development_root: bool,
    /// All checks, in order.
    pub checks: Vec<Check>,
    /// What the platform says, if it can be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub platform: Option<PlatformClaims>,
    /// What is said about the Realm, if it can be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub realm: Option<RealmClaims>,
}

impl Report {
    /// The checks that failed.
    pub fn failures(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|check| check.outcome == Outcome::Failed)
    }

    fn check(
        &mut self,
        name: &'static str,
        holds: bool,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) {
        let outcome = if holds { Outcome::Passed } else { Outcome::Failed };
        self.checks.push(Check { name, outcome, expected: expected.into(), found: found.into() });
    }

    fn skip(&mut self, name: &'static str, why: &str, found: impl Into<String>) {
        let outcome = Outcome::NotChecked;
        self.checks.push(Check { name, outcome, expected: why.into(), found: found.into() });
    }

    /// Compares with what is expected, if something is.
    fn compare(&mut self, name: &'static str, expected: Option<&[u8]>, found: &[u8], how: &str) {
        match expected {
            Some(expected) => self.check(name, same(expected, found), hex(expected), hex(found)),
            None => self.skip(name, how, hex(found)),
        }
    }
}

/// What a life cycle state is called.
#[must_use]
pub fn lifecycle_name(state: u16) -> &'static str {
    match state >> 8 {
        0x00 => "unknown",
        0x10 => "assembly and test",
        0x20 => "platform RoT provisioning",
        0x30 => "secured",
        0x40 => "non-platform RoT debug",
        0x50 => "recoverable platform RoT debug",
        0x60 => "decommissioned",
        _ => "reserved",
    }
}

fn signature_holds(key: &VerifyingKey, signed: &coset::CoseSign1) -> bool {
    signed
        .verify_signature(&[], |signature, data| {
            key.verify(data, &Signature::from_slice(signature).map_err(drop)?).map_err(drop)
        })
        .is_ok()
}

/// The hash of the Realm's key with the algorithm that the token names.
fn key_hash(realm: &RealmClaims) -> Option<Vec<u8>> {
    let key = &realm.public_key.0;
    match realm.public_key_hash_algorithm.as_str() {
        "sha-256" => Some(Sha256::digest(key).to_vec()),
        "sha-384" => Some(Sha384::digest(key).to_vec()),
        "sha-512" => Some(Sha512::digest(key).to_vec()),
        _ => None,
    }
}

/// Verifies a token. Never panics, whatever the bytes are.
#[must_use]
pub fn verify(bytes: &[u8], policy: &Policy) -> Report {
    let mut report =
        Report { verified: false, development_root: false, checks: vec![], platform: None, realm: None };
    match CcaToken::parse(bytes) {
        Ok(token) => {
            report.check("token-format", true, "a CCA token", "a CCA token");
            check_platform(&mut report, &token, policy);
            check_realm(&mut report, &token, policy);
            report.platform = Some(token.platform);
            report.realm = Some(token.realm);
        }
        Err(error) => {
            let expected = format!("{}: {}", error.at, error.expected);
            report.check("token-format", false, expected, error.found);
        }
    }
    report.verified = !report.checks.iter().any(|check| check.outcome == Outcome::Failed);
    report
}

fn check_platform(report: &mut Report, token: &CcaToken, policy: &Policy) {
    let claims = &token.platform;
    report.check("platform-profile", claims.profile == PLATFORM_PROFILE, PLATFORM_PROFILE, &claims.profile);
    let names: Vec<&str> = policy.roots.iter().map(|root| root.name.as_str()).collect();
    let expected = if names.is_empty() { "a trusted key".into() } else { names.join(", or ") };
    match policy.roots.iter().find(|root| signature_holds(&root.key, &token.platform_signed)) {
        Some(root) => {
            report.development_root = root.development;
            report.check("platform-signature", true, expected, &root.name);
        }
        None => report.check("platform-signature", false, expected, "a signature of none of them"),
    }
    let found = format!("{:#06x} ({})", claims.lifecycle, lifecycle_name(claims.lifecycle));
    if policy.any_lifecycle {
        report.skip("platform-lifecycle", "any is accepted", found);
    } else {
        report.check("platform-lifecycle", claims.lifecycle >> 8 == 0x30, "0x30xx (secured)", found);
    }
    for (name, measurement) in &policy.software {
        let found: Vec<String> = claims
            .software
            .iter()
            .filter(|software| software.name.as_deref() == Some(name))
            .map(|software| software.measurement.to_string())
            .collect();
        let expected = hex(measurement);
        let holds = found.contains(&expected);
        let found = if found.is_empty() { "no such component".into() } else { found.join(", ") };
        report.check("platform-software", holds, format!("{name} {expected}"), format!("{name} {found}"));
    }
    if policy.software.is_empty() {
        let found: Vec<String> = claims
            .software
            .iter()
            .map(|software| format!("{} {}", software.name.as_deref().unwrap_or("?"), software.measurement))
            .collect();
        report.skip("platform-software", "no measurement given", found.join(", "));
    }
}

fn check_realm(report: &mut Report, token: &CcaToken, policy: &Policy) {
    let claims = &token.realm;
    match claims.profile.as_deref() {
        Some(profile) => report.check("realm-profile", profile == REALM_PROFILE, REALM_PROFILE, profile),
        None => report.skip("realm-profile", "it may be left out", "none"),
    }
    match key_hash(claims) {
        Some(hash) => {
            let challenge = &token.platform.challenge.0;
            report.check("key-binding", same(&hash, challenge), hex(&hash), hex(challenge));
        }
        None => report.check("key-binding", false, "a hash that is known", &claims.public_key_hash_algorithm),
    }
    let point = [&[4], token.realm_key[0].as_slice(), token.realm_key[1].as_slice()].concat();
    match VerifyingKey::from_sec1_bytes(&point) {
        Ok(key) => {
            let holds = signature_holds(&key, &token.realm_signed);
            let found = if holds { "the Realm attestation key" } else { "a signature of another key" };
            report.check("realm-signature", holds, "the Realm attestation key", found);
        }
        Err(_) => report.check("realm-signature", false, "a key on P-384", "a point that is not on it"),
    }
    report.compare("challenge", policy.challenge.as_deref(), &claims.challenge.0, "no nonce given");
    report.compare(
        "initial-measurement",
        policy.rim.as_deref(),
        &claims.initial_measurement.0,
        "no measurement given",
    );
    const NAMES: [&str; 4] = [
        "extensible-measurement-0",
        "extensible-measurement-1",
        "extensible-measurement-2",
        "extensible-measurement-3",
    ];
    for ((name, expected), found) in NAMES.into_iter().zip(&policy.rems).zip(&claims.extensible_measurements)
    {
        if let Some(expected) = expected {
            report.compare(name, Some(expected), &found.0, "");
        }
    }
    report.compare(
        "personalization-value",
        policy.personalization_value.as_deref(),
        &claims.personalization_value.0,
        "no value given",
    );
}
