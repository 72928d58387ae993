//! Attestation tokens: the calls' states and errors, and the tokens themselves, taken apart with `coset` and
//! verified with `ring`, which share no code with the RMM's.

use core::sync::atomic::Ordering::Relaxed;
use std::boxed::Box;
use std::sync::{Arc, Mutex, OnceLock};
use std::vec;
use std::vec::Vec;

use cca_abi::rmi::{ExitReason, Ripas, fid};
use cca_abi::rsi;
use ciborium::Value;
use coset::{CborSerializable, CoseSign1, TaggedCborSerializable};
use monitor::attest::{Measured, TOKEN_MAX, platform_public_key, platform_token, realm_key};
use ring::signature::{ECDSA_P384_SHA384_FIXED, UnparsedPublicKey};

use super::host::{Host, SHARED, TestRealm, TestRec};
use super::std;
use crate::platform::{Platform as _, RealmExit};
use crate::{Attestation, Comb};

const INIT: u64 = rsi::fid::ATTESTATION_TOKEN_INIT;
const CONTINUE: u64 = rsi::fid::ATTESTATION_TOKEN_CONTINUE;
const SUCCESS: u64 = 0;
const INPUT: u64 = 1;
const STATE: u64 = 2;
const INCOMPLETE: u64 = 3;
const UNKNOWN: u64 = 4;

/// Where the Realm takes its token.
const BUFFER: u64 = 0x1000;

fn measured() -> Measured {
    Measured { monitor: [1; 32], rmm: [2; 32] }
}

fn attestation() -> Attestation<'static> {
    // A leak of 2 KiB per test.
    let table = Box::leak(Box::new(Comb::EMPTY));
    Attestation::new(&realm_key(&measured().rmm), table).unwrap()
}

/// The monitor's token for the Realm key.
fn platform_part() -> &'static [u8] {
    static TOKEN: OnceLock<Vec<u8>> = OnceLock::new();
    TOKEN.get_or_init(|| {
        let challenge = attestation().challenge();
        let mut token = [0; TOKEN_MAX];
        let len = platform_token(&measured(), &challenge, &mut token).unwrap();
        token[..len].to_vec()
    })
}

fn give_key(host: &mut Host) {
    let mut attestation = attestation();
    attestation.set_platform_token(platform_part());
    host.rmm.set_attestation(attestation);
}

/// An RMM with a key, and a Realm with a RAM page at [`BUFFER`] and `recs` runnable RECs.
fn attested(algorithm: u64, recs: u64) -> (Host, TestRealm, u64, Vec<TestRec>) {
    let mut host = Host::new();
    give_key(&mut host);
    let realm = host.realm_with(algorithm, 3);
    host.tables(&realm, BUFFER, 3);
    host.ok(fid::RTT_INIT_RIPAS, &[realm.rd, BUFFER, BUFFER + 0x1000]);
    let page = host.page(&realm, BUFFER);
    let recs = (0..recs).map(|n| host.rec(&realm, n, true)).collect();
    host.activate(&realm);
    (host, realm, page, recs)
}

/// The guest calls; its X0 and X1 afterwards.
fn call(host: &Host, rec: &TestRec, fid: u64, args: &[u64]) -> (u64, u64) {
    let result = Arc::new(Mutex::new((0, 0)));
    let to = result.clone();
    host.guest_smc(fid, args);
    host.guest(move |ctx| {
        *to.lock().unwrap() = (ctx.gpr(0), ctx.gpr(1));
        RealmExit::Irq
    });
    assert_eq!(host.enter_ok(rec).exit_reason, ExitReason::Irq as u8);
    *result.lock().unwrap()
}

fn challenge(seed: u8) -> [u8; 64] {
    core::array::from_fn(|n| seed.wrapping_add(n as u8))
}

fn words(bytes: &[u8; 64]) -> Vec<u64> {
    bytes.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
}

fn bytes_of(host: &Host, pa: u64) -> Vec<u8> {
    host.rmm.platform().raw(pa).iter().flat_map(|word| word.load(Relaxed).to_le_bytes()).collect()
}

/// Goes on with a token in windows of `size` bytes at `offset`; the token and the number of calls.
fn collect(host: &Host, rec: &TestRec, page: u64, offset: u64, size: u64) -> (Vec<u8>, u64) {
    let mut token = vec![];
    for calls in 1..100_000 {
        let (status, len) = call(host, rec, CONTINUE, &[BUFFER, offset, size]);
        assert!(len <= size);
        let at = usize::try_from(offset).unwrap();
        token.extend(&bytes_of(host, page)[at..at + usize::try_from(len).unwrap()]);
        match status {
            SUCCESS => return (token, calls),
            INCOMPLETE => {}
            other => panic!("status {other}"),
        }
    }
    panic!("there is no end");
}

fn whole(host: &Host, rec: &TestRec, page: u64, nonce: &[u8; 64]) -> Vec<u8> {
    let (status, bound) = call(host, rec, INIT, &words(nonce));
    assert_eq!(status, SUCCESS);
    let (token, _) = collect(host, rec, page, 0, 4096);
    assert!(token.len() as u64 <= bound);
    token
}

/// The two parts of a CCA token.
fn parts(token: &[u8]) -> Option<(CoseSign1, CoseSign1)> {
    let Value::Tag(399, inner) = ciborium::from_reader(token).ok()? else { return None };
    let mut map = inner.into_map().ok()?.into_iter();
    let mut part = |label: i64| {
        let (found, bytes) = map.next()?;
        (found.as_integer()? == label.into()).then_some(())?;
        CoseSign1::from_tagged_slice(bytes.as_bytes()?).ok()
    };
    let found = (part(44234)?, part(44241)?);
    map.next().is_none().then_some(found)
}

fn claims(part: &CoseSign1) -> Option<Vec<(i128, Value)>> {
    let map = ciborium::from_reader::<Value, _>(part.payload.as_deref()?).ok()?.into_map().ok()?;
    map.into_iter().map(|(label, value)| Some((label.as_integer()?.into(), value))).collect()
}

fn claim(claims: &[(i128, Value)], label: i128) -> Option<&Value> {
    claims.iter().find(|(found, _)| *found == label).map(|(_, value)| value)
}

fn signed_by(part: &CoseSign1, key: &[u8]) -> bool {
    let key = UnparsedPublicKey::new(&ECDSA_P384_SHA384_FIXED, key);
    part.protected.original_data.as_deref() == Some(&[0xA1, 0x01, 0x38, 0x22])
        && part.unprotected.is_empty()
        && part.verify_signature(&[], |signature, data| key.verify(data, signature)).is_ok()
}

/// The SEC1 point of a COSE_Key.
fn sec1(cose_key: &[u8]) -> Option<Vec<u8>> {
    let map = ciborium::from_reader::<Value, _>(cose_key).ok()?.into_map().ok()?;
    let get = |label: i64| map.iter().find(|(found, _)| *found == Value::from(label)).map(|(_, value)| value);
    (get(1)? == &Value::from(2) && get(-1)? == &Value::from(2)).then_some(())?;
    Some([&[4], get(-2)?.as_bytes()?.as_slice(), get(-3)?.as_bytes()?.as_slice()].concat())
}

/// Whether signatures and binding hold. Gives the Realm's claims.
fn verified(token: &[u8]) -> Option<Vec<(i128, Value)>> {
    let (platform, realm) = parts(token)?;
    static ROOT: OnceLock<[u8; 97]> = OnceLock::new();
    signed_by(&platform, ROOT.get_or_init(platform_public_key)).then_some(())?;
    let (platform, realm_claims) = (claims(&platform)?, claims(&realm)?);
    let key = claim(&realm_claims, 44237)?.as_bytes()?;
    let bound = ring::digest::digest(&ring::digest::SHA256, key);
    (claim(&platform, 10)?.as_bytes()?.as_slice() == bound.as_ref()).then_some(())?;
    signed_by(&realm, &sec1(key)?).then_some(realm_claims)
}

#[test]
fn a_token_verifies_and_says_what_the_realm_is() {
    for (algorithm, name, digest) in [(0, "sha-256", 32), (1, "sha-512", 64)] {
        let (host, realm, page, recs) = attested(algorithm, 1);
        assert_eq!(call(&host, &recs[0], rsi::fid::MEASUREMENT_EXTEND, &[3, 8, 0x1234, 0]).0, SUCCESS);
        let token = whole(&host, &recs[0], page, &challenge(7));
        assert_eq!(token[..7], [0xD9, 0x01, 0x8F, 0xA2, 0x19, 0xAC, 0xCA]);
        let claims = verified(&token).expect("the token verifies");
        let bytes = |label| claim(&claims, label).unwrap().as_bytes().unwrap().clone();
        let labels: Vec<i128> = claims.iter().map(|(label, _)| *label).collect();
        assert_eq!(labels, [10, 44235, 44237, 44236, 44240, 265, 44238, 44239]);
        assert_eq!(bytes(10), challenge(7));
        let mut rpv = [0; 64];
        rpv[..2].copy_from_slice(&[0x22, 0x11]);
        assert_eq!(bytes(44235), rpv);
        assert_eq!(claim(&claims, 44236).unwrap().as_text(), Some(name));
        assert_eq!(claim(&claims, 44240).unwrap().as_text(), Some("sha-256"));
        assert_eq!(claim(&claims, 265).unwrap().as_text(), Some("tag:arm.com,2023:realm#1.0.0"));
        // The RD's measurement words.
        let rim = &bytes_of(&host, realm.rd)[256..256 + digest];
        assert_eq!(bytes(44238), rim);
        assert_ne!(rim, vec![0; digest]);
        let rems = claim(&claims, 44239).unwrap().as_array().unwrap();
        let mut extended = vec![0; digest];
        extended.extend(0x1234u64.to_le_bytes());
        let hash = if algorithm == 0 { &ring::digest::SHA256 } else { &ring::digest::SHA512 };
        let extended = ring::digest::digest(hash, &extended);
        let zero = vec![0; digest];
        let expected = [zero.as_slice(), &zero, extended.as_ref(), &zero];
        assert_eq!(rems.iter().map(|rem| rem.as_bytes().unwrap().as_slice()).collect::<Vec<_>>(), expected);
        // Canonical: what a CBOR library writes is the same.
        let again: Value = ciborium::from_reader(token.as_slice()).unwrap();
        assert_eq!(again.to_vec().unwrap(), token);
    }
}

#[test]
fn a_token_in_which_one_byte_is_changed_does_not_verify() {
    let (host, _, page, recs) = attested(0, 1);
    let mut token = whole(&host, &recs[0], page, &challenge(0));
    assert!(verified(&token).is_some());
    for at in 0..token.len() {
        token[at] ^= 1 << (at % 8);
        assert!(verified(&token).is_none(), "byte {at}");
        token[at] ^= 1 << (at % 8);
    }
    token.truncate(token.len() - 1);
    assert!(verified(&token).is_none());
}

#[test]
fn a_token_is_the_same_whatever_windows_it_is_taken_in() {
    let (host, _, page, recs) = attested(1, 1);
    let rec = &recs[0];
    let nonce = words(&challenge(1));
    let expected = whole(&host, rec, page, &challenge(1));
    for (offset, size) in [(0, 1), (4095, 1), (8, 256), (1001, 333), (96, 4000)] {
        call(&host, rec, INIT, &nonce);
        for word in host.rmm.platform().raw(page) {
            word.store(u64::MAX, Relaxed);
        }
        let (token, _) = collect(&host, rec, page, offset, size);
        assert_eq!(token, expected, "{offset} {size}");
        // Bytes outside of the window stay.
        let (from, to) = (usize::try_from(offset).unwrap(), usize::try_from(offset + size).unwrap());
        let bytes = bytes_of(&host, page);
        assert!(bytes[..from].iter().chain(&bytes[to..]).all(|byte| *byte == 0xFF));
    }
}

#[test]
fn interrupts_do_not_wait_for_a_signature_and_do_not_lose_one() {
    let (host, _, page, recs) = attested(0, 1);
    let expected = whole(&host, &recs[0], page, &challenge(2));
    host.rmm.platform().interrupts.store(true, Relaxed);
    call(&host, &recs[0], INIT, &words(&challenge(2)));
    let (token, calls) = collect(&host, &recs[0], page, 0, 4096);
    assert_eq!(token, expected);
    // One slice in each call: the digest, 24 of the multiplication, 6 of each inversion; the last one delivers
    // nothing, because an interrupt is pending then too.
    assert_eq!(calls, 38);
}

#[test]
fn the_state_machine_is_that_of_the_specification() {
    let (host, _, page, recs) = attested(0, 2);
    let [first, second] = &recs[..] else { panic!() };
    let go_on = |rec, args: [u64; 3]| call(&host, rec, CONTINUE, &args);
    let good = [BUFFER, 0, 4096];
    assert_eq!(go_on(first, good).0, STATE, "nothing has begun");
    assert_eq!(call(&host, first, INIT, &words(&challenge(3))).0, SUCCESS);
    assert_eq!(go_on(second, good).0, STATE, "each REC has its own");
    let bad: [[u64; 3]; 9] = [
        [BUFFER + 8, 0, 8],
        [SHARED, 0, 8],
        [!0xFFF, 0, 8],
        [BUFFER, 4096, 0],
        [BUFFER, u64::MAX, 1],
        [BUFFER, 1, u64::MAX],
        [BUFFER, 1, 4096],
        [BUFFER, 4095, 2],
        // RIPAS EMPTY.
        [BUFFER + 0x1000, 0, 4096],
    ];
    for args in bad {
        assert_eq!(go_on(first, args), (INPUT, 0), "{args:x?}");
    }
    for args in &bad[..8] {
        assert_eq!(go_on(second, *args), (INPUT, 0), "arguments come before the state");
    }
    assert_eq!(go_on(first, [BUFFER, 7, 0]), (INCOMPLETE, 0), "no room");
    let (status, len) = go_on(first, [BUFFER, 0, 100]);
    assert_eq!((status, len), (INCOMPLETE, 100));
    // A second INIT drops the first.
    assert_eq!(call(&host, first, INIT, &words(&challenge(4))).0, SUCCESS);
    let (token, _) = collect(&host, first, page, 0, 4096);
    let claims = verified(&token).unwrap();
    assert_eq!(claim(&claims, 10).unwrap().as_bytes().unwrap().as_slice(), challenge(4));
    assert_eq!(go_on(first, good).0, STATE, "a finished token is over");
    // Nothing of it is left in the REC, and nothing of it got into the host's memory.
    assert!(host.rmm.platform().raw(first.rec)[256..].iter().all(|word| word.load(Relaxed) == 0));
    // Two at once, of one Realm.
    call(&host, first, INIT, &words(&challenge(5)));
    call(&host, second, INIT, &words(&challenge(6)));
    for (rec, seed) in [(second, 6), (first, 5)] {
        let claims = verified(&collect(&host, rec, page, 0, 4096).0).unwrap();
        assert_eq!(claim(&claims, 10).unwrap().as_bytes().unwrap().as_slice(), challenge(seed));
    }
}

#[test]
fn measurements_are_those_of_the_beginning() {
    let (host, _, page, recs) = attested(0, 1);
    call(&host, &recs[0], INIT, &words(&challenge(0)));
    assert_eq!(call(&host, &recs[0], rsi::fid::MEASUREMENT_EXTEND, &[1, 8, 1, 0]).0, SUCCESS);
    let claims = verified(&collect(&host, &recs[0], page, 0, 4096).0).unwrap();
    let rems = claim(&claims, 44239).unwrap().as_array().unwrap();
    assert_eq!(rems[0].as_bytes().unwrap(), &vec![0; 32]);
}

#[test]
fn a_page_that_is_not_there_is_asked_for_and_the_call_is_repeated() {
    let (host, realm, page, recs) = attested(0, 1);
    let rec = &recs[0];
    let expected = whole(&host, rec, page, &challenge(9));
    for (destroyed, ripas) in [(false, Ripas::Ram), (true, Ripas::Destroyed)] {
        call(&host, rec, INIT, &words(&challenge(9)));
        let buffer = if destroyed {
            host.ok(fid::DATA_DESTROY, &[realm.rd, BUFFER]);
            BUFFER
        } else {
            // RAM without a page: the page above the buffer, after the Realm asked for it.
            host.guest_smc(rsi::fid::IPA_STATE_SET, &[BUFFER + 0x1000, BUFFER + 0x2000, 1, 0]);
            host.enter_ok(rec);
            host.ok(fid::RTT_SET_RIPAS, &[realm.rd, rec.rec, BUFFER + 0x1000, BUFFER + 0x2000]);
            BUFFER + 0x1000
        };
        assert_eq!(host.read_entry(&realm, buffer, 3)[3], ripas as u64);
        host.guest_smc(CONTINUE, &[buffer, 0, 4096]);
        let exit = host.enter_ok(rec);
        assert_eq!((exit.exit_reason, exit.esr, exit.hpfar), (0, 0x9000_0007 & !(1 << 25), buffer >> 8));
        assert_eq!((exit.far, exit.gprs), (0, [0; 31]));
        if !destroyed {
            // The host provides it; the Realm's SMC runs again.
            let data = host.delegated();
            host.ok(fid::DATA_CREATE_UNKNOWN, &[realm.rd, data, buffer]);
            host.guest_smc(CONTINUE, &[buffer, 0, 4096]);
            let (len, to) = (expected.len(), Arc::new(Mutex::new((9, 9))));
            let result = to.clone();
            host.guest(move |ctx| {
                *result.lock().unwrap() = (ctx.gpr(0), ctx.gpr(1));
                RealmExit::Irq
            });
            host.enter_ok(rec);
            assert_eq!(*to.lock().unwrap(), (SUCCESS, len as u64));
            assert_eq!(bytes_of(&host, data)[..len], expected);
        }
    }
}

#[test]
fn without_a_key_generation_fails_but_nothing_else() {
    let host = Host::new();
    let (_, rec) = host.active();
    assert_eq!(call(&host, &rec, CONTINUE, &[0, 0, 4096]).0, STATE);
    assert_eq!(call(&host, &rec, CONTINUE, &[0, 1, u64::MAX]).0, INPUT);
    assert_eq!(call(&host, &rec, INIT, &[1, 2, 3, 4, 5, 6, 7, 8]).0, SUCCESS);
    assert_eq!(call(&host, &rec, CONTINUE, &[0, 0, 4096]).0, UNKNOWN);
    assert!(!host.rmm.platform().interrupt_pending());
}
