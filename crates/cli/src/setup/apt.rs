//! Asks the machine's Debian archive for packages, without touching the machine's own apt state.
//!
//! Where the archive is and which keys sign it comes from the machine's own configuration; other suites of the
//! same archive are asked for with sources, lists and caches of our own. Signatures are verified by apt as ever.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::command::{self, output};
use crate::ui;

/// Where Debian's keys lie on a machine whose configuration does not say.
const KEYRINGS: &[&str] =
    &["/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp"];

/// The Debian release of this machine.
#[derive(Debug, Clone)]
pub(crate) struct Release {
    /// 12 or 13.
    pub(crate) version: u32,
    /// Its codename, which is the name of its suite.
    pub(crate) codename: String,
}

/// Reads which Debian this is.
pub(crate) fn release() -> Result<Release> {
    let text = std::fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let release = parse_release(&text)
        .context("this is not Debian: kvm-realm's set-up knows Debian 12 and 13 (see docs/lab.md)")?;
    if release.version < 12 {
        bail!("this is Debian {}: kvm-realm needs Debian 12 or 13", release.version);
    }
    Ok(release)
}

fn parse_release(text: &str) -> Option<Release> {
    let fields: BTreeMap<&str, &str> = text
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key, value.trim().trim_matches('"')))
        .collect();
    if fields.get("ID") != Some(&"debian") {
        return None;
    }
    let version = fields.get("VERSION_ID")?.parse().ok()?;
    Some(Release { version, codename: (*fields.get("VERSION_CODENAME")?).to_owned() })
}

/// A repository that the machine's configuration names.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Repository {
    uri: String,
    suite: String,
}

/// The archive as the machine's configuration names it.
#[derive(Debug, Clone)]
pub(crate) struct Archive {
    main: String,
    security: Option<String>,
    keyring: Option<String>,
    release: Release,
}

/// Finds the archive.
pub(crate) fn archive() -> Result<Archive> {
    let release = release()?;
    let text = output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(REPO_URI)|$(RELEASE)|$(CREATED_BY)",
    ]))
    .context("cannot read the machine's apt configuration")?;
    let repositories = parse_repositories(&text);
    let own = |suite: &str| [release.codename.as_str(), "stable", "oldstable"].contains(&suite);
    let main = repositories
        .iter()
        .find(|repository| own(&repository.suite))
        .with_context(|| {
            format!(
                "the machine's apt configuration has no source for Debian {}: /etc/apt/sources.list(.d) should \
                 name an archive with the suite {}",
                release.version, release.codename
            )
        })?
        .uri
        .clone();
    let security_suite = format!("{}-security", release.codename);
    let security =
        repositories.iter().find(|found| found.suite == security_suite).map(|found| found.uri.clone());
    Ok(Archive { keyring: keyring_of(&main), main, security, release })
}

fn parse_repositories(text: &str) -> Vec<Repository> {
    let mut found = Vec::new();
    for line in text.lines() {
        let mut fields = line.split('|');
        let (Some(uri), Some(suite), Some("Packages")) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let repository = Repository { uri: uri.to_owned(), suite: suite.to_owned() };
        if !uri.starts_with("cdrom:") && !found.contains(&repository) {
            found.push(repository);
        }
    }
    found
}

/// The keyring that the machine's sources name for an archive, else Debian's own where it usually lies.
fn keyring_of(uri: &str) -> Option<String> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(directory) = std::fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(directory.flatten().map(|entry| entry.path()));
    }
    let uri = uri.trim_end_matches('/');
    files
        .iter()
        .filter_map(|file| std::fs::read_to_string(file).ok())
        .find_map(|text| signed_by(&text, uri))
        .or_else(|| KEYRINGS.iter().find(|path| Path::new(path).is_file()).map(|path| (*path).to_owned()))
}

/// Finds `Signed-By: /path` in the stanza, or `[signed-by=/path]` in the line, that names `uri`.
fn signed_by(text: &str, uri: &str) -> Option<String> {
    for stanza in text.split("\n\n").filter(|stanza| stanza.contains(uri)) {
        for line in stanza.lines() {
            if let Some(path) = line.strip_prefix("Signed-By:").map(str::trim) {
                if path.starts_with('/') {
                    return Some(path.to_owned());
                }
            }
            if line.starts_with("deb ") && line.contains(uri) {
                let options = line.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
                let path = options.and_then(|(options, _)| {
                    options.split_whitespace().find_map(|one| one.strip_prefix("signed-by="))
                });
                if let Some(path) = path {
                    return Some(path.to_owned());
                }
            }
        }
    }
    None
}

/// The architecture of this machine in Debian's words.
pub(crate) fn native() -> &'static str {
    if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }
}

/// Where the C library's packages have their loader, and the name of the directory with its libraries.
pub(crate) fn loader() -> (&'static str, &'static str) {
    match native() {
        "arm64" => ("usr/lib/ld-linux-aarch64.so.1", "aarch64-linux-gnu"),
        _ => ("usr/lib64/ld-linux-x86-64.so.2", "x86_64-linux-gnu"),
    }
}

/// What apt is asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Suites<'a> {
    /// What the machine itself may install from: its release with updates, security and backports.
    Install,
    /// The same, also for arm64: host kernel, busybox.
    Own,
    /// The alias of the current stable's backports: only to be asked for its name.
    StableBackports,
    /// The backports of the current stable, by the name that [`Apt::codename`] gave: the guest kernel.
    Backports(&'a str),
    /// The current stable, by its name: libraries for the programs of its backports.
    Stable(&'a str),
    /// Every suite that may hold a certain version of Rust's source; given the current stable's backports.
    Any(&'a str),
    /// Where the newest packages are: for QEMU with all of its libraries.
    Newest,
}

/// A private apt state for some suites.
pub(crate) struct Apt {
    config: PathBuf,
    downloads: PathBuf,
    what: String,
}

/// One package as the archive's index describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Package {
    /// Its name.
    pub(crate) name: String,
    /// Its version.
    pub(crate) version: String,
    /// Its architecture, maybe `all`.
    pub(crate) architecture: String,
    /// Its size in bytes.
    pub(crate) size: u64,
    /// The names that it depends on, alternatives flattened.
    pub(crate) depends: Vec<String>,
}

impl Archive {
    /// This machine's release.
    pub(crate) fn release(&self) -> &Release {
        &self.release
    }

    /// Where the archive is.
    pub(crate) fn main(&self) -> &str {
        &self.main
    }

    /// Where its security updates are, if the machine asks for them.
    pub(crate) fn security(&self) -> Option<&str> {
        self.security.as_deref()
    }

    /// The keys that sign it.
    pub(crate) fn keyring(&self) -> Option<&str> {
        self.keyring.as_deref()
    }

    /// The current stable release's codename.
    pub(crate) fn current_stable(&self, cache: &Path) -> Result<String> {
        let backports = self.open(Suites::StableBackports, cache)?.codename()?;
        Ok(backports.trim_end_matches("-backports").to_owned())
    }

    /// A private state for `suites` in the cache, with fresh lists.
    pub(crate) fn open(&self, suites: Suites<'_>, cache: &Path) -> Result<Apt> {
        let codename = &self.release.codename;
        let (name, main, both): (_, Vec<String>, bool) = match suites {
            Suites::Install | Suites::Own => (
                if suites == Suites::Own { "own" } else { "install" },
                vec![codename.clone(), format!("{codename}-updates"), format!("{codename}-backports")],
                suites == Suites::Own,
            ),
            Suites::StableBackports => ("stable-backports", vec!["stable-backports".to_owned()], false),
            Suites::Backports(suite) => ("backports", vec![suite.to_owned()], true),
            Suites::Stable(suite) => ("stable", vec![suite.to_owned()], false),
            Suites::Newest => ("newest", vec!["testing".to_owned(), "sid".to_owned()], false),
            Suites::Any(backports) => (
                "any",
                vec![
                    codename.clone(),
                    format!("{codename}-backports"),
                    "stable".to_owned(),
                    backports.to_owned(),
                    "testing".to_owned(),
                    "sid".to_owned(),
                ],
                false,
            ),
        };
        let directory = cache.join("apt").join(name);
        let architectures =
            if both && native() != "arm64" { vec![native(), "arm64"] } else { vec![native()] };
        let mut options = format!("arch={}", architectures.join(","));
        if let Some(keyring) = &self.keyring {
            let _ = write!(options, " signed-by={keyring}");
        }
        let mut sources = String::new();
        for suite in &main {
            let _ = writeln!(sources, "deb [{options}] {} {suite} main", self.main);
        }
        if let (true, Some(security)) = (suites == Suites::Install || suites == Suites::Own, &self.security) {
            let _ = writeln!(sources, "deb [{options}] {security} {codename}-security main");
        }
        let apt =
            Apt { config: directory.join("apt.conf"), downloads: cache.join("debs"), what: main.join(", ") };
        for needed in ["lists/partial", "cache/archives/partial"] {
            std::fs::create_dir_all(directory.join(needed))?;
        }
        std::fs::create_dir_all(&apt.downloads)?;
        let list = directory.join("sources.list");
        std::fs::write(&list, sources)?;
        let quoted: String = architectures.iter().map(|name| format!("\"{name}\";")).collect();
        // apt's own user cannot write below root's home, and says so each time.
        let user = if is_root() { "APT::Sandbox::User \"root\";\n" } else { "" };
        std::fs::write(
            &apt.config,
            format!(
                "Dir::Etc::sourcelist \"{}\";\nDir::Etc::sourceparts \"-\";\nDir::State::lists \"{}\";\n\
                 Dir::Cache \"{}\";\nAPT::Architectures {{{quoted}}};\nAcquire::Languages \"none\";\n\
                 Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\nAcquire::Retries \"3\";\n{user}",
                list.display(),
                directory.join("lists").display(),
                directory.join("cache").display(),
            ),
        )?;
        let step = ui::step(&format!("reading the package lists of {}", apt.what));
        output(apt.command("apt-get").args(["-q", "-o", "APT::Update::Error-Mode=any", "update"]))
            .with_context(|| {
                format!("cannot read the package lists of {} from the machine's Debian archive", apt.what)
            })?;
        step.done();
        Ok(apt)
    }
}

impl Apt {
    /// The codename of the suite, from its signed release file. Mirrors may keep a suite's alias older than the
    /// suite itself, so everything else is asked for by codename.
    pub(crate) fn codename(&self) -> Result<String> {
        let lists = self.config.with_file_name("lists");
        for entry in std::fs::read_dir(&lists)?.flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.ends_with("_InRelease") || name.ends_with("_Release") {
                let text = std::fs::read_to_string(entry.path())?;
                if let Some(codename) = text.lines().find_map(|line| line.strip_prefix("Codename:")) {
                    return Ok(codename.trim().to_owned());
                }
            }
        }
        bail!("the Debian archive's {} has no codename", self.what)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", &self.config).env("LC_ALL", "C");
        command
    }

    /// The packages of that name, the preferred version first; none if the archive has none.
    pub(crate) fn show(&self, name: &str) -> Result<Vec<Package>> {
        let found = command::collect(self.command("apt-cache").args(["show", name]))?;
        if !found.status.success() {
            return Ok(Vec::new());
        }
        Ok(parse_packages(&String::from_utf8_lossy(&found.stdout)))
    }

    /// The packages of these names that apt would choose; those that the archive lacks are left out.
    pub(crate) fn choose_all(&self, names: &[String]) -> Result<Vec<Package>> {
        // One question for all: each reads the lists anew. The status only says that some were not found.
        let found =
            command::collect(self.command("apt-cache").args(["--no-all-versions", "show"]).args(names))?;
        Ok(parse_packages(&String::from_utf8_lossy(&found.stdout)))
    }

    /// The package of that name that apt would choose.
    pub(crate) fn choose(&self, name: &str) -> Result<Package> {
        self.show(name)?
            .into_iter()
            .next()
            .with_context(|| format!("the Debian archive has no package {name} in {}", self.what))
    }

    /// All names of packages that begin with `prefix`; some may only be mentioned by others.
    pub(crate) fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let text = output(self.command("apt-cache").args(["pkgnames", prefix]))?;
        Ok(text.lines().map(|name| name.split(':').next().unwrap_or(name).to_owned()).collect())
    }

    /// Fetches packages and unpacks them all into `root`, which appears only when it is complete.
    pub(crate) fn unpack(&self, packages: &[Package], root: &Path) -> Result<()> {
        let mut partial = root.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let _ = std::fs::remove_dir_all(&partial);
        std::fs::create_dir_all(&partial)?;
        for package in packages {
            let file = self.fetch(package)?;
            output(Command::new("dpkg-deb").arg("-x").arg(&file).arg(&partial))?;
        }
        let _ = std::fs::remove_dir_all(root);
        std::fs::rename(&partial, root)?;
        // Only what is unpacked is used; keeping the archives as well would double the cache.
        for package in packages {
            let _ = std::fs::remove_file(self.downloads.join(package.file()));
        }
        Ok(())
    }

    fn fetch(&self, package: &Package) -> Result<PathBuf> {
        let file = self.downloads.join(package.file());
        if file.metadata().is_ok_and(|data| data.len() == package.size) {
            return Ok(file);
        }
        let step = ui::step(&format!(
            "downloading {} {} ({})",
            package.name,
            package.version,
            ui::size(package.size)
        ));
        let qualified = match package.architecture.as_str() {
            "all" => format!("{}={}", package.name, package.version),
            architecture => format!("{}:{architecture}={}", package.name, package.version),
        };
        output(self.command("apt-get").current_dir(&self.downloads).args(["-q", "download", &qualified]))
            .with_context(|| format!("cannot download {}", package.name))?;
        step.done();
        if !file.is_file() {
            bail!("apt-get download gave no {}", file.display());
        }
        Ok(file)
    }

    /// Installs packages on the machine, as root or with sudo.
    pub(crate) fn install(&self, packages: &[&str], from_backports: Option<&str>) -> Result<()> {
        let mut command = as_root()?;
        command.arg("env").arg("DEBIAN_FRONTEND=noninteractive").arg("LC_ALL=C");
        command.arg(format!("APT_CONFIG={}", self.config.display()));
        command.args([
            "apt-get",
            "-q",
            "-y",
            "-o",
            "DPkg::Lock::Timeout=300",
            "--no-install-recommends",
            "install",
        ]);
        if let Some(suite) = from_backports {
            command.args(["-t", suite]);
        }
        command.args(packages);
        ui::say(&format!("installing {}", packages.join(", ")));
        command::loud(&mut command)
    }
}

/// `env` for root, through sudo for anybody else.
fn as_root() -> Result<Command> {
    if is_root() {
        // `env` starts what follows; the caller adds a second one only for its variables.
        return Ok(Command::new("env"));
    }
    match command::find("sudo") {
        Some(sudo) => Ok(Command::new(sudo)),
        None => bail!("packages must be installed, but this is not root and sudo is not there"),
    }
}

impl Package {
    /// The name that `apt-get download` gives the file.
    fn file(&self) -> String {
        format!("{}_{}_{}.deb", self.name, self.version.replace(':', "%3a"), self.architecture)
    }
}

fn parse_packages(text: &str) -> Vec<Package> {
    text.split("\n\n").filter_map(parse_package).collect()
}

fn parse_package(stanza: &str) -> Option<Package> {
    let field = |name: &str| {
        stanza.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")).map(str::to_owned)
    };
    let depends = field("Depends").unwrap_or_default();
    Some(Package {
        name: field("Package")?,
        version: field("Version")?,
        architecture: field("Architecture")?,
        size: field("Size")?.parse().ok()?,
        depends: depends
            .split([',', '|'])
            .filter_map(|one| one.split_whitespace().next())
            .map(|name| name.split(':').next().unwrap_or(name).to_owned())
            .collect(),
    })
}

/// Whether this process is root.
pub(crate) fn is_root() -> bool {
    // SAFETY: geteuid cannot fail and touches no memory.
    unsafe { libc::geteuid() == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_debian_or_nothing() {
        let release = parse_release("ID=debian\nVERSION_ID=\"12\"\nVERSION_CODENAME=bookworm\n").unwrap();
        assert_eq!((release.version, release.codename.as_str()), (12, "bookworm"));
        assert!(parse_release("ID=other\nVERSION_ID=\"12\"\n").is_none());
    }

    #[test]
    fn repositories_come_from_indextargets() {
        let text = "http://a.example/debian/|bookworm|Packages\nhttp://a.example/debian/|bookworm|DEP-11\n\
                    cdrom://x/|bookworm|Packages\nhttp://s.example/sec/|bookworm-security|Packages\n";
        let found = parse_repositories(text);
        assert_eq!(found.len(), 2);
        assert_eq!(found[1].suite, "bookworm-security");
    }

    #[test]
    fn keyrings_are_found_in_both_forms_of_sources() {
        let new = "Types: deb\nURIs: http://a.example/debian\nSigned-By: /k/a.gpg\n\nTypes: deb\n\
                   URIs: http://b.example/x\nSigned-By: /k/b.gpg\n";
        assert_eq!(signed_by(new, "http://b.example/x").as_deref(), Some("/k/b.gpg"));
        let old = "deb [arch=amd64 signed-by=/k/c.gpg] http://c.example/debian bookworm main\n";
        assert_eq!(signed_by(old, "http://c.example/debian").as_deref(), Some("/k/c.gpg"));
        assert_eq!(signed_by("deb http://c.example/debian bookworm main\n", "http://c.example/debian"), None);
    }

    #[test]
    fn packages_are_read_with_their_dependencies() {
        let text = "Package: linux-headers-x\nVersion: 1:2-3\nArchitecture: arm64\n\
                    Depends: a (>= 4), b (= 1) | c, gcc-12:any\nSize: 17\n\nPackage: broken\n";
        let packages = parse_packages(text);
        assert_eq!(packages.len(), 1);
        assert_eq!(packages[0].depends, ["a", "b", "c", "gcc-12"]);
        assert_eq!(packages[0].file(), "linux-headers-x_1%3a2-3_arm64.deb");
    }
}
