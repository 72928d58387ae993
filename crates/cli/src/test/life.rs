//! Names, the background, and the commands that talk to Realms that run.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::{on_machine, patience};
use crate::args::MachineArgs;
use crate::setup::Environment;
use crate::{build, command};

/// Two Realms on one host: what is done with one does not touch the other. One calls a service of the host's by its vsock:
/// that service is the other's vsock, which takes a line and answers it.
pub(super) fn two_on_one_host(environment: &Environment) -> Result<()> {
    let script = "set -e\n\
         fail() { echo \"$*\"; realm ps --all; realm logs --vmm b; exit 1; }\n\
         realm run --name a --detach --memory 256 --vsock cid=3,socket=/tmp/b.sock_7000\n\
         realm run --name b --detach --memory 256 --vsock cid=9,socket=/tmp/b.sock\n\
         realm run --name a --detach --memory 256 2>/tmp/e && fail two of one name\n\
         grep -q 'called a already' /tmp/e || fail $(cat /tmp/e)\n\
         realm ps --json | grep -c '\"state\": \"running\"'\n\
         for name in a b; do realm exec $name -n -- sh -c \"echo I am $name >/tmp/who; uname -n\"; done\n\
         realm exec a -n -- cat /tmp/who; realm exec b -n -- cat /tmp/who\n\
         status=0; echo typed | realm exec a -- sh -c 'cat; echo err >&2; exit 7' 2>/tmp/e || status=$?\n\
         echo status $status $(cat /tmp/e)\n\
         status=0; realm exec a -n -- no-such-program 2>/tmp/e || status=$?\n\
         echo status $status; grep -o 'no-such-program: No such file' /tmp/e\n\
         realm exec a -n -t -- sh -c 'tty; stty size' | tr -d '\\r' | sed 's,[0-9]*$,N,'\n\
         call() { realm exec b -n -- sh -c \"echo CONNECT 1024 | realm connect $1\"; }\n\
         call 7000 | sed -n 's/^OK [0-9]*$/answered/p'\n\
         call 7001 2>/tmp/e || echo status $? $(grep -o 'nobody takes connections' /tmp/e)\n\
         head -c 300000 /dev/urandom >/tmp/f; chmod 750 /tmp/f\n\
         realm cp /tmp/f a:/tmp; realm cp a:/tmp/f /tmp/g; cmp /tmp/f /tmp/g && ls -l /tmp/g | cut -c 1-10\n\
         mkdir -p /tmp/d/e; echo deep >/tmp/d/e/f; realm cp -r /tmp/d b:/root; realm cp -r b:/root/d /root\n\
         cat /root/d/e/f; realm exec b -n -- cat d/e/f\n\
         realm info a --json | grep -o '\"boot_vcpus\":1'\n\
         [ $(realm info a --counters | sed -n 's/.*\"to_guest_bytes\": //p' | tr -d ,) -gt 300000 ] && echo counted\n\
         (sleep 1; echo 'echo $((6*7))'; sleep 8) | realm console a >/tmp/c & console=$!\n\
         for try in $(seq 100); do grep -q '^42' /tmp/c && break; sleep 0.5; done\n\
         grep -q '^42' /tmp/c && echo typed; kill $console 2>/dev/null || true\n\
         realm logs a | grep -q '^42' && echo logged\n\
         measured() { realm ps --json | grep -c '\"measurement\": \"[0-9a-f]\\{64\\}\"' || true; }\n\
         for try in $(seq 100); do [ $(measured) = 2 ] && break; sleep 0.5; done; echo $(measured) as predicted\n\
         realm exec b -n -- sleep 1000 & sleeper=$!\n\
         realm stop a || fail a does not stop\n\
         realm stop --force b || fail b does not stop\n\
         wait $sleeper || echo sleeper ended\n\
         realm ps --json\n\
         realm ps --all | sed -n 's/^\\([ab] *ended ([0-9]*)\\).*/\\1/p' | tr -s ' '\n\
         [ -e /tmp/b.sock ] && fail a socket is left\n\
         [ $(cat /sys/kernel/debug/kvm-realm/vms) = 0 ] && echo none left\n";
    let machine = MachineArgs { host_cpus: Some(2), host_memory: Some(1536), ..MachineArgs::default() };
    let (outcome, text) = on_machine(environment, &machine, &[], true, script, 600)?;
    let expected = "a\nb\n2\nrealm\nrealm\nI am a\nI am b\ntyped\nstatus 7 err\nstatus 127\n\
                    no-such-program: No such file\n/dev/pts/N\n24 N\nanswered\nstatus 125 nobody takes connections\n-rwxr-x---\n\
                    deep\ndeep\n\"boot_vcpus\":1\ncounted\ntyped\nlogged\n2 as predicted\n\
                    sleeper ended\n[]\na ended (0)\nb ended (0)\nnone left\n";
    ensure!(outcome.status == 0 && text == expected, "status {}, the host printed:\n{text}", outcome.status);
    Ok(())
}

/// The same commands on the developer's machine, through an emulated machine of the Realm's own.
pub(super) fn in_the_background(environment: &Environment) -> Result<()> {
    build::for_run(environment)?;
    let directory = std::env::temp_dir().join(format!("realm-life-{}", std::process::id()));
    std::fs::create_dir_all(&directory)?;
    let result = background(&directory);
    let _ = realm(&directory, &["stop", "--force", "outer"]);
    let _ = std::fs::remove_dir_all(&directory);
    result
}

fn realm(directory: &Path, arguments: &[&str]) -> Result<(Option<i32>, String)> {
    let mut realm = Command::new(std::env::current_exe()?);
    realm.args(arguments).current_dir(directory);
    // A registry of its own.
    realm.env("XDG_RUNTIME_DIR", directory).env("REALM_PATIENCE", patience().to_string());
    let output = command::collect(&mut realm).context("no realm")?;
    Ok((output.status.code(), command::said(&output)))
}

fn background(directory: &Path) -> Result<()> {
    std::fs::write(directory.join("realm.toml"), "name = 'outer'\nmemory = 256\ndetach = true\n")?;
    std::fs::write(directory.join("file"), "from outside\n")?;
    let expect = |arguments: &[&str], status: i32, text: &str| -> Result<()> {
        let (got, said) = realm(directory, arguments)?;
        ensure!(
            got == Some(status) && said.contains(text),
            "`realm {}` ended with {got:?} and said:\n{said}",
            arguments.join(" ")
        );
        Ok(())
    };
    expect(&["run", "--config", "realm.toml"], 0, "outer")?;
    expect(&["run", "--config", "realm.toml"], 125, "called outer already")?;
    expect(&["ps"], 0, "emulated machine")?;
    expect(&["ps", "--json"], 0, "\"measurement\": null")?;
    expect(&["exec", "outer", "-n", "--wait", "1000", "--", "sh", "-c", "echo inside; exit 9"], 9, "inside")?;
    let measurement = |said: &str| said.contains("\"measurement\": \"");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(300);
    while !measurement(&realm(directory, &["ps", "--json"])?.1) {
        ensure!(std::time::Instant::now() < deadline, "nobody compared the measurement");
        std::thread::sleep(std::time::Duration::from_millis(500));
    }
    expect(&["cp", "file", "outer:/tmp/there"], 0, "")?;
    expect(&["exec", "outer", "-n", "--", "cat", "/tmp/there"], 0, "from outside")?;
    expect(&["cp", "outer:/tmp/there", "back"], 0, "")?;
    ensure!(std::fs::read(directory.join("back"))? == b"from outside\n", "the file came back changed");
    expect(&["info", "outer"], 0, "boot_vcpus")?;
    expect(&["logs", "outer"], 0, "#")?;
    expect(&["stop", "--timeout", "600", "outer"], 0, "")?;
    expect(&["exec", "outer", "-n", "--", "true"], 125, "does not run any more")?;
    expect(&["ps", "--all"], 0, "ended (0)")
}
