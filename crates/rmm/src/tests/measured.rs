//! The Realm Initial Measurement against an independent computation with `sha2`.

use core::sync::atomic::Ordering::Relaxed;
use std::vec::Vec;

use cca_abi::rmi::fid;
use cca_abi::rsi;
use sha2::{Digest, Sha256, Sha512};

use super::host::{Host, TestRealm, WIDTH};
use super::std;
use crate::platform::RealmExit;

/// SHA-256 (0) or SHA-512 (1), padded to 64 bytes.
fn hash(algorithm: u64, bytes: &[u8]) -> [u8; 64] {
    let mut out = [0u8; 64];
    if algorithm == 0 {
        out[..32].copy_from_slice(&Sha256::digest(bytes));
    } else {
        out.copy_from_slice(&Sha512::digest(bytes));
    }
    out
}

fn put(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

fn descriptor(kind: u8, rim: &[u8; 64]) -> [u8; 256] {
    let mut bytes = [0u8; 256];
    bytes[0] = kind;
    put(&mut bytes, 8, 0x100);
    bytes[0x10..0x50].copy_from_slice(rim);
    bytes
}

fn rim_of(host: &Host, realm: &TestRealm) -> [u8; 64] {
    let words: Vec<u8> = host.rmm.platform().raw(realm.rd)[32..40]
        .iter()
        .flat_map(|word| word.load(Relaxed).to_le_bytes())
        .collect();
    words.try_into().unwrap()
}

fn whole_history(algorithm: u64, accelerated: bool) {
    let host = Host::new();
    host.rmm.platform().accelerated.store(accelerated, Relaxed);
    let realm = host.realm_with(algorithm, 3);
    let mut params = [0u8; 4096];
    put(&mut params, 0x8, WIDTH);
    put(&mut params, 0x18, 5);
    put(&mut params, 0x20, 3);
    put(&mut params, 0x30, algorithm);
    let mut rim = hash(algorithm, &params);
    assert_eq!(rim_of(&host, &realm), rim, "REALM_CREATE");

    // Two entries of 1 GiB.
    host.ok(fid::RTT_INIT_RIPAS, &[realm.rd, 0, 0x8000_0000]);
    for base in [0u64, 0x4000_0000] {
        let mut desc = descriptor(2, &rim);
        put(&mut desc, 0x50, base);
        put(&mut desc, 0x58, base + 0x4000_0000);
        rim = hash(algorithm, &desc);
    }
    assert_eq!(rim_of(&host, &realm), rim, "RTT_INIT_RIPAS");

    host.tables(&realm, 0x3000, 3);
    let src = host.alloc();
    let content: Vec<u8> = (0..4096u32).map(|n| u8::try_from(n * 7 % 251).unwrap()).collect();
    host.write_ns(src, &content);
    for (ipa, flags) in [(0x3000u64, 1u64), (0x4000, 0)] {
        host.ok(fid::DATA_CREATE, &[realm.rd, host.delegated(), ipa, src, flags]);
        let mut desc = descriptor(0, &rim);
        put(&mut desc, 0x50, ipa);
        put(&mut desc, 0x58, flags);
        if flags == 1 {
            desc[0x60..0xA0].copy_from_slice(&hash(algorithm, &content));
        }
        rim = hash(algorithm, &desc);
        assert_eq!(rim_of(&host, &realm), rim, "DATA_CREATE");
    }

    host.rec(&realm, 0, true);
    let mut measured = [0u8; 4096];
    put(&mut measured, 0, 1);
    put(&mut measured, 0x200, 0x1000);
    put(&mut measured, 0x300, 0xA0);
    put(&mut measured, 0x338, 0xA7);
    let mut desc = descriptor(1, &rim);
    desc[0x50..0x90].copy_from_slice(&hash(algorithm, &measured));
    rim = hash(algorithm, &desc);
    assert_eq!(rim_of(&host, &realm), rim, "REC_CREATE");

    // None of these is measured.
    host.rec(&realm, 1, false);
    host.ok(fid::DATA_CREATE_UNKNOWN, &[realm.rd, host.delegated(), 0x5000]);
    host.activate(&realm);
    assert_eq!(rim_of(&host, &realm), rim);
}

#[test]
fn the_rim_is_the_hash_of_the_history_with_sha_256() {
    whole_history(0, false);
}

#[test]
fn accelerated_hashes_give_the_same_rim() {
    whole_history(0, true);
    whole_history(1, true);
}

#[test]
fn the_rim_is_the_hash_of_the_history_with_sha_512() {
    whole_history(1, false);
}

#[test]
fn a_failed_command_does_not_change_the_rim() {
    let host = Host::new();
    let realm = host.realm();
    let rim = rim_of(&host, &realm);
    let src = host.alloc();
    host.registers(fid::DATA_CREATE, &[realm.rd, host.delegated(), 0, src, 1]);
    host.registers(fid::RTT_INIT_RIPAS, &[realm.rd, 0, 0x1000]);
    assert_eq!(rim_of(&host, &realm), rim);
}

#[test]
fn a_realm_reads_and_extends_its_measurements() {
    for algorithm in [0, 1] {
        let digest = if algorithm == 0 { 32 } else { 64 };
        let host = Host::new();
        let realm = host.realm_with(algorithm, 3);
        let rec = host.rec(&realm, 0, true);
        host.activate(&realm);
        let rim = rim_of(&host, &realm);
        host.guest_smc(rsi::fid::MEASUREMENT_READ, &[0]);
        host.guest(move |ctx| {
            assert_eq!(ctx.gpr(0), 0);
            for n in 0..8 {
                assert_eq!(ctx.gpr(n + 1).to_le_bytes(), rim[8 * n..8 * n + 8]);
            }
            RealmExit::Irq
        });
        host.enter_ok(&rec);

        let mut expected = [0u8; 64];
        for (size, value) in [(5usize, 0x1122_3344_5566_7788u64), (0, 0), (64, 99)] {
            host.guest_smc(rsi::fid::MEASUREMENT_EXTEND, &[2, size as u64, value, 0, 0, 0, 0, 0, 0, 0]);
            let mut data = [0u8; 64];
            put(&mut data, 0, value);
            let message = [&expected[..digest], &data[..size]].concat();
            expected = hash(algorithm, &message);
            host.guest_smc(rsi::fid::MEASUREMENT_READ, &[2]);
            host.guest(move |ctx| {
                for n in 0..8 {
                    assert_eq!(ctx.gpr(n + 1).to_le_bytes(), expected[8 * n..8 * n + 8]);
                }
                RealmExit::Irq
            });
            host.enter_ok(&rec);
        }
        for bad in [[0u64, 1], [5, 1], [1, 65], [u64::MAX, 1], [1, u64::MAX]] {
            host.guest_smc(rsi::fid::MEASUREMENT_EXTEND, &bad);
            host.guest(|ctx| {
                assert_eq!(ctx.gpr(0), 1);
                RealmExit::Irq
            });
            host.enter_ok(&rec);
        }
    }
}
