//! The call graph of an image.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use anyhow::{Context as _, Result};
use object::{Object, ObjectSection, ObjectSymbol, RelocationTarget, SymbolKind};

use super::code::{Instruction, decode};

/// A function.
pub(super) struct Function {
    /// Its name, demangled.
    pub(super) name: String,
    start: u64,
    end: u64,
    /// Bytes of stack that it uses itself.
    frame: u64,
    /// Whether the frame's size is not a constant.
    pub(super) unbounded: bool,
    /// Whom it calls, or continues in.
    pub(super) calls: BTreeSet<usize>,
    /// Whether it calls through a register.
    indirect: bool,
}

/// All of them.
pub(super) struct Graph {
    /// In ascending order of addresses.
    pub(super) functions: Vec<Function>,
    /// Functions whose address is taken.
    taken: BTreeSet<usize>,
    /// Symbols that are just values.
    pub(super) absolute: HashMap<String, u64>,
}

/// For every function: the bytes of the deepest way down from it, and the next function on it.
pub(super) type Depths = HashMap<usize, (u64, Option<usize>)>;

impl Graph {
    /// Reads an ELF file.
    pub(super) fn of(bytes: &[u8]) -> Result<Self> {
        let file = object::File::parse(bytes)?;
        let text = file.section_by_name(".text").context("no text")?;
        let (text_start, code) = (text.address(), text.data()?);
        let text_end = text_start + text.size();
        let mut starts = BTreeMap::new();
        let mut absolute = HashMap::new();
        for symbol in file.symbols() {
            let name = symbol.name()?;
            if symbol.section() == object::SymbolSection::Absolute {
                absolute.insert(name.to_owned(), symbol.address());
            }
            let in_text = symbol.section_index() == Some(text.index());
            let label = symbol.kind() == SymbolKind::Text || symbol.kind() == SymbolKind::Label;
            if in_text
                && (label || symbol.kind() == SymbolKind::Unknown)
                && !name.starts_with('$')
                && !name.is_empty()
            {
                let demangled = format!("{:#}", rustc_demangle::demangle(name));
                // A sized symbol is better than a label at the same place.
                let entry = starts.entry(symbol.address()).or_insert((String::new(), 0));
                if entry.0.is_empty() || symbol.size() > entry.1 {
                    *entry = (demangled, symbol.size());
                }
            }
        }
        let ends: Vec<u64> = starts.keys().copied().skip(1).chain([text_end]).collect();
        let functions = starts
            .into_iter()
            .zip(ends)
            .map(|((start, (name, size)), next)| Function {
                name,
                start,
                end: if size == 0 { next } else { start + size },
                frame: 0,
                unbounded: false,
                calls: BTreeSet::new(),
                indirect: false,
            })
            .collect();
        let mut graph = Self { functions, taken: BTreeSet::new(), absolute };
        for index in 0..graph.functions.len() {
            graph.scan(index, text_start, code)?;
        }
        for (_, relocation) in file.dynamic_relocations().into_iter().flatten() {
            if let RelocationTarget::Absolute = relocation.target() {
                graph.take(u64::try_from(relocation.addend()).unwrap_or(0));
            }
        }
        Ok(graph)
    }

    fn at(&self, address: u64) -> Option<usize> {
        let index = self.functions.partition_point(|function| function.start <= address).checked_sub(1)?;
        (address < self.functions[index].end).then_some(index)
    }

    /// The address of something: a function, if it is the first byte of one.
    fn take(&mut self, address: u64) {
        if let Some(index) = self.at(address) {
            if self.functions[index].start == address {
                self.taken.insert(index);
            }
        }
    }

    fn scan(&mut self, index: usize, text_start: u64, code: &[u8]) -> Result<()> {
        let (start, end) = (self.functions[index].start, self.functions[index].end);
        let mut pages: HashMap<u32, u64> = HashMap::new();
        for address in (start..end).step_by(4) {
            let at = usize::try_from(address - text_start)?;
            let Some(word) = code.get(at..at + 4) else { break };
            let word = u32::from_le_bytes(word.try_into()?);
            match decode(word) {
                Instruction::Jump(offset) => {
                    let target = address.wrapping_add_signed(offset);
                    if !(start..end).contains(&target) {
                        // Data between functions may look like a jump to nowhere.
                        if let Some(callee) = self.at(target) {
                            self.functions[index].calls.insert(callee);
                        }
                    }
                }
                Instruction::Indirect => self.functions[index].indirect = true,
                Instruction::Push(bytes) => self.functions[index].frame += bytes,
                Instruction::PushRegister => self.functions[index].unbounded = true,
                Instruction::Page { register, offset } => {
                    pages.insert(register, (address & !0xFFF).wrapping_add_signed(offset));
                }
                Instruction::Address { offset, .. } => self.take(address.wrapping_add_signed(offset)),
                Instruction::Add { from, immediate, .. } => {
                    if let Some(&page) = pages.get(&from) {
                        self.take(page + immediate);
                    }
                }
                Instruction::Other => {}
            }
        }
        Ok(())
    }

    /// The function of this name, or the only one whose name ends so.
    pub(super) fn find(&self, name: &str) -> Option<usize> {
        self.functions.iter().position(|function| function.name == name)
    }

    /// Functions on a cycle of direct calls.
    pub(super) fn direct_cycles(&self) -> Vec<usize> {
        let direct = |function: usize| self.functions[function].calls.iter().copied().collect();
        components(self.functions.len(), &direct)
            .into_iter()
            .filter(|component| {
                component.len() > 1 || self.functions[component[0]].calls.contains(&component[0])
            })
            .flatten()
            .collect()
    }

    /// How deep the stack gets below each function. `roots` are never called through a register.
    pub(super) fn depths(&self, roots: &[usize]) -> Depths {
        let callees = |function: usize| -> Vec<usize> {
            let direct = self.functions[function].calls.iter().copied();
            let formats = |function: usize| self.functions[function].name.contains("core::fmt::");
            let indirect = self
                .taken
                .iter()
                .copied()
                .filter(|&taken| !roots.contains(&taken) && (!formats(function) || formats(taken)));
            if self.functions[function].indirect {
                direct.chain(indirect).collect()
            } else {
                direct.collect()
            }
        };
        let mut depths = Depths::new();
        // Callees come before callers.
        for component in components(self.functions.len(), &callees) {
            let own: u64 = component.iter().map(|&function| self.functions[function].frame).sum();
            let below = component
                .iter()
                .flat_map(|&function| callees(function))
                .filter_map(|callee| depths.get(&callee).map(|&(depth, _): &(u64, _)| (depth, callee)))
                .max();
            let depth = own + below.map_or(0, |(depth, _)| depth);
            for function in component {
                depths.insert(function, (depth, below.map(|(_, callee)| callee)));
            }
        }
        depths
    }

    /// The deepest way down, as a line.
    pub(super) fn path(&self, depths: &Depths, from: usize) -> String {
        let mut names = Vec::new();
        let mut at = Some(from);
        while let Some(function) = at {
            names.push(format!("{} ({})", self.functions[function].name, self.functions[function].frame));
            at = depths[&function].1;
        }
        names.join(" > ")
    }
}

/// Strongly connected components, callees before callers (Tarjan).
fn components(count: usize, callees: &dyn Fn(usize) -> Vec<usize>) -> Vec<Vec<usize>> {
    struct State<'c> {
        callees: &'c dyn Fn(usize) -> Vec<usize>,
        order: Vec<Option<usize>>,
        low: Vec<usize>,
        stack: Vec<usize>,
        on_stack: Vec<bool>,
        next: usize,
        found: Vec<Vec<usize>>,
    }
    fn visit(state: &mut State<'_>, node: usize) {
        state.order[node] = Some(state.next);
        state.low[node] = state.next;
        state.next += 1;
        state.stack.push(node);
        state.on_stack[node] = true;
        for callee in (state.callees)(node) {
            match state.order[callee] {
                None => {
                    visit(state, callee);
                    state.low[node] = state.low[node].min(state.low[callee]);
                }
                Some(order) if state.on_stack[callee] => state.low[node] = state.low[node].min(order),
                Some(_) => {}
            }
        }
        if state.order[node] == Some(state.low[node]) {
            let at = state.stack.iter().position(|&other| other == node).unwrap_or(0);
            let component = state.stack.split_off(at);
            for &member in &component {
                state.on_stack[member] = false;
            }
            state.found.push(component);
        }
    }
    let mut state = State {
        callees,
        order: vec![None; count],
        low: vec![0; count],
        stack: Vec::new(),
        on_stack: vec![false; count],
        next: 0,
        found: Vec::new(),
    };
    for node in 0..count {
        if state.order[node].is_none() {
            visit(&mut state, node);
        }
    }
    state.found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_come_after_what_they_reach() {
        // 0 → 1 ⇄ 2 → 3
        let edges = [vec![1], vec![2], vec![1, 3], vec![]];
        let found = components(4, &|node| edges[node].clone());
        let sorted: Vec<Vec<usize>> = found
            .into_iter()
            .map(|mut component| {
                component.sort_unstable();
                component
            })
            .collect();
        assert_eq!(sorted, [vec![3], vec![1, 2], vec![0]]);
    }
}
