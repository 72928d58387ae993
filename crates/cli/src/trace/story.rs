//! What a recording tells: stages on one clock, what the CPUs did in between, and how much of everything there was.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, ensure};
use cca_abi::rmi::{self, fid};

use super::Around;
use super::frames::Frame;
use super::ring::{self, Event, Shapes, Stamped};
use crate::lab::stages;

/// Why a CPU left a Realm, as finely as the RMM tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Reason {
    /// Private memory that is not there yet, or shared memory that is not mapped.
    Memory,
    /// An access to a device.
    Device,
    /// The Realm waits for an interrupt.
    Idle,
    /// A system register of the GIC.
    Register,
    /// Another synchronous exit.
    OtherSync,
    /// An interrupt of the host.
    Interrupt,
    /// A PSCI call that the host has to know of.
    Psci,
    /// Pages become shared or private.
    Ripas,
    /// A call to the host.
    HostCall,
    /// Anything else.
    Other,
}

impl Reason {
    /// All of them, in the order in which they are shown.
    pub(crate) const ALL: [Self; 10] = [
        Self::Memory,
        Self::Device,
        Self::Interrupt,
        Self::Idle,
        Self::Register,
        Self::Psci,
        Self::Ripas,
        Self::HostCall,
        Self::OtherSync,
        Self::Other,
    ];

    fn new(reason: u32, esr: u64) -> Self {
        const INSTRUCTION_ABORT: u64 = 0x20;
        const DATA_ABORT: u64 = 0x24;
        match (reason, esr >> 26 & 0x3f) {
            // The RMM tells what an access was only where a device may answer it.
            (0, DATA_ABORT) if esr >> 24 & 1 != 0 => Self::Device,
            (0, DATA_ABORT | INSTRUCTION_ABORT) => Self::Memory,
            (0, 0x01) => Self::Idle,
            (0, 0x18) => Self::Register,
            (0, _) => Self::OtherSync,
            (1 | 2, _) => Self::Interrupt,
            (3, _) => Self::Psci,
            (4, _) => Self::Ripas,
            (5, _) => Self::HostCall,
            _ => Self::Other,
        }
    }

    /// As people read it.
    pub(crate) const fn title(self) -> &'static str {
        match self {
            Self::Memory => "memory fault",
            Self::Device => "device access",
            Self::Idle => "idle (WFI)",
            Self::Register => "system register",
            Self::OtherSync => "other synchronous",
            Self::Interrupt => "host interrupt",
            Self::Psci => "PSCI",
            Self::Ripas => "sharing pages",
            Self::HostCall => "host call",
            Self::Other => "other",
        }
    }
}

/// A stay in the Realm: from an entry to the exit that ended it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stay {
    /// The thread of the virtual CPU.
    pub(crate) thread: u32,
    /// The virtual CPU.
    pub(crate) vcpu: u32,
    /// When it was entered.
    pub(crate) start: u64,
    /// When it was left.
    pub(crate) end: u64,
    /// Why.
    pub(crate) reason: Reason,
}

/// Something between two moments.
#[derive(Debug, Clone)]
pub(crate) struct Stage {
    /// The name of what it ends with.
    pub(crate) name: String,
    /// What people read.
    pub(crate) title: &'static str,
    /// When it began.
    pub(crate) start: u64,
    /// When it ended.
    pub(crate) end: u64,
    /// How long it took in real time, if somebody knows.
    pub(crate) wall: Option<Duration>,
}

/// A number of the trace beside the module's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Compared {
    /// The module's name for it.
    pub(crate) name: String,
    /// How many events there were.
    pub(crate) traced: u64,
    /// How far the counter went.
    pub(crate) counted: u64,
}

/// All of it. Times are nanoseconds on the machine's clock; where the firmware told when it began, that is 0.
#[derive(Debug, Clone, Default)]
pub(crate) struct Story {
    /// The command that was traced.
    pub(crate) command: String,
    /// Its status; none if the recording was cut off.
    pub(crate) status: Option<u64>,
    /// What came after what.
    pub(crate) stages: Vec<Stage>,
    /// When recording began.
    pub(crate) begin: u64,
    /// When it ended.
    pub(crate) end: u64,
    /// The kernel's events in their order.
    pub(crate) events: Vec<Stamped>,
    /// The CPUs' stays.
    pub(crate) stays: Vec<Stay>,
    /// Calls and errors by command.
    pub(crate) rmi: BTreeMap<&'static str, (u64, u64)>,
    /// Exits by reason.
    pub(crate) exits: BTreeMap<Reason, u64>,
    /// Memory faults by their outcome, as in [`OUTCOMES`].
    pub(crate) faults: [u64; 4],
    /// Events that the kernel had no room for.
    pub(crate) lost: u64,
    /// Samples of the module's counters.
    pub(crate) samples: Vec<(u64, BTreeMap<String, u64>)>,
    /// The trace beside the counters.
    pub(crate) compared: Vec<Compared>,
}

/// What stands between the stage before and the one with this name.
fn title(name: &str) -> &'static str {
    match name {
        "rmm" => "monitor, RMM start",
        "host-kernel" => "RMM to host kernel",
        "started" => "host kernel, its init",
        "realm-created" => "create the Realm",
        "populated" => "populate, measure",
        "activated" => "create CPUs, activate",
        "guest-first-output" => "guest kernel, to its first line",
        "guest-init" => "guest kernel, to init",
        "command-done" => "the command",
        "done" => "take the Realm down",
        _ => "other",
    }
}

impl Story {
    /// Puts a recording in order.
    pub(crate) fn new(frames: &[Frame], around: &Around) -> Result<Self> {
        let mut story = Self { command: around.command.clone(), ..Self::default() };
        let mut shapes = Shapes::default();
        let mut reported: Vec<(String, u64)> = Vec::new();
        let mut clock = None;
        for frame in frames {
            match frame {
                Frame::Format(text) => shapes.learn(text),
                Frame::Page(_, bytes) => {
                    let page = ring::page(bytes, &shapes);
                    story.events.extend(page.events);
                }
                Frame::Event(line) => {
                    let value: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
                    if let (Some(stage), Some(ns)) = (value["stage"].as_str(), value["ns"].as_u64()) {
                        reported.push((stage.to_owned(), ns));
                    }
                }
                Frame::Counters(ns, text) => story.samples.push((*ns, counters(text))),
                Frame::Clock(counter, ns, frequency) => clock = Some((*counter, *ns, *frequency)),
                Frame::Lost(events) => story.lost += events,
                Frame::End(status) => story.status = Some(*status),
            }
        }
        ensure!(!shapes.is_empty(), "the recording does not say what its events look like");
        story.events.sort_by_key(|event| event.ns);
        // The monitor's times are the counter's, everybody else's those of the kernel's clock, which started later.
        let firmware = clock.and_then(|clock| firmware(&around.monitor, clock));
        let shift = firmware.as_ref().map_or(0, |(shift, _)| *shift);
        let mut moments = firmware.map(|(_, moments)| moments).unwrap_or_default();
        moments.extend(reported.into_iter().map(|(name, ns)| (name, ns.saturating_add(shift))));
        for event in &mut story.events {
            event.ns = event.ns.saturating_add(shift);
        }
        for (ns, _) in &mut story.samples {
            *ns = ns.saturating_add(shift);
        }
        moments.sort_by_key(|(_, ns)| *ns);
        story.begin = moments.iter().find(|(name, _)| name == "started").map_or(0, |(_, ns)| *ns);
        let last = story.events.last().map_or(0, |event| event.ns);
        story.end = moments.last().map_or(last, |(_, ns)| *ns);
        story.stages = spans(&moments, around);
        story.count();
        story.compare();
        Ok(story)
    }

    fn count(&mut self) {
        let mut inside: BTreeMap<u32, u64> = BTreeMap::new();
        for stamped in &self.events {
            match stamped.event {
                Event::Rmi { function, status } => {
                    let (calls, errors) = self.rmi.entry(command(function)).or_default();
                    *calls += 1;
                    *errors += u64::from(status != 0);
                }
                Event::Enter => {
                    self.rmi.entry("RMI_REC_ENTER").or_default().0 += 1;
                    inside.insert(stamped.thread, stamped.ns);
                }
                Event::Exit { vcpu, reason, esr } => {
                    let reason = Reason::new(reason, esr);
                    *self.exits.entry(reason).or_default() += 1;
                    if let Some(start) = inside.remove(&stamped.thread) {
                        let (thread, end) = (stamped.thread, stamped.ns);
                        self.stays.push(Stay { thread, vcpu, start, end, reason });
                    }
                }
                Event::Fault { outcome, .. } => {
                    let index = usize::try_from(outcome).unwrap_or(usize::MAX).min(self.faults.len() - 1);
                    self.faults[index] += 1;
                }
            }
        }
    }

    /// Holds what was traced against what the module counted meanwhile.
    fn compare(&mut self) {
        let (Some((_, first)), Some((_, last))) = (self.samples.first(), self.samples.last()) else { return };
        let mut traced: BTreeMap<String, u64> = BTreeMap::new();
        for (name, (calls, errors)) in &self.rmi {
            traced.insert((*name).to_owned(), *calls);
            traced.insert(format!("{name}_errors"), *errors);
        }
        const NAMES: [&str; 7] = ["sync", "irq", "fiq", "psci", "ripas_change", "host_call", "serror"];
        for stamped in &self.events {
            if let Event::Exit { reason, .. } = stamped.event {
                let name = NAMES.get(usize::try_from(reason).unwrap_or(usize::MAX)).unwrap_or(&"unknown");
                *traced.entry(format!("exit_{name}")).or_default() += 1;
            }
        }
        let is_flow = |name: &String| name.starts_with("RMI_") || name.starts_with("exit_");
        let names: std::collections::BTreeSet<String> =
            traced.keys().chain(last.keys()).filter(|name| is_flow(name)).cloned().collect();
        let of = |map: &BTreeMap<String, u64>, name: &str| map.get(name).copied().unwrap_or(0);
        self.compared = names
            .into_iter()
            .map(|name| Compared {
                traced: of(&traced, &name),
                counted: of(last, &name).saturating_sub(of(first, &name)),
                name,
            })
            .filter(|pair| pair.traced != 0 || pair.counted != 0)
            .collect();
    }

    /// Successful calls of one command up to each moment, at most `points` of them: (time, number).
    pub(crate) fn progress(&self, function: u64, points: usize) -> Vec<(u64, u64)> {
        let times: Vec<u64> = self
            .events
            .iter()
            .filter(|stamped| stamped.event == Event::Rmi { function, status: 0 })
            .map(|stamped| stamped.ns)
            .collect();
        let step = times.len().div_ceil(points.max(1)).max(1);
        let last = times.len().saturating_sub(1);
        (1u64..)
            .zip(&times)
            .enumerate()
            .filter(|(index, _)| index % step == 0 || *index == last)
            .map(|(_, (number, ns))| (*ns, number))
            .collect()
    }

    /// RMI calls and exits within a stage.
    pub(crate) fn within(&self, stage: &Stage) -> (usize, usize) {
        let inside = self.events.iter().filter(|event| (stage.start..stage.end).contains(&event.ns));
        inside.fold((0, 0), |(calls, exits), stamped| match stamped.event {
            Event::Rmi { .. } => (calls + 1, exits),
            Event::Exit { .. } => (calls, exits + 1),
            _ => (calls, exits),
        })
    }

    /// The numbers, for programs.
    pub(crate) fn json(&self) -> serde_json::Value {
        let stages: Vec<serde_json::Value> = self
            .stages
            .iter()
            .map(|stage| {
                let (calls, exits) = self.within(stage);
                serde_json::json!({
                    "stage": stage.name, "start_ns": stage.start, "end_ns": stage.end, "rmi_calls": calls, "exits": exits,
                    "wall_ms": stage.wall.map(|wall| u64::try_from(wall.as_millis()).unwrap_or(u64::MAX)),
                })
            })
            .collect();
        let rmi: BTreeMap<&str, serde_json::Value> = self
            .rmi
            .iter()
            .map(|(name, (calls, errors))| (*name, serde_json::json!({ "calls": calls, "errors": errors })))
            .collect();
        let exits: BTreeMap<&str, u64> =
            self.exits.iter().map(|(reason, count)| (reason.title(), *count)).collect();
        let compared: BTreeMap<&str, serde_json::Value> = self
            .compared
            .iter()
            .map(|pair| {
                (pair.name.as_str(), serde_json::json!({ "traced": pair.traced, "counted": pair.counted }))
            })
            .collect();
        serde_json::json!({
            "command": self.command, "status": self.status, "stages": stages, "rmi": rmi, "exits": exits,
            "faults": { "resolved": self.faults[0], "user_space": self.faults[1], "device": self.faults[2],
                        "failed": self.faults[3] },
            "events": self.events.len(), "lost": self.lost, "agreement": compared,
        })
    }
}

fn command(function: u64) -> &'static str {
    rmi::name(function).unwrap_or("RMI_UNKNOWN")
}

/// `name value` in each line.
fn counters(text: &str) -> BTreeMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(' ')?;
            Some((name.to_owned(), value.trim().parse().ok()?))
        })
        .collect()
}

/// What to add to the kernel's times to get those of the machine's counter, and the firmware's moments on the latter.
fn firmware(monitor: &str, clock: (u64, u64, u64)) -> Option<(u64, Vec<(String, u64)>)> {
    let (counter, ns, frequency) = clock;
    let machine = |ticks: u64| {
        let ns = u128::from(ticks) * 1_000_000_000 / u128::from(frequency.max(1));
        u64::try_from(ns).unwrap_or(u64::MAX)
    };
    let moments: Vec<(String, u64)> = monitor
        .lines()
        .filter_map(|line| {
            let name = stages::from_monitor(line)?;
            let ticks = line.rsplit_once("cntpct=")?.1.trim().parse().ok()?;
            Some((name.to_owned(), machine(ticks)))
        })
        .collect();
    (!moments.is_empty()).then(|| (machine(counter).saturating_sub(ns), moments))
}

/// From moments to what lies between them.
fn spans(moments: &[(String, u64)], around: &Around) -> Vec<Stage> {
    let wall = |name: &str| {
        let name = match name {
            // The module's is the last stage that is told before the program starts.
            "started" => "module",
            "command-done" => super::record::COMMAND_ENDED,
            name => name,
        };
        around.wall.iter().find(|(stage, _)| stage == name).map(|(_, at)| *at)
    };
    moments
        .windows(2)
        .map(|pair| Stage {
            name: pair[1].0.clone(),
            title: title(&pair[1].0),
            start: pair[0].1,
            end: pair[1].1,
            wall: wall(&pair[1].0).zip(wall(&pair[0].0)).map(|(end, start)| end.saturating_sub(start)),
        })
        .collect()
}

/// What became of faults.
pub(crate) const OUTCOMES: [&str; 4] = ["resolved", "left to user space", "a device's", "failed"];

/// Commands whose progress is shown: what was populated, what came at the first touch, what was taken back.
pub(crate) const PROGRESS: [(u64, &str); 3] = [
    (fid::DATA_CREATE, "populated before the start"),
    (fid::DATA_CREATE_UNKNOWN, "given at the first touch"),
    (fid::DATA_DESTROY, "taken back"),
];

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::trace::ring::tests::{FORMATS, encode};

    /// A run of 3 pages, 2 exits and a fault.
    pub(crate) fn frames() -> Vec<Frame> {
        let rmi = |function| Event::Rmi { function, status: 0 };
        let abort = Event::Exit { vcpu: 0, reason: 0, esr: 0x24 << 26 };
        let events = [
            (5, rmi(fid::GRANULE_DELEGATE)),
            (5, rmi(fid::DATA_CREATE)),
            (6, Event::Enter),
            (6, abort),
            (6, rmi(fid::DATA_CREATE_UNKNOWN)),
            (6, Event::Fault { outcome: 0, shared: false }),
            (6, Event::Enter),
            (6, Event::Exit { vcpu: 0, reason: 1, esr: 0 }),
            (5, Event::Rmi { function: fid::DATA_DESTROY, status: 4 }),
        ];
        let stage = |name: &str, ns: u64| Frame::Event(format!("{{\"stage\":\"{name}\",\"ns\":{ns}}}"));
        let mut frames: Vec<Frame> = FORMATS.iter().map(|text| Frame::Format((*text).to_owned())).collect();
        frames.extend([
            Frame::Clock(5_000, 3_000, 1_000_000_000),
            Frame::Counters(900, "RMI_DATA_CREATE 10\nexit_irq 3\npages_delegated 5\n".into()),
            stage("started", 1_000),
            Frame::Page(0, encode(1_000, 100, &events)),
            stage("populated", 1_250),
            stage("guest-init", 1_850),
            stage("done", 2_000),
            Frame::Counters(
                2_000,
                "RMI_GRANULE_DELEGATE 1\nRMI_DATA_CREATE 11\nRMI_DATA_CREATE_UNKNOWN 1\nRMI_REC_ENTER 2\n\
                 RMI_DATA_DESTROY 1\nRMI_DATA_DESTROY_errors 1\nexit_sync 1\nexit_irq 4\npages_delegated 5\n"
                    .into(),
            ),
            Frame::Lost(2),
            Frame::End(0),
        ]);
        frames
    }

    pub(crate) fn story() -> Story {
        let around = Around {
            monitor: "EL3: stage reset cntpct=10\nEL3: stage rmm-ready cntpct=400\n".into(),
            wall: vec![("monitor".into(), Duration::from_secs(1)), ("rmm".into(), Duration::from_secs(3))],
            command: "uname -a </dev/null".into(),
        };
        Story::new(&frames(), &around).unwrap()
    }

    #[test]
    fn firmware_and_kernel_share_a_clock() {
        let story = story();
        let stages: Vec<(&str, u64, u64)> =
            story.stages.iter().map(|stage| (stage.name.as_str(), stage.start, stage.end)).collect();
        assert_eq!(
            stages,
            [
                ("rmm", 10, 400),
                ("started", 400, 3_000),
                ("populated", 3_000, 3_250),
                ("guest-init", 3_250, 3_850),
                ("done", 3_850, 4_000)
            ]
        );
        assert_eq!(story.stages[0].wall, Some(Duration::from_secs(2)));
        assert_eq!((story.begin, story.end, story.lost, story.status), (3_000, 4_000, 2, Some(0)));
    }

    #[test]
    fn stays_end_with_the_exit_of_their_thread() {
        let story = story();
        let stays: Vec<(u64, u64, Reason)> =
            story.stays.iter().map(|stay| (stay.start, stay.end, stay.reason)).collect();
        assert_eq!(stays, [(3_300, 3_400, Reason::Memory), (3_700, 3_800, Reason::Interrupt)]);
        assert_eq!(story.faults, [1, 0, 0, 0]);
        assert_eq!(story.within(&story.stages[3]), (1, 2));
    }

    #[test]
    fn what_was_traced_is_held_against_what_was_counted() {
        let story = story();
        assert!(story.compared.iter().all(|pair| pair.traced == pair.counted), "{:?}", story.compared);
        let mut frames = frames();
        frames.retain(|frame| !matches!(frame, Frame::Page(..)));
        let story = Story::new(&frames, &Around::default()).unwrap();
        assert!(story.compared.iter().all(|pair| pair.traced == 0 && pair.counted > 0));
        assert_eq!(story.compared.len(), 8);
    }

    #[test]
    fn progress_has_few_points_and_ends_at_the_end() {
        let story = story();
        assert_eq!(story.progress(fid::DATA_CREATE, 10), [(3_200, 1)]);
        let many = Story {
            events: (0..1000u64)
                .map(|ns| Stamped { ns, thread: 1, event: Event::Rmi { function: 1, status: 0 } })
                .collect(),
            ..Story::default()
        };
        let points = many.progress(1, 10);
        assert!(points.len() <= 11 && points.last() == Some(&(999, 1000)), "{points:?}");
    }

    #[test]
    fn every_exit_has_a_reason() {
        for (reason, esr, expected) in [
            (0, 0x24 << 26 | 1 << 24, Reason::Device),
            (0, 0x20 << 26, Reason::Memory),
            (0, 0x01 << 26, Reason::Idle),
            (0, 0x18 << 26, Reason::Register),
            (0, 0, Reason::OtherSync),
            (2, 0, Reason::Interrupt),
            (3, 0, Reason::Psci),
            (4, 0, Reason::Ripas),
            (5, 0, Reason::HostCall),
            (77, 0, Reason::Other),
        ] {
            assert_eq!(Reason::new(reason, esr), expected);
        }
    }
}
