//! Writes the device tree of a machine with 512 MiB and the given number of CPUs to stdout, for `dtc`.

use std::io::Write;

use vmm::fdt::{Conduit, build};
use vmm::layout::{Contents, Layout};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let cpus = std::env::args().nth(1).map_or(Ok(1), |word| word.parse())?;
    let contents =
        Contents { kernel_file: 40 << 20, kernel_image: 40 << 20, text_offset: 0, initrd: Some(1 << 20) };
    let layout = Layout::new(512 << 20, cpus, contents, None)?;
    std::io::stdout().write_all(&build(&layout, "console=ttyS0", Conduit::Smc, false)?)?;
    Ok(())
}
