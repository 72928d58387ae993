//! Kernel modules for the guest's initramfs: decompressed, and in an order in which they can be loaded.

use std::collections::BTreeMap;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

/// Modules, and for each wanted one what has to be loaded for it.
#[derive(Debug, Default)]
pub(crate) struct Modules {
    /// Names and contents.
    pub(crate) files: BTreeMap<String, Vec<u8>>,
    /// One line for each wanted module: its name, a colon, and the modules to load one after the other.
    pub(crate) order: String,
}

/// Takes `wanted` and what they depend on from a kernel's tree of modules.
pub(crate) fn collect(tree: &Path, wanted: &[&str]) -> Result<Modules> {
    let mut known = BTreeMap::new();
    index(tree, &mut known)?;
    let mut modules = Modules::default();
    for name in wanted {
        let mut order = Vec::new();
        add(name, &known, &mut modules.files, &mut order)?;
        modules.order.push_str(&format!("{}: {}\n", canonical(name), order.join(" ")));
    }
    Ok(modules)
}

fn index(directory: &Path, known: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let entries =
        std::fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            index(&path, known)?;
        } else if let Some((name, _)) = path.file_name().and_then(|name| name.to_str()?.split_once(".ko")) {
            known.insert(canonical(name), path);
        }
    }
    Ok(())
}

/// The kernel takes `-` and `_` in a module's name for the same.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

fn add(
    name: &str,
    known: &BTreeMap<String, PathBuf>,
    files: &mut BTreeMap<String, Vec<u8>>,
    order: &mut Vec<String>,
) -> Result<()> {
    let name = canonical(name);
    if order.contains(&name) {
        return Ok(());
    }
    let path = known.get(&name).with_context(|| format!("the guest's kernel has no module {name}"))?;
    if !files.contains_key(&name) {
        files.insert(name.clone(), read(path)?);
    }
    for needed in depends(&files[&name]) {
        add(&needed, known, files, order)?;
    }
    order.push(name);
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let failed = || format!("cannot read {}", path.display());
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => std::fs::read(path).with_context(failed),
        Some("xz") => {
            let mut bytes = Vec::new();
            lzma_rs::xz_decompress(&mut BufReader::new(std::fs::File::open(path)?), &mut bytes)
                .map_err(|error| anyhow::anyhow!("{error:?}"))
                .with_context(failed)?;
            Ok(bytes)
        }
        _ => bail!("{} is compressed in an unknown way", path.display()),
    }
}

/// What a module says that it needs: the string `depends=a,b` among those of its `.modinfo` section.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let rest = &module[start + KEY.len()..];
    let end = rest.iter().position(|byte| *byte == 0).unwrap_or(0);
    let names = String::from_utf8_lossy(&rest[..end]);
    names.split(',').filter(|name| !name.is_empty()).map(canonical).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_module_needs_comes_before_it() {
        let tree = std::env::temp_dir().join(format!("realm-modules-{}", std::process::id()));
        std::fs::create_dir_all(tree.join("net")).unwrap();
        for (file, text) in [
            ("net/top.ko", "x\0depends=mid-dle,low\0y"),
            ("mid-dle.ko", "\0depends=low\0"),
            ("net/low.ko", "\0depends=\0"),
            ("other.ko", "none"),
        ] {
            std::fs::write(tree.join(file), text).unwrap();
        }
        let modules = collect(&tree, &["top", "other"]).unwrap();
        assert_eq!(modules.order, "top: low mid_dle top\nother: other\n");
        assert_eq!(modules.files.keys().collect::<Vec<_>>(), ["low", "mid_dle", "other", "top"]);
        assert!(collect(&tree, &["none"]).is_err());
        std::fs::remove_dir_all(tree).unwrap();
    }
}
