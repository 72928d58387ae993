//! Shows on a real machine that irqfd, ioeventfd, resampling and messages work: a Realm that does nothing but take
//! interrupts and tell which they were, and a VMM that raises them through eventfds.
//!
//! `interrupts [ROUNDS]`, on a host with `/dev/kvm-realm`. Says how many interrupts arrived, or what was wrong.

#[cfg(target_arch = "aarch64")]
mod realm {
    use std::io;
    use std::sync::mpsc::{Receiver, channel};
    use std::time::{Duration, Instant};

    use cca_abi::kvm::{self, device_type, event, exit, ioctl, reg, rme, run, vcpu_feature, vgic_attr};

    const RAM: u64 = 0x8000_0000;
    const RAM_SIZE: u64 = 0x40_0000;
    /// Memory that the VMM shares from the start: the ITS's queue, the LPIs' configuration and pending table, tables.
    const SHARED: u64 = 0x9000_0000;
    const SHARED_SIZE: u64 = 0x10_0000;
    const QUEUE: u64 = SHARED;
    const CONFIG: u64 = SHARED + 0x1_0000;
    const PENDING: u64 = SHARED + 0x2_0000;
    const DEVICES: u64 = SHARED + 0x4_0000;
    const COLLECTIONS: u64 = SHARED + 0x8_0000;
    const GICD: u64 = 0x3fff_0000;
    const GICR: u64 = 0x3ffd_0000;
    const ITS: u64 = 0x3ffb_0000;
    const BELL: u64 = 0x0100_0000;
    const REPORT: u64 = 0x0100_1000;
    const ALIAS: u64 = 1 << 32;
    const VALID: u64 = 1 << 63;
    const EDGE: u32 = 40;
    const LEVEL: u32 = 41;
    const LPI: u32 = 8195;
    const DEVICE: u32 = 8;
    const EVENT: u32 = 3;

    // Carries out the stores in the table, opens the CPU interface, then takes interrupts: rings the bell, reports.
    std::arch::global_asm!(
        ".pushsection .rodata",
        ".balign 8",
        ".global guest_start",
        "guest_start:",
        "adr x0, guest_end",
        "1: ldp x1, x2, [x0], #16",
        "ldr x3, [x0], #8",
        "cbz x1, 3f",
        "cmp x3, #8",
        "b.eq 2f",
        "str w2, [x1]",
        "b 1b",
        "2: str x2, [x1]",
        "b 1b",
        "3: ldp x5, x6, [x0]",
        "mrs x4, S3_0_C12_C12_5",
        "orr x4, x4, #1",
        "msr S3_0_C12_C12_5, x4",
        "isb",
        "mov x4, #0xf0",
        "msr S3_0_C4_C6_0, x4",
        "mov x4, #1",
        "msr S3_0_C12_C12_7, x4",
        "isb",
        "str w4, [x6]",
        "4: wfi",
        "5: mrs x7, S3_0_C12_C12_0",
        "cmp x7, #1023",
        "b.eq 4b",
        "str w7, [x5]",
        "msr S3_0_C12_C12_1, x7",
        "isb",
        "str w7, [x6]",
        "b 5b",
        ".balign 8",
        ".global guest_end",
        "guest_end:",
        ".popsection"
    );

    unsafe extern "C" {
        static guest_start: u8;
        static guest_end: u8;
    }

    fn fail(what: &str) -> ! {
        eprintln!("interrupts: {what}: {}", io::Error::last_os_error());
        std::process::exit(1);
    }

    fn ioctl<T>(fd: i32, number: u32, argument: &mut T, what: &str) -> i32 {
        // SAFETY: each ioctl reads and writes a structure of the size that its number says, and `T` is that structure.
        let result = unsafe { libc::ioctl(fd, number as _, std::ptr::from_mut(argument)) };
        if result < 0 { fail(what) } else { result }
    }

    fn ioctl_value(fd: i32, number: u32, argument: u64, what: &str) -> i32 {
        // SAFETY: these ioctls take a number.
        let result = unsafe { libc::ioctl(fd, number as _, argument) };
        if result < 0 { fail(what) } else { result }
    }

    fn map(size: u64, fd: i32) -> *mut u8 {
        let flags = if fd < 0 { libc::MAP_SHARED | libc::MAP_ANONYMOUS } else { libc::MAP_SHARED };
        // SAFETY: a new mapping.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), size as usize, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0)
        };
        if at == libc::MAP_FAILED { fail("mmap") } else { at.cast() }
    }

    fn eventfd() -> i32 {
        // SAFETY: makes a file.
        let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK) };
        if fd < 0 { fail("eventfd") } else { fd }
    }

    fn signal(fd: i32) {
        let one = 1u64;
        // SAFETY: eight bytes.
        if unsafe { libc::write(fd, (&raw const one).cast(), 8) } != 8 {
            fail("write to an eventfd");
        }
    }

    fn take(fd: i32) -> u64 {
        let mut count = 0u64;
        // SAFETY: eight bytes.
        unsafe { libc::read(fd, (&raw mut count).cast(), 8) };
        count
    }

    /// What the guest stores before it takes interrupts: address, value, size.
    fn table() -> Vec<u64> {
        let word = |at: u64, value: u64| [at | ALIAS, value, 4];
        let long = |at: u64, value: u64| [at | ALIAS, value, 8];
        let bit = |intid: u32| 1u64 << (intid % 32);
        let mut table: Vec<u64> = [
            word(GICD, 0x12),
            word(GICD + 0x84, 0xffff_ffff),
            word(GICD + 0xc08, 2 << (EDGE % 16 * 2)),
            word(GICD + 0x104, bit(EDGE) | bit(LEVEL)),
            long(GICR + 0x70, CONFIG | 15),
            long(GICR + 0x78, PENDING | 1 << 62),
            word(GICR, 1),
            long(ITS + 0x100, VALID | DEVICES | 0x200),
            long(ITS + 0x108, VALID | COLLECTIONS | 0x200),
            long(ITS + 0x80, VALID | QUEUE | 15),
            word(ITS, 1),
            long(ITS + 0x88, 4 * 32),
        ]
        .concat();
        table.extend([0, 0, 0, BELL | ALIAS, REPORT | ALIAS]);
        table
    }

    fn set_attr(fd: i32, group: u32, attr: u64, mut value: u64) {
        let addr = (&raw mut value) as u64;
        ioctl(
            fd,
            ioctl::SET_DEVICE_ATTR,
            &mut kvm::DeviceAttr { flags: 0, group, attr, addr },
            "device attribute",
        );
    }

    fn rme<T>(vm: i32, command: u64, argument: &T) {
        let args = [command, std::ptr::from_ref(argument) as u64, 0, 0];
        let cap = kvm::GENERATION_V2.cap_arm_rme;
        ioctl(
            vm,
            ioctl::ENABLE_CAP,
            &mut kvm::EnableCap { cap, flags: 0, args, pad: [0; 64] },
            "KVM_CAP_ARM_RME",
        );
    }

    fn create_device(vm: i32, device_type: u32) -> i32 {
        let mut create = kvm::CreateDevice { device_type, fd: 0, flags: 0 };
        ioctl(vm, ioctl::CREATE_DEVICE, &mut create, "KVM_CREATE_DEVICE");
        create.fd as i32
    }

    struct Machine {
        vm: i32,
        reports: Receiver<u32>,
    }

    fn start() -> Machine {
        // SAFETY: a terminated string.
        let node = unsafe { libc::open(c"/dev/kvm-realm".as_ptr(), libc::O_RDWR) };
        if node < 0 {
            fail("/dev/kvm-realm");
        }
        let vm = ioctl_value(node, ioctl::CREATE_VM, kvm::VM_TYPE_REALM | 33, "KVM_CREATE_VM");
        let ram = map(RAM_SIZE, -1);
        let shared = map(SHARED_SIZE, -1);
        // SAFETY: the program's bytes, then the table; the mapping is large enough and nobody else uses it yet.
        unsafe {
            let (from, to) = (&raw const guest_start, &raw const guest_end);
            let len = to as usize - from as usize;
            std::ptr::copy_nonoverlapping(from, ram, len);
            let table = table();
            std::ptr::copy_nonoverlapping(table.as_ptr().cast(), ram.add(len), table.len() * 8);
            std::ptr::write_bytes(shared.add((CONFIG - SHARED) as usize), 0xa1, 0x1_0000);
            let device = u64::from(DEVICE) << 32;
            let orders = [
                [8 | device, 4, VALID | SHARED, 0],
                [9, 0, VALID, 0],
                [10 | device, u64::from(EVENT) | u64::from(LPI) << 32, 0, 0],
                [5, 0, 0, 0],
            ];
            std::ptr::copy_nonoverlapping(orders.as_ptr().cast(), shared, 4 * 32);
        }
        let mut create = kvm::CreateGuestMemfd { size: RAM_SIZE, flags: 0, reserved: [0; 6] };
        let gmem = ioctl(vm, ioctl::CREATE_GUEST_MEMFD, &mut create, "KVM_CREATE_GUEST_MEMFD");
        let region = |slot, flags, guest_phys_addr, memory_size, host: *mut u8, fd| kvm::MemoryRegion2 {
            slot,
            flags,
            guest_phys_addr,
            memory_size,
            userspace_addr: host as u64,
            guest_memfd_offset: 0,
            guest_memfd: fd,
            pad1: 0,
            pad2: [0; 14],
        };
        let number = ioctl::SET_USER_MEMORY_REGION2;
        ioctl(vm, number, &mut region(0, kvm::MEM_GUEST_MEMFD, RAM, RAM_SIZE, ram, gmem as u32), "memory");
        ioctl(vm, number, &mut region(1, 0, SHARED, SHARED_SIZE, shared, 0), "shared memory");
        let attributes = kvm::MEMORY_ATTRIBUTE_PRIVATE;
        let mut private = kvm::MemoryAttributes { address: RAM, size: RAM_SIZE, attributes, flags: 0 };
        ioctl(vm, ioctl::SET_MEMORY_ATTRIBUTES, &mut private, "KVM_SET_MEMORY_ATTRIBUTES");

        let vcpu = ioctl_value(vm, ioctl::CREATE_VCPU, 0, "KVM_CREATE_VCPU");
        let mut features = [0; 7];
        features[0] = 1 << vcpu_feature::PSCI_0_2;
        let mut init = kvm::VcpuInit { target: kvm::TARGET_GENERIC_V8, features };
        ioctl(vcpu, ioctl::ARM_VCPU_INIT, &mut init, "KVM_ARM_VCPU_INIT");
        let vgic = create_device(vm, device_type::ARM_VGIC_V3);
        set_attr(vgic, vgic_attr::GRP_ADDR, vgic_attr::ADDR_DIST, GICD);
        set_attr(vgic, vgic_attr::GRP_ADDR, vgic_attr::ADDR_REDIST, GICR);
        let its = create_device(vm, device_type::ARM_VGIC_ITS);
        set_attr(its, vgic_attr::GRP_ADDR, vgic_attr::ADDR_ITS, ITS);
        set_attr(vgic, vgic_attr::GRP_CTRL, vgic_attr::CTRL_INIT, 0);
        set_attr(its, vgic_attr::GRP_CTRL, vgic_attr::CTRL_INIT, 0);

        rme(vm, rme::CREATE_RD, &());
        rme(vm, rme::INIT_IPA_REALM, &kvm::RmeInitIpa { base: RAM, size: RAM_SIZE, reserved: [0; 4] });
        let flags = rme::POPULATE_FLAGS_MEASURE;
        rme(vm, rme::POPULATE_REALM, &kvm::RmePopulate { base: RAM, size: 0x1000, flags, reserved: [0; 3] });
        let mut pc = RAM;
        let addr = (&raw mut pc) as u64;
        ioctl(vcpu, ioctl::SET_ONE_REG, &mut kvm::OneReg { id: reg::CORE_PC, addr }, "PC");
        let mut rec = kvm::GENERATION_V2.vcpu_rec;
        ioctl(vcpu, ioctl::ARM_VCPU_FINALIZE, &mut rec, "KVM_ARM_VCPU_FINALIZE");
        rme(vm, rme::ACTIVATE_REALM, &());

        let (sender, reports) = channel();
        let page = map(0x1000, vcpu) as u64;
        std::thread::spawn(move || {
            loop {
                ioctl_value(vcpu, ioctl::RUN, 0, "KVM_RUN");
                let field = |offset: usize| {
                    // SAFETY: inside the mapped run page, aligned.
                    unsafe { ((page as usize + offset) as *const u32).read_volatile() }
                };
                let address = u64::from(field(run::MMIO_PHYS_ADDR));
                if field(run::EXIT_REASON) != exit::MMIO || address != REPORT {
                    eprintln!("interrupts: exit {} at {address:#x}", field(run::EXIT_REASON));
                    std::process::exit(1);
                }
                if sender.send(field(run::MMIO_DATA)).is_err() {
                    return;
                }
            }
        });
        Machine { vm, reports }
    }

    impl Machine {
        fn irqfd(&self, fd: i32, gsi: u32, resample: Option<i32>) {
            let flags = if resample.is_some() { event::IRQFD_RESAMPLE } else { 0 };
            let resamplefd = resample.unwrap_or(0) as u32;
            let mut args = kvm::Irqfd { fd: fd as u32, gsi, flags, resamplefd, pad: [0; 16] };
            ioctl(self.vm, ioctl::IRQFD, &mut args, "KVM_IRQFD");
        }

        fn expect(&self, what: &str, intid: u32) {
            match self.reports.recv_timeout(Duration::from_secs(20)) {
                Ok(found) if found == intid => {}
                other => {
                    eprintln!("interrupts: {what}: {other:?} instead of {intid}");
                    std::process::exit(1);
                }
            }
        }
    }

    #[repr(C)]
    struct Routes {
        header: kvm::IrqRouting,
        entries: [kvm::IrqRoutingEntry; 3],
    }

    pub(crate) fn main() {
        let rounds = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(200u64);
        let machine = start();
        let (edge, level, message) = (eventfd(), eventfd(), eventfd());
        let (ended, bell) = (eventfd(), eventfd());
        let doorbell = ITS + 0x1_0040;
        let entry = |gsi, kind, flags, u| kvm::IrqRoutingEntry { gsi, kind, flags, pad: 0, u };
        let mut routes = Routes {
            header: kvm::IrqRouting { nr: 3, flags: 0 },
            entries: [
                entry(5, event::ROUTING_IRQCHIP, 0, [0, EDGE - 32, 0, 0, 0, 0, 0, 0]),
                entry(6, event::ROUTING_IRQCHIP, 0, [0, LEVEL - 32, 0, 0, 0, 0, 0, 0]),
                entry(7, event::ROUTING_MSI, 1, [doorbell as u32, 0, EVENT, DEVICE, 0, 0, 0, 0]),
            ],
        };
        ioctl(machine.vm, ioctl::SET_GSI_ROUTING, &mut routes, "KVM_SET_GSI_ROUTING");
        machine.irqfd(edge, 5, None);
        machine.irqfd(level, 6, Some(ended));
        machine.irqfd(message, 7, None);
        let mut args = kvm::Ioeventfd { datamatch: 0, addr: BELL, len: 4, fd: bell, flags: 0, pad: [0; 36] };
        ioctl(machine.vm, ioctl::IOEVENTFD, &mut args, "KVM_IOEVENTFD");
        machine.expect("the guest's start", 1);

        let begin = Instant::now();
        let (mut ends, mut rings) = (0, 0);
        for _ in 0..rounds {
            signal(edge);
            machine.expect("edge irqfd", EDGE);
            signal(level);
            machine.expect("level irqfd", LEVEL);
            ends += take(ended);
            signal(message);
            machine.expect("message irqfd", LPI);
            let mut msi = kvm::Msi {
                address_lo: doorbell as u32,
                address_hi: 0,
                data: EVENT,
                flags: event::MSI_VALID_DEVID,
                devid: DEVICE,
                pad: [0; 12],
            };
            if ioctl(machine.vm, ioctl::SIGNAL_MSI, &mut msi, "KVM_SIGNAL_MSI") != 1 {
                eprintln!("interrupts: the message was not delivered");
                std::process::exit(1);
            }
            machine.expect("KVM_SIGNAL_MSI", LPI);
            rings += take(bell);
        }
        let micros = begin.elapsed().as_micros() / u128::from(rounds * 4).max(1);
        if ends != rounds || rings != rounds * 4 {
            eprintln!("interrupts: {ends} of {rounds} ends, {rings} of {} rings", rounds * 4);
            std::process::exit(1);
        }
        println!("interrupts: {} arrived, each heard of by its doorbell; {micros} us for each", rounds * 4);
    }
}

fn main() {
    #[cfg(target_arch = "aarch64")]
    realm::main();
    #[cfg(not(target_arch = "aarch64"))]
    eprintln!("interrupts: for arm64 hosts with /dev/kvm-realm");
}
