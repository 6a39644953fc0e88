//! JSON schemas before they are compiled: what is not supported is refused with its place, what is only annotation is
//! dropped, and what would grow or recurse without end is found. The compiler then sees a schema whose size and depth are
//! bounded and whose references are local.

use std::collections::HashMap;

use serde_json::{Map, Value};

use super::error::Fault;
use super::regex;
use merge::Load;

mod merge;

/// Largest schema, in bytes of keys, strings and values.
const MAX_BYTES: usize = 256 << 10;
/// Most schemas in a request, the parts of schemas included.
pub(super) const MAX_NODES: usize = 2_000;
/// Deepest schema in schema, references followed; deepest value of `enum` and `const`.
const MAX_DEPTH: usize = 64;
/// Longest JSON pointer to a schema, in bytes.
const MAX_POINTER: usize = 2048;
/// Most properties of one object, named or required.
const MAX_PROPERTIES: usize = 500;
/// Most `patternProperties` of one object: each is held against each.
const MAX_PATTERNS: usize = 16;
/// Most values of an `enum`.
const MAX_ENUM: usize = 2_500;
/// Most values of all `enum`s.
const MAX_ENUM_VALUES: usize = 5_000;
/// Most schemas of one `anyOf`, `oneOf`, `allOf` or `prefixItems`.
const MAX_OPTIONS: usize = 500;
/// Largest `minItems`, `maxItems`, `minProperties`, `maxProperties`.
const MAX_ITEMS: u64 = 10_000;
/// Largest `minLength` and `maxLength`.
const MAX_LENGTH: u64 = 1_000_000;
/// Most schemas after `allOf` and references with siblings are written out.
const MAX_EXPANDED: u64 = 5_000;
/// Largest `multipleOf`, its decimal point left out: an automaton has a state for each remainder.
const MAX_DIVISOR: f64 = 2_000.0;
/// Most decimals of `multipleOf`.
const MAX_DECIMALS: u32 = 6;
/// Where whole bounds leave 64 bits.
const WHOLE_END: f64 = 9.2e18;
/// Largest bound of a number that may have decimals.
const MAX_BOUND: f64 = 1e15;

/// Keywords that hold one schema.
const ONE: [&str; 3] = ["items", "additionalItems", "additionalProperties"];
/// Keywords that hold a list of schemas.
const LIST: [&str; 4] = ["anyOf", "oneOf", "allOf", "prefixItems"];
/// Keywords that hold schemas by name.
const NAMED: [&str; 4] = ["properties", "patternProperties", "$defs", "definitions"];
/// Keywords that constrain and that tokens cannot be held to.
const UNSUPPORTED: [(&str, &str); 18] = [
    ("not", "describe what is allowed instead"),
    ("if", "use `anyOf`"),
    ("then", "use `anyOf`"),
    ("else", "use `anyOf`"),
    ("uniqueItems", "leave it out and check the reply"),
    ("contains", "use `items` or `prefixItems`"),
    ("minContains", "use `minItems`"),
    ("maxContains", "use `maxItems`"),
    ("dependentRequired", "use `anyOf`"),
    ("dependentSchemas", "use `anyOf`"),
    ("dependencies", "use `anyOf`"),
    ("propertyNames", "use `patternProperties` with `additionalProperties: false`"),
    ("unevaluatedProperties", "use `additionalProperties`"),
    ("unevaluatedItems", "use `items`"),
    ("$dynamicRef", "use `$ref`"),
    ("$recursiveRef", "use `$ref`"),
    ("extends", "use `allOf`"),
    ("disallow", "describe what is allowed instead"),
];
/// Keywords beside a reference that make its target be copied.
const MERGED: [&str; 19] = [
    "properties",
    "patternProperties",
    "required",
    "type",
    "enum",
    "const",
    "pattern",
    "format",
    "minLength",
    "maxLength",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
];
const FORMATS: [&str; 11] =
    ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown"];
const TYPES: [&str; 7] = ["null", "boolean", "number", "integer", "string", "array", "object"];

/// What one schema needs so that some finite value satisfies it.
#[derive(Default)]
struct Node {
    /// All of these schemas.
    all: Vec<usize>,
    /// And of each group, one.
    any: Vec<Vec<usize>>,
    /// Target of its `$ref`, a JSON pointer.
    reference: Option<String>,
    /// Schemas that are copied into this one when it is compiled: its own parts.
    parts: Vec<usize>,
    /// Whether the target of `reference` is copied in too.
    merges: bool,
    /// What its own keywords add to a value's automaton.
    load: Load,
    pointer: String,
}

/// Of each node, what [`Reader::factors`] found.
type Sizes = Vec<Option<(u64, u64)>>;

struct Reader {
    nodes: Vec<Node>,
    by_pointer: HashMap<String, usize>,
    bytes: usize,
    /// Values of all `enum`s so far.
    enum_values: usize,
}

/// A schema of the same values without annotations, fit to be compiled, and how many schemas it is made of.
pub(super) fn prepare(schema: &Value) -> Result<(Value, usize), Fault> {
    let mut reader = Reader { nodes: Vec::new(), by_pointer: HashMap::new(), bytes: 0, enum_values: 0 };
    let mut pointer = String::new();
    let (prepared, _) = reader.schema(schema, &mut pointer, 0)?;
    reader.references()?;
    reader.depth()?;
    reader.expansion()?;
    merge::check(&reader)?;
    reader.ends()?;
    Ok((prepared, reader.nodes.len()))
}

/// Appends a key to a JSON pointer, runs `body`, takes it off again.
fn inside<T>(pointer: &mut String, key: &str, body: impl FnOnce(&mut String) -> T) -> T {
    let len = pointer.len();
    pointer.push('/');
    pointer.push_str(&key.replace('~', "~0").replace('/', "~1"));
    let result = body(pointer);
    pointer.truncate(len);
    result
}

fn fault(pointer: &str, reason: impl Into<String>) -> Fault {
    let shown = if pointer.is_empty() { "the top" } else { pointer };
    let cut = (0..=shown.len().min(300)).rev().find(|&i| shown.is_char_boundary(i)).unwrap_or(0);
    let place = if cut < shown.len() { format!("{}…", &shown[..cut]) } else { shown.to_owned() };
    Fault::at(place, reason)
}

impl Reader {
    fn count(&mut self, pointer: &str, bytes: usize) -> Result<(), Fault> {
        self.bytes += bytes;
        if self.bytes > MAX_BYTES {
            let reason = format!("the schema is larger than the {} KiB that are supported", MAX_BYTES >> 10);
            return Err(fault(pointer, reason));
        }
        Ok(())
    }

    /// Reads the schema at `pointer`.
    fn schema(
        &mut self,
        schema: &Value,
        pointer: &mut String,
        depth: usize,
    ) -> Result<(Value, usize), Fault> {
        if depth > MAX_DEPTH {
            return Err(fault(pointer, format!("schemas nest deeper than {MAX_DEPTH}")));
        }
        if pointer.len() > MAX_POINTER {
            return Err(fault(
                pointer,
                format!("the names above this schema are longer than {MAX_POINTER} bytes"),
            ));
        }
        if self.nodes.len() == MAX_NODES {
            return Err(fault(pointer, format!("more than {MAX_NODES} schemas")));
        }
        let index = self.nodes.len();
        self.nodes.push(Node { pointer: pointer.clone(), ..Node::default() });
        self.by_pointer.insert(pointer.clone(), index);
        let map = match schema {
            Value::Bool(_) => return Ok((schema.clone(), index)),
            Value::Object(map) => map,
            _ => return Err(fault(pointer, "a schema is an object or a boolean")),
        };
        let mut out = Map::new();
        for (key, value) in map {
            self.count(pointer, key.len() + 1)?;
            let kept = inside(pointer, key, |at| self.keyword(index, map, (key, value), at, depth))?;
            if let Some(kept) = kept {
                out.insert(key.clone(), kept);
            }
        }
        self.needs(index, map, pointer);
        Ok((Value::Object(out), index))
    }

    /// One keyword's value as the compiler shall see it; `None`: not at all.
    fn keyword(
        &mut self,
        node: usize,
        map: &Map<String, Value>,
        (key, value): (&str, &Value),
        at: &mut String,
        depth: usize,
    ) -> Result<Option<Value>, Fault> {
        if let Some((_, instead)) = UNSUPPORTED.iter().find(|(name, _)| *name == key) {
            if key == "uniqueItems" && value == &Value::Bool(false) {
                return Ok(None);
            }
            return Err(fault(at, format!("`{key}` is not supported: {instead}")));
        }
        if ONE.contains(&key) {
            // Before draft 2020-12, `items` could be a list.
            if let Some(list) = value.as_array().filter(|_| key == "items") {
                return self.list(node, list, at, depth).map(Some);
            }
            let (kept, index) = self.schema(value, at, depth + 1)?;
            self.nodes[node].parts.push(index);
            return Ok(Some(kept));
        }
        if LIST.contains(&key) {
            let list = value.as_array().ok_or_else(|| fault(at, format!("`{key}` is a list of schemas")))?;
            if list.is_empty() && key != "prefixItems" {
                return Err(fault(at, format!("`{key}` needs at least one schema")));
            }
            return self.list(node, list, at, depth).map(Some);
        }
        if NAMED.contains(&key) {
            let named =
                value.as_object().ok_or_else(|| fault(at, format!("`{key}` holds schemas by name")))?;
            let limit = match key {
                "properties" => MAX_PROPERTIES,
                "patternProperties" => MAX_PATTERNS,
                _ => MAX_NODES,
            };
            if named.len() > limit {
                return Err(fault(at, format!("{} entries; at most {limit} are supported", named.len())));
            }
            if key == "patternProperties" {
                self.nodes[node].load.names = named.len() as u64;
            }
            let mut out = Map::new();
            for (name, schema) in named {
                self.count(at, name.len() + 1)?;
                let kept = inside(at, name, |at| {
                    if key == "patternProperties" {
                        pattern(name, at)?;
                    }
                    let (kept, index) = self.schema(schema, at, depth + 1)?;
                    if key == "properties" || key == "patternProperties" {
                        self.nodes[node].parts.push(index);
                    }
                    Ok(kept)
                })?;
                out.insert(name.clone(), kept);
            }
            return Ok(Some(Value::Object(out)));
        }
        match key {
            "$ref" => self.reference(node, value, at, map),
            "enum" => {
                let values = value.as_array().ok_or_else(|| fault(at, "`enum` is a list of values"))?;
                if values.is_empty() || values.len() > MAX_ENUM {
                    let reason = format!("{} values; 1 to {MAX_ENUM} are supported", values.len());
                    return Err(fault(at, reason));
                }
                self.enum_values += values.len();
                if self.enum_values > MAX_ENUM_VALUES {
                    let reason = format!("all `enum`s together have more than {MAX_ENUM_VALUES} values");
                    return Err(fault(at, reason));
                }
                for value in values {
                    self.value(value, at, 0)?;
                }
                Ok(Some(value.clone()))
            }
            "const" => {
                self.value(value, at, 0)?;
                Ok(Some(value.clone()))
            }
            "type" => {
                let known = |v: &Value| v.as_str().is_some_and(|t| TYPES.contains(&t));
                let valid = match value {
                    Value::Array(types) => {
                        !types.is_empty() && types.len() <= TYPES.len() && types.iter().all(known)
                    }
                    one => known(one),
                };
                let reason = || format!("`type` is one or several of {}", TYPES.join(", "));
                if valid { Ok(Some(value.clone())) } else { Err(fault(at, reason())) }
            }
            "required" => {
                let names = value.as_array().ok_or_else(|| fault(at, "`required` is a list of names"))?;
                if names.len() > MAX_PROPERTIES {
                    let reason = format!("{} names; at most {MAX_PROPERTIES} are supported", names.len());
                    return Err(fault(at, reason));
                }
                for name in names {
                    let name = name.as_str().ok_or_else(|| fault(at, "`required` is a list of names"))?;
                    self.count(at, name.len() + 1)?;
                }
                Ok(Some(value.clone()))
            }
            "minItems" | "maxItems" | "minProperties" | "maxProperties" => {
                bounded(key, value, MAX_ITEMS, at).map(Some)
            }
            "minLength" | "maxLength" => bounded(key, value, MAX_LENGTH, at).map(Some),
            "pattern" => {
                let text = value.as_str().ok_or_else(|| fault(at, "`pattern` is a string"))?;
                self.count(at, text.len())?;
                pattern(text, at)?;
                self.nodes[node].load.add_pattern(regex::size(text));
                Ok(Some(value.clone()))
            }
            "format" => {
                let name = value.as_str().ok_or_else(|| fault(at, "`format` is a string"))?;
                if !FORMATS.contains(&name) {
                    let reason = format!(
                        "the format {name:?} is not supported: leave it out or use `pattern`; supported are {}",
                        FORMATS[..10].join(", ")
                    );
                    return Err(fault(at, reason));
                }
                self.nodes[node].load.add_pattern(merge::FORMAT_SIZE);
                Ok(Some(value.clone()))
            }
            "multipleOf" => {
                self.nodes[node].load.divisors = 1;
                divisor(value, at).map(Some)
            }
            "minimum" | "maximum" => bound(key, value, map, at),
            // Draft 4 had booleans here.
            "exclusiveMinimum" | "exclusiveMaximum" if !value.is_boolean() => bound(key, value, map, at),
            "exclusiveMinimum" | "exclusiveMaximum" => Ok(Some(value.clone())),
            // Annotations, and what nobody defined.
            _ => Ok(None),
        }
    }

    fn list(&mut self, node: usize, list: &[Value], at: &mut String, depth: usize) -> Result<Value, Fault> {
        if list.len() > MAX_OPTIONS {
            return Err(fault(at, format!("{} schemas; at most {MAX_OPTIONS} are supported", list.len())));
        }
        let mut out = Vec::with_capacity(list.len());
        for (i, schema) in list.iter().enumerate() {
            let (kept, index) = inside(at, &i.to_string(), |at| self.schema(schema, at, depth + 1))?;
            self.nodes[node].parts.push(index);
            out.push(kept);
        }
        Ok(Value::Array(out))
    }

    fn reference(
        &mut self,
        node: usize,
        value: &Value,
        at: &str,
        map: &Map<String, Value>,
    ) -> Result<Option<Value>, Fault> {
        let target = value.as_str().ok_or_else(|| fault(at, "`$ref` is a string"))?;
        self.count(at, target.len())?;
        let pointer = target.strip_prefix('#').filter(|p| p.is_empty() || p.starts_with('/'));
        let Some(pointer) = pointer else {
            let reason = format!(
                "the reference {target:?} leaves the schema; only `#` and `#/…` are followed: put it in `$defs`"
            );
            return Err(fault(at, reason));
        };
        let merges = map.keys().any(|key| {
            LIST.contains(&key.as_str()) || ONE.contains(&key.as_str()) || MERGED.contains(&key.as_str())
        });
        let unescaped = percent_decoded(pointer).ok_or_else(|| fault(at, "`$ref` is not a JSON pointer"))?;
        self.nodes[node].reference = Some(unescaped);
        self.nodes[node].merges = merges;
        Ok(Some(value.clone()))
    }

    /// A value of `enum` or `const`.
    fn value(&mut self, value: &Value, at: &str, depth: usize) -> Result<(), Fault> {
        if depth > MAX_DEPTH {
            return Err(fault(at, format!("values nest deeper than {MAX_DEPTH}")));
        }
        match value {
            Value::String(text) => self.count(at, text.len() + 2),
            Value::Array(items) => {
                self.count(at, 2)?;
                items.iter().try_for_each(|item| self.value(item, at, depth + 1))
            }
            Value::Object(map) => map.iter().try_for_each(|(key, item)| {
                self.count(at, key.len() + 3)?;
                self.value(item, at, depth + 1)
            }),
            _ => self.count(at, 8),
        }
    }

    /// Notes which parts must have a value for the whole to have one.
    fn needs(&mut self, node: usize, map: &Map<String, Value>, pointer: &str) {
        let part = |path: String| self.by_pointer.get(&format!("{pointer}{path}")).copied();
        let list = |key: &str| -> Vec<usize> {
            let len = map.get(key).and_then(Value::as_array).map_or(0, Vec::len);
            (0..len).filter_map(|i| part(format!("/{key}/{i}"))).collect()
        };
        let mut all = list("allOf");
        let any: Vec<Vec<usize>> =
            ["anyOf", "oneOf"].into_iter().map(list).filter(|l| !l.is_empty()).collect();
        let may_be = |name: &str| match map.get("type") {
            Some(Value::String(one)) => one == name,
            Some(Value::Array(types)) => types.iter().any(|t| t == name) && types.len() == 1,
            _ => false,
        };
        // Only where the value must be an object or an array do its parts have to exist.
        if may_be("object") {
            for name in map.get("required").and_then(Value::as_array).into_iter().flatten() {
                let name = name.as_str().unwrap_or_default().replace('~', "~0").replace('/', "~1");
                all.extend(part(format!("/properties/{name}")));
            }
        }
        if may_be("array") {
            let min = map.get("minItems").and_then(Value::as_u64).unwrap_or(0) as usize;
            let prefix = list("prefixItems");
            if min > prefix.len() {
                all.extend(part("/items".into()));
            }
            all.extend(prefix.into_iter().take(min));
        }
        let entry = &mut self.nodes[node];
        entry.all = all;
        entry.any = any;
    }

    fn target(&self, node: usize) -> Option<usize> {
        self.nodes[node].reference.as_ref().map(|pointer| self.by_pointer[pointer])
    }

    /// Every reference must point at a schema.
    fn references(&self) -> Result<(), Fault> {
        for node in &self.nodes {
            if let Some(target) = node.reference.as_ref().filter(|t| !self.by_pointer.contains_key(*t)) {
                let at = format!("{}/$ref", node.pointer);
                return Err(fault(&at, format!("there is no schema at #{target}")));
            }
        }
        Ok(())
    }

    /// The compiler follows a reference where it first meets it: bounds how deep that goes.
    fn depth(&self) -> Result<(), Fault> {
        let limit = 2 * MAX_DEPTH;
        let mut seen = vec![false; self.nodes.len()];
        let mut stack = vec![(0, 0)];
        while let Some((node, depth)) = stack.pop() {
            if std::mem::replace(&mut seen[node], true) {
                continue;
            }
            if depth > limit {
                let reason = format!("with references followed, schemas nest deeper than {limit}");
                return Err(fault(&self.nodes[node].pointer, reason));
            }
            let next = self.nodes[node].parts.iter().copied().chain(self.target(node));
            stack.extend(next.map(|n| (n, depth + 1)));
        }
        Ok(())
    }

    /// Bounds what `allOf`, and references beside other keywords, copy.
    fn expansion(&self) -> Result<(), Fault> {
        let mut sizes: Sizes = vec![None; self.nodes.len()];
        let mut total: u64 = 0;
        for (i, node) in self.nodes.iter().enumerate() {
            let holds_all = node.parts.iter().any(|&part| self.step(i, part).starts_with("/allOf/"));
            let is_merge = node.merges || holds_all || node.pointer.contains("/allOf/");
            if is_merge {
                total = total.saturating_add(self.expanded(i, &mut sizes, &mut Vec::new())?);
                if total > MAX_EXPANDED {
                    let reason = format!(
                        "written out, `allOf` and references beside other keywords come to more than {MAX_EXPANDED} schemas"
                    );
                    return Err(fault(&node.pointer, reason));
                }
            }
        }
        Ok(())
    }

    /// Schemas below a node when every reference on the way is copied in, and the alternatives of its groups multiplied
    /// out. A cycle ends where it closes.
    fn expanded(&self, node: usize, sizes: &mut Sizes, path: &mut Vec<usize>) -> Result<u64, Fault> {
        self.factors(node, sizes, path).map(|(size, options)| size.saturating_mul(options))
    }

    /// The two factors of [`expanded`](Self::expanded): groups of alternatives under one `allOf` multiply too.
    fn factors(&self, node: usize, sizes: &mut Sizes, path: &mut Vec<usize>) -> Result<(u64, u64), Fault> {
        if let Some(size) = sizes[node] {
            return Ok(size);
        }
        if path.contains(&node) {
            return Ok((1, 1));
        }
        if path.len() > 4 * MAX_DEPTH {
            return Err(fault(&self.nodes[node].pointer, "references nest too deep"));
        }
        path.push(node);
        let (mut size, mut options): (u64, u64) = (1, 1);
        for part in self.nodes[node].parts.iter().copied().chain(self.target(node)) {
            let (inner, times) = self.factors(part, sizes, path)?;
            if self.target(node) == Some(part) || self.step(node, part).starts_with("/allOf/") {
                size = size.saturating_add(inner);
                options = options.saturating_mul(times);
            } else {
                size = size.saturating_add(inner.saturating_mul(times));
            }
        }
        for group in &self.nodes[node].any {
            options = options.saturating_mul((group.len() as u64).max(1));
        }
        path.pop();
        sizes[node] = Some((size, options));
        Ok((size, options))
    }

    /// How a node's part is reached from it: `/properties/a`.
    fn step(&self, node: usize, part: usize) -> &str {
        self.nodes[part].pointer.strip_prefix(self.nodes[node].pointer.as_str()).unwrap_or_default()
    }

    /// Some finite value must satisfy every schema that the reply cannot avoid.
    fn ends(&self) -> Result<(), Fault> {
        let mut ends = vec![false; self.nodes.len()];
        loop {
            let mut changed = false;
            for (i, node) in self.nodes.iter().enumerate() {
                let all = node.all.iter().copied().chain(self.target(i)).all(|n| ends[n]);
                let now = all && node.any.iter().all(|group| group.iter().any(|&n| ends[n]));
                changed |= now && !ends[i];
                ends[i] |= now;
            }
            if !changed {
                break;
            }
        }
        if ends[0] {
            return Ok(());
        }
        // The deepest need that cannot be met names the place.
        let mut node = 0;
        let mut path = vec![0];
        loop {
            let needed = self.nodes[node].all.iter().copied().chain(self.target(node));
            let next = needed.chain(self.nodes[node].any.iter().flatten().copied()).find(|&n| !ends[n]);
            match next.filter(|n| !path.contains(n)) {
                Some(next) => node = next,
                None => break,
            }
            path.push(node);
        }
        Err(fault(&self.nodes[node].pointer, "this schema needs itself: no finite value satisfies it"))
    }
}

fn bounded(key: &str, value: &Value, limit: u64, at: &str) -> Result<Value, Fault> {
    // 3.0 is an integer too.
    let whole = value.as_f64().filter(|f| f.fract() == 0.0 && (0.0..1e18).contains(f)).map(|f| f as u64);
    match value.as_u64().or(whole) {
        Some(n) if n <= limit => Ok(Value::from(n)),
        Some(n) => Err(fault(at, format!("`{key}` is {n}; at most {limit} is supported"))),
        None => Err(fault(at, format!("`{key}` is a whole number from 0 to {limit}"))),
    }
}

/// `multipleOf`, which is counted in the last decimal it has.
fn divisor(value: &Value, at: &str) -> Result<Value, Fault> {
    let Some(mut scaled) = value.as_f64().map(f64::abs) else {
        return Err(fault(at, "`multipleOf` is a number"));
    };
    let mut decimals = 0;
    while scaled.fract() != 0.0 && decimals <= MAX_DECIMALS {
        scaled *= 10.0;
        decimals += 1;
    }
    if scaled == 0.0 || scaled > MAX_DIVISOR || decimals > MAX_DECIMALS {
        let reason = format!(
            "`multipleOf` {value} is not supported: without its decimal point it is at most {MAX_DIVISOR} and not 0, \
             with at most {MAX_DECIMALS} decimals; leave it out and check the reply"
        );
        return Err(fault(at, reason));
    }
    Ok(value.clone())
}

/// A bound of a number; `None` where every 64-bit number keeps it.
fn bound(key: &str, value: &Value, map: &Map<String, Value>, at: &str) -> Result<Option<Value>, Fault> {
    let Some(limit) = value.as_f64() else { return Err(fault(at, format!("`{key}` is a number"))) };
    let outward = if key.ends_with("inimum") { -limit } else { limit };
    if outward >= WHOLE_END {
        return Ok(None);
    }
    let is_whole = map.get("type").is_some_and(|t| t == "integer");
    let most = if is_whole { WHOLE_END } else { MAX_BOUND };
    if limit.abs() >= most {
        let reason = format!(
            "`{key}` {value} is not supported: bounds lie between -1e15 and 1e15, of integers between -9.2e18 and 9.2e18"
        );
        return Err(fault(at, reason));
    }
    Ok(Some(value.clone()))
}

fn pattern(text: &str, at: &str) -> Result<(), Fault> {
    regex::check(text).map_err(|inner| {
        let reason =
            inner.place.map_or(inner.reason.clone(), |place| format!("at {place}: {}", inner.reason));
        fault(at, reason)
    })
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        if *first == b'%' {
            let digits = std::str::from_utf8(tail.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &tail[2..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8(bytes).ok()
}
