//! `realm`: the one command of kvm-realm.
//!
//! The same crate runs in two places. On the developer's machine it sets up, builds, and drives QEMU; built for
//! arm64 it runs on the host kernel, emulated or real, and starts Realms on `/dev/kvm-realm`.

mod args;
mod audit;
mod bench;
mod build;
mod command;
mod lab;
mod paths;
mod run;
mod setup;
mod test;
mod ui;
mod verify;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser as _;

use args::{CleanArgs, Cli, Command, RunArgs};

/// The exit status of our own failures: statuses below are the command's that ran in the guest.
const FAILURE: u8 = 125;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = dispatch(&cli.command);
    lab::terminal::restore();
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            ui::line("realm: error", &format!("{error:#}"));
            ExitCode::from(FAILURE)
        }
    }
}

fn dispatch(command: &Command) -> Result<u8> {
    match command {
        Command::Run(args) => run_realm(args),
        Command::Verify(args) => verify::run(args),
        Command::Lab(args) => lab::shell(args),
        Command::Setup(args) => setup::ensure(None, args.update).map(|_| {
            ui::say("everything is set up");
            0
        }),
        Command::Doctor(args) => setup::doctor::run(args),
        Command::Build(args) => build::run(args),
        Command::Test(args) => test::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Clean(args) => clean(args),
        Command::LabAgent => lab::agent::serve(),
        Command::Touch { pages } => bench::touch::run(*pages),
    }
}

/// Where the device is, a Realm runs here; elsewhere on an emulated machine.
fn run_realm(args: &RunArgs) -> Result<u8> {
    if args.attest {
        return verify::round_trip();
    }
    let defaults = run::RunOptions::default();
    let device = match (&args.device, args.plain) {
        (Some(device), _) => device.clone(),
        (None, true) => "/dev/kvm".into(),
        (None, false) => defaults.device.clone(),
    };
    if !cfg!(target_arch = "aarch64") || !device.exists() {
        return lab::run_realm(args);
    }
    run::run_on_device(&run::RunOptions {
        device,
        kernel: args.kernel.clone().unwrap_or(defaults.kernel),
        initrd: args.initrd.clone().or(defaults.initrd),
        cmdline: args.cmdline.clone(),
        memory_mib: args.memory.unwrap_or(defaults.memory_mib),
        cpus: args.cpus.unwrap_or(defaults.cpus),
        exec: args.exec.clone(),
        events_fd: args.events_fd,
        console_log: args.console_log.clone(),
        verbose: args.verbose,
        plain: args.plain,
    })
}

fn clean(args: &CleanArgs) -> Result<u8> {
    let cache = paths::cache()?;
    if args.all {
        if cache.is_dir() {
            std::fs::remove_dir_all(&cache)?;
        }
        ui::say(&format!("removed {}", cache.display()));
    } else {
        paths::forget_old_runs(&cache.join("runs"), 0);
        ui::say(&format!("removed the run directories in {}", cache.display()));
    }
    Ok(0)
}
