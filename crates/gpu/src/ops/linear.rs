//! Linears, and what all matrix products share: the choice of kernel and tile. Kernels: `kernels/gemm.cu`, `kernels/common/tile.cuh`.

use r1_backend::{Activation, Fp8Activation, Int4Group, Tensor, Weight, shape};
use r1_core::DType;

use crate::Gpu;
use crate::driver::DevicePtr;
use crate::launch::{Args, Geometry, dtype_code, is_vectorizable, ptr, stride};

#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct WeightArgs {
    data: DevicePtr,
    scales: DevicePtr,
    zeros: DevicePtr,
    out: DevicePtr,
    stride: i64,
    scale_stride: i64,
    zero_stride: i64,
    out_stride: i64,
    n: u32,
    dtype: u32,
    out_dtype: u32,
    block: [u32; 2],
    offset: [u32; 2],
    is_vectorizable: u32,
    range_len: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct GemmArgs {
    x: DevicePtr,
    x_scales: DevicePtr,
    x_stride: i64,
    x_scale_stride: i64,
    x_head_stride: i64,
    out_head_stride: i64,
    num_tokens: u32,
    k: u32,
    rows_per_head: u32,
    first_row: u32,
    x_dtype: u32,
    x_is_vectorizable: u32,
    first_tiles: u32,
    transposed: u32,
    weights: [WeightArgs; 2],
    partials: DevicePtr,
    counters: DevicePtr,
    ranges: u32,
}

// SAFETY: the twin of tile::Args.
unsafe impl Args for GemmArgs {}

impl GemmArgs {
    /// The same product, of as many rows as `out` has, the results there.
    pub(super) fn of_rows(mut self, out: &Tensor<Gpu>) -> Self {
        self.num_tokens = out.dim(0) as u32;
        self.weights[0].out = ptr(out);
        self
    }
}

/// A kernel's tile: `Shape` in tile.cuh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tile {
    rows: usize,
    cols: usize,
    warps: u32,
    stages: usize,
}

const SHORT: Tile = Tile { rows: 16, cols: 32, warps: 2, stages: 4 };
const MIDDLE: Tile = Tile { rows: 64, cols: 32, warps: 4, stages: 3 };
const MIDDLE_INT4: Tile = Tile { stages: 2, ..MIDDLE };
const TALL: Tile = Tile { rows: 64, cols: 128, warps: 8, stages: 2 };
const SIMT: Tile = Tile { rows: 16, cols: 64, warps: 4, stages: 1 };
/// Of `mla_decode::Finish`, whose activations stand in shared memory as whole rows of [`RESIDENT`].
const FINISH: Tile = Tile { rows: 16, cols: 64, warps: 4, stages: 4 };
/// Most columns of such rows, `mla_decode::LATENT`.
const RESIDENT: usize = 512;
/// `sizeof(simt::Shared)`.
const SIMT_SHARED_BYTES: usize = 4 * (16 * 32 + 32 * 65);
/// `tile::DTYPE_INT4`.
const DTYPE_INT4: u32 = 4;

impl Tile {
    /// `sizeof(tile::Shared)` for activations and weights of so many bits.
    fn shared_bytes(self, [x_bits, w_bits]: [usize; 2], transposed: bool) -> usize {
        const FLAG_BYTES: usize = 16;
        const INT4_BITS: usize = 4;
        let is_int4 = w_bits == INT4_BITS;
        let step = if is_int4 { 128 } else { 128 * 8 / x_bits };
        // A row is 16 bytes longer than what it holds.
        let row_bytes = |numbers: usize, bits: usize| numbers * bits / 8 + 16;
        let (w_rows, w_cols) = if transposed { (step, self.cols) } else { (self.cols, step) };
        let x = if self == FINISH {
            self.rows * row_bytes(RESIDENT, x_bits)
        } else {
            self.stages * self.rows * row_bytes(step, x_bits)
        };
        let w = w_rows * row_bytes(w_cols, w_bits);
        let wide = if x_bits == w_bits { x_bits } else { w_rows * row_bytes(w_cols, x_bits) };
        let scales = 4 * (self.rows + self.cols);
        let halves = if is_int4 { 4 * self.cols * (2 * self.stages + 1) } else { 3 * 16 };
        (x + self.stages * (w + scales) + wide + FLAG_BYTES + halves).next_multiple_of(16)
    }
}

/// Which kernels take a pair of operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// E4M3 × E4M3.
    Fp8,
    /// BF16 × E4M3.
    W8,
    /// BF16 × BF16.
    Bf16,
    /// Whatever there is.
    Simt,
}

impl Kind {
    pub(super) fn of(x: DType, w: DType) -> Self {
        match (x, w) {
            (DType::F8E4M3, DType::F8E4M3) => Self::Fp8,
            (DType::BF16, DType::F8E4M3) => Self::W8,
            (DType::BF16, DType::BF16) => Self::Bf16,
            _ => Self::Simt,
        }
    }
}

/// What a product reads: a linear's activation as `[T, 1, K]`, or one matrix per head.
pub(super) struct Operand<'a> {
    /// `[T, H, a]`.
    pub(super) x: Tensor<Gpu>,
    /// `[T, ceil(a / 128)]`, of E4M3.
    pub(super) scales: Option<&'a Tensor<Gpu>>,
    /// Head `h` has the weight's rows from `h * rows_per_head + first_row` on; 0 of a linear.
    pub(super) rows_per_head: usize,
    pub(super) first_row: usize,
    /// The sum goes over the weight's rows.
    pub(super) transposed: bool,
}

impl<'a> Operand<'a> {
    /// What the weights of a linear meet: the FP8 form where both have one.
    ///
    /// # Panics
    /// When the weight is int8: the capabilities say that there are no such kernels.
    pub(super) fn of_linear(x: &'a Activation<Gpu>, w: &Weight<Gpu>) -> Self {
        assert!(
            !matches!(w, Weight::Int8Group { .. }),
            "linear: w is an int8 weight, which a GPU does not take"
        );
        let (x, scales) = match (&x.fp8, w) {
            (Some(Fp8Activation { data, scales, .. }), Weight::Fp8Block { .. }) => (data, Some(scales)),
            _ => (&x.dense, None),
        };
        let x = x.split_last(&[1, x.dim(1)]);
        Self { x, scales, rows_per_head: 0, first_row: 0, transposed: false }
    }
}

/// A weight's side of the arguments; `out` `[T, H, b]`.
fn weight_args(operand: &Operand<'_>, w: &Weight<Gpu>, out: &Tensor<Gpu>) -> WeightArgs {
    let data = w.data();
    let args = WeightArgs {
        data: ptr(data),
        out: ptr(out),
        out_stride: stride(out, 0),
        n: out.dim(2) as u32,
        out_dtype: dtype_code(out.dtype()),
        is_vectorizable: u32::from(is_vectorizable(data) && steps_are_aligned(operand, w)),
        range_len: if operand.rows_per_head == 0 {
            range_len(w.out_features(), w.in_features())
        } else {
            operand.x.dim(2)
        } as u32,
        ..WeightArgs::default()
    };
    match w {
        // Without scales: one block that never ends.
        Weight::Dense { .. } => WeightArgs {
            stride: stride(data, 0),
            dtype: dtype_code(data.dtype()),
            block: [u32::MAX; 2],
            ..args
        },
        Weight::Fp8Block { scales, block, offset, .. } => WeightArgs {
            scales: ptr(scales),
            stride: stride(data, 0),
            scale_stride: stride(scales, 0),
            dtype: dtype_code(data.dtype()),
            block: block.map(|size| size as u32),
            offset: offset.map(|size| size as u32),
            ..args
        },
        Weight::Int8Group { .. } => unreachable!("an operand has no int8 weight"),
        Weight::Int4Group(Int4Group { zeros, scales, group, .. }) => WeightArgs {
            scales: ptr(scales),
            zeros: ptr(zeros),
            stride: stride(data, 0) * size_of::<u32>() as i64,
            scale_stride: stride(scales, 0),
            zero_stride: stride(zeros, 0),
            dtype: DTYPE_INT4,
            block: [1, *group as u32],
            ..args
        },
    }
}

/// Whether every step of the sum begins at a multiple of 16 bytes, given that the operands' rows do: steps end where a
/// scale's block does.
fn steps_are_aligned(operand: &Operand<'_>, w: &Weight<Gpu>) -> bool {
    /// Of E4M3 and of 4-bit codes in 16 bytes.
    const LANES: usize = 16;
    const INT4_LANES: usize = 32;
    match w {
        Weight::Dense { .. } => true,
        Weight::Int8Group { .. } => unreachable!("an operand has no int8 weight"),
        Weight::Int4Group(w) => w.group.is_multiple_of(INT4_LANES),
        Weight::Fp8Block { block, offset, .. } if operand.transposed => {
            let rows = [block[0], offset[0] + operand.first_row, operand.rows_per_head];
            rows.iter().all(|x| x.is_multiple_of(LANES))
        }
        Weight::Fp8Block { block, offset, .. } => {
            [block[1], offset[1]].iter().all(|x| x.is_multiple_of(LANES))
        }
    }
}

/// Length of the ranges that a sum over `k` is cut into, so that a weight with few outputs keeps a large GPU busy at one token. Depends on the
/// weight alone: with it the order of the sum does.
fn range_len(n: usize, k: usize) -> usize {
    /// Short tiles that keep a large GPU busy.
    const ENOUGH_TILES: usize = 160;
    const SHORTEST_RANGE: usize = 512;
    /// A range ends where a step does.
    const STEP: usize = 128;
    let ranges = (k / SHORTEST_RANGE).min(ENOUGH_TILES / n.div_ceil(SHORT.cols).max(1)).max(1);
    if ranges == 1 { k } else { k.div_ceil(ranges).next_multiple_of(STEP) }
}

/// Ranges of a weight.
fn num_ranges(args: &GemmArgs, weight: &WeightArgs) -> u32 {
    args.k.div_ceil(weight.range_len.max(1))
}

/// The arguments for one operand and one weight or two of the same format, all but where sums of ranges go. `outs` `[T, H, b]`.
fn gemm_args(operand: &Operand<'_>, weights: &[(&Weight<Gpu>, Tensor<Gpu>)]) -> GemmArgs {
    let x = &operand.x;
    let aligned = weights.iter().all(|(w, _)| steps_are_aligned(operand, w));
    let mut args = GemmArgs {
        x: ptr(x),
        x_scales: operand.scales.map_or(DevicePtr::default(), ptr),
        x_stride: stride(x, 0),
        x_scale_stride: operand.scales.map_or(0, |scales| stride(scales, 0)),
        x_head_stride: stride(x, 1),
        out_head_stride: stride(&weights[0].1, 1),
        num_tokens: x.dim(0) as u32,
        k: x.dim(2) as u32,
        rows_per_head: operand.rows_per_head as u32,
        first_row: operand.first_row as u32,
        x_dtype: dtype_code(x.dtype()),
        x_is_vectorizable: u32::from(is_vectorizable(x) && aligned),
        first_tiles: u32::MAX,
        transposed: u32::from(operand.transposed),
        weights: [WeightArgs::default(); 2],
        partials: DevicePtr::default(),
        counters: DevicePtr::default(),
        ranges: 1,
    };
    for (index, (w, out)) in weights.iter().enumerate() {
        args.weights[index] = weight_args(operand, w, out);
    }
    args
}

/// Room for the sums of ranges that `blocks` short tiles make, and their counters.
fn spread_ranges(gpu: &Gpu, args: &mut GemmArgs, num_weights: usize, blocks: usize) {
    args.ranges =
        args.weights[..num_weights].iter().map(|weight| num_ranges(args, weight)).max().unwrap_or(1);
    if args.ranges > 1 {
        args.partials =
            gpu.scratch(blocks * args.ranges as usize * SHORT.rows * SHORT.cols * size_of::<f32>());
        args.counters = gpu.counters();
    }
}

/// Enqueues the products of one operand with one weight or two of the same format. `outs` `[T, H, b]`.
pub(super) fn gemm(gpu: &Gpu, operand: &Operand<'_>, weights: &[(&Weight<Gpu>, Tensor<Gpu>)]) {
    let x = &operand.x;
    let (tokens, heads) = (x.dim(0), x.dim(1));
    let mut args = gemm_args(operand, weights);
    let w = weights[0].0;
    let kind = Kind::of(x.dtype(), w.data().dtype());
    let is_int4 = x.dtype() == DType::BF16 && matches!(w, Weight::Int4Group(_));
    let (kernel, tile) = if is_int4 { choose_int4(tokens) } else { choose(kind, operand.transposed, tokens) };
    let tiles_of = |index: usize| weights.get(index).map_or(0, |(_, out)| out.dim(2).div_ceil(tile.cols));
    let tiles = tiles_of(0) + tiles_of(1);
    if weights.len() == 2 {
        args.first_tiles = tiles_of(0) as u32;
    }
    if tile == SHORT {
        spread_ranges(gpu, &mut args, weights.len(), tiles * tokens.div_ceil(tile.rows));
    }
    let shared_bytes = match (is_int4, kind) {
        (true, _) => tile.shared_bytes([16, 4], false),
        (_, Kind::Simt) => SIMT_SHARED_BYTES,
        _ => tile.shared_bytes(bits_of(x, w), operand.transposed),
    };
    let grid = [tiles, tokens.div_ceil(tile.rows), heads * args.ranges as usize];
    gpu.launch(kernel, Geometry { grid, warps: tile.warps, shared_bytes }, &args);
}

/// The kernel for so many rows; all of a kind sum in the same order.
fn choose(kind: Kind, transposed: bool, tokens: usize) -> (&'static str, Tile) {
    let (index, tile) = match tokens {
        0..=16 => (0, SHORT),
        17..=64 => (1, MIDDLE),
        _ => (2, TALL),
    };
    let kernels = match (kind, transposed) {
        (Kind::Simt, _) => return ("gemm_simt", SIMT),
        (Kind::Fp8, false) => ["gemm_fp8_short", "gemm_fp8_middle", "gemm_fp8_tall"],
        (Kind::W8, false) => ["gemm_w8_short", "gemm_w8_middle", "gemm_w8_tall"],
        (Kind::Bf16, false) => ["gemm_bf16_short", "gemm_bf16_middle", "gemm_bf16_tall"],
        (Kind::W8, true) => ["per_head_w8_short", "per_head_w8_middle", "per_head_w8_tall"],
        (Kind::Bf16, true) => ["per_head_bf16_short", "per_head_bf16_middle", "per_head_bf16_tall"],
        (Kind::Fp8, true) => unreachable!("a matrix per head meets dense activations"),
    };
    (kernels[index], tile)
}

/// As [`choose`], for BF16 activations and 4-bit codes.
fn choose_int4(tokens: usize) -> (&'static str, Tile) {
    if tokens <= SHORT.rows { ("gemm_int4_short", SHORT) } else { ("gemm_int4_middle", MIDDLE_INT4) }
}

/// Bits per number of what both hold.
fn bits_of(x: &Tensor<Gpu>, w: &Weight<Gpu>) -> [usize; 2] {
    [x.dtype(), w.data().dtype()].map(|dtype| 8 * dtype.size_bytes())
}

pub(crate) fn linear(gpu: &Gpu, x: &Activation<Gpu>, w: &Weight<Gpu>, out: &Tensor<Gpu>) {
    shape::linear(x, w, out);
    gemm(gpu, &Operand::of_linear(x, w), &[(w, out.split_last(&[1, out.dim(1)]))]);
}

/// Two linears of the same `x` in one launch; two launches where they want different kernels.
pub(crate) fn linear_pair(gpu: &Gpu, x: &Activation<Gpu>, pair: [(&Weight<Gpu>, &Tensor<Gpu>); 2]) {
    for (w, out) in pair {
        shape::linear(x, w, out);
    }
    let [first, second] = pair;
    if first.0.data().dtype() != second.0.data().dtype() {
        return pair.iter().for_each(|(w, out)| linear(gpu, x, w, out));
    }
    let pair = pair.map(|(w, out)| (w, out.split_last(&[1, out.dim(1)])));
    gemm(gpu, &Operand::of_linear(x, first.0), &pair);
}

/// Most rows that a launch with more to do than a product is for.
pub(super) const FEW_ROWS: usize = 64;

/// The tiles of [`FewRows`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Ranges of k side by side.
    Short,
    Middle,
    /// Of `gemm_simt`.
    Numbers,
}

/// A product of few rows whose kernel goes on, or has other blocks beside it. Bits as from [`gemm`].
pub(super) struct FewRows {
    pub(super) kind: Kind,
    pub(super) form: Form,
    pub(super) args: GemmArgs,
    /// Tiles of columns and of rows; heads or ranges.
    pub(super) grid: [usize; 3],
    /// Of the product alone.
    pub(super) shared_bytes: usize,
    /// Counters that are left, and where they begin.
    pub(super) counters: DevicePtr,
    pub(super) num_counters: usize,
}

impl FewRows {
    /// For one weight or two; `None` where they want kernels of their own. `always_short`: for any number of rows. `outs` `[T, H, b]`.
    pub(super) fn new(
        gpu: &Gpu,
        operand: &Operand<'_>,
        weights: &[(&Weight<Gpu>, Tensor<Gpu>)],
        always_short: bool,
    ) -> Option<Self> {
        let (x, w) = (&operand.x, weights[0].0);
        let is_odd = |w: &Weight<Gpu>| {
            matches!(w, Weight::Int4Group(_)) || w.data().dtype() != weights[0].0.data().dtype()
        };
        if weights.iter().any(|(w, _)| is_odd(w)) {
            return None;
        }
        let (tokens, heads) = (x.dim(0), x.dim(1));
        let mut args = gemm_args(operand, weights);
        let is_cut = args.weights[..weights.len()].iter().any(|weight| num_ranges(&args, weight) > 1);
        let kind = Kind::of(x.dtype(), w.data().dtype());
        let (form, tile) = if kind == Kind::Simt {
            (Form::Numbers, SIMT)
        } else if tokens <= SHORT.rows || is_cut || always_short {
            (Form::Short, SHORT)
        } else {
            (Form::Middle, MIDDLE)
        };
        let tiles: Vec<usize> = weights.iter().map(|(_, out)| out.dim(2).div_ceil(tile.cols)).collect();
        if weights.len() == 2 {
            args.first_tiles = tiles[0] as u32;
        }
        let (columns, rows) = (tiles.iter().sum::<usize>(), tokens.div_ceil(tile.rows));
        let mut taken = 0;
        if form == Form::Short {
            spread_ranges(gpu, &mut args, weights.len(), columns * rows);
            taken = columns * rows;
        }
        Some(Self {
            kind,
            form,
            grid: [columns, rows, heads * args.ranges as usize],
            args,
            shared_bytes: match form {
                Form::Numbers => SIMT_SHARED_BYTES,
                _ => tile.shared_bytes(bits_of(x, w), operand.transposed),
            },
            counters: gpu.counters().offset(taken * size_of::<u32>()),
            num_counters: crate::COUNTERS.checked_sub(taken)?,
        })
    }

    /// Tiles of columns of the first weight.
    pub(super) fn first_columns(&self) -> usize {
        self.grid[0].min(self.args.first_tiles as usize)
    }

    /// Blocks of a tile of rows that stay for what comes after it, `useful` at most; `blocks` write it. All that wait for
    /// others are fewer than what the device runs at once.
    pub(super) fn finishers(&self, gpu: &Gpu, blocks: usize, useful: usize) -> u32 {
        let waiting = gpu.num_multiprocessors() / 2 / self.grid[1].max(1);
        waiting.min(blocks).min(useful).max(1) as u32
    }
}

/// Most rows of a short tile.
pub(super) const SHORT_ROWS: usize = SHORT.rows;
/// Columns of each of two weights that share a short tile.
const PAIR_COLS: usize = SHORT.cols / 2;

/// What a kernel of `kernels/mlp.cu` shares with the linears.
pub(super) struct PairLaunch {
    pub(super) kernel: &'static str,
    pub(super) geometry: Geometry,
    pub(super) args: GemmArgs,
}

/// A short tile of two weights of the same `x`, side by side; `None` where their formats or this device want two linears. `out` `[T, N]`: what
/// each gives, for its shape.
pub(super) fn pair_launch(
    gpu: &Gpu,
    x: &Activation<Gpu>,
    [left, right]: [&Weight<Gpu>; 2],
    out: &Tensor<Gpu>,
) -> Option<PairLaunch> {
    let is_alike = match (left, right) {
        (Weight::Dense { data: left }, Weight::Dense { data: right }) => left.dtype() == right.dtype(),
        (
            Weight::Fp8Block { block: left, offset: left_offset, .. },
            Weight::Fp8Block { block: right, offset: right_offset, .. },
        ) => left[1] == right[1] && left_offset[1] == right_offset[1],
        _ => false,
    };
    let operand = Operand::of_linear(x, left);
    let kernel = match Kind::of(operand.x.dtype(), left.data().dtype()) {
        Kind::Fp8 => "gate_up_fp8",
        Kind::W8 => "gate_up_w8",
        Kind::Bf16 => "gate_up_bf16",
        Kind::Simt => return None,
    };
    let blocks = out.dim(1).div_ceil(PAIR_COLS);
    if !is_alike || x.dense.dim(0) > SHORT_ROWS || 2 * blocks > crate::COUNTERS {
        return None;
    }
    let out = out.split_last(&[1, out.dim(1)]);
    let mut args = gemm_args(&operand, &[(left, out.clone()), (right, out)]);
    spread_ranges(gpu, &mut args, 2, blocks);
    args.counters = gpu.counters();
    let shared_bytes =
        SHORT.shared_bytes(bits_of(&operand.x, left), false) + SHORT.rows * SHORT.cols * size_of::<f32>();
    let geometry = Geometry { grid: [blocks, 1, args.ranges as usize], warps: SHORT.warps, shared_bytes };
    Some(PairLaunch { kernel, geometry, args })
}

/// Most rows of [`head_launch`]: more fill the tiles of a launch of their own.
const MOST_HEAD_ROWS: usize = 256;

/// What `mla_finish` shares with the linears: a matrix per head `w` of rows `x` `[T, H, C]` that it brings itself. `None` where
/// formats, sizes or many rows want a launch of their own. The geometry is that of one row per block. `out` `[T, H, U]`.
pub(super) fn head_launch(
    gpu: &Gpu,
    operand: &Operand<'_>,
    w: &Weight<Gpu>,
    out: &Tensor<Gpu>,
) -> Option<HeadLaunch> {
    /// Columns of a step in BF16.
    const STEP: usize = 64;
    let x = &operand.x;
    let steps_are_whole = match w {
        Weight::Dense { .. } => true,
        Weight::Fp8Block { block, offset, .. } => {
            [block[1], offset[1]].iter().all(|x| x.is_multiple_of(STEP))
        }
        Weight::Int8Group { .. } | Weight::Int4Group(_) => false,
    };
    let kernel = match Kind::of(x.dtype(), w.data().dtype()) {
        Kind::W8 => "mla_finish_w8",
        Kind::Bf16 => "mla_finish_bf16",
        Kind::Fp8 | Kind::Simt => return None,
    };
    if !steps_are_whole || operand.transposed || x.dim(2) > RESIDENT || x.dim(0) > MOST_HEAD_ROWS {
        return None;
    }
    let mut args = gemm_args(operand, &[(w, out.clone())]);
    args.counters = gpu.counters();
    let shared_bytes = FINISH.shared_bytes(bits_of(x, w), false);
    let tiles = out.dim(2).div_ceil(FINISH.cols);
    let geometry = Geometry { grid: [tiles, x.dim(0), x.dim(1)], warps: FINISH.warps, shared_bytes };
    Some(HeadLaunch { kernel, geometry, args })
}

/// See [`head_launch`].
pub(super) struct HeadLaunch {
    pub(super) kernel: &'static str,
    pub(super) geometry: Geometry,
    pub(super) args: GemmArgs,
}
