//! The examples for authors of VMMs, on the emulated machine: a kernel is not needed in their Realms, so this is quick.

use anyhow::{Result, ensure};

use super::{on_machine, realms};
use crate::args::MachineArgs;
use crate::build;
use crate::setup::Environment;

/// The tiny VMM prints what its guest says; 200 interrupts by eventfds and messages arrive; every page comes back.
pub(super) fn examples(environment: &Environment) -> Result<()> {
    let machine = MachineArgs { host_cpus: Some(1), ..MachineArgs::default() };
    let examples = build::examples(environment)?;
    let (outcome, text) = on_machine(environment, &machine, &examples, true, &script(), 300)?;
    ensure!(outcome.status == 0 && text == "both\n", "status {}, the host printed:\n{text}", outcome.status);
    Ok(())
}

/// What runs them, and says `both`.
pub(super) fn script() -> String {
    realms::prelude()
        + "[ \"$(/tiny)\" = R ] || { echo 'the tiny VMM did not print what its guest says'; exit 1; }\n\
           settled $before\n\
           /interrupts 50 >/tmp/out 2>&1 || { echo \"the example ended with $?\"; cat /tmp/out; exit 1; }\n\
           grep -q '^interrupts: 200 arrived' /tmp/out || { cat /tmp/out; exit 1; }\n\
           settled $before\n\
           echo both\n"
}
