//! Everything that can be wrong with a checkpoint's weights, each with the tensor, the shapes and the file.

use std::fmt;
use std::path::PathBuf;

use r1_core::DType;

use crate::config::ConfigError;

/// A checkpoint that cannot be used, or a tensor that cannot be handed out.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// A file cannot be opened or mapped.
    #[error("cannot open {}: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The folder has no safetensors.
    #[error("{} has neither model.safetensors nor model.safetensors.index.json; only safetensors are read", dir.display())]
    NoWeights {
        /// The folder.
        dir: PathBuf,
    },
    /// A placeholder that Git LFS left in place of the file.
    #[error("{file} is a Git LFS placeholder, not the weights: run `git lfs pull`, or download the file")]
    LfsPlaceholder {
        /// The file.
        file: String,
    },
    /// The header is longer than the file, or than any real header.
    #[error(
        "{file}: header of {header_bytes} bytes in a file of {file_bytes} (at most {limit_bytes} are read): truncated, or no safetensors file"
    )]
    HeaderTooLong {
        /// The file.
        file: String,
        /// What the first 8 bytes say.
        header_bytes: u64,
        /// Size of the file.
        file_bytes: u64,
        /// The largest header that is read.
        limit_bytes: u64,
    },
    /// The header is not what safetensors defines.
    #[error("{file}: bad safetensors header: {reason}")]
    BadHeader {
        /// The file.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// A tensor's entry contradicts itself or its neighbours.
    #[error("{file}: header entry of {tensor}: {reason}")]
    BadEntry {
        /// The tensor.
        tensor: String,
        /// The file.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// Two entries of one name.
    #[error("{file}: {tensor} stands there twice")]
    Duplicate {
        /// The tensor.
        tensor: String,
        /// The file.
        file: String,
    },
    /// The file ends before its tensors do.
    #[error(
        "{file} is truncated: {tensor} ends at byte {needed_bytes}, the file at {file_bytes}; download it again"
    )]
    Truncated {
        /// The tensor that ends last.
        tensor: String,
        /// The file.
        file: String,
        /// Size that the header implies.
        needed_bytes: u64,
        /// Size of the file.
        file_bytes: u64,
    },
    /// The file goes on after its tensors.
    #[error("{file}: {extra_bytes} bytes after the last tensor")]
    TrailingBytes {
        /// The file.
        file: String,
        /// How many.
        extra_bytes: u64,
    },
    /// model.safetensors.index.json cannot be used.
    #[error("{file}: {reason}")]
    BadIndex {
        /// The index.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// The index points outside its folder.
    #[error(
        "{index}: {tensor} is said to lie in {name:?}; only plain names of .safetensors files beside the index are followed"
    )]
    UnsafeFileName {
        /// The index.
        index: String,
        /// A tensor said to lie there.
        tensor: String,
        /// The name.
        name: String,
    },
    /// A shard that the index names does not exist.
    #[error("{} is named by the index ({tensor} lies there) but does not exist; download it", path.display())]
    MissingShard {
        /// Where it should be.
        path: PathBuf,
        /// A tensor said to lie there.
        tensor: String,
    },
    /// The index names a file that does not hold the tensor.
    #[error("{tensor}: the index says {file}, which does not hold it")]
    NotInShard {
        /// The tensor.
        tensor: String,
        /// The file.
        file: String,
    },
    /// A tensor that nothing in the checkpoint holds.
    #[error("{tensor} is missing; searched {searched}")]
    Missing {
        /// The tensor.
        tensor: String,
        /// The file or files.
        searched: String,
    },
    /// A shape other than the config implies.
    #[error("{tensor}: {file} has shape {found:?}, config.json implies {expected:?}")]
    ShapeMismatch {
        /// The tensor.
        tensor: String,
        /// In the checkpoint.
        found: Vec<usize>,
        /// From the config.
        expected: Vec<usize>,
        /// The file.
        file: String,
    },
    /// A dtype that cannot be read in this place.
    #[error("{tensor}: {file} has dtype {found} (shape {shape:?}), supported here: {}", List(expected))]
    DTypeMismatch {
        /// The tensor.
        tensor: String,
        /// In the checkpoint, as safetensors names it.
        found: String,
        /// Its shape.
        shape: Vec<usize>,
        /// What can be read.
        expected: Vec<DType>,
        /// The file.
        file: String,
    },
    /// FP8 data without a declared format.
    #[error(
        "{tensor} in {file} is F8_E4M3, but config.json has no quantization_config that says how it is scaled"
    )]
    Fp8WithoutConfig {
        /// The tensor.
        tensor: String,
        /// The file.
        file: String,
    },
    /// A block's scale that no quantiser writes.
    #[error(
        "{tensor} in {file}: scale {value} at {index:?}; scales lie between 0 and 7.5e35, where the weights they scale are finite"
    )]
    BadScale {
        /// The scale tensor.
        tensor: String,
        /// Row and column of the scale.
        index: [usize; 2],
        /// The scale.
        value: f32,
        /// The file.
        file: String,
    },
    /// The three tensors of an AWQ weight do not fit each other.
    #[error(
        "{prefix}: qweight, qzeros and scales {found:?} are no AWQ weight, which has [K, N / 8] and [K / group, N / 8] I32 (read as U32) and [K / group, N] F16, with a group that is a multiple of 8"
    )]
    AwqMismatch {
        /// The layer.
        prefix: String,
        /// Shape and dtype of its qweight, qzeros and scales.
        found: Box<[(Vec<usize>, DType); 3]>,
    },
    /// A group's scale that no quantiser writes.
    #[error("{prefix}: AWQ scale {value} at {index:?} is not finite")]
    AwqScale {
        /// The layer.
        prefix: String,
        /// Group and output of the scale.
        index: [usize; 2],
        /// The scale.
        value: f32,
    },
    /// A dimension that cannot be shared out evenly.
    #[error("{tensor}: {dim} = {size} cannot be divided among {world} ranks")]
    NotDivisible {
        /// The tensor.
        tensor: String,
        /// `rows (N)` or `columns (K)`.
        dim: &'static str,
        /// Its size.
        size: usize,
        /// Ranks.
        world: usize,
    },
    /// A shard that must be copied, or a tensor that must be made, does not fit.
    #[error(
        "{tensor}: no room for {requested_bytes} bytes, this rank's part of it in memory; take a smaller model"
    )]
    NoRoom {
        /// The tensor.
        tensor: String,
        /// Its size.
        requested_bytes: usize,
    },
    /// A config.json that means no model.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file of a new checkpoint cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file, or its folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A new checkpoint would lie among other files.
    #[error("{} is not empty; name a new folder", dir.display())]
    NotEmpty {
        /// The folder.
        dir: PathBuf,
    },
    /// A weight that codes in groups cannot stand for.
    #[error(
        "{tensor}: row {row} holds values up to {largest}, which cannot be quantized (NaN, infinite, or too large for the scales); \
         load the checkpoint as stored"
    )]
    Unquantizable {
        /// The tensor.
        tensor: String,
        /// The row, counted in this rank's shard.
        row: usize,
        /// Its largest magnitude; NaN where it holds one.
        largest: f32,
    },
    /// The checkpoint and config.json disagree about more than one tensor.
    #[error("the checkpoint disagrees with config.json about {total} tensors:{}", Lines(problems, *total))]
    Disagrees {
        /// The first of them.
        problems: Vec<WeightsError>,
        /// How many there are.
        total: usize,
    },
}

struct List<'a>(&'a [DType]);

impl fmt::Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, dtype) in self.0.iter().enumerate() {
            write!(f, "{}{dtype}", if i == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

struct Lines<'a>(&'a [WeightsError], usize);

impl fmt::Display for Lines<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for problem in self.0 {
            write!(f, "\n  {problem}")?;
        }
        match self.1 - self.0.len() {
            0 => Ok(()),
            more => write!(f, "\n  and {more} more"),
        }
    }
}
