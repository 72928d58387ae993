//! What is checked without QEMU: format, lints, unit tests, explored schedules.

use std::process::Command;

use anyhow::Result;

use crate::command;
use crate::setup::{self, Environment};

/// Cargo for this machine, in the checkout.
fn cargo(arguments: &[&str]) -> Result<()> {
    let mut cargo = Command::new("cargo");
    cargo.current_dir(crate::paths::checkout()?).env("CARGO_TARGET_DIR", crate::paths::target()?);
    cargo.args(arguments);
    command::output(&mut cargo).map(|_| ())
}

pub(super) fn format(_: &Environment) -> Result<()> {
    cargo(&["fmt", "--all", "--", "--check"])
}

pub(super) fn lint(_: &Environment) -> Result<()> {
    cargo(&["clippy", "--quiet", "--all-targets", "--", "-D", "warnings"])
}

/// What only exists on the bare target.
pub(super) fn lint_arm64(environment: &Environment) -> Result<()> {
    let mut cargo = environment.rust.cargo(&environment.rust.bare);
    cargo.current_dir(crate::paths::checkout()?).env("CARGO_TARGET_DIR", crate::paths::target()?);
    cargo.args(["clippy", "--quiet", "--release", "--target", setup::rust::BARE]);
    for package in ["agent-image", "monitor-image", "rmm-image", "payload-image", "kvm-realm-glue"] {
        cargo.args(["-p", package]);
    }
    cargo.args(["--", "-D", "warnings"]);
    command::output(&mut cargo).map(|_| ())
}

pub(super) fn unit(_: &Environment) -> Result<()> {
    cargo(&["test", "--quiet"])
}

/// The RMM's commands under explored schedules: a build of its own, with other atomics.
pub(super) fn schedules(_: &Environment) -> Result<()> {
    cargo(&["test", "--quiet", "-p", "rmm", "--features", "explore", "--lib", "schedules"])
}

/// The host core with all its threads on the simulated machine, under explored schedules.
pub(super) fn host_schedules(_: &Environment) -> Result<()> {
    // Optimized a little: five times as many schedules. All tests that way would take longer to compile than to run.
    let faster =
        ["kvm-realm", "sim", "shuttle"].map(|name| format!("profile.dev.package.{name}.opt-level=1"));
    let mut arguments = vec!["test", "--quiet", "-p", "sim", "--features", "explore", "--test", "schedules"];
    faster.iter().for_each(|option| arguments.extend(["--config", option]));
    cargo(&arguments)
}

/// PSCI and the division of protection blocks, in many orders of their steps.
pub(super) fn monitor_schedules(_: &Environment) -> Result<()> {
    cargo(&["test", "--quiet", "-p", "monitor", "--features", "explore"])
}
