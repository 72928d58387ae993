//! `realm verify`: holds a token against what somebody expects.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow};
use attest::root::Root;
use attest::{Policy, Report, text};

use crate::args::VerifyArgs;
use crate::run::manifest::Manifest;

/// The exit status of a token that does not verify.
const NOT_VERIFIED: u8 = 1;

/// `realm verify`.
pub(crate) fn run(args: &VerifyArgs) -> Result<u8> {
    let mut file = Vec::new();
    if args.token.as_os_str() == "-" {
        std::io::stdin().lock().read_to_end(&mut file)?;
    } else {
        file = read(&args.token)?;
    }
    let report = attest::verify(&text::token_bytes(&file), &policy(args)?);
    finish(&report, args.json)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn finish(report: &Report, json: bool) -> Result<u8> {
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(report)?)?;
    } else {
        writeln!(out, "{report}")?;
    }
    Ok(status(report))
}

/// The exit status that tells a report's verdict.
pub(crate) fn status(report: &Report) -> u8 {
    if report.verified { 0 } else { NOT_VERIFIED }
}

fn digest(digits: &str) -> Result<Vec<u8>> {
    text::unhex(digits).with_context(|| format!("{digits:?} is no hexadecimal number"))
}

fn policy(args: &VerifyArgs) -> Result<Policy> {
    let sixty_four = |text: &Option<String>| -> Result<Option<Vec<u8>>> {
        let bytes = text.as_deref().map(text::sixty_four).transpose().map_err(|error| anyhow!(error))?;
        Ok(bytes.map(|bytes| bytes.to_vec()))
    };
    let mut policy = Policy {
        roots: roots(&args.platform_keys)?,
        challenge: sixty_four(&args.nonce)?,
        rim: args.rim.as_deref().map(digest).transpose()?,
        personalization_value: sixty_four(&args.rpv)?,
        any_lifecycle: args.any_lifecycle,
        ..Policy::default()
    };
    if let Some(path) = &args.manifest {
        let manifest = Manifest::read(path)?;
        policy.rim = Some(manifest.measure()?.value().to_vec());
        if policy.personalization_value.is_none() {
            policy.personalization_value = Some(manifest.personalization()?);
        }
    }
    for rem in &args.rems {
        let (index, value) = rem.split_once('=').with_context(|| format!("--rem {rem}: no INDEX=HEX"))?;
        let slot = index.parse().ok().and_then(|index: usize| policy.rems.get_mut(index));
        *slot.with_context(|| format!("--rem {rem}: indices are 0 to 3"))? = Some(digest(value)?);
    }
    for software in &args.software {
        let (name, value) =
            software.split_once('=').with_context(|| format!("--software {software}: no NAME=HEX"))?;
        policy.software.push((name.to_owned(), digest(value)?));
    }
    Ok(policy)
}

/// The keys in these files; the development root if there are none.
pub(crate) fn roots(files: &[PathBuf]) -> Result<Vec<Root>> {
    if files.is_empty() {
        return Ok(vec![Root::development().context("the development root is no key")?]);
    }
    let key = |path: &PathBuf| {
        let name = path.display().to_string();
        Root::from_file(&name, &read(path)?).with_context(|| format!("{name} holds no P-384 public key"))
    };
    files.iter().map(key).collect()
}
