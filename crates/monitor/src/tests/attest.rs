use std::vec::Vec;

use cca_abi::rmm_el3::{Status, fid};
use p384::ecdsa::signature::Verifier;
use p384::ecdsa::{Signature, SigningKey, VerifyingKey};

use super::machine::{Machine, SHARED_PAGE, monitor};
use crate::attest::{Measured, TOKEN_MAX, platform_public_key, platform_token, realm_key};
use crate::{Monitor, Regs, World};

/// Splits what starts with a CBOR head: major type, value, rest.
fn head(bytes: &[u8]) -> (u8, usize, &[u8]) {
    let (first, rest) = bytes.split_first().unwrap();
    let (major, low) = (first >> 5, usize::from(first & 0x1F));
    match low {
        24 => (major, usize::from(rest[0]), &rest[1..]),
        25 => (major, usize::from(u16::from_be_bytes([rest[0], rest[1]])), &rest[2..]),
        _ => (major, low, rest),
    }
}

fn bstr(bytes: &[u8]) -> (&[u8], &[u8]) {
    let (major, len, rest) = head(bytes);
    assert_eq!(major, 2);
    rest.split_at(len)
}

#[test]
fn the_platform_token_verifies_and_carries_the_challenge() {
    for size in [32, 48, 64] {
        let challenge = [0x5A; 64];
        let measured = Measured { monitor: [1; 32], rmm: [2; 32] };
        let mut token = [0; TOKEN_MAX];
        let len = platform_token(&measured, &challenge[..size], &mut token).unwrap();
        let token = &token[..len];
        assert_eq!(token[..2], [0xD2, 0x84]);
        let (protected, rest) = bstr(&token[2..]);
        assert_eq!((protected, rest[0]), (&[0xA1, 1, 0x38, 0x22][..], 0xA0));
        let (payload, rest) = bstr(&rest[1..]);
        let (signature, rest) = bstr(rest);
        assert!(rest.is_empty());

        let mut signed = b"\x84\x6ASignature1\x44\xA1\x01\x38\x22\x40\x59".to_vec();
        signed.extend(u16::try_from(payload.len()).unwrap().to_be_bytes());
        signed.extend(payload);
        let key = VerifyingKey::from_sec1_bytes(&platform_public_key()).unwrap();
        key.verify(&signed, &Signature::from_slice(signature).unwrap()).unwrap();

        assert_eq!(payload[0], 0xA8, "eight claims");
        let mut claim = std::vec![0x0A, 0x58, size as u8];
        claim.extend(&challenge[..size]);
        assert!(payload.windows(claim.len()).any(|w| w == claim));
        assert!(payload.windows(32).any(|w| w == [2; 32]));
    }
}

#[test]
fn each_rmm_has_its_own_realm_key() {
    let key = realm_key(&[1; 32]);
    assert_eq!(key, realm_key(&[1; 32]));
    assert_ne!(key, realm_key(&[2; 32]));
    assert!(SigningKey::from_slice(&key).is_ok());
}

fn service(monitor: &Monitor, machine: &Machine, args: [u64; 4]) -> Regs {
    let mut regs: Regs = [0; 31];
    regs[..4].copy_from_slice(&args);
    monitor.handle_smc(machine, 0, World::Realm, &mut regs);
    regs
}

#[test]
fn the_token_comes_in_pieces_of_the_size_that_the_rmm_has_room_for() {
    let (machine, monitor) = monitor(1, crate::Interface::V2_0);
    let token_call = |room, challenge| {
        service(&monitor, &machine, [fid::ATTEST_GET_PLAT_TOKEN, SHARED_PAGE, room, challenge])
    };
    machine.page.lock().unwrap()[..32].fill(7);
    let whole = token_call(4096, 32);
    assert_eq!((whole[0], whole[2]), (0, 0));
    let expected = machine.page.lock().unwrap()[..usize::try_from(whole[1]).unwrap()].to_vec();

    machine.page.lock().unwrap()[..32].fill(7);
    let mut regs = token_call(100, 32);
    let mut token: Vec<u8> = Vec::new();
    loop {
        assert_eq!(regs[0], 0);
        token.extend_from_slice(&machine.page.lock().unwrap()[..usize::try_from(regs[1]).unwrap()]);
        assert_eq!(usize::try_from(regs[2]).unwrap(), expected.len() - token.len());
        if regs[2] == 0 {
            break;
        }
        regs = token_call(100, 0);
    }
    assert_eq!(token, expected);
    assert_eq!(token_call(100, 0)[0], Status::Invalid.to_register());
}

#[test]
fn buffers_outside_of_the_shared_page_are_refused() {
    let (machine, monitor) = monitor(1, crate::Interface::V2_0);
    for call in [fid::ATTEST_GET_REALM_KEY, fid::ATTEST_GET_PLAT_TOKEN] {
        let status = |pa, size| service(&monitor, &machine, [call, pa, size, 0])[0];
        for pa in [SHARED_PAGE - 1, SHARED_PAGE + 4096, 0, u64::MAX] {
            assert_eq!(status(pa, 64), Status::BadAddress.to_register(), "{pa:#x}");
        }
        for (pa, size) in
            [(SHARED_PAGE, 0), (SHARED_PAGE, 4097), (SHARED_PAGE + 4000, 97), (SHARED_PAGE, u64::MAX)]
        {
            assert_eq!(status(pa, size), Status::Invalid.to_register(), "{pa:#x} {size:#x}");
        }
    }
    let key = service(&monitor, &machine, [fid::ATTEST_GET_REALM_KEY, SHARED_PAGE, 4096, 0]);
    assert_eq!(key[..2], [0, 48]);
    assert_eq!(machine.page.lock().unwrap()[..48], realm_key(&[0; 32]));
    assert_eq!(
        service(&monitor, &machine, [fid::ATTEST_GET_REALM_KEY, SHARED_PAGE, 4096, 1])[0],
        Status::Invalid.to_register()
    );
}
