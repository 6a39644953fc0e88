//! A checkpoint's tensors by name: one file or many shards, mapped, bytes in the program itself, or made when asked for.
//! Knows no model; `shapes` does.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use r1_backend::{HostBytes, HostTensor};
use r1_core::DType;

use crate::dummy::Made;
use crate::error::WeightsError;
use crate::header::{self, Entry};
use crate::json::Entries;
use crate::mapping::Mapping;

const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// The largest index that is read; DeepSeek-V3's has 9 MB.
const MAX_INDEX_BYTES: u64 = 256 << 20;

/// One file of the checkpoint.
struct Source {
    name: String,
    bytes: Arc<dyn HostBytes>,
}

/// A tensor and where its bytes come from.
struct Stored {
    dtype: String,
    shape: Vec<usize>,
    place: Place,
}

enum Place {
    /// A range of a source.
    File { source: usize, range: Range<usize> },
    /// No file.
    Made(Made),
}

impl Stored {
    fn size_bytes(&self) -> usize {
        match &self.place {
            Place::File { range, .. } => range.len(),
            Place::Made(made) => made.tensor.size_bytes(),
        }
    }
}

/// What is known of a tensor without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorInfo<'a> {
    /// dtype as safetensors names it; may be one that no weight here can have.
    pub dtype: &'a str,
    /// Sizes of the dimensions.
    pub shape: &'a [usize],
    /// Size in bytes.
    pub size_bytes: usize,
    /// Name of the file that holds it.
    pub file: &'a str,
}

/// The tensors of a model, found by name and never copied: every [`HostTensor`] is a slice of the mapped file (or of what was
/// made of it, see [`Checkpoint::dummy`]).
///
/// safetensors does not align data: a tensor's address need not be a multiple of its element size. Such tensors are
/// handed out all the same; a reader of elements goes through bytes, or copies when the address does not suit it.
pub struct Checkpoint {
    place: String,
    sources: Vec<Source>,
    tensors: HashMap<String, Stored>,
    unindexed: Vec<String>,
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let files: Vec<_> = self.sources.iter().map(|s| &s.name).collect();
        f.debug_struct("Checkpoint")
            .field("place", &self.place)
            .field("files", &files)
            .field("tensors", &self.tensors.len())
            .finish_non_exhaustive()
    }
}

impl Checkpoint {
    /// Maps the weights in `dir`: `model.safetensors`, else the shards of `model.safetensors.index.json`.
    /// Checks every header; reads no weights.
    pub fn open(dir: &Path) -> Result<Self, WeightsError> {
        let single = dir.join(SINGLE);
        if single.exists() {
            let mut checkpoint = Self::empty(dir.display().to_string());
            let entries = checkpoint.add_file(&single, SINGLE)?;
            checkpoint.add_all(0, entries);
            return Ok(checkpoint);
        }
        let index = dir.join(INDEX);
        if index.exists() {
            return Self::open_index(dir, &index);
        }
        Err(WeightsError::NoWeights { dir: dir.to_owned() })
    }

    /// Takes a whole safetensors file that lies in the program (`include_bytes!`), in place; `name` is for errors.
    pub fn from_static(name: &str, bytes: &'static [u8]) -> Result<Self, WeightsError> {
        Self::from_bytes(name, Arc::new(bytes))
    }

    /// Takes a whole safetensors file that someone holds in memory, in place; `name` is for errors.
    pub fn from_bytes(name: &str, bytes: Arc<dyn HostBytes>) -> Result<Self, WeightsError> {
        let mut checkpoint = Self::empty(name.to_owned());
        let entries = header::parse(bytes.bytes(), name)?;
        checkpoint.sources.push(Source { name: name.to_owned(), bytes });
        checkpoint.add_all(0, entries);
        Ok(checkpoint)
    }

    /// Tensors that are in no file.
    pub(crate) fn of_made(place: &str, tensors: impl Iterator<Item = Made>) -> Self {
        let stored = |made: Made| {
            let tensor = &made.tensor;
            let (dtype, shape) = (tensor.dtype().name().to_owned(), tensor.shape().to_vec());
            (tensor.name().to_owned(), Stored { dtype, shape, place: Place::Made(made) })
        };
        Self { tensors: tensors.map(stored).collect(), ..Self::empty(place.to_owned()) }
    }

    fn empty(place: String) -> Self {
        Self { place, sources: Vec::new(), tensors: HashMap::new(), unindexed: Vec::new() }
    }

    fn add_file(&mut self, path: &Path, name: &str) -> Result<Vec<(String, Entry)>, WeightsError> {
        let map =
            Mapping::open(path).map_err(|source| WeightsError::Open { path: path.to_owned(), source })?;
        let entries = header::parse(map.bytes(), name)?;
        self.sources.push(Source { name: name.to_owned(), bytes: Arc::new(map) });
        Ok(entries)
    }

    fn add_all(&mut self, source: usize, entries: Vec<(String, Entry)>) {
        let place = |range| Place::File { source, range };
        let stored = |e: Entry| Stored { dtype: e.dtype, shape: e.shape, place: place(e.range) };
        self.tensors.extend(entries.into_iter().map(|(name, entry)| (name, stored(entry))));
    }

    fn open_index(dir: &Path, index: &Path) -> Result<Self, WeightsError> {
        let mut checkpoint = Self::empty(dir.display().to_string());
        for (file, mut wanted) in read_index(index)? {
            let path = dir.join(&file);
            if !path.exists() {
                return Err(WeightsError::MissingShard { path, tensor: wanted.swap_remove(0) });
            }
            let source = checkpoint.sources.len();
            let mut held: HashMap<String, Entry> = checkpoint.add_file(&path, &file)?.into_iter().collect();
            let mut taken = Vec::with_capacity(wanted.len());
            for tensor in wanted {
                match held.remove(&tensor) {
                    Some(entry) => taken.push((tensor, entry)),
                    None => return Err(WeightsError::NotInShard { tensor, file }),
                }
            }
            checkpoint.add_all(source, taken);
            checkpoint.unindexed.extend(held.into_keys());
        }
        checkpoint.unindexed.sort();
        Ok(checkpoint)
    }

    /// Names of all tensors, in no order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Tensors that a shard holds and the index does not send there: they are not part of the checkpoint. Sorted.
    pub fn unindexed(&self) -> &[String] {
        &self.unindexed
    }

    /// Number of files; 0 for one that is made.
    pub fn num_files(&self) -> usize {
        self.sources.len()
    }

    /// Bytes of all tensors together.
    pub fn size_bytes(&self) -> u64 {
        self.tensors.values().map(|t| t.size_bytes() as u64).sum()
    }

    /// What is known of a tensor without reading it.
    pub fn info(&self, name: &str) -> Option<TensorInfo<'_>> {
        self.tensors.get(name).map(|t| TensorInfo {
            dtype: &t.dtype,
            shape: &t.shape,
            size_bytes: t.size_bytes(),
            file: match &t.place {
                Place::File { source, .. } => &self.sources[*source].name,
                Place::Made(_) => &self.place,
            },
        })
    }

    /// A tensor of whatever shape and (readable) dtype it has, in place.
    pub fn tensor(&self, name: &str) -> Result<HostTensor, WeightsError> {
        let dtype =
            self.dtype_among(name, &[DType::F32, DType::BF16, DType::F16, DType::F8E4M3, DType::U32])?;
        self.slice(&self.tensors[name], dtype)
    }

    /// A tensor in place, refused unless it has exactly `shape` and one of the dtypes `allowed`.
    pub fn take(&self, name: &str, shape: &[usize], allowed: &[DType]) -> Result<HostTensor, WeightsError> {
        let dtype = self.check(name, shape, allowed)?;
        self.slice(&self.tensors[name], dtype)
    }

    /// What [`Checkpoint::take`] checks, without taking.
    pub(crate) fn check(
        &self,
        name: &str,
        shape: &[usize],
        allowed: &[DType],
    ) -> Result<DType, WeightsError> {
        let info = self.info(name).ok_or_else(|| self.missing(name))?;
        if info.shape != shape {
            return Err(WeightsError::ShapeMismatch {
                tensor: name.to_owned(),
                found: info.shape.to_vec(),
                expected: shape.to_vec(),
                file: info.file.to_owned(),
            });
        }
        self.dtype_among(name, allowed)
    }

    fn dtype_among(&self, name: &str, allowed: &[DType]) -> Result<DType, WeightsError> {
        let info = self.info(name).ok_or_else(|| self.missing(name))?;
        let found = info.dtype.parse().ok().filter(|d| allowed.contains(d));
        found.ok_or_else(|| WeightsError::DTypeMismatch {
            tensor: name.to_owned(),
            found: info.dtype.to_owned(),
            shape: info.shape.to_vec(),
            expected: allowed.to_vec(),
            file: info.file.to_owned(),
        })
    }

    fn slice(&self, stored: &Stored, dtype: DType) -> Result<HostTensor, WeightsError> {
        let (bytes, range) = match &stored.place {
            Place::File { source, range } => (self.sources[*source].bytes.clone(), range.clone()),
            Place::Made(made) => made.bytes()?,
        };
        Ok(HostTensor::new(bytes, range, &stored.shape, dtype))
    }

    pub(crate) fn missing(&self, tensor: &str) -> WeightsError {
        let searched = match &self.sources[..] {
            [] => self.place.clone(),
            [one] => format!("{} ({})", self.place, one.name),
            many => format!("{} ({} shards)", self.place, many.len()),
        };
        WeightsError::Missing { tensor: tensor.to_owned(), searched }
    }
}

/// File name → the tensors the index sends there, files in order of name.
fn read_index(path: &Path) -> Result<BTreeMap<String, Vec<String>>, WeightsError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: Entries<String>,
    }

    let open = |source| WeightsError::Open { path: path.to_owned(), source };
    let bad = |reason: String| WeightsError::BadIndex { file: INDEX.to_owned(), reason };
    let size = std::fs::metadata(path).map_err(open)?.len();
    if size > MAX_INDEX_BYTES {
        return Err(bad(format!("it has {size} bytes; at most {MAX_INDEX_BYTES} are read")));
    }
    let text = std::fs::read(path).map_err(open)?;
    let index: Index = serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
    let Entries(mut entries) = index.weight_map;
    if entries.is_empty() {
        return Err(bad("its weight_map is empty".to_owned()));
    }
    entries.sort();
    if let Some(pair) = entries.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(WeightsError::Duplicate { tensor: pair[0].0.clone(), file: INDEX.to_owned() });
    }
    let mut files: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, name) in entries {
        if !is_plain_file_name(&name) {
            return Err(WeightsError::UnsafeFileName { index: INDEX.to_owned(), tensor, name });
        }
        files.entry(name).or_default().push(tensor);
    }
    Ok(files)
}

/// A `.safetensors` name that cannot leave the folder on any system.
fn is_plain_file_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    PathBuf::from(name).extension().is_some_and(|e| e == "safetensors") && name.chars().all(plain)
}
