//! A Debian disk, from the archive to a login with a network.

use std::io::{Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser as _;

use super::network::Outside;
use super::patience;
use crate::args::{Cli, Command as RealmCommand};
use crate::setup::{Environment, apt};
use crate::{build, command, image};

/// `realm image build`, then a Realm that boots the disk with its own kernel: somebody logs in on the console, the guest has
/// an address and reaches this machine, and the archive if this machine does, and `realm exec` reaches the guest.
pub(super) fn debian_disk(environment: &Environment) -> Result<()> {
    build::for_run(environment)?;
    let directory = std::env::temp_dir().join(format!("realm-debian-{}", std::process::id()));
    std::fs::create_dir_all(&directory)?;
    let disk = directory.join("debian.qcow2").display().to_string();
    let result = build_disk(&disk).and_then(|()| boot_disk(&disk));
    let _ = std::fs::remove_dir_all(&directory);
    result
}

fn build_disk(disk: &str) -> Result<()> {
    let patience = patience().to_string();
    let words = ["realm", "image", "build", "--out", disk, "--patience", &patience];
    let RealmCommand::Image(args) = Cli::try_parse_from(words)?.command else { bail!("another command") };
    ensure!(image::run(&args)? == 0, "no disk was built");
    Ok(())
}

fn boot_disk(disk: &str) -> Result<()> {
    let outside = Outside::start()?;
    let name = format!("debian-{}", std::process::id());
    let mut guest = Guest::start(disk, &name)?;
    guest.wait("realm login:", 600)?;
    guest.say("root")?;
    guest.wait("root@realm:~#", 60)?;
    // What is typed comes back: the answers are put together from two halves.
    guest.say("for i in $(seq 60); do ip -4 -o addr show scope global | grep -q 10.0.2.15 && echo ad''dress && break; sleep 1; done")?;
    guest.wait("address", 90)?;
    guest.say(&format!(
        "exec 3<>/dev/tcp/10.0.2.2/{}; printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3; grep -q '200 OK' <&3 && echo reach''ed",
        outside.port
    ))?;
    guest.wait("reached", 60)?;
    guest.say("grep -q 'RSI' <(dmesg) && echo in-a-re''alm")?;
    guest.wait("in-a-realm", 30)?;
    // The host's way in: the agent is part of the disk.
    agent_answers(&name)?;
    if archive_is_near()? {
        guest.say("apt-get update && echo apt-is-up-to-d''ate")?;
        guest.wait("apt-is-up-to-date", 600)?;
    }
    guest.say("poweroff")?;
    guest.end(120)
}

/// `realm exec` in the Realm of this name.
fn agent_answers(name: &str) -> Result<()> {
    let wait = (120.0 * patience()).ceil().to_string();
    let mut exec = Command::new(std::env::current_exe()?);
    exec.args(["exec", name, "-n", "--wait", &wait, "--", "systemctl", "is-active", "realm-agent"]);
    let said = command::output(&mut exec)?;
    ensure!(said.trim() == "active", "the agent's service is {said}");
    Ok(())
}

/// Whether this machine itself reaches the archive that the disk asks.
fn archive_is_near() -> Result<bool> {
    let archive = apt::archive()?;
    let Some(rest) = archive.main().strip_prefix("http://") else { return Ok(false) };
    let host = rest.split('/').next().unwrap_or(rest);
    let place = if host.contains(':') { host.to_owned() } else { format!("{host}:80") };
    let addresses = place.to_socket_addrs().into_iter().flatten();
    Ok(addresses.into_iter().any(|one| TcpStream::connect_timeout(&one, Duration::from_secs(5)).is_ok()))
}

/// A Realm whose console somebody uses.
struct Guest {
    child: Child,
    keyboard: ChildStdin,
    output: Receiver<Vec<u8>>,
    /// Everything that it printed, and up to where it was looked through.
    text: String,
    seen: usize,
}

impl Guest {
    fn start(disk: &str, name: &str) -> Result<Self> {
        let mut realm = Command::new(std::env::current_exe()?);
        realm.args(["run", "--kernel-from-disk", "--net", "user", "--disk", disk, "--name", name]);
        realm.env("REALM_PATIENCE", patience().to_string());
        let mut child =
            realm.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn()?;
        let keyboard = child.stdin.take().context("no stdin")?;
        let mut screen = child.stdout.take().context("no stdout")?;
        let (sender, output) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = screen.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, keyboard, output, text: String::new(), seen: 0 })
    }

    fn say(&mut self, line: &str) -> Result<()> {
        self.keyboard.write_all(format!("{line}\n").as_bytes()).context("the Realm's console is closed")?;
        Ok(self.keyboard.flush()?)
    }

    /// Waits for some words on the console.
    fn wait(&mut self, words: &str, seconds: u64) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(seconds).mul_f64(patience());
        loop {
            if let Some(at) = self.text[self.seen..].find(words) {
                self.seen += at + words.len();
                return Ok(());
            }
            match self.output.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.text.push_str(&String::from_utf8_lossy(&bytes)),
                Err(RecvTimeoutError::Timeout) => {
                    bail!("no `{words}` in time; the console:\n{}", self.tail())
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("the Realm ended before `{words}`; the console:\n{}", self.tail())
                }
            }
        }
    }

    /// Waits for the end, which must be an orderly one.
    fn end(mut self, seconds: u64) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(seconds).mul_f64(patience());
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "the Realm ended with {status}; the console:\n{}", self.tail());
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        bail!("the Realm did not switch itself off; the console:\n{}", self.tail())
    }

    fn tail(&mut self) -> String {
        self.text.extend(self.output.try_iter().map(|bytes| String::from_utf8_lossy(&bytes).into_owned()));
        command::tail(&self.text.replace('\r', ""), 40)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
