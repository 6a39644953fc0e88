//! Forward passes against transformers on seeded toys (`tools/goldens`), on every backend that computes here.
#![forbid(unsafe_code)]

use std::sync::Arc;

use r1_backend::Backend;
use r1_comm::Local;
use r1_core::DType;
use r1_cpu::{Cpu, CpuOptions};
use r1_model::{DeepSeek, Fp8Compute, MlaForm, WeightFormat};
use r1_reference::Reference;
use r1_tests::{Feed, Gap, Golden, Load, gpu, teacher_force};
use r1_weights::{Checkpoint, ModelConfig};

const TOYS: [&str; 7] =
    ["toy_v3_f32", "toy_v3_bf16", "toy_v3_fp8", "toy_v2_lite", "toy_v2", "toy_moonlight", "toy_ragged_fp8"];

const FORMS: [MlaForm; 3] = [MlaForm::Absorbed, MlaForm::Expanded, MlaForm::Auto];

fn cpu() -> Arc<Cpu> {
    Arc::new(Cpu::new(CpuOptions { threads: Some(2), isa: None }).expect("a CPU"))
}

/// Sequences of a batch, by the chunk that each is fed in.
type Chunks<'a> = &'a [&'a [usize]];

const CHUNKS: Chunks<'_> = &[&[64], &[1], &[7], &[1, 64, 7, 1, 5], &[64, 1, 3, 1, 2, 9, 11, 1, 13]];
/// For a device that takes its time: decodes, prefills and chunks side by side.
const FEW_CHUNKS: Chunks<'_> = &[&[64], &[1, 64, 7]];

/// Feeds the golden alone and in batches, whole, in chunks, and token by token, in both forms of attention.
fn matches_in_f32<B: Backend>(backend: &Arc<B>, name: &str, forms: &[MlaForm], chunks: Chunks<'_>) {
    let golden = Golden::open(name);
    let (ids, expected) = (golden.input_ids(), golden.logits("logits"));
    let vocab_size = expected.len() / ids.len();
    for &form in forms {
        let model = Load::f32(form).open(backend.clone(), &golden.dir);
        for chunks in chunks {
            let feeds: Vec<_> = chunks.iter().map(|&chunk| Feed { tokens: &ids, chunk }).collect();
            for logits in teacher_force(&model, &feeds) {
                let gap = Gap::between(&logits, &expected, vocab_size);
                assert!(gap.max_abs < 2e-4 && gap.argmax_agree == 1.0, "{name} {form:?} {chunks:?}: {gap:?}");
            }
        }
    }
}

#[test]
fn cpu_matches_transformers_in_f32() {
    let backend = cpu();
    for name in TOYS {
        matches_in_f32(&backend, name, &FORMS, CHUNKS);
    }
}

#[test]
fn gpu_matches_transformers_in_f32() {
    let backend = gpu();
    for name in TOYS {
        matches_in_f32(&backend, name, &[MlaForm::Absorbed, MlaForm::Expanded], FEW_CHUNKS);
    }
}

#[test]
fn reference_matches_transformers_in_f32() {
    let backend = Arc::new(Reference::new());
    for name in TOYS {
        matches_in_f32(&backend, name, &FORMS, CHUNKS);
    }
}

/// A token's logits are computed in the same way whatever runs beside it and however its prompt is cut: the same bits.
fn is_batch_invariant<B: Backend>(backend: &Arc<B>, name: &str, load: Load, chunks: Chunks<'_>) {
    let golden = Golden::open(name);
    let ids = golden.input_ids();
    let load = Load { deterministic: true, ..load };
    let model = load.open(backend.clone(), &golden.dir);
    let alone = &teacher_force(&model, &[Feed { tokens: &ids, chunk: 64 }])[0];
    for chunks in chunks {
        let feeds: Vec<_> = chunks.iter().map(|&chunk| Feed { tokens: &ids, chunk }).collect();
        for (logits, chunk) in teacher_force(&model, &feeds).iter().zip(*chunks) {
            let differs = logits.iter().zip(alone).position(|(a, b)| a.to_bits() != b.to_bits());
            assert!(
                differs.is_none() && logits.len() == alone.len(),
                "{name} {load:?} in chunks of {chunk}, of {chunks:?}: logit {differs:?} differs"
            );
        }
    }
}

#[test]
fn cpu_is_batch_invariant() {
    let chunks: Chunks<'_> = &[&[1], &[7], &[5, 64, 1, 3], &[64, 1, 3, 1, 2, 9, 11, 1, 13]];
    for name in ["toy_v3_bf16", "toy_v3_fp8", "toy_v2", "toy_ragged_fp8"] {
        for dtype in [DType::F32, DType::BF16] {
            is_batch_invariant(&cpu(), name, Load { dtype, ..Load::f32(MlaForm::Absorbed) }, chunks);
        }
    }
}

#[test]
fn gpu_is_batch_invariant() {
    let backend = gpu();
    let chunks: Chunks<'_> = &[&[1], &[64, 1, 3, 7]];
    let load = Load::f32(MlaForm::Absorbed);
    for name in ["toy_v3_bf16", "toy_v2"] {
        is_batch_invariant(&backend, name, Load { dtype: DType::BF16, ..load }, chunks);
    }
    for name in ["toy_v3_fp8", "toy_ragged_fp8"] {
        for fp8 in [Fp8Compute::WeightOnly, Fp8Compute::WeightsAndActivations] {
            is_batch_invariant(&backend, name, Load { dtype: DType::BF16, fp8, ..load }, chunks);
        }
    }
    is_batch_invariant(&backend, "toy_ragged_fp8", load, chunks);
}

/// Why a deterministic model is not loaded.
fn refusal<B: Backend>(backend: Arc<B>, form: MlaForm, with: (&Checkpoint, &ModelConfig)) -> String {
    let options = Load { deterministic: true, ..Load::f32(form) }.options(0, 1);
    let comm = Arc::new(Local::single());
    let loaded = DeepSeek::load(backend, comm, with.0, with.1, options, &mut |_| {});
    loaded.err().expect("a refusal").to_string()
}

#[test]
fn what_is_not_batch_invariant_is_refused() {
    let golden = Golden::open("toy_v3_f32");
    let config = ModelConfig::open(&golden.dir).expect("config.json");
    let checkpoint = Checkpoint::open(&golden.dir).expect("weights");
    let with = (&checkpoint, &config);
    for form in [MlaForm::Auto, MlaForm::Expanded] {
        let refused = refusal(cpu(), form, with);
        assert!(
            refused.starts_with("--deterministic with MLA form ") && refused.contains("absorbed"),
            "{refused}"
        );
    }
    assert_eq!(
        refusal(Arc::new(Reference::new()), MlaForm::Absorbed, with),
        "--deterministic is not supported: the device reference sums in an order that depends on the batch; use --device \
         cpu, which does not"
    );
}

/// BF16 activations: as close to torch's F32 as twice torch's own BF16.
fn is_as_good_as_torch_in_bf16<B: Backend>(backend: &Arc<B>, name: &str) {
    let golden = Golden::open(name);
    let (ids, expected) = (golden.input_ids(), golden.logits("logits"));
    let bound = 2.0 * golden.fact("/gaps/bf16/mean_abs");
    for form in [MlaForm::Absorbed, MlaForm::Expanded] {
        for weights in [WeightFormat::AsStored, WeightFormat::WidenToBf16] {
            let load = Load { dtype: DType::BF16, weights, ..Load::f32(form) };
            let model = load.open(backend.clone(), &golden.dir);
            for chunk in [64, 1] {
                let logits = &teacher_force(&model, &[Feed { tokens: &ids, chunk }])[0];
                let gap = Gap::between(logits, &expected, expected.len() / ids.len());
                assert!(
                    gap.mean_abs < bound,
                    "{name} {form:?} {weights:?} chunk {chunk}: {gap:?}, bound {bound}"
                );
            }
        }
    }
}

const BF16_TOYS: [&str; 6] =
    ["toy_v3_bf16", "toy_v3_fp8", "toy_moonlight", "toy_v2", "toy_v2_lite", "toy_ragged_fp8"];

#[test]
fn cpu_in_bf16_is_as_close_as_torch() {
    let backend = cpu();
    for name in BF16_TOYS {
        is_as_good_as_torch_in_bf16(&backend, name);
    }
}

#[test]
fn reference_in_bf16_is_as_close_as_torch() {
    let backend = Arc::new(Reference::new());
    for name in BF16_TOYS {
        is_as_good_as_torch_in_bf16(&backend, name);
    }
}

#[test]
fn gpu_in_bf16_is_as_close_as_torch() {
    let backend = gpu();
    for name in BF16_TOYS {
        is_as_good_as_torch_in_bf16(&backend, name);
    }
}

/// W8A8 quantises activations before every FP8 linear, kv_b's among them, so only the expanded form is what the
/// golden computes.
fn matches_w8a8<B: Backend>(backend: &Arc<B>) {
    for name in ["toy_v3_fp8", "toy_ragged_fp8"] {
        let golden = Golden::open(name);
        let (ids, expected) = (golden.input_ids(), golden.logits("logits_w8a8"));
        let load = Load { fp8: Fp8Compute::WeightsAndActivations, ..Load::f32(MlaForm::Expanded) };
        let logits =
            &teacher_force(&load.open(backend.clone(), &golden.dir), &[Feed { tokens: &ids, chunk: 64 }])[0];
        let gap = Gap::between(logits, &expected, expected.len() / ids.len());
        // A sum in another order can move an activation across a rounding boundary of e4m3, which is 6 % of its value.
        let bound = 0.1 * golden.fact("/gaps/w8a8/mean_abs");
        assert!(gap.mean_abs < bound, "{name}: {gap:?}, bound {bound}");
    }
}

#[test]
fn reference_matches_w8a8() {
    matches_w8a8(&Arc::new(Reference::new()));
}

#[test]
fn gpu_matches_w8a8() {
    matches_w8a8(&gpu());
}

/// What a GPU runs by default, BF16 between W8A8 linears: no further from F32 than torch's W8A8 and twice its BF16 together.
#[test]
fn gpu_in_bf16_w8a8_is_as_close_as_torch() {
    let backend = gpu();
    for name in ["toy_v3_fp8", "toy_ragged_fp8"] {
        let golden = Golden::open(name);
        let (ids, expected) = (golden.input_ids(), golden.logits("logits"));
        let bound = 2.0 * golden.fact("/gaps/bf16/mean_abs") + golden.fact("/gaps/w8a8/mean_abs");
        for form in [MlaForm::Absorbed, MlaForm::Expanded] {
            let fp8 = Fp8Compute::WeightsAndActivations;
            let model =
                Load { dtype: DType::BF16, fp8, ..Load::f32(form) }.open(backend.clone(), &golden.dir);
            for logits in teacher_force(&model, &[64, 1].map(|chunk| Feed { tokens: &ids, chunk })) {
                let gap = Gap::between(&logits, &expected, expected.len() / ids.len());
                assert!(gap.mean_abs < bound, "{name} {form:?}: {gap:?}, bound {bound}");
            }
        }
    }
}

/// The fixtures distinguish right from wrong: each mistake that the generator knows moves the logits far beyond what
/// the comparison allows.
#[test]
fn the_fixtures_would_show_every_mistake() {
    for name in TOYS {
        let golden = Golden::open(name);
        let std = golden.fact("/logits_std");
        let mistakes = golden.facts["mistakes"].as_object().expect("a table of mistakes");
        assert!(mistakes.len() >= 3, "{name}: {mistakes:?}");
        for (mistake, relative_rms) in mistakes {
            let rms = relative_rms.as_f64().expect("a number") as f32 * std;
            assert!(rms > 2e-3, "{name}: {mistake} moves logits by {rms} only");
        }
    }
}
