//! Random values that can be made anywhere in a tensor without making those before: normal deviates of 4096 sizes, as BF16,
//! F32, or FP8 codes with a scale per block. Knows no tensor by name.
//!
//! Each value is drawn from 4096 equally likely quantiles of the normal distribution, so that a table per tensor gives its
//! BF16, and one per tensor and scale its FP8 code: the arithmetic is done per table, not per value.

use std::collections::HashMap;
use std::sync::LazyLock;
use std::thread;

use half::bf16;

use crate::config::{Fp8BlockConfig, ScaleFmt};
use crate::f8::f32_to_f8e4m3;

/// Quantiles, an index into which is drawn for each value.
const QUANTILES: usize = 4096;
/// Values that one random word gives, 16 bits each.
const PER_WORD: usize = 4;
/// Bytes from which on several threads pay for their start.
const PARALLEL_BYTES: usize = 1 << 20;

static NORMAL: LazyLock<Vec<f64>> = LazyLock::new(normal_quantiles);

/// The quantiles (i + ½) / 4096 of the normal distribution of mean 0 and deviation 1, without any function that systems round
/// differently: z(p) solves z' = w, w' = z·w², where w = √(2π)·exp(z²/2), by Runge and Kutta's method from z(½) = 0.
fn normal_quantiles() -> Vec<f64> {
    const SUBSTEPS: usize = 16;
    let slope = |[z, w]: [f64; 2]| [w, z * w * w];
    let step = |[z, w]: [f64; 2], [dz, dw]: [f64; 2], by: f64| [z + by * dz, w + by * dw];
    let (mut at, mut table) = ([0.0, std::f64::consts::TAU.sqrt()], vec![0.0; QUANTILES]);
    for i in QUANTILES / 2..QUANTILES {
        // The first is half a step from the middle.
        let distance = if i == QUANTILES / 2 { 0.5 } else { 1.0 };
        let by = distance / (QUANTILES * SUBSTEPS) as f64;
        for _ in 0..SUBSTEPS {
            let a = slope(at);
            let b = slope(step(at, a, by / 2.0));
            let c = slope(step(at, b, by / 2.0));
            let d = slope(step(at, c, by));
            let mean = [0, 1].map(|i| (a[i] + 2.0 * b[i] + 2.0 * c[i] + d[i]) / 6.0);
            at = step(at, mean, by);
        }
        table[i] = at[0];
        table[QUANTILES - 1 - i] = -at[0];
    }
    table
}

/// The random numbers of one tensor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stream(u64);

impl Stream {
    /// Those of the tensor `name`.
    pub(super) fn of(name: &str, seed: u64) -> Self {
        // FNV-1a.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        Self(mix(hash ^ mix(seed)))
    }

    /// Indices of the quantiles of row `row`, all of them: rows of one length differ in their words.
    fn row(self, row: usize, indices: &mut [u16]) {
        let first = (row * indices.len().div_ceil(PER_WORD)) as u64;
        let word = |i: usize| {
            let at = (first + i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            mix(self.0.wrapping_add(at))
        };
        let lane = |word: u64, lane: usize| (word >> (16 * lane)) as u16 % QUANTILES as u16;
        let (whole, rest) = indices.as_chunks_mut::<PER_WORD>();
        let last = whole.len();
        for (i, four) in whole.iter_mut().enumerate() {
            let word = word(i);
            *four = std::array::from_fn(|i| lane(word, i));
        }
        let word = word(last);
        for (i, index) in rest.iter_mut().enumerate() {
            *index = lane(word, i);
        }
    }
}

/// SplitMix64's output function.
fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The distribution of a tensor's values.
#[derive(Clone, Copy, Debug)]
pub(super) struct Normal {
    pub(super) mean: f64,
    pub(super) deviation: f64,
}

impl Normal {
    fn value(self, index: usize) -> f64 {
        self.mean + self.deviation * NORMAL[index]
    }

    /// Writes rows of `columns` F32.
    pub(super) fn f32(self, stream: Stream, columns: usize, out: &mut [u8]) {
        let table: Vec<[u8; 4]> = (0..QUANTILES).map(|i| (self.value(i) as f32).to_le_bytes()).collect();
        let table: &[[u8; 4]; QUANTILES] = table.as_slice().try_into().expect("a table of quantiles");
        lookup(stream, columns, table, out);
    }

    /// Writes rows of `columns` BF16.
    pub(super) fn bf16(self, stream: Stream, columns: usize, out: &mut [u8]) {
        let table: [[u8; 2]; QUANTILES] = std::array::from_fn(|i| self.rounded(i).to_le_bytes());
        lookup(stream, columns, &table, out);
    }

    fn rounded(self, index: usize) -> bf16 {
        bf16::from_f64(self.value(index))
    }
}

/// Writes rows of `columns` values of `SIZE` bytes.
fn lookup<const SIZE: usize>(
    stream: Stream,
    columns: usize,
    table: &[[u8; SIZE]; QUANTILES],
    out: &mut [u8],
) {
    in_parallel(out, columns * SIZE, |first, out| {
        let mut indices = vec![0; columns];
        for (row, out) in out.chunks_exact_mut(columns * SIZE).enumerate() {
            stream.row(first + row, &mut indices);
            for (value, index) in out.as_chunks_mut::<SIZE>().0.iter_mut().zip(&indices) {
                *value = table[usize::from(*index) % QUANTILES];
            }
        }
    });
}

/// A matrix `[n, k]` of values in FP8 blocks: what the BF16 values of the same stream are quantised to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fp8Matrix {
    pub(super) normal: Normal,
    pub(super) stream: Stream,
    pub(super) shape: [usize; 2],
    pub(super) fp8: Fp8BlockConfig,
}

impl Fp8Matrix {
    /// Writes the codes `[n, k]`.
    pub(super) fn codes(&self, out: &mut [u8]) {
        let [rows, columns] = self.fp8.block;
        let k = self.shape[1];
        in_parallel(out, rows * k, |first, out| {
            let mut tables: HashMap<u16, Box<[u8; QUANTILES]>> = HashMap::new();
            let mut indices = Vec::new();
            for (band, out) in out.chunks_mut(rows * k).enumerate() {
                self.band(first + band, &mut indices);
                for (block, reach) in self.reaches(&indices).into_iter().enumerate() {
                    let table = tables.entry(reach).or_insert_with(|| self.table(reach));
                    let range = block * columns..k.min((block + 1) * columns);
                    for (out, indices) in out.chunks_exact_mut(k).zip(indices.chunks_exact(k)) {
                        for (code, index) in out[range.clone()].iter_mut().zip(&indices[range.clone()]) {
                            *code = table[usize::from(*index) % QUANTILES];
                        }
                    }
                }
            }
        });
    }

    /// Writes the scales `[ceil(n / block), ceil(k / block)]` F32.
    pub(super) fn scales(&self, out: &mut [u8]) {
        let row_bytes = 4 * self.shape[1].div_ceil(self.fp8.block[1]);
        in_parallel(out, row_bytes, |first, out| {
            let mut indices = Vec::new();
            for (band, out) in out.chunks_exact_mut(row_bytes).enumerate() {
                self.band(first + band, &mut indices);
                for (scale, reach) in out.as_chunks_mut::<4>().0.iter_mut().zip(self.reaches(&indices)) {
                    *scale = self.scale(reach).to_le_bytes();
                }
            }
        });
    }

    /// Indices of the rows of one band of blocks.
    fn band(&self, band: usize, indices: &mut Vec<u16>) {
        let ([n, k], rows) = (self.shape, self.fp8.block[0]);
        let range = band * rows..n.min((band + 1) * rows);
        indices.resize(range.len() * k, 0);
        for (row, indices) in range.zip(indices.chunks_exact_mut(k)) {
            self.stream.row(row, indices);
        }
    }

    /// The quantile farthest from the middle in each block of a band; of the upper half, by symmetry.
    fn reaches(&self, indices: &[u16]) -> Vec<u16> {
        const LAST: i16 = QUANTILES as i16 - 1;
        let (k, columns) = (self.shape[1], self.fp8.block[1]);
        let mut reaches = vec![0; k.div_ceil(columns)];
        for row in indices.chunks_exact(k) {
            for (reach, block) in reaches.iter_mut().zip(row.chunks(columns)) {
                // Signed, since every x86-64 has that maximum as a vector instruction.
                let farther = |reach: i16, &index: &u16| reach.max(index as i16).max(LAST - index as i16);
                *reach = block.iter().fold(*reach, farther);
            }
        }
        reaches.into_iter().map(|reach: i16| reach as u16).collect()
    }

    /// The largest magnitude of a block over 448, the largest code; a power of two where the format wants one.
    fn scale(&self, reach: u16) -> f32 {
        let scale = self.normal.rounded(usize::from(reach)).to_f32() / 448.0;
        match self.fp8.scale_fmt {
            ScaleFmt::F32 => scale,
            // The exponent one up, unless it is a power already.
            ScaleFmt::Ue8m0 => f32::from_bits((scale.to_bits() + 0x7f_ffff) & 0x7f80_0000),
        }
    }

    /// Codes of all quantiles in a block of that reach.
    fn table(&self, reach: u16) -> Box<[u8; QUANTILES]> {
        let scale = self.scale(reach);
        Box::new(std::array::from_fn(|i| f32_to_f8e4m3(self.normal.rounded(i).to_f32() / scale)))
    }
}

/// Hands out `out` in runs of whole groups of `group_bytes` (the last may be shorter) to threads, with the number of the first
/// group of each.
fn in_parallel(out: &mut [u8], group_bytes: usize, make: impl Fn(usize, &mut [u8]) + Sync) {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let groups = out.len().div_ceil(group_bytes);
    let per_thread = groups.div_ceil(cores);
    if out.len() < PARALLEL_BYTES || per_thread == groups {
        return make(0, out);
    }
    thread::scope(|scope| {
        for (i, run) in out.chunks_mut(per_thread * group_bytes).enumerate() {
            let make = &make;
            scope.spawn(move || make(i * per_thread, run));
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::f8::f8e4m3_to_f32;

    #[test]
    fn quantiles_are_those_of_the_normal_distribution() {
        // Tables of the distribution: p, z.
        for (p, z) in [(0.5, 0.0), (0.841_344_746, 1.0), (0.975, 1.959_963_985), (0.999, 3.090_232_306)] {
            let below = (p * QUANTILES as f64 - 0.5) as usize;
            let (below, above) = (NORMAL[below], NORMAL[below + 1]);
            assert!(below <= z && z <= above, "{p}: {below} {z} {above}");
        }
        assert!((NORMAL[QUANTILES - 1] - 3.6683).abs() < 1e-3, "{}", NORMAL[QUANTILES - 1]);
        assert!(NORMAL.is_sorted());
        let variance = NORMAL.iter().map(|z| z * z).sum::<f64>() / QUANTILES as f64;
        assert!((variance - 1.0).abs() < 2e-3, "{variance}");
    }

    /// Whatever is cut into runs, a value depends on its place alone.
    #[test]
    fn threads_change_nothing() {
        let normal = Normal { mean: 0.0, deviation: 0.1 };
        let stream = Stream::of("a", 1);
        let (rows, columns) = (1500, 403);
        let mut whole = vec![0; rows * columns * 2];
        normal.bf16(stream, columns, &mut whole);
        let mut indices = vec![0; columns];
        for row in [0, 1, 700, 749, 750, 751, 1499] {
            stream.row(row, &mut indices);
            let expected: Vec<u8> =
                indices.iter().flat_map(|&i| normal.rounded(usize::from(i)).to_le_bytes()).collect();
            assert_eq!(whole[row * columns * 2..][..columns * 2], expected, "{row}");
        }
    }

    #[test]
    fn streams_differ_by_name_and_by_seed() {
        let first = |name, seed| {
            let mut indices = [0; 16];
            Stream::of(name, seed).row(0, &mut indices);
            indices
        };
        assert_eq!(first("a", 0), first("a", 0));
        assert_ne!(first("a", 0), first("b", 0));
        assert_ne!(first("a", 0), first("a", 1));
    }

    /// Codes and scales are what a plain quantiser makes of the BF16 values, in whole blocks and ragged ones.
    #[test]
    fn codes_are_the_quantised_values() {
        for (shape, block) in [([128, 256], [128, 128]), ([200, 130], [128, 128]), ([9, 20], [4, 8])] {
            for scale_fmt in [ScaleFmt::F32, ScaleFmt::Ue8m0] {
                let normal = Normal { mean: 0.0, deviation: 0.05 };
                let stream = Stream::of("w", 3);
                let fp8 = Fp8BlockConfig { block, scale_fmt };
                let matrix = Fp8Matrix { normal, stream, shape, fp8 };
                let [n, k] = shape;
                let mut dense = vec![0; n * k * 2];
                normal.bf16(stream, k, &mut dense);
                let dense: Vec<f32> =
                    dense.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect();
                let mut codes = vec![0; n * k];
                matrix.codes(&mut codes);
                let blocks = [n.div_ceil(block[0]), k.div_ceil(block[1])];
                let mut scales = vec![0; blocks[0] * blocks[1] * 4];
                matrix.scales(&mut scales);
                let scales: Vec<f32> = scales.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
                let mut largest = vec![0_f32; scales.len()];
                let block_of = |row: usize, column: usize| row / block[0] * blocks[1] + column / block[1];
                for (i, value) in dense.iter().enumerate() {
                    let at = block_of(i / k, i % k);
                    largest[at] = largest[at].max(value.abs());
                }
                for (scale, largest) in scales.iter().zip(&largest) {
                    match scale_fmt {
                        ScaleFmt::F32 => assert_eq!(*scale, largest / 448.0),
                        ScaleFmt::Ue8m0 => {
                            assert_eq!(scale.to_bits() & 0x7f_ffff, 0, "a power of two");
                            assert!((0.5..=1.0).contains(&(largest / 448.0 / scale)), "{scale} {largest}");
                        }
                    }
                }
                for (i, (value, code)) in dense.iter().zip(&codes).enumerate() {
                    let scaled = value / scales[block_of(i / k, i % k)];
                    assert_eq!(*code, f32_to_f8e4m3(scaled), "{i}");
                    // Half a step of three bits, or of the smallest.
                    let bound = (scaled.abs() / 16.0).max(1.0 / 1024.0) * 1.0001;
                    assert!((f8e4m3_to_f32(*code) - scaled).abs() <= bound, "{i}: {scaled} {code:#x}");
                }
            }
        }
    }
}
