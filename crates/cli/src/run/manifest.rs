//! The launch manifest: every call that enters a Realm's initial measurement (RIM), with digests of what it measures.
//!
//! Whoever has the manifest can predict the measurement without kernel, initramfs or a machine (`realm measure`), and
//! whoever has kernel, initramfs and flags can make the same manifest again (`realm run --dry-run`).

use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use attest::measure::Rim;
use cca_abi::kvm::rme;
use cca_abi::rmi::{HashAlgorithm, RealmParams, realm_flags};
use serde::{Deserialize, Serialize};
use vmm::layout::RAM_BASE;
use vmm::machine::RealmOptions;
use vmm::plan::Plan;
use zerocopy::FromZeros as _;

use super::RunOptions;
use super::options::{hex, to_hex};
use crate::args::{MeasureArgs, RunArgs};

const PAGE: u64 = 4096;

/// All of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    /// The version of this format.
    pub(crate) version: u32,
    /// What the Realm is created with.
    pub(crate) realm: Realm,
    /// What follows, in this order.
    pub(crate) calls: Vec<Call>,
}

/// The measured parameters of RMI_REALM_CREATE, and the personalization value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Realm {
    ipa_bits: u8,
    hash: String,
    personalization: String,
    sve_bits: Option<u32>,
    pmu_counters: Option<u8>,
    breakpoints: u8,
    watchpoints: u8,
}

/// One call on the way to an active Realm.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "call", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Call {
    /// A range becomes RAM (RMI_RTT_INIT_RIPAS, in the largest entries that fit).
    InitRipas {
        /// Guest physical address.
        address: u64,
        /// Bytes.
        size: u64,
    },
    /// A range gets contents (RMI_DATA_CREATE, page by page).
    Populate {
        /// What it holds, for people.
        contents: Vec<String>,
        /// Guest physical address.
        address: u64,
        /// Bytes.
        size: u64,
        /// Whether contents are measured.
        measured: bool,
        /// SHA-256 of the page hashes that follow: one short word to compare.
        digest: String,
        /// The Realm's hash of each page, one after the other.
        pages: String,
    },
    /// A CPU (RMI_REC_CREATE).
    Rec {
        /// Where it begins.
        pc: u64,
        /// `x0` to `x7`.
        gprs: [u64; 8],
        /// Whether it runs at once; only such CPUs are measured.
        runnable: bool,
    },
}

impl Manifest {
    /// What launching `plan` will do.
    pub(crate) fn new(plan: &Plan, options: &RealmOptions) -> Result<Self> {
        let layout = &plan.layout;
        let algorithm = if options.hash == rme::HASH_SHA512 { "sha512" } else { "sha256" };
        let realm = Realm {
            ipa_bits: u8::try_from(layout.ipa_bits)?,
            hash: algorithm.to_owned(),
            personalization: to_hex(&options.personalization),
            sve_bits: options.sve_bits,
            pmu_counters: options.pmu_counters.map(u8::try_from).transpose()?,
            breakpoints: u8::try_from(options.breakpoints)?,
            watchpoints: u8::try_from(options.watchpoints)?,
        };
        let rim = realm.create()?;
        let mut calls = vec![Call::InitRipas { address: RAM_BASE, size: layout.ram_size }];
        for (address, size) in plan.populated()? {
            let mut pages = Vec::new();
            for page in (address..address + size).step_by(4096) {
                pages.extend_from_slice(&rim.page_digest(&plan.page(page))[..rim.value().len()]);
            }
            let inside = |start: u64| (address..address + size).contains(&start);
            let contents = plan.segments.iter().filter(|segment| inside(segment.address));
            calls.push(Call::Populate {
                contents: contents.map(|segment| segment.name.to_owned()).collect(),
                address,
                size,
                measured: true,
                digest: to_hex(&attest::measure::sha256(&pages)),
                pages: to_hex(&pages),
            });
        }
        for index in 0..layout.cpus {
            let first = index == 0;
            let mut gprs = [0; 8];
            gprs[0] = if first { layout.dtb } else { 0 };
            calls.push(Call::Rec { pc: if first { layout.kernel } else { 0 }, gprs, runnable: first });
        }
        Ok(Self { version: 1, realm, calls })
    }

    /// The measurement that these calls give.
    pub(crate) fn measure(&self) -> Result<Rim> {
        ensure!(self.version == 1, "a manifest of version {} is not known", self.version);
        let mut rim = self.realm.create()?;
        let start_level = start_level(self.realm.ipa_bits)?;
        let limit = 1u64.checked_shl(u32::from(self.realm.ipa_bits) - 1).unwrap_or(0);
        for call in &self.calls {
            match call {
                Call::InitRipas { address, size } => {
                    let top = address.checked_add(*size).filter(|top| *top <= limit);
                    let top = top.context("memory lies outside the Realm's addresses")?;
                    rim.init_ripas(*address, top, start_level).context("memory is not made of pages")?;
                }
                Call::Populate { address, size, measured, pages, .. } => {
                    let digests = hex(pages).context("page digests are no hexadecimal digits")?;
                    let length = rim.value().len();
                    let count = usize::try_from(size / PAGE)?;
                    ensure!(
                        size % PAGE == 0
                            && address % PAGE == 0
                            && count.checked_mul(length) == Some(digests.len()),
                        "the range at {address:#x} and its page digests do not match"
                    );
                    ensure!(
                        address.checked_add(*size).is_some_and(|top| top <= limit),
                        "contents lie outside"
                    );
                    for (page, digest) in (0u64..).zip(digests.chunks(length)) {
                        let mut content = [0; 64];
                        content[..length].copy_from_slice(digest);
                        rim.data(address + page * PAGE, measured.then_some(&content));
                    }
                }
                Call::Rec { pc, gprs, runnable } => {
                    if *runnable {
                        rim.rec(*pc, gprs);
                    }
                }
            }
        }
        Ok(rim)
    }

    /// The personalization value.
    pub(crate) fn personalization(&self) -> Result<Vec<u8>> {
        let value = hex(&self.realm.personalization).filter(|value| value.len() == 64);
        value.context("the personalization value is not 64 bytes long")
    }

    /// Writes it to a file, or to standard output if that is `-`.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        if path == Path::new("-") {
            print!("{text}");
            return Ok(());
        }
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Reads one.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let mut text = String::new();
        if path == Path::new("-") {
            std::io::stdin().read_to_string(&mut text)?;
        } else {
            text =
                std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        }
        serde_json::from_str(&text).with_context(|| format!("{} is no launch manifest", path.display()))
    }
}

impl Realm {
    fn create(&self) -> Result<Rim> {
        let mut params = RealmParams::new_zeroed();
        params.s2sz = self.ipa_bits;
        params.hash_algo = match self.hash.as_str() {
            "sha256" => HashAlgorithm::Sha256 as u8,
            "sha512" => HashAlgorithm::Sha512 as u8,
            other => bail!("the hash `{other}` is not known"),
        };
        ensure!(self.breakpoints > 0 && self.watchpoints > 0, "there is no CPU without breakpoints");
        params.num_bps = self.breakpoints - 1;
        params.num_wps = self.watchpoints - 1;
        if let Some(bits) = self.sve_bits {
            params.flags |= realm_flags::SVE;
            params.sve_vl =
                u8::try_from(bits / 128)?.checked_sub(1).context("a vector has 128 bits at least")?;
        }
        if let Some(counters) = self.pmu_counters {
            params.flags |= realm_flags::PMU;
            params.pmu_num_ctrs = counters;
        }
        Rim::create(&params).context("the Realm's parameters make no sense")
    }
}

/// The first level of a Realm's tables: as many tables as allowed are concatenated there.
fn start_level(ipa_bits: u8) -> Result<i64> {
    ensure!((32..=48).contains(&ipa_bits), "{ipa_bits} address bits are impossible");
    Ok(4 - i64::from((ipa_bits - 8) / 9))
}

/// `realm measure`.
pub(crate) fn measure(args: &MeasureArgs) -> Result<u8> {
    let manifest = Manifest::read(&args.manifest)?;
    let rim = to_hex(manifest.measure()?.value());
    if args.json {
        println!("{}", serde_json::json!({ "rim": rim, "hash": manifest.realm.hash }));
    } else {
        println!("{rim}");
    }
    Ok(0)
}

/// `realm run --dry-run`.
pub(crate) fn dry_run(args: &RunArgs, options: &RunOptions) -> Result<u8> {
    ensure!(!options.plain, "an ordinary VM is not measured");
    let manifest = Manifest::new(&super::plan(options)?, &options.realm)?;
    let rim = manifest.measure()?;
    super::launch::agree(args.launch.expect.as_ref(), rim.value())?;
    match &args.launch.manifest {
        Some(path) => {
            manifest.write(path)?;
            println!("{}", to_hex(rim.value()));
        }
        None => {
            manifest.write(Path::new("-"))?;
            crate::ui::say(&format!("the initial measurement will be {}", to_hex(rim.value())));
        }
    }
    Ok(0)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use vmm::fdt::Conduit;
    use vmm::image::Image;
    use vmm::plan::Shape;

    pub(crate) fn manifest(hash: u32) -> Manifest {
        let kernel = Image { bytes: vec![1; 9000], text_offset: 0, image_size: 1 << 20 };
        let shape = Shape { ram_size: 64 << 20, cpus: 2, ipa_bits: None, pmu: true, conduit: Conduit::Smc };
        let plan = Plan::new(shape, kernel, Some(vec![2; 5000]), "quiet").unwrap();
        let options =
            RealmOptions { hash, pmu_counters: Some(4), sve_bits: Some(256), ..RealmOptions::default() };
        Manifest::new(&plan, &options).unwrap()
    }

    #[test]
    fn a_manifest_survives_its_file_and_predicts_the_same() {
        for (hash, length) in [(rme::HASH_SHA256, 32), (rme::HASH_SHA512, 64)] {
            let manifest = manifest(hash);
            let text = serde_json::to_string(&manifest).unwrap();
            let back: Manifest = serde_json::from_str(&text).unwrap();
            assert_eq!(back, manifest);
            let rim = manifest.measure().unwrap();
            assert_eq!(back.measure().unwrap(), rim);
            assert_eq!(rim.value().len(), length);
        }
        assert_ne!(manifest(rme::HASH_SHA256).measure().unwrap().value(), {
            let mut other = manifest(rme::HASH_SHA256);
            other.calls.swap(1, 2);
            other.measure().unwrap().value().to_vec()
        });
    }

    #[test]
    fn the_start_level_is_that_of_the_host() {
        for (bits, level) in [(33, 2), (34, 2), (35, 1), (40, 1), (44, 0), (48, 0)] {
            assert_eq!(start_level(bits).unwrap(), level, "{bits}");
        }
    }

    proptest! {
        /// Whatever became of a manifest's text, it is refused or has a measurement.
        #[test]
        fn any_text_is_a_manifest_or_an_error(
            cuts in proptest::collection::vec(
                (any::<prop::sample::Index>(), 0..40usize, prop_oneof!["[0-9a-f]{0,3}", "[\\[\\]{}\":,.eE-]{0,3}", Just("null".to_owned()), Just("18446744073709551615".to_owned())]),
                0..6,
            ),
        ) {
            let mut manifest = manifest(rme::HASH_SHA256);
            // Short enough for a change to hit something else than digests.
            manifest.calls.retain(|call| !matches!(call, Call::Populate { size, .. } if *size > 3 * PAGE));
            let mut text = serde_json::to_string(&manifest).unwrap();
            for (at, len, more) in cuts {
                let at = at.index(text.len() + 1);
                let end = (at + len).min(text.len());
                text.replace_range(at..end, &more);
            }
            if let Ok(manifest) = serde_json::from_str::<Manifest>(&text) {
                let _ = manifest.personalization();
                if let Ok(rim) = manifest.measure() {
                    // What is understood is written down again with the same meaning.
                    let text = serde_json::to_string(&manifest).unwrap();
                    let again: Manifest = serde_json::from_str(&text).unwrap();
                    prop_assert_eq!(again.measure().unwrap(), rim);
                }
            }
        }

        #[test]
        fn no_manifest_breaks_the_prediction(address: u64, size: u64, bits: u8, pages in "[0-9a-g]{0,200}", sve in any::<Option<u32>>()) {
            let mut manifest = manifest(rme::HASH_SHA256);
            manifest.realm.ipa_bits = bits;
            manifest.realm.sve_bits = sve;
            // A huge range is legal, and only slow.
            manifest.calls.push(Call::InitRipas { address, size: size % (1 << 32) });
            manifest.calls.push(Call::Populate { contents: vec![], address, size, measured: true, digest: String::new(), pages });
            let _ = manifest.measure();
        }
    }
}
