//! `realm test`: everything that is checked, from formatting to Realms on the emulated machine.
//!
//! Every test has a name and is independent: it builds what it needs (which costs nothing the second time), boots a
//! machine of its own, and reports with the layer and the console that matter.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::args::{MachineArgs, RunArgs, TestArgs};
use crate::build::{self, initramfs};
use crate::command;
use crate::lab::payload::{self, Payload};
use crate::lab::session::{Job, Outcome};
use crate::lab::stages::Timeline;
use crate::lab::{self, machine};
use crate::setup::{self, Environment};
use crate::ui;

/// The module's counters.
pub(crate) const COUNTERS: &str = "/sys/kernel/debug/kvm-realm";
/// How long a payload may run.
const PAYLOAD_LIMIT: Duration = Duration::from_secs(120);

/// One test.
struct Test {
    name: &'static str,
    /// Whether `--quick` leaves it out.
    emulated: bool,
    /// Whether only `--full` or its name runs it.
    long: bool,
    run: fn(&Environment) -> Result<()>,
}

const fn quick(name: &'static str, run: fn(&Environment) -> Result<()>) -> Test {
    Test { name, emulated: false, long: false, run }
}

const fn emulated(name: &'static str, run: fn(&Environment) -> Result<()>) -> Test {
    Test { name, emulated: true, long: false, run }
}

/// All tests in their order: what is quick and fails often comes first.
const TESTS: &[Test] = &[
    quick("format", format),
    quick("lint", lint),
    quick("lint-arm64", lint_arm64),
    quick("unit-property-and-simulation", unit),
    quick("commands-of-several-cpus-have-an-order", schedules),
    quick("monitor-keeps-order-among-cpus", monitor_schedules),
    quick("images-cannot-panic", crate::audit::panics),
    quick("stacks-are-bounded", crate::audit::stacks),
    emulated("payload-on-1-cpu-by-interface-0.x", |environment| payload(environment, 1, 1, OLD_INTERFACE)),
    emulated("payload-on-4-cpus-and-64-gib", |environment| payload(environment, 4, 64, MachineArgs::default)),
    emulated("payload-on-the-newest-qemu", newest_qemu),
    emulated("costs-stay-within-their-limits", crate::bench::check),
    emulated("host-boots-on-1-cpu", |environment| host_boots(environment, 1)),
    emulated("host-boots-on-4-cpus", |environment| host_boots(environment, 4)),
    emulated("exec-gives-output-and-status-0", exec_status_0),
    emulated("exec-gives-status-7", exec_status_7),
    emulated("guest-knows-that-it-is-a-realm", guest_knows),
    emulated("stock-guest-attests-through-configfs-tsm", stock_guest_attests),
    emulated("ten-realms-lose-no-page", ten_realms),
    emulated("killed-vmm-leaves-nothing", killed_vmm),
    emulated("host-cannot-read-a-private-page", private_page),
    emulated("module-unloads-and-loads-again", unload),
    emulated("devices-work-and-the-measurement-is-predicted", devices),
    Test { name: "guide-does-what-it-says", emulated: true, long: true, run: guide },
];

/// Runs the tests; the status is 1 when one failed.
pub(crate) fn run(args: &TestArgs) -> Result<u8> {
    let wanted: Vec<&Test> = TESTS
        .iter()
        .filter(|test| !(args.quick && test.emulated))
        .filter(|test| !test.long || args.full || !args.only.is_empty())
        .filter(|test| args.only.is_empty() || args.only.iter().any(|name| test.name.contains(name.as_str())))
        .collect();
    if args.list {
        wanted.iter().for_each(|test| println!("{}", test.name));
        return Ok(0);
    }
    ensure!(!wanted.is_empty(), "no test has such a name: see `realm test --list`");
    let environment = setup::ensure(None, false)?;
    let (mut passed, mut failed) = (0, Vec::new());
    for test in wanted {
        println!("test {} ...", test.name);
        let start = Instant::now();
        match (test.run)(&environment) {
            Ok(()) => {
                passed += 1;
                println!("test {}: ok ({})", test.name, ui::seconds(start.elapsed()));
            }
            Err(error) => {
                println!("test {}: FAILED ({})\n{error:#}\n", test.name, ui::seconds(start.elapsed()));
                failed.push(test.name);
            }
        }
    }
    for name in &failed {
        println!("failed: {name}");
    }
    println!("{passed} passed, {} failed", failed.len());
    Ok(u8::from(!failed.is_empty()))
}

/// Cargo for this machine, in the checkout.
fn cargo(arguments: &[&str]) -> Result<()> {
    let mut cargo = Command::new("cargo");
    cargo.current_dir(crate::paths::checkout()?).env("CARGO_TARGET_DIR", crate::paths::target()?);
    cargo.args(arguments);
    command::output(&mut cargo).map(|_| ())
}

fn format(_: &Environment) -> Result<()> {
    cargo(&["fmt", "--all", "--", "--check"])
}

fn lint(_: &Environment) -> Result<()> {
    cargo(&["clippy", "--quiet", "--all-targets", "--", "-D", "warnings"])
}

/// What only exists on the bare target.
fn lint_arm64(environment: &Environment) -> Result<()> {
    let mut cargo = environment.rust.cargo(&environment.rust.bare);
    cargo.current_dir(crate::paths::checkout()?).env("CARGO_TARGET_DIR", crate::paths::target()?);
    cargo.args(["clippy", "--quiet", "--release", "--target", setup::rust::BARE]);
    for package in ["monitor-image", "rmm-image", "payload-image", "kvm-realm-glue"] {
        cargo.args(["-p", package]);
    }
    cargo.args(["--", "-D", "warnings"]);
    command::output(&mut cargo).map(|_| ())
}

fn unit(_: &Environment) -> Result<()> {
    cargo(&["test", "--quiet"])
}

/// The RMM's commands under explored schedules: a build of its own, with other atomics.
fn schedules(_: &Environment) -> Result<()> {
    cargo(&["test", "--quiet", "-p", "rmm", "--features", "explore", "--lib", "schedules"])
}

/// PSCI and the division of protection blocks, in many orders of their steps.
fn monitor_schedules(_: &Environment) -> Result<()> {
    cargo(&["test", "--quiet", "-p", "monitor", "--features", "explore"])
}

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
const OLD_INTERFACE: fn() -> MachineArgs = || MachineArgs {
    rmm_el3: Some("0.x".to_owned()),
    qemu_args: ["-fw_cfg", "name=opt/kvm-realm/rmm-address,string=0x40130000"].map(str::to_owned).to_vec(),
    ..MachineArgs::default()
};

fn payload(environment: &Environment, cpus: u32, gib: u64, machine: fn() -> MachineArgs) -> Result<()> {
    let memory = Some(gib * 1024);
    let machine = MachineArgs { host_cpus: Some(cpus), host_memory: memory, ..machine() };
    let text = run_payload(environment, &machine)?;
    ensure!(text.contains(&format!("done, {cpus} CPUs")), "not all CPUs took part:\n{text}");
    ensure!(text.contains(&format!(", {gib} GiB")), "not all memory was there:\n{text}");
    Ok(())
}

/// Its CPU model has features that the installed one's lacks.
fn newest_qemu(environment: &Environment) -> Result<()> {
    let Some((qemu, line)) = setup::newest::ensure(&crate::paths::cache()?)? else {
        println!("  skipped: Debian's archive has no QEMU that is newer than the installed one");
        return Ok(());
    };
    println!("  on {line}");
    let environment = Environment { qemu, ..environment.clone() };
    payload(&environment, 2, 1, MachineArgs::default)
}

/// The factor for time limits. They only end what hangs, and a test must not fail because a machine is slow.
fn patience() -> f64 {
    std::env::var("REALM_PATIENCE").ok().and_then(|text| text.parse().ok()).unwrap_or(3.0)
}

/// Runs a script with the host's shell on a machine of its own; gives status and output.
pub(crate) fn on_host(
    environment: &Environment,
    cpus: u32,
    module: bool,
    script: &str,
    limit: u64,
) -> Result<(Outcome, String)> {
    let machine = MachineArgs { host_cpus: Some(cpus), ..MachineArgs::default() };
    on_machine(environment, &machine, &[], module, script, limit)
}

/// As [`on_host`], on a machine of any shape, with more files in its root directory.
pub(crate) fn on_machine(
    environment: &Environment,
    machine: &MachineArgs,
    files: &[PathBuf],
    module: bool,
    script: &str,
    limit: u64,
) -> Result<(Outcome, String)> {
    let images = build::for_run(environment)?;
    let parts = lab::host_parts(environment, &images, &None, &None, files);
    let initrd = initramfs::host(environment, &parts)?;
    let config = lab::config(environment, &images, machine, None, None, initrd)?;
    let job = Job {
        capture: true,
        ..lab::host_command(&config, script, module, Duration::from_secs(limit), patience())
    };
    let (outcome, directory) = lab::execute(&config, &job, &mut Timeline::new())?;
    let mut text = String::from_utf8_lossy(&outcome.stdout).into_owned();
    if outcome.status != 0 {
        let errors = std::fs::read(directory.join(machine::log::PROGRAM)).unwrap_or_default();
        text.push_str(&String::from_utf8_lossy(&errors));
        let console = std::fs::read(directory.join(machine::log::HOST)).unwrap_or_default();
        text.push_str("--- the end of the host's console ---\n");
        text.push_str(&command::tail(&String::from_utf8_lossy(&console), 15));
        text.push_str(&format!("\nall consoles: {}", directory.display()));
    }
    Ok((outcome, text))
}

/// Like [`on_host`], for scripts that end with 0 when all is well.
fn host_script(
    environment: &Environment,
    cpus: u32,
    module: bool,
    script: &str,
    limit: u64,
) -> Result<String> {
    let (outcome, text) = on_host(environment, cpus, module, script, limit)?;
    ensure!(outcome.status == 0, "the script on the host ended with {}:\n{text}", outcome.status);
    Ok(text)
}

fn host_boots(environment: &Environment, cpus: u32) -> Result<()> {
    let text = host_script(environment, cpus, false, "nproc; uname -r", 60)?;
    let expected = format!("{cpus}\n{}\n", environment.unpacked.host_release);
    ensure!(text == expected, "expected {expected:?}, not {text:?}");
    Ok(())
}

/// `realm run --exec` as a user starts it, but with its output caught.
fn exec(environment: &Environment, command: &str) -> Result<(u8, String)> {
    let images = build::for_run(environment)?;
    let arguments = RunArgs { exec: Some(command.to_owned()), ..RunArgs::default() };
    let parts = lab::host_parts(environment, &images, &None, &None, &[]);
    let initrd = initramfs::host(environment, &parts)?;
    let config = lab::config(environment, &images, &arguments.machine, None, None, initrd)?;
    let job = Job {
        capture: true,
        progress: false,
        timeout: Some(Duration::from_secs(120)),
        patience: patience(),
        ..lab::realm_job(&config, &arguments)?
    };
    let (outcome, _) = lab::execute(&config, &job, &mut Timeline::new())?;
    Ok((outcome.status, String::from_utf8_lossy(&outcome.stdout).into_owned()))
}

fn exec_status_0(environment: &Environment) -> Result<()> {
    let result = exec(environment, "echo one; echo two")?;
    ensure!(result == (0, "one\ntwo\n".to_owned()), "status and output are {result:?}");
    Ok(())
}

fn exec_status_7(environment: &Environment) -> Result<()> {
    let result = exec(environment, "exit 7")?;
    ensure!(result == (7, String::new()), "status and output are {result:?}");
    Ok(())
}

fn guest_knows(environment: &Environment) -> Result<()> {
    let (status, text) = exec(environment, "dmesg | grep -i -e rsi -e realm; grep MemTotal /proc/meminfo")?;
    ensure!(status == 0 && text.contains("Using RSI version"), "status {status}, output:\n{text}");
    ensure!(text.contains("MemTotal"), "no MemTotal:\n{text}");
    Ok(())
}

/// Two tokens of one Realm, by the stock kernel's own driver.
fn stock_guest_attests(environment: &Environment) -> Result<()> {
    let command = "realm report --nonce 'the first nonce' && echo && realm report --nonce 00c0ffee";
    let (status, text) = exec(environment, command)?;
    ensure!(status == 0, "status {status}, output:\n{text}");
    let (first, second) = text.split_once("\n\n").context("there are no two tokens")?;
    let rmm = build::images()?.rmm;
    crate::verify::check_stock_guest(first, "the first nonce", &rmm)?;
    crate::verify::check_stock_guest(second, "hex:00c0ffee", &rmm)
}

/// Shell functions for the scripts below.
fn prelude() -> String {
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

/// The counters are the module's own watch over its SMCs, not what the core believes.
fn ten_realms(environment: &Environment) -> Result<()> {
    let script = prelude()
        + "for round in 1 2 3 4 5 6 7 8 9 10; do\n\
           \trealm run --exec \"echo realm $round\" || { echo \"round $round ended with $?\"; exit 1; }\n\
           \tsettled $before\n\
           done\n";
    let text = host_script(environment, 1, true, &script, 1200)?;
    let expected: String = (1..=10).map(|round| format!("realm {round}\n")).collect();
    ensure!(text == expected, "the ten Realms printed:\n{text}");
    Ok(())
}

fn killed_vmm(environment: &Environment) -> Result<()> {
    // Killed while the guest runs, and earlier, while memory is populated. Before that, a CPU goes and comes back under
    // the guest, the machine is asked to sleep, and the kernel's tracer has seen what happened.
    let script = prelude()
        + "mount -t tracefs none /sys/kernel/tracing\n\
           echo 1 >/sys/kernel/tracing/events/kvm_realm/enable || exit 1\n\
           realm run --exec 'echo up; sleep 1000' >/tmp/out &\n\
           vmm=$!\n\
           for second in $(seq 240); do grep -q up /tmp/out && break; sleep 1; done\n\
           grep -q up /tmp/out || { echo 'the guest did not come up'; exit 1; }\n\
           echo 0 >/sys/kernel/tracing/tracing_on\n\
           for event in rmi enter exit fault; do\n\
           \tgrep -q \" $event: \" /sys/kernel/tracing/trace || { echo \"no $event was traced\"; exit 1; }\n\
           done\n\
           cpu=/sys/devices/system/cpu/cpu1/online\n\
           echo 0 >$cpu && sleep 1 && echo 1 >$cpu || { echo 'no CPU hotplug'; exit 1; }\n\
           echo freeze >/sys/power/state && { echo 'the machine slept'; exit 1; }\n\
           kill -0 $vmm || { echo 'the guest did not survive'; exit 1; }\n\
           kill -9 $vmm; wait $vmm 2>/dev/null\n\
           settled $before\n\
           realm run --exec true >/dev/null & vmm=$!\n\
           while [ $(counter granules_delegated) -lt $((before + 1000)) ]; do sleep 0.05; done\n\
           kill -9 $vmm; wait $vmm 2>/dev/null\n\
           settled $before\n\
           realm run --exec 'echo again'\n\
           settled $before\n";
    let text = host_script(environment, 2, true, &script, 900)?;
    ensure!(text == "again\n", "the host printed:\n{text}");
    Ok(())
}

/// The module reads the page for us: nothing else of a stock kernel has a reason to. The kernel names the fault by the
/// number of its status code, 0x28: a granule protection fault. The VMM has the memory as a file and no mapping of it.
fn private_page(environment: &Environment) -> Result<()> {
    let script = format!(
        "echo 0 >/proc/sys/kernel/panic_on_oops\n\
         insmod /kvm_realm.ko unsafe_tests=1 || exit 1\n\
         realm run --exec 'echo up; sleep 1000' >/tmp/out &\n\
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
    let text = host_script(environment, 1, false, &script, 600)?;
    ensure!(text.ends_with("it faulted\n"), "the host printed:\n{text}");
    Ok(())
}

/// One guest with two disks, a network, entropy and all streams of a command; its token's measurement is the one that its
/// launch manifest predicts. The raw disk is checked from outside.
fn devices(environment: &Environment) -> Result<()> {
    let directory = std::env::temp_dir().join(format!("realm-devices-{}", std::process::id()));
    std::fs::create_dir_all(&directory)?;
    let image = directory.join("test.qcow2");
    vmm::disk::create_qcow2(&image, 16 << 20)?;
    let result = run_devices(environment, image);
    let _ = std::fs::remove_dir_all(&directory);
    result
}

/// Every command of docs/guide.md that starts with `./realm` or leads to one, in an empty directory. What needs a network
/// on the host is `devices`' part.
fn guide(environment: &Environment) -> Result<()> {
    build::for_run(environment)?;
    let checkout = crate::paths::checkout()?;
    let text = std::fs::read_to_string(checkout.join("docs/guide.md"))?;
    let directory = std::env::temp_dir().join(format!("realm-guide-{}", std::process::id()));
    std::fs::create_dir_all(&directory)?;
    let realm = std::env::current_exe()?;
    let mut printed = Vec::new();
    for line in text.split("```").skip(1).step_by(2).flat_map(str::lines) {
        if line.is_empty() || line.starts_with("realm ") {
            continue;
        }
        // A shell is left as a person would leave it.
        let line = if line == "./realm run" { "echo poweroff | ./realm run" } else { line };
        let mut shell = Command::new("sh");
        shell.current_dir(&directory).arg("-c").arg(line.replace("./realm", &realm.display().to_string()));
        let output = command::collect(shell.env("REALM_PATIENCE", patience().to_string()))?;
        let wanted = if line.contains("exit 3") { 3 } else { 0 };
        let status = output.status.code();
        ensure!(status == Some(wanted), "`{line}` ended with {status:?}:\n{}", command::said(&output));
        printed.push((line.to_owned(), String::from_utf8_lossy(&output.stdout).into_owned()));
    }
    let of = |part: &str| -> Vec<&str> {
        printed.iter().filter(|(line, _)| line.contains(part)).map(|(_, text)| text.trim()).collect()
    };
    ensure!(of("cat /mnt/file") == ["hello"], "the disk held {:?}", of("cat /mnt/file"));
    ensure!(of("sha256sum")[0].ends_with('-'), "no hash: {:?}", of("sha256sum"));
    let predicted = of("launch.json");
    ensure!(predicted.len() == 2 && predicted[0] == predicted[1], "predictions differ: {predicted:?}");
    let _ = std::fs::remove_dir_all(directory);
    Ok(())
}

fn run_devices(environment: &Environment, image: PathBuf) -> Result<()> {
    let guest = "set -e\n\
         echo \"input: $(cat)\"\n\
         echo errors >&2\n\
         dd if=/dev/vda bs=4k 2>/dev/null | md5sum\n\
         dd if=/dev/vda of=/dev/vda bs=64k count=4 seek=4 2>/dev/null\n\
         sync\n\
         mke2fs -F /dev/vdb >/dev/null 2>&1; mkdir -p /mnt; mount -t ext4 /dev/vdb /mnt\n\
         dd if=/dev/urandom of=/mnt/f bs=64k count=20 2>/dev/null; before=$(md5sum </mnt/f)\n\
         umount /mnt; mount -t ext4 -o ro /dev/vdb /mnt\n\
         [ \"$before\" = \"$(md5sum </mnt/f)\" ] && echo same file\n\
         dd if=/dev/vdc of=/dev/null bs=512 count=1 2>/dev/null\n\
         if dd if=/dev/zero of=/dev/vdc bs=512 count=1 2>/dev/null; then echo written; fi\n\
         ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up\n\
         ping -c 2 -s 1000 10.9.0.1 >/dev/null && echo pong\n\
         echo vectors of $(cat /proc/sys/abi/sve_default_vector_length)\n\
         dmesg | grep -q 'armv8_pmuv3 PMU driver, 5 ' && echo counters\n\
         dmesg | grep -o 'found 2 breakpoint and 2 watchpoint'\n\
         load-module virtio-rng; echo $(dd if=/dev/hwrng bs=32 count=1 2>/dev/null | wc -c) random bytes\n\
         realm report --nonce text:nonce --out /tmp/token; echo token $(base64 </tmp/token | tr -d '\\n')\n\
         exit 9";
    let script = format!(
        "load-module tun || exit 1\n\
         realm capabilities | grep -q 'ITS.*yes' || {{ realm capabilities; exit 1; }}\n\
         dd if=/dev/urandom of=/tmp/raw.img bs=64k count=8 2>/dev/null\n\
         dd if=/dev/zero of=/tmp/ro.img bs=64k count=1 2>/dev/null\n\
         before=$(md5sum </tmp/raw.img)\n\
         (until ip link set tap0 up 2>/dev/null; do sleep 0.3; done; ip addr add 10.9.0.1/24 dev tap0) &\n\
         echo typed | realm run --disk /tmp/raw.img --disk /test.qcow2 --disk /tmp/ro.img,ro --net tap=tap0 \\\n\
         \t--hash sha512 --personalization text:devices --sve 256 --pmu 4 --breakpoints 2 --watchpoints 2 --manifest /tmp/manifest.json \\\n\
         \t--exec '{}' >/tmp/out 2>/tmp/errors\n\
         echo status $?\n\
         grep -v ^token /tmp/out | sed \"s/$before/same disk/\"; cat /tmp/errors\n\
         half='bs=64k count=4'\n\
         [ \"$(dd if=/tmp/raw.img $half 2>/dev/null | md5sum)\" = \\\n\
         \t\"$(dd if=/tmp/raw.img $half skip=4 2>/dev/null | md5sum)\" ] && echo written from inside\n\
         rim=$(realm measure /tmp/manifest.json)\n\
         sed -n 's/^token //p' /tmp/out | base64 -d | hexdump -ve '1/1 \"%02x\"' >/tmp/token\n\
         grep -q \"$rim\" /tmp/token && echo predicted ${{#rim}} digits\n",
        guest.replace('\'', "'\\''")
    );
    let machine = MachineArgs { host_cpus: Some(1), ..MachineArgs::default() };
    let (outcome, text) = on_machine(environment, &machine, &[image], true, &script, 300)?;
    let expected = "status 9\ninput: typed\nsame disk\nsame file\npong\nvectors of 32\n\
                    counters\nfound 2 breakpoint and 2 watchpoint\n32 random bytes\nerrors\n\
                    written from inside\npredicted 128 digits\n";
    let text = text.replace("same disk  -", "same disk");
    ensure!(outcome.status == 0 && text == expected, "status {}, the host printed:\n{text}", outcome.status);
    Ok(())
}

fn unload(environment: &Environment) -> Result<()> {
    let script = prelude()
        + "realm run --exec true || { echo 'the first Realm failed'; exit 1; }\n\
           settled $before\n\
           rmmod kvm_realm || exit 1\n\
           [ -e /dev/kvm-realm ] && { echo 'the device is still there'; exit 1; }\n\
           insmod /kvm_realm.ko || exit 1\n\
           settled 0\n\
           realm run --exec 'echo again'\n\
           settled 0\n\
           rmmod kvm_realm\n";
    let text = host_script(environment, 1, true, &script, 600)?;
    ensure!(text == "again\n", "the host printed:\n{text}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        for (index, test) in TESTS.iter().enumerate() {
            assert!(TESTS[index + 1..].iter().all(|other| other.name != test.name), "{}", test.name);
        }
    }
}
