//! Attention's results have the same bits whatever else is in the batch, however a prompt is cut into chunks, and whatever
//! longest context the geometry is made for.

use r1_backend::{Backend, Batch, Fp8Latent, HostSlice, HostSliceMut, KvCache, LatentCache, Tensor, Ticket};
use r1_core::DType;
use r1_gpu::Gpu;

const BLOCK_SIZE: usize = 16;
const SCALE: f32 = 0.2;

/// One sequence's part of a step: tokens in the cache once the step's are written, and how many of them are the step's rows.
#[derive(Clone, Copy)]
struct Turn {
    seq: usize,
    context: usize,
    rows: usize,
}

/// A padding sequence has a row and no context.
const PADDING: usize = 0;

/// Decodes with one split and with several, padding, a chunk that crosses the end of a split, and a whole prompt.
const TURNS: [Turn; 6] = [
    Turn { seq: 0, context: 3, rows: 1 },
    Turn { seq: 1, context: 777, rows: 1 },
    Turn { seq: 2, context: PADDING, rows: 1 },
    Turn { seq: 3, context: 256, rows: 1 },
    Turn { seq: 4, context: 530, rows: 40 },
    Turn { seq: 5, context: 21, rows: 21 },
];
const NUM_DECODES: usize = 4;

fn emu() -> Gpu {
    Gpu::emulated(2, 1 << 30).expect("an emulated device")
}

/// Values in -1.5..1.5 that look random; the same for the same seed.
fn noise(count: usize, seed: u32) -> Vec<f32> {
    let value = |i: usize| {
        let mixed = (i as u32).wrapping_mul(0x9e37_79b9).wrapping_add(seed).wrapping_mul(0x85eb_ca6b);
        let mixed = (mixed ^ mixed >> 15).wrapping_mul(0xc2b2_ae35);
        ((mixed >> 8) as f32 / (1 << 24) as f32 - 0.5) * 3.0
    };
    (0..count).map(value).collect()
}

fn floats(gpu: &Gpu, shape: &[usize], dtype: DType, values: &[f32]) -> Tensor<Gpu> {
    let tensor = gpu.alloc(shape, dtype).expect("room");
    gpu.upload(HostSlice::F32(values), &tensor);
    tensor
}

fn ids(gpu: &Gpu, shape: &[usize], values: &[u32]) -> Tensor<Gpu> {
    let tensor = gpu.alloc(shape, DType::U32).expect("room");
    gpu.upload(HostSlice::U32(values), &tensor);
    tensor
}

fn wait(ticket: Ticket) {
    ticket.wait().expect("no launch fails");
}

/// The batch of some turns; blocks of sequence `s` are `s * max_blocks..`.
fn batch(gpu: &Gpu, turns: &[Turn], num_decodes: usize, max_context_len: usize) -> Batch<Gpu> {
    let max_blocks = 1 + TURNS.iter().map(|turn| turn.context.div_ceil(BLOCK_SIZE)).max().unwrap_or(0);
    let (mut query_start, mut context_start) = (vec![0], vec![0]);
    let (mut lens, mut table) = (Vec::new(), Vec::new());
    for (i, turn) in turns.iter().enumerate() {
        query_start.push(query_start[i] + turn.rows as u32);
        context_start.push(context_start[i] + turn.context as u32);
        lens.push(turn.context as u32);
        table.extend((0..max_blocks).map(|block| (turn.seq * max_blocks + block) as u32));
    }
    let (num_seqs, num_tokens) = (turns.len(), query_start[turns.len()] as usize);
    Batch {
        positions: ids(gpu, &[num_tokens], &vec![0; num_tokens]),
        slots: ids(gpu, &[num_tokens], &vec![0; num_tokens]),
        query_start: ids(gpu, &[num_seqs + 1], &query_start),
        context_len: ids(gpu, &[num_seqs], &lens),
        context_start: ids(gpu, &[num_seqs + 1], &context_start),
        block_table: ids(gpu, &[num_seqs, max_blocks], &table),
        num_tokens,
        num_seqs,
        num_decodes,
        prefill_context_tokens: turns[num_decodes..].iter().map(|turn| turn.context).sum(),
        max_context_len,
    }
}

/// Every row of every turn alone, as a step that decodes.
fn single_rows(turns: &[Turn]) -> Vec<Turn> {
    let rows = |turn: &Turn| {
        let Turn { seq, context, rows } = *turn;
        (0..rows).map(move |row| Turn { seq, context: (context + row + 1).saturating_sub(rows), rows: 1 })
    };
    turns.iter().flat_map(rows).collect()
}

struct Layer {
    heads: usize,
    latent: usize,
    rope: usize,
    dtype: DType,
    cache: LatentCache<Gpu>,
    q_latent: Vec<f32>,
    q_rope: Vec<f32>,
}

impl Layer {
    fn new(gpu: &Gpu, [heads, latent, rope]: [usize; 3], dtype: DType, cache_dtype: DType) -> Self {
        let max_blocks = 1 + TURNS.iter().map(|turn| turn.context.div_ceil(BLOCK_SIZE)).max().unwrap_or(0);
        let pages = [max_blocks * TURNS.len(), BLOCK_SIZE];
        let tokens = pages[0] * pages[1];
        let cache = LatentCache::alloc(gpu, cache_dtype, pages, latent, rope).expect("room");
        gpu.upload(HostSlice::F32(&noise(cache.data.num_elements(), 1)), &cache.data);
        if let Some(Fp8Latent { scales, rope: keys }) = &cache.fp8 {
            let positive: Vec<_> = noise(scales.num_elements(), 2).iter().map(|v| v.abs() + 0.1).collect();
            gpu.upload(HostSlice::F32(&positive), scales);
            gpu.upload(HostSlice::F32(&noise(tokens * rope, 3)), keys);
        }
        let rows: usize = TURNS.iter().map(|turn| turn.rows).sum();
        let (q_latent, q_rope) = (noise(rows * heads * latent, 4), noise(rows * heads * rope, 5));
        Self { heads, latent, rope, dtype, cache, q_latent, q_rope }
    }

    /// The rows `first_row..` of the layer's queries, as the rows of these turns.
    fn run(
        &self,
        gpu: &Gpu,
        turns: &[Turn],
        num_decodes: usize,
        first_row: usize,
        longest: usize,
    ) -> Vec<u32> {
        let batch = batch(gpu, turns, num_decodes, longest);
        let tokens = batch.num_tokens;
        let query = |values: &[f32], width: usize| {
            let per_row = self.heads * width;
            let rows = &values[first_row * per_row..(first_row + tokens) * per_row];
            floats(gpu, &[tokens, self.heads, width], self.dtype, rows)
        };
        let out = gpu.alloc(&[tokens, self.heads, self.latent], self.dtype).expect("room");
        let poison = vec![f32::NAN; out.num_elements()];
        gpu.upload(HostSlice::F32(&poison), &out);
        let (q_latent, q_rope) = (query(&self.q_latent, self.latent), query(&self.q_rope, self.rope));
        gpu.mla_attention(&q_latent, &q_rope, &self.cache, &batch, 0..turns.len(), SCALE, &out);
        wait(gpu.flush());
        let mut values = poison;
        gpu.download(&out, HostSliceMut::F32(&mut values)).expect("a download");
        values.into_iter().map(f32::to_bits).collect()
    }
}

#[test]
fn absorbed_rows_ignore_batch_chunk_and_geometry() {
    let gpu = emu();
    let dtypes = [
        (DType::BF16, DType::BF16),
        (DType::BF16, DType::F8E4M3),
        (DType::F32, DType::F32),
        (DType::F32, DType::F8E4M3),
    ];
    for sizes in [[3, 36, 6], [2, 512, 64]] {
        for (dtype, cache_dtype) in dtypes {
            let layer = Layer::new(&gpu, sizes, dtype, cache_dtype);
            let what = format!("{sizes:?} {dtype} over {cache_dtype}");
            let whole = layer.run(&gpu, &TURNS, NUM_DECODES, 0, 777);
            assert!(whole.iter().all(|bits| !f32::from_bits(*bits).is_nan()), "{what}: a row is left out");
            let width = layer.heads * layer.latent;
            assert!(whole[2 * width..3 * width].iter().all(|&bits| bits == 0), "{what}: padding gives zeros");
            // As a captured step's geometry, with packs of several rows and of one.
            for longest in [16_384, 100_000] {
                assert!(
                    layer.run(&gpu, &TURNS, NUM_DECODES, 0, longest) == whole,
                    "{what}: made for {longest}"
                );
            }
            let rows = single_rows(&TURNS);
            assert!(layer.run(&gpu, &rows, rows.len(), 0, 777) == whole, "{what}: rows as decodes");
            for row in [0, 1, 3, 4, 17, 29, 43, 64] {
                let turn = rows[row];
                let alone = layer.run(&gpu, &[turn], 1, row, turn.context);
                assert!(alone == whole[row * width..(row + 1) * width], "{what}: row {row} alone");
            }
        }
    }
}

#[test]
fn grouped_rows_ignore_batch_chunk_and_geometry() {
    let gpu = emu();
    let max_blocks = 1 + TURNS.iter().map(|turn| turn.context.div_ceil(BLOCK_SIZE)).max().unwrap_or(0);
    let rows_of = |turns: &[Turn]| turns.iter().map(|turn| turn.rows).sum::<usize>();
    for [heads, kv_heads, key, value] in [[6, 2, 10, 12], [20, 1, 128, 128]] {
        for dtype in [DType::BF16, DType::F32] {
            let entries = |dim: usize, seed: u32| {
                let shape = [max_blocks * TURNS.len(), BLOCK_SIZE, kv_heads, dim];
                floats(&gpu, &shape, dtype, &noise(shape.iter().product(), seed))
            };
            let cache = KvCache { k: entries(key, 1), v: entries(value, 2) };
            let queries = noise(rows_of(&TURNS) * heads * key, 3);
            let run = |turns: &[Turn], num_decodes: usize, first_row: usize, longest: usize| {
                let batch = batch(&gpu, turns, num_decodes, longest);
                let tokens = rows_of(turns);
                let rows = &queries[first_row * heads * key..][..tokens * heads * key];
                let q = floats(&gpu, &[tokens, heads, key], dtype, rows);
                let out = gpu.alloc(&[tokens, heads, value], dtype).expect("room");
                gpu.upload(HostSlice::F32(&vec![f32::NAN; out.num_elements()]), &out);
                gpu.gqa_attention(&q, &cache, &batch, 0..turns.len(), SCALE, &out);
                wait(gpu.flush());
                let mut values = vec![0.0; out.num_elements()];
                gpu.download(&out, HostSliceMut::F32(&mut values)).expect("a download");
                values.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let what = format!("{heads} heads over {kv_heads} {dtype}");
            let whole = run(&TURNS, NUM_DECODES, 0, 777);
            assert!(whole.iter().all(|bits| !f32::from_bits(*bits).is_nan()), "{what}: a row is left out");
            assert!(run(&TURNS, NUM_DECODES, 0, 100_000) == whole, "{what}: made for longer contexts");
            // Splits of rows that prefill are added in one block, those of rows that decode by a second launch.
            let rows = single_rows(&TURNS);
            assert!(run(&rows, rows.len(), 0, 777) == whole, "{what}: rows as decodes");
            let width = heads * value;
            for row in [1, 4, 29, 43, 64] {
                let alone = run(&rows[row..=row], 1, row, rows[row].context);
                assert!(alone == whole[row * width..][..width], "{what}: row {row} alone");
            }
        }
    }
}

#[test]
fn expanded_rows_ignore_batch_and_chunk() {
    let gpu = emu();
    let turns = [Turn { seq: 0, context: 150, rows: 100 }, Turn { seq: 1, context: 75, rows: 75 }];
    for [heads, nope, rope, value] in [[2, 10, 6, 12], [1, 128, 64, 128]] {
        for dtype in [DType::BF16, DType::F32] {
            let run = |turns: &[Turn], first_row: usize, first_key: usize| {
                let batch = batch(&gpu, turns, 0, 150);
                let (tokens, keys) = (batch.num_tokens, batch.prefill_context_tokens);
                let input = |shape: &[usize], first: usize, seed: u32| {
                    let width: usize = shape[1..].iter().product();
                    let values = noise((first + shape[0]) * width, seed);
                    floats(&gpu, shape, dtype, &values[first * width..])
                };
                let q = input(&[tokens, heads, nope + rope], first_row, 1);
                let kv = input(&[keys, heads, nope + value], first_key, 2);
                let k_rope = input(&[keys, rope], first_key, 3);
                let out = gpu.alloc(&[tokens, heads, value], dtype).expect("room");
                gpu.mla_attention_expanded(&q, &kv, &k_rope, &batch, 0..turns.len(), SCALE, &out);
                wait(gpu.flush());
                let mut values = vec![f32::NAN; out.num_elements()];
                gpu.download(&out, HostSliceMut::F32(&mut values)).expect("a download");
                values.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let whole = run(&turns, 0, 0);
            let width = heads * value;
            assert!(whole.iter().any(|&bits| bits != 0));
            for (first, turn) in [
                (0, Turn { seq: 0, context: 80, rows: 30 }),
                (30, Turn { seq: 0, context: 150, rows: 70 }),
                (99, Turn { seq: 0, context: 150, rows: 1 }),
            ] {
                let chunk = run(&[turn], first, 0);
                assert!(
                    chunk == whole[first * width..(first + turn.rows) * width],
                    "{dtype}: rows from {first}"
                );
            }
            assert!(run(&turns[1..], 100, 150) == whole[100 * width..], "{dtype}: the second sequence alone");
        }
    }
}
