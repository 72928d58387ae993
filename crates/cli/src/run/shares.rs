//! `--share`.

use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use vmm::share::Serve;
use vmm::share::folder::Folder;
use vmm::share::remote::Remote;
use vmm::virtio::Device;
use vmm::virtio::fs::Fs;
use vmm::{Error, Result};

/// One shared folder as the user names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ShareArg {
    /// The folder; on the emulated host, a port that leads to it.
    pub(crate) path: PathBuf,
    /// What the guest mounts.
    pub(crate) tag: String,
    /// Whether the guest may only read it.
    pub(crate) read_only: bool,
}

/// Parses `DIR[,tag=NAME][,ro]`.
pub(crate) fn parse(text: &str) -> std::result::Result<ShareArg, String> {
    let mut words = text.split(',');
    let path = PathBuf::from(words.next().filter(|path| !path.is_empty()).ok_or("a folder is expected")?);
    let (mut tag, mut read_only) = (None, false);
    for word in words {
        match word.split_once('=') {
            None if word == "ro" => read_only = true,
            Some(("tag", name)) => tag = Some(name.to_owned()),
            _ => return Err(format!("`{word}` is none of ro, tag=NAME")),
        }
    }
    let tag = tag.or_else(|| own_name(&path)).filter(|tag| is_tag(tag)).ok_or(
        "the guest needs a name for it: tag=NAME, of at most 36 letters, digits, dots, dashes and underscores",
    )?;
    Ok(ShareArg { path, tag, read_only })
}

/// A folder's own name, also of one that is called `.`.
fn own_name(path: &Path) -> Option<String> {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    Some(path.file_name()?.to_str()?.to_owned())
}

/// The guest's init makes a directory of this name.
fn is_tag(tag: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=36).contains(&tag.len()) && tag.bytes().all(fits) && !tag.starts_with('.')
}

/// Refuses two folders of one name.
pub(crate) fn check(shares: &[ShareArg]) -> Result<()> {
    for (index, share) in shares.iter().enumerate() {
        if shares[..index].iter().any(|other| other.tag == share.tag) {
            return Err(Error::vmm(format!("two shared folders are called `{}`: tag=NAME", share.tag)));
        }
    }
    Ok(())
}

/// Makes a device for each folder.
pub(crate) fn open(shares: &[ShareArg]) -> Result<Vec<Box<dyn Device>>> {
    check(shares)?;
    shares.iter().map(|share| Ok(Box::new(Fs::new(&share.tag, server(share)?)?) as Box<dyn Device>)).collect()
}

fn server(share: &ShareArg) -> Result<Box<dyn Serve>> {
    let path = &share.path;
    // The emulated host's port to the developer's machine, which knows what may be written.
    if path.metadata().is_ok_and(|data| data.file_type().is_char_device()) {
        let port = std::fs::OpenOptions::new().read(true).write(true).open(path);
        let port = port.map_err(|error| Error::os(format_args!("the port {}", path.display()), &error))?;
        return Ok(Box::new(Remote::new(port)));
    }
    Ok(Box::new(Folder::open(path, share.read_only)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_a_folder_with_a_name() {
        let share = |path: &str, tag: &str, read_only| {
            Ok(ShareArg { path: path.into(), tag: tag.to_owned(), read_only })
        };
        assert_eq!(parse("/no/where"), share("/no/where", "where", false));
        assert_eq!(parse("/no/where/"), share("/no/where/", "where", false));
        assert_eq!(parse("/no/where,ro,tag=a.b"), share("/no/where", "a.b", true));
        assert_eq!(parse("src").unwrap().tag, "src");
        assert_eq!(parse(".").unwrap().tag, "cli");
        for wrong in ["", ",ro", "/a,rw", "/a,tag=", "/a,tag=x/y", "/a,tag=..", "/", "/a b", "/a,ro=1"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        let two = [parse("/a/x").unwrap(), parse("/b/x").unwrap()];
        assert!(check(&two).is_err() && check(&two[..1]).is_ok());
    }
}
