//! `realm run` where `/dev/kvm-realm` is: builds a Realm from a kernel and an initramfs, runs it, and hands
//! its console, or the output and the status of one command, to the caller.

pub(crate) mod disks;
pub(crate) mod events;
pub(crate) mod launch;
pub(crate) mod manifest;
pub(crate) mod nets;
pub(crate) mod options;
mod session;
pub(crate) mod shares;

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use vmm::fdt::Conduit;
use vmm::image::Image;
use vmm::machine::{Kind, Machine, RealmOptions, Stage};
use vmm::plan::{Plan, Shape};
use vmm::seccomp::Confinement;

use crate::life::args::LifeArgs;
use crate::life::owner::Owner;
use crate::life::registry::Info;
use crate::life::vsock::VsockArg;
use crate::ui;
use disks::DiskArg;
use events::Events;
use launch::{Check, LaunchArgs, Prediction};
use manifest::Manifest;
use nets::NetArgs;
use shares::ShareArg;

/// What to run and where its output goes. Plain data: the command line's parser fills it in.
#[derive(Debug, Clone)]
pub(crate) struct RunOptions {
    /// The KVM device to use.
    pub(crate) device: PathBuf,
    /// The guest's kernel: an arm64 Image, raw, gzipped, or as an EFI zboot file.
    pub(crate) kernel: PathBuf,
    /// The guest's initramfs.
    pub(crate) initrd: Option<PathBuf>,
    /// Words to add to the guest's command line.
    pub(crate) cmdline: Option<String>,
    /// Guest memory in MiB.
    pub(crate) memory_mib: u64,
    /// Number of virtual CPUs.
    pub(crate) cpus: u32,
    /// Run this command (with `sh -c`) instead of an interactive shell.
    pub(crate) exec: Option<String>,
    /// Where stage events go, one JSON object per line.
    pub(crate) events_fd: Option<RawFd>,
    /// Where the verdict on a token comes from that was passed on as an event.
    pub(crate) verdict_fd: Option<RawFd>,
    /// A file that receives everything the guest prints on its console.
    pub(crate) console_log: Option<PathBuf>,
    /// Show the guest's console on stderr when a command is executed.
    pub(crate) verbose: bool,
    /// Run an ordinary virtual machine instead of a Realm.
    pub(crate) plain: bool,
    /// Disks, in their order.
    pub(crate) disks: Vec<DiskArg>,
    /// Network cards, in their order, and the ports behind them.
    pub(crate) nets: NetArgs,
    /// Shared folders.
    pub(crate) shares: Vec<ShareArg>,
    /// What the Realm is created with.
    pub(crate) realm: RealmOptions,
    /// Width of guest physical addresses.
    pub(crate) ipa_bits: Option<u32>,
    /// What becomes of its measurement.
    pub(crate) launch: LaunchArgs,
    /// Where the result goes for programs.
    pub(crate) json: Option<PathBuf>,
    /// Whether threads may make only the system calls that they need.
    pub(crate) confinement: Confinement,
    /// Name and sockets.
    pub(crate) life: LifeArgs,
}

impl RunOptions {
    /// The guest's sockets: by default where somebody may want to talk to it, which a name says.
    pub(crate) fn vsock(&self) -> VsockArg {
        let default = if self.life.is_named() { VsockArg::DEFAULT } else { VsockArg::Off };
        self.life.vsock.clone().unwrap_or(default)
    }
}

impl Default for RunOptions {
    fn default() -> Self {
        Self {
            device: PathBuf::from("/dev/kvm-realm"),
            kernel: PathBuf::from("/guest/kernel"),
            initrd: Some(PathBuf::from("/guest/initrd")),
            cmdline: None,
            memory_mib: 512,
            cpus: 1,
            exec: None,
            events_fd: None,
            verdict_fd: None,
            console_log: None,
            verbose: false,
            plain: false,
            disks: Vec::new(),
            nets: NetArgs::default(),
            shares: Vec::new(),
            realm: RealmOptions::default(),
            ipa_bits: None,
            launch: LaunchArgs::default(),
            json: None,
            confinement: Confinement::On,
            life: LifeArgs::default(),
        }
    }
}

/// Runs the guest until it ends and returns the status that the process should exit with: the executed
/// command's own, 0 for an interactive Realm that was powered off.
pub(crate) fn run_on_device(opts: &RunOptions) -> anyhow::Result<u8> {
    let events = Events::new(opts.events_fd);
    let info = Info {
        place: "device".into(),
        cpus: opts.cpus,
        memory_mib: opts.memory_mib,
        command: opts.exec.clone(),
        ..Info::default()
    };
    let mut owner = Owner::claim(&opts.life, info)?;
    let result = run(opts, &events, &mut owner);
    match &result {
        Ok(_) => events.stage("done"),
        Err(error) => {
            let layer = error.downcast_ref::<vmm::Error>().map_or("VMM", |error| error.layer().name());
            events.error(layer, &format!("{error:#}"));
        }
    }
    owner.end(&result);
    result
}

fn run(opts: &RunOptions, events: &Events, owner: &mut Owner) -> anyhow::Result<u8> {
    if let Some(command) = &opts.exec {
        anyhow::ensure!(
            command.len() <= vmm::control::MAX_COMMAND,
            "the command is longer than {} bytes",
            vmm::control::MAX_COMMAND
        );
    }
    let mut devices = disks::open(&opts.disks)?;
    devices.extend(nets::open(&opts.nets, opts.confinement)?);
    devices.extend(shares::open(&opts.shares)?);
    let plan = Arc::new(plan(opts)?);
    let check = check(opts, &plan)?;
    let kind = if opts.plain { Kind::Plain } else { Kind::Realm(opts.realm) };
    let machine = Machine::new(&opts.device, kind, &plan, &|stage| {
        events.stage(match stage {
            Stage::Created => "realm-created",
            Stage::Populated => "populated",
            Stage::Activated => "activated",
        });
    })?;
    drop(plan);
    let mut status = session::run(opts, machine, devices, events, check.as_ref(), owner)?;
    let quiet = opts.json.as_deref() == Some(Path::new("-"));
    if let Some(check) = &check {
        check.settle()?;
        if opts.launch.attest {
            status = check.finish(quiet)?;
        }
    }
    if let Some(path) = &opts.json {
        let measurement = check.as_ref().map(Check::json);
        ui::json(path, &serde_json::json!({ "status": status, "measurement": measurement }))?;
    }
    Ok(status)
}

/// Predicts the measurement, unless nobody wants to know, or whoever gets the token does so.
fn check(opts: &RunOptions, plan: &Arc<Plan>) -> anyhow::Result<Option<Check>> {
    let launch = &opts.launch;
    let unasked = launch.manifest.is_none() && !launch.wants_token();
    if opts.plain || launch.report.is_some() || unasked {
        return Ok(None);
    }
    let (plan, realm) = (plan.clone(), opts.realm);
    let files = launch.manifest.iter().cloned().collect();
    let prediction = Prediction::start(move || Manifest::new(&plan, &realm), files)?;
    Check::new(launch, prediction).map(Some)
}

/// What is in the guest's memory at the start.
pub(crate) fn plan(opts: &RunOptions) -> anyhow::Result<Plan> {
    opts.realm.check()?;
    let kernel = Image::parse(read(&opts.kernel)?)?;
    let initrd = opts.initrd.as_deref().map(read).transpose()?;
    let shape = Shape {
        ram_size: opts.memory_mib.checked_mul(1 << 20).context("so much memory cannot be addressed")?,
        cpus: opts.cpus,
        ipa_bits: opts.ipa_bits,
        pmu: opts.realm.pmu_counters.is_some(),
        conduit: if opts.plain { Conduit::Hvc } else { Conduit::Smc },
    };
    let mut plan = Plan::new(shape, kernel, initrd, &cmdline(opts))?;
    if let Some(path) = &opts.launch.dtb {
        plan.replace_device_tree(read(path)?)?;
    }
    Ok(plan)
}

/// The guest's command line: the console, and no more talk than somebody will read.
fn cmdline(opts: &RunOptions) -> String {
    let mut words = String::from("console=ttyS0");
    // Each character is an exit: a command's user sees none of them, a shell's user wants a sign of life.
    match (opts.verbose, opts.exec.is_some() || opts.launch.attest) {
        (true, _) => {}
        (false, true) => words.push_str(" quiet"),
        (false, false) => words.push_str(" loglevel=6"),
    }
    // Linux sizes its bounce buffers after the memory (512 KiB here), and a disk's longest request finds no room in that,
    // nor do the buffers of a vsock beside those of the console.
    if !(opts.disks.is_empty() && opts.nets.cards.is_empty() && opts.shares.is_empty()) {
        words.push_str(" swiotlb=8192");
    } else if opts.vsock() != VsockArg::Off {
        words.push_str(" swiotlb=2048");
    }
    if let Some(more) = &opts.cmdline {
        words.push(' ');
        words.push_str(more);
    }
    words
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("reading {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_runs_quietly_unless_somebody_watches() {
        let mut opts = RunOptions { cmdline: Some("nokaslr".into()), ..RunOptions::default() };
        assert_eq!(cmdline(&opts), "console=ttyS0 loglevel=6 nokaslr");
        opts.exec = Some("true".into());
        assert_eq!(cmdline(&opts), "console=ttyS0 quiet nokaslr");
        opts.verbose = true;
        assert_eq!(cmdline(&opts), "console=ttyS0 nokaslr");
    }
}
