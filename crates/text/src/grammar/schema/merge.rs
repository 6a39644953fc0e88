//! What meets at one place of a value when `allOf`, alternatives and references are merged: patterns there are intersected,
//! and an intersection can be as large as the product of its sides. Knows only what [`Reader`] found.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::super::error::Fault;
use super::{MAX_PATTERNS, Reader, fault};

/// What a `format` counts for.
pub(super) const FORMAT_SIZE: u64 = 100;
/// Most `pattern`s and `format`s that meet.
const MAX_MET: u64 = 2;
/// Most that the sizes of those multiply to.
const MAX_PRODUCT: u64 = 40_000;
/// Most places looked at.
const MAX_WORK: usize = 200_000;

/// What constrains one place of a value.
#[derive(Clone, Copy, Default, PartialEq)]
pub(super) struct Load {
    /// `pattern`s and `format`s.
    patterns: u64,
    /// Product of their sizes; 0 without any.
    product: u64,
    /// `multipleOf`s.
    pub(super) divisors: u64,
    /// `patternProperties`.
    pub(super) names: u64,
}

impl Load {
    pub(super) fn add_pattern(&mut self, size: u64) {
        self.patterns += 1;
        self.product = self.product.max(1).saturating_mul(size.max(1));
    }

    fn both(self, other: Self) -> Self {
        let product = match (self.product, other.product) {
            (0, one) | (one, 0) => one,
            (a, b) => a.saturating_mul(b),
        };
        Self {
            patterns: self.patterns + other.patterns,
            product,
            divisors: self.divisors + other.divisors,
            names: self.names + other.names,
        }
    }

    fn either(self, other: Self) -> Self {
        Self {
            patterns: self.patterns.max(other.patterns),
            product: self.product.max(other.product),
            divisors: self.divisors.max(other.divisors),
            names: self.names.max(other.names),
        }
    }

    fn check(self) -> Result<(), String> {
        if self.patterns > MAX_MET || (self.patterns > 1 && self.product > MAX_PRODUCT) {
            return Err(format!(
                "{} patterns and formats hold for one string; at most {MAX_MET} that are not large are supported: \
                 write them as one `pattern`",
                self.patterns
            ));
        }
        if self.divisors > 1 {
            return Err("several `multipleOf` hold for one number: write their least common multiple".into());
        }
        if self.names > MAX_PATTERNS as u64 {
            return Err(format!(
                "{} `patternProperties` hold for one object; at most {MAX_PATTERNS} are supported",
                self.names
            ));
        }
        Ok(())
    }
}

/// Loads by place below a node: `/name/0/*`, where `*` is any name or any number. Places without load are left out.
type Loads = BTreeMap<String, Load>;

struct Merger<'r> {
    reader: &'r Reader,
    /// Loads found, by node and by whether references go below their targets' top.
    found: BTreeMap<(usize, bool), Rc<Loads>>,
    path: Vec<usize>,
    work: usize,
}

/// Bounds what meets at every place of every schema that is merged.
pub(super) fn check(reader: &Reader) -> Result<(), Fault> {
    let mut merger = Merger { reader, found: BTreeMap::new(), path: Vec::new(), work: 0 };
    for node in 0..reader.nodes.len() {
        let own = &reader.nodes[node];
        let is_merged = own.merges
            || !own.any.is_empty()
            || own.parts.iter().any(|&part| reader.step(node, part).starts_with("/allOf/"));
        if !is_merged {
            continue;
        }
        let loads = merger.loads(node, true)?;
        let wild: Vec<_> = loads.iter().filter(|(place, _)| place.contains("/*")).collect();
        for (place, load) in loads.iter() {
            let mut met = *load;
            for (pattern, other) in &wild {
                merger.work(node, 1)?;
                if *pattern != place && matches(pattern, place) {
                    met = met.both(**other);
                }
            }
            met.check().map_err(|reason| fault(&own.pointer, reason))?;
        }
    }
    Ok(())
}

fn matches(pattern: &str, place: &str) -> bool {
    let (mut left, mut right) = (pattern.split('/'), place.split('/'));
    loop {
        match (left.next(), right.next()) {
            (None, None) => return true,
            (Some(a), Some(b)) if a == b || a == "*" || b == "*" => {}
            _ => return false,
        }
    }
}

fn join(into: &mut Loads, place: String, load: Load, how: impl Fn(Load, Load) -> Load) {
    let entry = into.entry(place).or_default();
    *entry = how(*entry, load);
}

impl Merger<'_> {
    fn work(&mut self, node: usize, places: usize) -> Result<(), Fault> {
        self.work += places;
        if self.work > MAX_WORK {
            let reason = "too much is merged here by `allOf`, `anyOf` and references beside other keywords: write it out";
            return Err(fault(&self.reader.nodes[node].pointer, reason));
        }
        Ok(())
    }

    fn loads(&mut self, node: usize, is_top: bool) -> Result<Rc<Loads>, Fault> {
        if let Some(found) = self.found.get(&(node, is_top)) {
            return Ok(Rc::clone(found));
        }
        if self.path.contains(&node) {
            return Ok(Rc::default());
        }
        self.path.push(node);
        let own = &self.reader.nodes[node];
        let mut all = Loads::new();
        if own.load != Load::default() {
            all.insert(String::new(), own.load);
        }
        let (mut any, mut one) = (Loads::new(), Loads::new());
        for &part in &own.parts {
            let mut step = self.reader.step(node, part).splitn(3, '/').skip(1);
            let keyword = step.next().unwrap_or_default();
            let name = step.next().unwrap_or("*");
            let is_same = matches!(keyword, "allOf" | "anyOf" | "oneOf");
            let below = self.loads(part, is_top && is_same)?;
            self.work(node, below.len() + 1)?;
            for (place, &load) in below.iter() {
                match keyword {
                    "allOf" => join(&mut all, place.clone(), load, Load::both),
                    "anyOf" => join(&mut any, place.clone(), load, Load::either),
                    "oneOf" => join(&mut one, place.clone(), load, Load::either),
                    "properties" | "prefixItems" | "items" => {
                        join(&mut all, format!("/{name}{place}"), load, Load::both);
                    }
                    _ => join(&mut all, format!("/*{place}"), load, Load::both),
                }
            }
        }
        if let Some(target) = self.reader.target(node) {
            let below = self.loads(target, is_top)?;
            self.work(node, below.len() + 1)?;
            // A property's reference is followed for the property itself: places without end lie below it.
            for (place, &load) in below.iter().filter(|(place, _)| is_top || place.is_empty()) {
                join(&mut all, place.clone(), load, Load::both);
            }
        }
        for (place, load) in any.into_iter().chain(one) {
            join(&mut all, place, load, Load::both);
        }
        self.path.pop();
        let all = Rc::new(all);
        self.found.insert((node, is_top), Rc::clone(&all));
        Ok(all)
    }
}
