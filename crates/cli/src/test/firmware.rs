//! Monitor and RMM below a payload, and below the host kernel alone.

use std::time::Duration;

use anyhow::{Result, bail, ensure};

use super::{host_script, patience};
use crate::args::MachineArgs;
use crate::lab::payload::{self, Payload};
use crate::lab::session::Job;
use crate::lab::stages::Timeline;
use crate::setup::{self, Environment};
use crate::{build, command, lab};

/// How long a payload may run.
const PAYLOAD_LIMIT: Duration = Duration::from_secs(120);

/// The payload in the host kernel's place, as `realm lab --payload` boots it; gives what it printed.
pub(crate) fn run_payload(environment: &Environment, machine: &MachineArgs) -> Result<String> {
    let images = build::build(environment, &["monitor", "rmm", "payload"])?;
    let payload = Payload { file: images.payload.clone(), address: None };
    // It is ours: semihosting only lets it end QEMU with a status.
    let config = payload::config(environment, &images, machine, &payload, true)?;
    let job = Job { capture: true, ..payload::job(&config, PAYLOAD_LIMIT, patience()) };
    let (outcome, directory) = lab::execute(&config, &job, &mut Timeline::new())?;
    let text = String::from_utf8_lossy(&outcome.stdout).into_owned();
    let lines: Vec<&str> = text.lines().filter(|line| line.contains("PAYLOAD: ")).collect();
    let wrong: Vec<&str> = lines.iter().copied().filter(|line| line.contains("FAILED")).collect();
    ensure!(
        wrong.is_empty(),
        "the payload says:\n{}\nall consoles: {}",
        wrong.join("\n"),
        directory.display()
    );
    let complete = lines.last().is_some_and(|line| line.contains("done") && line.contains("all ok"));
    if outcome.status != 0 || !complete {
        let end = command::tail(&text, 10);
        bail!(
            "the payload did not end well (QEMU: {}):\n{end}\nall consoles: {}",
            outcome.status,
            directory.display()
        );
    }
    Ok(lines.join("\n"))
}

/// The other family of the RMM-EL3 interface, and the RMM at another address. (Runs that count have the usual ones.)
pub(super) const OLD_INTERFACE: fn() -> MachineArgs = || MachineArgs {
    rmm_el3: Some("0.x".to_owned()),
    qemu_args: ["-fw_cfg", "name=opt/kvm-realm/rmm-address,string=0x40130000"].map(str::to_owned).to_vec(),
    ..MachineArgs::default()
};

pub(super) fn payload(
    environment: &Environment,
    cpus: u32,
    gib: u64,
    machine: fn() -> MachineArgs,
) -> Result<()> {
    let memory = Some(gib * 1024);
    let machine = MachineArgs { host_cpus: Some(cpus), host_memory: memory, ..machine() };
    let text = run_payload(environment, &machine)?;
    ensure!(text.contains(&format!("done, {cpus} CPUs")), "not all CPUs took part:\n{text}");
    ensure!(text.contains(&format!(", {gib} GiB")), "not all memory was there:\n{text}");
    Ok(())
}

/// Its CPU model has features that the installed one's lacks.
pub(super) fn newest_qemu(environment: &Environment) -> Result<()> {
    let Some((qemu, line)) = setup::newest::ensure(&crate::paths::cache()?)? else {
        println!("  skipped: Debian's archive has no QEMU that is newer than the installed one");
        return Ok(());
    };
    println!("  on {line}");
    let environment = Environment { qemu, ..environment.clone() };
    payload(&environment, 2, 1, MachineArgs::default)
}

pub(super) fn host_boots(environment: &Environment, cpus: u32) -> Result<()> {
    let text = host_script(environment, cpus, false, "nproc; uname -r", 60)?;
    let expected = format!("{cpus}\n{}\n", environment.host.release);
    ensure!(text == expected, "expected {expected:?}, not {text:?}");
    Ok(())
}
