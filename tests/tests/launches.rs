//! How many kernels a captured decode step launches: each costs a GPU microseconds, however little it does.
#![forbid(unsafe_code)]

use std::ops::Range;

use r1_backend::{Backend, Batch, HostSlice, Tensor};
use r1_core::DType;
use r1_gpu::Gpu;
use r1_model::{Fp8Compute, MlaForm, StageInput, StageOutput};
use r1_tests::{Load, emulated, tiny_dir};

/// Of a layer with a dense MLP, and of one with experts. One of them is `quantize`, which models like V3 do not launch: where a
/// head's outputs are whole groups of 128, attention's last kernel writes their FP8 form.
const MAX_LAUNCHES: [usize; 2] = [10, 11];

/// Kernels of a captured step that decodes `num_seqs` sequences through these layers of the bundled model, in what GPUs run by
/// default.
fn launches(layers: Range<usize>, num_seqs: usize) -> Vec<&'static str> {
    let gpu = emulated(1).remove(0);
    let load = Load {
        dtype: DType::BF16,
        fp8: Fp8Compute::WeightsAndActivations,
        layers: Some([layers.start, layers.end]),
        ..Load::f32(MlaForm::Absorbed)
    };
    let model = load.open(gpu.clone(), &tiny_dir());
    let caches = model.alloc_cache(num_seqs, 16).expect("a small cache");
    let tensor = |values: &[u32]| -> Tensor<Gpu> {
        let tensor = gpu.alloc(&[values.len()], DType::U32).expect("a small tensor");
        gpu.upload(HostSlice::U32(values), &tensor);
        tensor
    };
    let all = |value: u32| tensor(&vec![value; num_seqs]);
    let starts: Vec<u32> = (0..=num_seqs as u32).collect();
    // The step is recorded and not run: what its tensors hold does not matter.
    let batch = Batch {
        positions: all(0),
        slots: all(u32::MAX),
        query_start: tensor(&starts),
        context_len: all(0),
        context_start: tensor(&vec![0; num_seqs + 1]),
        block_table: all(0).reshape(&[num_seqs, 1]),
        num_tokens: num_seqs,
        num_seqs,
        num_decodes: num_seqs,
        prefill_context_tokens: 0,
        max_context_len: 16,
    };
    let (ids, rows) = (all(0), tensor(&starts[..num_seqs]));
    let hidden = gpu.alloc(&[num_seqs, model.config().hidden_size], DType::BF16).expect("a small tensor");
    let logits = gpu.alloc(&[num_seqs, model.config().vocab_size], DType::F32).expect("a small tensor");
    let is_first = layers.start == 0;
    let input = if is_first { StageInput::Tokens(&ids) } else { StageInput::Hidden(&hidden) };
    let is_last = layers.end == model.config().num_hidden_layers;
    let output = if is_last {
        StageOutput::Logits { rows: &rows, logits: &logits }
    } else {
        StageOutput::Hidden(&hidden)
    };
    let captured = gpu.capture(&mut || model.forward(&input, &batch, &caches, &output));
    captured.expect("it can be captured").expect("the device captures").kernels().to_vec()
}

#[test]
fn a_layer_of_a_captured_decode_step_has_few_launches() {
    for num_seqs in [1, 4] {
        // The first layer is dense. Two launches are no layer's: the embedding, and the norm before the first layer or behind the
        // last one, which is that of the next.
        let [dense, both, more] = [1, 2, 3].map(|end| launches(0..end, num_seqs));
        assert_eq!(more.len() - both.len(), both.len() - dense.len(), "layers of experts are alike");
        let found = [dense.len() - 2, both.len() - dense.len()];
        assert!(
            found.iter().zip(MAX_LAUNCHES).all(|(&found, most)| found <= most),
            "{num_seqs} sequences: {found:?} launches a layer, of {both:?}"
        );
    }
}
