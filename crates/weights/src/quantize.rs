//! Weights quantised at load: 8-bit or 4-bit codes in groups along K, from dense weights or FP8 blocks. Knows no layer by name
//! and no device.
//!
//! Groups are fixed in the whole matrix, so that a rank's shard holds the values that the whole has there, wherever it is cut.
//! A row is widened to F32 and quantised before the next one: beside the result only a few rows exist.

mod int4;
mod int8;
mod rows;

use std::num::NonZero;
use std::ops::Range;
use std::thread;

use r1_backend::HostTensor;
use r1_core::DType;

use crate::awq::HostInt4;
use crate::checkpoint::Checkpoint;
use crate::config::Fp8BlockConfig;
use crate::error::WeightsError;
use crate::linear::{Cut, HostLinear, Partition};
use rows::Rows;

/// Inputs that share a scale, in both formats. Of 32, 64 and 128 the one with the least error for its bytes: on normal weights
/// int4 is off by 0.078, 0.088 and 0.096 of their root mean square at 5, 4.5 and 4.25 bits each, and half a bit is worth a
/// factor of 1.4.
pub const QUANTIZED_GROUP: usize = 128;
/// Values that are worth a thread.
const THREAD_VALUES: usize = 1 << 17;

/// What a weight is quantised to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuantizedFormat {
    /// 8-bit codes and an F32 scale per group, symmetric: the group's largest magnitude is ±127.
    Int8,
    /// 4-bit codes with an F16 scale and an F16 zero per group, the scale searched for the least squared error.
    Int4,
}

/// A quantised linear weight in host memory.
#[derive(Clone, Debug)]
pub enum HostQuantized {
    /// Element `(n, k)` is `data[n, k] · scales[n, (k + offset) / group]`.
    Int8 {
        /// `[N, K]` I8, -127 to 127.
        data: HostTensor,
        /// `[N, ceil((K + offset) / group)]` F32.
        scales: HostTensor,
        /// Inputs that share a scale.
        group: usize,
        /// Where column 0 lies in its group: not 0 when the shard's cut falls inside one.
        offset: usize,
    },
    /// Element `(n, k)` is `(code[n, k] - zeros[n, k / group]) · scales[n, k / group]`.
    Int4(HostInt4),
}

impl HostQuantized {
    /// Bytes of codes, scales and zeros.
    pub fn size_bytes(&self) -> usize {
        match self {
            Self::Int8 { data, scales, .. } => data.bytes().len() + scales.bytes().len(),
            Self::Int4(w) => w.codes.bytes().len() + w.zeros.bytes().len() + w.scales.bytes().len(),
        }
    }
}

impl QuantizedFormat {
    /// Whether columns `columns` of a matrix can have it: int4 rows are whole words of eight columns.
    pub fn takes(self, columns: &Range<usize>) -> bool {
        match self {
            Self::Int8 => true,
            Self::Int4 => [columns.start, columns.end].iter().all(|column| column.is_multiple_of(8)),
        }
    }

    /// [`HostQuantized::size_bytes`] of columns `columns` of `rows` rows, without quantising them.
    pub fn size_bytes(self, rows: usize, columns: &Range<usize>) -> usize {
        match self {
            Self::Int8 => rows * (columns.len() + 4 * groups_touched(columns).len()),
            Self::Int4 => rows * (columns.len() / 2 + 4 * columns.len().div_ceil(int4::shard_group(columns))),
        }
    }
}

/// Groups of the whole matrix that columns lie in.
fn groups_touched(columns: &Range<usize>) -> Range<usize> {
    columns.start / QUANTIZED_GROUP..columns.end.div_ceil(QUANTIZED_GROUP)
}

impl Checkpoint {
    /// [`Checkpoint::linear`], quantised. The pages that it was read from are given back.
    ///
    /// # Errors
    /// Those of [`Checkpoint::linear`], and [`WeightsError::Unquantizable`] for a weight with values that are not finite, or
    /// too large for the scales.
    ///
    /// # Panics
    /// As [`Checkpoint::linear`], and when the format does not take the columns (see [`QuantizedFormat::takes`]).
    pub fn quantized(
        &self,
        prefix: &str,
        n: usize,
        k: usize,
        quant: Option<&Fp8BlockConfig>,
        partition: Partition,
        format: QuantizedFormat,
        threads: usize,
    ) -> Result<HostQuantized, WeightsError> {
        let tensor = format!("{prefix}.weight");
        // Columns are cut while they are read: groups that a cut parts are looked at whole.
        let (stored, columns) = match (partition, Cut::new(&tensor, n, k, partition)?) {
            (_, Cut::Columns(start, len)) => (Partition::Replicated, start..start + len),
            (Partition::Column { .. } | Partition::Rows { .. }, _) => (partition, 0..k),
            _ => (Partition::Replicated, 0..k),
        };
        let host = self.linear(prefix, n, k, quant, stored)?;
        let quantized = quantize(&tensor, &host, columns, format, threads)?;
        host.discard();
        Ok(quantized)
    }
}

/// Columns `columns` of a weight, quantised by up to `threads` threads; `tensor` is for errors.
///
/// # Errors
/// [`WeightsError::Unquantizable`] and [`WeightsError::NoRoom`].
///
/// # Panics
/// When the columns do not exist, or the format does not take them (see [`QuantizedFormat::takes`]).
pub fn quantize(
    tensor: &str,
    host: &HostLinear,
    columns: Range<usize>,
    format: QuantizedFormat,
    threads: usize,
) -> Result<HostQuantized, WeightsError> {
    let [_, k] = host.shape();
    assert!(columns.start < columns.end && columns.end <= k, "{tensor}: columns {columns:?} of {k}");
    assert!(format.takes(&columns), "{tensor}: {format:?} of columns {columns:?}");
    let job = Job { tensor, rows: Rows::new(host), columns, threads };
    match format {
        QuantizedFormat::Int8 => int8::quantize(&job),
        QuantizedFormat::Int4 => int4::quantize(&job),
    }
}

/// A weight on its way.
struct Job<'a> {
    tensor: &'a str,
    rows: Rows<'a>,
    columns: Range<usize>,
    threads: usize,
}

impl Job<'_> {
    /// Columns of the groups that the job's columns lie in.
    fn whole_groups(&self) -> Range<usize> {
        let groups = groups_touched(&self.columns);
        groups.start * QUANTIZED_GROUP..(groups.end * QUANTIZED_GROUP).min(self.rows.cols())
    }

    /// Zeroed bytes of `N` rows of `row_bytes`.
    fn room(&self, row_bytes: usize) -> Result<Vec<u8>, WeightsError> {
        let mut out = Vec::new();
        let requested_bytes = self.rows.len() * row_bytes;
        out.try_reserve_exact(requested_bytes)
            .map_err(|_| WeightsError::NoRoom { tensor: self.tensor.to_owned(), requested_bytes })?;
        out.resize(requested_bytes, 0);
        Ok(out)
    }

    /// Calls `quantize` with each row's values in whole groups and its parts of `outs`, rows shared out among threads; it gives
    /// back whether the row could be quantised.
    fn each_row<const OUTS: usize>(
        &self,
        outs: [&mut [u8]; OUTS],
        quantize: impl Fn(&[f32], [&mut [u8]; OUTS]) -> bool + Sync,
    ) -> Result<(), WeightsError> {
        let (rows, columns) = (self.rows.len(), self.whole_groups());
        let wanted = (rows * columns.len()).div_ceil(THREAD_VALUES).min(self.threads).max(1);
        let per_thread = rows.div_ceil(wanted).max(1);
        let row_bytes = outs.each_ref().map(|out| out.len() / rows.max(1));
        let work = |first: usize, outs: [&mut [u8]; OUTS]| {
            let mut values = vec![0.0; columns.len()];
            let mut outs = outs.map(Some);
            for row in first..rows.min(first + per_thread) {
                self.rows.widen(row, columns.start, &mut values);
                let parts = std::array::from_fn(|i| {
                    let (part, rest) = outs[i].take().expect("put back").split_at_mut(row_bytes[i]);
                    outs[i] = Some(rest);
                    part
                });
                if !quantize(&values, parts) {
                    return Some(row);
                }
            }
            None
        };
        let mut shares =
            outs.into_iter().zip(row_bytes).map(|(out, bytes)| out.chunks_mut((per_thread * bytes).max(1)));
        let mut shares: [_; OUTS] = std::array::from_fn(|_| shares.next().expect("one for each output"));
        let failed = thread::scope(|scope| {
            let work = &work;
            let mut running = Vec::new();
            for first in (0..rows).step_by(per_thread) {
                let outs = shares.each_mut().map(|share| share.next().expect("as many shares as threads"));
                if first + per_thread >= rows {
                    // The last share is this thread's own.
                    let own = work(first, outs);
                    let others = running.into_iter().map(|thread: thread::ScopedJoinHandle<'_, _>| {
                        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                    });
                    return others.chain([own]).flatten().min();
                }
                running.push(scope.spawn(move || work(first, outs)));
            }
            None
        });
        failed.map_or(Ok(()), |row| {
            let mut values = vec![0.0; columns.len()];
            self.rows.widen(row, columns.start, &mut values);
            let largest =
                values.iter().fold(0.0, |a: f32, x| if x.abs() > a || x.is_nan() { x.abs() } else { a });
            Err(WeightsError::Unquantizable { tensor: self.tensor.to_owned(), row, largest })
        })
    }
}

/// How many threads a rank's weights are quantised by, where `ranks` do so at once.
pub fn quantizing_threads(ranks: usize) -> usize {
    thread::available_parallelism().map_or(1, NonZero::get).div_ceil(ranks.max(1))
}

/// `x` to the nearest whole number, ties to even, for `|x| < 2^22`: plain additions, which compilers make vectors of where
/// `round_ties_even` would be a call.
#[inline]
fn rounded(x: f32) -> f32 {
    (x + ROUND) - ROUND
}

/// 1.5 · 2^23: a sum with it has no bits left for a fraction, and its lowest bits are the whole number in two's complement.
const ROUND: f32 = 12_582_912.0;

/// `[N, columns]` of `dtype`.
fn host(bytes: Vec<u8>, rows: usize, columns: usize, dtype: DType) -> HostTensor {
    HostTensor::from_vec(bytes, &[rows, columns], dtype)
}
