//! Bit for bit with BF16 inputs, which are multiplied in pairs where the machine can, or quantized to int8: a row alone is what it is in a batch and
//! with other threads, over every format of weights and both forms of attention; and all of it is close to sums in F64.

mod support;

use half::bf16;
use r1_backend::{
    Activation, Backend, Batch, Experts, HeadForm, HeadWeight, HostSlice, HostTensor, LatentCache,
    MlpWeights, Tensor, Weight,
};
use r1_core::DType;
use r1_cpu::{Cpu, Isa};
use support::{Random, bits, cpu, ids, int4, read, tensor};

/// Row counts on both sides of what streams, of register tiles and of a block of tokens.
const COUNTS: [usize; 12] = [1, 2, 3, 4, 5, 7, 8, 9, 10, 33, 97, 130];
const TOKENS: usize = 130;

fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.is_available())
}

/// Instructions, and whether activations are quantized.
#[derive(Clone, Copy, Debug)]
struct Arithmetic {
    isa: Isa,
    int8: bool,
}

impl Arithmetic {
    fn all() -> impl Iterator<Item = Self> {
        let plain = isas().map(|isa| Self { isa, int8: false });
        let multiplies = isas().filter(|&isa| cpu(Some(isa), 1).multiplies_int8());
        plain.chain(multiplies.map(|isa| Self { isa, int8: true }))
    }

    fn cpu(self, threads: usize) -> Cpu {
        let cpu = cpu(Some(self.isa), threads);
        if self.int8 { cpu.with_int8_activations().expect("it multiplies them") } else { cpu }
    }

    /// What rows of `k` inputs are where weights of this form meet them.
    fn met(self, x: &[f32], k: usize, form: Form) -> Vec<f32> {
        if self.int8 && form.takes_int8() { int8_round_trip(x, k) } else { x.to_vec() }
    }
}

/// Rows of `k` inputs, quantized by 128 of them and back.
fn int8_round_trip(x: &[f32], k: usize) -> Vec<f32> {
    let block = |block: &[f32]| {
        let most = block.iter().fold(1e-30_f32, |most, x| most.max(x.abs()));
        let (inverse, scale) = (127.0 / most, most / 127.0);
        block.iter().map(|x| (x * inverse).round_ties_even() * scale).collect::<Vec<_>>()
    };
    x.chunks(k).flat_map(|row| row.chunks(128).flat_map(block)).collect()
}

/// A format of weights `[N, K]`.
#[derive(Clone, Copy, Debug)]
enum Form {
    Dense(DType),
    Fp8 { block: [usize; 2], offset: [usize; 2] },
    Int8 { group: usize, offset: usize },
    Int4 { group: usize },
}

impl Form {
    fn takes_int8(self) -> bool {
        match self {
            Self::Dense(_) | Self::Fp8 { .. } => false,
            Self::Int8 { group, offset } => group % 128 == 0 && offset == 0,
            Self::Int4 { group } => group % 128 == 0,
        }
    }
}

/// A weight, and the values it stands for.
fn weight(cpu: &Cpu, random: &mut Random, [n, k]: [usize; 2], form: Form) -> (Weight<Cpu>, Vec<f32>) {
    match form {
        Form::Dense(dtype) => {
            let data = tensor(cpu, &random.floats(n * k), &[n, k], dtype);
            let values = read(cpu, &data);
            (Weight::Dense { data }, values)
        }
        Form::Fp8 { block, offset } => {
            let data = tensor(cpu, &random.floats(n * k), &[n, k], DType::F8E4M3);
            let mut values = read(cpu, &data);
            let [rows, cols] = [(n + offset[0]).div_ceil(block[0]), (k + offset[1]).div_ceil(block[1])];
            let scales: Vec<f32> = (0..rows * cols).map(|_| random.float().abs() + 0.1).collect();
            for (i, value) in values.iter_mut().enumerate() {
                let [row, col] = [(i / k + offset[0]) / block[0], (i % k + offset[1]) / block[1]];
                *value *= scales[row * cols + col];
            }
            let scales = tensor(cpu, &scales, &[rows, cols], DType::F32);
            (Weight::Fp8Block { data, scales, block, offset }, values)
        }
        Form::Int8 { group, offset } => {
            let codes: Vec<i8> = (0..n * k).map(|_| (random.below(255) as i32 - 127) as i8).collect();
            let groups = (k + offset).div_ceil(group);
            let scales: Vec<f32> = (0..n * groups).map(|_| (random.float().abs() + 0.1) / 127.0).collect();
            let scale = |i: usize| scales[i / k * groups + (i % k + offset) / group];
            let values = codes.iter().enumerate().map(|(i, &code)| f32::from(code) * scale(i)).collect();
            let bytes = codes.into_iter().map(i8::cast_unsigned).collect();
            let data = cpu.import_matrix(&HostTensor::from_vec(bytes, &[n, k], DType::I8)).expect("import");
            let scales = tensor(cpu, &scales, &[n, groups], DType::F32);
            (Weight::Int8Group { data, scales, group, offset }, values)
        }
        Form::Int4 { group } => int4(cpu, random, [n, k], group),
    }
}

/// Whether F32 sums over `terms` terms are this close to `want`, which comes with the sum of its terms' magnitudes.
#[track_caller]
fn assert_near(got: f32, (want, size): (f64, f64), terms: usize, what: &dyn Fn() -> String) {
    let allowed = 2e-7 * (terms as f64).sqrt().max(4.0) * size + 1e-30;
    assert!((f64::from(got) - want).abs() <= allowed, "{}: {got}, not {want} within {allowed}", what());
}

/// A dot product and the sum of its terms' magnitudes.
fn dot(x: &[f32], w: &[f32]) -> (f64, f64) {
    x.iter().zip(w).fold((0.0, 0.0), |(sum, size), (&a, &b)| {
        let product = f64::from(a) * f64::from(b);
        (sum + product, size + product.abs())
    })
}

fn linear_cases() -> Vec<([usize; 2], Form)> {
    let fp8 = |block, offset| Form::Fp8 { block, offset };
    let int8 = |group, offset| Form::Int8 { group, offset };
    let int4 = |group| Form::Int4 { group };
    let bf16 = Form::Dense(DType::BF16);
    vec![
        // Odd rows and columns; one that ends in a vector; past a span of K; rows 4096 bytes apart, below a span and past it.
        ([1, 1], bf16),
        ([13, 31], bf16),
        ([37, 300], bf16),
        ([9, 1024], bf16),
        ([11, 1057], bf16),
        ([12, 2048], bf16),
        ([35, 4096], bf16),
        ([11, 300], Form::Dense(DType::F32)),
        ([11, 300], Form::Dense(DType::F16)),
        ([37, 300], fp8([128, 128], [0, 0])),
        ([150, 513], fp8([128, 128], [100, 51])),
        ([21, 2100], fp8([128, 128], [120, 127])),
        ([10, 4096], fp8([128, 128], [0, 0])),
        ([10, 4096], fp8([128, 128], [3, 64])),
        // Blocks of no whole vectors, smaller than one, and larger than a span.
        ([37, 517], fp8([5, 48], [3, 17])),
        ([17, 1100], fp8([16, 33], [15, 32])),
        ([17, 90], fp8([4, 7], [1, 6])),
        ([7, 2600], fp8([128, 1200], [5, 1100])),
        ([37, 300], int8(128, 0)),
        ([37, 517], int8(64, 51)),
        ([11, 2100], int8(128, 127)),
        ([10, 4096], int8(32, 0)),
        ([10, 4096], int8(128, 0)),
        ([11, 2100], int8(256, 0)),
        ([35, 6200], int8(384, 0)),
        ([11, 1301], int8(33, 20)),
        ([37, 256], int4(128)),
        ([13, 8], int4(128)),
        ([13, 264], int4(128)),
        ([9, 1096], int4(128)),
        ([9, 2560], int4(256)),
        ([37, 1096], int4(64)),
        // 4096 bytes of codes per row, and more groups than are read together.
        ([10, 8192], int4(128)),
        ([6, 8200], int4(384)),
    ]
}

#[test]
fn linear_rows_are_those_of_single_tokens() {
    for arithmetic in Arithmetic::all() {
        let [one, three] = [1, 3].map(|threads| arithmetic.cpu(threads));
        for (case, ([n, k], form)) in linear_cases().into_iter().enumerate() {
            let what = || format!("{arithmetic:?} [{n}, {k}] {form:?}");
            let values = std::cell::RefCell::default();
            let run = |cpu: &Cpu| {
                let mut random = Random(case as u64);
                let (w, of_w) = weight(cpu, &mut random, [n, k], form);
                let x = tensor(cpu, &random.floats(TOKENS * k), &[TOKENS, k], DType::BF16);
                *values.borrow_mut() = (read(cpu, &x), of_w);
                let of = |rows: std::ops::Range<usize>| {
                    let out = cpu.alloc(&[rows.len(), n], DType::F32).expect("room");
                    cpu.linear(&Activation::dense(x.rows(rows)), &w, &out);
                    read(cpu, &out)
                };
                let all = of(0..TOKENS);
                for count in COUNTS {
                    for start in [0, TOKENS - count] {
                        let want = bits(&all[start * n..][..count * n]);
                        assert_eq!(bits(&of(start..start + count)), want, "{}: {count} from {start}", what());
                    }
                }
                all
            };
            let all = run(&one);
            assert_eq!(bits(&run(&three)), bits(&all), "{}: threads", what());
            let (x, w) = values.into_inner();
            let x = arithmetic.met(&x, k, form);
            for t in (0..TOKENS).step_by(43).chain([TOKENS - 1]) {
                for row in 0..n {
                    let want = dot(&x[t * k..][..k], &w[row * k..][..k]);
                    assert_near(all[t * n + row], want, k, &|| format!("{} [{t}, {row}]", what()));
                }
            }
        }
    }
}

/// Weights that are rows of wider ones: strides that are and that are not multiples of 4096 bytes.
#[test]
fn linear_over_columns_of_a_wider_weight_is_that_of_the_weight_alone() {
    for isa in isas() {
        let cpu = cpu(Some(isa), 2);
        for (wide, from, k) in [(2048, 0, 300), (2048, 33, 1500), (4096, 1, 1025), (700, 3, 600)] {
            let (n, mut random) = (19, Random(wide as u64));
            let data = tensor(&cpu, &random.floats(n * wide), &[n, wide], DType::BF16);
            let values = read(&cpu, &data);
            let part: Vec<f32> =
                values.chunks(wide).flat_map(|row| row[from..from + k].iter().copied()).collect();
            let alone = tensor(&cpu, &part, &[n, k], DType::BF16);
            let x = tensor(&cpu, &random.floats(TOKENS * k), &[TOKENS, k], DType::BF16);
            for count in [1, 8, 9, 130] {
                let run = |data: Tensor<Cpu>| {
                    let out = cpu.alloc(&[count, n], DType::F32).expect("room");
                    cpu.linear(&Activation::dense(x.rows(0..count)), &Weight::Dense { data }, &out);
                    bits(&read(&cpu, &out))
                };
                assert_eq!(run(data.narrow(1, from..from + k)), run(alone.clone()), "{isa} {k} of {wide}");
            }
        }
    }
}

#[test]
fn per_head_rows_are_those_of_single_tokens() {
    let forms = [
        Form::Dense(DType::BF16),
        Form::Fp8 { block: [128, 128], offset: [0, 0] },
        Form::Fp8 { block: [128, 128], offset: [37, 64] },
        Form::Fp8 { block: [128, 128], offset: [37, 51] },
        Form::Fp8 { block: [7, 48], offset: [3, 17] },
        Form::Int8 { group: 128, offset: 0 },
        Form::Int8 { group: 48, offset: 17 },
    ];
    let (heads, rows_per_head, tokens) = (3, 90, 35);
    for isa in isas() {
        for (form, head_form) in
            forms.into_iter().flat_map(|f| [(f, HeadForm::RowsIn), (f, HeadForm::RowsOut)])
        {
            // An odd number of rows, columns past a strip, and of no whole vector.
            for (rows, k) in [(10..75, 200), (0..90, 512), (1..4, 33)] {
                let count = rows.len();
                let (from, to) = if head_form == HeadForm::RowsIn { (count, k) } else { (k, count) };
                let what = || format!("{isa} {head_form:?} {form:?} rows {rows:?} of [{rows_per_head}, {k}]");
                let run = |threads: usize| {
                    let cpu = cpu(Some(isa), threads);
                    let mut random = Random(5);
                    let (weight, values) = weight(&cpu, &mut random, [heads * rows_per_head, k], form);
                    let w = HeadWeight { weight, rows_per_head, rows: rows.clone(), form: head_form };
                    let x = random.floats(tokens * heads * from);
                    let x = tensor(&cpu, &x, &[tokens, heads, from], DType::BF16);
                    let of = |rows: std::ops::Range<usize>| {
                        let out = cpu.alloc(&[rows.len(), heads, to], DType::F32).expect("room");
                        cpu.per_head(&x.rows(rows), &w, &out);
                        read(&cpu, &out)
                    };
                    let all = of(0..tokens);
                    for count in [1, 2, 3, 7, 8, 9, 33] {
                        for start in [0, tokens - count] {
                            let want = bits(&all[start * heads * to..][..count * heads * to]);
                            assert_eq!(bits(&of(start..start + count)), want, "{}: {count}", what());
                        }
                    }
                    (all, read(&cpu, &x), values)
                };
                let (all, x, w) = run(1);
                assert_eq!(bits(&run(3).0), bits(&all), "{}: threads", what());
                for i in (0..tokens * heads).step_by(7) {
                    let (head, x) = (i % heads, &x[i * from..][..from]);
                    let first = head * rows_per_head + rows.start;
                    for j in 0..to {
                        let row: Vec<f32> = match head_form {
                            HeadForm::RowsIn => (0..count).map(|r| w[(first + r) * k + j]).collect(),
                            HeadForm::RowsOut => w[(first + j) * k..][..k].to_vec(),
                        };
                        assert_near(all[i * to + j], dot(x, &row), from, &|| format!("{} {i} {j}", what()));
                    }
                }
            }
        }
    }
}

#[test]
fn experts_rows_are_those_of_single_tokens() {
    let alike = [
        vec![Form::Dense(DType::BF16); 5],
        vec![Form::Fp8 { block: [128, 128], offset: [0, 0] }; 5],
        // Shards that begin elsewhere in a block are still stored alike.
        (0..5).map(|i| Form::Fp8 { block: [128, 128], offset: [31 * i, 17 * i] }).collect(),
        vec![Form::Fp8 { block: [12, 48], offset: [5, 7] }; 5],
        (0..5).map(|i| Form::Int8 { group: 64, offset: 13 * i }).collect(),
        vec![Form::Int8 { group: 128, offset: 0 }; 5],
        vec![Form::Int4 { group: 128 }; 5],
        vec![Form::Int4 { group: 64 }; 5],
        // Of all sorts, two of which pairs are made for.
        vec![
            Form::Dense(DType::BF16),
            Form::Int4 { group: 128 },
            Form::Fp8 { block: [128, 128], offset: [3, 4] },
            Form::Dense(DType::F32),
            Form::Int8 { group: 64, offset: 5 },
        ],
    ];
    let (tokens, k, i, d) = (TOKENS, 3, 200, 136);
    for arithmetic in Arithmetic::all() {
        for forms in &alike {
            let run = |threads: usize| {
                let cpu = arithmetic.cpu(threads);
                let mut random = Random(3);
                let mut values = Vec::new();
                let mut one = |size, form| {
                    let (weight, of) = weight(&cpu, &mut random, size, form);
                    values.push(of);
                    weight
                };
                let local = forms
                    .iter()
                    .map(|&form| MlpWeights {
                        gate: one([i, d], form),
                        up: one([i, d], form),
                        down: one([d, i], form),
                    })
                    .collect();
                let experts = Experts::new(&cpu, local, 2, 9).expect("no table is made");
                // Some ids belong to other ranks; most go to one, so that its tokens are many.
                let mut chosen: Vec<u32> =
                    (0..tokens * k).map(|j| if j % k == 0 { 4 } else { random.below(9) as u32 }).collect();
                chosen[15..18].copy_from_slice(&[4, 4, 3]);
                let x = tensor(&cpu, &random.floats(tokens * d), &[tokens, d], DType::BF16);
                let weights = random.floats(tokens * k);
                let before = random.floats(tokens * d);
                let of = |rows: std::ops::Range<usize>| {
                    let part =
                        |values: &[f32], cols: usize| values[rows.start * cols..rows.end * cols].to_vec();
                    let n = rows.len();
                    let chosen = ids(&cpu, &chosen[rows.start * k..rows.end * k], &[n, k]);
                    let weights = tensor(&cpu, &part(&weights, k), &[n, k], DType::F32);
                    let out = tensor(&cpu, &part(&before, d), &[n, d], DType::F32);
                    cpu.experts(&Activation::dense(x.rows(rows.clone())), &chosen, &weights, &experts, &out);
                    read(&cpu, &out)
                };
                let all = of(0..tokens);
                for count in [1, 2, 3, 7, 8, 9, 33, 97] {
                    for start in [0, 5.min(tokens - count), tokens - count] {
                        let want = bits(&all[start * d..][..count * d]);
                        assert_eq!(
                            bits(&of(start..start + count)),
                            want,
                            "{arithmetic:?} {forms:?}: {count} from {start}"
                        );
                    }
                }
                (all, read(&cpu, &x), values, chosen, weights, before)
            };
            let (all, x, w, chosen, weights, before) = run(1);
            assert_eq!(bits(&run(3).0), bits(&all), "{arithmetic:?} {forms:?}: threads");
            // Experts of several sorts keep their inputs.
            let same =
                forms.iter().all(|&form| std::mem::discriminant(&form) == std::mem::discriminant(&forms[0]));
            let met = |x: &[f32]| if same { arithmetic.met(x, x.len(), forms[0]) } else { x.to_vec() };
            for t in [0, 5, 64, TOKENS - 1] {
                let mut want: Vec<f64> = before[t * d..][..d].iter().map(|&v| f64::from(v)).collect();
                let mut size = 1.0;
                for j in t * k..t * k + k {
                    let Some(expert) = (chosen[j] as usize).checked_sub(2).filter(|&e| e < forms.len())
                    else {
                        continue;
                    };
                    let x = &met(&x[t * d..][..d]);
                    let hidden: Vec<f32> = (0..i)
                        .map(|row| {
                            let [gate, up] =
                                [0, 1].map(|part| dot(x, &w[3 * expert + part][row * d..][..d]).0);
                            bf16::from_f64(gate / (1.0 + (-gate).exp()) * up).to_f32()
                        })
                        .collect();
                    let hidden: Vec<f64> = met(&hidden).into_iter().map(f64::from).collect();
                    size += hidden.iter().map(|h| h.abs()).sum::<f64>();
                    for (c, want) in want.iter_mut().enumerate() {
                        let down = &w[3 * expert + 2][c * i..][..i];
                        let sum: f64 = hidden.iter().zip(down).map(|(h, &w)| h * f64::from(w)).sum();
                        *want += f64::from(weights[j]) * sum;
                    }
                }
                // The hidden state is rounded to BF16.
                for (c, want) in want.into_iter().enumerate() {
                    let got = f64::from(all[t * d + c]);
                    assert!(
                        (got - want).abs() <= 1.5e-3 * size,
                        "{arithmetic:?} {forms:?} [{t}, {c}]: {got}, not {want}"
                    );
                }
            }
        }
    }
}

/// Sizes of absorbed attention and its cache.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    heads: usize,
    latent: usize,
    rope: usize,
    block: usize,
}

/// Entry `j` of the cache, which depends on `j` alone, so that a longer context begins like a shorter one.
fn entry(j: usize, width: usize) -> Vec<f32> {
    Random(j as u64 ^ 77 << 32).floats(width)
}

fn batch(cpu: &Cpu, seqs: &[(usize, usize)], table: &[u32], per_seq: usize) -> Batch<Cpu> {
    let sums = |of: &dyn Fn(&(usize, usize)) -> usize| {
        let mut sums = vec![0u32];
        for seq in seqs {
            sums.push(sums[sums.len() - 1] + of(seq) as u32);
        }
        sums
    };
    let tokens = seqs.iter().map(|seq| seq.0).sum::<usize>();
    let context_len: Vec<u32> = seqs.iter().map(|seq| seq.1 as u32).collect();
    Batch {
        positions: ids(cpu, &vec![0; tokens], &[tokens]),
        slots: ids(cpu, &vec![0; tokens], &[tokens]),
        query_start: ids(cpu, &sums(&|seq| seq.0), &[seqs.len() + 1]),
        context_len: ids(cpu, &context_len, &[seqs.len()]),
        context_start: ids(cpu, &sums(&|seq| seq.1), &[seqs.len() + 1]),
        block_table: ids(cpu, table, &[seqs.len(), per_seq]),
        num_tokens: tokens,
        num_seqs: seqs.len(),
        num_decodes: 0,
        prefill_context_tokens: 0,
        max_context_len: seqs.iter().map(|seq| seq.1).max().unwrap_or(0),
    }
}

/// Queries of the last rows of every sequence; a row's depend on its position alone.
fn queries(seqs: &[(usize, usize)], len: usize, salt: u64) -> Vec<f32> {
    seqs.iter()
        .flat_map(|&(rows, context)| context - rows..context)
        .flat_map(|p| Random(p as u64 ^ salt << 40).floats(len))
        .collect()
}

const SCALE: f32 = 0.2;

/// Absorbed attention over a BF16 cache in scrambled blocks, full of NaN where nothing is cached. `[tokens, heads, latent]`.
fn absorbed(cpu: &Cpu, seqs: &[(usize, usize)], sizes: Sizes) -> Vec<f32> {
    let Sizes { heads, latent, rope, block } = sizes;
    let width = latent + rope;
    let per_seq = seqs.iter().map(|seq| seq.1.div_ceil(block)).max().unwrap_or(0) + 1;
    let blocks = per_seq * seqs.len();
    let mut image = vec![f32::NAN; blocks * block * width];
    let mut table = vec![u32::MAX; blocks];
    for (s, &(_, context)) in seqs.iter().enumerate() {
        for j in 0..context {
            let at = (per_seq - 1 - j / block) * seqs.len() + s;
            table[s * per_seq + j / block] = at as u32;
            image[(at * block + j % block) * width..][..width].copy_from_slice(&entry(j, width));
        }
    }
    let cache = LatentCache::alloc(cpu, DType::BF16, [blocks, block], latent, rope).expect("room");
    cpu.upload(HostSlice::F32(&image), &cache.data);
    let batch = batch(cpu, seqs, &table, per_seq);
    let tokens = batch.num_tokens;
    let q =
        |len: usize, salt| tensor(cpu, &queries(seqs, heads * len, salt), &[tokens, heads, len], DType::BF16);
    let (q_latent, q_rope) = (q(latent, 1), q(rope, 2));
    let out = tensor(cpu, &vec![f32::NAN; tokens * heads * latent], &[tokens, heads, latent], DType::BF16);
    cpu.mla_attention(&q_latent, &q_rope, &cache, &batch, 0..seqs.len(), SCALE, &out);
    read(cpu, &out)
}

/// What BF16 keeps of `values`.
fn rounded(cpu: &Cpu, values: &[f32]) -> Vec<f32> {
    read(cpu, &tensor(cpu, values, &[values.len()], DType::BF16))
}

/// A row's result in F64: `keys` and `values` are those it sees.
fn attend(q: &[f32], keys: &[&[f32]], values: &[&[f32]]) -> Vec<f64> {
    let scores: Vec<f64> = keys.iter().map(|k| dot(q, k).0 * f64::from(SCALE)).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let p: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum = p.iter().sum::<f64>();
    let column = |c: usize| p.iter().zip(values).map(|(p, v)| p * f64::from(v[c])).sum::<f64>() / sum;
    (0..values[0].len()).map(column).collect()
}

#[track_caller]
fn assert_rows_near(got: &[f32], want: &[f64], what: &dyn Fn() -> String) {
    // Weights are held to 16 bits, results are rounded to BF16: to half of 2^-7 of the power of two below them.
    for (c, (&got, &want)) in got.iter().zip(want).enumerate() {
        let allowed = 4e-5 + want.abs() / 256.0;
        assert!((f64::from(got) - want).abs() <= allowed, "{} column {c}: {got}, not {want}", what());
    }
}

#[test]
fn absorbed_attention_is_right_and_the_same_however_it_is_cut() {
    let sizes = |heads, latent, rope, block| Sizes { heads, latent, rope, block };
    // A block that holds a tile, one that does not, and one that tiles fall across; heads and columns of no whole vectors.
    for sizes in [sizes(5, 40, 6, 16), sizes(16, 64, 32, 64), sizes(11, 33, 7, 24), sizes(3, 96, 16, 80)] {
        let seqs: Vec<(usize, usize)> = [1, 2, 15, 63, 64, 65, 127, 511, 512, 513, 700, 1030]
            .into_iter()
            .map(|context| (1 + context % 4, context))
            .map(|(rows, context)| (rows.min(context), context))
            .collect();
        let Sizes { heads, latent, rope, .. } = sizes;
        let row_len = heads * latent;
        for isa in isas() {
            let [one, three, many] = [1, 3, 7].map(|threads| cpu(Some(isa), threads));
            let together = absorbed(&one, &seqs, sizes);
            assert_eq!(bits(&absorbed(&three, &seqs, sizes)), bits(&together), "{isa} {sizes:?}: threads");
            let q_latent = rounded(&one, &queries(&seqs, heads * latent, 1));
            let q_rope = rounded(&one, &queries(&seqs, heads * rope, 2));
            let most = seqs.iter().map(|seq| seq.1).max().unwrap_or(0);
            let entries: Vec<Vec<f32>> = (0..most).map(|j| rounded(&one, &entry(j, latent + rope))).collect();
            let mut t = 0;
            for &(rows, context) in &seqs {
                for i in 0..rows {
                    let seen = context - rows + i + 1;
                    let keys: Vec<&[f32]> = entries[..seen].iter().map(Vec::as_slice).collect();
                    let values: Vec<&[f32]> = keys.iter().map(|key| &key[..latent]).collect();
                    for h in [0, heads - 1] {
                        let q = [
                            &q_latent[(t * heads + h) * latent..][..latent],
                            &q_rope[(t * heads + h) * rope..][..rope],
                        ]
                        .concat();
                        let got = &together[t * row_len + h * latent..][..latent];
                        assert_rows_near(got, &attend(&q, &keys, &values), &|| {
                            format!("{isa} {sizes:?}: row {i} of {rows} over {context}, head {h}")
                        });
                    }
                    // Alone: a sequence that ends at this row, behind which all is NaN.
                    let alone = absorbed(&many, &[(1, seen)], sizes);
                    assert_eq!(
                        bits(&alone),
                        bits(&together[t * row_len..][..row_len]),
                        "{isa} {sizes:?}: row {i} of {rows} over {context} alone"
                    );
                    t += 1;
                }
            }
            // Whole and in chunks.
            let whole = absorbed(&three, &[(150, 150)], sizes);
            for chunk in [0..7, 7..64, 64..129, 129..150] {
                let part = absorbed(&three, &[(chunk.len(), chunk.end)], sizes);
                let want = bits(&whole[chunk.start * row_len..chunk.end * row_len]);
                assert_eq!(bits(&part), want, "{isa} {sizes:?}: chunk {chunk:?}");
            }
        }
    }
}

/// Heads, parts of keys and values per head.
#[derive(Clone, Copy, Debug)]
struct HeadSizes {
    heads: usize,
    nope: usize,
    rope: usize,
    value: usize,
}

/// Expanded attention over keys with NaN behind the last. `[tokens, heads, value]`.
fn expanded(cpu: &Cpu, seqs: &[(usize, usize)], sizes: HeadSizes) -> Vec<f32> {
    let HeadSizes { heads, nope, rope, value } = sizes;
    let mut kv = Vec::new();
    let mut k_rope = Vec::new();
    for &(_, context) in seqs {
        for j in 0..context {
            kv.extend(entry(j, heads * (nope + value)));
            k_rope.extend(entry(j + 100_000, rope));
        }
    }
    // A tile of NaN behind the last sequence.
    let keys = k_rope.len() / rope + 64;
    kv.resize(keys * heads * (nope + value), f32::NAN);
    k_rope.resize(keys * rope, f32::NAN);
    let kv = tensor(cpu, &kv, &[keys, heads, nope + value], DType::BF16);
    let k_rope = tensor(cpu, &k_rope, &[keys, rope], DType::BF16);
    let batch = batch(cpu, seqs, &vec![0; seqs.len()], 1);
    let tokens = batch.num_tokens;
    let q = queries(seqs, heads * (nope + rope), 3);
    let q = tensor(cpu, &q, &[tokens, heads, nope + rope], DType::BF16);
    let out = tensor(cpu, &vec![f32::NAN; tokens * heads * value], &[tokens, heads, value], DType::BF16);
    cpu.mla_attention_expanded(&q, &kv, &k_rope, &batch, 0..seqs.len(), SCALE, &out);
    read(cpu, &out)
}

#[test]
fn expanded_attention_is_right_and_the_same_however_it_is_cut() {
    let sizes = |heads, nope, rope, value| HeadSizes { heads, nope, rope, value };
    for sizes in [sizes(5, 14, 6, 10), sizes(3, 128, 64, 128), sizes(2, 31, 7, 45)] {
        let HeadSizes { heads, nope, rope, value } = sizes;
        let row_len = heads * value;
        for isa in isas() {
            let [one, three] = [1, 3].map(|threads| cpu(Some(isa), threads));
            let context = 200;
            let whole = expanded(&one, &[(context, context)], sizes);
            assert_eq!(
                bits(&expanded(&three, &[(context, context)], sizes)),
                bits(&whole),
                "{isa} {sizes:?}"
            );
            // Contexts that end at every sort of place: whatever is behind them is NaN.
            for end in [1, 2, 3, 31, 32, 33, 63, 64, 65, 95, 96, 127, 128, 129, 199, 200] {
                for rows in [1, 2, 8, 9, 33, end] {
                    let rows = rows.min(end);
                    let part = expanded(&three, &[(rows, end)], sizes);
                    let want = bits(&whole[(end - rows) * row_len..end * row_len]);
                    assert_eq!(bits(&part), want, "{isa} {sizes:?}: {rows} rows of {end}");
                }
            }
            // Several at once.
            let seqs = [(3, 70), (64, 64), (1, 200), (20, 131)];
            let together = expanded(&three, &seqs, sizes);
            let mut t = 0;
            for (rows, context) in seqs {
                let want = bits(&whole[(context - rows) * row_len..context * row_len]);
                assert_eq!(
                    bits(&together[t * row_len..(t + rows) * row_len]),
                    want,
                    "{isa} {sizes:?}: {context}"
                );
                t += rows;
            }
            let q = rounded(&one, &queries(&[(context, context)], heads * (nope + rope), 3));
            let kv: Vec<Vec<f32>> =
                (0..context).map(|j| rounded(&one, &entry(j, heads * (nope + value)))).collect();
            let k_rope: Vec<Vec<f32>> =
                (0..context).map(|j| rounded(&one, &entry(j + 100_000, rope))).collect();
            for t in [0, 1, 31, 32, 62, 63, 64, 65, 128, 199] {
                for h in 0..heads {
                    let of = |j: usize| &kv[j][h * (nope + value)..][..nope + value];
                    let keys: Vec<Vec<f32>> =
                        (0..=t).map(|j| [&of(j)[..nope], &k_rope[j]].concat()).collect();
                    let keys: Vec<&[f32]> = keys.iter().map(Vec::as_slice).collect();
                    let values: Vec<&[f32]> = (0..=t).map(|j| &of(j)[nope..]).collect();
                    let q = &q[(t * heads + h) * (nope + rope)..][..nope + rope];
                    let got = &whole[t * row_len + h * value..][..value];
                    assert_rows_near(got, &attend(q, &keys, &values), &|| {
                        format!("{isa} {sizes:?}: row {t}, head {h}")
                    });
                }
            }
        }
    }
}
