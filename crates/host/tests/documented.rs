//! The table of the series' patches and flaws names tests. Each name must be that of a test.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Functions that stand under a `#[test]`, and the strings that name tests on QEMU.
fn tests() -> BTreeSet<String> {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut paths = Vec::new();
    files(&crates, &mut paths);
    let mut names = BTreeSet::new();
    for path in paths {
        let text = std::fs::read_to_string(&path).unwrap();
        let mut attributed = false;
        for line in text.lines().map(str::trim) {
            if let Some(rest) = line.strip_prefix("fn ") {
                let name = rest.split(['(', '<']).next().unwrap();
                if attributed {
                    names.insert(name.to_string());
                }
                attributed = false;
            } else if line == "#[test]" {
                attributed = true;
            }
            if path.components().any(|part| part.as_os_str() == "cli") {
                let quoted = line.split('"').skip(1).step_by(2);
                names.extend(quoted.filter(|text| text.contains('-')).map(str::to_string));
            }
        }
    }
    names
}

/// What stands between backticks and is no path and no piece of code.
fn named(text: &str) -> impl Iterator<Item = &str> {
    let is_name = |word: &&str| {
        word.contains(['_', '-'])
            && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "_-*".contains(c))
    };
    text.split('`').skip(1).step_by(2).filter(is_name)
}

#[test]
fn every_test_that_the_documents_name_exists() {
    let tests = tests();
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    // Functions of the kernel and of the module's shim that the tables mention.
    let others = |name: &str| name.starts_with("shim_");
    let mut count = 0;
    let text = std::fs::read_to_string(docs.join("series.md")).unwrap();
    for name in named(&text).filter(|name| !others(name)) {
        let found = match name.strip_suffix('*') {
            Some(start) => tests.iter().any(|test| test.starts_with(start)),
            None => tests.contains(name),
        };
        assert!(found, "docs/series.md names the test {name}, which does not exist");
        count += 1;
    }
    assert!(count > 60, "only {count} names were found: the tables are written otherwise");
}

#[test]
fn every_known_flaw_has_a_test_with_its_number() {
    let tests = tests();
    let numbers = (1..=28).map(|number| format!("flaw_{number:02}_"));
    for start in numbers.chain(('a'..='g').map(|letter| format!("flaw_29{letter}_"))) {
        assert!(tests.iter().any(|test| test.starts_with(&start)), "no test {start}*");
    }
}
