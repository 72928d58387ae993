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
    for package in ["monitor-image", "rmm-image", "payload-image", "kvm-realm-glue"] {
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

/// PSCI and the division of protection blocks, in many orders of their steps.
pub(super) fn monitor_schedules(_: &Environment) -> Result<()> {
    cargo(&["test", "--quiet", "-p", "monitor", "--features", "explore"])
}
