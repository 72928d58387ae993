//! `realm verify`, and the round trip of `realm run --attest`.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use attest::root::Root;
use attest::{Policy, Report, text};

use crate::args::{RunArgs, VerifyArgs};
use crate::run::manifest::Manifest;
use crate::ui;

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
    Ok(if report.verified { 0 } else { NOT_VERIFIED })
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
fn roots(files: &[PathBuf]) -> Result<Vec<Root>> {
    if files.is_empty() {
        return Ok(vec![Root::development().context("the development root is no key")?]);
    }
    let key = |path: &PathBuf| {
        let name = path.display().to_string();
        Root::from_file(&name, &read(path)?).with_context(|| format!("{name} holds no P-384 public key"))
    };
    files.iter().map(key).collect()
}

/// `realm run --attest`: starts the Realm in which this command without `--attest` would run, has it report with a
/// fresh nonce, and verifies: that the Realm is the one that the launch manifest describes, too.
pub(crate) fn round_trip(run: &RunArgs) -> Result<u8> {
    let mut nonce = [0; 32];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut nonce)?;
    let nonce = text::hex(&nonce);
    let words = std::env::args_os().skip(1).filter(|word| word != "--attest");
    let own = std::env::temp_dir().join(format!("realm-manifest-{nonce}.json"));
    let path = run.manifest.clone().unwrap_or_else(|| own.clone());
    let mut command = Command::new(std::env::current_exe()?);
    command.args(words);
    if run.manifest.is_none() {
        command.arg("--manifest").arg(&own);
    }
    let output = command
        .args(["--exec", &format!("realm report --nonce hex:{nonce}")])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()?;
    match output.status.code().and_then(|status| u8::try_from(status).ok()) {
        Some(0) => {}
        Some(status) => {
            ui::say(&format!("the Realm gave no token (status {status})"));
            return Ok(status);
        }
        None => bail!("the Realm's run ended with {}", output.status),
    }
    let challenge = text::sixty_four(&format!("hex:{nonce}")).map_err(|error| anyhow!(error))?;
    let manifest = Manifest::read(&path);
    let _ = std::fs::remove_file(&own);
    let policy = Policy {
        roots: roots(&[])?,
        challenge: Some(challenge.to_vec()),
        rim: Some(manifest?.measure()?.value().to_vec()),
        personalization_value: Some(run.realm.personalization.map_or(vec![0; 64], |value| value.0.to_vec())),
        ..Policy::default()
    };
    finish(&attest::verify(&text::token_bytes(&output.stdout), &policy), false)
}

/// What `realm test` wants of a token of a stock guest: everything holds, and nothing holds for anybody else's nonce.
/// The RMM that the platform vouches for is the one in `rmm`.
pub(crate) fn check_stock_guest(base64: &str, nonce: &str, rmm: &Path) -> Result<()> {
    let rmm = attest::measure::sha256(&read(rmm)?);
    let challenge = |nonce: &str| text::sixty_four(nonce).map(|bytes| bytes.to_vec()).ok();
    let mut policy = Policy {
        roots: roots(&[])?,
        challenge: challenge(nonce),
        personalization_value: Some(vec![0; 64]),
        software: vec![("rmm".into(), rmm.to_vec())],
        ..Policy::default()
    };
    let token = text::token_bytes(base64.as_bytes());
    let report = attest::verify(&token, &policy);
    ensure!(report.verified, "{report}");
    let rim = report.realm.context("no claims")?.initial_measurement.0;
    ensure!(rim.iter().any(|byte| *byte != 0), "the initial measurement is zero");
    policy.challenge = challenge("another nonce");
    let report = attest::verify(&token, &policy);
    let failures: Vec<&str> = report.failures().map(|check| check.name).collect();
    ensure!(failures == ["challenge"], "with another nonce these checks fail: {failures:?}");

    // The command says the same.
    let file = std::env::temp_dir().join(format!("realm-token-{}", std::process::id()));
    std::fs::write(&file, &token)?;
    let status = |nonce: &str| -> Result<Option<i32>> {
        let mut verify = Command::new(std::env::current_exe()?);
        verify.arg("verify").arg(&file).args(["--nonce", nonce, "--rim", &text::hex(&rim)]);
        Ok(verify.output()?.status.code())
    };
    let statuses = (status(nonce), status("another nonce"));
    std::fs::remove_file(&file)?;
    let statuses = (statuses.0?, statuses.1?);
    ensure!(statuses == (Some(0), Some(1)), "`realm verify` ended with {statuses:?}");
    Ok(())
}
