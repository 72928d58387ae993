//! The stages between QEMU's start and a Realm's end: their names, their order, how long each may take, and whom
//! to blame when one does not come.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use super::machine::log;

/// What is known about a stage before it happens.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Milestone {
    /// Its name in events and tables.
    pub(crate) name: &'static str,
    /// What a table calls it.
    pub(crate) title: &'static str,
    /// How long after the stage before it.
    pub(crate) limit: Duration,
    /// The layer to blame when it does not come.
    pub(crate) layer: &'static str,
    /// The console to show then.
    pub(crate) log: &'static str,
}

const fn milestone(
    name: &'static str,
    title: &'static str,
    limit: u64,
    layer: &'static str,
    log: &'static str,
) -> Milestone {
    Milestone { name, title, limit: Duration::from_secs(limit), layer, log }
}

/// The firmware's stages.
pub(crate) const FIRMWARE: &[Milestone] = &[
    milestone("monitor", "monitor", 30, "EL3", log::EL3),
    milestone("rmm", "RMM", 30, "RMM", log::EL3),
    milestone("host-kernel", "host kernel", 30, "EL3", log::EL3),
];

/// The host's stage.
pub(crate) const HOST: &[Milestone] = &[milestone("host-init", "host init", 180, "host kernel", log::HOST)];

/// The module's stage.
pub(crate) const MODULE: &[Milestone] = &[milestone("module", "module", 60, "module", log::HOST)];

/// The stage from which on a Realm's CPUs run.
pub(crate) const RUNS: &str = "activated";

/// A Realm's stages.
pub(crate) const REALM: &[Milestone] = &[
    milestone("realm-created", "Realm created", 60, "VMM", log::PROGRAM),
    milestone("populated", "populated", 300, "VMM", log::PROGRAM),
    milestone(RUNS, "activated", 60, "VMM", log::PROGRAM),
    milestone("guest-first-output", "guest kernel's first line", 240, "guest", log::GUEST),
    milestone("guest-init", "guest init", 300, "guest", log::GUEST),
    milestone("command-done", "command done", u64::MAX / 4, "guest", log::GUEST),
    milestone("done", "done", u64::MAX / 4, "guest", log::GUEST),
];

/// What a stage is called in a table.
pub(crate) fn title(name: &str) -> &str {
    [FIRMWARE, HOST, MODULE, REALM]
        .iter()
        .flat_map(|list| list.iter())
        .find(|milestone| milestone.name == name)
        .map_or(name, |milestone| milestone.title)
}

/// The stage that a monitor's stamp stands for: `EL3: stage <name> cntpct=<ticks>`.
pub(crate) fn from_monitor(line: &str) -> Option<&'static str> {
    let name = line.split_once("EL3: stage ")?.1.split_whitespace().next()?;
    match name {
        "reset" => Some("monitor"),
        "rmm-ready" => Some("rmm"),
        "kernel-entry" => Some("host-kernel"),
        _ => None,
    }
}

/// A stage that happened.
#[derive(Debug, Clone)]
pub(crate) struct Stage {
    /// Its name.
    pub(crate) name: String,
    /// When, after the command's start.
    pub(crate) at: Duration,
}

/// What happened when.
#[derive(Debug, Clone)]
pub(crate) struct Timeline {
    start: Instant,
    /// The stages in their order.
    pub(crate) stages: Vec<Stage>,
}

impl Timeline {
    /// Begins now.
    pub(crate) fn new() -> Self {
        Self { start: Instant::now(), stages: Vec::new() }
    }

    /// A stage happens now; the first time counts.
    pub(crate) fn mark(&mut self, name: &str) {
        if !self.stages.iter().any(|stage| stage.name == name) {
            self.stages.push(Stage { name: name.to_owned(), at: self.start.elapsed() });
        }
    }

    /// The table that --timings prints.
    pub(crate) fn table(&self) -> String {
        let mut table = format!("{:<28} {:>9} {:>9}\n", "stage", "took", "total");
        let mut before = Duration::ZERO;
        for stage in &self.stages {
            let took = stage.at.saturating_sub(before);
            let _ = writeln!(
                table,
                "{:<28} {:>7.2} s {:>7.2} s",
                title(&stage.name),
                took.as_secs_f64(),
                stage.at.as_secs_f64()
            );
            before = stage.at;
        }
        table
    }

    /// The stages as JSON: milliseconds after the command's start.
    pub(crate) fn json(&self) -> serde_json::Value {
        self.stages
            .iter()
            .map(|stage| {
                let milliseconds = u64::try_from(stage.at.as_millis()).unwrap_or(u64::MAX);
                serde_json::json!({"stage": stage.name, "ms": milliseconds})
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_monitors_stamps_are_stages() {
        assert_eq!(from_monitor("EL3: stage rmm-ready cntpct=123"), Some("rmm"));
        assert_eq!(from_monitor("EL3: stage cpu-on 2 cntpct=123"), None);
        assert_eq!(from_monitor("RMM: something"), None);
    }

    #[test]
    fn a_stage_counts_once() {
        let mut timeline = Timeline::new();
        timeline.mark("monitor");
        timeline.mark("monitor");
        assert_eq!(timeline.stages.len(), 1);
        assert!(timeline.table().contains("monitor"));
    }
}
