//! What everybody has to trust stays small: lines of the core, and uses of `unsafe` in the image around it.

use std::fs;
use std::path::{Path, PathBuf};
use std::string::String;
use std::vec::Vec;

use super::std;

/// Lines of the core without its tests.
const MOST_LINES: usize = 8000;
/// Blocks, functions, implementations and attributes with `unsafe` in the image.
const MOST_UNSAFE: usize = 130;

fn sources(directory: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
}

/// The lines of all files below `directory` (from this crate) that are not tests.
fn code(directory: &str) -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(directory);
    let mut files = Vec::new();
    sources(&root, &mut files);
    files
        .iter()
        .filter(|path| !path.components().any(|part| part.as_os_str() == "tests"))
        .filter(|path| !path.ends_with("test_platform.rs"))
        .flat_map(|path| {
            let text = fs::read_to_string(path).unwrap();
            let lines: Vec<String> = text.lines().map(Into::into).collect();
            // A module of tests is the end of a file; `lib.rs` has its own below the list of modules.
            let tests = lines.windows(2).position(|two| two[0] == "#[cfg(test)]" && two[1].ends_with('{'));
            lines.into_iter().take(tests.unwrap_or(usize::MAX)).collect::<Vec<_>>()
        })
        .collect()
}

#[test]
fn the_core_is_small_and_unsafe_is_counted() {
    let lines = code("src").len();
    std::println!("{lines} lines of core");
    assert!(lines > 3000, "the count sees the core");
    assert!(lines < MOST_LINES, "{lines} lines of core");
    let image = code("../../images/rmm/src");
    let used = image
        .iter()
        .filter(|line| !line.trim_start().starts_with("//"))
        .filter(|line| {
            ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"].iter().any(|use_| line.contains(use_))
        })
        .count();
    std::println!("{used} uses of unsafe in the image");
    assert!(used > 10, "the count sees the image");
    assert!(used <= MOST_UNSAFE, "{used} uses of unsafe in the image");
    assert!(code("src").iter().any(|line| line == "#![forbid(unsafe_code)]"));
}
