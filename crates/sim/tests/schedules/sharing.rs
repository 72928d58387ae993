//! Memory that the VMM shares with its Realm.

use crate::{RAM, Work, small, system_off, together};
use cca_abi::kvm::{self, ioctl};
use cca_abi::psci;
use kvm_realm::errno::Errno;
use sim::bench::Bench;
use sim::guest::{Op, Outcome, Steps};
use sim::host::{POISON, Signal};
use sim::hostile::Random;
use sim::machine::Machine;
use sim::memory::PAGE_SIZE;
use sim::vmm::{ENTRY, RAM_BASE, SECOND, SHARED};
use std::sync::Arc;

/// Two vCPUs use memory that the VMM shares, while its pages are replaced: nobody is given a page that the VMM no longer
/// has, and nobody reaches one any more.
pub(crate) fn shared_pages_change(machine: &Arc<Machine>, seed: u64) {
    const PAGES: u64 = 2;
    let at = RAM_BASE + RAM;
    machine.forget_log();
    let guest = move |seed: u64, first: bool| -> Steps {
        let mut random = Random::new(seed);
        let mut left = 9;
        Box::new(move |outcome| {
            if let Some(Outcome::Done(registers)) = outcome {
                assert_ne!(registers[0], POISON, "the guest reads a page that was given away");
            }
            left -= 1;
            let ipa = (at + random.below(PAGES) * PAGE_SIZE) | SHARED;
            match left {
                8 if first => Op::smc(&[psci::fid::CPU_ON_64, 1, SECOND, 7]),
                ..0 => system_off(),
                _ if random.below(3) == 0 => Op::Write { ipa, size: 8, value: 7 },
                _ => Op::Read { ipa, size: 8 },
            }
        })
    };
    machine.load_steps(ENTRY, move || guest(seed ^ 0x100, true));
    machine.load_steps(SECOND, move || guest(seed ^ 0x200, false));
    let bench = Bench::on(machine.clone(), kvm::GENERATION_V2);
    let vmm = bench.ready(small(2));
    let memory = vmm.process.mmap(PAGES * PAGE_SIZE);
    let mut region = kvm::MemoryRegion {
        slot: 1,
        flags: 0,
        guest_phys_addr: at,
        memory_size: PAGES * PAGE_SIZE,
        userspace_addr: memory,
    };
    vmm.ioctl(vmm.vm(), ioctl::SET_USER_MEMORY_REGION, &mut region).expect("a slot");
    let signals = [Signal::default(), Signal::default()];
    let mut work: Vec<Work> = Vec::new();
    for vcpu in 0..2 {
        let signals = signals.clone();
        work.push(Box::new(move |vmm| {
            signals[vcpu].adopt();
            let ended = vmm.run_to_end(vcpu, &|_, _| 0);
            assert!(matches!(ended, Ok(_) | Err(Errno::EINTR)), "{ended:?}");
            signals.iter().for_each(Signal::raise);
        }));
    }
    for thread in 0..2 {
        work.push(Box::new(move |vmm| {
            let mut random = Random::new(seed ^ (0x300 + thread));
            for _ in 0..4 {
                let first = random.below(PAGES);
                vmm.process
                    .discard(memory + first * PAGE_SIZE, (1 + random.below(PAGES - first)) * PAGE_SIZE);
            }
        }));
    }
    let vmm = together(vmm, work);
    bench.finish(vmm);
}
