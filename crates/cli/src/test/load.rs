//! Realms with several vCPUs under load, on other host kernels than the usual one too.

use anyhow::{Result, ensure};

use super::host_script;
use super::realms::prelude;
use crate::setup::Environment;

/// What the guest does: all four vCPUs hash the same data at once, each for itself, while a disk is read without a cache, so
/// that it interrupts all the time. Each vCPU must have worked, and the disk must have interrupted.
const GUEST: &str = "\
    interrupts() { sed -n '/virtio.*req/{s/^[^:]*://;s/[A-Za-z].*//;p}' /proc/interrupts | tr -s ' ' '\\n' | \
        awk '{sum += $1} END {print sum + 0}'; }\n\
    dd if=/dev/vda of=/tmp/data bs=64k 2>/dev/null\n\
    want=$(sha256sum </tmp/data)\n\
    before=$(interrupts)\n\
    (while [ ! -e /tmp/stop ]; do dd if=/dev/vda of=/dev/null bs=8k iflag=direct 2>/dev/null || echo unreadable; done) &\n\
    reader=$!\n\
    for cpu in 0 1 2 3; do\n\
    \ttaskset -c $cpu sh -c \"for n in 1 2 3 4; do [ \\\"\\$(sha256sum </tmp/data)\\\" = '$want' ] && echo; done\" >/tmp/hashes$cpu &\n\
    \tworkers=\"$workers $!\"\n\
    done\n\
    wait $workers\n\
    touch /tmp/stop; wait $reader\n\
    more=$(($(interrupts) - before))\n\
    echo $(nproc) CPUs, $(cat /tmp/hashes? | wc -l) hashes\n\
    [ $more -ge 16 ] || echo only $more interrupts\n";

/// Starts so many Realms one after the other on one host; after each, everything has come back, and the module can go.
fn rounds(environment: &Environment, count: u32) -> Result<()> {
    let script = format!("uname -r\n{}rmmod kvm_realm || exit 1\n", script(count));
    let text = host_script(environment, 4, true, &script, u64::from(count) * 240)?;
    let rounds = PRINTED.repeat(usize::try_from(count)?);
    let expected = format!("{}\n{rounds}", environment.host.release);
    ensure!(text == expected, "the {count} Realms printed:\n{text}");
    Ok(())
}

/// What one Realm prints.
pub(super) const PRINTED: &str = "4 CPUs, 16 hashes\n";

/// What starts so many Realms.
pub(super) fn script(count: u32) -> String {
    prelude()
        + &format!(
            "dd if=/dev/urandom of=/tmp/disk bs=64k count=8 2>/dev/null\n\
             for round in $(seq {count}); do\n\
             \tstart=$(cut -d. -f1 /proc/uptime)\n\
             \trealm run --no-check --cpus 4 --memory 256 --disk /tmp/disk,ro --console-log /tmp/console --exec '{}' \\\n\
             \t\t|| {{ echo \"round $round ended with $?\"; cat /tmp/console; exit 1; }}\n\
             \tgrep -q 'reboot: Power down' /tmp/console || {{ echo 'no clean end:'; cat /tmp/console; exit 1; }}\n\
             \tsettled $before\n\
             \techo \"round $round took $(($(cut -d. -f1 /proc/uptime) - start)) s of the machine\" >&2\n\
             done\n",
            GUEST.replace('\'', "'\\''")
        )
}

/// The kernel that is the guest's is the host's as well; the host's own is that of every other test.
pub(super) fn on_the_newest_host(environment: &Environment) -> Result<()> {
    rounds(&environment.on_the_newest_host()?, 1)
}

pub(super) fn twenty_rounds(environment: &Environment) -> Result<()> {
    rounds(environment, 20)
}
