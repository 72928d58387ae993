//! Tokens: one that a stock Debian guest got through configfs-tsm, and others that are made here with `coset`.

use attest::root::{DEVELOPMENT, Root};
use attest::text::{sixty_four, token_bytes, unhex};
use attest::{CcaToken, Outcome, Policy, Report, verify};
use ciborium::Value;
use coset::{CborSerializable as _, CoseSign1Builder, HeaderBuilder, TaggedCborSerializable as _, iana};
use p384::ecdsa::signature::Signer as _;
use p384::ecdsa::{Signature, SigningKey};
use proptest::prelude::*;
use sha2::{Digest as _, Sha256};

const GUEST: &[u8] = include_bytes!("stock-guest.token");
const GUEST_NONCE: &str = "a fresh nonce";

fn failed(report: &Report) -> Vec<&'static str> {
    assert_eq!(report.verified, report.failures().count() == 0);
    report.failures().map(|check| check.name).collect()
}

fn guest_policy() -> Policy {
    Policy {
        roots: vec![Root::development().unwrap()],
        challenge: Some(sixty_four(GUEST_NONCE).unwrap().to_vec()),
        rim: Some(guest_rim()),
        personalization_value: Some(vec![0; 64]),
        ..Policy::default()
    }
}

fn guest_rim() -> Vec<u8> {
    CcaToken::parse(&token_bytes(GUEST)).unwrap().realm.initial_measurement.0
}

#[test]
fn the_development_root_is_the_monitors() {
    assert_eq!(DEVELOPMENT, monitor::attest::platform_public_key());
    let root = Root::development().unwrap();
    assert!(root.development && root.name.contains("development"));
}

#[test]
fn the_token_of_a_stock_guest_verifies() {
    let report = verify(&token_bytes(GUEST), &guest_policy());
    assert_eq!(failed(&report), [""; 0]);
    assert!(report.development_root);
    assert_ne!(guest_rim(), [0; 32]);
    let skipped = report.checks.iter().filter(|check| check.outcome == Outcome::NotChecked);
    assert_eq!(skipped.map(|check| check.name).collect::<Vec<_>>(), ["platform-software"]);
    let text = report.to_string();
    assert!(text.contains("\"a fresh nonce\"") && text.ends_with("verified"), "{text}");
    assert!(text.contains("proves nothing"), "{text}");
    let json: serde_json::Value = serde_json::to_value(&report).unwrap();
    assert_eq!(json["verified"], true);
    assert_eq!(json["realm"]["hash_algorithm"], "sha-256");
    assert_eq!(json["checks"][0]["name"], "token-format");
    assert_eq!(json["checks"][0]["outcome"], "passed");
    assert_eq!(json["platform"]["software"][1]["type"], "rmm");
}

#[test]
fn a_wrong_expectation_fails_its_own_check_and_says_what_was_found() {
    let token = token_bytes(GUEST);
    let other = SigningKey::from_slice(&[3; 48]).unwrap();
    let stranger = Root::new("a stranger", other.verifying_key().to_encoded_point(true).as_bytes()).unwrap();
    assert!(!stranger.development);
    type Change<'a> = &'a dyn Fn(&mut Policy);
    let cases: [(&str, Change<'_>); 8] = [
        ("challenge", &|policy| policy.challenge = Some(sixty_four("another nonce").unwrap().to_vec())),
        ("initial-measurement", &|policy| policy.rim = Some(vec![0; 32])),
        ("initial-measurement", &|policy| policy.rim.as_mut().unwrap().truncate(31)),
        ("extensible-measurement-2", &|policy| policy.rems[2] = Some(vec![1; 32])),
        ("personalization-value", &|policy| policy.personalization_value = Some(vec![1; 64])),
        ("platform-signature", &|policy| policy.roots = vec![stranger.clone()]),
        ("platform-signature", &|policy| policy.roots.clear()),
        ("platform-software", &|policy| policy.software = vec![("rmm".into(), vec![0; 32])]),
    ];
    for (name, change) in cases {
        let mut policy = guest_policy();
        change(&mut policy);
        let report = verify(&token, &policy);
        assert_eq!(failed(&report), [name]);
        let check = report.failures().next().unwrap();
        assert!(!check.expected.is_empty() && !check.found.is_empty());
        assert!(report.to_string().ends_with(&format!("NOT verified: {name}")));
    }
    // Several roots: one of them is enough.
    let mut policy = guest_policy();
    policy.roots.insert(0, stranger);
    assert!(verify(&token, &policy).verified);
}

#[test]
fn keys_are_read_in_every_usual_form() {
    let info = unhex("3076301006072a8648ce3d020106052b81040022036200").unwrap();
    let der = [info.as_slice(), &DEVELOPMENT].concat();
    let base64: String = {
        // As `openssl base64` prints it.
        const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        der.chunks(3)
            .flat_map(|chunk| {
                let word = chunk.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte));
                (0..4).rev().map(move |n| char::from(ALPHABET[(word >> (6 * n) & 63) as usize]))
            })
            .collect()
    };
    let pem = format!(
        "-----BEGIN PUBLIC KEY-----\n{}\n{}\n-----END PUBLIC KEY-----\n",
        &base64[..64],
        &base64[64..]
    );
    for file in
        [pem.into_bytes(), der.clone(), DEVELOPMENT.to_vec(), attest::text::hex(&DEVELOPMENT).into_bytes()]
    {
        assert!(Root::from_file("key", &file).unwrap().development);
    }
    for file in
        [&b""[..], b"-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----", &der[1..], &DEVELOPMENT[1..]]
    {
        assert!(Root::from_file("key", file).is_none());
    }
}

/// A token in the making, with what can be wrong in it.
struct Made {
    platform: Vec<(i64, Value)>,
    realm: Vec<(i64, Value)>,
    platform_key: SigningKey,
    realm_key: SigningKey,
    algorithm: iana::Algorithm,
    tag: u64,
    behind: Vec<u8>,
}

fn cose_key(key: &SigningKey) -> Vec<u8> {
    let point = key.verifying_key().to_encoded_point(false);
    let coordinate = |bytes: &[u8]| Value::from(bytes.to_vec());
    let entries = [
        (1, Value::from(2)),
        (-1, Value::from(2)),
        (-2, coordinate(&point.as_bytes()[1..49])),
        (-3, coordinate(&point.as_bytes()[49..])),
    ];
    Value::Map(entries.into_iter().map(|(label, value)| (Value::from(label), value)).collect())
        .to_vec()
        .unwrap()
}

impl Made {
    fn new() -> Self {
        let realm_key = SigningKey::from_slice(&[1; 48]).unwrap();
        let platform_key = SigningKey::from_slice(&[2; 48]).unwrap();
        let public = cose_key(&realm_key);
        let bytes = |byte: u8, len: usize| Value::from(vec![byte; len]);
        let component = Value::Map(vec![
            (Value::from(1), Value::from("rmm")),
            (Value::from(2), bytes(8, 32)),
            (Value::from(5), bytes(9, 32)),
        ]);
        Self {
            platform: vec![
                (265, Value::from("tag:arm.com,2023:cca_platform#1.0.0")),
                (10, Value::from(Sha256::digest(&public).to_vec())),
                (2396, bytes(3, 32)),
                (256, bytes(1, 33)),
                (2401, bytes(4, 5)),
                (2395, Value::from(0x3000)),
                (2402, Value::from("sha-256")),
                (2399, Value::Array(vec![component])),
            ],
            realm: vec![
                (10, bytes(5, 64)),
                (265, Value::from("tag:arm.com,2023:realm#1.0.0")),
                (44235, bytes(6, 64)),
                (44236, Value::from("sha-256")),
                (44237, Value::from(public)),
                (44238, bytes(7, 32)),
                (44239, Value::Array(vec![bytes(0, 32); 4])),
                (44240, Value::from("sha-256")),
            ],
            platform_key,
            realm_key,
            algorithm: iana::Algorithm::ES384,
            tag: 399,
            behind: vec![],
        }
    }

    fn sign(&self, claims: &[(i64, Value)], key: &SigningKey) -> Value {
        let entries = claims.iter().map(|(label, value)| (Value::from(*label), value.clone())).collect();
        let signed = CoseSign1Builder::new()
            .protected(HeaderBuilder::new().algorithm(self.algorithm).build())
            .payload(Value::Map(entries).to_vec().unwrap())
            .create_signature(&[], |data| {
                let signature: Signature = key.sign(data);
                signature.to_bytes().to_vec()
            })
            .build();
        Value::from(signed.to_tagged_vec().unwrap())
    }

    fn bytes(&self) -> Vec<u8> {
        let parts = vec![
            (Value::from(44234), self.sign(&self.platform, &self.platform_key)),
            (Value::from(44241), self.sign(&self.realm, &self.realm_key)),
        ];
        let mut bytes = Value::Tag(self.tag, Box::new(Value::Map(parts))).to_vec().unwrap();
        bytes.extend(&self.behind);
        bytes
    }

    fn policy() -> Policy {
        let key = SigningKey::from_slice(&[2; 48]).unwrap();
        let root = Root::new("test root", key.verifying_key().to_encoded_point(false).as_bytes()).unwrap();
        Policy { roots: vec![root], ..Policy::default() }
    }
}

/// A claim's value.
fn claim(claims: &mut [(i64, Value)], label: i64) -> &mut Value {
    &mut claims.iter_mut().find(|(found, _)| *found == label).unwrap().1
}

#[test]
fn each_lie_is_found_by_its_own_check() {
    let report = verify(&Made::new().bytes(), &Made::policy());
    assert_eq!(failed(&report), [""; 0]);
    assert!(!report.development_root);
    let stranger = || SigningKey::from_slice(&[4; 48]).unwrap();
    type Change<'a> = &'a dyn Fn(&mut Made);
    let cases: [(&[&str], Change<'_>); 13] = [
        (&["platform-profile"], &|made| *claim(&mut made.platform, 265) = Value::from("http://arm.com/CCA")),
        (&["realm-profile"], &|made| *claim(&mut made.realm, 265) = Value::from("tag:other")),
        (&["platform-signature"], &|made| made.platform_key = stranger()),
        (&["realm-signature"], &|made| made.realm_key = stranger()),
        (&["key-binding"], &|made| *claim(&mut made.platform, 10) = Value::from(vec![0; 32])),
        (&["key-binding"], &|made| *claim(&mut made.realm, 44240) = Value::from("sha-512")),
        (&["key-binding"], &|made| *claim(&mut made.realm, 44240) = Value::from("md5")),
        // A Realm key of somebody who has one, but not this platform's.
        (&["key-binding"], &|made| {
            made.realm_key = stranger();
            *claim(&mut made.realm, 44237) = Value::from(cose_key(&stranger()));
        }),
        (&["key-binding", "realm-signature"], &|made| {
            let mut key = cose_key(&stranger());
            key[8..56].fill(0xFF);
            *claim(&mut made.realm, 44237) = Value::from(key);
        }),
        (&["platform-lifecycle"], &|made| *claim(&mut made.platform, 2395) = Value::from(0x4000)),
        (&["platform-lifecycle"], &|made| *claim(&mut made.platform, 2395) = Value::from(0)),
        (&["token-format"], &|made| made.algorithm = iana::Algorithm::ES256),
        (&["token-format"], &|made| made.tag = 398),
    ];
    for (n, (names, change)) in cases.iter().enumerate() {
        let mut made = Made::new();
        change(&mut made);
        assert_eq!(failed(&verify(&made.bytes(), &Made::policy())), *names, "case {n}");
    }
    // Unless somebody does not mind.
    let mut made = Made::new();
    *claim(&mut made.platform, 2395) = Value::from(0x4000);
    assert!(verify(&made.bytes(), &Policy { any_lifecycle: true, ..Made::policy() }).verified);
    // The Realm's profile may be left out.
    let mut made = Made::new();
    made.realm.retain(|(label, _)| *label != 265);
    assert!(verify(&made.bytes(), &Made::policy()).verified);
}

#[test]
fn what_is_missing_or_of_the_wrong_type_is_named() {
    for (platform, label, name) in [
        (true, 265, "profile"),
        (true, 10, "challenge"),
        (true, 2396, "implementation id"),
        (true, 256, "instance id"),
        (true, 2401, "config"),
        (true, 2395, "life cycle"),
        (true, 2402, "hash algorithm"),
        (true, 2399, "software components"),
        (false, 10, "challenge"),
        (false, 44235, "personalization value"),
        (false, 44236, "hash algorithm"),
        (false, 44237, "public key"),
        (false, 44238, "initial measurement"),
        (false, 44239, "extensible measurements"),
        (false, 44240, "public key hash algorithm"),
    ] {
        for missing in [true, false] {
            let mut made = Made::new();
            let claims = if platform { &mut made.platform } else { &mut made.realm };
            if missing {
                claims.retain(|(found, _)| *found != label);
            } else {
                *claim(claims, label) = Value::Null;
            }
            let error = CcaToken::parse(&made.bytes()).unwrap_err();
            assert!(error.at.ends_with(name), "{label}: {error}");
            assert_eq!(error.found, if missing { "nothing" } else { "null" });
        }
    }
}

#[test]
fn a_token_has_one_reading_only() {
    let refused: [&dyn Fn(&mut Made); 5] = [
        &|made| made.behind = vec![0],
        &|made| made.realm.push((10, Value::from(vec![9; 64]))),
        &|made| *claim(&mut made.realm, 44239) = Value::Array(vec![Value::from(vec![0; 32]); 5]),
        &|made| *claim(&mut made.realm, 44238) = Value::from(vec![0; 48]),
        &|made| *claim(&mut made.platform, 2399) = Value::Array(vec![]),
    ];
    for (n, change) in refused.iter().enumerate() {
        let mut made = Made::new();
        change(&mut made);
        assert_eq!(failed(&verify(&made.bytes(), &Made::policy())), ["token-format"], "case {n}");
    }
    assert!(CcaToken::parse(&vec![0x81; 1 << 15]).is_err(), "nested deeply");
    assert!(CcaToken::parse(&vec![0; (1 << 16) + 1]).is_err());
    assert!(CcaToken::parse(&[]).is_err());
    // Claims that nobody knows do not matter.
    let mut made = Made::new();
    made.realm.push((-70000, Value::from("more")));
    assert!(verify(&made.bytes(), &Made::policy()).verified);
}

#[test]
fn a_token_in_which_one_bit_is_changed_does_not_verify() {
    let mut token = token_bytes(GUEST);
    let policy = guest_policy();
    for at in 0..token.len() {
        token[at] ^= 1 << (at % 8);
        assert!(!verify(&token, &policy).verified, "byte {at}");
        token[at] ^= 1 << (at % 8);
    }
    for len in 0..token.len() {
        assert!(!verify(&token[..len], &policy).verified);
    }
}

/// Cases of each property: `ATTEST_CASES` for a long run.
fn cases() -> u32 {
    std::env::var("ATTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(256)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases()))]

    #[test]
    fn nothing_makes_it_panic(bytes: Vec<u8>) {
        prop_assert!(!verify(&bytes, &guest_policy()).verified);
        let _ = (Root::from_file("x", &bytes), token_bytes(&bytes));
    }

    #[test]
    fn no_mutation_makes_it_panic_or_verify(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..4), 1..8),
    ) {
        let original = token_bytes(GUEST);
        let mut token = original.clone();
        for (at, byte, how) in changes {
            if token.is_empty() {
                break;
            }
            let at = at.index(token.len());
            match how {
                0 => token[at] = byte,
                1 => token.insert(at, byte),
                2 => drop(token.remove(at)),
                // A piece of it once more.
                _ => {
                    let piece = token[at..(at + usize::from(byte)).min(token.len())].to_vec();
                    token.splice(at..at, piece);
                }
            }
        }
        prop_assert_eq!(verify(&token, &guest_policy()).verified, token == original);
    }
}
