//! What was launched, and where the time went: predicted, attested, traced.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, Result, bail, ensure};

use super::patience;
use crate::args::RunArgs;
use crate::build::{self, initramfs};
use crate::lab::session::Job;
use crate::lab::stages::Timeline;
use crate::run::launch::{Check, Prediction};
use crate::setup::Environment;
use crate::{command, lab, trace};

/// The command as a user starts it.
fn realm(words: &[&str]) -> Result<Output> {
    let mut realm = Command::new(std::env::current_exe()?);
    command::collect(realm.args(words).env("REALM_PATIENCE", patience().to_string()))
}

/// A directory of a test's own, gone afterwards.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("realm-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path)?;
        Ok(Self(path))
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The whole round trip by one command: a fresh nonce, the stock kernel's own driver, all checks. The same token then holds
/// for `realm verify` with that manifest and that nonce, and for nothing else.
pub(super) fn attests(environment: &Environment) -> Result<()> {
    build::for_run(environment)?;
    let scratch = Scratch::new("attest")?;
    let (manifest, token) = (scratch.file("launch.json"), scratch.file("token"));
    let words =
        ["run", "--attest", "--json", "-", "--personalization", "text:round trip", "--manifest", &manifest];
    let output = realm(&words)?;
    ensure!(output.status.code() == Some(0), "{}:\n{}", output.status, command::said(&output));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let measurement = &report["measurement"];
    let text = |value: &serde_json::Value| value.as_str().map(str::to_owned).context("a value is missing");
    let rim = text(&measurement["predicted"])?;
    ensure!(measurement["report"]["verified"] == true, "not verified: {measurement}");
    ensure!(measurement["actual"] == rim.as_str(), "predicted and actual differ: {measurement}");
    let checks = measurement["report"]["checks"].as_array().context("there are no checks")?;
    let skipped: Vec<_> = checks.iter().filter(|check| check["outcome"] != "passed").collect();
    ensure!(skipped.is_empty(), "not everything was checked: {skipped:?}");

    let notes = report["notes"].as_array().context("there are no notes")?;
    let base64 = notes.iter().find_map(|note| note["token"].as_str()).context("there is no token")?;
    let nonce = text(&measurement["nonce"])?;
    std::fs::write(&token, base64)?;
    let right = format!("hex:{nonce}");
    let other = scratch.file("other.json");
    let words = ["run", "--dry-run", "--exec", "true", "--memory", "514", "--manifest", &other];
    ensure!(realm(&words)?.status.success(), "no manifest of another Realm");
    for (manifest, nonce, rpv, wrong) in [
        (&manifest, right.as_str(), "text:round trip", None),
        (&other, &right, "text:round trip", Some("initial-measurement")),
        (&manifest, "text:old", "text:round trip", Some("challenge")),
        (&manifest, &right, "text:other", Some("personalization-value")),
    ] {
        let output = realm(&["verify", &token, "--manifest", manifest, "--nonce", nonce, "--rpv", rpv])?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let last = said.lines().last().unwrap_or_default().to_owned();
        let expected = wrong.map_or("verified".to_owned(), |check| format!("NOT verified: {check}"));
        let status = i32::from(wrong.is_some());
        ensure!(output.status.code() == Some(status) && last == expected, "{}:\n{said}", output.status);
    }
    Ok(())
}

/// A Realm whose initramfs has one other byte than the prediction knows of: its command does not start.
pub(super) fn another_realm(environment: &Environment) -> Result<()> {
    let images = build::for_run(environment)?;
    let scratch = Scratch::new("another")?;
    let own = PathBuf::from(scratch.file("initrd"));
    let mut bytes = std::fs::read(&images.guest_initrd)?;
    // Behind the archive's end there is room for anything: the guest is the same, only its measurement is not.
    *bytes.last_mut().context("the initramfs is empty")? ^= 1;
    std::fs::write(&own, bytes)?;

    let ran = "this Realm got a command";
    let args = RunArgs { exec: Some(format!("echo '<1>{ran}' >/dev/kmsg")), ..RunArgs::default() };
    let parts = lab::host_parts(environment, &images, &None, &None, &[]);
    let inner = lab::inner_options(&args, &parts)?;
    let mut launched = inner.clone();
    launched.initrd = Some(own.clone());
    let manifest = |options: crate::run::RunOptions| {
        move || crate::run::manifest::Manifest::new(&crate::run::plan(&options)?, &options.realm)
    };
    let actual = crate::run::options::to_hex(manifest(launched)()?.measure()?.value());
    let check = Check::new(&args.launch, Prediction::start(manifest(inner), vec![])?)?;
    let predicted = check.json()["predicted"].as_str().unwrap_or_default().to_owned();
    ensure!(actual != predicted, "the byte is not measured");

    let parts = lab::host_parts(environment, &images, &None, &Some(own), &[]);
    let initrd = initramfs::host(environment, &parts)?;
    let config = lab::config(environment, &images, &args.machine, None, None, initrd)?;
    let mut job =
        Job { capture: true, progress: false, patience: patience(), ..lab::realm_job(&config, &args)? };
    lab::ask_for_token(&mut job, &check);
    job.check = Some(check);
    let directory = crate::paths::new_run()?;
    let error = match lab::execute_in(&directory, &config, &job, &mut Timeline::new(), None) {
        Ok(outcome) => bail!("nobody noticed: the run ended with {}", outcome.status),
        Err(error) => format!("{error:#}"),
    };
    let said = format!("initial-measurement: expected {predicted}, found {actual}");
    ensure!(
        error.starts_with("RMM: this is not the Realm") && error.contains(&said),
        "it was said:\n{error}"
    );
    let console = std::fs::read_to_string(directory.join(lab::machine::log::GUEST))?;
    ensure!(!console.is_empty() && !console.contains(ran), "it did not wait for the verdict:\n{console}");
    ensure!(!console.contains("/init:"), "the guest's init stumbles:\n{console}");
    Ok(())
}

/// A traced command's status and output are its own; what was traced is what the module counted.
pub(super) fn trace(environment: &Environment) -> Result<()> {
    build::for_run(environment)?;
    let scratch = Scratch::new("trace")?;
    let out = scratch.file("out");
    let output = realm(&["trace", "--out", &out, "--exec", "echo traced; exit 7"])?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.code() == Some(7) && text == "traced\n",
        "{}:\n{}",
        output.status,
        command::said(&output)
    );

    let timeline = std::fs::read_to_string(Path::new(&out).join("trace.json"))?;
    let (slices, instants) = trace::timeline::check(&timeline)?;
    let summary: serde_json::Value =
        serde_json::from_slice(&std::fs::read(Path::new(&out).join("summary.json"))?)?;
    ensure!(summary["status"] == 7 && summary["lost"] == 0, "status or losses: {summary}");
    let agreement = summary["agreement"].as_object().context("nothing was compared")?;
    for (name, pair) in agreement {
        ensure!(pair["traced"] == pair["counted"], "{name} is {pair}");
    }
    for name in [
        "RMI_DATA_CREATE",
        "RMI_DATA_CREATE_UNKNOWN",
        "RMI_REC_ENTER",
        "RMI_DATA_DESTROY",
        "exit_sync",
        "exit_irq",
    ] {
        ensure!(
            agreement.get(name).is_some_and(|pair| pair["counted"] != 0),
            "there is no {name}: {summary}"
        );
    }
    let stages = summary["stages"].as_array().context("there are no stages")?;
    let names: Vec<&str> = stages.iter().filter_map(|stage| stage["stage"].as_str()).collect();
    let expected = [
        "rmm",
        "host-kernel",
        "started",
        "realm-created",
        "populated",
        "activated",
        "guest-first-output",
        "guest-init",
        "command-done",
        "done",
    ];
    ensure!(names == expected, "the stages are {names:?}");
    let number = |value: &serde_json::Value| value.as_u64().and_then(|number| usize::try_from(number).ok());
    let exits: usize =
        summary["exits"].as_object().into_iter().flat_map(|all| all.values()).filter_map(number).sum();
    let faults: usize =
        summary["faults"].as_object().into_iter().flat_map(|all| all.values()).filter_map(number).sum();
    let events = number(&summary["events"]).unwrap_or(0);
    ensure!(slices == stages.len() + exits, "{slices} slices for {} stages and {exits} exits", stages.len());
    // Every event is in the timeline: an entry and an exit are one slice.
    ensure!(
        instants + 2 * exits == events && faults > 0,
        "{instants} instants, {exits} exits, {events} events"
    );
    let page = std::fs::read_to_string(Path::new(&out).join("summary.html"))?;
    ensure!(page.contains("numbers agree with the counters"), "the page says something else");
    Ok(())
}
