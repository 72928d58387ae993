//! The story as a timeline in the trace event format, which Perfetto and chrome://tracing open.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;

use super::ring::Event;
use super::story::{OUTCOMES, PROGRESS, Story};

/// Rows are grouped by "process".
const STAGES: u32 = 1;
const REALM: u32 = 2;
const HOST: u32 = 3;
/// Points of a curve.
const POINTS: usize = 2000;

/// Microseconds, as the format has times.
fn micros(ns: u64) -> String {
    format!("{}.{:03}", ns / 1000, ns % 1000)
}

/// The whole file.
pub(crate) fn json(story: &Story) -> String {
    let mut out = String::from("{\"displayTimeUnit\":\"ms\",\"otherData\":");
    let other = json!({ "command": story.command, "lost_events": story.lost, "clock": "of the machine, in microseconds" });
    let _ = write!(out, "{other},\"traceEvents\":[");
    let mut first = true;
    let mut add = |text: std::fmt::Arguments<'_>| {
        let separator = if std::mem::take(&mut first) { "\n" } else { ",\n" };
        let _ = write!(out, "{separator}{text}");
    };
    for (pid, name) in [(STAGES, "stages"), (REALM, "Realm"), (HOST, "host: calls to the RMM")] {
        let name = json!({ "name": name });
        add(format_args!(
            "{{\"ph\":\"M\",\"pid\":{pid},\"tid\":0,\"name\":\"process_name\",\"args\":{name}}}"
        ));
    }
    let mut threads: Vec<(u32, u32)> = story.stays.iter().map(|stay| (stay.thread, stay.vcpu)).collect();
    threads.sort_unstable();
    threads.dedup();
    let cpus: BTreeMap<u32, u32> = threads.iter().copied().collect();
    let calls = story.events.iter().filter(|stamped| matches!(stamped.event, Event::Rmi { .. }));
    let callers: BTreeSet<u32> = calls.map(|stamped| stamped.thread).collect();
    let rows = threads.iter().map(|(thread, vcpu)| (REALM, *thread, format!("CPU {vcpu}: inside, until")));
    let rows = rows.chain(callers.into_iter().map(|thread| match cpus.get(&thread) {
        Some(vcpu) => (HOST, thread, format!("thread of CPU {vcpu}")),
        None => (HOST, thread, "another thread of the VMM".to_owned()),
    }));
    for (process, thread, name) in rows.chain([(STAGES, 1, "what goes on".to_owned())]) {
        let name = json!({ "name": name });
        add(format_args!(
            "{{\"ph\":\"M\",\"pid\":{process},\"tid\":{thread},\"name\":\"thread_name\",\"args\":{name}}}"
        ));
    }
    for stage in &story.stages {
        let name = json!(stage.title);
        let args =
            json!({ "ends_with": stage.name, "real_seconds": stage.wall.map(|wall| wall.as_secs_f64()) });
        add(format_args!(
            "{{\"ph\":\"X\",\"pid\":{STAGES},\"tid\":1,\"ts\":{},\"dur\":{},\"name\":{name},\"args\":{args}}}",
            micros(stage.start),
            micros(stage.end - stage.start)
        ));
    }
    for stay in &story.stays {
        add(format_args!(
            "{{\"ph\":\"X\",\"pid\":{REALM},\"tid\":{},\"ts\":{},\"dur\":{},\"name\":\"{}\",\"cat\":\"exit\"}}",
            stay.thread,
            micros(stay.start),
            micros(stay.end - stay.start),
            stay.reason.title()
        ));
    }
    for stamped in &story.events {
        let (thread, at) = (stamped.thread, micros(stamped.ns));
        match stamped.event {
            Event::Rmi { function, status } => {
                let name = cca_abi::rmi::name(function).unwrap_or("RMI_UNKNOWN");
                add(format_args!(
                    "{{\"ph\":\"i\",\"s\":\"t\",\"pid\":{HOST},\"tid\":{thread},\"ts\":{at},\"name\":\"{name}\",\
                     \"args\":{{\"status\":{status}}}}}"
                ));
            }
            Event::Fault { outcome, shared } => {
                let became =
                    usize::try_from(outcome).ok().and_then(|index| OUTCOMES.get(index)).unwrap_or(&"unknown");
                let what = if shared { "shared memory" } else { "private memory" };
                add(format_args!(
                    "{{\"ph\":\"i\",\"s\":\"t\",\"pid\":{REALM},\"tid\":{thread},\"ts\":{at},\"name\":\"fault: {what}\",\
                     \"args\":{{\"outcome\":\"{became}\"}}}}"
                ));
            }
            Event::Enter | Event::Exit { .. } => {}
        }
    }
    for (function, title) in PROGRESS {
        for (ns, pages) in story.progress(function, POINTS) {
            add(format_args!(
                "{{\"ph\":\"C\",\"pid\":{HOST},\"ts\":{},\"name\":\"pages {title}\",\"args\":{{\"pages\":{pages}}}}}",
                micros(ns)
            ));
        }
    }
    for (ns, counters) in &story.samples {
        for name in ["pages_delegated", "pages_shared", "translation_tables"] {
            let value = counters.get(name).copied().unwrap_or(0);
            add(format_args!(
                "{{\"ph\":\"C\",\"pid\":{HOST},\"ts\":{},\"name\":\"{name}\",\"args\":{{\"value\":{value}}}}}",
                micros(*ns)
            ));
        }
    }
    out.push_str("\n]}\n");
    out
}

/// For tests: checks a timeline by the rules that viewers insist on; gives how many slices and instants there are.
pub(crate) fn check(text: &str) -> Result<(usize, usize)> {
    let file: serde_json::Value = serde_json::from_str(text)?;
    let events = file["traceEvents"].as_array().context("there are no traceEvents")?;
    let (mut slices, mut instants) = (0, 0);
    let mut ends = BTreeMap::new();
    let (mut rows, mut named) = (BTreeSet::new(), BTreeSet::new());
    for event in events {
        let number = |key: &str| event[key].as_f64().filter(|number| *number >= 0.0);
        let wrong = || format!("this is no event: {event}");
        ensure!(event["name"].is_string() && number("pid").is_some(), wrong());
        let row = (event["pid"].as_u64(), event["tid"].as_u64());
        match event["ph"].as_str() {
            Some("M") => {
                ensure!(event["args"]["name"].is_string(), wrong());
                if event["name"] == "thread_name" {
                    named.insert(row);
                }
            }
            Some("C") => ensure!(number("ts").is_some() && event["args"].is_object(), wrong()),
            Some("i") => {
                ensure!(number("ts").is_some() && number("tid").is_some() && event["s"] == "t", wrong());
                rows.insert(row);
                instants += 1;
            }
            Some("X") => {
                let (start, length) = number("ts").zip(number("dur")).with_context(wrong)?;
                ensure!(row.1.is_some(), wrong());
                rows.insert(row);
                let end = ends.entry(row).or_insert(0.0);
                // Half a nanosecond is what the format's numbers lose.
                ensure!(start + 0.0005 >= *end, "slices overlap: {event}");
                *end = start + length;
                slices += 1;
            }
            _ => bail!(wrong()),
        }
    }
    let nameless: Vec<_> = rows.difference(&named).collect();
    ensure!(nameless.is_empty(), "rows without a name: {nameless:?}");
    Ok((slices, instants))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::story::tests::story;

    #[test]
    fn the_timeline_is_what_viewers_take() {
        let story = story();
        let (slices, instants) = check(&json(&story)).unwrap();
        assert_eq!(slices, story.stages.len() + story.stays.len());
        assert_eq!(instants, 4 + 1);
    }

    #[test]
    fn times_are_microseconds() {
        assert_eq!(micros(1_234_567), "1234.567");
        assert_eq!(micros(5), "0.005");
    }
}
