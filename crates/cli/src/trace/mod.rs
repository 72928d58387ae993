//! `realm trace`: records a run and shows where its time went, as a timeline for Perfetto and as a page with plots.
//!
//! | module | question |
//! |---|---|
//! | [`record`] | how does the host's kernel tell what happens, while it happens? |
//! | [`frames`] | what does a recording consist of? |
//! | [`ring`] | what is in a page of the kernel's trace buffer? |
//! | [`story`] | what happened, in what order, and how much of it? |
//! | [`timeline`] | how does Perfetto want it? |
//! | [`page`], [`plot`] | what does a person want to see of it? |

mod frames;
mod page;
mod plot;
mod record;
mod ring;
mod story;
pub(crate) mod timeline;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;

use crate::args::RunArgs;
use crate::lab::stages::Timeline;
use crate::ui;

pub(crate) use story::Story;

/// The port that a recording leaves the emulated machine by.
pub(crate) const PORT: &str = "org.kvm-realm.trace";

/// `realm trace`.
#[derive(Args, Debug, Clone, Default)]
#[command(
    after_help = "DIR gets trace.json, a timeline to open in ui.perfetto.dev (or chrome://tracing), summary.html, a page \
                        with plots, summary.json, the numbers behind them, and recording, the kernel's own events.\nTimes are \
                        those of the machine on which the Realm runs; on an emulated one, its clock counts instructions, two \
                        nanoseconds each."
)]
pub(crate) struct TraceArgs {
    /// Where the results go; the directory is made
    #[arg(long, value_name = "DIR", default_value = "realm-trace")]
    pub(crate) out: PathBuf,
    /// Only record, to this file
    #[arg(long, value_name = "FILE", hide = true)]
    pub(crate) stream: Option<PathBuf>,
    /// The run
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// What is known of a run beside its recording.
#[derive(Debug, Clone, Default)]
pub(crate) struct Around {
    /// When the stages came in real time, after the command's start.
    pub(crate) wall: Vec<(String, Duration)>,
    /// What the monitor said.
    pub(crate) monitor: String,
    /// The command that was traced.
    pub(crate) command: String,
}

/// Runs and shows.
pub(crate) fn run(args: &TraceArgs) -> Result<u8> {
    if let Some(stream) = &args.stream {
        return record::run(&crate::run::options::from_args(&args.run)?, stream);
    }
    // The guest kernel's first lines are a stage; a command's user does not need them otherwise.
    let mut run = args.run.clone();
    run.cmdline =
        Some(["loglevel=6", run.cmdline.as_deref().unwrap_or_default()].join(" ").trim_end().to_owned());
    let options = crate::run::options::from_args(&run)?;
    anyhow::ensure!(!options.plain, "an ordinary VM does nothing that could be traced here; see `perf kvm`");
    anyhow::ensure!(!args.run.launch.dry_run, "a run that starts nothing cannot be traced");
    std::fs::create_dir_all(&args.out).with_context(|| format!("cannot make {}", args.out.display()))?;
    let recording = args.out.join("recording");
    let command = args.run.exec.clone().unwrap_or_else(|| "(a shell)".to_owned());
    let mut around = Around { command, ..Around::default() };
    let status = if cfg!(target_arch = "aarch64") && options.device.exists() {
        record::run(&options, &recording)?
    } else {
        let (status, timeline, directory) = crate::lab::record_realm(&run, &recording)?;
        around.wall = wall(&timeline);
        around.monitor =
            std::fs::read_to_string(directory.join(crate::lab::machine::log::EL3)).unwrap_or_default();
        status
    };
    let story = read(&recording, &around)?;
    write(&story, &args.out)?;
    ui::say(&format!("{}", args.out.join("summary.html").display()));
    Ok(status)
}

fn wall(timeline: &Timeline) -> Vec<(String, Duration)> {
    timeline.stages.iter().map(|stage| (stage.name.clone(), stage.at)).collect()
}

/// What a recording tells.
pub(crate) fn read(recording: &Path, around: &Around) -> Result<Story> {
    let bytes = std::fs::read(recording).with_context(|| format!("cannot read {}", recording.display()))?;
    Story::new(&frames::parse(&bytes)?, around)
}

/// Writes everything that is made of it.
fn write(story: &Story, out: &Path) -> Result<()> {
    let file = |name: &str, bytes: &[u8]| {
        let path = out.join(name);
        std::fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))
    };
    file("trace.json", timeline::json(story).as_bytes())?;
    file("summary.html", page::html(story).as_bytes())?;
    file("summary.json", serde_json::to_string_pretty(&story.json())?.as_bytes())
}
