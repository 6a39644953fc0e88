//! How many bytes of weights a rank holds, from names and shapes alone: known before a byte of them is read.

use std::ops::Range;

use r1_weights::{
    Checkpoint, ExpectedTensor, ModelConfig, QUANTIZED_GROUP, QuantizedFormat, TensorKind, expected_tensors,
};

use crate::{ModelError, ModelOptions, WeightFormat};

/// Which part of a tensor a rank holds, as [`load`](crate::load) cuts it.
enum Cut {
    All,
    /// An equal range of rows.
    Rows,
    /// An equal range of columns.
    Columns,
}

fn cut(tensor: &ExpectedTensor) -> Cut {
    let is = |linear: &str| tensor.name.contains(linear);
    match tensor.kind {
        TensorKind::Norm | TensorKind::Router | TensorKind::CorrectionBias | TensorKind::MtpProjection => {
            Cut::All
        }
        TensorKind::Embedding | TensorKind::Head => Cut::Rows,
        TensorKind::Linear | TensorKind::ExpertLinear => {
            if is(".q_a_proj.") || is(".kv_a_proj_with_mqa.") {
                Cut::All
            } else if is(".o_proj.") || is(".down_proj.") {
                Cut::Columns
            } else {
                Cut::Rows
            }
        }
    }
}

/// Bytes of the weights that a rank of the stage holds once it is loaded: what
/// [`DeepSeek::weight_bytes`](crate::DeepSeek::weight_bytes) says then. The checkpoint was verified.
pub(crate) fn weight_bytes(checkpoint: &Checkpoint, config: &ModelConfig, options: &ModelOptions) -> usize {
    let stage = options.layers.clone().unwrap_or(0..config.num_hidden_layers);
    let (is_first, is_last) = (stage.start == 0, stage.end == config.num_hidden_layers);
    let is_held = |tensor: &ExpectedTensor| {
        let layer =
            tensor.name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse().ok());
        match (layer, tensor.kind) {
            (Some(layer), _) => stage.contains(&layer),
            // A tied head on another stage than the table's needs the table as well.
            (None, TensorKind::Embedding) => is_first || is_last && config.tie_word_embeddings,
            (None, TensorKind::Head) => is_last && !config.tie_word_embeddings,
            (None, _) => is_last,
        }
    };
    expected_tensors(config)
        .filter(is_held)
        .map(|tensor| tensor_bytes(checkpoint, config, options, &tensor))
        .sum()
}

/// What a tensor is quantised to at load.
fn quantized(options: &ModelOptions, tensor: &ExpectedTensor) -> Option<QuantizedFormat> {
    match tensor.kind {
        TensorKind::Linear | TensorKind::ExpertLinear | TensorKind::Head => {
            options.weights.quantized(tensor.name.trim_end_matches(".weight"))
        }
        _ => None,
    }
}

/// Rows, and which columns, of a matrix a rank holds.
fn part(options: &ModelOptions, cut: &Cut, tensor: &ExpectedTensor) -> (usize, Range<usize>) {
    let (rank, world) = (options.rank.0, options.world_size);
    let (rows, columns) = (tensor.shape[0], tensor.shape[1]);
    match cut {
        Cut::All => (rows, 0..columns),
        Cut::Rows => (rows / world, 0..columns),
        Cut::Columns => (rows, rank * (columns / world)..(rank + 1) * (columns / world)),
    }
}

/// Refuses a quantisation whose format a tensor of this model cannot have.
pub(crate) fn check_quantized(config: &ModelConfig, options: &ModelOptions) -> Result<(), ModelError> {
    if options.weights.needs().is_empty() {
        return Ok(());
    }
    for tensor in expected_tensors(config) {
        let Some(format) = quantized(options, &tensor) else { continue };
        let (_, columns) = part(options, &cut(&tensor), &tensor);
        if !format.takes(&columns) {
            let flag = options.weights.flag();
            return Err(ModelError::Unsupported {
                what: format!("--quantization {flag} of {}", tensor.name),
                why: format!(
                    "rank {} of {} holds its columns {columns:?}, and int4 rows are whole words of 8; take int8, or another --tp",
                    options.rank, options.world_size
                ),
            });
        }
    }
    Ok(())
}

/// Kinds of int4 weights whose columns the ranks cut inside groups, each with the columns of a rank: their groups are divided then,
/// down to what both sides of a cut have in common.
pub(crate) fn cut_groups(config: &ModelConfig, options: &ModelOptions) -> Vec<(String, usize)> {
    let mut kinds: Vec<(String, usize)> = Vec::new();
    for tensor in expected_tensors(config) {
        if !matches!(cut(&tensor), Cut::Columns) || quantized(options, &tensor) != Some(QuantizedFormat::Int4)
        {
            continue;
        }
        let columns = tensor.shape[1] / options.world_size;
        let is_number = |part: &&str| part.parse::<usize>().is_ok();
        let parts = tensor.name.split('.').filter(|part| !is_number(part) && *part != "weight");
        let kind = parts.collect::<Vec<_>>().join(".");
        let kind = kind.trim_start_matches("model.layers.").to_owned();
        if options.world_size > 1
            && !columns.is_multiple_of(QUANTIZED_GROUP)
            && !kinds.contains(&(kind.clone(), columns))
        {
            kinds.push((kind, columns));
        }
    }
    kinds
}

/// What that means, and the way out; `None` where no group is cut.
pub(crate) fn cut_groups_warning(config: &ModelConfig, options: &ModelOptions) -> Option<String> {
    let kinds = cut_groups(config, options);
    let named: Vec<_> = kinds.iter().map(|(kind, columns)| format!("{kind} ({columns} a rank)")).collect();
    (!kinds.is_empty()).then(|| {
        format!(
            "--tp {} cuts int4 weights inside groups of {QUANTIZED_GROUP} inputs: {}; beside BF16 activations ranks apply them \
             through F32, which is slower. Take --quantization int8, whose groups may be cut, or a --tp whose ranks hold whole groups",
            options.world_size,
            named.join(", ")
        )
    })
}

fn tensor_bytes(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    options: &ModelOptions,
    tensor: &ExpectedTensor,
) -> usize {
    let (rank, world) = (options.rank.0, options.world_size);
    let values: usize = tensor.shape.iter().product();
    let cut = cut(tensor);
    let held = if matches!(cut, Cut::All) { values } else { values / world };
    if let Some(format) = quantized(options, tensor) {
        let (rows, columns) = part(options, &cut, tensor);
        return format.size_bytes(rows, &columns);
    }
    let stored = checkpoint.info(&tensor.name).expect("a verified checkpoint holds it");
    if tensor.kind == TensorKind::CorrectionBias {
        // Held as F32, whatever it is stored as.
        return 4 * held;
    }
    let fp8 = config.quantization.filter(|_| stored.dtype == "F8_E4M3");
    let Some(fp8) = fp8 else { return held * (stored.size_bytes / values.max(1)) };
    if options.weights == WeightFormat::WidenToBf16 {
        return 2 * held;
    }
    // Blocks that the range of rows and columns touches; their scales are F32.
    let blocks = |dim: usize, is_cut: bool| {
        let part = tensor.shape[dim] / world;
        let (start, end) = if is_cut { (rank * part, (rank + 1) * part) } else { (0, tensor.shape[dim]) };
        end.div_ceil(fp8.block[dim]) - start / fp8.block[dim]
    };
    held + 4 * blocks(0, matches!(cut, Cut::Rows)) * blocks(1, matches!(cut, Cut::Columns))
}

#[cfg(test)]
mod tests {
    use r1_core::{DType, Rank};
    use r1_weights::ConfigJson;

    use super::*;
    use crate::{Fp8Compute, KvCacheFormat, MlaForm};

    /// Two layers, the second with experts.
    fn config(heads: usize, v_head_dim: usize, intermediate: usize, experts: usize) -> ModelConfig {
        let text = format!(
            r#"{{"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 256,
            "hidden_size": 128, "intermediate_size": {intermediate}, "moe_intermediate_size": {experts},
            "num_hidden_layers": 2, "num_attention_heads": {heads}, "num_key_value_heads": {heads}, "n_shared_experts": 1,
            "n_routed_experts": 4, "routed_scaling_factor": 1.0, "kv_lora_rank": 64, "q_lora_rank": null,
            "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": {v_head_dim}, "topk_method": "noaux_tc",
            "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "norm_topk_prob": true,
            "scoring_func": "sigmoid", "hidden_act": "silu", "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0, "tie_word_embeddings": false, "bos_token_id": 0, "eos_token_id": 1}}"#
        );
        ConfigJson::parse(text.as_bytes()).and_then(|json| json.model()).expect("a model")
    }

    fn options(weights: WeightFormat, world_size: usize) -> ModelOptions {
        ModelOptions {
            activation_dtype: DType::BF16,
            kv_cache: KvCacheFormat::Activations,
            weights,
            fp8: Fp8Compute::WeightOnly,
            mla_form: MlaForm::Auto,
            max_batched_tokens: 1,
            max_logit_rows: 1,
            max_model_len: 2,
            max_expanded_tokens: 1,
            layers: None,
            deterministic: false,
            rank: Rank(0),
            world_size,
        }
    }

    #[test]
    fn groups_that_ranks_cut_are_named_by_kind() {
        let cut = |weights, world| cut_groups(&config(4, 64, 512, 192), &options(weights, world));
        let kind = |name: &str, columns| (name.to_owned(), columns);
        assert_eq!(cut(WeightFormat::Int4, 1), []);
        assert_eq!(
            cut(WeightFormat::Int4, 2),
            [kind("mlp.experts.down_proj", 96), kind("mlp.shared_experts.down_proj", 96)]
        );
        let all = cut(WeightFormat::Int4, 4);
        assert_eq!(
            all,
            [
                kind("self_attn.o_proj", 64),
                kind("mlp.experts.down_proj", 48),
                kind("mlp.shared_experts.down_proj", 48)
            ]
        );
        for weights in [WeightFormat::Int8, WeightFormat::AsStored, WeightFormat::WidenToBf16] {
            assert_eq!(cut(weights, 4), [], "{weights:?}");
        }
        let text =
            cut_groups_warning(&config(4, 64, 512, 192), &options(WeightFormat::Int4, 4)).expect("a warning");
        for part in [
            "--tp 4",
            "self_attn.o_proj (64 a rank)",
            "mlp.experts.down_proj (48 a rank)",
            "--quantization int8",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert_eq!(cut_groups_warning(&config(4, 64, 512, 256), &options(WeightFormat::Int4, 2)), None);
    }
}
