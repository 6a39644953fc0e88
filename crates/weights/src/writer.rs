//! Random checkpoints as files, in the layout of the published ones: shards, their index, config.json. One tensor at a time is
//! in memory. Knows the names of the files, and no tensor.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::checkpoint::INDEX;
use crate::config::ConfigJson;
use crate::dummy::{DummyTensor, dummy_tensors};
use crate::error::WeightsError;

/// Each tensor of a shard begins at a multiple of this, as far as the sizes of those before it allow.
const ALIGN: usize = 64;

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Files of weights.
    pub shards: usize,
    /// Bytes of all tensors.
    pub size_bytes: u64,
}

/// Writes the checkpoint of [`crate::Checkpoint::dummy`] of `config` and `seed`, and `config` itself, into the new or empty
/// folder `dir`, in shards of at most `shard_bytes` (a larger tensor has one of its own). `progress` is told the bytes that are
/// written.
///
/// # Errors
/// [`WeightsError::Config`] for a config.json that means no model, [`WeightsError::NotEmpty`] and [`WeightsError::Write`].
pub fn write_dummy(
    config: &ConfigJson,
    seed: u64,
    dir: &Path,
    shard_bytes: u64,
    progress: &mut dyn FnMut(u64),
) -> Result<Written, WeightsError> {
    let model = config.model()?;
    fs::create_dir_all(dir).map_err(write_error(dir))?;
    if fs::read_dir(dir).map_err(write_error(dir))?.next().is_some() {
        return Err(WeightsError::NotEmpty { dir: dir.to_owned() });
    }
    let shards = shards(dummy_tensors(&model, seed), shard_bytes);
    let mut weight_map = Map::new();
    let mut size_bytes = 0;
    for (i, tensors) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        weight_map.extend(tensors.iter().map(|tensor| (tensor.name().to_owned(), json!(name))));
        let path = dir.join(&name);
        write_shard(&path, tensors, &mut |bytes| {
            size_bytes += bytes;
            progress(size_bytes);
        })
        .map_err(write_error(&path))?;
    }
    let index = json!({"metadata": {"total_size": size_bytes}, "weight_map": weight_map});
    write_json(&dir.join(INDEX), &index)?;
    write_json(&dir.join("config.json"), &Value::Object(config.fields().clone()))?;
    Ok(Written { shards: shards.len(), size_bytes })
}

fn write_error(path: &Path) -> impl Fn(io::Error) -> WeightsError {
    let path: PathBuf = path.to_owned();
    move |source| WeightsError::Write { path: path.clone(), source }
}

fn write_json(path: &Path, value: &Value) -> Result<(), WeightsError> {
    let write = || -> io::Result<()> {
        let mut file = io::BufWriter::new(File::create(path)?);
        serde_json::to_writer_pretty(&mut file, value)?;
        file.write_all(b"\n")?;
        file.flush()
    };
    write().map_err(write_error(path))
}

/// Runs of tensors of at most `shard_bytes` each. In each, those that end at a multiple of [`ALIGN`] come first.
fn shards(tensors: impl Iterator<Item = DummyTensor>, shard_bytes: u64) -> Vec<Vec<DummyTensor>> {
    let mut shards = vec![Vec::new()];
    let mut room = shard_bytes;
    for tensor in tensors {
        let size = tensor.size_bytes() as u64;
        if size > room && shards.last().is_some_and(|shard| !shard.is_empty()) {
            shards.push(Vec::new());
            room = shard_bytes;
        }
        room = room.saturating_sub(size);
        shards.last_mut().expect("there is always one").push(tensor);
    }
    for shard in &mut shards {
        shard.sort_by_key(|tensor| !tensor.size_bytes().is_multiple_of(ALIGN));
    }
    shards
}

fn write_shard(path: &Path, tensors: &[DummyTensor], wrote: &mut dyn FnMut(u64)) -> io::Result<()> {
    // Names of tensors need no escapes.
    let mut header = String::from(r#"{"__metadata__":{"format":"pt"}"#);
    let mut end = 0;
    for tensor in tensors {
        let (name, dtype, shape) = (tensor.name(), tensor.dtype(), tensor.shape());
        let range = [end, end + tensor.size_bytes()];
        write!(header, r#","{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":{range:?}}}"#)
            .expect("a string has room");
        end = range[1];
    }
    header.push('}');
    let data = (header.len() + size_of::<u64>()).next_multiple_of(ALIGN);
    header.push_str(&" ".repeat(data - size_of::<u64>() - header.len()));

    let mut file = File::create_new(path)?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    let mut bytes = Vec::new();
    for tensor in tensors {
        bytes.resize(tensor.size_bytes(), 0);
        tensor.write_to(&mut bytes);
        file.write_all(&bytes)?;
        wrote(bytes.len() as u64);
    }
    Ok(())
}
