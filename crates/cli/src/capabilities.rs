//! `realm capabilities`: what Realms on this machine can have.

use std::path::PathBuf;

use anyhow::Result;
use serde_json::json;
use vmm::probe::{Capabilities, probe};

use crate::args::CapabilitiesArgs;

/// Prints them: of this machine if it has the device, else of the emulated one.
pub(crate) fn run(args: &CapabilitiesArgs) -> Result<u8> {
    let device = PathBuf::from("/dev/kvm-realm");
    if !cfg!(target_arch = "aarch64") || !device.exists() {
        return crate::lab::capabilities(args);
    }
    let found = probe(&device)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&as_json(&found))?);
    } else {
        print!("{}", table(&found));
    }
    Ok(0)
}

fn as_json(found: &Capabilities) -> serde_json::Value {
    json!({
        "module": { "version": found.module, "abi": format!("v{}", found.abi) },
        "realm": {
            "cpus": found.cpus,
            "ipa_bits": found.ipa_bits,
            "hashes": found.hashes,
            "sve_bits": found.sve_bits,
            "pmu_counters": found.pmu_counters,
            "breakpoints": found.breakpoints,
            "watchpoints": found.watchpoints,
            "pointer_authentication": found.pointer_authentication,
        },
        "interrupts": { "eventfds": found.eventfds, "its": found.its },
    })
}

fn table(found: &Capabilities) -> String {
    let yes = |value: bool| if value { "yes" } else { "no" }.to_owned();
    let list = |values: Vec<String>| if values.is_empty() { "none".to_owned() } else { values.join(", ") };
    let rows = [
        ("module", format!("{}, the ABI of the series' v{}", found.module, found.abi)),
        ("CPUs of a Realm", format!("up to {}", found.cpus)),
        ("guest physical addresses (--ipa-bits)", format!("up to {} bits", found.ipa_bits)),
        ("hashes (--hash)", found.hashes.join(", ")),
        ("SVE vector lengths (--sve)", list(found.sve_bits.iter().map(u32::to_string).collect())),
        ("PMU counters (--pmu)", found.pmu_counters.map_or("none".into(), |count| format!("up to {count}"))),
        ("breakpoints (--breakpoints)", format!("up to {}", found.breakpoints)),
        ("watchpoints (--watchpoints)", format!("up to {}", found.watchpoints)),
        ("pointer authentication", yes(found.pointer_authentication)),
        ("irqfd and ioeventfd", yes(found.eventfds)),
        ("message-signalled interrupts (ITS)", yes(found.its)),
    ];
    rows.iter().map(|(name, value)| format!("{name:<40}{value}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_and_json_say_the_same() {
        let found = Capabilities {
            module: "0.1.0".into(),
            abi: 2,
            hashes: vec!["sha256"],
            sve_bits: vec![128, 256],
            ..Capabilities::default()
        };
        let text = table(&found);
        assert!(
            text.contains("128, 256\n") && text.contains("PMU counters (--pmu)                    none\n")
        );
        assert_eq!(as_json(&found)["realm"]["sve_bits"], json!([128, 256]));
        assert_eq!(as_json(&found)["realm"]["pmu_counters"], json!(null));
    }
}
