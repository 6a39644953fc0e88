//! Bounds what a template's single steps may cost. The engine's fuel counts instructions; one instruction can double a
//! string, or write down a list that holds another twice, 40 times over. So a compiled template gets further instructions
//! behind those that make values and text, which charge them to the rendering's allowance. Knows nothing of messages.
//!
//! This takes the engine's own instructions apart, which it promises to no one: the tests beside the templates' tell when a
//! new version of it is different.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use minijinja::machinery::{
    CompiledTemplate, Instruction, Instructions, TemplateConfig, eval, make_string_output,
};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind};

use crate::python::{check, to_python_str};

/// What a rendering may cost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Instructions.
    pub(crate) fuel: u64,
    /// Longest text.
    pub(crate) max_bytes: usize,
    /// Text and values on the way there, in all.
    pub(crate) made_bytes: usize,
}

/// The names cannot be written in a template.
const CHARGE: &str = "charge!";
const SPEND: &str = "spend!";

/// No caching of the filter between instructions: the engine's caches are few and the template's own.
const NOT_CACHED: u8 = u8::MAX;

/// Text between tags that is longer is charged each time it is written, shorter text is left to the fuel.
const FREE_TEXT_BYTES: usize = 64;

/// What a value costs beside its text, in bytes.
const VALUE_BYTES: usize = 64;

/// Deeper values are refused: whatever walks through one needs a stack that deep.
const MAX_DEPTH: usize = 256;

/// Bytes that may yet be made.
struct Allowance(AtomicUsize);

impl Allowance {
    fn spend(&self, bytes: usize) -> Result<(), Error> {
        // Rendering has one thread, which nothing else shares an allowance with.
        if let Some(left) = self.0.load(Ordering::Relaxed).checked_sub(bytes) {
            self.0.store(left, Ordering::Relaxed);
            return Ok(());
        }
        let what = "the template makes more text than a prompt may have";
        Err(Error::new(ErrorKind::InvalidOperation, what))
    }

    /// Charges a value with all that it holds, as often as it holds it.
    fn charge(&self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            let what = format!("a value is nested deeper than {MAX_DEPTH}");
            return Err(Error::new(ErrorKind::InvalidOperation, what));
        }
        self.spend(VALUE_BYTES + value.as_str().map_or(0, str::len))?;
        let is_map = match value.kind() {
            ValueKind::Map => true,
            ValueKind::Seq | ValueKind::Iterable => false,
            _ => return Ok(()),
        };
        // What has no length makes its items as they are asked for.
        let Some(len) = value.len() else { return Ok(()) };
        if len > self.0.load(Ordering::Relaxed) / VALUE_BYTES {
            return self.spend(usize::MAX);
        }
        for item in value.try_iter()? {
            if is_map {
                self.charge(&value.get_item(&item)?, depth + 1)?;
            }
            self.charge(&item, depth + 1)?;
        }
        Ok(())
    }
}

/// A template, compiled once for all its renderings.
pub(crate) struct Program<'s> {
    instructions: Instructions<'s>,
    blocks: BTreeMap<&'s str, Instructions<'s>>,
}

impl fmt::Debug for Program<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Program").finish_non_exhaustive()
    }
}

impl<'s> Program<'s> {
    /// Compiles `source` and puts the charges in.
    pub(crate) fn compile(source: &'s str, syntax: SyntaxConfig) -> Result<Self, Error> {
        let config =
            TemplateConfig { syntax_config: syntax, default_auto_escape: Arc::new(|_| AutoEscape::None) };
        let compiled = CompiledTemplate::new("chat_template", source, &config)?;
        Ok(Self {
            instructions: metered(&compiled.instructions, source),
            blocks: compiled.blocks.iter().map(|(name, block)| (*name, metered(block, source))).collect(),
        })
    }

    /// Renders in `env` within limits.
    pub(crate) fn render(
        &self,
        mut env: Environment<'static>,
        context: Value,
        limits: Limits,
    ) -> Result<String, Error> {
        let Limits { fuel, max_bytes, made_bytes } = limits;
        env.set_fuel(Some(fuel));
        let made = Arc::new(Allowance(AtomicUsize::new(made_bytes)));
        let allowance = Arc::clone(&made);
        env.add_filter(CHARGE, move |value: &Value| {
            allowance.charge(value, 0)?;
            Ok::<_, Error>(value.clone())
        });
        let allowance = Arc::clone(&made);
        env.add_filter(SPEND, move |bytes: usize| allowance.spend(bytes));
        env.set_formatter(move |out, _, value| {
            check(value)?;
            let text = to_python_str(value)?;
            made.spend(text.len())?;
            out.write_str(&text).map_err(Error::from)
        });

        let mut text = String::new();
        let out = &mut make_string_output(&mut text);
        eval(&env, &self.instructions, context, &self.blocks, out, AutoEscape::None)?;
        if text.len() > max_bytes {
            let what = format!("the prompt is longer than {max_bytes} bytes");
            return Err(Error::new(ErrorKind::InvalidOperation, what));
        }
        Ok(text)
    }
}

/// The same instructions, with charges between them.
fn metered<'s>(plain: &Instructions<'s>, source: &'s str) -> Instructions<'s> {
    let all = || (0..).map_while(|i| plain.get(i));
    // Where each instruction, and the end, comes to stand.
    let mut places = vec![0];
    for instruction in all() {
        let charges = before(instruction).len() + after(instruction).len();
        places.push(places[places.len() - 1] + 1 + charges as u32);
    }
    let mut out = Instructions::new("chat_template", source);
    for (i, instruction) in (0..).zip(all()) {
        let mut moved = instruction.clone();
        match &mut moved {
            Instruction::Jump(target)
            | Instruction::JumpIfFalse(target)
            | Instruction::JumpIfFalseOrPop(target)
            | Instruction::JumpIfTrueOrPop(target)
            | Instruction::Iterate(target)
            | Instruction::BuildMacro(_, target, _) => *target = places[*target as usize],
            _ => {}
        }
        for instruction in before(instruction).into_iter().chain([moved]).chain(after(instruction)) {
            match (plain.get_span(i), plain.get_line(i)) {
                (Some(span), _) => out.add_with_span(instruction, span),
                (None, Some(line)) => out.add_with_line(instruction, line.try_into().unwrap_or(u16::MAX)),
                (None, None) => out.add(instruction),
            };
        }
    }
    out
}

fn charge() -> Instruction<'static> {
    Instruction::ApplyFilter(CHARGE, Some(1), NOT_CACHED)
}

/// Charges for what an instruction is about to write down or to keep.
fn before(instruction: &Instruction<'_>) -> Vec<Instruction<'static>> {
    match instruction {
        // Both operands are written down, whatever they are.
        Instruction::StringConcat => vec![charge(), Instruction::Swap, charge(), Instruction::Swap],
        _ => Vec::new(),
    }
}

/// Charges for the value that an instruction leaves on the stack, or for the text that it wrote.
fn after(instruction: &Instruction<'_>) -> Vec<Instruction<'static>> {
    match instruction {
        Instruction::Add
        | Instruction::Mul
        | Instruction::StringConcat
        | Instruction::Slice
        | Instruction::EndCapture
        | Instruction::BuildList(_)
        | Instruction::BuildTuple(_)
        | Instruction::BuildMap(_)
        | Instruction::ApplyFilter(..)
        | Instruction::CallFunction(..)
        | Instruction::CallMethod(..)
        | Instruction::CallObject(_) => vec![charge()],
        // The engine works out at once what is constant.
        Instruction::LoadConst(value) if is_large(value) => vec![charge()],
        Instruction::EmitRaw(text) if text.len() > FREE_TEXT_BYTES => vec![
            Instruction::LoadConst(Value::from(text.len())),
            Instruction::ApplyFilter(SPEND, Some(1), NOT_CACHED),
            Instruction::DiscardTop,
        ],
        _ => Vec::new(),
    }
}

fn is_large(value: &Value) -> bool {
    match value.kind() {
        ValueKind::String => value.as_str().is_some_and(|text| text.len() > FREE_TEXT_BYTES),
        // A constant map is as long as its source, and may be keyword arguments, which no filter gives back.
        ValueKind::Seq | ValueKind::Iterable => true,
        _ => false,
    }
}
