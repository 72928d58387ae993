//! What can be said about an image by looking at its machine code: who can panic, and how deep its stacks get.
//!
//! The call graph is read from the ELF file's text and symbols. A call through a register may reach every function whose
//! address the image takes anywhere; formatting calls formatting only. A cycle counts each of its functions once; only formatting has cycles, and
//! [`Audit::stacks`] names the functions in any other.

mod code;
mod graph;

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, bail, ensure};

use crate::setup::Environment;
use crate::ui;
use graph::Graph;

/// What is expected of an image.
struct Audit {
    package: &'static str,
    part: &'static str,
    /// Where a stack begins, and the symbol whose value is its size.
    roots: &'static [(&'static str, &'static str)],
    /// What comes on top of any of them: exceptions.
    vectors: &'static [&'static str],
    /// Functions that may contain a call to a panic, each with why it is not taken or does not matter.
    may_panic: &'static [(&'static str, &'static str)],
}

const IMAGES: &[Audit] = &[Audit {
    package: "rmm-image",
    part: "rmm",
    roots: &[
        ("rmm_image::run_primary", "rmm_stack_size"),
        ("rmm_warm_start", "rmm_stack_size"),
        ("rmm_cold_start", "rmm_boot_stack_size"),
    ],
    vectors: &["rmm_vectors"],
    may_panic: &[
        ("core::fmt::", "formatting, for the console only: widths and precisions of our own lines"),
        ("rmm_image::console::", "the console"),
        ("rmm_cold_start", "boot, before any world runs: a panic is a refusal to start"),
        ("rmm_image::run_primary", "boot"),
        ("rmm_image::map_bank", "boot"),
        ("rmm_image::mmu::Tables::map", "boot"),
        ("rmm_boot::manifest::", "boot"),
        ("rmm_image::percpu::init", "boot"),
        (
            "rmm::attestation::Attestation::challenge",
            "the length of a hashed message, from the hash, inlined",
        ),
        ("rmm::attestation::<impl rmm::Rmm<P>>::token_continue::", "likewise"),
        ("core::ops::function::FnOnce::call_once", "likewise: the closure that hashes a token"),
        (
            "rmm::attestation::sign::Signer::slice",
            "likewise; and the negation of 0 or 1, in constant-time selection",
        ),
        ("digest::", "lengths of messages far below 2^61 bytes"),
        ("hmac::", "likewise"),
        ("rfc6979::", "likewise"),
    ],
}];

/// Functions that are panics, as `starts_with`.
const PANICS: &[&str] = &[
    "core::panicking::",
    "core::option::unwrap_failed",
    "core::option::expect_failed",
    "core::result::unwrap_failed",
    "core::slice::index::slice_",
    "core::slice::copy_from_slice_impl::len_mismatch_fail",
    "core::str::slice_error_fail",
    "core::cell::panic_already",
];

fn is_panic(name: &str) -> bool {
    PANICS.iter().any(|prefix| name.starts_with(prefix))
}

impl Audit {
    fn graph(&self, environment: &Environment) -> Result<Graph> {
        crate::build::build(environment, &[self.part])?;
        let elf = crate::build::firmware_elf(self.package)?;
        let bytes = std::fs::read(&elf).with_context(|| format!("cannot read {}", elf.display()))?;
        Graph::of(&bytes).with_context(|| format!("cannot analyse {}", elf.display()))
    }

    /// Every call of a panic outside the reviewed list is an error.
    fn panics(&self, graph: &Graph) -> Result<()> {
        let mut found = BTreeSet::new();
        let mut used = BTreeSet::new();
        for function in &graph.functions {
            if is_panic(&function.name) {
                continue;
            }
            for &callee in &function.calls {
                let panic = &graph.functions[callee].name;
                if !is_panic(panic) {
                    continue;
                }
                // A method's name may begin with its type in brackets, however the compiler inlined it.
                let name = function.name.trim_start_matches('<');
                match self.may_panic.iter().find(|(prefix, _)| name.starts_with(prefix)) {
                    Some((prefix, _)) => drop(used.insert(*prefix)),
                    None => drop(found.insert(format!("{} calls {panic}", function.name))),
                }
            }
        }
        for (prefix, why) in self.may_panic {
            if used.contains(prefix) {
                ui::say(&format!("{}: {prefix}… may panic: {why}", self.package));
            } else {
                ui::say(&format!("{}: {prefix}… is on the list and cannot panic", self.package));
            }
        }
        ensure!(
            found.is_empty(),
            "{} calls to panics in {}:\n  {}",
            found.len(),
            self.package,
            found.into_iter().collect::<Vec<_>>().join("\n  ")
        );
        Ok(())
    }

    /// The deepest way down from every root must fit in its stack.
    fn stacks(&self, graph: &Graph) -> Result<()> {
        let recursive: Vec<&str> = graph
            .direct_cycles()
            .into_iter()
            .map(|function| graph.functions[function].name.as_str())
            .filter(|name| !name.starts_with("core::fmt::") && !name.contains(" as core::fmt::"))
            .collect();
        ensure!(recursive.is_empty(), "recursion in {}: {}", self.package, recursive.join(", "));
        // The vectors look whether SP is in its stack, by adding and subtracting.
        for function in graph.functions.iter().filter(|function| function.unbounded) {
            let known = self.vectors.contains(&function.name.as_str());
            ensure!(known, "{} has a frame whose size is not a constant", function.name);
        }
        let roots: Vec<usize> = self
            .roots
            .iter()
            .map(|(name, _)| *name)
            .chain(self.vectors.iter().copied())
            .map(|name| graph.find(name).with_context(|| format!("{}: no function {name}", self.package)))
            .collect::<Result<_>>()?;
        let depths = graph.depths(&roots);
        let exception: u64 = roots[self.roots.len()..].iter().map(|&root| depths[&root].0).sum();
        for ((name, symbol), &root) in self.roots.iter().zip(&roots) {
            let Some(&size) = graph.absolute.get(*symbol) else {
                bail!("{}: no symbol {symbol}", self.package)
            };
            let (depth, _) = depths[&root];
            ui::say(&format!(
                "{}: {name}: {depth} bytes deep and {exception} of exceptions, of {size}: {}",
                self.package,
                graph.path(&depths, root)
            ));
            ensure!(depth + exception <= size, "{}: the stack of {name} is too small", self.package);
        }
        Ok(())
    }
}

/// No world's input can make an image panic.
pub(crate) fn panics(environment: &Environment) -> Result<()> {
    IMAGES.iter().try_for_each(|audit| audit.panics(&audit.graph(environment)?))
}

/// Every stack is as deep as it can get.
pub(crate) fn stacks(environment: &Environment) -> Result<()> {
    IMAGES.iter().try_for_each(|audit| audit.stacks(&audit.graph(environment)?))
}
