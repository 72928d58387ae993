//! Names of Realms.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};

/// The longest name.
const LONGEST: usize = 40;

const FIRST: &[&str] = &[
    "amber", "bold", "brave", "bright", "brisk", "calm", "clear", "clever", "cosy", "early", "fair", "fresh",
    "gentle", "glad", "golden", "keen", "kind", "light", "lively", "lucky", "mellow", "merry", "neat",
    "noble", "patient", "plain", "proud", "quick", "quiet", "silver", "steady", "swift", "tidy", "warm",
    "wise",
];
const SECOND: &[&str] = &[
    "alder", "aspen", "badger", "beech", "birch", "cedar", "crane", "curlew", "dove", "elm", "falcon",
    "finch", "fox", "hare", "hazel", "heron", "ibex", "jay", "kestrel", "larch", "lark", "linden", "lynx",
    "maple", "marten", "otter", "owl", "pine", "plover", "robin", "rowan", "seal", "stork", "swan", "willow",
    "wren",
];

/// A name that can be a file's, and an argument that is not taken for something else.
pub(crate) fn parse(text: &str) -> Result<String, String> {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let begins_well = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    if begins_well && text.len() <= LONGEST && text.bytes().all(fine) {
        return Ok(text.to_owned());
    }
    Err(format!(
        "a name has 1 to {LONGEST} letters, digits, `-`, `_`, `.`, and begins with a letter or digit"
    ))
}

/// A name that is easy to say. `attempt` makes it longer where the short ones are taken.
pub(crate) fn made_up(attempt: usize) -> String {
    let random = RandomState::new().build_hasher().finish();
    let pick = |list: &[&'static str], random: u64| {
        let len = u64::try_from(list.len()).unwrap_or(1);
        usize::try_from(random % len).ok().and_then(|index| list.get(index)).copied().unwrap_or("realm")
    };
    let name = format!("{}-{}", pick(FIRST, random), pick(SECOND, random >> 32));
    if attempt == 0 { name } else { format!("{name}-{attempt}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_files_and_words() {
        for fine in ["web", "a", "A-b_c.9", "0", &"x".repeat(40)] {
            assert_eq!(parse(fine).as_deref(), Ok(fine));
        }
        for wrong in ["", "-a", ".", "..", ".a", "a/b", "a b", "a:b", "ä", "a\n", &"x".repeat(41)] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        for attempt in 0..200 {
            assert!(parse(&made_up(attempt)).is_ok());
        }
    }
}
