//! Routed experts, alone and with all of their layer. Kernels: `kernels/experts.cu`, `kernels/route.cu`.

mod args;
#[cfg(test)]
mod tests;

use r1_backend::{
    Activation, Experts, Fp8Activation, MlpWeights, MoeScratch, MoeWeights, Tensor, Weight, composite, shape,
};
use r1_core::DType;

use super::linear::{self, Kind};
use super::route::{self, SORT_SHARED_BYTES};
use crate::driver::DevicePtr;
use crate::launch::{Geometry, dtype_code, is_vectorizable, ptr, stride};
use crate::{COUNTERS, Gpu};

pub(super) use args::SortArgs;
pub(crate) use args::expert_table;

use args::{Expert, ExpertsArgs, is_supported};

/// Columns of hidden per block of gate and up, and of the output per block of down.
const HIDDEN_COLS: usize = 32;
const OUT_COLS: usize = 64;
/// Columns of an activation that share a scale.
const GROUP: usize = 128;
/// Up to so many tokens the last block of down adds up what the experts gave; beyond, a launch of its own has more blocks.
const FUSED_TOKENS: usize = 128;
/// Blocks along y that any device takes.
const MAX_GRID_Y: usize = 65_535;
const WARPS: u32 = 4;

type Kinds = [Option<Kind>; 4];

/// A layer's sum over experts: what the launches of all of its tokens have in common.
struct Layer<'a> {
    gpu: &'a Gpu,
    experts: &'a Experts<Gpu>,
    shared: Option<&'a MlpWeights<Gpu>>,
    /// By element type of the weights: the kernel that these and the activations want.
    gate_up: Kinds,
    down: Kinds,
    quantizes: bool,
    x_dtype: DType,
    /// BF16 only where down's kernel wants it.
    hidden_dtype: DType,
    power_of_two_scales: bool,
    dim: usize,
    top_k: usize,
    width: usize,
    shared_width: usize,
    /// Columns of the hidden state's rows, 16-byte aligned in every element type.
    hidden_stride: usize,
    tile_rows: usize,
}

/// Scratch memory of one part of the tokens.
struct Room {
    num_tiles: DevicePtr,
    tiles: DevicePtr,
    order: DevicePtr,
    hidden: DevicePtr,
    codes: DevicePtr,
    scales: DevicePtr,
    products: DevicePtr,
}

/// Hands out pieces of scratch one after the other.
struct Cutter {
    at: usize,
}

impl Cutter {
    fn cut(&mut self, size_bytes: usize) -> usize {
        let at = self.at;
        self.at = (at + size_bytes).next_multiple_of(256);
        at
    }
}

impl<'a> Layer<'a> {
    /// Nothing where there is no expert to sum over.
    fn new(
        gpu: &'a Gpu,
        x: &Activation<Gpu>,
        top_k: usize,
        experts: &'a Experts<Gpu>,
        shared: Option<&'a MlpWeights<Gpu>>,
    ) -> Option<Self> {
        let mlps = || experts.local.iter().chain(shared);
        let any = mlps().next()?;
        let meets = |w: &Weight<Gpu>| match (&x.fp8, w) {
            (Some(_), Weight::Fp8Block { .. }) => DType::F8E4M3,
            _ => x.dense.dtype(),
        };
        let kinds = |of: fn(&MlpWeights<Gpu>) -> &Weight<Gpu>| {
            let mut kinds = Kinds::default();
            for w in mlps().map(of) {
                let dtype = w.data().dtype();
                kinds[dtype_code(dtype) as usize] = Some(Kind::of(meets(w), dtype));
            }
            kinds
        };
        let (gate_up, down) = (kinds(|mlp| &mlp.gate), kinds(|mlp| &mlp.down));
        let width = experts.local.first().map_or(0, |mlp| mlp.gate.out_features());
        let shared_width = shared.map_or(0, |mlp| mlp.gate.out_features());
        // The tiles of a batch are the same for all kernels.
        let is_plain = gate_up.iter().chain(&down).any(|&kind| kind == Some(Kind::Simt));
        // From where on a 64-row tile is on average half full.
        let is_large = x.dense.dim(0) * top_k >= 32 * experts.total;
        let is_narrow = down.iter().any(|kind| matches!(kind, Some(Kind::Bf16 | Kind::W8)));
        Some(Self {
            hidden_dtype: if is_narrow { DType::BF16 } else { DType::F32 },
            gpu,
            experts,
            shared,
            quantizes: down.contains(&Some(Kind::Fp8)),
            gate_up,
            down,
            x_dtype: x.dense.dtype(),
            power_of_two_scales: x.fp8.as_ref().is_some_and(|fp8| fp8.power_of_two_scales),
            dim: any.gate.in_features(),
            top_k,
            width,
            shared_width,
            hidden_stride: width.max(shared_width).next_multiple_of(16),
            tile_rows: if is_large && !is_plain { 64 } else { 16 },
        })
    }

    /// Most tiles that so many tokens can fill, whatever they choose.
    fn max_tiles(&self, tokens: usize) -> usize {
        let pairs = tokens * self.top_k;
        let touched = pairs.min(self.experts.local.len());
        let routed = (pairs + touched * (self.tile_rows - 1)) / self.tile_rows;
        routed + if self.shared.is_some() { tokens.div_ceil(self.tile_rows) } else { 0 }
    }

    fn groups(&self) -> usize {
        self.hidden_stride.div_ceil(GROUP)
    }

    /// Where things lie in scratch, and the bytes of all.
    fn layout(&self, tokens: usize) -> ([usize; 7], usize) {
        let rows = tokens * (self.top_k + usize::from(self.shared.is_some()));
        let codes = if self.quantizes { rows } else { 0 };
        let mut cutter = Cutter { at: 0 };
        let offsets = [
            cutter.cut(4),
            cutter.cut(12 * self.max_tiles(tokens)),
            cutter.cut(4 * rows),
            cutter.cut(rows * self.hidden_stride * self.hidden_dtype.size_bytes()),
            cutter.cut(codes * self.hidden_stride),
            cutter.cut(codes * self.groups() * 4),
            cutter.cut(rows * self.dim * 4),
        ];
        (offsets, cutter.at)
    }

    fn fits(&self, tokens: usize) -> bool {
        let counters = if self.quantizes { self.max_tiles(tokens) * self.groups() } else { 0 };
        self.layout(tokens).1 <= self.gpu.scratch_bytes()
            && counters <= COUNTERS
            && self.max_tiles(tokens) <= MAX_GRID_Y
    }

    /// Tokens that are worked on together, `tokens` at most.
    fn part(&self, tokens: usize) -> usize {
        let (mut fits, mut most) = (1, tokens + 1);
        while fits + 1 < most {
            let middle = usize::midpoint(fits, most);
            if self.fits(middle) { fits = middle } else { most = middle }
        }
        fits
    }

    fn room(&self, tokens: usize) -> Room {
        let (offsets, size_bytes) = self.layout(tokens);
        let base = self.gpu.scratch(size_bytes);
        let [num_tiles, tiles, order, hidden, codes, scales, products] = offsets.map(|at| base.offset(at));
        Room { num_tiles, tiles, order, hidden, codes, scales, products }
    }

    fn sort_args(&self, ids: &Tensor<Gpu>, room: &Room) -> SortArgs {
        SortArgs {
            ids: ptr(ids),
            ids_stride: stride(ids, 0),
            num_tiles: room.num_tiles,
            tiles: room.tiles,
            order: room.order,
            num_tokens: ids.dim(0) as u32,
            top_k: self.top_k as u32,
            first: self.experts.first as u32,
            num_local: self.experts.local.len() as u32,
            tile_rows: self.tile_rows as u32,
            has_shared: u32::from(self.shared.is_some()),
        }
    }

    /// All tokens, in parts that fit in scratch.
    fn run(&self, x: &Activation<Gpu>, ids: &Tensor<Gpu>, weights: &Tensor<Gpu>, out: &Tensor<Gpu>) {
        let tokens = ids.dim(0);
        let part = self.part(tokens);
        for start in (0..tokens).step_by(part) {
            let rows = start..tokens.min(start + part);
            let room = self.room(rows.len());
            let ids = ids.rows(rows.clone());
            self.sort(&ids, &room);
            self.sum(&x.rows(rows.clone()), &ids, &weights.rows(rows.clone()), &out.rows(rows), &room);
        }
    }

    fn sort(&self, ids: &Tensor<Gpu>, room: &Room) {
        let warps = if ids.num_elements() <= 256 { 1 } else { 8 };
        let geometry = Geometry { grid: [1; 3], warps, shared_bytes: SORT_SHARED_BYTES };
        self.gpu.launch("moe_sort", geometry, &self.sort_args(ids, room));
    }

    fn launch(&self, kernel: &'static str, kind: Kind, [blocks, tiles]: [usize; 2], args: &ExpertsArgs) {
        let shared_bytes = shared_bytes(kind, self.tile_rows);
        self.gpu.launch(kernel, Geometry { grid: [blocks, tiles, 1], warps: WARPS, shared_bytes }, args);
    }

    /// The sum over the experts of tokens that are sorted already.
    fn sum(
        &self,
        x: &Activation<Gpu>,
        ids: &Tensor<Gpu>,
        weights: &Tensor<Gpu>,
        out: &Tensor<Gpu>,
        room: &Room,
    ) {
        let tokens = ids.dim(0);
        let tiles = self.max_tiles(tokens);
        let table = self.experts.table.as_ref().expect("made with the experts");
        let mut args = ExpertsArgs {
            experts: ptr(table),
            num_tiles: room.num_tiles,
            tiles: room.tiles,
            order: room.order,
            x: DevicePtr::default(),
            x_scales: DevicePtr::default(),
            x_stride: 0,
            x_scale_stride: 0,
            hidden: room.hidden,
            hidden_codes: room.codes,
            hidden_scales: room.scales,
            products: room.products,
            ids: ptr(ids),
            weights: ptr(weights),
            out: ptr(out),
            ids_stride: stride(ids, 0),
            weights_stride: stride(weights, 0),
            out_stride: stride(out, 0),
            counters: self.gpu.counters(),
            num_tokens: tokens as u32,
            top_k: self.top_k as u32,
            first: self.experts.first as u32,
            num_local: self.experts.local.len() as u32,
            dim: self.dim as u32,
            width: self.width as u32,
            shared_width: self.shared_width as u32,
            hidden_stride: self.hidden_stride as u32,
            hidden_groups: self.groups() as u32,
            x_dtype: 0,
            x_is_vectorizable: 0,
            activation_dtype: dtype_code(self.x_dtype),
            hidden_dtype: dtype_code(self.hidden_dtype),
            out_dtype: dtype_code(out.dtype()),
            dtypes: 0,
            quantizes: u32::from(self.quantizes),
            power_of_two_scales: u32::from(self.power_of_two_scales),
            has_shared: u32::from(self.shared.is_some()),
            shared: self.shared.map_or_else(Expert::default, Expert::new),
        };
        for (dtype, kind) in present(&self.gate_up) {
            args.dtypes = 1 << dtype;
            let met = match (&x.fp8, kind) {
                (Some(Fp8Activation { data, scales, .. }), Kind::Fp8) => {
                    args.x_scales = ptr(scales);
                    args.x_scale_stride = stride(scales, 0);
                    data
                }
                _ => &x.dense,
            };
            args.x = ptr(met);
            args.x_stride = stride(met, 0);
            args.x_dtype = dtype_code(met.dtype());
            args.x_is_vectorizable = u32::from(is_vectorizable(met));
            let blocks = self.width.max(self.shared_width).div_ceil(HIDDEN_COLS);
            self.launch(gate_up_kernel(kind, self.tile_rows), kind, [blocks, tiles], &args);
        }
        let is_fused = tokens <= FUSED_TOKENS;
        let last = present(&self.down).last().map(|(dtype, _)| dtype);
        for (dtype, kind) in present(&self.down) {
            args.dtypes = 1 << dtype;
            let met = if kind == Kind::Fp8 { DType::F8E4M3 } else { self.hidden_dtype };
            args.x = if kind == Kind::Fp8 { room.codes } else { room.hidden };
            args.x_stride = self.hidden_stride as i64;
            args.x_scales = room.scales;
            args.x_scale_stride = self.groups() as i64;
            args.x_dtype = dtype_code(met);
            let whole = |width: usize| (width * met.size_bytes()).is_multiple_of(16);
            args.x_is_vectorizable = u32::from(whole(self.width) && whole(self.shared_width));
            // Products of the launches before are there when the last one adds them up.
            args.counters =
                if is_fused && Some(dtype) == last { self.gpu.counters() } else { DevicePtr::default() };
            let blocks = self.dim.div_ceil(OUT_COLS);
            self.launch(down_kernel(kind, self.tile_rows), kind, [blocks, tiles], &args);
        }
        if !is_fused {
            let columns = (WARPS * self.gpu.warp_size()) as usize;
            let grid = [self.dim.div_ceil(columns), tokens.min(MAX_GRID_Y), 1];
            self.gpu.launch("moe_combine", Geometry { grid, warps: WARPS, shared_bytes: 0 }, &args);
        }
    }
}

/// Codes of element types, and their kernels.
fn present(kinds: &Kinds) -> impl Iterator<Item = (usize, Kind)> {
    kinds.iter().enumerate().filter_map(|(dtype, kind)| Some((dtype, (*kind)?)))
}

fn gate_up_kernel(kind: Kind, tile_rows: usize) -> &'static str {
    match (kind, tile_rows) {
        (Kind::Simt, _) => "moe_gate_up_simt",
        (Kind::Bf16, 16) => "moe_gate_up_bf16_16",
        (Kind::Bf16, _) => "moe_gate_up_bf16_64",
        (Kind::W8, 16) => "moe_gate_up_w8_16",
        (Kind::W8, _) => "moe_gate_up_w8_64",
        (Kind::Fp8, 16) => "moe_gate_up_fp8_16",
        (Kind::Fp8, _) => "moe_gate_up_fp8_64",
    }
}

fn down_kernel(kind: Kind, tile_rows: usize) -> &'static str {
    match (kind, tile_rows) {
        (Kind::Simt, _) => "moe_down_simt",
        (Kind::Bf16, 16) => "moe_down_bf16_16",
        (Kind::Bf16, _) => "moe_down_bf16_64",
        (Kind::W8, 16) => "moe_down_w8_16",
        (Kind::W8, _) => "moe_down_w8_64",
        (Kind::Fp8, 16) => "moe_down_fp8_16",
        (Kind::Fp8, _) => "moe_down_fp8_64",
    }
}

/// `sizeof(experts::Shared)` of a kernel's form.
fn shared_bytes(kind: Kind, tile_rows: usize) -> usize {
    // 128 bytes of a row of activations; of a weight's row as many elements; 16 bytes between rows.
    let (x, w, wide) = match kind {
        Kind::Simt => {
            let tiles = 4 * (tile_rows * 32 + 32 * (OUT_COLS + 1));
            return (tiles + 8 * tile_rows + 4).next_multiple_of(16);
        }
        Kind::Bf16 => (144, 144, 16),
        Kind::W8 => (144, 80, OUT_COLS * 144),
        Kind::Fp8 => (144, 144, 8),
    };
    let stages = if tile_rows == 16 { 3 } else { 2 };
    let stage = tile_rows * (x + 4) + OUT_COLS * (w + 4);
    (stages * stage + wide + 8 * tile_rows + 4).next_multiple_of(16)
}

pub(crate) fn experts(
    gpu: &Gpu,
    x: &Activation<Gpu>,
    ids: &Tensor<Gpu>,
    weights: &Tensor<Gpu>,
    experts: &Experts<Gpu>,
    out: &Tensor<Gpu>,
) {
    shape::experts(x, ids, weights, experts, out);
    let Some(layer) = Layer::new(gpu, x, ids.dim(1), experts, None) else { return };
    layer.run(x, ids, weights, out);
}

/// Router, shared and routed experts; in decode three launches: the router with the choice and the sort, gate and up, down.
///
/// The shared expert is one of the experts here, for any number of tokens, so that a token's bits are the same in a prefill
/// and in a decode.
pub(crate) fn moe_layer(
    gpu: &Gpu,
    x: &Activation<Gpu>,
    w: &MoeWeights<Gpu>,
    scratch: &MoeScratch<Gpu>,
    out: &Tensor<Gpu>,
) {
    if !is_supported(&w.shared) {
        return composite::moe_layer(gpu, x, w, scratch, out);
    }
    shape::experts(x, &scratch.ids, &scratch.weights, &w.experts, out);
    let router_input = Activation::dense(x.dense.clone());
    let (ids, weights) = (&scratch.ids, &scratch.weights);
    let layer = Layer::new(gpu, x, ids.dim(1), &w.experts, Some(&w.shared)).expect("a shared expert");
    let tokens = ids.dim(0);
    if tokens <= FUSED_TOKENS && layer.fits(tokens) {
        // The router's sums of ranges lie there too: they are read when the sort begins.
        let room = layer.room(tokens);
        if route::router(gpu, &router_input, w, scratch, layer.sort_args(ids, &room)) {
            return layer.sum(x, ids, weights, out, &room);
        }
    }
    linear::linear(gpu, &router_input, &w.router, &scratch.logits);
    route::route(gpu, &scratch.logits, w.bias.as_ref(), &w.routing, ids, weights);
    layer.run(x, ids, weights, out);
}
