//! Bit for bit: a row's result depends on neither the batch, the chunking, the threads, nor the way an operation was cut.

mod support;

use r1_backend::{
    Activation, Backend, Batch, Experts, GroupScore, Groups, HeadForm, HeadWeight, HostSlice, LatentCache,
    LogprobsOut, MlpWeights, RopeTable, Routing, RowSampling, SamplingBatch, ScoreFunction, Tensor, Weight,
};
use r1_core::DType;
use r1_cpu::Cpu;
use support::{
    FORMATS, Random, assert_close, bits, cpu, every_isa, ids, int4, read, read_ids, tensor, weight,
};

/// Sizes past every blocking constant: spans of K, token blocks, rows per task, and none a multiple of a vector.
const LINEAR: [[usize; 3]; 4] = [[33, 70, 300], [130, 37, 2100], [5, 131, 1031], [64, 7, 1024]];

#[test]
fn linear_rows_are_those_of_single_tokens() {
    for cpu in every_isa(3) {
        let mut random = Random(1);
        for format in FORMATS {
            for [tokens, n, k] in LINEAR {
                let k = if format.0 == DType::U32 { k.next_multiple_of(8) } else { k };
                let what = format!("{} [{tokens}, {k}] x [{n}, {k}] {format:?}", cpu.describe());
                let (w, values) = weight(&cpu, &mut random, [n, k], format);
                let host = random.floats(tokens * k);
                let x = Activation::dense(tensor(&cpu, &host, &[tokens, k], DType::F32));
                let out = cpu.alloc(&[tokens, n], DType::F32).expect("room");
                cpu.linear(&x, &w, &out);
                let all = read(&cpu, &out);
                let dot = |t: usize, row: usize| {
                    let pairs = host[t * k..][..k].iter().zip(&values[row * k..][..k]);
                    pairs.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>()
                };
                let want: Vec<f64> = (0..tokens * n).map(|i| dot(i / n, i % n)).collect();
                assert_close(&all, &want, k, &what);
                for count in [1, 2, 3, 4, 5] {
                    for start in [0, tokens - count] {
                        let part = cpu.alloc(&[count, n], DType::F32).expect("room");
                        cpu.linear(&x.rows(start..start + count), &w, &part);
                        let want = &all[start * n..][..count * n];
                        assert_eq!(bits(&read(&cpu, &part)), bits(want), "{what}: {count} rows from {start}");
                    }
                }
            }
        }
    }
}

/// Tokens, N, K, group.
const INT4: [[usize; 4]; 3] = [[33, 70, 304, 128], [130, 37, 2104, 64], [5, 131, 8200, 8]];

/// Also past a strip of widened rows, and the same bits with another number of threads, which cut the rows otherwise.
#[test]
fn int4_linear_rows_are_those_of_single_tokens() {
    for isa in r1_cpu::Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let one_thread = cpu(Some(isa), 1);
        for [tokens, n, k, group] in INT4 {
            let run = |cpu: &Cpu, rows: std::ops::Range<usize>| {
                let mut random = Random(8);
                let (w, _) = int4(cpu, &mut random, [n, k], group);
                let x = tensor(cpu, &random.floats(tokens * k), &[tokens, k], DType::BF16);
                let out = cpu.alloc(&[rows.len(), n], DType::F32).expect("room");
                cpu.linear(&Activation::dense(x.rows(rows)), &w, &out);
                bits(&read(cpu, &out))
            };
            let all = run(&one_thread, 0..tokens);
            let three_threads = cpu(Some(isa), 3);
            assert_eq!(run(&three_threads, 0..tokens), all, "{isa} [{n}, {k}]");
            for count in [1, 2, 3, 4, 5] {
                let start = tokens - count;
                let part = run(&three_threads, start..tokens);
                assert_eq!(part, all[start * n..], "{isa} [{n}, {k}]: {count} rows from {start}");
            }
        }
    }
}

#[test]
fn per_head_rows_are_those_of_single_tokens() {
    for cpu in every_isa(2) {
        let mut random = Random(2);
        // Those in groups are for linears and experts alone.
        for format in FORMATS.into_iter().filter(|(dtype, _)| !matches!(dtype, DType::I8 | DType::U32)) {
            for form in [HeadForm::RowsIn, HeadForm::RowsOut] {
                let (tokens, heads, rows_per_head, k) = (9, 3, 90, 200);
                let (weight, _) = weight(&cpu, &mut random, [heads * rows_per_head, k], format);
                let w = HeadWeight { weight, rows_per_head, rows: 10..75, form };
                let (from, to) = if form == HeadForm::RowsIn { (65, k) } else { (k, 65) };
                let x = random.floats(tokens * heads * from);
                let x = tensor(&cpu, &x, &[tokens, heads, from], DType::F32);
                let out = cpu.alloc(&[tokens, heads, to], DType::F32).expect("room");
                cpu.per_head(&x, &w, &out);
                let all = read(&cpu, &out);
                for t in 0..tokens {
                    let one = cpu.alloc(&[1, heads, to], DType::F32).expect("room");
                    cpu.per_head(&x.rows(t..t + 1), &w, &one);
                    let want = &all[t * heads * to..][..heads * to];
                    assert_eq!(bits(&read(&cpu, &one)), bits(want), "{form:?} {format:?} token {t}");
                }
            }
        }
    }
}

/// One expert of each format.
fn expert_weights(
    cpu: &Cpu,
    random: &mut Random,
    formats: &[(DType, [usize; 2])],
    [i, d]: [usize; 2],
) -> Experts<Cpu> {
    let mut one = |size, format| weight(cpu, random, size, format).0;
    let local = formats
        .iter()
        .map(|&format| MlpWeights {
            gate: one([i, d], format),
            up: one([i, d], format),
            down: one([d, i], format),
        })
        .collect();
    Experts::new(cpu, local, 2, formats.len() + 4).expect("no table is made")
}

#[test]
fn experts_rows_are_those_of_single_tokens() {
    for cpu in every_isa(2) {
        // Int4 rows are whole words.
        for (dtype, formats, d) in [
            (DType::F32, &FORMATS[..7], 70),
            (DType::BF16, &FORMATS[..7], 70),
            (DType::BF16, &FORMATS[..], 72),
        ] {
            let mut random = Random(3);
            // More tokens than are worked on together, so that batches of them meet too.
            let (tokens, k, i, count) = (530, 3, 40, formats.len());
            let experts = expert_weights(&cpu, &mut random, formats, [i, d]);
            // Some ids belong to other ranks; token 5 has one expert twice.
            let mut chosen: Vec<u32> = (0..tokens * k).map(|_| random.below(count + 4) as u32).collect();
            chosen[15..18].copy_from_slice(&[4, 4, 3]);
            let x = Activation::dense(tensor(&cpu, &random.floats(tokens * d), &[tokens, d], dtype));
            let chosen = ids(&cpu, &chosen, &[tokens, k]);
            let weights = tensor(&cpu, &random.floats(tokens * k), &[tokens, k], DType::F32);
            let before = random.floats(tokens * d);
            let out = tensor(&cpu, &before, &[tokens, d], dtype);
            cpu.experts(&x, &chosen, &weights, &experts, &out);
            let all = read(&cpu, &out);
            for t in (0..tokens).step_by(97).chain([5]) {
                let row = t..t + 1;
                let one = tensor(&cpu, &before[t * d..][..d], &[1, d], dtype);
                cpu.experts(
                    &x.rows(row.clone()),
                    &chosen.rows(row.clone()),
                    &weights.rows(row),
                    &experts,
                    &one,
                );
                assert_eq!(bits(&read(&cpu, &one)), bits(&all[t * d..][..d]), "{dtype} token {t}");
            }
        }
    }
}

/// Sequences of `(rows, context)` over a cache of blocks in a scrambled order, poisoned past every context.
struct Paged {
    batch: Batch<Cpu>,
    cache: LatentCache<Cpu>,
    latent: Vec<Vec<Vec<f32>>>,
}

/// The cache holds `image` `[blocks, block, width]`; gives what it then stands for.
fn filled_cache(
    cpu: &Cpu,
    dtype: DType,
    [blocks, block]: [usize; 2],
    [latent_dim, width]: [usize; 2],
    image: &[f32],
) -> (LatentCache<Cpu>, Vec<f32>) {
    let rope_dim = width - latent_dim;
    let cache = LatentCache::alloc(cpu, dtype, [blocks, block], latent_dim, rope_dim).expect("room");
    let Some(fp8) = &cache.fp8 else {
        cpu.upload(HostSlice::F32(image), &cache.data);
        return (cache, image.to_vec());
    };
    let (mut codes, mut scales, mut rope) = (Vec::new(), Vec::new(), Vec::new());
    for entry in image.chunks(width) {
        for group in entry[..latent_dim].chunks(128) {
            // Poison has a poisoned scale.
            let scale = if group[0].is_nan() { f32::NAN } else { 1.0 / 448.0 };
            codes.extend(group.iter().map(|value| value / scale));
            scales.push(scale);
        }
        rope.extend_from_slice(&entry[latent_dim..]);
    }
    for (values, part) in [(codes, &cache.data), (scales, &fp8.scales), (rope, &fp8.rope)] {
        cpu.upload(HostSlice::F32(&values), part);
    }
    let [codes, scales, rope] = [&cache.data, &fp8.scales, &fp8.rope].map(|part| read(cpu, part));
    let groups = latent_dim.div_ceil(128);
    let value = |i: usize| {
        let (slot, column) = (i / width, i % width);
        match column.checked_sub(latent_dim) {
            Some(column) => rope[slot * rope_dim + column],
            None => codes[slot * latent_dim + column] * scales[slot * groups + column / 128],
        }
    };
    let held = (0..image.len()).map(value).collect();
    (cache, held)
}

fn paged(
    cpu: &Cpu,
    seqs: &[(usize, usize)],
    [latent_dim, width]: [usize; 2],
    max_blocks: usize,
    cache_dtype: DType,
) -> Paged {
    const BLOCK: usize = 16;
    let mut image = vec![f32::NAN; max_blocks * seqs.len() * BLOCK * width];
    let mut table = vec![u32::MAX; seqs.len() * max_blocks];
    let mut slots = Vec::new();
    for (s, &(_, context)) in seqs.iter().enumerate() {
        // Content depends on the context alone, so that a sequence is the same wherever it lies.
        let mut random = Random(context as u64);
        let rows: Vec<Vec<f32>> = (0..context).map(|_| random.floats(width)).collect();
        let mut slots_of = Vec::new();
        for (j, row) in rows.iter().enumerate() {
            let block = (j / BLOCK) * seqs.len() + (seqs.len() - 1 - s);
            table[s * max_blocks + j / BLOCK] = block as u32;
            slots_of.push(block * BLOCK + j % BLOCK);
            image[slots_of[j] * width..][..width].copy_from_slice(row);
        }
        slots.push(slots_of);
    }
    let sums = |of: &dyn Fn(&(usize, usize)) -> usize| {
        let mut sums = vec![0u32];
        for seq in seqs {
            sums.push(sums[sums.len() - 1] + of(seq) as u32);
        }
        sums
    };
    let tokens = seqs.iter().map(|seq| seq.0).sum::<usize>();
    let context_len: Vec<u32> = seqs.iter().map(|seq| seq.1 as u32).collect();
    let zeros = vec![0u32; tokens];
    let (cache, held) =
        filled_cache(cpu, cache_dtype, [max_blocks * seqs.len(), BLOCK], [latent_dim, width], &image);
    let row = |&slot: &usize| held[slot * width..][..width].to_vec();
    let latent = slots.iter().map(|slots| slots.iter().map(row).collect()).collect();
    Paged {
        batch: Batch {
            positions: ids(cpu, &zeros, &[tokens]),
            slots: ids(cpu, &zeros, &[tokens]),
            query_start: ids(cpu, &sums(&|seq| seq.0), &[seqs.len() + 1]),
            context_len: ids(cpu, &context_len, &[seqs.len()]),
            context_start: ids(cpu, &sums(&|seq| seq.1), &[seqs.len() + 1]),
            block_table: ids(cpu, &table, &[seqs.len(), max_blocks]),
            num_tokens: tokens,
            num_seqs: seqs.len(),
            num_decodes: 0,
            prefill_context_tokens: 0,
            max_context_len: seqs.iter().map(|seq| seq.1).max().unwrap_or(0),
        },
        cache,
        latent,
    }
}

/// Queries of a row depend on its position alone.
fn queries(seqs: &[(usize, usize)], len: usize, salt: u64) -> Vec<f32> {
    let position = |&(rows, context): &(usize, usize)| (context - rows..context).map(move |p| (context, p));
    seqs.iter()
        .flat_map(position)
        .flat_map(|(context, p)| Random((context * 10_000 + p) as u64 ^ salt << 40).floats(len))
        .collect()
}

const HEADS: usize = 5;
const LATENT: usize = 40;
const ROPE: usize = 6;

fn attend(cpu: &Cpu, seqs: &[(usize, usize)], cache_dtype: DType) -> (Vec<f32>, Paged) {
    let paged = paged(cpu, seqs, [LATENT, LATENT + ROPE], 120, cache_dtype);
    let tokens = paged.batch.num_tokens;
    let q =
        |len: usize, salt| tensor(cpu, &queries(seqs, HEADS * len, salt), &[tokens, HEADS, len], DType::F32);
    let (q_latent, q_rope) = (q(LATENT, 1), q(ROPE, 2));
    let out = cpu.alloc(&[tokens, HEADS, LATENT], DType::F32).expect("room");
    cpu.mla_attention(&q_latent, &q_rope, &paged.cache, &paged.batch, 0..seqs.len(), 0.3, &out);
    (read(cpu, &out), paged)
}

/// Long contexts: many tiles, several splits, in turn and side by side.
#[test]
fn attention_is_right_over_splits_and_the_same_however_it_is_cut() {
    attention_however_it_is_cut(DType::F32);
}

#[test]
fn attention_over_an_fp8_cache_is_right_and_the_same_however_it_is_cut() {
    attention_however_it_is_cut(DType::F8E4M3);
}

fn attention_however_it_is_cut(cache_dtype: DType) {
    for isa in r1_cpu::Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        let alone = cpu(Some(isa), 1);
        let seqs = [(1, 1800), (3, 700), (1, 512), (2, 513)];
        let (together, paged) = attend(&alone, &seqs, cache_dtype);
        let q_latent = queries(&seqs, HEADS * LATENT, 1);
        let q_rope = queries(&seqs, HEADS * ROPE, 2);
        let mut t = 0;
        for (s, &(rows, context)) in seqs.iter().enumerate() {
            for i in 0..rows {
                for h in 0..HEADS {
                    let q: Vec<f32> = [
                        &q_latent[(t * HEADS + h) * LATENT..][..LATENT],
                        &q_rope[(t * HEADS + h) * ROPE..][..ROPE],
                    ]
                    .concat();
                    let seen = &paged.latent[s][..context - rows + 1 + i];
                    let dot = |k: &Vec<f32>| {
                        q.iter().zip(k).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>()
                    };
                    let p: Vec<f64> = seen.iter().map(|k| (dot(k) * f64::from(0.3f32)).exp()).collect();
                    let sum = p.iter().sum::<f64>();
                    let column =
                        |c: usize| p.iter().zip(seen).map(|(p, k)| p * f64::from(k[c])).sum::<f64>() / sum;
                    let want: Vec<f64> = (0..LATENT).map(column).collect();
                    assert_close(&together[(t * HEADS + h) * LATENT..][..LATENT], &want, 8, "attention");
                }
                t += 1;
            }
        }
        // Each sequence alone, with enough threads for splits to run side by side.
        let many = cpu(Some(isa), 6);
        let mut start = 0;
        for seq in seqs {
            let len = seq.0 * HEADS * LATENT;
            assert_eq!(
                bits(&attend(&many, &[seq], cache_dtype).0),
                bits(&together[start..][..len]),
                "{isa} {seq:?}"
            );
            start += len;
        }
        // The last row of a chunk is what it is alone.
        let whole = attend(&many, &[(40, 640)], cache_dtype).0;
        let last = attend(&alone, &[(1, 640)], cache_dtype).0;
        assert_eq!(bits(&last), bits(&whole[whole.len() - HEADS * LATENT..]), "{isa}");
    }
}

#[test]
fn expanded_attention_does_not_depend_on_chunks() {
    const KEY: usize = 20;
    const VALUE: usize = 10;
    for cpu in every_isa(2) {
        let context = 150;
        let mut random = Random(7);
        let kv = random.floats(context * HEADS * (KEY - ROPE + VALUE));
        let kv = tensor(&cpu, &kv, &[context, HEADS, KEY - ROPE + VALUE], DType::F32);
        let k_rope = tensor(&cpu, &random.floats(context * ROPE), &[context, ROPE], DType::F32);
        let run = |rows: usize| {
            let seqs = [(rows, context)];
            let batch = paged(&cpu, &seqs, [LATENT, LATENT + ROPE], 10, DType::F32).batch;
            let q = tensor(&cpu, &queries(&seqs, HEADS * KEY, 3), &[rows, HEADS, KEY], DType::F32);
            let out = cpu.alloc(&[rows, HEADS, VALUE], DType::F32).expect("room");
            cpu.mla_attention_expanded(&q, &kv, &k_rope, &batch, 0..1, 0.4, &out);
            read(&cpu, &out)
        };
        let whole = run(context);
        for rows in [1, 5, 33, 70] {
            let part = run(rows);
            assert_eq!(bits(&part), bits(&whole[whole.len() - part.len()..]), "{rows} rows");
        }
    }
}

#[test]
fn threads_change_no_bit() {
    let run = |threads: usize| {
        let cpu = cpu(None, threads);
        let mut random = Random(11);
        let (w, _) = weight(&cpu, &mut random, [500, 700], FORMATS[3]);
        let x = Activation::dense(tensor(&cpu, &random.floats(12 * 700), &[12, 700], DType::BF16));
        let out = cpu.alloc(&[12, 500], DType::F32).expect("room");
        cpu.linear(&x, &w, &out);
        bits(&read(&cpu, &out))
    };
    let one = run(1);
    for threads in [2, 3, 7] {
        assert_eq!(run(threads), one, "{threads} threads");
    }
}

/// A NaN code makes its output NaN, and no other; all other codes stay what they are, however many tokens there are.
#[test]
fn fp8_nan_codes_stay_nan() {
    for cpu in every_isa(1) {
        for tokens in [1, 3, 8] {
            let (n, k) = (5, 150);
            let mut codes = vec![0x38u8; n * k];
            codes[3 * k + 149] = 0xff;
            codes[k + 2] = 0x7f;
            let weight = Weight::Fp8Block {
                data: cpu.import_matrix(&support::codes(codes, &[n, k])).expect("import"),
                scales: tensor(&cpu, &[0.5, 0.5], &[1, 2], DType::F32),
                block: [128, 128],
                offset: [0, 0],
            };
            let x = Activation::dense(tensor(&cpu, &vec![1.0; tokens * k], &[tokens, k], DType::F32));
            let out = cpu.alloc(&[tokens, n], DType::F32).expect("room");
            cpu.linear(&x, &weight, &out);
            for (i, &value) in read(&cpu, &out).iter().enumerate() {
                let nan = [1, 3].contains(&(i % n));
                assert!(
                    if nan { value.is_nan() } else { value == 75.0 },
                    "{} tokens {tokens}: {value}",
                    cpu.describe()
                );
            }
        }
    }
}

/// Rows of `[tokens, …]` tensors: runs `op` on all of them and on some alone, and compares the bits of what it wrote.
/// `make` gives the tensors anew, since operations write to some of them.
fn rows_alone(
    what: &str,
    tokens: usize,
    make: &dyn Fn() -> Vec<Tensor<Cpu>>,
    op: &dyn Fn(&[Tensor<Cpu>]),
    read: &dyn Fn(&Tensor<Cpu>) -> Vec<u32>,
) {
    let all = make();
    op(&all);
    for (start, len) in [(0, 1), (tokens / 2, 1), (tokens - 1, 1), (3, 5), (tokens - 7, 7)] {
        let some: Vec<_> = make().iter().map(|tensor| tensor.rows(start..start + len)).collect();
        op(&some);
        for (i, (part, whole)) in some.iter().zip(&all).enumerate() {
            let want = read(&whole.rows(start..start + len));
            assert_eq!(read(part), want, "{what}: tensor {i}, {len} rows from {start}");
        }
    }
}

/// The operations that work row by row, on more rows than one task takes.
#[test]
fn other_rows_are_those_of_single_tokens() {
    for cpu in every_isa(3) {
        let (tokens, d) = (67, 333);
        let float =
            |seed, cols, dtype| tensor(&cpu, &Random(seed).floats(tokens * cols), &[tokens, cols], dtype);
        let words = |t: &Tensor<Cpu>| match t.dtype() {
            DType::U32 => read_ids(&cpu, t),
            _ => bits(&read(&cpu, t)),
        };
        let norm = tensor(&cpu, &Random(9).floats(d), &[d], DType::F32);
        for dtype in [DType::F32, DType::BF16] {
            let three = || vec![float(1, d, dtype), float(2, d, dtype), float(3, d, dtype)];
            let check = |what: &str, op: &dyn Fn(&[Tensor<Cpu>])| {
                rows_alone(&format!("{what} {dtype} {}", cpu.describe()), tokens, &three, op, &words);
            };
            let out = |t: &Tensor<Cpu>| Activation::dense(t.clone());
            check("rms_norm", &|t| cpu.rms_norm(&t[0], &norm, 1e-6, &out(&t[1])));
            check("add", &|t| cpu.add(&t[0], &t[1]));
            check("add_rms_norm", &|t| cpu.add_rms_norm(&t[0], &t[1], &norm, 1e-6, &out(&t[2])));
            let gated = || vec![float(1, 2 * d, dtype), float(2, d, dtype)];
            rows_alone("silu_mul", tokens, &gated, &|t| cpu.silu_mul(&t[0], &out(&t[1])), &words);
            let table = tensor(&cpu, &Random(4).floats(19 * d), &[19, d], dtype);
            let looked_up = || {
                let chosen: Vec<u32> = (0..tokens as u32).map(|t| t * 7 % 23).collect();
                vec![ids(&cpu, &chosen, &[tokens]), float(1, d, dtype)]
            };
            rows_alone("embed", tokens, &looked_up, &|t| cpu.embed(&t[0], &table, 2, &t[1]), &words);
        }
        let routing = Routing {
            score: ScoreFunction::Sigmoid,
            groups: Some(Groups { n_group: 4, topk_group: 2, score: GroupScore::TopTwoSum }),
            top_k: 5,
            norm_topk_prob: true,
            routed_scaling_factor: 2.5,
        };
        let bias = tensor(&cpu, &Random(5).floats(36), &[36], DType::F32);
        let routed = || {
            let chosen = ids(&cpu, &vec![0; tokens * 5], &[tokens, 5]);
            vec![float(1, 36, DType::F32), chosen, float(2, 5, DType::F32)]
        };
        for (score, groups) in [(ScoreFunction::Sigmoid, routing.groups), (ScoreFunction::Softmax, None)] {
            let routing = Routing { score, groups, ..routing };
            let op = |t: &[Tensor<Cpu>]| cpu.route(&t[0], Some(&bias), &routing, &t[1], &t[2]);
            rows_alone("route", tokens, &routed, &op, &words);
        }
    }
}

/// Queries are rotated and latents written to the cache as they are alone; the cache's other rows are left alone.
#[test]
fn rope_and_cache_rows_are_those_of_single_tokens() {
    for cpu in every_isa(3) {
        for [dtype, cache_dtype] in [
            [DType::F32, DType::F32],
            [DType::BF16, DType::BF16],
            [DType::F32, DType::F8E4M3],
            [DType::BF16, DType::F8E4M3],
        ] {
            let (tokens, blocks, block) = (50, 5, 16);
            let norm = tensor(&cpu, &Random(1).floats(LATENT), &[LATENT], dtype);
            let rope =
                RopeTable { cos_sin: tensor(&cpu, &Random(2).floats(99 * ROPE), &[99, ROPE], DType::F32) };
            let run = |rows: std::ops::Range<usize>| {
                let n = rows.len();
                let pick = |values: &[f32], cols: usize| values[rows.start * cols..rows.end * cols].to_vec();
                let q = pick(&Random(3).floats(tokens * HEADS * ROPE), HEADS * ROPE);
                let kv = pick(&Random(4).floats(tokens * (LATENT + ROPE)), LATENT + ROPE);
                let q = tensor(&cpu, &q, &[n, HEADS, ROPE], dtype);
                let kv = tensor(&cpu, &kv, &[n, LATENT + ROPE], dtype);
                let mut batch = paged(&cpu, &[(n, n)], [LATENT, LATENT + ROPE], blocks, DType::F32).batch;
                let slot = |t: usize| (t * 37 % (blocks * block)) as u32;
                batch.positions = ids(&cpu, &rows.clone().map(|t| t as u32).collect::<Vec<_>>(), &[n]);
                batch.slots = ids(&cpu, &rows.clone().map(slot).collect::<Vec<_>>(), &[n]);
                let cache =
                    LatentCache::alloc(&cpu, cache_dtype, [blocks, block], LATENT, ROPE).expect("room");
                cpu.rope_cache(&q, &kv, &norm, 1e-6, &rope, &batch, &cache);
                let beside = cache.fp8.iter().flat_map(|fp8| [&fp8.scales, &fp8.rope]);
                let parts: Vec<_> = std::iter::once(&cache.data)
                    .chain(beside)
                    .map(|part| (read(&cpu, part), part.dim(2)))
                    .collect();
                let row = |t: usize| -> Vec<u32> {
                    let of =
                        |(part, width): &(Vec<f32>, usize)| bits(&part[slot(t) as usize * width..][..*width]);
                    parts.iter().flat_map(of).collect()
                };
                (bits(&read(&cpu, &q)), rows.clone().map(row).collect::<Vec<_>>())
            };
            let (q, cached) = run(0..tokens);
            for rows in [0..1, 20..21, 49..50, 3..17] {
                let (part, part_cached) = run(rows.clone());
                assert_eq!(part, q[rows.start * HEADS * ROPE..rows.end * HEADS * ROPE], "{dtype} {rows:?}");
                assert_eq!(part_cached, cached[rows.clone()], "{dtype} into {cache_dtype} {rows:?}");
            }
        }
    }
}

/// What is drawn of a row, and its log-probabilities, are what they are alone.
#[test]
fn sampled_rows_are_those_of_single_rows() {
    for cpu in every_isa(3) {
        let (rows, vocab, most) = (23, 3001, 4);
        let values: Vec<f32> = Random(6).floats(rows * vocab).iter().map(|z| z * 8.0).collect();
        let logits = tensor(&cpu, &values, &[rows, vocab], DType::F32);
        let row = |i: usize| RowSampling {
            temperature: [0.0, 0.7, 1.0, 1.3][i % 4],
            top_p: [1.0, 0.9, 0.5][i % 3],
            top_k: [0, 40, 0, 0, 7][i % 5],
            min_p: [0.0, 0.0, 0.05][i % 3],
            seed: 11,
            position: i as u64,
            ..RowSampling::greedy()
        };
        let run = |range: std::ops::Range<usize>| {
            let n = range.len();
            let logits = logits.rows(range.clone());
            let sampling = SamplingBatch { rows: range.map(row).collect(), ..SamplingBatch::default() };
            let drawn = ids(&cpu, &vec![0; n], &[n]);
            cpu.sample(&logits, &sampling, &drawn);
            let out = LogprobsOut {
                chosen: cpu.alloc(&[n], DType::F32).expect("room"),
                top_ids: cpu.alloc(&[n, most], DType::U32).expect("room"),
                top: cpu.alloc(&[n, most], DType::F32).expect("room"),
            };
            cpu.logprobs(&logits, &drawn, &out);
            let each = |t: &Tensor<Cpu>| bits(&read(&cpu, t));
            (read_ids(&cpu, &drawn), each(&out.chosen), read_ids(&cpu, &out.top_ids), each(&out.top))
        };
        let (drawn, chosen, top_ids, top) = run(0..rows);
        for range in [0..1, 11..12, rows - 1..rows, 5..9] {
            let tops = range.start * most..range.end * most;
            let want = (
                drawn[range.clone()].to_vec(),
                chosen[range.clone()].to_vec(),
                top_ids[tops.clone()].to_vec(),
                top[tops].to_vec(),
            );
            assert_eq!(run(range.clone()), want, "rows {range:?}, {}", cpu.describe());
        }
    }
}
