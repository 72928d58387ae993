//! The fuzz targets (`fuzz/`), each for some seconds.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::command;
use crate::setup::Environment;

/// Seconds for each target unless `REALM_FUZZ_SECONDS` says otherwise.
const SECONDS: u64 = 10;
/// What the compiler adds to the code so that the fuzzer sees where an input leads.
const COVERAGE: [&str; 5] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// Builds all targets, runs each from its seeds and what it found before, and names the input of one that fails.
/// `REALM_FUZZ_TARGET` picks one.
pub(super) fn run_a_while(_: &Environment) -> Result<()> {
    let checkout = crate::paths::checkout()?;
    let seconds =
        std::env::var("REALM_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(SECONDS);
    let wanted = std::env::var("REALM_FUZZ_TARGET").ok();
    let (programs, sanitized) = build(&checkout)?;
    if !sanitized {
        crate::ui::say("this toolchain has no address sanitizer: only panics are found");
    }
    let corpus = crate::paths::target()?.join("fuzz-corpus");
    std::fs::create_dir_all(&corpus)?;
    command::output(Command::new(programs.join("seeds")).arg(&corpus))?;
    let scratch = crate::paths::target()?.join("fuzz-scratch");
    std::fs::create_dir_all(&scratch)?;
    let targets = targets(&checkout)?;
    for target in targets.iter().filter(|target| wanted.as_ref().is_none_or(|wanted| wanted == *target)) {
        let inputs = corpus.join(target);
        std::fs::create_dir_all(&inputs)?;
        let mut fuzzer = Command::new(programs.join(target));
        fuzzer.arg(&inputs).arg(format!("-max_total_time={seconds}"));
        fuzzer.args(["-rss_limit_mb=2048", "-timeout=60", "-detect_leaks=0", "-print_final_stats=1"]);
        fuzzer.arg(format!("-artifact_prefix={}/{target}-", corpus.display()));
        let output = command::collect(fuzzer.env("TMPDIR", &scratch))?;
        let said = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            bail!(
                "`{target}` failed; repeat it with {}\n{}",
                command::shown(&fuzzer),
                command::tail(&said, 40)
            );
        }
        let of =
            |key: &str| said.lines().find_map(|line| line.strip_prefix(key)).unwrap_or("?").trim().to_owned();
        let runs = of("stat::number_of_executed_units:");
        ensure!(runs.parse::<u64>().is_ok_and(|runs| runs > 0), "`{target}` ran nothing:\n{said}");
        println!("  {target}: {runs} inputs");
    }
    std::fs::remove_dir_all(scratch)?;
    Ok(())
}

/// Every program in `fuzz/targets` but the one that writes seeds.
fn targets(checkout: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(checkout.join("fuzz/targets")).context("there are no fuzz targets")?;
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| Some(entry.path().file_stem()?.to_str()?.to_owned()))
        .filter(|name| name != "seeds")
        .collect();
    names.sort();
    Ok(names)
}

/// Builds with the stable compiler; gives the programs' directory, and whether they find errors of memory.
fn build(checkout: &Path) -> Result<(PathBuf, bool)> {
    let version = command::output(Command::new("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc has no host")?;
    let libraries = command::output(Command::new("rustc").args(["--print", "target-libdir"]))?;
    let sanitizer = std::fs::read_dir(libraries.trim())?
        .flatten()
        .any(|entry| entry.file_name().to_string_lossy().ends_with("_rt.asan.a"));
    let mut flags = COVERAGE.to_vec();
    if sanitizer {
        flags.push("-Zsanitizer=address");
    }
    let target = crate::paths::target()?.join("fuzz");
    let mut cargo = Command::new("cargo");
    cargo.current_dir(checkout).env("CARGO_TARGET_DIR", &target);
    // The sanitizer's flag is the one that a stable compiler does not take by itself.
    cargo.env("RUSTC_BOOTSTRAP", "1").env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    cargo.env("CARGO_PROFILE_DEV_OPT_LEVEL", "1");
    cargo.args(["build", "--quiet", "-p", "fuzz", "--bins", "--target", host]);
    command::output(&mut cargo).context("building the fuzz targets, which takes a C++ compiler")?;
    Ok((target.join(host).join("debug"), sanitizer))
}
