//! docs/guide.md, executed.

use std::process::Command;

use anyhow::{Result, ensure};

use super::patience;
use crate::setup::Environment;
use crate::{build, command};

/// Every command of docs/guide.md that starts with `./realm` or leads to one, in an empty directory. What needs a network
/// on the host is `devices`' part.
pub(super) fn guide(environment: &Environment) -> Result<()> {
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
        // A registry of its own: the user may have a Realm of that name.
        shell.env("REALM_PATIENCE", patience().to_string()).env("XDG_RUNTIME_DIR", &directory);
        let output = command::collect(&mut shell)?;
        let wanted = if line.contains("exit 3") { 3 } else { 0 };
        let status = output.status.code();
        ensure!(status == Some(wanted), "`{line}` ended with {status:?}:\n{}", command::said(&output));
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(!said.contains("the host kernel complains"), "`{line}`:\n{said}");
        printed.push((line.to_owned(), String::from_utf8_lossy(&output.stdout).into_owned()));
    }
    let of = |part: &str| -> Vec<&str> {
        printed.iter().filter(|(line, _)| line.contains(part)).map(|(_, text)| text.trim()).collect()
    };
    ensure!(of("cat /mnt/file") == ["hello"], "the disk held {:?}", of("cat /mnt/file"));
    ensure!(of("cat /root/note") == ["a note"], "the note was {:?}", of("cat /root/note"));
    ensure!(of("exec db") == ["realm"], "the second Realm said {:?}", of("exec db"));
    ensure!(of("sha256sum")[0].ends_with('-'), "no hash: {:?}", of("sha256sum"));
    ensure!(of("--attest")[0].ends_with("\nverified"), "not attested: {:?}", of("--attest"));
    ensure!(of("verify token")[0].ends_with("\nverified"), "not verified: {:?}", of("verify token"));
    ensure!(of("--expect") == ["as expected"], "not expected: {:?}", of("--expect"));
    ensure!(directory.join("trace/summary.html").is_file(), "there is no page of the trace");
    let predicted = of("launch.json");
    ensure!(predicted.len() == 2 && predicted[0] == predicted[1], "predictions differ: {predicted:?}");
    let _ = std::fs::remove_dir_all(directory);
    Ok(())
}
