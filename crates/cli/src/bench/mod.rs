//! `realm bench`: numbers that are the same on every machine, because they count instructions and calls.
//!
//! QEMU counts instructions (`-icount shift=0`): one instruction is one nanosecond of the machine's 1 GHz counter, so
//! whoever reads a clock on that machine (payload, host program, guest program) reads a number of instructions. Calls
//! to the RMM are counted by the module.

pub(crate) mod guest;

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
    ui::say(
        "counting what a Realm does, and what a plain VM does in its place (three guests on the host kernel) ...",
    );
    let guests = guests(&environment)?;
    let [still, touching, plain] = guests.as_slice() else {
        anyhow::bail!("{} guests reported, not 3", guests.len());
    };
    table.extend(memory(still, touching)?);
    let pairs = compare(touching, plain)?;
    if args.json {
        let table: serde_json::Map<String, serde_json::Value> =
            table.iter().map(|(name, value)| (name.clone(), (*value).into())).collect();
        let pairs: serde_json::Map<String, serde_json::Value> = pairs
            .iter()
            .map(|(name, realm, plain)| {
                ((*name).to_owned(), serde_json::json!({ "realm": realm, "plain": plain }))
            })
            .collect();
        let all = serde_json::json!({ "costs": table, "protection": pairs });
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(0);
    }
    println!("{:<76} {:>12}", "measure", "count");
    for (name, value) in &table {
        // Calls per page are fractions; instructions are not.
        let digits = usize::from(value.fract() != 0.0 && *value < 100.0) * 2;
        println!("{name:<76} {value:>12.digits$}");
    }
    println!(
        "\nwhat protection costs: the same guest, in instructions{:>31} {:>12} {:>8}",
        "Realm", "plain VM", "ratio"
    );
    for (name, realm, plain) in &pairs {
        println!("{name:<76} {realm:>12.0} {plain:>12.0} {:>8.2}", realm / plain);
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

/// Two Realms, of which one touches memory and does more, and a plain VM that does the same as the second.
fn guests(environment: &Environment) -> Result<Vec<Report>> {
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
         dd if=/dev/urandom of=/tmp/disk.img bs=64k count=64 2>/dev/null\n\
         guest() {{\n\
         \techo \"guest $1\"\n\
         \tshift\n\
         \trealm run --no-check --initrd /tmp/initrd --events-fd 3 \"$@\" 3>/tmp/events\n\
         \tcat /tmp/events {counters}/stats\n\
         }}\n\
         guest still --disk /tmp/disk.img,ro --exec 'sleep 5; realm touch 0; realm probe'\n\
         work='sleep 5; realm touch {PAGES}; realm probe'\n\
         guest touching --disk /tmp/disk.img,ro --exec \"$work\"\n\
         guest plain --plain --disk /tmp/disk.img,ro --exec \"$work\"\n",
        counters = test::COUNTERS,
    );
    let (outcome, text) = test::on_machine(environment, &counting(), &[file], true, &script, LIMIT)?;
    ensure!(outcome.status == 0, "the script on the host ended with {}:\n{text}", outcome.status);
    Ok(reports(&text))
}

/// What one guest of [`guests`] reported.
#[derive(Debug, Default)]
struct Report {
    /// Nanoseconds by stage.
    stages: BTreeMap<String, f64>,
    /// The module's counters, summed up over all Realms so far.
    counters: BTreeMap<String, f64>,
    /// What the guest's programs printed.
    guest: BTreeMap<String, f64>,
}

impl Report {
    fn get(map: &BTreeMap<String, f64>, name: &str) -> Result<f64> {
        map.get(name).copied().with_context(|| format!("no {name} in {map:?}"))
    }

    fn between(&self, from: &str, to: &str) -> Result<f64> {
        Ok(Self::get(&self.stages, to)? - Self::get(&self.stages, from)?)
    }
}

/// Reads what the script printed: for each guest a line with its name, its own lines, events, counters.
fn reports(text: &str) -> Vec<Report> {
    let mut reports = Vec::new();
    for line in text.lines() {
        if line.starts_with("guest ") {
            reports.push(Report::default());
        }
        let Some(last) = reports.last_mut() else { continue };
        if let Ok(event) = serde_json::from_str::<serde_json::Value>(line) {
            if let (Some(stage), Some(ns)) = (event["stage"].as_str(), event["ns"].as_f64()) {
                last.stages.insert(stage.to_owned(), ns);
            }
        } else if let Some((name, value)) = line.rsplit_once(' ') {
            let Ok(value) = value.parse() else { continue };
            match name.strip_prefix("touch ").or_else(|| name.strip_prefix("probe ")) {
                Some(name) => last.guest.insert(name.to_owned(), value),
                None => last.counters.insert(name.to_owned(), value),
            };
        }
    }
    reports
}

/// The same guest as a Realm and as a plain VM: name, instructions of the one, instructions of the other.
fn compare(realm: &Report, plain: &Report) -> Result<Vec<(&'static str, f64, f64)>> {
    #[allow(clippy::cast_precision_loss, reason = "a small constant")]
    let pages = PAGES as f64;
    let mut rows = vec![(
        "first instruction to the guest's init",
        realm.between("activated", "guest-init")?,
        plain.between("activated", "guest-init")?,
    )];
    for (name, key, divisor) in [
        ("first touch of a page", "first", pages),
        ("touch of a page that the guest already has", "again", pages),
        ("1,000 steps of arithmetic", "loop", 1.0),
        ("a system call", "syscall", 1.0),
        ("two threads wake each other, there and back", "switch", 1.0),
        ("a device access: a read of PCI configuration space, by the guest's kernel", "register", 1.0),
        ("a disk read of 4 KiB", "disk-4k", 1.0),
        ("a disk read of 256 KiB", "disk-256k", 1.0),
    ] {
        let value = |report: &Report| Ok::<_, anyhow::Error>(Report::get(&report.guest, key)? / divisor);
        rows.push((name, value(realm)?, value(plain)?));
    }
    Ok(rows)
}

/// What two Realms that differ in what their programs touch tell about touching.
fn memory(still: &Report, touching: &Report) -> Result<Table> {
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
    let first = Report::get(&touching.guest, "first")?;
    let again = Report::get(&touching.guest, "again")?;
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
    fn guests_are_told_apart() {
        let guest = |name: &str, pages: u64, total: u64, enters: u64| {
            format!(
                "guest {name}\ntouch first {f}\ntouch again {a}\nprobe loop 7\n\
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
        let text = guest("still", 0, 100, 50) + &guest("touching", PAGES, 200 + PAGES, 100 + PAGES);
        let reports = reports(&text);
        let table: BTreeMap<String, f64> = memory(&reports[0], &reports[1]).unwrap().into_iter().collect();
        let value = |start: &str| *table.iter().find(|(name, _)| name.starts_with(start)).unwrap().1;
        assert_eq!(value("populate one measured page (VMM"), 10000.0);
        assert_eq!(value("populate one measured page: SMCs"), 2.1);
        assert_eq!(value("first touch of a page"), 9000.0);
        assert_eq!(value("first touch: SMCs"), 3.0);
        assert_eq!(value("touch of a page that"), 1000.0);
        assert!(compare(&reports[0], &reports[1]).is_err(), "a probe's lines are missing");
        let probes =
            "probe syscall 1\nprobe switch 2\nprobe register 3\nprobe disk-4k 4\nprobe disk-256k 5\n";
        let both = super::reports(&(text.replace("probe loop 7\n", &format!("probe loop 7\n{probes}"))));
        let rows = compare(&both[1], &both[1]).unwrap();
        assert_eq!(rows.len(), 9);
        assert!(rows.iter().all(|(_, realm, plain)| realm == plain));
        assert!(rows.contains(&("first touch of a page", 9000.0, 9000.0)));
    }
}
