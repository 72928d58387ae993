//! What this process costs beside the guest's own memory.

use std::path::Path;

use crate::memory::NAME;
use crate::{Error, Result};

/// What is in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Bytes of the guest's memory that lie in this process: what it has shared with us.
    pub guest: u64,
    /// Bytes of everything else: program, heap, stacks.
    pub own: u64,
    /// How often the guest's memory is mapped, and how many bytes of addresses that takes. The private memory of a
    /// Realm cannot be mapped at all.
    pub mappings: usize,
    /// Bytes of addresses in these mappings.
    pub mapped: u64,
}

impl Footprint {
    /// Of this process, now.
    pub fn now() -> Result<Self> {
        let path = Path::new("/proc/self/smaps");
        let text = std::fs::read_to_string(path)
            .map_err(|error| Error::os(format_args!("reading {}", path.display()), &error))?;
        Ok(Self::parse(&text))
    }

    /// From the kernel's list of mappings: a line with addresses and name, then lines with numbers.
    fn parse(text: &str) -> Self {
        let mut found = Self::default();
        let mut is_guest = false;
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            let Some(first) = words.next() else { continue };
            if let Some((start, end)) = first.split_once('-') {
                let address = |text| u64::from_str_radix(text, 16).ok();
                let (Some(start), Some(end)) = (address(start), address(end)) else { continue };
                is_guest = line.contains(NAME);
                if is_guest {
                    found.mappings += 1;
                    found.mapped += end.saturating_sub(start);
                }
            } else if first == "Rss:" {
                let kilobytes: u64 = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
                *if is_guest { &mut found.guest } else { &mut found.own } += kilobytes << 10;
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_memory_is_told_from_the_rest() {
        let text = "00400000-00500000 r-xp 00000000 00:13 7    /realm\n\
                    Size:               1024 kB\n\
                    Rss:                 100 kB\n\
                    7f0000000000-7f0020000000 rw-s 00000000 00:01 9   /memfd:guest-shared (deleted)\n\
                    Rss:                  64 kB\n\
                    VmFlags: rd wr\n\
                    7f0030000000-7f0030001000 rw-p 00000000 00:00 0 \n\
                    Rss:                   4 kB\n";
        let expected = Footprint { guest: 64 << 10, own: 104 << 10, mappings: 1, mapped: 512 << 20 };
        assert_eq!(Footprint::parse(text), expected);
    }

    #[test]
    fn this_process_maps_guest_memory_once_for_each_guest() {
        let memory = crate::memory::SharedMemory::new(0x10_0000, true).unwrap();
        memory.write(0x8000, &[1; 0x8000]).unwrap();
        let found = Footprint::now().unwrap();
        // Other tests of this process have guests, too.
        assert!(found.mappings >= 1 && found.mapped >= 0x10_0000 && found.guest >= 0x8000, "{found:?}");
        assert!(found.own > 0);
    }
}
