//! `realm doctor`: each prerequisite, its version, and what to do where it is missing.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::{apt, debug, hosts, kernels, newest, rust, tools};
use crate::args::DoctorArgs;

#[derive(Serialize)]
struct Finding {
    name: String,
    ok: bool,
    found: String,
    purpose: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Finding {
    fn new(
        name: &str,
        found: Option<String>,
        purpose: &'static str,
        remedy: impl FnOnce() -> String,
    ) -> Self {
        let ok = found.is_some();
        Self {
            name: name.to_owned(),
            ok,
            found: found.unwrap_or_else(|| "missing".to_owned()),
            purpose,
            remedy: (!ok).then(remedy),
        }
    }
}

/// Reports; the status is 1 when something is missing.
pub(crate) fn run(args: &DoctorArgs) -> Result<u8> {
    let cache = crate::paths::cache()?;
    let findings = examine(&cache);
    let missing = findings.iter().filter(|finding| !finding.ok).count();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&findings)?);
    } else {
        for finding in &findings {
            let mark = if finding.ok { "ok     " } else { "MISSING" };
            println!("{mark}  {:<32} {}", finding.name, finding.found);
            if let Some(remedy) = &finding.remedy {
                println!("         {}; remedy: {remedy}", finding.purpose);
            }
        }
        match missing {
            0 => println!("nothing is missing"),
            _ => println!("{missing} missing: `./realm setup` does all of it, or see the remedies above"),
        }
    }
    Ok(u8::from(missing > 0))
}

fn examine(cache: &Path) -> Vec<Finding> {
    let mut findings = Vec::new();
    let release = apt::release();
    findings.push(Finding::new(
        "Debian 12 or 13",
        release.as_ref().ok().map(|release| format!("Debian {} ({})", release.version, release.codename)),
        "packages come from Debian",
        || "use a machine or container with Debian 12 or 13".to_owned(),
    ));
    let backports = release.as_ref().ok().filter(|release| release.version < 13);
    let qemu = tools::qemu(Path::new(tools::QEMU));
    let good = qemu.filter(|(_, _, version)| *version >= tools::QEMU_AT_LEAST);
    findings.push(Finding::new(
        "QEMU 9.2 or newer for arm64",
        good.map(|(_, line, _)| line),
        "emulates the CCA machine",
        || match backports {
            Some(release) => format!("apt-get install -t {}-backports qemu-system-arm", release.codename),
            None => "apt-get install qemu-system-arm".to_owned(),
        },
    ));
    // Only tests use it, and they fetch it themselves: it cannot be missing.
    let newest =
        newest::recorded(cache).map_or("not fetched yet: `realm test` does".to_owned(), |(_, line)| line);
    findings.push(Finding::new(
        "newest QEMU, for tests",
        Some(newest),
        "shows what newer CPUs change",
        String::new,
    ));
    for tool in tools::TOOLS {
        findings.push(Finding::new(tool.name, tool.found(), tool.purpose, || {
            format!("apt-get install {}", tool.package)
        }));
    }
    let toolchain = rust::toolchain().ok();
    findings.push(Finding::new(
        "rustc",
        toolchain.as_ref().map(|toolchain| toolchain.release.clone()),
        "compiles everything",
        || "install Rust 1.85 or newer, for example with rustup".to_owned(),
    ));
    for (target, purpose) in [(rust::BARE, "images and the module"), (rust::LINUX, "the arm64 realm")] {
        let present = toolchain.as_ref().and_then(|toolchain| rust::present(toolchain, target, cache));
        findings.push(Finding::new(
            &format!("Rust for {target}"),
            present.map(|(_, how)| how),
            purpose,
            || format!("`rustup target add {target}`, or `./realm setup` builds the library from source"),
        ));
    }
    let unpacked = kernels::recorded(cache);
    let part = |pick: fn(&kernels::Unpacked) -> String| unpacked.as_ref().map(pick);
    let setup = || "./realm setup".to_owned();
    findings.push(Finding::new(
        "host kernel and headers",
        part(|unpacked| unpacked.host_release.clone()),
        "runs on the emulated host; the module is built for it",
        setup,
    ));
    // Only who asks for it gets it.
    let newest = unpacked
        .as_ref()
        .and_then(|unpacked| hosts::recorded(cache, unpacked))
        .unwrap_or_else(|| "not fetched yet: `--host newest` does".to_owned());
    findings.push(Finding::new("newest host kernel", Some(newest), "runs on the emulated host", String::new));
    let debug = unpacked
        .as_ref()
        .and_then(|unpacked| debug::recorded(cache, unpacked))
        .map_or("not built yet: `--host debug` does".to_owned(), |host| host.release);
    findings.push(Finding::new(
        "debug host kernel, for tests",
        Some(debug),
        "looks for mistakes",
        String::new,
    ));
    findings.push(Finding::new(
        "guest kernel",
        part(|unpacked| unpacked.guest_release.clone()),
        "runs in the Realm",
        setup,
    ));
    findings.push(Finding::new(
        "busybox for arm64",
        part(|unpacked| unpacked.busybox_version.clone()),
        "is the user space of host and guest",
        setup,
    ));
    findings
}
