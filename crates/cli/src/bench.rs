//! `realm bench`: numbers that are the same on every machine, because they count instructions and calls.
//!
//! QEMU counts instructions (`-icount shift=0`): one instruction is one nanosecond of the machine's 1 GHz counter,
//! so what the payload reads from the counter is a number of instructions.

use anyhow::{Context as _, Result};

use crate::args::BenchArgs;
use crate::setup;

/// Makes QEMU count.
const COUNTING: &[&str] = &["-icount", "shift=0,sleep=off"];

/// Runs the benches and prints their table.
pub(crate) fn run(args: &BenchArgs) -> Result<u8> {
    let environment = setup::ensure(None, false)?;
    let text = crate::test::run_payload(&environment, 1, COUNTING)?;
    let counts = payload_counts(&text);
    anyhow::ensure!(!counts.is_empty(), "the payload printed no `bench` lines:\n{text}");
    if args.json {
        let table: serde_json::Map<String, serde_json::Value> =
            counts.iter().map(|(name, count)| (name.clone(), (*count).into())).collect();
        println!("{}", serde_json::to_string_pretty(&table)?);
    } else {
        println!("{:<44} {:>12}", "measure", "instructions");
        for (name, count) in &counts {
            println!("{name:<44} {count:>12}");
        }
    }
    Ok(0)
}

/// The lines `PAYLOAD: bench <name> <count>`.
fn payload_counts(text: &str) -> Vec<(String, u64)> {
    text.lines()
        .filter_map(|line| {
            let (name, count) = line.split_once("PAYLOAD: bench ")?.1.trim().rsplit_once(' ')?;
            Some((name.to_owned(), count.parse().context("count").ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bench_lines_are_names_and_numbers() {
        let text = "PAYLOAD: start\r\nPAYLOAD: bench RMI_VERSION 631\r\nPAYLOAD: bench bad x\n";
        assert_eq!(payload_counts(text), [("RMI_VERSION".to_owned(), 631)]);
    }
}
