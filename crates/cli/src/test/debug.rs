//! What other tests do, on a host kernel that looks for mistakes while it runs: locks in the wrong order or context, sleep
//! where none is allowed, RCU, use of freed memory, lost memory, lists, timers and work that are not what they should be.

use anyhow::{Result, ensure};

use super::{Provoked, examples, load, provoking, realms};
use crate::args::MachineArgs;
use crate::build;
use crate::setup::Environment;

/// What the module's locks guard, of those that are taken here: the kernel must have seen each kind.
const KINDS: &str = "vm.control vm.memory vm.power vm.smccc vcpu.state gmem.pages shared.pages events.registered \
                     events.route vgic.config vgic.cpu vgic.irq its.orders its.translations system.vms system.vmids";

/// Interrupts by eventfds and messages, four vCPUs under load with a disk, VMMs that are killed or run out of memory, a CPU
/// that goes and comes back. The kernel must look for mistakes from the beginning, and still do so at the end: the check of
/// locks switches itself off when it has found a mistake, or has no room. Memory counts as lost if nobody points to it
/// for five seconds, in two looks one after the other; when the module has gone, nothing of it may be left.
pub(super) fn no_complaint(environment: &Environment) -> Result<()> {
    let environment = environment.on_the_debug_host()?;
    let script = format!(
        "wrong() {{ echo \"$*\"; exit 1; }}\n\
         locks() {{ grep -q 'debug_locks: *1$' /proc/lockdep_stats || wrong 'locks are not checked'; }}\n\
         leaks=/sys/kernel/debug/kmemleak\n\
         dmesg | grep -q 'KernelAddressSanitizer initialized' || wrong 'no KASAN'\n\
         echo clear >$leaks || wrong 'lost memory is not looked for'\n\
         locks\n\
         (\n{}\n) || exit 1\n\
         (\n{}\n) || exit 1\n\
         (\n{}\n) || exit 1\n\
         for kind in {KINDS}; do grep -q \": $kind$\" /proc/lockdep || wrong \"no lock of $kind was seen\"; done\n\
         locks\n\
         rmmod kvm_realm || wrong 'the module does not go'\n\
         sleep 6; echo scan >$leaks; echo scan >$leaks; cat $leaks\n\
         locks\n",
        examples::script(),
        load::script(1),
        realms::killing_script(),
    );
    let machine = MachineArgs { host_cpus: Some(4), host_memory: Some(2560), ..MachineArgs::default() };
    let files = build::examples(&environment)?;
    let (outcome, text) =
        provoking(Provoked::OutOfMemory, &environment, &machine, &files, true, &script, 1800)?;
    let expected = format!("both\n{}again\n", load::PRINTED);
    ensure!(outcome.status == 0 && text == expected, "status {}, the host printed:\n{text}", outcome.status);
    Ok(())
}
