//! Realms on other host kernels than the usual one.

use anyhow::{Result, ensure};

use super::host_script;
use super::realms::prelude;
use crate::setup::Environment;

/// The kernel that is the guest's is the host's as well; the host's own is that of every other test.
pub(super) fn newest_host(environment: &Environment) -> Result<()> {
    let environment = environment.on_the_newest_host()?;
    let script = prelude()
        + "uname -r\n\
           realm run --cpus 2 --exec 'nproc; echo hello' || exit 1\n\
           settled $before\n\
           rmmod kvm_realm || exit 1\n";
    let text = host_script(&environment, 2, true, &script, 600)?;
    let expected = format!("{}\n2\nhello\n", environment.host.release);
    ensure!(text == expected, "expected {expected:?}, not {text:?}");
    Ok(())
}
