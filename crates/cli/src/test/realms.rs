//! Realms on the emulated machine: their lives and ends, and what the host cannot do to them.

use anyhow::{Result, ensure};

use super::folder::{COMMANDS, Folder, PRINTED};
use super::network::Outside;
use super::{COUNTERS, Provoked, exec_with, host_script, provoking};
use crate::args::{MachineArgs, RunArgs};
use crate::setup::Environment;

/// Output, errors elsewhere, status, what the guest's kernel found out about where it runs, the network that needs no
/// privileges (out to this machine, and in through a published port), one at a socket of this machine, and a folder of it.
pub(super) fn exec_gives(environment: &Environment) -> Result<()> {
    let network = Outside::start()?;
    let folder = Folder::start()?;
    let command = format!(
        "echo one; echo error >&2; echo two; dmesg | grep -c 'Using RSI version'\n\
         echo published >/tmp/index.html; httpd -p 80 -h /tmp; wget -q -O - http://10.0.2.2:{}/\n\
         ip addr add 10.9.0.2/24 dev eth1; ip link set eth1 up; arping -q -c 3 -f -I eth1 10.9.0.1 && echo neighbour\n\
         {COMMANDS}exit 7",
        network.port
    );
    let flags = RunArgs { shares: folder.flags(), ..network.flags() };
    let result = exec_with(environment, &command, flags)?;
    ensure!(
        result == (7, format!("one\ntwo\n1\npublished\nneighbour\n{PRINTED}")),
        "status and output are {result:?}"
    );
    folder.check()?;
    Ok(())
}

/// Shell functions for the scripts below.
pub(super) fn prelude() -> String {
    format!(
        "counter() {{ cat {COUNTERS}/$1; }}\n\
         settled() {{\n\
         \tfor try in 1 2 3 4 5 6 7 8 9 10; do\n\
         \t\t[ $(counter granules_delegated) = $1 ] && [ $(counter vms) = 0 ] && break; sleep 1\n\
         \tdone\n\
         \tfor pair in granules_delegated:$1 granules_leaked:0 vms:0 pages_pinned:0; do\n\
         \t\tname=${{pair%:*}} want=${{pair#*:}} have=$(counter $name)\n\
         \t\t[ \"$have\" = \"$want\" ] || {{ echo \"$name is $have, not $want\"; exit 1; }}\n\
         \tdone\n\
         }}\n\
         before=$(counter granules_delegated)\n"
    )
}

/// Two at a time, one of which wants no messages, so that its devices interrupt by lines. The counters are the module's own
/// watch over its SMCs, not what the core believes. On the way the module leaves and comes back.
pub(super) fn ten_realms(environment: &Environment) -> Result<()> {
    let script = prelude()
        + "for round in 1 3 5 7 9; do\n\
           \trealm run --no-check --cmdline pci=nomsi --exec \"echo realm $round \\$(grep ITS /proc/interrupts)\" >/tmp/first &\n\
           \trealm run --no-check --exec \"echo realm $((round + 1))\" >/tmp/second || { echo \"realm $((round + 1)) ended with $?\"; exit 1; }\n\
           \twait $! || { echo \"realm $round ended with $?\"; exit 1; }\n\
           \tcat /tmp/first /tmp/second\n\
           \tsettled $before\n\
           \t[ $round = 5 ] || continue\n\
           \trmmod kvm_realm || exit 1\n\
           \t[ -e /dev/kvm-realm ] && { echo 'the device is still there'; exit 1; }\n\
           \tinsmod /kvm_realm.ko || exit 1\n\
           \tbefore=0\n\
           \tsettled 0\n\
           done\n\
           rmmod kvm_realm || exit 1\n";
    let text = host_script(environment, 2, true, &script, 1200)?;
    let expected: String = (1..=10).map(|round| format!("realm {round}\n")).collect();
    ensure!(text == expected, "the ten Realms printed:\n{text}");
    Ok(())
}

pub(super) fn killed_vmm(environment: &Environment) -> Result<()> {
    let machine = MachineArgs { host_cpus: Some(2), ..MachineArgs::default() };
    let script = killing_script();
    let (outcome, text) = provoking(Provoked::OutOfMemory, environment, &machine, &[], true, &script, 900)?;
    ensure!(outcome.status == 0 && text == "again\n", "the host printed:\n{text}");
    Ok(())
}

/// What kills VMMs, and says `again`.
pub(super) fn killing_script() -> String {
    // Killed while the guest runs, and earlier, while memory is populated. Before that, a CPU goes and comes back under
    // the guest, the machine is asked to sleep, and the kernel's tracer has seen what happened. The first VMM's control group
    // pays for its Realm; another one has a limit that is below what its Realm needs, and is killed when it reaches it.
    prelude()
        + "groups=/sys/fs/cgroup\n\
           mount -t cgroup2 none $groups && echo +memory >$groups/cgroup.subtree_control || exit 1\n\
           mkdir $groups/owner $groups/small && echo 48M >$groups/small/memory.max || exit 1\n\
           within() { echo 0 >$groups/$1/cgroup.procs && shift && exec \"$@\"; }\n\
           used() { cat $groups/$1/memory.current; }\n\
           mount -t tracefs none /sys/kernel/tracing\n\
           echo 1 >/sys/kernel/tracing/events/kvm_realm/enable || exit 1\n\
           within owner realm run --no-check --exec 'echo up; sleep 1000' >/tmp/out &\n\
           vmm=$!\n\
           for second in $(seq 240); do grep -q up /tmp/out && break; sleep 1; done\n\
           grep -q up /tmp/out || { echo 'the guest did not come up'; exit 1; }\n\
           echo 0 >/sys/kernel/tracing/tracing_on\n\
           pages=$(counter granules_delegated) charged=$(used owner)\n\
           realm=$(((pages - before) * 4096))\n\
           echo \"the Realm has $realm bytes, $charged are charged\" >&2\n\
           [ $charged -ge $realm ] && [ $charged -le $((realm + (64 << 20))) ] ||\n\
           \t{ echo \"the Realm has $realm bytes, $charged are charged:\"; cat $groups/owner/memory.stat; }\n\
           (within small realm run --no-check --exec true) >/tmp/small 2>&1\n\
           status=$?\n\
           [ $status = 137 ] || { echo \"the limited one ended with $status\"; cat /tmp/small; }\n\
           grep -q '^oom_kill 1' $groups/small/memory.events || cat $groups/small/memory.events\n\
           # The first guest may touch a few pages more meanwhile; the limited one had thousands.\n\
           more=$(($(counter granules_delegated) - pages))\n\
           [ $more -ge 0 ] && [ $more -lt 1000 ] || echo \"after the limited one there are $more pages more\"\n\
           for event in rmi enter exit fault; do\n\
           \tgrep -q \" $event: \" /sys/kernel/tracing/trace || { echo \"no $event was traced\"; exit 1; }\n\
           done\n\
           cpu=/sys/devices/system/cpu/cpu1/online\n\
           echo 0 >$cpu && sleep 1 && echo 1 >$cpu || { echo 'no CPU hotplug'; exit 1; }\n\
           echo freeze >/sys/power/state && { echo 'the machine slept'; exit 1; }\n\
           kill -0 $vmm || { echo 'the guest did not survive'; exit 1; }\n\
           kill -9 $vmm; wait $vmm 2>/dev/null\n\
           settled $before\n\
           echo \"$(used owner) and $(used small) bytes stay charged\" >&2\n\
           for group in owner small; do\n\
           \t[ $(used $group) -lt $((4 << 20)) ] || { echo \"$(used $group) bytes stay charged:\"; cat $groups/$group/memory.stat; }\n\
           done\n\
           realm run --no-check --exec true >/dev/null & vmm=$!\n\
           while [ $(counter granules_delegated) -lt $((before + 1000)) ]; do sleep 0.05; done\n\
           kill -9 $vmm; wait $vmm 2>/dev/null\n\
           settled $before\n\
           realm run --no-check --exec 'echo again'\n\
           settled $before\n"
}

/// The module reads the page for us: nothing else of a stock kernel has a reason to. The kernel names the fault by the
/// number of its status code, 0x28: a granule protection fault. The VMM has the memory as a file and no mapping of it.
pub(super) fn private_page(environment: &Environment) -> Result<()> {
    let script = format!(
        "echo 0 >/proc/sys/kernel/panic_on_oops\n\
         insmod /kvm_realm.ko unsafe_tests=1 || exit 1\n\
         realm run --no-check --exec 'echo up; sleep 1000' >/tmp/out &\n\
         vmm=$!\n\
         for second in $(seq 240); do grep -q up /tmp/out && break; sleep 1; done\n\
         grep -q up /tmp/out || {{ echo 'the guest did not come up'; exit 1; }}\n\
         ls -l /proc/$vmm/fd | grep -q kvm-realm-gmem || {{ echo 'the VMM has no private memory'; exit 1; }}\n\
         grep kvm-realm-gmem /proc/$vmm/maps && {{ echo 'the VMM has mapped private memory'; exit 1; }}\n\
         page=$(cat {COUNTERS}/last_private_page)\n\
         case $page in ''|0|0x0) echo 'no private page'; exit 1;; esac\n\
         if echo $page >{COUNTERS}/read_page; then echo \"the host read $page\"; exit 1; fi\n\
         dmesg | grep -iE 'unknown 40|granule protection' >/tmp/fault || {{ echo 'no fault in the log'; exit 1; }}\n\
         echo 'it faulted'\n"
    );
    let machine = MachineArgs { host_cpus: Some(1), ..MachineArgs::default() };
    let (outcome, text) = provoking(Provoked::Oops, environment, &machine, &[], false, &script, 600)?;
    ensure!(outcome.status == 0 && text.ends_with("it faulted\n"), "the host printed:\n{text}");
    Ok(())
}
