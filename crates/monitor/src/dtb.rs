//! Reading and amending the machine's flattened device tree, in place.
//!
//! QEMU leaves the tree at the start of DRAM with most of a megabyte free behind it. Insertions shift what
//! follows; nothing is packed, so the host keeps the whole megabyte reserved.

use crate::manifest::{Bank, MAX_BANKS};

/// What is wrong with a device tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DtbError {
    /// Not a device tree, or one whose blocks do not lie as expected.
    BadHeader,
    /// The structure block ends early or contains an unknown token.
    BadStructure,
    /// A node that must be there is not.
    NoNode,
    /// The free space behind the tree is used up.
    NoSpace,
}

/// A device tree in a buffer with room to grow.
#[derive(Debug)]
pub struct Dtb<'a> {
    bytes: &'a mut [u8],
}

/// Memory ranges that are looked at; QEMU makes at most one per NUMA node, of which there are at most this many.
const MAX_RANGES: usize = 128;

const MAGIC: u32 = 0xD00D_FEED;
const TOTAL_SIZE: usize = 4;
const OFF_STRUCT: usize = 8;
const OFF_STRINGS: usize = 12;
const SIZE_STRINGS: usize = 32;
const SIZE_STRUCT: usize = 36;

const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROP: u32 = 3;
const NOP: u32 = 4;

/// One piece of the structure block and where the next one starts.
enum Token<'t> {
    Begin(&'t [u8]),
    End,
    Prop { name: &'t [u8], value: &'t [u8] },
    Nop,
}

/// A node: the offset behind its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node(usize);

fn align4(n: usize) -> usize {
    n.wrapping_add(3) & !3
}

fn name_matches(name: &[u8], wanted: &[u8]) -> bool {
    name == wanted || name.split(|&c| c == b'@').next() == Some(wanted)
}

impl<'a> Dtb<'a> {
    /// Checks the header.
    pub fn new(bytes: &'a mut [u8]) -> Result<Self, DtbError> {
        let dtb = Self { bytes };
        let total = dtb.header(TOTAL_SIZE)?;
        let structure = dtb.header(OFF_STRUCT)?;
        let strings = dtb.header(OFF_STRINGS)?;
        let struct_end = structure.checked_add(dtb.header(SIZE_STRUCT)?).ok_or(DtbError::BadHeader)?;
        let strings_end = strings.checked_add(dtb.header(SIZE_STRINGS)?).ok_or(DtbError::BadHeader)?;
        let ordered = structure % 4 == 0 && struct_end <= strings && strings_end <= total;
        if dtb.word(0) != Some(MAGIC) || !ordered || total > dtb.bytes.len() {
            return Err(DtbError::BadHeader);
        }
        Ok(dtb)
    }

    /// The memory that the memory nodes describe, ascending, what touches put together: a machine with several
    /// nodes (NUMA) is one range as a rule. Returns how many there are.
    pub fn memory(&self, out: &mut [Bank; MAX_BANKS]) -> Result<usize, DtbError> {
        let mut ranges = [Bank::default(); MAX_RANGES];
        let mut found = 0;
        let root = self.root()?;
        self.children(root, |dtb, name, node| {
            if name_matches(name, b"memory") && dtb.property(node, b"device_type") == Some(b"memory\0") {
                for range in dtb.property(node, b"reg").unwrap_or_default().chunks_exact(16) {
                    let (base, size) = (be64(range), be64(range.get(8..).unwrap_or_default()));
                    if let (true, Some(slot)) = (size != 0, ranges.get_mut(found)) {
                        *slot = Bank { base, size };
                        found += 1;
                    }
                }
            }
            true
        })?;
        let ranges = ranges.get_mut(..found).unwrap_or_default();
        // Few, and as a rule in order: what the library has for this is larger than the rest of this file.
        for sorted in 1..found {
            let mut at = sorted;
            while let Some([left, right]) = ranges.get_mut(at.wrapping_sub(1)..=at) {
                if left.base <= right.base {
                    break;
                }
                core::mem::swap(left, right);
                at -= 1;
            }
        }
        let mut count = 0_usize;
        for range in ranges {
            let end = range.base.saturating_add(range.size);
            match count.checked_sub(1).and_then(|last| out.get_mut(last)) {
                Some(last) if range.base <= last.base.saturating_add(last.size) => {
                    last.size = last.size.max(end - last.base);
                }
                _ => {
                    if let Some(slot) = out.get_mut(count) {
                        *slot = *range;
                        count += 1;
                    }
                }
            }
        }
        Ok(count)
    }

    /// Number of CPUs.
    pub fn cpu_count(&self) -> Result<usize, DtbError> {
        let mut count = 0;
        self.children(self.find(&[b"cpus"])?, |_, name, _| {
            count += usize::from(name.starts_with(b"cpu@"));
            true
        })?;
        Ok(count)
    }

    /// Tells the host that PSCI is called by SMC, and that every CPU is started by it.
    pub fn add_psci(&mut self) -> Result<(), DtbError> {
        let root = self.root()?;
        let psci = match self.find(&[b"psci"]) {
            Ok(node) => node,
            Err(_) => self.add_node(root, b"psci")?,
        };
        self.set_property(psci, b"method", b"smc\0")?;
        self.set_property(psci, b"compatible", b"arm,psci-1.0\0arm,psci-0.2\0")?;
        let mut n = 0;
        loop {
            // Every insertion moves what follows, so each CPU is looked up again.
            let (mut seen, mut found) = (0, None);
            self.children(self.find(&[b"cpus"])?, |_, name, node| {
                if name.starts_with(b"cpu@") {
                    if seen == n {
                        found = Some(node);
                    }
                    seen += 1;
                }
                found.is_none()
            })?;
            match found {
                Some(node) => self.set_property(node, b"enable-method", b"psci\0")?,
                None => return Ok(()),
            }
            n += 1;
        }
    }

    /// Takes a range away from the host: it must not even map it.
    pub fn reserve(&mut self, name: &[u8], range: Bank) -> Result<(), DtbError> {
        let reserved = match self.find(&[b"reserved-memory"]) {
            Ok(node) => node,
            Err(_) => {
                let node = self.add_node(self.root()?, b"reserved-memory")?;
                self.set_property(node, b"ranges", b"")?;
                self.set_property(node, b"#size-cells", &2_u32.to_be_bytes())?;
                self.set_property(node, b"#address-cells", &2_u32.to_be_bytes())?;
                node
            }
        };
        let node = self.add_node(reserved, name)?;
        self.set_property(node, b"no-map", b"")?;
        let mut reg = [0; 16];
        reg[..8].copy_from_slice(&range.base.to_be_bytes());
        reg[8..].copy_from_slice(&range.size.to_be_bytes());
        self.set_property(node, b"reg", &reg)
    }

    /// Tells the host where its initial RAM disk is.
    pub fn set_initrd(&mut self, start: u64, end: u64) -> Result<(), DtbError> {
        let chosen = self.find(&[b"chosen"])?;
        self.set_property(chosen, b"linux,initrd-end", &end.to_be_bytes())?;
        self.set_property(chosen, b"linux,initrd-start", &start.to_be_bytes())
    }

    /// The node at a path; a component without unit address matches any.
    pub fn find(&self, path: &[&[u8]]) -> Result<Node, DtbError> {
        let mut node = self.root()?;
        for component in path {
            let mut found = None;
            self.children(node, |_, name, child| {
                if name_matches(name, component) {
                    found = Some(child);
                }
                found.is_none()
            })?;
            node = found.ok_or(DtbError::NoNode)?;
        }
        Ok(node)
    }

    /// A property's value.
    pub fn property(&self, node: Node, wanted: &[u8]) -> Option<&[u8]> {
        self.property_at(node, wanted).map(|(_, value)| value)
    }

    /// Sets a property, replacing one of the same name.
    pub fn set_property(&mut self, node: Node, name: &[u8], value: &[u8]) -> Result<(), DtbError> {
        if let Some((at, old)) = self.property_at(node, name) {
            let gone = 12 + align4(old.len());
            // The length of what is there was checked when it was found.
            for word in (at..at + gone).step_by(4) {
                self.put(word, NOP)?;
            }
        }
        let name_offset = self.intern(name)?;
        let at = node.0;
        self.make_room(at, 12 + align4(value.len()))?;
        self.put(at, PROP)?;
        self.put(at + 4, u32::try_from(value.len()).map_err(|_| DtbError::NoSpace)?)?;
        self.put(at + 8, name_offset)?;
        self.copy_in(at + 12, value)
    }

    /// Adds a node behind the others of `parent`.
    pub fn add_node(&mut self, parent: Node, name: &[u8]) -> Result<Node, DtbError> {
        let at = self.end_of(parent)?;
        let name_size = align4(name.len() + 1);
        self.make_room(at, 8 + name_size)?;
        self.put(at, BEGIN_NODE)?;
        self.copy_in(at + 4, name)?;
        self.put(at + 4 + name_size, END_NODE)?;
        Ok(Node(at + 4 + name_size))
    }

    fn root(&self) -> Result<Node, DtbError> {
        let mut at = self.header(OFF_STRUCT)?;
        loop {
            match self.token(at)? {
                (Token::Begin(_), next) => return Ok(Node(next)),
                (Token::Nop, next) => at = next,
                _ => return Err(DtbError::BadStructure),
            }
        }
    }

    /// Calls `visit` for each child until it returns false.
    fn children<'s>(
        &'s self,
        node: Node,
        mut visit: impl FnMut(&'s Self, &'s [u8], Node) -> bool,
    ) -> Result<(), DtbError> {
        let (mut at, mut depth) = (node.0, 0_usize);
        loop {
            let (token, next) = self.token(at)?;
            match token {
                Token::Begin(name) => {
                    if depth == 0 && !visit(self, name, Node(next)) {
                        return Ok(());
                    }
                    depth += 1;
                }
                Token::End if depth == 0 => return Ok(()),
                Token::End => depth -= 1,
                Token::Prop { .. } | Token::Nop => {}
            }
            at = next;
        }
    }

    fn property_at(&self, node: Node, wanted: &[u8]) -> Option<(usize, &[u8])> {
        let mut at = node.0;
        loop {
            match self.token(at).ok()? {
                (Token::Prop { name, value }, _) if name == wanted => return Some((at, value)),
                (Token::Prop { .. } | Token::Nop, next) => at = next,
                _ => return None,
            }
        }
    }

    /// Where the node's end token is.
    fn end_of(&self, node: Node) -> Result<usize, DtbError> {
        let (mut at, mut depth) = (node.0, 0_usize);
        loop {
            let (token, next) = self.token(at)?;
            match token {
                Token::Begin(_) => depth += 1,
                Token::End if depth == 0 => return Ok(at),
                Token::End => depth -= 1,
                Token::Prop { .. } | Token::Nop => {}
            }
            at = next;
        }
    }

    fn token(&self, at: usize) -> Result<(Token<'_>, usize), DtbError> {
        let end = self.header(OFF_STRUCT)? + self.header(SIZE_STRUCT)?;
        let checked = |next: usize| if next <= end { Ok(next) } else { Err(DtbError::BadStructure) };
        if at >= end {
            return Err(DtbError::BadStructure);
        }
        let body = at + 4;
        match self.word(at) {
            Some(BEGIN_NODE) => {
                let name =
                    cstr(self.bytes.get(body..end).unwrap_or_default()).ok_or(DtbError::BadStructure)?;
                Ok((Token::Begin(name), checked(body + align4(name.len() + 1))?))
            }
            Some(END_NODE) => Ok((Token::End, body)),
            Some(NOP) => Ok((Token::Nop, body)),
            Some(PROP) => {
                let len = self.header(body)?;
                let name_at = self.header(OFF_STRINGS)?.saturating_add(self.header(body + 4)?);
                let name =
                    cstr(self.bytes.get(name_at..).unwrap_or_default()).ok_or(DtbError::BadStructure)?;
                let value_end = (body + 8).checked_add(len).ok_or(DtbError::BadStructure)?;
                let value = self.bytes.get(body + 8..value_end).ok_or(DtbError::BadStructure)?;
                Ok((Token::Prop { name, value }, checked(body + 8 + align4(len))?))
            }
            _ => Err(DtbError::BadStructure),
        }
    }

    /// The offset of a property's name in the strings block, added at its end if it is new.
    fn intern(&mut self, name: &[u8]) -> Result<u32, DtbError> {
        let strings = self.header(OFF_STRINGS)?;
        let size = self.header(SIZE_STRINGS)?;
        let block = self.bytes.get(strings..strings + size).ok_or(DtbError::BadHeader)?;
        let mut at = 0;
        for known in block.split(|&c| c == 0) {
            if known == name {
                return u32::try_from(at).map_err(|_| DtbError::BadHeader);
            }
            at += known.len() + 1;
        }
        let end = strings + size;
        if end + name.len() + 1 > self.header(TOTAL_SIZE)? {
            return Err(DtbError::NoSpace);
        }
        self.copy_in(end, name)?;
        self.copy_in(end + name.len(), &[0])?;
        self.put_size(SIZE_STRINGS, size + name.len() + 1)?;
        u32::try_from(size).map_err(|_| DtbError::NoSpace)
    }

    /// Opens a gap of zeroes in the structure block.
    fn make_room(&mut self, at: usize, len: usize) -> Result<(), DtbError> {
        let strings = self.header(OFF_STRINGS)?;
        let end = strings + self.header(SIZE_STRINGS)?;
        if end + len > self.header(TOTAL_SIZE)? || at > end {
            return Err(DtbError::NoSpace);
        }
        self.bytes.copy_within(at..end, at + len);
        self.bytes.get_mut(at..at + len).ok_or(DtbError::NoSpace)?.fill(0);
        self.put_size(OFF_STRINGS, strings + len)?;
        self.put_size(SIZE_STRUCT, self.header(SIZE_STRUCT)? + len)
    }

    fn word(&self, at: usize) -> Option<u32> {
        self.bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_be_bytes)
    }

    fn header(&self, at: usize) -> Result<usize, DtbError> {
        self.word(at).and_then(|w| usize::try_from(w).ok()).ok_or(DtbError::BadHeader)
    }

    fn put_size(&mut self, at: usize, value: usize) -> Result<(), DtbError> {
        self.put(at, u32::try_from(value).map_err(|_| DtbError::NoSpace)?)
    }

    fn put(&mut self, at: usize, value: u32) -> Result<(), DtbError> {
        self.copy_in(at, &value.to_be_bytes())
    }

    fn copy_in(&mut self, at: usize, data: &[u8]) -> Result<(), DtbError> {
        self.bytes.get_mut(at..at + data.len()).ok_or(DtbError::NoSpace)?.copy_from_slice(data);
        Ok(())
    }
}

fn cstr(bytes: &[u8]) -> Option<&[u8]> {
    bytes.split(|&c| c == 0).next().filter(|s| s.len() < bytes.len())
}

fn be64(bytes: &[u8]) -> u64 {
    bytes.get(..8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
}
