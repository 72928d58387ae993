//! `realm`: the one command of kvm-realm.
//!
//! The same crate runs in two places. On the developer's machine it sets up, builds, and drives QEMU; built for
//! arm64 it runs on the host kernel, emulated or real, and starts Realms on `/dev/kvm-realm`.

mod args;
mod audit;
mod bench;
mod build;
mod capabilities;
mod cmdline;
mod command;
mod image;
mod lab;
mod life;
mod log;
mod paths;
mod run;
mod setup;
mod test;
mod trace;
mod ui;
mod verify;

use std::process::ExitCode;

use anyhow::Result;
use args::{CleanArgs, Command, RunArgs};

/// The exit status of our own failures: statuses below are the command's that ran in the guest.
const FAILURE: u8 = 125;

fn main() -> ExitCode {
    end_with_a_panic();
    let result = cmdline::parse().and_then(|cli| dispatch(&cli.command));
    lab::terminal::restore();
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            ui::line("realm: error", &format!("{error:#}"));
            ExitCode::from(FAILURE)
        }
    }
}

/// A panic in any thread ends the process, whichever profile it was built in.
fn end_with_a_panic() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        usual(info);
        std::process::abort();
    }));
}

fn dispatch(command: &Command) -> Result<u8> {
    match command {
        Command::Run(args) => run_realm(args),
        Command::Trace(args) => trace::run(args),
        Command::Ps(args) => life::client::ps(args),
        Command::Exec(args) => life::client::exec(args),
        Command::Cp(args) => life::client::cp(args),
        Command::Console(args) => life::client::console(args),
        Command::Logs(args) => life::client::logs(args),
        Command::Stop(args) => life::client::stop(args),
        Command::Info(args) => life::client::info(args),
        Command::Verify(args) => verify::run(args),
        Command::Measure(args) => run::manifest::measure(args),
        Command::Capabilities(args) => capabilities::run(args),
        Command::Image(args) => image::run(args),
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
        Command::Completions(args) => cmdline::completions(args),
        Command::Man(args) => cmdline::man(args),
        Command::LabAgent => lab::agent::serve(),
        Command::CountOverflows { times } => test::overflows::run(*times),
        Command::Touch { pages } => bench::guest::run(*pages),
        Command::Probe => bench::guest::probe(),
    }
}

/// Where the device is, a Realm runs here; elsewhere on an emulated machine.
fn run_realm(args: &RunArgs) -> Result<u8> {
    let args = &image::boot::resolve(args.clone())?;
    let options = run::options::from_args(args)?;
    if args.life.detach && args.life.ready_fd.is_none() {
        return life::owner::detach();
    }
    if !cfg!(target_arch = "aarch64") || !options.device.exists() {
        return lab::run_realm(args);
    }
    if args.launch.dry_run {
        return run::manifest::dry_run(args, &options);
    }
    run::run_on_device(&options)
}

fn clean(args: &CleanArgs) -> Result<u8> {
    let cache = paths::cache()?;
    let living = paths::forget_old_runs(&cache.join("runs"), 0);
    if args.all {
        if let Some(run) = living.first() {
            anyhow::bail!("a run still uses {}: end it first (`realm ps`, `realm stop`)", run.display());
        }
        if cache.is_dir() {
            std::fs::remove_dir_all(&cache)?;
        }
        ui::say(&format!("removed {}", cache.display()));
        return Ok(0);
    }
    let kept = if living.is_empty() { String::new() } else { format!("; {} still in use", living.len()) };
    ui::say(&format!("removed the run directories in {}{kept}", cache.display()));
    Ok(0)
}
