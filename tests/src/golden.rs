//! Fixtures of `tests/goldens`: a small checkpoint in the official layout and what transformers computes from it.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// Where the fixtures lie: in the repository, or where `R1_GOLDENS` says that a copy of them is.
pub fn goldens_dir() -> PathBuf {
    let copy = std::env::var_os("R1_GOLDENS").map(PathBuf::from);
    copy.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens"))
}

/// One fixture.
pub struct Golden {
    /// The checkpoint's folder.
    pub dir: PathBuf,
    /// golden.json.
    pub facts: Value,
    tensors: Vec<u8>,
}

/// How far logits are from the reference's.
#[derive(Debug)]
pub struct Gap {
    /// Largest |Δlogit|.
    pub max_abs: f32,
    /// Mean |Δlogit|.
    pub mean_abs: f32,
    /// Share of positions with the same largest logit.
    pub argmax_agree: f32,
}

impl Golden {
    /// Opens the fixture of that name.
    ///
    /// # Panics
    /// When it is not there.
    pub fn open(name: &str) -> Self {
        let dir = goldens_dir().join(name);
        let read =
            |file: &str| fs::read(dir.join(file)).unwrap_or_else(|error| panic!("{name}/{file}: {error}"));
        let facts = serde_json::from_slice(&read("golden.json")).expect("golden.json is JSON");
        Self { facts, tensors: read("golden.safetensors"), dir }
    }

    /// Tokens that were fed, from position 0 on.
    ///
    /// # Panics
    /// When the fixture has none.
    pub fn input_ids(&self) -> Vec<u32> {
        let tensors = safetensors::SafeTensors::deserialize(&self.tensors).expect("a whole file");
        let ids = tensors.tensor("input_ids").expect("input_ids");
        ids.data()
            .as_chunks()
            .0
            .iter()
            .map(|&b| u32::try_from(i64::from_le_bytes(b)).expect("an id"))
            .collect()
    }

    /// `[T, V]` row-major.
    ///
    /// # Panics
    /// When the fixture has no such tensor.
    pub fn logits(&self, name: &str) -> Vec<f32> {
        let tensors = safetensors::SafeTensors::deserialize(&self.tensors).expect("a whole file");
        let logits = tensors.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        logits.data().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
    }

    /// A number of golden.json by its path.
    ///
    /// # Panics
    /// When there is none.
    pub fn fact(&self, path: &str) -> f32 {
        self.facts.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no number {path}")) as f32
    }
}

impl Gap {
    /// Compares `[T, V]` logits.
    ///
    /// # Panics
    /// When the sizes differ.
    pub fn between(found: &[f32], expected: &[f32], vocab_size: usize) -> Self {
        assert_eq!(found.len(), expected.len(), "as many logits");
        let deltas = || found.iter().zip(expected).map(|(a, b)| (a - b).abs());
        let argmax = |row: &[f32]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
        let rows = found.chunks_exact(vocab_size).zip(expected.chunks_exact(vocab_size));
        let agree = rows.clone().filter(|(a, b)| argmax(a) == argmax(b)).count();
        Self {
            // A NaN anywhere must not be lost in a maximum.
            max_abs: deltas().fold(0.0, |max, d| if d.is_nan() { f32::NAN } else { f32::max(max, d) }),
            mean_abs: deltas().sum::<f32>() / found.len() as f32,
            argmax_agree: agree as f32 / rows.len() as f32,
        }
    }
}
