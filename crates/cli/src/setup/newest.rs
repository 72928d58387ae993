//! The newest QEMU of Debian's archive, beside the machine's own: tests run on it what must not depend on one version.
//!
//! It comes with all of its libraries and is started by its own loader, so that nothing on the machine changes.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::apt::{self, Apt, Package, Suites};
use super::tools;

/// The package with QEMU for arm64.
const PACKAGE: &str = "qemu-system-arm";

/// What was unpacked before: the program and its version.
pub(crate) fn recorded(cache: &Path) -> Option<(PathBuf, String)> {
    let mut found: Vec<_> = std::fs::read_dir(cache.join("qemu"))
        .ok()?
        .flatten()
        .filter_map(|entry| tools::qemu(&entry.path().join(tools::QEMU)))
        .collect();
    found.sort_by_key(|(_, _, version)| *version);
    found.pop().map(|(program, line, _)| (program, line))
}

/// Makes sure that it is there; `None` where the archive has none that is newer than the machine's own.
pub(crate) fn ensure(cache: &Path) -> Result<Option<(PathBuf, String)>> {
    if let Some(found) = recorded(cache) {
        return Ok(Some(found));
    }
    let apt = apt::archive()?.open(Suites::Newest, cache)?;
    let package = apt.choose(PACKAGE)?;
    let installed = tools::qemu(Path::new(tools::QEMU)).map(|(_, _, version)| version);
    if upstream(&package.version) <= installed {
        return Ok(None);
    }
    let root = cache.join("qemu").join(package.version.replace(':', "%3a"));
    apt.unpack(&closure(&apt, package)?, &root).context("cannot set up the newest QEMU")?;
    write_starter(&root)?;
    Ok(recorded(cache))
}

/// `1:11.1.3+ds-1` is 11.1.
fn upstream(version: &str) -> Option<(u32, u32)> {
    let version = version.split_once(':').map_or(version, |(_, rest)| rest);
    let mut numbers = version.split(|byte: char| !byte.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The package and every library that it needs, directly or not.
fn closure(apt: &Apt, first: Package) -> Result<Vec<Package>> {
    let needed = |name: &str| {
        name.starts_with("lib") || ["zlib1g", "qemu-system-common", "qemu-system-data"].contains(&name)
    };
    let mut seen = BTreeSet::from([first.name.clone()]);
    let mut packages = vec![first];
    let mut asked = 0;
    while asked < packages.len() {
        let names: BTreeSet<&String> = packages[asked..]
            .iter()
            .flat_map(|package| &package.depends)
            .filter(|name| needed(name) && !seen.contains(*name))
            .collect();
        let names: Vec<String> = names.into_iter().cloned().collect();
        asked = packages.len();
        if !names.is_empty() {
            // Of alternatives, some are names that no package has.
            packages.extend(apt.choose_all(&names)?);
            seen.extend(names);
        }
    }
    Ok(packages)
}

/// A script that starts the program with its own loader and libraries. It is written last: with it, all is there.
fn write_starter(root: &Path) -> Result<()> {
    let (loader, triplet) = apt::loader();
    let root = root.canonicalize()?;
    let path = |relative: &str| root.join(relative).display().to_string().replace('\'', r"'\''");
    let script = format!(
        "#!/bin/sh\nexport QEMU_MODULE_DIR='{libraries}/qemu'\n\
         exec '{}' --library-path '{libraries}' '{}' -L '{}' \"$@\"\n",
        path(loader),
        path("usr/bin/qemu-system-aarch64"),
        path("usr/share/qemu"),
        libraries = path(&format!("usr/lib/{triplet}")),
    );
    let starter = root.join(tools::QEMU);
    std::fs::write(&starter, script)?;
    std::fs::set_permissions(&starter, std::fs::Permissions::from_mode(0o755))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packages_version_begins_with_qemus() {
        assert_eq!(upstream("1:11.1.3+ds-1"), Some((11, 1)));
        assert_eq!(upstream("1:10.0.2+ds-2+deb13u1~bpo12+1"), Some((10, 0)));
        assert_eq!(upstream("11.0~rc1-1"), Some((11, 0)));
    }
}
