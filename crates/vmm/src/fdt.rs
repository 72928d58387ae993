//! The guest's device tree. The same machine always gives the same bytes: they enter the measurement.

use vm_fdt::FdtWriter;

use crate::layout::{
    DTB_SIZE, GICD_BASE, GICD_SIZE, ITS_SIZE, Layout, PCI_ECAM_BASE, PCI_ECAM_SIZE, PCI_FIRST_SPI,
    PCI_MMIO_BASE, PCI_MMIO_SIZE, PCI_SLOTS, PMU_PPI, RAM_BASE, RTC_BASE, RTC_SIZE, UART_SIZE, UART_SPI,
    UART0_BASE, mpidr,
};
use crate::{Error, Result};

const GIC_PHANDLE: u32 = 1;
const ITS_PHANDLE: u32 = 2;
const CLOCK_PHANDLE: u32 = 3;
const SPI: u32 = 0;
const PPI: u32 = 1;
/// The GIC's number of the first private peripheral interrupt.
const FIRST_PPI: u32 = 16;
const LEVEL_HIGH: u32 = 4;
const LEVEL_LOW: u32 = 8;

/// How the guest calls its firmware.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conduit {
    /// `smc`: what a Realm uses; the RMM answers.
    Smc,
    /// `hvc`: what an ordinary virtual machine uses; KVM answers.
    Hvc,
}

/// Bytes that the serial ports' queues take at once. The driver fills the whole queue before it looks at the
/// line status again, and every look costs an exit.
const UART_FIFO: u32 = 256;

/// Writes the blob: exactly [`DTB_SIZE`] bytes.
pub fn build(layout: &Layout, cmdline: &str, conduit: Conduit, pmu: bool) -> Result<Vec<u8>> {
    let blob = write(layout, cmdline, conduit, pmu)
        .map_err(|error| Error::vmm(format!("the device tree: {error}")))?;
    let size = usize::try_from(DTB_SIZE).unwrap_or(usize::MAX);
    if blob.len() > size {
        return Err(Error::vmm(format!("the device tree is {} bytes long; {size} are possible", blob.len())));
    }
    let mut blob = blob;
    blob.resize(size, 0);
    Ok(blob)
}

fn write(
    layout: &Layout,
    cmdline: &str,
    conduit: Conduit,
    pmu: bool,
) -> std::result::Result<Vec<u8>, vm_fdt::Error> {
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_u32("interrupt-parent", GIC_PHANDLE)?;
    fdt.property_string("compatible", "linux,dummy-virt")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;

    let chosen = fdt.begin_node("chosen")?;
    fdt.property_string("bootargs", cmdline)?;
    fdt.property_string("stdout-path", &format!("/uart@{UART0_BASE:x}"))?;
    if let Some((start, size)) = layout.initrd {
        fdt.property_u64("linux,initrd-start", start)?;
        fdt.property_u64("linux,initrd-end", start + size)?;
    }
    fdt.end_node(chosen)?;

    let memory = fdt.begin_node(&format!("memory@{RAM_BASE:x}"))?;
    fdt.property_string("device_type", "memory")?;
    fdt.property_array_u64("reg", &[RAM_BASE, layout.ram_size])?;
    fdt.end_node(memory)?;

    write_cpus(&mut fdt, layout)?;
    write_psci(&mut fdt, conduit)?;
    write_timer(&mut fdt)?;
    if pmu {
        let node = fdt.begin_node("pmu")?;
        fdt.property_string("compatible", "arm,armv8-pmuv3")?;
        fdt.property_array_u32("interrupts", &[PPI, PMU_PPI - FIRST_PPI, LEVEL_HIGH])?;
        fdt.end_node(node)?;
    }
    write_gic(&mut fdt, layout)?;
    write_uart(&mut fdt)?;
    write_rtc(&mut fdt)?;
    write_pci(&mut fdt)?;

    fdt.end_node(root)?;
    fdt.finish()
}

type Written = std::result::Result<(), vm_fdt::Error>;

fn write_cpus(fdt: &mut FdtWriter, layout: &Layout) -> Written {
    let cpus = fdt.begin_node("cpus")?;
    fdt.property_u32("#address-cells", 1)?;
    fdt.property_u32("#size-cells", 0)?;
    for index in 0..layout.cpus {
        // The cell takes the affinity levels 0 to 2, and those are all that `mpidr` fills.
        let reg = u32::try_from(mpidr(index)).unwrap_or(u32::MAX);
        let cpu = fdt.begin_node(&format!("cpu@{reg:x}"))?;
        fdt.property_string("device_type", "cpu")?;
        fdt.property_string("compatible", "arm,arm-v8")?;
        fdt.property_string("enable-method", "psci")?;
        fdt.property_u32("reg", reg)?;
        fdt.end_node(cpu)?;
    }
    fdt.end_node(cpus)
}

fn write_psci(fdt: &mut FdtWriter, conduit: Conduit) -> Written {
    let psci = fdt.begin_node("psci")?;
    fdt.property_string_list(
        "compatible",
        vec!["arm,psci-1.0".into(), "arm,psci-0.2".into(), "arm,psci".into()],
    )?;
    fdt.property_string("method", if conduit == Conduit::Smc { "smc" } else { "hvc" })?;
    fdt.end_node(psci)
}

fn write_timer(fdt: &mut FdtWriter) -> Written {
    let timer = fdt.begin_node("timer")?;
    fdt.property_string("compatible", "arm,armv8-timer")?;
    // Secure physical, non-secure physical, virtual, hypervisor.
    let interrupts: Vec<u32> = [13, 14, 11, 10].into_iter().flat_map(|ppi| [PPI, ppi, LEVEL_LOW]).collect();
    fdt.property_array_u32("interrupts", &interrupts)?;
    fdt.property_null("always-on")?;
    fdt.end_node(timer)
}

fn write_gic(fdt: &mut FdtWriter, layout: &Layout) -> Written {
    let (redistributors, size) = layout.redistributors();
    let gic = fdt.begin_node(&format!("intc@{GICD_BASE:x}"))?;
    fdt.property_string("compatible", "arm,gic-v3")?;
    fdt.property_u32("#interrupt-cells", 3)?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_array_u64("reg", &[GICD_BASE, GICD_SIZE, redistributors, size])?;
    fdt.property_phandle(GIC_PHANDLE)?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_null("ranges")?;
    let its = fdt.begin_node(&format!("msic@{:x}", layout.its()))?;
    fdt.property_string("compatible", "arm,gic-v3-its")?;
    fdt.property_null("msi-controller")?;
    fdt.property_u32("#msi-cells", 1)?;
    fdt.property_array_u64("reg", &[layout.its(), ITS_SIZE])?;
    fdt.property_phandle(ITS_PHANDLE)?;
    fdt.end_node(its)?;
    fdt.end_node(gic)
}

fn write_uart(fdt: &mut FdtWriter) -> Written {
    let uart = fdt.begin_node(&format!("uart@{UART0_BASE:x}"))?;
    fdt.property_string("compatible", "ns16550a")?;
    fdt.property_array_u64("reg", &[UART0_BASE, UART_SIZE])?;
    fdt.property_array_u32("interrupts", &[SPI, UART_SPI, LEVEL_HIGH])?;
    fdt.property_u32("clock-frequency", 1_843_200)?;
    fdt.property_u32("fifo-size", UART_FIFO)?;
    fdt.property_u32("tx-threshold", 0)?;
    fdt.end_node(uart)
}

/// The real-time clock, and the bus clock without which Linux does not touch a primecell. There is no interrupt.
fn write_rtc(fdt: &mut FdtWriter) -> Written {
    let clock = fdt.begin_node("apb-pclk")?;
    fdt.property_string("compatible", "fixed-clock")?;
    fdt.property_u32("#clock-cells", 0)?;
    fdt.property_u32("clock-frequency", 24_000_000)?;
    fdt.property_phandle(CLOCK_PHANDLE)?;
    fdt.end_node(clock)?;
    let rtc = fdt.begin_node(&format!("rtc@{RTC_BASE:x}"))?;
    fdt.property_string_list("compatible", vec!["arm,pl031".into(), "arm,primecell".into()])?;
    fdt.property_array_u64("reg", &[RTC_BASE, RTC_SIZE])?;
    fdt.property_array_u32("clocks", &[CLOCK_PHANDLE])?;
    fdt.property_string("clock-names", "apb_pclk")?;
    fdt.end_node(rtc)
}

fn write_pci(fdt: &mut FdtWriter) -> Written {
    /// A 32-bit memory space's address has this first cell.
    const MEMORY_32: u32 = 0x0200_0000;
    /// Where an address's first cell has the number of the device.
    const SLOT_SHIFT: u32 = 11;
    const SLOT_MASK: u32 = 0xf800;
    let low = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap_or(0);
    let pci = fdt.begin_node(&format!("pcie@{PCI_ECAM_BASE:x}"))?;
    fdt.property_string("device_type", "pci")?;
    fdt.property_string("compatible", "pci-host-ecam-generic")?;
    fdt.property_array_u64("reg", &[PCI_ECAM_BASE, PCI_ECAM_SIZE])?;
    fdt.property_array_u32("bus-range", &[0, 0])?;
    fdt.property_u32("#address-cells", 3)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_u32("#interrupt-cells", 1)?;
    let window = [MEMORY_32, 0, low(PCI_MMIO_BASE), 0, low(PCI_MMIO_BASE), 0, low(PCI_MMIO_SIZE)];
    fdt.property_array_u32("ranges", &window)?;
    fdt.property_null("dma-coherent")?;
    // A function's messages carry its number on the bus.
    fdt.property_array_u32("msi-map", &[0, ITS_PHANDLE, 0, 0x1_0000])?;
    let mut map = Vec::new();
    for (slot, spi) in (0..PCI_SLOTS).zip(PCI_FIRST_SPI..) {
        let address = u32::try_from(slot).unwrap_or(0) << SLOT_SHIFT;
        map.extend([address, 0, 0, 1, GIC_PHANDLE, 0, 0, SPI, spi, LEVEL_HIGH]);
    }
    fdt.property_array_u32("interrupt-map", &map)?;
    fdt.property_array_u32("interrupt-map-mask", &[SLOT_MASK, 0, 0, 7])?;
    fdt.end_node(pci)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Contents;

    fn blob(cpus: u32) -> Vec<u8> {
        let contents = Contents { kernel_file: 1, kernel_image: 1, text_offset: 0, initrd: Some(100) };
        let layout = Layout::new(512 << 20, cpus, contents, None).unwrap();
        build(&layout, "console=ttyS0", Conduit::Smc, false).unwrap()
    }

    #[test]
    fn the_blob_has_its_fixed_size_and_is_always_the_same() {
        assert_eq!(blob(1).len(), 0x1_0000);
        assert_eq!(blob(1), blob(1));
        assert_ne!(blob(1), blob(2));
        assert_eq!(&blob(1)[..4], &0xd00d_feedu32.to_be_bytes());
    }

    #[test]
    fn as_many_cpus_as_the_layout_allows_fit() {
        assert_eq!(blob(crate::layout::MAX_CPUS).len(), 0x1_0000);
    }

    #[test]
    fn a_command_line_with_a_nul_or_too_long_is_refused() {
        let contents = Contents { kernel_file: 1, kernel_image: 1, text_offset: 0, initrd: None };
        let layout = Layout::new(64 << 20, 1, contents, None).unwrap();
        assert!(build(&layout, "a\0b", Conduit::Smc, false).is_err());
        assert!(build(&layout, &"x".repeat(0x1_0000), Conduit::Smc, false).is_err());
    }
}
