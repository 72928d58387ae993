//! Which kernels and which busybox: resolved through the archive's metadata, unpacked into the cache.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::apt::{Apt, Archive, Package, Suites, native};
use crate::ui;

/// The series of the host kernel: the module is built for it.
pub(super) const HOST_SERIES: &str = "6.12.";
/// The kernels' flavour.
const FLAVOUR: &str = "-cloud-arm64";

/// Everything that is unpacked from packages.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Unpacked {
    /// The host kernel's release, as `uname -r` gives it.
    pub(crate) host_release: String,
    /// Where the host kernel, its modules, its headers and kbuild lie.
    pub(crate) host_root: PathBuf,
    /// The host kernel itself.
    pub(crate) host_kernel: PathBuf,
    /// The guest kernel's release.
    pub(crate) guest_release: String,
    /// The guest kernel itself.
    pub(crate) guest_kernel: PathBuf,
    /// The directory of the guest kernel's modules.
    pub(crate) guest_modules: PathBuf,
    /// The static arm64 busybox.
    pub(crate) busybox: PathBuf,
    /// Its version.
    pub(crate) busybox_version: String,
}

impl Unpacked {
    /// The version of the host kernel's package.
    pub(super) fn host_version(&self) -> Option<&str> {
        Some(self.host_root.file_name()?.to_str()?.split_once('_')?.1)
    }

    fn is_complete(&self) -> bool {
        [&self.host_root, &self.host_kernel, &self.guest_kernel, &self.guest_modules, &self.busybox]
            .iter()
            .all(|path| path.exists())
    }
}

fn record(cache: &Path) -> PathBuf {
    cache.join("kernels.json")
}

/// What the last set-up unpacked, if it is all still there.
pub(crate) fn recorded(cache: &Path) -> Option<Unpacked> {
    let text = std::fs::read(record(cache)).ok()?;
    let unpacked: Unpacked = serde_json::from_slice(&text).ok()?;
    unpacked.is_complete().then_some(unpacked)
}

/// Makes sure that kernels and busybox are there. With `update` the archive is asked again.
pub(crate) fn ensure(cache: &Path, update: bool) -> Result<Unpacked> {
    if !update {
        if let Some(unpacked) = recorded(cache) {
            return Ok(unpacked);
        }
    }
    let archive = super::apt::archive()?;
    let own = archive.open(Suites::Own, cache)?;
    let (host_release, host_root) = host_kernel(&own, &archive, cache)?;
    let (busybox_version, busybox) = busybox(&own, cache)?;
    let suite = archive.open(Suites::StableBackports, cache)?.codename()?;
    let backports = archive.open(Suites::Backports(&suite), cache)?;
    let (guest_release, guest_kernel, guest_modules) = guest_kernel(&backports, cache)?;
    let unpacked = Unpacked {
        host_kernel: host_root.join(format!("boot/vmlinuz-{host_release}")),
        host_release,
        host_root,
        guest_release,
        guest_kernel,
        guest_modules,
        busybox,
        busybox_version,
    };
    if !unpacked.is_complete() {
        bail!("Debian's packages do not hold what they should: {unpacked:?}");
    }
    std::fs::write(record(cache), serde_json::to_vec_pretty(&unpacked)?)?;
    Ok(unpacked)
}

/// The newest 6.12 cloud kernel of the machine's own release that has its headers.
fn host_kernel(apt: &Apt, archive: &Archive, cache: &Path) -> Result<(String, PathBuf)> {
    let mut releases: Vec<String> = apt
        .names(&format!("linux-headers-{HOST_SERIES}"))?
        .iter()
        .filter_map(|name| name.strip_prefix("linux-headers-"))
        .filter(|release| release.ends_with(FLAVOUR))
        .map(str::to_owned)
        .collect();
    releases.sort_by_key(|release| std::cmp::Reverse(order(release)));
    releases.dedup();
    for release in &releases {
        if let Some(packages) = host_packages(apt, release)? {
            let root = cache.join("host-kernel").join(format!("{release}_{}", packages[0].version));
            if !root.is_dir() {
                ui::say(&format!("host kernel: Debian's {release}"));
                apt.unpack(&packages, &root)
                    .with_context(|| format!("cannot set up the host kernel {release}"))?;
            }
            return Ok((release.clone(), root));
        }
    }
    bail!(
        "Debian {}'s suites have no linux-image-{HOST_SERIES}*{FLAVOUR} with its headers",
        archive.release().codename
    )
}

/// The first package of a name.
fn first(apt: &Apt, name: &str) -> Result<Option<Package>> {
    Ok(apt.show(name)?.into_iter().next())
}

/// Image, headers, common headers and kbuild of a release, if the archive has them all.
fn host_packages(apt: &Apt, release: &str) -> Result<Option<Vec<Package>>> {
    let image = match first(apt, &format!("linux-image-{release}:arm64"))? {
        Some(signed) => Some(signed),
        None => first(apt, &format!("linux-image-{release}-unsigned:arm64"))?,
    };
    let (Some(image), Some(headers)) = (image, header_packages(apt, release)?) else { return Ok(None) };
    Ok(Some(std::iter::once(image).chain(headers).collect()))
}

/// Headers, common headers and kbuild of a release, if the archive has them all.
pub(super) fn header_packages(apt: &Apt, release: &str) -> Result<Option<Vec<Package>>> {
    let Some(headers) = first(apt, &format!("linux-headers-{release}:arm64"))? else { return Ok(None) };
    let common =
        headers.depends.iter().find(|name| name.starts_with("linux-headers-") && name.ends_with("-common"));
    let kbuild = headers.depends.iter().find(|name| name.starts_with("linux-kbuild-"));
    let (Some(common), Some(kbuild)) = (common, kbuild) else { return Ok(None) };
    // kbuild's programs run on this machine.
    let (common, kbuild) = (first(apt, common)?, first(apt, &format!("{kbuild}:{}", native()))?);
    let (Some(common), Some(kbuild)) = (common, kbuild) else { return Ok(None) };
    Ok(Some(vec![headers, common, kbuild]))
}

/// Orders releases like `6.12.95+deb12-cloud-arm64` by their numbers.
fn order(release: &str) -> Vec<u64> {
    let release = release.strip_suffix(FLAVOUR).unwrap_or(release);
    release.split(|byte: char| !byte.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

/// The newest cloud kernel of the current stable's backports with its modules: release, kernel, modules' directory.
fn guest_kernel(apt: &Apt, cache: &Path) -> Result<(String, PathBuf, PathBuf)> {
    let meta = apt.choose("linux-image-cloud-arm64:arm64")?;
    let image_name = meta
        .depends
        .iter()
        .find(|name| name.starts_with("linux-image-") && name.ends_with(FLAVOUR))
        .context("linux-image-cloud-arm64 names no kernel")?
        .clone();
    let release = image_name.trim_start_matches("linux-image-").to_owned();
    let image = apt.choose(&format!("{image_name}:arm64"))?;
    // Newer packagings keep kernel and modules in packages of their own; then the image package is empty.
    let version = image.version.clone();
    let mut packages = Vec::new();
    for prefix in ["linux-binary-", "linux-modules-"] {
        if let Some(name) = image.depends.iter().find(|name| name.starts_with(prefix)) {
            packages.push(apt.choose(&format!("{name}:arm64"))?);
        }
    }
    if packages.is_empty() {
        packages.push(image);
    }
    let root = cache.join("guest-kernel").join(format!("{release}_{version}_modules"));
    if !root.is_dir() {
        ui::say(&format!("guest kernel: Debian's {release}"));
        apt.unpack(&packages, &root).with_context(|| format!("cannot set up the guest kernel {release}"))?;
    }
    let find = |what: &str, places: [String; 2]| {
        places
            .into_iter()
            .map(|place| root.join(place))
            .find(|path| path.exists())
            .with_context(|| format!("the guest kernel's packages have no {what} ({})", root.display()))
    };
    let kernel =
        find("vmlinuz", [format!("usr/lib/modules/{release}/vmlinuz"), format!("boot/vmlinuz-{release}")])?;
    let modules = find(
        "modules",
        [format!("usr/lib/modules/{release}/kernel"), format!("lib/modules/{release}/kernel")],
    )?;
    Ok((release, kernel, modules))
}

fn busybox(apt: &Apt, cache: &Path) -> Result<(String, PathBuf)> {
    let package = apt.choose("busybox-static:arm64")?;
    let root = cache.join("busybox").join(&package.version);
    if !root.is_dir() {
        apt.unpack(std::slice::from_ref(&package), &root).context("cannot set up busybox")?;
    }
    let places = [root.join("bin/busybox"), root.join("usr/bin/busybox")];
    let busybox = places
        .into_iter()
        .find(|path| path.is_file())
        .with_context(|| format!("busybox-static has no busybox ({})", root.display()))?;
    Ok((package.version, busybox))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_of_the_host_kernel_names_its_package() {
        let path = PathBuf::new();
        let unpacked = Unpacked {
            host_release: "6.12.95+deb12-cloud-arm64".to_owned(),
            host_root: PathBuf::from("/c/6.12.95+deb12-cloud-arm64_6.12.95-1~bpo12+1"),
            host_kernel: path.clone(),
            guest_release: String::new(),
            guest_kernel: path.clone(),
            guest_modules: path.clone(),
            busybox: path,
            busybox_version: String::new(),
        };
        assert_eq!(unpacked.host_version(), Some("6.12.95-1~bpo12+1"));
    }

    #[test]
    fn newer_releases_order_higher() {
        assert!(order("6.12.107+deb13-cloud-arm64") > order("6.12.95+deb12-cloud-arm64"));
        assert!(order("6.12.90+deb12.1-cloud-arm64") > order("6.12.90+deb12-cloud-arm64"));
    }
}
