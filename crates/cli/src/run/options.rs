//! From the command line's words to what a run needs.

use anyhow::{Context as _, Result};
use cca_abi::kvm::rme;
use vmm::machine::RealmOptions;
use vmm::seccomp::Confinement;

use super::RunOptions;
use crate::args::{Personalization, RunArgs};

/// Fills in what the user did not say.
pub(crate) fn from_args(args: &RunArgs) -> Result<RunOptions> {
    let defaults = RunOptions::default();
    let device = match (&args.device, args.plain) {
        (Some(device), _) => device.clone(),
        (None, true) => "/dev/kvm".into(),
        (None, false) => defaults.device,
    };
    let realm = RealmOptions::default();
    let realm = RealmOptions {
        hash: match args.realm.hash.as_deref() {
            Some("sha512") => rme::HASH_SHA512,
            _ => rme::HASH_SHA256,
        },
        personalization: args.realm.personalization.map_or([0; 64], |value| value.0),
        sve_bits: args.realm.sve,
        pmu_counters: args.realm.pmu,
        breakpoints: args.realm.breakpoints.unwrap_or(realm.breakpoints),
        watchpoints: args.realm.watchpoints.unwrap_or(realm.watchpoints),
    };
    realm.check()?;
    args.nets.check().map_err(anyhow::Error::msg)?;
    Ok(RunOptions {
        device,
        kernel: args.kernel.clone().unwrap_or(defaults.kernel),
        initrd: args.initrd.clone().or(defaults.initrd),
        cmdline: args.cmdline.clone(),
        memory_mib: args.memory.unwrap_or(defaults.memory_mib),
        cpus: args.cpus.unwrap_or(defaults.cpus),
        exec: args.exec.clone(),
        events_fd: args.events_fd,
        verdict_fd: args.verdict_fd,
        console_log: args.console_log.clone(),
        verbose: args.verbose,
        plain: args.plain,
        disks: args.disks.clone(),
        nets: args.nets.clone(),
        shares: args.shares.clone(),
        realm,
        ipa_bits: args.realm.ipa_bits,
        launch: args.launch.clone(),
        json: args.json.clone(),
        confinement: if args.no_seccomp { Confinement::Off } else { Confinement::On },
        life: args.life.clone(),
    })
}

/// Parses a personalization value; shorter ones are padded with zeroes on the right.
pub(crate) fn personalization(text: &str) -> Result<Personalization, String> {
    let bytes = match text.split_once(':') {
        Some(("text", words)) => words.as_bytes().to_vec(),
        Some(("hex", digits)) => hex(digits).ok_or("these are no hexadecimal digits")?,
        Some(("base64", digits)) => base64(digits).ok_or("this is no base64")?,
        Some(("file", path)) => std::fs::read(path)
            .with_context(|| format!("cannot read {path}"))
            .map_err(|e| format!("{e:#}"))?,
        _ => return Err("text:WORDS, hex:DIGITS, base64:DIGITS or file:PATH is expected".into()),
    };
    let mut value = [0; 64];
    let place = value.get_mut(..bytes.len()).ok_or("it is longer than 64 bytes")?;
    place.copy_from_slice(&bytes);
    Ok(Personalization(value))
}

/// Bytes from hexadecimal digits.
pub(crate) fn hex(digits: &str) -> Option<Vec<u8>> {
    if digits.len() % 2 != 0 || !digits.is_ascii() {
        return None;
    }
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).ok()).collect()
}

/// Hexadecimal digits of bytes.
pub(crate) fn to_hex(bytes: &[u8]) -> String {
    let digit = |nibble: u8| char::from_digit(u32::from(nibble), 16).unwrap_or('0');
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 0xf)]).collect()
}

fn base64(digits: &str) -> Option<Vec<u8>> {
    let digits = digits.trim_end_matches('=');
    let mut bytes = Vec::new();
    let (mut group, mut bits) = (0u32, 0);
    for digit in digits.bytes() {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' | b'-' => 62,
            b'/' | b'_' => 63,
            _ => return None,
        };
        group = group << 6 | u32::from(value);
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push(u8::try_from(group >> bits & 0xff).ok()?);
            group &= (1 << bits) - 1;
        }
    }
    (group == 0 && digits.len() % 4 != 1).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_personalization_value_comes_in_four_spellings() {
        let mut expected = [0; 64];
        expected[..5].copy_from_slice(b"hello");
        let file = std::env::temp_dir().join(format!("realm-rpv-{}", std::process::id()));
        std::fs::write(&file, "hello").unwrap();
        let file_value = format!("file:{}", file.display());
        for text in ["text:hello", "hex:68656c6c6f", "base64:aGVsbG8=", "base64:aGVsbG8", &file_value] {
            assert_eq!(personalization(text).unwrap().0, expected, "{text}");
        }
        std::fs::remove_file(file).unwrap();
        for wrong in
            ["hello", "hex:6", "hex:6x", "hex:ä", "base64:a", "base64:%%%%", "file:/none", "number:1"]
        {
            assert!(personalization(wrong).is_err(), "{wrong}");
        }
        assert!(personalization(&format!("text:{}", "x".repeat(64))).is_ok());
        assert!(personalization(&format!("text:{}", "x".repeat(65))).is_err());
    }
}
