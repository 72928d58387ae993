//! Random devices and guests against the model of the CPU interface.

use super::machine::{Machine, Phase, Random};
use super::*;

struct Shape {
    nr_vcpus: usize,
    nr_lrs: usize,
    nr_spis: u32,
    split_eoi: bool,
}

fn device_step(machine: &mut Machine, random: &mut Random) {
    let index = random.below(machine.sources.len());
    if machine.sources[index].intid < 16 {
        return;
    }
    let level = machine.sources[index].edge || !random.one_in(8);
    machine.drive(index, level);
}

fn guest_write(machine: &mut Machine, random: &mut Random) {
    let index = random.below(machine.sources.len());
    let source = machine.sources[index].clone();
    let set = match random.below(6) {
        0 | 1 => {
            let register = if source.enabled { ICENABLER } else { ISENABLER };
            machine.sources[index].enabled = !source.enabled;
            write_bit(&machine.gic, source.target, register, source.intid)
        }
        2 if source.private_to.is_none() => {
            let target = random.below(machine.cpus.len());
            machine.sources[index].target = target;
            route(&machine.gic, source.intid, target)
        }
        3 => {
            // As an operating system does it: while the interrupt is neither pending nor active.
            let idle = source.active_at.is_none() && source.raises == source.acks && !source.line;
            let listed = machine.cpus.iter().any(|cpu| {
                cpu.interface.lrs().iter().any(|lr| state_of(*lr) != 0 && intid_of(*lr) == source.intid)
            });
            if idle && !listed {
                let priority = random.below(31) as u8 * 8;
                machine.sources[index].priority = priority;
                set_priority(&machine.gic, source.target, source.intid, priority);
            }
            return;
        }
        4 if source.edge && random.one_in(4) => {
            machine.sources[index].unserved = false;
            write_bit(&machine.gic, source.target, ICPENDR, source.intid)
        }
        5 if random.one_in(8) => {
            machine.groups_forwarded = !machine.groups_forwarded;
            let value = if machine.groups_forwarded { 0b11 } else { 0 };
            machine.gic.mmio_write(DIST, 4, value).unwrap()
        }
        _ => return,
    };
    machine.kick(&set);
}

fn guest_step(machine: &mut Machine, vcpu: usize, random: &mut Random, configure: bool) {
    match random.below(12) {
        0..=3 => {
            machine.acknowledge(vcpu);
        }
        4..=7 => {
            let (satisfy, pick) = (!random.one_in(4), random.below(64));
            machine.handle(vcpu, satisfy, pick);
        }
        8 => {
            let index = random.below(machine.sources.len());
            if machine.sources[index].intid < 16 {
                machine.exit(vcpu);
                machine.send_sgi(vcpu, index);
            }
        }
        9 if configure => {
            machine.exit(vcpu);
            guest_write(machine, random);
        }
        10 if configure => {
            let interface = &mut machine.cpus[vcpu].interface;
            match random.below(4) {
                0 => interface.pmr = random.below(32) as u8 * 8,
                1 => interface.group1 = false,
                _ => {
                    interface.pmr = 0xf8;
                    interface.group1 = true;
                }
            }
        }
        11 => {
            let cpu = &machine.cpus[vcpu];
            if cpu.handling.is_empty() && !cpu.interface.is_signalled() {
                machine.wait_for_interrupt(vcpu);
            } else {
                machine.exit(vcpu);
            }
        }
        _ => (),
    }
}

fn run(machine: &mut Machine, random: &mut Random, steps: usize, configure: bool) {
    for _ in 0..steps {
        if random.one_in(3) {
            device_step(machine, random);
        }
        let vcpu = random.below(machine.cpus.len());
        // The kick or the maintenance interrupt may take its time.
        if !random.one_in(3) && machine.schedule(vcpu) {
            continue;
        }
        if machine.cpus[vcpu].phase == Phase::Running {
            guest_step(machine, vcpu, random, configure);
        }
    }
}

/// Undoes what masks interrupts. Only the vCPUs whose CPU interface changes are woken.
fn unmask(machine: &mut Machine) {
    machine.open_interfaces();
    machine.groups_forwarded = true;
    let set = machine.gic.mmio_write(DIST, 4, 0b11).unwrap();
    machine.kick(&set);
    for index in 0..machine.sources.len() {
        let source = &mut machine.sources[index];
        if !source.enabled {
            source.enabled = true;
            let set = write_bit(&machine.gic, source.target, ISENABLER, source.intid);
            machine.kick(&set);
        }
    }
}

fn check(shape: Shape, seeds: u64) {
    for seed in 1..=seeds {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let Shape { nr_vcpus, nr_lrs, nr_spis, split_eoi } = shape;
        let mut machine = Machine::new(nr_vcpus, nr_lrs, nr_spis, split_eoi);
        for index in 0..machine.sources.len() {
            let source = &mut machine.sources[index];
            source.priority = random.below(31) as u8 * 8;
            let (target, intid, priority) = (source.target, source.intid, source.priority);
            set_priority(&machine.gic, target, intid, priority);
        }
        run(&mut machine, &mut random, 2000, true);
        unmask(&mut machine);
        machine.settle();
        run(&mut machine, &mut random, 500, false);
        machine.settle();
    }
}

#[test]
fn one_vcpu_with_four_list_registers_loses_nothing() {
    check(Shape { nr_vcpus: 1, nr_lrs: 4, nr_spis: 8, split_eoi: false }, 40);
}

#[test]
fn more_interrupts_than_list_registers_lose_nothing() {
    check(Shape { nr_vcpus: 1, nr_lrs: 2, nr_spis: 40, split_eoi: false }, 40);
}

#[test]
fn a_single_list_register_is_enough() {
    check(Shape { nr_vcpus: 2, nr_lrs: 1, nr_spis: 12, split_eoi: false }, 40);
}

#[test]
fn four_vcpus_pass_interrupts_around() {
    check(Shape { nr_vcpus: 4, nr_lrs: 4, nr_spis: 24, split_eoi: false }, 40);
}

#[test]
fn all_sixteen_list_registers_work() {
    check(Shape { nr_vcpus: 3, nr_lrs: 16, nr_spis: 90, split_eoi: false }, 15);
}

#[test]
fn separate_deactivation_works_in_any_order() {
    check(Shape { nr_vcpus: 2, nr_lrs: 4, nr_spis: 30, split_eoi: true }, 40);
}
