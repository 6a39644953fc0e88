//! The header of a safetensors file, checked until every byte range in it can be trusted. Knows no model.
//!
//! Stricter than the format's own crate where a checkpoint can be wrong, and every refusal names the tensor: names are
//! unique, ranges lie end to end from the first data byte to the last of the file, and each has the size that shape
//! and dtype imply. Nothing is allocated by what the header claims, only by how long it is.

use std::ops::Range;

use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::error::WeightsError;
use crate::json::Entries;

/// Bytes of the length that precedes the header.
const LENGTH_BYTES: usize = 8;
/// The format's limit on a header.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// More dimensions than any weight has.
const MAX_RANK: usize = 8;
/// The key that holds free text instead of a tensor.
const METADATA: &str = "__metadata__";

/// Where a tensor lies in its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// dtype as safetensors names it.
    pub(crate) dtype: String,
    pub(crate) shape: Vec<usize>,
    /// In bytes from the start of the file.
    pub(crate) range: Range<usize>,
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [usize; 2],
}

/// A tensor or the free text; which of them is allowed depends on the key.
#[derive(Deserialize)]
#[serde(untagged)]
enum RawValue {
    Tensor(RawEntry),
    Text(Entries<String>),
    Other(IgnoredAny),
}

/// Bits per element of every dtype that safetensors defines, also those that no weight here may have.
fn bits(dtype: &str) -> Option<usize> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 8,
        "I16" | "U16" | "F16" | "BF16" => 16,
        "I32" | "U32" | "F32" => 32,
        "C64" | "F64" | "I64" | "U64" => 64,
        _ => return None,
    })
}

/// Reads and checks the header of `bytes`, a whole safetensors file; `file` is its name for errors.
pub(crate) fn parse(bytes: &[u8], file: &str) -> Result<Vec<(String, Entry)>, WeightsError> {
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(WeightsError::LfsPlaceholder { file: file.to_owned() });
    }
    let bad = |reason: String| WeightsError::BadHeader { file: file.to_owned(), reason };
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(bad(format!("the file has {} bytes, fewer than the header's length takes", bytes.len())));
    };
    let header_bytes = u64::from_le_bytes(*length);
    if header_bytes > MAX_HEADER_BYTES || header_bytes > rest.len() as u64 {
        return Err(WeightsError::HeaderTooLong {
            file: file.to_owned(),
            header_bytes,
            file_bytes: bytes.len() as u64,
            limit_bytes: MAX_HEADER_BYTES,
        });
    }
    let (header, data) = rest.split_at(header_bytes as usize);
    let Entries(raw) = serde_json::from_slice::<Entries<RawValue>>(header).map_err(|e| bad(e.to_string()))?;

    let data_start = LENGTH_BYTES + header.len();
    let mut entries = Vec::with_capacity(raw.len());
    let mut has_text = false;
    for (name, value) in raw {
        let entry = match value {
            RawValue::Text(Entries(_)) if name == METADATA => {
                if std::mem::replace(&mut has_text, true) {
                    return Err(WeightsError::Duplicate { tensor: name, file: file.to_owned() });
                }
                continue;
            }
            _ if name == METADATA => Err("it must hold strings only".to_owned()),
            RawValue::Tensor(raw) => check_entry(&raw, data_start),
            RawValue::Text(_) | RawValue::Other(_) => {
                Err("it must have dtype, shape and two data_offsets".to_owned())
            }
        };
        match entry {
            Ok(entry) => entries.push((name, entry)),
            Err(reason) => {
                return Err(WeightsError::BadEntry { tensor: name, file: file.to_owned(), reason });
            }
        }
    }
    check_layout(&mut entries, data_start, data.len(), file)?;
    Ok(entries)
}

/// One entry by itself: a known dtype, and a range of the size that shape and dtype imply.
fn check_entry(raw: &RawEntry, data_start: usize) -> Result<Entry, String> {
    let bits = bits(&raw.dtype).ok_or_else(|| format!("dtype {:?} is unknown", raw.dtype))?;
    if raw.shape.len() > MAX_RANK {
        return Err(format!("{} dimensions, more than {MAX_RANK}", raw.shape.len()));
    }
    let [start, end] = raw.data_offsets;
    let size_bits = raw.shape.iter().try_fold(bits, |n, &d| n.checked_mul(d));
    let size = size_bits.filter(|n| n.is_multiple_of(8)).map(|n| n / 8);
    match size.zip(end.checked_sub(start)) {
        Some((needed, has)) if needed == has => {}
        _ => {
            let size = size.map_or("no whole number of".to_owned(), |n| n.to_string());
            return Err(format!(
                "{:?} of {} takes {size} bytes, data_offsets are {start}..{end}",
                raw.shape, raw.dtype
            ));
        }
    }
    let range = start.checked_add(data_start).zip(end.checked_add(data_start));
    let (start, end) = range.ok_or_else(|| format!("data_offsets {start}..{end} overflow"))?;
    Ok(Entry { dtype: raw.dtype.clone(), shape: raw.shape.clone(), range: start..end })
}

/// All entries together: unique names, ranges end to end over the whole of the data. Sorts by position.
fn check_layout(
    entries: &mut [(String, Entry)],
    data_start: usize,
    data_len: usize,
    file: &str,
) -> Result<(), WeightsError> {
    entries.sort_by(|(a, _), (b, _)| a.cmp(b));
    if let Some(pair) = entries.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(WeightsError::Duplicate { tensor: pair[0].0.clone(), file: file.to_owned() });
    }
    entries.sort_by_key(|(_, e)| (e.range.start, e.range.end));
    let mut end = data_start;
    for (name, entry) in &*entries {
        let start = entry.range.start;
        if start != end {
            let what = if start < end { "overlaps the tensor before it" } else { "leaves a hole before it" };
            let reason = format!("it starts at byte {start}, which {what}, at {end}");
            return Err(WeightsError::BadEntry { tensor: name.clone(), file: file.to_owned(), reason });
        }
        end = entry.range.end;
    }
    let file_end = data_start + data_len;
    if end > file_end {
        let tensor = entries.last().map_or_else(String::new, |(name, _)| name.clone());
        let (needed_bytes, file_bytes) = (end as u64, file_end as u64);
        return Err(WeightsError::Truncated { tensor, file: file.to_owned(), needed_bytes, file_bytes });
    }
    if end < file_end {
        return Err(WeightsError::TrailingBytes {
            file: file.to_owned(),
            extra_bytes: (file_end - end) as u64,
        });
    }
    Ok(())
}
