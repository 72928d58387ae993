//! The emulated CCA machine on the developer's machine: what to start, and how runs and shells use it.

pub(crate) mod agent;
pub(crate) mod complaints;
pub(crate) mod cpio;
pub(crate) mod images;
pub(crate) mod machine;
mod nets;
pub(crate) mod payload;
pub(crate) mod protocol;
pub(crate) mod report;
pub(crate) mod session;
pub(crate) mod stages;
pub(crate) mod terminal;

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};

use clap::Parser as _;
use vmm::disk::Format;

use crate::args::{CapabilitiesArgs, Cli, Command, LabArgs, MachineArgs, RunArgs};
use crate::build::initramfs::{self, HostParts};
use crate::build::{self, Images};
use crate::life::owner::{INNER_SOCKET, Owner};
use crate::life::registry::Info;
use crate::life::vsock::VsockArg;
use crate::run::launch::{Check, Prediction};
use crate::run::{RunOptions, manifest};
use crate::setup::{self, Environment, Series};
use crate::ui;

use machine::Config;
use protocol::{Io, port};
use session::{Job, Outcome};
use stages::{Milestone, Timeline};

/// The guest's memory in MiB unless --memory says otherwise.
pub(crate) const GUEST_MEMORY: u64 = 512;
/// What the host needs beside its guest's memory, in MiB.
const HOST_MEMORY: u64 = 768;
/// What a host that looks for mistakes needs beside that, in MiB.
const DEBUG_MEMORY: u64 = 1024;
/// How much longer everything may take there.
pub(crate) const DEBUG_PATIENCE: f64 = 6.0;
/// The host kernel's command line. A host that oopses ends at once: QEMU exits on the reset that follows.
const HOST_CMDLINE: &str = "console=ttyAMA0 earlycon=pl011,0x9000000 rdinit=/init panic=-1 oops=panic";

/// The word that boots without firmware.
const NO_FIRMWARE: &str = "none";

/// `realm run` where there is no `/dev/kvm-realm`.
pub(crate) fn run_realm(args: &RunArgs) -> Result<u8> {
    if args.launch.dry_run {
        return boot_realm(args, None, None).map(|(status, ..)| status);
    }
    let info = Info {
        place: "emulated machine".into(),
        cpus: args.cpus.unwrap_or(1),
        memory_mib: args.memory.unwrap_or(GUEST_MEMORY),
        command: args.exec.clone(),
        ..Info::default()
    };
    let mut owner = Owner::claim(&args.life, info)?;
    let result = boot_realm(args, None, Some(&mut owner)).map(|(status, ..)| status);
    owner.end(&result);
    result
}

/// The same, and the emulated host records it to a file.
pub(crate) fn record_realm(args: &RunArgs, recording: &Path) -> Result<(u8, Timeline, PathBuf)> {
    boot_realm(args, Some(recording), None)
}

fn boot_realm(
    args: &RunArgs,
    recording: Option<&Path>,
    owner: Option<&mut Owner>,
) -> Result<(u8, Timeline, PathBuf)> {
    let mut timeline = Timeline::new();
    let environment = setup::for_machine(&args.machine)?;
    timeline.mark("set-up");
    let images = build::for_run(&environment)?;
    let files: Vec<PathBuf> = args.launch.dtb.iter().cloned().collect();
    let parts = host_parts(&environment, &images, &args.kernel, &args.initrd, &files);
    let inner = inner_options(args, &parts)?;
    if args.launch.dry_run {
        return Ok((manifest::dry_run(args, &inner)?, timeline, PathBuf::new()));
    }
    let directory = crate::paths::new_run()?;
    let mut check = if args.plain { None } else { Some(predict(args, inner, &directory)?) };
    if args.machine.firmware.is_none() {
        // Our monitor measures the RMM's image as it is.
        let rmm = args.machine.rmm.as_ref().unwrap_or(&images.rmm);
        let rmm = std::fs::read(rmm).with_context(|| format!("cannot read {}", rmm.display()))?;
        check = check.map(|check| check.with_rmm(&rmm));
    }
    let initrd = initramfs::host(&environment, &parts)?;
    timeline.mark("build");

    let mut config = realm_config(&environment, &images, args, initrd)?;
    let mut job = realm_job(&config, args)?;
    if let Some(check) = check.as_ref().filter(|_| args.launch.wants_token()) {
        ask_for_token(&mut job, check);
    }
    job.check = check;
    // A recording shows when the guest's kernel begins to speak.
    if let Some(recording) = recording {
        record(recording, &mut config, &mut job)?;
    }
    if args.exec.is_none() && !args.launch.attest && std::io::stdin().is_terminal() {
        ui::say("starting a Realm; Ctrl-A X or the guest's `poweroff` ends it");
    }
    let outcome = execute_in(&directory, &config, &job, &mut timeline, owner)?;
    if args.timings {
        eprint!("{}", timeline.table());
        for note in &outcome.notes {
            if let Some(bytes) = note["memory"]["vmm_bytes"].as_f64() {
                eprintln!("{:<28} {:>7.2} MiB", "VMM beside the guest", bytes / 1_048_576.0);
            }
        }
    }
    let mut status = outcome.status;
    if let Some(check) = &job.check {
        check.settle()?;
        if args.launch.attest && status == 0 {
            status = check.finish(args.json.as_deref() == Some(Path::new("-")))?;
        }
        if args.timings {
            eprintln!("{check}");
        }
    }
    if let Some(path) = &args.json {
        let report = serde_json::json!({
            "status": status,
            "stages": timeline.json(),
            "notes": outcome.notes,
            "measurement": job.check.as_ref().map(Check::json),
            "run_directory": &*directory,
        });
        ui::json(path, &report)?;
    }
    Ok((status, timeline, directory.to_path_buf()))
}

/// Has the Realm report for a check.
pub(crate) fn ask_for_token(job: &mut Job, check: &Check) {
    if let Some(argv) = &mut job.argv {
        let verdict = protocol::VERDICT_FD.to_string();
        argv.extend(["--report", check.nonce(), "--verdict-fd", &verdict].map(str::to_owned));
    }
}

/// What lets a recording out of the machine, and the words that make one.
fn record(recording: &Path, config: &mut Config, job: &mut Job) -> Result<()> {
    let file = std::path::absolute(recording)?.to_string_lossy().replace(',', ",,");
    config.extra.extend([
        "-chardev".to_owned(),
        format!("file,id=trace,path={file}"),
        "-device".to_owned(),
        format!("virtserialport,bus=ports.0,chardev=trace,name={},nr=7", crate::trace::PORT),
    ]);
    let words = job.argv.as_mut().context("there is nothing to trace")?;
    let stream = format!("/dev/virtio-ports/{}", crate::trace::PORT);
    let run = words.iter().position(|word| word == "/realm").context("there is no `realm run` to trace")? + 1;
    words.splice(run..=run, ["trace".to_owned(), "--stream".to_owned(), stream]);
    Ok(())
}

/// Starts to make the launch manifest, which every run leaves in its directory: here, where hashing takes no time.
fn predict(args: &RunArgs, inner: RunOptions, directory: &Path) -> Result<Check> {
    let mut files = vec![directory.join(machine::log::MANIFEST)];
    files.extend(args.launch.manifest.clone());
    let make = move || manifest::Manifest::new(&crate::run::plan(&inner)?, &inner.realm);
    Check::new(&args.launch, Prediction::start(make, files)?)
}

/// `realm capabilities` where there is no `/dev/kvm-realm`.
pub(crate) fn capabilities(args: &CapabilitiesArgs) -> Result<u8> {
    let environment = setup::for_machine(&args.machine)?;
    let images = build::for_run(&environment)?;
    let parts = host_parts(&environment, &images, &None, &None, &[]);
    let initrd = initramfs::host(&environment, &parts)?;
    let config = config(&environment, &images, &args.machine, None, None, initrd)?;
    let command = if args.json { "realm capabilities --json" } else { "realm capabilities" };
    let job = host_command(&config, command, true, Duration::from_secs(60), patience(&args.machine));
    let (outcome, _) = execute(&config, &job, &mut Timeline::new())?;
    Ok(outcome.status)
}

/// `realm lab`.
pub(crate) fn shell(args: &LabArgs) -> Result<u8> {
    if let Some(payload) = &args.payload {
        return payload::run(args, payload);
    }
    let mut timeline = Timeline::new();
    let environment = setup::for_machine(&args.machine)?;
    timeline.mark("set-up");
    let firmware = !without_firmware(&args.machine);
    let with_module = firmware && !args.no_module;
    let mut wanted = vec!["realm", "initramfs"];
    if firmware {
        wanted.extend(["monitor", "rmm"]);
    }
    if with_module {
        wanted.push("module");
    }
    let images = build::build(&environment, &wanted)?;
    let mut parts = host_parts(&environment, &images, &args.kernel, &args.initrd, &args.files);
    parts.module = parts.module.filter(|path| with_module || path.is_file());
    let initrd = initramfs::host(&environment, &parts)?;
    timeline.mark("build");

    let config = config(&environment, &images, &args.machine, None, None, initrd)?;
    let job = match &args.exec {
        Some(command) => Job {
            verbose: args.verbose,
            progress: args.verbose || std::io::stderr().is_terminal(),
            ..host_command(
                &config,
                command,
                with_module,
                Duration::from_secs(args.timeout),
                patience(&args.machine),
            )
        },
        None => Job {
            argv: Some(vec!["/bin/sh".to_owned(), "-l".to_owned()]),
            io: Io::Terminal,
            module: with_module,
            events: false,
            milestones: milestones(&config, with_module, false),
            timeout: None,
            patience: patience(&args.machine),
            verbose: args.verbose,
            progress: true,
            capture: false,
            check: None,
        },
    };
    if args.exec.is_none() {
        ui::say("booting to a shell on the host; `exit` or Ctrl-] ends it, `realm run` starts a Realm");
    }
    let (outcome, _) = execute(&config, &job, &mut timeline)?;
    if args.timings {
        eprint!("{}", timeline.table());
    }
    Ok(outcome.status)
}

/// A job that runs one command with the host's shell, without a word about its progress.
pub(crate) fn host_command(
    config: &Config,
    command: &str,
    module: bool,
    timeout: Duration,
    patience: f64,
) -> Job {
    Job {
        argv: Some(["/bin/sh", "-c", command].map(str::to_owned).to_vec()),
        io: Io::Exec,
        module,
        events: false,
        milestones: milestones(config, module, false),
        timeout: Some(timeout),
        patience,
        verbose: false,
        progress: false,
        capture: false,
        check: None,
    }
}

/// A job that runs a Realm.
pub(crate) fn realm_job(config: &Config, args: &RunArgs) -> Result<Job> {
    Ok(Job {
        argv: Some(nets::joined(&args.nets, realm_argv(args)?)),
        io: if args.exec.is_some() || args.launch.attest { Io::Exec } else { Io::Console },
        module: !args.plain,
        events: true,
        milestones: realm_milestones(config, args),
        timeout: None,
        patience: patience(&args.machine),
        verbose: args.verbose,
        progress: args.verbose || std::io::stderr().is_terminal(),
        capture: false,
        check: None,
    })
}

/// Runs a job on a new machine; gives the run directory as well.
pub(crate) fn execute(config: &Config, job: &Job, timeline: &mut Timeline) -> Result<(Outcome, PathBuf)> {
    let directory = crate::paths::new_run()?;
    let outcome = execute_in(&directory, config, job, timeline, None)?;
    Ok((outcome, directory.to_path_buf()))
}

/// The same in a run directory that is there already.
pub(crate) fn execute_in(
    directory: &Path,
    config: &Config,
    job: &Job,
    timeline: &mut Timeline,
    owner: Option<&mut Owner>,
) -> Result<Outcome> {
    let machine = machine::start(config, directory)?;
    timeline.mark("QEMU start");
    let outcome = session::run(machine, job, timeline, owner)?;
    if let (Some(first), false) = (outcome.complaints.first(), job.capture) {
        ui::say(&format!(
            "the host kernel complains ({}): {}",
            directory.join(machine::log::HOST).display(),
            first.trim()
        ));
    }
    Ok(outcome)
}

/// What the run on the emulated host will make of `args`, with this machine's files in their places.
pub(crate) fn inner_options(args: &RunArgs, parts: &HostParts) -> Result<RunOptions> {
    let cli = Cli::try_parse_from(realm_argv(args)?)?;
    let Command::Run(inner) = cli.command else { anyhow::bail!("these are no words for `realm run`") };
    let mut inner = crate::run::options::from_args(&inner)?;
    inner.kernel = parts.kernel.clone().context("there is no guest kernel")?;
    inner.initrd = parts.initrd.clone();
    inner.launch.dtb = args.launch.dtb.clone();
    Ok(inner)
}

/// QEMU's disks for the guest's: the emulated host sees them raw, in the same order, as /dev/vda and so on.
fn drives(args: &RunArgs) -> Result<Vec<String>> {
    let mut words = Vec::new();
    for (index, disk) in args.disks.iter().enumerate() {
        let path = disk.path.to_str().context("a disk's path is not UTF-8")?.replace(',', ",,");
        let format = if disk.format == Format::Qcow2 { "qcow2" } else { "raw" };
        let read_only = if disk.read_only { "on" } else { "off" };
        words.extend([
            "-drive".to_owned(),
            format!("if=none,id=disk{index},file={path},format={format},read-only={read_only},discard=unmap"),
            "-device".to_owned(),
            format!("virtio-blk-pci,drive=disk{index}"),
        ]);
    }
    Ok(words)
}

/// The words of `realm run` on the host, for a `realm run` here.
fn realm_argv(args: &RunArgs) -> Result<Vec<String>> {
    let mut argv: Vec<String> = ["/realm", "run"].map(str::to_owned).to_vec();
    let mut add = |flag: &str, value: Option<String>| {
        if let Some(value) = value {
            argv.extend([flag.to_owned(), value]);
        }
    };
    add("--exec", args.exec.clone());
    // A guest that is timed says its first lines, which its command's user otherwise does not need.
    let words = args.timings.then(|| "loglevel=6".to_owned()).into_iter().chain(args.cmdline.clone());
    add("--cmdline", Some(words.collect::<Vec<_>>().join(" ")).filter(|words| !words.is_empty()));
    add("--memory", Some(args.memory.unwrap_or(GUEST_MEMORY).to_string()));
    add("--cpus", Some(args.cpus.unwrap_or(1).to_string()));
    let realm = &args.realm;
    add("--hash", realm.hash.clone());
    add(
        "--personalization",
        realm.personalization.map(|value| format!("hex:{}", crate::run::options::to_hex(&value.0))),
    );
    for (flag, value) in [
        ("--sve", realm.sve),
        ("--pmu", realm.pmu),
        ("--breakpoints", realm.breakpoints),
        ("--watchpoints", realm.watchpoints),
        ("--ipa-bits", realm.ipa_bits),
    ] {
        add(flag, value.map(|number| number.to_string()));
    }
    for card in nets::inner(&args.nets) {
        add("--net", Some(card));
    }
    anyhow::ensure!(args.disks.len() <= 16, "the emulated machine takes 16 disks at most");
    for (letter, disk) in ('a'..).zip(&args.disks) {
        let read_only = if disk.read_only { ",ro" } else { "" };
        add("--disk", Some(format!("/dev/vd{letter}{read_only}")));
    }
    crate::run::shares::check(&args.shares)?;
    anyhow::ensure!(args.shares.len() <= 8, "the emulated machine takes 8 shared folders at most");
    for (index, share) in args.shares.iter().enumerate() {
        add("--share", Some(format!("/dev/virtio-ports/{},tag={}", port::share(index), share.tag)));
    }
    if let Some(name) = args.launch.dtb.as_ref().and_then(|path| path.file_name()) {
        add("--dtb", Some(format!("/{}", name.to_string_lossy())));
    }
    let life = &args.life;
    add("--api-socket", Some(INNER_SOCKET.to_owned()));
    // Another name than that of the run here would be seen by nobody.
    let name = life.name.clone().or_else(|| life.detach.then(|| "realm".to_owned()));
    add("--name", name);
    match &life.vsock {
        Some(VsockArg::On { socket: Some(_), .. }) => anyhow::bail!(
            "the emulated host's files are its own: use --vsock with socket= with `realm run` in `realm lab`"
        ),
        Some(VsockArg::On { cid, .. }) => add("--vsock", Some(format!("cid={cid}"))),
        Some(VsockArg::Off) => add("--vsock", Some("off".to_owned())),
        None => {}
    }
    if args.exec.is_some() || args.launch.attest {
        add("--console-log", Some(format!("/dev/virtio-ports/{}", port::CONSOLE)));
    }
    for (flag, wanted) in [
        ("--verbose", args.verbose),
        ("--no-seccomp", args.no_seccomp),
        ("--attest", args.launch.attest),
        // What is to be compared, is compared here.
        ("--no-check", !args.launch.attest),
        ("--plain", args.plain),
    ] {
        argv.extend(wanted.then(|| flag.to_owned()));
    }
    Ok(argv)
}

/// What the host's initramfs holds for a run: defaults unless kernel and initramfs are given.
pub(crate) fn host_parts(
    environment: &Environment,
    images: &Images,
    kernel: &Option<PathBuf>,
    initrd: &Option<PathBuf>,
    files: &[PathBuf],
) -> HostParts {
    HostParts {
        realm: Some(images.realm.clone()),
        module: Some(images.module.clone()),
        kernel: Some(kernel.clone().unwrap_or_else(|| environment.unpacked.guest_kernel.clone())),
        initrd: Some(initrd.clone().unwrap_or_else(|| images.guest_initrd.clone())),
        files: files.to_vec(),
    }
}

/// Turns flags and defaults into a machine.
pub(crate) fn config(
    environment: &Environment,
    images: &Images,
    args: &MachineArgs,
    guest_cpus: Option<u32>,
    guest_memory: Option<u64>,
    initrd: PathBuf,
) -> Result<Config> {
    let mut cmdline = HOST_CMDLINE.to_owned();
    if let Some(more) = &args.host_cmdline {
        cmdline.push(' ');
        cmdline.push_str(more);
    }
    let or = |given: &Option<PathBuf>, default: &Path| given.clone().unwrap_or_else(|| default.to_owned());
    let firmware = or(&args.firmware, &images.monitor);
    images::check(args)?;
    Ok(Config {
        qemu: environment.qemu.clone(),
        firmware: (!without_firmware(args)).then(|| (firmware, or(&args.rmm, &images.rmm))),
        kernel: or(&args.host_kernel, &environment.host.kernel),
        initrd: Some(initrd),
        cmdline,
        cpus: args.host_cpus.unwrap_or_else(|| guest_cpus.unwrap_or(1).clamp(1, 8)),
        memory: args.host_memory.unwrap_or_else(|| {
            let more = if environment.host.debug { DEBUG_MEMORY } else { 0 };
            guest_memory.unwrap_or(GUEST_MEMORY) + HOST_MEMORY + more
        }),
        own_firmware: args.firmware.is_none(),
        machine_options: args.machine_options.clone(),
        cpu_options: args.cpu_options.clone(),
        rmm_el3: args.rmm_el3.clone(),
        semihosting: false,
        reboot: false,
        shares: Vec::new(),
        accel: args.accel.clone(),
        extra: args.qemu_args.clone(),
        inherited: Vec::new(),
    })
}

/// The machine for a Realm: with a disk and a network card for each of the guest's.
pub(crate) fn realm_config(
    environment: &Environment,
    images: &Images,
    args: &RunArgs,
    initrd: PathBuf,
) -> Result<Config> {
    let mut config = config(environment, images, &args.machine, args.cpus, args.memory, initrd)?;
    config.extra.extend(drives(args)?);
    let (cards, files) = nets::cards(&args.nets)?;
    config.extra.extend(cards);
    config.inherited.extend(files.into_iter().map(Arc::new));
    config.shares = args.shares.clone();
    Ok(config)
}

/// The stages to wait for.
pub(crate) fn milestones(config: &Config, module: bool, realm: bool) -> Vec<Milestone> {
    let mut list = Vec::new();
    list.extend(firmware_milestones(config));
    list.extend_from_slice(stages::HOST);
    if module {
        list.extend_from_slice(stages::MODULE);
    }
    if realm {
        // A quiet guest may end without a line on its console.
        list.extend(stages::REALM.iter().filter(|milestone| milestone.name != "guest-first-output"));
    }
    list
}

/// The stages of a Realm: another system's first program does not report.
fn realm_milestones(config: &Config, args: &RunArgs) -> Vec<Milestone> {
    let mut list = milestones(config, !args.plain, true);
    list.retain(|milestone| {
        !(args.kernel_from_disk && ["guest-init", "command-done"].contains(&milestone.name))
    });
    list
}

/// The stages that our monitor reports; another firmware has its own words for them, if any.
fn firmware_milestones(config: &Config) -> Vec<Milestone> {
    if config.firmware.is_some() && config.own_firmware { stages::FIRMWARE.to_vec() } else { Vec::new() }
}

/// The factor for time limits.
pub(crate) fn patience(args: &MachineArgs) -> f64 {
    let slow = if args.host == Some(Series::Debug) { DEBUG_PATIENCE } else { 1.0 };
    args.patience.filter(|factor| factor.is_finite() && *factor > 0.0).unwrap_or(1.0) * slow
}

fn without_firmware(args: &MachineArgs) -> bool {
    args.firmware.as_deref() == Some(Path::new(NO_FIRMWARE))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the run on the emulated host makes of the words here.
    fn inner(words: &[&str]) -> RunOptions {
        let parse = |words: Vec<String>| match Cli::try_parse_from(words).unwrap().command {
            Command::Run(args) => args,
            _ => panic!("another command"),
        };
        let outer = parse(["realm", "run"].iter().chain(words).map(|word| (*word).to_owned()).collect());
        crate::run::options::from_args(&parse(realm_argv(&outer).unwrap())).unwrap()
    }

    #[test]
    fn whoever_is_left_in_the_background_can_be_talked_to_with_or_without_a_name() {
        assert_eq!(inner(&[]).vsock(), VsockArg::Off);
        assert_eq!(inner(&["--name", "web"]).vsock(), VsockArg::DEFAULT);
        assert_eq!(inner(&["--detach"]).vsock(), VsockArg::DEFAULT);
        assert_eq!(inner(&["--detach", "--vsock", "off"]).vsock(), VsockArg::Off);
    }
}
