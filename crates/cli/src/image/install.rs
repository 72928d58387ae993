//! Installs packages on a disk without being root and without foreign programs on this machine: an emulated arm64
//! machine does it, with a kernel and a busybox of the cache. It sees two disks: the new one, and one with the packages.
//!
//! Decompressing is most of an installation's work, so the packages are decompressed here, where that is fast.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::packages::{Set, State};
use super::{MKE2FS, find};
use crate::build::initramfs;
use crate::command::{self, output};
use crate::lab::machine::{self, Config, Follow, log};
use crate::setup::Environment;
use crate::ui;

/// The machine's first program, and what it runs in the new system.
pub(super) const SCRIPTS: [&str; 2] = [include_str!("init.sh"), include_str!("second-stage.sh")];
/// Starts the host's agent in the new system.
pub(super) const AGENT_UNIT: &str = include_str!("../../../../images/agent/realm-agent.service");
/// How the scripts' lines for us begin.
const MARK: &str = "realm-image: ";
/// How long the whole installation may take.
const LIMIT: Duration = Duration::from_secs(1200);

/// What the new system is told.
pub(super) struct Settings<'a> {
    pub(super) hostname: &'a str,
    /// Empty for none.
    pub(super) password: &'a str,
    /// Lines of authorized keys.
    pub(super) key: &'a str,
    /// Its apt sources.
    pub(super) sources: &'a str,
    /// The host's agent; empty for none.
    pub(super) agent: &'a [u8],
}

/// Makes the disk with the packages; gives its path in `directory`.
pub(super) fn stage(state: &State, set: &Set, settings: &Settings<'_>, directory: &Path) -> Result<PathBuf> {
    let tree = directory.join("tree");
    std::fs::create_dir_all(tree.join("debs"))?;
    let mut bytes = 0;
    for (list, packages) in [("essential", &set.essential), ("others", &set.others)] {
        let mut names = String::new();
        for package in packages {
            let to = tree.join("debs").join(format!("{}.deb", package.name));
            bytes += decompress(&state.file(package), &to)?;
            names.push_str(&format!("debs/{}.deb\n", package.name));
        }
        std::fs::write(tree.join(list), names)?;
    }
    for (name, bytes) in [
        ("second-stage", SCRIPTS[1].as_bytes()),
        ("hostname", settings.hostname.as_bytes()),
        ("password", settings.password.as_bytes()),
        ("key", settings.key.as_bytes()),
        ("sources", settings.sources.as_bytes()),
        ("realm-agent", settings.agent),
        ("realm-agent.service", AGENT_UNIT.as_bytes()),
    ] {
        std::fs::write(tree.join(name), bytes)?;
    }
    let image = directory.join("stage.img");
    let program = find(MKE2FS.0).context("mke2fs is not there")?;
    let mut command = Command::new(program);
    command.args(["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d"]).arg(&tree).arg(&image);
    output(command.arg(format!("{}M", bytes / 1_000_000 * 11 / 10 + 64)))?;
    std::fs::remove_dir_all(&tree)?;
    Ok(image)
}

/// Writes a package whose parts are not compressed; gives its size.
fn decompress(from: &Path, to: &Path) -> Result<u64> {
    let part = |flag: &str| -> Result<Vec<u8>> {
        let mut command = Command::new("dpkg-deb");
        let told =
            command.arg(flag).arg(from).stdin(Stdio::null()).output().context("cannot run dpkg-deb")?;
        ensure!(
            told.status.success(),
            "`{}` failed:\n{}",
            command::shown(&command),
            String::from_utf8_lossy(&told.stderr)
        );
        Ok(told.stdout)
    };
    let mut file = std::fs::File::create(to)?;
    file.write_all(b"!<arch>\n")?;
    for (name, bytes) in [
        ("debian-binary", b"2.0\n".to_vec()),
        ("control.tar", part("--ctrl-tarfile")?),
        ("data.tar", part("--fsys-tarfile")?),
    ] {
        writeln!(file, "{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`", 0, 0, 0, 100_644, bytes.len())?;
        file.write_all(&bytes)?;
        if bytes.len() % 2 == 1 {
            file.write_all(b"\n")?;
        }
    }
    Ok(file.metadata()?.len())
}

/// Runs the machine until everything is installed.
pub(super) fn install(environment: &Environment, disk: &Path, stage: &Path, patience: f64) -> Result<()> {
    let directory = crate::paths::new_run()?;
    let initrd = directory.join("initrd");
    std::fs::write(&initrd, initramfs::installer(environment, SCRIPTS[0])?)?;
    let drive = |id: &str, path: &Path, more: &str| -> Result<[String; 4]> {
        let file = path.to_str().context("a path is not UTF-8")?.replace(',', ",,");
        Ok([
            "-drive".to_owned(),
            format!("if=none,id={id},file={file},format=raw,cache=unsafe{more}"),
            "-device".to_owned(),
            format!("virtio-blk-pci,drive={id}"),
        ])
    };
    let mut extra = drive("target", disk, ",discard=unmap,detect-zeroes=unmap")?.to_vec();
    extra.extend(drive("stage", stage, ",read-only=on")?);
    let config = Config {
        qemu: environment.qemu.clone(),
        firmware: None,
        own_firmware: false,
        kernel: environment.unpacked.guest_kernel.clone(),
        initrd: Some(initrd.clone()),
        cmdline: "console=ttyAMA0 rdinit=/init panic=-1 quiet".to_owned(),
        cpus: 2,
        memory: 1024,
        machine_options: Vec::new(),
        // What costs an emulator much and installs nothing.
        cpu_options: vec!["pauth=off".to_owned(), "sve=off".to_owned()],
        rmm_el3: None,
        semihosting: false,
        reboot: false,
        accel: Some("tcg,thread=multi".to_owned()),
        extra,
        shares: Vec::new(),
        inherited: Vec::new(),
    };
    let step = ui::step("installing the packages on an emulated machine");
    let limit = LIMIT.mul_f64(patience);
    let mut machine = machine::start(&config, &directory)?;
    let mut console = Follow::new(directory.join(log::HOST));
    let mut done = false;
    loop {
        let ended = machine.ended().is_some();
        for line in console.poll().1 {
            match line.split_once(MARK) {
                Some((_, "done")) => done = true,
                Some((_, words)) => {
                    ui::say(&format!("{words} (after {})", ui::seconds(machine.started.elapsed())))
                }
                None => {}
            }
        }
        if ended {
            break;
        }
        if Instant::now() > machine.started + limit {
            machine.kill();
            bail!("the installation did not end within {}:\n{}", ui::seconds(limit), end_of(&directory));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    ensure!(done, "the installation failed:\n{}", end_of(&directory));
    step.done();
    Ok(())
}

/// The end of the machine's console, and where all of it is.
fn end_of(directory: &Path) -> String {
    let path = directory.join(log::HOST);
    let text = std::fs::read(&path).unwrap_or_default();
    let text = command::tail(&String::from_utf8_lossy(&text).replace('\r', ""), 25);
    let qemu = std::fs::read_to_string(directory.join(log::QEMU)).unwrap_or_default();
    format!("{qemu}{text}\nthe whole console: {}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs what the second stage does about the agent in a directory; gives the new system's root.
    fn agent_part(directory: &Path, agent: &[u8]) -> PathBuf {
        let root = directory.join("root");
        std::fs::create_dir_all(&root).unwrap();
        std::fs::write(directory.join("realm-agent"), agent).unwrap();
        std::fs::write(directory.join("realm-agent.service"), AGENT_UNIT).unwrap();
        let (_, part) = SCRIPTS[1].split_once("if [ -s realm-agent ]").unwrap();
        let (part, _) = part.split_once("\nfi\n").unwrap();
        let script = format!("if [ -s realm-agent ]{part}\nfi\n");
        let script = script
            .replace(" /usr/", &format!(" {}/usr/", root.display()))
            .replace(" /etc/", &format!(" {}/etc/", root.display()));
        output(Command::new("sh").current_dir(directory).args(["-ec", &script])).unwrap();
        root
    }

    #[test]
    fn a_new_system_starts_the_agent_unless_it_is_to_have_none() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = std::env::temp_dir().join(format!("realm-agent-part-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&directory);
        let root = agent_part(&directory, b"");
        assert_eq!(std::fs::read_dir(&root).unwrap().count(), 0);
        let root = agent_part(&directory, b"program");
        let program = root.join("usr/sbin/realm-agent");
        assert_eq!(std::fs::read(&program).unwrap(), b"program");
        assert_eq!(program.metadata().unwrap().permissions().mode() & 0o777, 0o755);
        // What systemd follows leads to the unit, and the unit to the program, before a login is offered.
        let wanted = root.join("etc/systemd/system/multi-user.target.wants/realm-agent.service");
        let unit = std::fs::read_to_string(wanted).unwrap();
        assert!(
            unit.contains("\nExecStart=/usr/sbin/realm-agent\n")
                && unit.contains("\nWantedBy=multi-user.target\n")
        );
        assert!(!unit.contains("Condition"), "a unit whose condition fails once is not tried again");
        std::fs::remove_dir_all(directory).unwrap();
    }
}
