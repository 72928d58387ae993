//! Whether the Realm that runs is the one that was to be launched: the measurement that its launch manifest predicts
//! against the one that its attestation token carries.
//!
//! No RMI call tells a host the measurement, so the token, which the guest's init fetches, is the only witness.
//! The prediction is made in a thread of its own while the machine boots.

use std::fmt;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result, anyhow, ensure};
use attest::{Outcome, Policy, Report, text};
use clap::Args;

use super::manifest::Manifest;
use crate::ui;

/// What of `realm run` is about the measurement.
#[derive(Args, Debug, Clone, Default)]
#[command(next_help_heading = "Measurement")]
pub(crate) struct LaunchArgs {
    /// Have the Realm report with a fresh nonce, verify its token against the launch manifest, and print what it says: no
    /// shell, no command. The status is 0 if everything holds and 1 if not
    #[arg(long, conflicts_with_all = ["exec", "plain", "dry_run"])]
    pub(crate) attest: bool,
    /// Fail also if the Realm gives no token. Without this flag, too, a run ends if its token does not have the measurement
    /// that the launch manifest predicts
    #[arg(long, conflicts_with = "plain")]
    pub(crate) check: bool,
    /// Ask the Realm for no token, and compare nothing: on an emulated machine a token takes a second or two
    #[arg(long, conflicts_with_all = ["check", "expect", "attest"])]
    pub(crate) no_check: bool,
    /// Launch only what has this measurement, given as a launch manifest or in hexadecimal digits; includes --check
    #[arg(long, value_name = "MANIFEST|HEX", conflicts_with = "plain", value_parser = expected)]
    pub(crate) expect: Option<Expected>,
    /// Write the launch manifest to FILE: everything that enters the Realm's initial measurement
    #[arg(long, value_name = "FILE")]
    pub(crate) manifest: Option<PathBuf>,
    /// Start nothing: write the launch manifest (to stdout without --manifest) and print the measurement it predicts
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Give the guest this device tree instead of our own: one that another tool has generated for kvmtool's machine, and
    /// measured
    #[arg(long, value_name = "FILE")]
    pub(crate) dtb: Option<PathBuf>,
    /// Fetch a token for this nonce, pass it on as an event, and leave the verdict to whoever gets it
    #[arg(long, value_name = "HEX", hide = true, requires_all = ["events_fd", "verdict_fd"])]
    pub(crate) report: Option<String>,
}

/// A measurement that somebody insists on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Expected {
    /// Where it comes from.
    pub(crate) source: String,
    /// Its bytes.
    pub(crate) rim: Vec<u8>,
}

/// Digits, if they are as long as a measurement; else a manifest's file.
pub(crate) fn expected(text: &str) -> Result<Expected, String> {
    let rim = match text::unhex(text).filter(|bytes| [32, 64].contains(&bytes.len())) {
        Some(rim) => rim,
        None => Manifest::read(Path::new(text))
            .and_then(|manifest| Ok(manifest.measure()?.value().to_vec()))
            .map_err(|error| format!("{error:#}"))?,
    };
    Ok(Expected { source: text.to_owned(), rim })
}

impl LaunchArgs {
    /// Whether the Realm is asked for a token.
    pub(crate) fn wants_token(&self) -> bool {
        !self.no_check
    }

    /// Whether a Realm without a token is a failure.
    pub(crate) fn insists(&self) -> bool {
        self.attest || self.check || self.expect.is_some()
    }
}

/// What is predicted of a token.
#[derive(Debug)]
pub(crate) struct Predicted {
    /// The initial measurement.
    rim: Vec<u8>,
    /// The personalization value.
    personalization: Vec<u8>,
}

/// A launch manifest that is being made. Of it only what a token is held against is kept: it has a digest of every page.
#[derive(Debug)]
pub(crate) struct Prediction {
    thread: Mutex<Option<JoinHandle<Result<Predicted>>>>,
    result: OnceLock<Result<Predicted, String>>,
}

impl Prediction {
    /// Makes a manifest in a thread of its own, and writes it to these files.
    pub(crate) fn start(
        make: impl FnOnce() -> Result<Manifest> + Send + 'static,
        files: Vec<PathBuf>,
    ) -> Result<Self> {
        let work = move || {
            let manifest = make()?;
            files.iter().try_for_each(|file| manifest.write(file))?;
            let rim = manifest.measure()?.value().to_vec();
            Ok(Predicted { rim, personalization: manifest.personalization()? })
        };
        let thread = std::thread::Builder::new().name("manifest".into()).spawn(work)?;
        Ok(Self { thread: Mutex::new(Some(thread)), result: OnceLock::new() })
    }

    /// What the manifest predicts, as soon as it is there.
    pub(crate) fn get(&self) -> Result<&Predicted> {
        let result = self.result.get_or_init(|| {
            let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
            let made = thread
                .ok_or_else(|| anyhow!("nobody makes it"))
                .and_then(|thread| thread.join().unwrap_or_else(|_| Err(anyhow!("its thread panicked"))));
            made.map_err(|error| format!("the launch manifest: {error:#}"))
        });
        result.as_ref().map_err(|error| anyhow!("{error}"))
    }
}

/// What a Realm's token is held against.
#[derive(Debug)]
pub(crate) struct Check {
    prediction: Prediction,
    args: LaunchArgs,
    nonce: String,
    /// Measurements of software that the platform has to vouch for, by name.
    software: Vec<(String, Vec<u8>)>,
    report: OnceLock<Report>,
}

/// The check of a token's initial measurement.
const RIM: &str = "initial-measurement";

/// How the Realm's answer is to be taken.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is the Realm that was to be launched, or that was not asked for.
    Go {
        /// What to say, if anything.
        say: String,
        /// Its initial measurement, if it is the predicted one.
        measured: Option<String>,
    },
    /// It is not.
    Stop(String),
}

impl Check {
    /// Gets ready for a token that is still to come.
    pub(crate) fn new(args: &LaunchArgs, prediction: Prediction) -> Result<Self> {
        let mut nonce = [0; 32];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut nonce)?;
        let (args, nonce) = (args.clone(), text::hex(&nonce));
        let check = Self { prediction, args, nonce, software: Vec::new(), report: OnceLock::new() };
        if check.args.expect.is_some() {
            check.agrees()?;
        }
        Ok(check)
    }

    /// Has the platform vouch for this RMM, too.
    pub(crate) fn with_rmm(mut self, image: &[u8]) -> Self {
        self.software.push(("rmm".to_owned(), attest::measure::sha256(image).to_vec()));
        self
    }

    /// What the token has to carry, in hexadecimal digits.
    pub(crate) fn nonce(&self) -> &str {
        &self.nonce
    }

    /// Fails if what is about to be launched is not what the user insists on.
    fn agrees(&self) -> Result<()> {
        agree(self.args.expect.as_ref(), &self.prediction.get()?.rim)
    }

    /// Judges what the guest's init answered: a token in base64, or why there is none.
    pub(crate) fn judge(&self, answer: Result<&str, &str>) -> Verdict {
        let token = match answer {
            Ok(token) => token,
            Err(why) if self.args.insists() => {
                return Verdict::Stop(format!("it gave no attestation token: {why}"));
            }
            Err(why) => {
                let say = format!("the Realm's measurement was not compared: {why}");
                return Verdict::Go { say, measured: None };
            }
        };
        let report = match self.policy() {
            Ok(policy) => attest::verify(&text::token_bytes(token.as_bytes()), &policy),
            Err(error) => return Verdict::Stop(format!("{error:#}")),
        };
        // Other machines have other roots of trust; the Realm on them may be the right one.
        let compared =
            report.checks.iter().any(|check| check.name == RIM && check.outcome == Outcome::Passed);
        let foreign = report.failures().all(|check| check.name.starts_with("platform-"));
        let right = compared && foreign && !self.args.insists();
        let rim = report.realm.as_ref().map(|claims| claims.initial_measurement.to_string());
        let measured = rim.filter(|_| compared);
        let say = format!("the Realm measures {}, as predicted", measured.as_deref().unwrap_or_default());
        let verdict = if report.verified {
            Verdict::Go { say, measured }
        } else if self.args.attest {
            Verdict::Go { say: String::new(), measured }
        } else if right {
            let say = format!("{say}; nobody vouches for its platform: {}", Failures(&report));
            Verdict::Go { say, measured }
        } else {
            Verdict::Stop(format!("this is not the Realm that was to be launched: {}", Failures(&report)))
        };
        let _ = self.report.set(report);
        verdict
    }

    /// What is expected of the token.
    fn policy(&self) -> Result<Policy> {
        let challenge = text::sixty_four(&format!("hex:{}", self.nonce)).map_err(|error| anyhow!(error))?;
        let predicted = self.prediction.get()?;
        Ok(Policy {
            roots: crate::verify::roots(&[])?,
            challenge: Some(challenge.to_vec()),
            rim: Some(predicted.rim.clone()),
            personalization_value: Some(predicted.personalization.clone()),
            software: self.software.clone(),
            ..Policy::default()
        })
    }

    /// The measurements for a report that programs read: predicted, and what the token said if there was one.
    pub(crate) fn json(&self) -> serde_json::Value {
        let predicted = self.prediction.get().map(|predicted| text::hex(&predicted.rim)).ok();
        let claims = self.report.get().and_then(|report| report.realm.as_ref());
        let actual = claims.map(|claims| claims.initial_measurement.to_string());
        serde_json::json!({
            "predicted": predicted, "actual": actual, "nonce": self.nonce, "report": self.report.get(),
        })
    }

    /// The end of `--attest`: prints the report, for people unless they asked for JSON, and gives the status.
    pub(crate) fn finish(&self, quiet: bool) -> Result<u8> {
        let report = self.report.get().context("the Realm gave no token")?;
        if !quiet {
            writeln!(std::io::stdout().lock(), "{report}")?;
        }
        Ok(crate::verify::status(report))
    }

    /// Waits until the manifest is written.
    pub(crate) fn settle(&self) -> Result<()> {
        self.prediction.get().map(drop)
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.prediction.get() {
            Ok(predicted) => writeln!(f, "measurement predicted  {}", text::hex(&predicted.rim))?,
            Err(error) => writeln!(f, "measurement predicted  none: {error}")?,
        }
        let claims = self.report.get().and_then(|report| report.realm.as_ref());
        match claims {
            Some(claims) => write!(f, "measurement in token   {}", claims.initial_measurement),
            None => write!(f, "measurement in token   there was no token"),
        }
    }
}

/// Fails if the predicted measurement is not the one that the user insists on.
pub(crate) fn agree(expected: Option<&Expected>, rim: &[u8]) -> Result<()> {
    let Some(expected) = expected else { return Ok(()) };
    ensure!(
        expected.rim == rim,
        "what would be launched is not what --expect {} stands for\n  expected {}\n  predicted {}\nNext step: compare the \
         launch manifests (`realm run --dry-run`): kernel, initramfs or a flag differs",
        expected.source,
        text::hex(&expected.rim),
        text::hex(rim)
    );
    Ok(())
}

/// The checks that failed, in one sentence.
struct Failures<'a>(&'a Report);

impl fmt::Display for Failures<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, check) in self.0.failures().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{}: expected {}, found {}", check.name, check.expected, check.found)?;
        }
        Ok(())
    }
}

/// Says what a verdict wants said.
pub(crate) fn say(text: &str) {
    if !text.is_empty() {
        ui::say(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::manifest::tests::manifest;
    use cca_abi::kvm::rme;

    fn check(args: LaunchArgs) -> Result<Check> {
        Check::new(&args, Prediction::start(|| Ok(manifest(rme::HASH_SHA256)), vec![])?)
    }

    #[test]
    fn a_measurement_is_digits_or_a_manifests_file() {
        let file = std::env::temp_dir().join(format!("realm-expect-{}", std::process::id()));
        let manifest = manifest(rme::HASH_SHA256);
        manifest.write(&file).unwrap();
        let from_file = expected(&file.display().to_string()).unwrap();
        let rim = manifest.measure().unwrap().value().to_vec();
        assert_eq!(from_file.rim, rim);
        assert_eq!(expected(&text::hex(&rim)).unwrap().rim, rim);
        assert!(expected("c0ffee").unwrap_err().contains("c0ffee"));
        std::fs::write(&file, "{}").unwrap();
        assert!(expected(&file.display().to_string()).unwrap_err().contains("no launch manifest"));
        std::fs::remove_file(file).unwrap();
    }

    #[test]
    fn what_is_not_expected_is_not_launched() {
        let rim = manifest(rme::HASH_SHA256).measure().unwrap().value().to_vec();
        let with = |rim: Vec<u8>| LaunchArgs {
            expect: Some(Expected { source: "x".into(), rim }),
            ..LaunchArgs::default()
        };
        assert!(check(with(rim.clone())).is_ok());
        let error = check(with(vec![7; 32])).unwrap_err().to_string();
        assert!(error.contains(&text::hex(&rim)) && error.contains(&"07".repeat(32)), "{error}");
    }

    #[test]
    fn a_realm_without_a_token_is_a_failure_only_for_those_who_insist() {
        let shell = check(LaunchArgs::default()).unwrap();
        assert!(
            matches!(shell.judge(Err("no driver")), Verdict::Go { say, measured: None } if say.contains("no driver"))
        );
        let strict = check(LaunchArgs { check: true, ..LaunchArgs::default() }).unwrap();
        assert!(matches!(strict.judge(Err("no driver")), Verdict::Stop(text) if text.contains("no driver")));
    }

    #[test]
    fn a_token_that_is_none_says_which_check_failed() {
        let strict = check(LaunchArgs { check: true, ..LaunchArgs::default() }).unwrap();
        assert!(matches!(strict.judge(Ok("AAAA")), Verdict::Stop(text) if text.contains("token-format")));
        let attest = check(LaunchArgs { attest: true, ..LaunchArgs::default() }).unwrap();
        assert_eq!(attest.judge(Ok("AAAA")), Verdict::Go { say: String::new(), measured: None });
        assert_eq!(attest.finish(true).unwrap(), 1);
    }

    #[test]
    fn a_manifest_that_cannot_be_made_stops_the_launch() {
        let prediction = Prediction::start(|| Err(anyhow!("no kernel")), vec![]).unwrap();
        let check = Check::new(&LaunchArgs::default(), prediction).unwrap();
        assert!(matches!(check.judge(Ok("AAAA")), Verdict::Stop(text) if text.contains("no kernel")));
        assert!(check.settle().is_err());
    }
}
