//! Where everything lies in the guest's physical address space: kvmtool's map, so that tools which predict a
//! Realm's initial measurement for kvmtool work for our guests.

use crate::{Error, Result};

/// First byte of RAM.
pub const RAM_BASE: u64 = 0x8000_0000;
/// RAM comes in multiples of this.
pub const RAM_UNIT: u64 = 0x20_0000;
/// The GIC's distributor; the redistributors lie directly below it.
pub const GICD_BASE: u64 = 0x3fff_0000;
/// Size of the distributor's frame.
pub const GICD_SIZE: u64 = 0x1_0000;
/// Size of one CPU's redistributor: two 64 KiB frames.
pub const GICR_SIZE: u64 = 0x2_0000;
/// Size of the ITS: control and translation frame. It lies directly below the redistributors.
pub const ITS_SIZE: u64 = 0x2_0000;
/// Where devices write their messages, from the start of the ITS on.
pub const ITS_TRANSLATER: u64 = 0x1_0040;
/// The serial port.
pub const UART0_BASE: u64 = 0x0100_0000;
/// Bytes of registers that the serial port has.
pub const UART_SIZE: u64 = 8;
/// Shared peripheral interrupt of the serial port. The GIC's number is 32 higher.
pub const UART_SPI: u32 = 0;
/// The real-time clock.
pub const RTC_BASE: u64 = 0x0101_0000;
/// Bytes of registers that the clock has.
pub const RTC_SIZE: u64 = 0x1000;
/// The PMU's interrupt: a private one, by the GIC's number.
pub const PMU_PPI: u32 = 23;
/// PCI configuration space: the one bus's part of it.
pub const PCI_ECAM_BASE: u64 = 0x4000_0000;
/// Bytes of configuration space of one bus.
pub const PCI_ECAM_SIZE: u64 = 0x10_0000;
/// Registers of PCI functions, up to RAM.
pub const PCI_MMIO_BASE: u64 = 0x5000_0000;
/// Bytes of registers of PCI functions.
pub const PCI_MMIO_SIZE: u64 = RAM_BASE - PCI_MMIO_BASE;
/// Functions on the bus.
pub const PCI_SLOTS: usize = 32;
/// Bytes of registers that a function has.
pub const PCI_BAR_SIZE: u64 = 0x8000;
/// Shared peripheral interrupt of the first slot; each slot has one of its own.
pub const PCI_FIRST_SPI: u32 = 64;
/// The device tree's blob always has this size, padded with zeroes.
pub const DTB_SIZE: u64 = 0x1_0000;
/// Number of interrupts that the GIC has: 32 private ones and 96 shared.
pub const GIC_INTERRUPTS: u32 = 128;
/// The most CPUs for which the redistributors fit below the distributor and above the serial ports and the clock, within what
/// the module supports.
pub const MAX_CPUS: u32 = 128;

/// The widest guest physical addresses.
const MAX_IPA_BITS: u32 = 48;
/// The device tree's place in a machine with much RAM.
const DTB_HIGHEST: u64 = 0x8fe0_0000;
/// The initramfs's alignment.
const INITRD_ALIGN: u64 = 4;
const PAGE: u64 = cca_abi::GRANULE_SIZE;

/// The addresses of one machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of RAM from [`RAM_BASE`] on.
    pub ram_size: u64,
    /// Number of CPUs.
    pub cpus: u32,
    /// Width of the guest's physical addresses. The top bit tells shared from private.
    pub ipa_bits: u32,
    /// Where the kernel's Image is loaded and entered.
    pub kernel: u64,
    /// Where the initramfs lies, and its size.
    pub initrd: Option<(u64, u64)>,
    /// Where the device tree's blob lies.
    pub dtb: u64,
}

/// What has to be placed.
#[derive(Clone, Copy, Debug)]
pub struct Contents {
    /// Bytes in the kernel's file, decompressed.
    pub kernel_file: u64,
    /// Bytes of memory that the kernel uses from its start on, BSS included.
    pub kernel_image: u64,
    /// The kernel's offset from a 2 MiB boundary.
    pub text_offset: u64,
    /// Bytes in the initramfs.
    pub initrd: Option<u64>,
}

impl Layout {
    /// Places `contents` in a machine with `ram_size` bytes of RAM. Addresses are as narrow as possible unless
    /// `wider` says how many bits they have.
    pub fn new(ram_size: u64, cpus: u32, contents: Contents, wider: Option<u32>) -> Result<Self> {
        if ram_size == 0 || ram_size % RAM_UNIT != 0 {
            return Err(Error::vmm(format!("{ram_size} bytes of memory are not a multiple of 2 MiB")));
        }
        if cpus == 0 || cpus > MAX_CPUS {
            return Err(Error::vmm(format!("{cpus} CPUs; 1 to {MAX_CPUS} are possible")));
        }
        let ram_end = RAM_BASE
            .checked_add(ram_size)
            .filter(|end| *end <= 1 << 46)
            .ok_or_else(|| Error::vmm(format!("{ram_size} bytes of memory are too many")))?;
        let too_small =
            || Error::vmm(format!("{} MiB of memory are too few for kernel and initramfs", ram_size >> 20));

        let dtb = DTB_HIGHEST.min(ram_end - RAM_UNIT);
        let kernel = RAM_BASE.checked_add(contents.text_offset).ok_or_else(too_small)?;
        let kernel_end = kernel
            .checked_add(contents.kernel_image.max(contents.kernel_file))
            .and_then(|end| end.checked_next_multiple_of(PAGE))
            .filter(|end| *end <= dtb)
            .ok_or_else(too_small)?;
        let initrd = match contents.initrd {
            None | Some(0) => None,
            Some(size) => {
                // kvmtool leaves room for the alignment even where none is needed.
                let below = size.checked_add(INITRD_ALIGN).and_then(|room| dtb.checked_sub(room));
                let start = below.ok_or_else(too_small)?.next_multiple_of(INITRD_ALIGN);
                // The kernel's last page and the initramfs's first one are populated separately.
                if start & !(PAGE - 1) < kernel_end {
                    return Err(too_small());
                }
                Some((start, size))
            }
        };
        let needed = ipa_bits(ram_end);
        let ipa_bits = wider.unwrap_or(needed);
        if !(needed..=MAX_IPA_BITS).contains(&ipa_bits) {
            return Err(Error::vmm(format!(
                "{ipa_bits} address bits; this machine can have {needed} to {MAX_IPA_BITS}"
            )));
        }
        Ok(Self { ram_size, cpus, ipa_bits, kernel, initrd, dtb })
    }

    /// First byte after RAM.
    #[must_use]
    pub const fn ram_end(&self) -> u64 {
        RAM_BASE + self.ram_size
    }

    /// Start and size of all redistributors together.
    #[must_use]
    pub fn redistributors(&self) -> (u64, u64) {
        let size = u64::from(self.cpus) * GICR_SIZE;
        (GICD_BASE - size, size)
    }

    /// Start of the ITS.
    #[must_use]
    pub fn its(&self) -> u64 {
        self.redistributors().0 - ITS_SIZE
    }

    /// The bit which a Realm sets in an address to reach shared memory or a device.
    #[must_use]
    pub const fn shared_bit(&self) -> u64 {
        1 << (self.ipa_bits - 1)
    }
}

/// One bit more than RAM needs, and at least 33.
fn ipa_bits(ram_end: u64) -> u32 {
    (u64::BITS - (ram_end - 1).leading_zeros()).max(32) + 1
}

/// The affinity bits of `MPIDR_EL1` that KVM gives to virtual CPU `index`.
#[must_use]
pub fn mpidr(index: u32) -> u64 {
    let index = u64::from(index);
    (index & 0xf) | ((index >> 4) & 0xff) << 8 | (index >> 12) << 16
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn contents(kernel: u64, initrd: u64) -> Contents {
        Contents { kernel_file: kernel, kernel_image: kernel, text_offset: 0, initrd: Some(initrd) }
    }

    #[test]
    fn a_machine_of_512_mib_looks_like_kvmtools() {
        let layout = Layout::new(512 * MIB, 1, contents(40 * MIB, 1001), None).unwrap();
        assert_eq!(layout.kernel, 0x8000_0000);
        assert_eq!(layout.dtb, 0x8fe0_0000);
        assert_eq!(layout.initrd, Some((0x8fdf_fc14, 1001)));
        assert_eq!(layout.ipa_bits, 33);
        assert_eq!(layout.shared_bit(), 0x1_0000_0000);
        assert_eq!(layout.redistributors(), (0x3ffd_0000, 0x2_0000));
        assert_eq!(layout.its(), 0x3ffb_0000);
    }

    #[test]
    fn a_small_machine_has_its_device_tree_two_mib_below_the_end() {
        let layout = Layout::new(128 * MIB, 2, contents(40 * MIB, 4096), None).unwrap();
        assert_eq!(layout.dtb, 0x87e0_0000);
        assert_eq!(layout.initrd, Some((0x87df_effc, 4096)));
        assert_eq!(layout.redistributors(), (0x3ffb_0000, 0x4_0000));
    }

    #[test]
    fn addresses_are_one_bit_wider_than_ram_needs() {
        assert_eq!(ipa_bits(RAM_BASE + 512 * MIB), 33);
        assert_eq!(ipa_bits(RAM_BASE + 2048 * MIB), 33);
        assert_eq!(ipa_bits(RAM_BASE + 2050 * MIB), 34);
        assert_eq!(ipa_bits(RAM_BASE + 8192 * MIB), 35);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for (size, cpus, kernel, initrd) in [
            (0, 1, MIB, 1),
            (64 * MIB + 4096, 1, MIB, 1),
            (64 * MIB, 0, MIB, 1),
            (64 * MIB, MAX_CPUS + 1, MIB, 1),
            (64 * MIB, 1, 80 * MIB, 1),
            (64 * MIB, 1, 40 * MIB, 30 * MIB),
            (64 * MIB, 1, u64::MAX, 1),
            (64 * MIB, 1, MIB, u64::MAX),
            (u64::MAX - RAM_UNIT + 1, 1, MIB, 1),
        ] {
            assert!(
                Layout::new(size, cpus, contents(kernel, initrd), None).is_err(),
                "{size} {cpus} {kernel} {initrd}"
            );
        }
    }

    #[test]
    fn affinity_counts_sixteen_cpus_per_cluster() {
        assert_eq!(mpidr(0), 0);
        assert_eq!(mpidr(15), 15);
        assert_eq!(mpidr(17), 0x101);
    }
}
