//! Which packages make a system: apt's own solver over the archive that this machine uses, with a state of its own.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::command::{self, output};
use crate::setup::apt::Archive;
use crate::ui;

/// The kernel's package: the newest of its series.
const KERNEL: &str = "linux-image-cloud-arm64";
/// What a small system has beside what Debian calls essential.
pub(super) const BASE: &[&str] = &[
    "apt",
    "ca-certificates",
    "debian-archive-keyring",
    "dhcpcd",
    "initramfs-tools",
    "iproute2",
    KERNEL,
    "login",
    "netbase",
    "passwd",
    "systemd-sysv",
    "udev",
];
/// The first kernel that can be a Realm's.
const REALM_KERNEL: (u64, u64) = (6, 13);
/// Where Debian's keys lie in a Debian system.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// One package as the solver chose it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chosen {
    pub(super) name: String,
    version: String,
    architecture: String,
}

impl Chosen {
    /// The file's name in apt's cache.
    pub(super) fn file(&self) -> String {
        format!("{}_{}_{}.deb", self.name, self.version.replace(':', "%3a"), self.architecture)
    }
}

/// All packages, in an order in which they can be unpacked.
#[derive(Debug)]
pub(super) struct Set {
    wanted: Vec<String>,
    /// Essential packages and what they need: they have to be there before any other can be installed.
    pub(super) essential: Vec<Chosen>,
    /// The others.
    pub(super) others: Vec<Chosen>,
}

impl Set {
    fn all(&self) -> impl Iterator<Item = &Chosen> {
        self.essential.iter().chain(&self.others)
    }

    /// `name version` of each.
    pub(super) fn described(&self) -> Vec<String> {
        self.all().map(|package| format!("{} {}", package.name, package.version)).collect()
    }

    /// The kernel's release; it has to be one that knows Realms.
    pub(super) fn kernel(&self) -> Result<String> {
        let release = self
            .all()
            .filter_map(|package| package.name.strip_prefix("linux-image-"))
            .find(|name| name.starts_with(|first: char| first.is_ascii_digit()))
            .context("the chosen packages have no kernel")?;
        let mut numbers = release.split(['.', '-', '+']).map_while(|number| number.parse().ok());
        let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        if version < REALM_KERNEL {
            bail!(
                "this suite's newest kernel is {release}, and a Realm needs {}.{} or newer: choose another --suite",
                REALM_KERNEL.0,
                REALM_KERNEL.1
            );
        }
        Ok(release.to_owned())
    }
}

/// The suites that make up a release. Testing and unstable have no others beside them.
fn suites(codename: &str) -> Vec<String> {
    if ["sid", "unstable", "testing", "experimental"].contains(&codename) {
        return vec![codename.to_owned()];
    }
    ["", "-updates", "-backports"].iter().map(|suffix| format!("{codename}{suffix}")).collect()
}

/// The guest's sources: those of this machine's archive that make up the release.
pub(super) fn sources(archive: &Archive, codename: &str) -> String {
    let mut text = String::new();
    let mut add = |uri: &str, suites: &str| {
        let _ = write!(
            text,
            "Types: deb\nURIs: {uri}\nSuites: {suites}\nComponents: main\nSigned-By: {KEYRING}\n\n"
        );
    };
    let all = suites(codename);
    add(archive.main(), &all.join(" "));
    if let (Some(security), 2..) = (archive.security(), all.len()) {
        add(security, &format!("{codename}-security"));
    }
    text
}

/// A private apt state for arm64 alone, in which nothing is installed.
pub(super) struct State {
    directory: PathBuf,
    suite: String,
}

impl State {
    /// Makes the state, with fresh lists.
    pub(super) fn open(archive: &Archive, suite: &str, cache: &Path) -> Result<Self> {
        let directory = cache.join("apt").join(format!("image-{suite}"));
        for needed in ["lists/partial", "cache/archives/partial", "nothing"] {
            std::fs::create_dir_all(directory.join(needed))?;
        }
        let mut options = "arch=arm64".to_owned();
        if let Some(keyring) = archive.keyring() {
            let _ = write!(options, " signed-by={keyring}");
        }
        let all = suites(suite);
        let mut list = String::new();
        for one in &all {
            let _ = writeln!(list, "deb [{options}] {} {one} main", archive.main());
        }
        if let (Some(security), 2..) = (archive.security(), all.len()) {
            let _ = writeln!(list, "deb [{options}] {security} {suite}-security main");
        }
        // Only the kernel comes from the backports by itself.
        let pin = format!("Package: linux-*\nPin: release n={suite}-backports\nPin-Priority: 990\n");
        for (name, text) in [("sources.list", list), ("preferences", pin), ("status", String::new())] {
            std::fs::write(directory.join(name), text)?;
        }
        let path = |name: &str| directory.join(name).display().to_string();
        let user = if crate::setup::apt::is_root() { "APT::Sandbox::User \"root\";\n" } else { "" };
        std::fs::write(
            directory.join("apt.conf"),
            format!(
                "Dir::Etc::sourcelist \"{}\";\nDir::Etc::sourceparts \"{nothing}\";\n\
                 Dir::Etc::preferences \"{}\";\nDir::Etc::preferencesparts \"{nothing}\";\n\
                 Dir::State::lists \"{}\";\nDir::State::status \"{}\";\nDir::State::extended_states \"{}\";\n\
                 Dir::Cache \"{}\";\nDir::Log \"{nothing}\";\nAPT::Architecture \"arm64\";\n\
                 #clear APT::Architectures;\nAPT::Architectures {{\"arm64\";}};\nAPT::Install-Recommends \"false\";\n\
                 Acquire::Languages \"none\";\nAcquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n\
                 Acquire::Retries \"3\";\nDebug::NoLocking \"true\";\n{user}",
                path("sources.list"),
                path("preferences"),
                path("lists"),
                path("status"),
                path("extended"),
                path("cache"),
                nothing = path("nothing"),
            ),
        )?;
        let state = Self { directory, suite: suite.to_owned() };
        let step = ui::step(&format!("reading the package lists of {suite} for arm64"));
        output(state.apt().args(["-q", "-o", "APT::Update::Error-Mode=any", "update"])).with_context(
            || format!("cannot read the package lists of {suite} from the machine's Debian archive"),
        )?;
        step.done();
        Ok(state)
    }

    fn apt(&self) -> Command {
        let mut command = Command::new("apt-get");
        command.env("APT_CONFIG", self.directory.join("apt.conf")).env("LC_ALL", "C");
        command
    }

    /// Where a package's file is after [`Self::fetch`].
    pub(super) fn file(&self, package: &Chosen) -> PathBuf {
        self.directory.join("cache/archives").join(package.file())
    }

    /// Asks the solver.
    pub(super) fn resolve(&self, more: &[String]) -> Result<Set> {
        let wanted: Vec<String> =
            BASE.iter().map(|name| (*name).to_owned()).chain(more.iter().cloned()).collect();
        let essential = self.simulate(&[])?;
        let names: BTreeSet<&str> = essential.iter().map(|package| package.name.as_str()).collect();
        let mut others = self.simulate(&wanted)?;
        others.retain(|package| !names.contains(package.name.as_str()));
        Ok(Set { wanted, essential, others })
    }

    fn simulate(&self, wanted: &[String]) -> Result<Vec<Chosen>> {
        let said =
            command::collect(self.apt().args(["-q", "-y", "-s", "install", "?essential"]).args(wanted))?;
        if !said.status.success() {
            bail!("{} cannot be installed from {}:\n{}", wanted.join(", "), self.suite, command::said(&said));
        }
        Ok(String::from_utf8_lossy(&said.stdout).lines().filter_map(parse_inst).collect())
    }

    /// Downloads all of a set, verified by apt.
    pub(super) fn fetch(&self, set: &Set) -> Result<()> {
        let missing = set.all().filter(|package| !self.file(package).is_file()).count();
        if missing == 0 {
            return Ok(());
        }
        let step = ui::step(&format!("downloading {missing} of {} packages", set.all().count()));
        let mut command = self.apt();
        command.args(["-q", "-y", "--download-only", "install", "?essential"]).args(&set.wanted);
        output(&mut command).context("cannot download the packages")?;
        if let Some(package) = set.all().find(|package| !self.file(package).is_file()) {
            bail!("apt-get left no {}", self.file(package).display());
        }
        step.done();
        Ok(())
    }
}

/// `Inst name (version suites [architecture])`
fn parse_inst(line: &str) -> Option<Chosen> {
    let (name, rest) = line.strip_prefix("Inst ")?.split_once(' ')?;
    let (_, rest) = rest.split_once('(')?;
    let (version, rest) = rest.split_once(' ')?;
    let (architecture, _) = rest.split_once(')')?.0.rsplit_once('[')?.1.split_once(']')?;
    let name = name.split(':').next()?;
    Some(Chosen { name: name.into(), version: version.into(), architecture: architecture.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(name: &str, version: &str, architecture: &str) -> Chosen {
        Chosen { name: name.into(), version: version.into(), architecture: architecture.into() }
    }

    #[test]
    fn what_the_solver_says_becomes_files() {
        let line = "Inst libc6 (2.41-12 Debian:13.2/stable, Debian-Security:13/stable-security [arm64]) []";
        assert_eq!(parse_inst(line), Some(chosen("libc6", "2.41-12", "arm64")));
        assert_eq!(parse_inst("Conf libc6 (2.41-12 Debian:13.2/stable [arm64])"), None);
        assert_eq!(parse_inst("Inst libc6"), None);
        assert_eq!(chosen("tzdata", "1:2-3", "all").file(), "tzdata_1%3a2-3_all.deb");
    }

    #[test]
    fn a_kernel_that_knows_no_realms_is_refused() {
        let set = |name: &str| Set {
            wanted: vec![],
            essential: vec![],
            others: vec![chosen("linux-image-cloud-arm64", "1", "arm64"), chosen(name, "1", "arm64")],
        };
        assert_eq!(set("linux-image-6.13+x-cloud-arm64").kernel().unwrap(), "6.13+x-cloud-arm64");
        assert!(set("linux-image-7.3.4+deb13-cloud-arm64").kernel().is_ok());
        assert!(set("linux-image-6.12.48+deb13-cloud-arm64").kernel().is_err());
        assert!(set("linux-base").kernel().is_err());
    }

    #[test]
    fn a_release_has_its_updates_and_backports_and_testing_has_none() {
        assert_eq!(suites("trixie"), ["trixie", "trixie-updates", "trixie-backports"]);
        assert_eq!(suites("sid"), ["sid"]);
    }
}
