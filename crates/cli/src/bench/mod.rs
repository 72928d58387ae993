//! `realm bench`: numbers that are the same on every machine, because they count instructions and calls.
//!
//! QEMU counts instructions (`-icount shift=0`): one instruction is one nanosecond of the machine's 1 GHz counter, so
//! whoever reads a clock on that machine (payload, host program, guest program) reads a number of instructions. Calls
//! to the RMM are counted by the module.

pub(crate) mod touch;

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};

use crate::args::{BenchArgs, MachineArgs, RunArgs};
use crate::build::{self, initramfs};
use crate::lab::cpio::Archive;
use crate::setup::{self, Environment};
use crate::{lab, test, ui};

/// Makes QEMU count.
const COUNTING: &[&str] = &["-icount", "shift=0,sleep=off"];
/// Pages that the guest's program touches.
const PAGES: u64 = 16384;
/// How long the Realms of the bench may take, in seconds.
const LIMIT: u64 = 600;

/// What the calls may cost at most, in instructions: the promises of docs/performance.md.
const LIMITS: &[(&str, f64)] = &[
    ("PSCI_VERSION", 150.0),
    ("RMI_VERSION", 500.0),
    ("RMI_GRANULE_DELEGATE", 1500.0),
    ("RMI_GRANULE_UNDELEGATE", 1500.0),
    ("RMI_REALM_CREATE", 25000.0),
    ("RMI_RTT_CREATE", 1500.0),
    ("RMI_RTT_INIT_RIPAS of 16 pages", 20000.0),
    ("RMI_DATA_CREATE measured", 10000.0),
    ("RMI_DATA_CREATE not measured", 3000.0),
    ("RMI_DATA_CREATE_UNKNOWN", 1500.0),
    ("RMI_REC_CREATE", 12000.0),
    ("RMI_REC_ENTER to an immediate host call", 3500.0),
    ("RMI_REC_ENTER with floating point", 4000.0),
    ("attestation token", 3500000.0),
    ("longest wait of an interrupt while a token is signed", 120000.0),
    ("RMI_REC_ENTER to a device access", 3000.0),
    ("first touch without a kernel (2 REC_ENTER, DELEGATE, DATA_CREATE_UNKNOWN)", 9000.0),
];

/// A measure and its value.
type Table = Vec<(String, f64)>;

/// Runs the benches and prints their table.
pub(crate) fn run(args: &BenchArgs) -> Result<u8> {
    let environment = setup::ensure(None, false)?;
    ui::say("counting the calls of the RMM (payload on monitor and RMM) ...");
    let text = test::run_payload(&environment, &counting())?;
    let mut table = payload_counts(&text);
    ensure!(!table.is_empty(), "the payload printed no `bench` lines:\n{text}");
    ui::say("counting what a Realm's memory costs (two Realms on the host kernel) ...");
    table.extend(memory(&environment)?);
    if args.json {
        let table: serde_json::Map<String, serde_json::Value> =
            table.iter().map(|(name, value)| (name.clone(), (*value).into())).collect();
        println!("{}", serde_json::to_string_pretty(&table)?);
        return Ok(0);
    }
    println!("{:<76} {:>12}", "measure", "count");
    for (name, value) in &table {
        // Calls per page are fractions; instructions are not.
        let digits = usize::from(value.fract() != 0.0 && *value < 100.0) * 2;
        println!("{name:<76} {value:>12.digits$}");
    }
    println!("\nwhole run (`realm run --exec true --timings`), in seconds of this machine:");
    lab::run_realm(&RunArgs { exec: Some("true".into()), timings: true, ..RunArgs::default() })
}

/// Fails if a call costs more than promised, or was not measured.
pub(crate) fn check(environment: &Environment) -> Result<()> {
    let table = payload_counts(&test::run_payload(environment, &counting())?);
    for (name, limit) in LIMITS {
        let (_, cost) = table
            .iter()
            .find(|(measured, _)| measured == name)
            .with_context(|| format!("no count of {name}"))?;
        ensure!(cost <= limit, "{name} costs {cost} instructions, more than {limit}");
    }
    Ok(())
}

/// One CPU whose clock counts instructions.
fn counting() -> MachineArgs {
    let qemu_args = COUNTING.iter().map(|&argument| argument.to_owned()).collect();
    MachineArgs { host_cpus: Some(1), qemu_args, ..MachineArgs::default() }
}

/// The lines `PAYLOAD: bench <name> <count>`.
fn payload_counts(text: &str) -> Table {
    text.lines()
        .filter_map(|line| {
            let (name, count) = line.split_once("PAYLOAD: bench ")?.1.trim().rsplit_once(' ')?;
            Some((name.to_owned(), count.parse().ok()?))
        })
        .collect()
}

/// Two Realms that differ only in what their programs touch; the difference is what touching costs.
fn memory(environment: &Environment) -> Result<Table> {
    let images = build::for_run(environment)?;
    // The guest gets the arm64 `realm` for its `touch` command, in an archive behind its own.
    let mut archive = Archive::new();
    archive.directory("bin");
    archive.file("bin/realm", 0o755, &std::fs::read(&images.realm)?);
    let file = crate::paths::cache()?.join("bench.cpio");
    initramfs::write_if_changed(&file, &archive.finish())?;

    // Before its program runs, the guest gets some seconds (which cost nothing: an idle machine's clock jumps) for what
    // its kernel still does behind the first program's back.
    let script = format!(
        "set -e\n\
         cat /guest/initrd /bench.cpio >/tmp/initrd\n\
         for pages in 0 {PAGES}; do\n\
         \trealm run --initrd /tmp/initrd --exec \"sleep 5; realm touch $pages\" --events-fd 3 3>/tmp/events\n\
         \techo \"realm $pages\"\n\
         \tcat /tmp/events {counters}/stats\n\
         done\n",
        counters = test::COUNTERS,
    );
    let (outcome, text) = test::on_machine(environment, &counting(), &[file], true, &script, LIMIT)?;
    ensure!(outcome.status == 0, "the script on the host ended with {}:\n{text}", outcome.status);
    evaluate(&text)
}

/// What one Realm of [`memory`] reported.
#[derive(Debug, Default)]
struct Report {
    /// Nanoseconds by stage.
    stages: BTreeMap<String, f64>,
    /// The module's counters, summed up over all Realms so far.
    counters: BTreeMap<String, f64>,
    /// What the guest's program printed.
    touch: BTreeMap<String, f64>,
}

impl Report {
    fn get(map: &BTreeMap<String, f64>, name: &str) -> Result<f64> {
        map.get(name).copied().with_context(|| format!("no {name} in {map:?}"))
    }

    fn between(&self, from: &str, to: &str) -> Result<f64> {
        Ok(Self::get(&self.stages, to)? - Self::get(&self.stages, from)?)
    }
}

/// Reads what the script printed: the guest's lines, `realm N`, events, counters; twice.
fn evaluate(text: &str) -> Result<Table> {
    let mut reports = vec![Report::default()];
    let mut behind_marker = false;
    for line in text.lines() {
        let last = reports.len() - 1;
        if let Ok(event) = serde_json::from_str::<serde_json::Value>(line) {
            if let (Some(stage), Some(ns)) = (event["stage"].as_str(), event["ns"].as_f64()) {
                reports[last].stages.insert(stage.to_owned(), ns);
            }
        } else if let Some((name, value)) = line.rsplit_once(' ') {
            let Ok(value) = value.parse() else { continue };
            if let Some(name) = name.strip_prefix("touch ") {
                if behind_marker {
                    reports.push(Report::default());
                    behind_marker = false;
                }
                let last = reports.len() - 1;
                reports[last].touch.insert(name.to_owned(), value);
            } else if name == "realm" {
                behind_marker = true;
            } else {
                reports[last].counters.insert(name.to_owned(), value);
            }
        }
    }
    let [still, touching] = reports.as_slice() else {
        anyhow::bail!("{} Realms reported, not 2:\n{text}", reports.len());
    };

    let done = |report: &Report, name: &str| -> Result<f64> {
        let errors = report.counters.get(&format!("{name}_errors")).copied().unwrap_or(0.0);
        Ok(Report::get(&report.counters, name)? - errors)
    };
    let count = |name: &str| -> Result<f64> {
        // Counters only grow: take what the first Realm alone did from what both did, twice.
        let first = Report::get(&still.counters, name)?;
        Ok(Report::get(&touching.counters, name)? - 2.0 * first)
    };
    let populated = done(still, "RMI_DATA_CREATE")?;
    let faulted = done(touching, "RMI_DATA_CREATE_UNKNOWN")? - 2.0 * done(still, "RMI_DATA_CREATE_UNKNOWN")?;
    let populate_calls = Report::get(&still.counters, "RMI_DATA_CREATE")? + populated;
    let touch_calls = count("RMI_GRANULE_DELEGATE")?
        + count("RMI_DATA_CREATE_UNKNOWN")?
        + count("RMI_RTT_CREATE")?
        + count("exit_sync")?;
    let first = Report::get(&touching.touch, "first")?;
    let again = Report::get(&touching.touch, "again")?;
    #[allow(clippy::cast_precision_loss, reason = "a small constant")]
    let pages = PAGES as f64;
    Ok(vec![
        ("populate one measured page (VMM, module, RMM): instructions".into(), {
            (still.between("realm-created", "populated")? / populated).round()
        }),
        (
            "populate one measured page: SMCs (DELEGATE, DATA_CREATE, retries)".into(),
            populate_calls / populated,
        ),
        ("first touch of a page inside a Realm (guest kernel included): instructions".into(), {
            ((first - again) / faulted + again / pages).round()
        }),
        ("touch of a page that the Realm already has (guest kernel only): instructions".into(), {
            (again / pages).round()
        }),
        (
            "first touch: SMCs (REC_ENTER, DELEGATE, DATA_CREATE_UNKNOWN, tables)".into(),
            touch_calls / faulted,
        ),
        ("pages populated for the guest kernel and its initramfs".into(), populated),
        (
            "pages first touched by the guest until its command ran".into(),
            done(still, "RMI_DATA_CREATE_UNKNOWN")?,
        ),
        ("Realm activated to guest's init: instructions".into(), still.between("activated", "guest-init")?),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bench_lines_are_names_and_numbers() {
        let text = "PAYLOAD: start\r\nPAYLOAD: bench RMI_VERSION 631\r\nPAYLOAD: bench bad x\n";
        assert_eq!(payload_counts(text), [("RMI_VERSION".to_owned(), 631.0)]);
    }

    #[test]
    fn two_realms_are_told_apart() {
        let realm = |pages: u64, total: u64, enters: u64| {
            format!(
                "touch first {f}\ntouch again {a}\nrealm {pages}\n\
                 {{\"stage\":\"realm-created\",\"ns\":1000}}\n{{\"stage\":\"populated\",\"ns\":101000}}\n\
                 {{\"stage\":\"activated\",\"ns\":102000}}\n{{\"stage\":\"guest-init\",\"ns\":202000}}\n\
                 RMI_DATA_CREATE {c}\nRMI_DATA_CREATE_errors {e}\nRMI_DATA_CREATE_UNKNOWN {total}\n\
                 RMI_GRANULE_DELEGATE {total}\nRMI_RTT_CREATE 0\nexit_sync {enters}\n",
                f = pages * 9000,
                a = pages * 1000,
                c = 11 * (1 + u64::from(pages > 0)),
                e = 1 + u64::from(pages > 0),
            )
        };
        let text = realm(0, 100, 50) + &realm(PAGES, 200 + PAGES, 100 + PAGES);
        let table: BTreeMap<String, f64> = evaluate(&text).unwrap().into_iter().collect();
        let value = |start: &str| *table.iter().find(|(name, _)| name.starts_with(start)).unwrap().1;
        assert_eq!(value("populate one measured page (VMM"), 10000.0);
        assert_eq!(value("populate one measured page: SMCs"), 2.1);
        assert_eq!(value("first touch of a page"), 9000.0);
        assert_eq!(value("first touch: SMCs"), 3.0);
        assert_eq!(value("touch of a page that"), 1000.0);
    }
}
