//! From the fields of config.json to a [`ModelConfig`]: both dialects, every refusal. Knows no tensor.

use r1_core::{DType, TokenId};
use serde_json::{Map, Value, json};

use super::{
    Architecture, ConfigError, Fields, Fp8BlockConfig, ModelConfig, MoeConfig, Rope, ScaleFmt, ScoringFunc,
    TopkMethod, Yarn, fields::show,
};

// Sanity limits, far above every published model: they keep each product of sizes below 2^63, and what a hostile
// config can make the caller allocate within reason. The limits of other numbers keep every frequency and scale that is
// computed from them finite and above 0 in f32.
const MAX_VOCAB: u64 = 1 << 22;
const MAX_WIDTH: u64 = 1 << 18;
const MAX_LAYERS: u64 = 512;
const MAX_MTP_LAYERS: u64 = 8;
const MAX_HEADS: u64 = 1 << 12;
const MAX_HEAD_DIM: u64 = 1 << 12;
const MAX_EXPERTS: u64 = 1 << 11;
const MAX_SHARED_EXPERTS: u64 = 64;
const MAX_CONTEXT: u64 = 1 << 27;
const MAX_BLOCK: u64 = 1 << 16;

/// Known fields that cannot change what a forward pass computes: training, bookkeeping, and Python's class loading.
const HARMLESS: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "attention_dropout",
    "auto_map",
    "aux_loss_alpha",
    "chunk_size_feed_forward",
    "ep_size",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "seq_aux",
    "transformers_version",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
];

pub(super) fn model_config(map: &Map<String, Value>) -> Result<ModelConfig, ConfigError> {
    let mut f = Fields::new("config.json", "", map);
    refuse_other_models(&mut f)?;
    let architecture = architecture(&mut f)?;
    refuse_other_computations(&mut f)?;

    let vocab_size = f.need_size("vocab_size", 1, MAX_VOCAB)?;
    let hidden_size = f.need_size("hidden_size", 1, MAX_WIDTH)?;
    let num_attention_heads = f.need_size("num_attention_heads", 1, MAX_HEADS)?;
    if let Some(kv_heads) = f.size("num_key_value_heads", 1, MAX_HEADS)?
        && kv_heads != num_attention_heads
    {
        let reason = format!("latent attention has as many as num_attention_heads, {num_attention_heads}");
        return Err(f.invalid("num_key_value_heads", kv_heads, reason));
    }
    if !f.states("q_lora_rank") {
        return Err(f.missing("q_lora_rank"));
    }
    let q_lora_rank = f.size("q_lora_rank", 1, MAX_WIDTH)?;
    let kv_lora_rank = f.need_size("kv_lora_rank", 1, MAX_WIDTH)?;
    let qk_nope_head_dim = f.need_size("qk_nope_head_dim", 1, MAX_HEAD_DIM)?;
    let qk_rope_head_dim = f.need_size("qk_rope_head_dim", 2, MAX_HEAD_DIM)?;
    if !qk_rope_head_dim.is_multiple_of(2) {
        return Err(f.invalid("qk_rope_head_dim", qk_rope_head_dim, "RoPE turns pairs, so it must be even"));
    }
    let qk_head_dim = qk_nope_head_dim + qk_rope_head_dim;
    check_derived(&mut f, "qk_head_dim", &[qk_head_dim])?;
    check_derived(&mut f, "head_dim", &[qk_rope_head_dim, qk_head_dim])?;

    let moe = moe_config(&mut f, architecture)?;
    let rope = rope_config(&mut f)?;
    let quantization = quantization(&mut f)?;
    let eos_token_ids = f.token_ids("eos_token_id", vocab_size)?.into_iter().map(TokenId).collect();
    let bos_token_id = match f.token_ids("bos_token_id", vocab_size)?[..] {
        [] => None,
        [id] => Some(TokenId(id)),
        ref ids => return Err(f.invalid("bos_token_id", format!("{ids:?}"), "there can be only one")),
    };

    let mut config = ModelConfig {
        architecture,
        vocab_size,
        hidden_size,
        intermediate_size: f.need_size("intermediate_size", 1, MAX_WIDTH)?,
        num_hidden_layers: f.need_size("num_hidden_layers", 1, MAX_LAYERS)?,
        num_nextn_predict_layers: f.size("num_nextn_predict_layers", 0, MAX_MTP_LAYERS)?.unwrap_or(0),
        first_k_dense_replace: f.need_size("first_k_dense_replace", 0, MAX_LAYERS)?,
        // transformers 5 drops the field, since its classes know 1 only.
        moe_layer_freq: f.size("moe_layer_freq", 1, MAX_LAYERS)?.unwrap_or(1),
        num_attention_heads,
        q_lora_rank,
        kv_lora_rank,
        qk_nope_head_dim,
        qk_rope_head_dim,
        v_head_dim: f.need_size("v_head_dim", 1, MAX_HEAD_DIM)?,
        moe,
        rope: rope.value,
        rms_norm_eps: f
            .need_number("rms_norm_eps", "at least 1e-30 and below 1", |x| (1e-30..1.0).contains(&x))?,
        max_position_embeddings: f.need_size("max_position_embeddings", 1, MAX_CONTEXT)?,
        tie_word_embeddings: f.bool("tie_word_embeddings")?.unwrap_or(false),
        quantization: quantization.value,
        dtype: dtype(&mut f)?,
        bos_token_id,
        eos_token_ids,
        unknown_fields: Vec::new(),
    };
    config.unknown_fields = f.unknown(HARMLESS);
    config.unknown_fields.extend(rope.unknown);
    config.unknown_fields.extend(quantization.unknown);
    Ok(config)
}

/// A nested object's meaning, and the fields of it that have none here.
struct Nested<T> {
    value: T,
    unknown: Vec<String>,
}

/// DeepSeek-V3.2 calls itself by several names; what gives it away is its sparse attention.
fn refuse_other_models(f: &mut Fields<'_>) -> Result<(), ConfigError> {
    for field in ["index_topk", "index_n_heads", "index_head_dim"] {
        if let Some(value) = f.get(field) {
            return Err(f.unsupported(field, value, "models without DeepSeek-V3.2's sparse attention"));
        }
    }
    Ok(())
}

fn architecture(f: &mut Fields<'_>) -> Result<Architecture, ConfigError> {
    const CLASSES: [&str; 3] = ["DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "KimiK2ForCausalLM"];
    let model_type = f.str("model_type")?.ok_or_else(|| f.missing("model_type"))?;
    let found = Architecture::ALL.into_iter().find(|a| a.model_type() == model_type);
    let architecture = found.ok_or_else(|| {
        let names = Architecture::ALL.map(Architecture::model_type).join(", ");
        f.unsupported("model_type", &json!(model_type), &names)
    })?;
    if let Some(classes) = f.get("architectures") {
        let known = |c: &Value| c.as_str().is_some_and(|c| CLASSES.contains(&c));
        if !classes.as_array().is_some_and(|list| list.iter().any(known)) {
            return Err(f.unsupported("architectures", classes, &CLASSES.join(", ")));
        }
    }
    Ok(architecture)
}

/// Switches that exist in the wild and would change the result.
fn refuse_other_computations(f: &mut Fields<'_>) -> Result<(), ConfigError> {
    let act = f.str("hidden_act")?.ok_or_else(|| f.missing("hidden_act"))?;
    if act != "silu" {
        return Err(f.unsupported("hidden_act", &json!(act), "silu"));
    }
    f.only("attention_bias", &json!(false), "false")?;
    f.only("mlp_bias", &json!(false), "false")?;
    f.only("rope_interleave", &json!(true), "true (pairs are (2i, 2i+1))")?;
    f.only("use_mla", &json!(true), "true")?;
    for field in ["sliding_window", "compression_config", "text_config", "vision_config"] {
        if let Some(value) = f.get(field) {
            return Err(f.unsupported(field, value, "models without it"));
        }
    }
    Ok(())
}

/// transformers 5 writes sizes that follow from others; a file in which they do not follow means something else.
fn check_derived(f: &mut Fields<'_>, field: &'static str, allowed: &[usize]) -> Result<(), ConfigError> {
    match f.size(field, 0, u64::from(u32::MAX))? {
        Some(found) if !allowed.contains(&found) => {
            let list: Vec<_> = allowed.iter().map(ToString::to_string).collect();
            let reason = format!("qk_nope_head_dim and qk_rope_head_dim imply {}", list.join(" or "));
            Err(f.invalid(field, found, reason))
        }
        _ => Ok(()),
    }
}

fn moe_config(f: &mut Fields<'_>, architecture: Architecture) -> Result<MoeConfig, ConfigError> {
    let v2 = architecture == Architecture::DeepseekV2;
    let n_routed_experts = f.need_size("n_routed_experts", 1, MAX_EXPERTS)?;
    // Null means none; leaving it out would mean a default.
    if !f.states("n_shared_experts") {
        return Err(f.missing("n_shared_experts"));
    }
    let n_shared_experts = f.size("n_shared_experts", 0, MAX_SHARED_EXPERTS)?.unwrap_or(0);
    let num_experts_per_tok = f.need_size("num_experts_per_tok", 1, n_routed_experts as u64)?;
    let moe_intermediate_size = f.need_size("moe_intermediate_size", 1, MAX_WIDTH)?;

    // transformers 5 leaves both out where its class for the model_type knows one method only.
    let scoring_func = match f.str("scoring_func")? {
        Some("softmax") => ScoringFunc::Softmax,
        None if v2 => ScoringFunc::Softmax,
        Some("sigmoid") | None => ScoringFunc::Sigmoid,
        Some(other) => return Err(f.unsupported("scoring_func", &json!(other), "softmax, sigmoid")),
    };
    let topk_method = match f.str("topk_method")? {
        Some("greedy") => TopkMethod::Greedy,
        Some("group_limited_greedy") => TopkMethod::GroupLimitedGreedy,
        None if v2 => return Err(f.missing("topk_method")),
        Some("noaux_tc") | None => TopkMethod::NoauxTc,
        Some(other) => {
            return Err(f.unsupported(
                "topk_method",
                &json!(other),
                "greedy, group_limited_greedy, noaux_tc",
            ));
        }
    };
    if (scoring_func == ScoringFunc::Sigmoid) != (topk_method == TopkMethod::NoauxTc) {
        let value = json!(format!("{topk_method:?} with scoring_func {scoring_func:?}"));
        let published = "noaux_tc with sigmoid, greedy and group_limited_greedy with softmax (no reference defines others)";
        return Err(f.unsupported("topk_method", &value, published));
    }

    let (n_group, topk_group) = groups(f, topk_method, n_routed_experts, num_experts_per_tok)?;
    let norm_topk_prob = f.bool("norm_topk_prob")?.ok_or_else(|| f.missing("norm_topk_prob"))?;
    let routed_scaling_factor =
        f.need_number("routed_scaling_factor", "between 1e-6 and 1e6", |x| (1e-6..=1e6).contains(&x))?;
    // V2's published code normalises OR scales; V3's does both.
    if v2 && norm_topk_prob && routed_scaling_factor != 1.0 {
        let supported = "false, or true with routed_scaling_factor 1 (for deepseek_v2)";
        return Err(f.unsupported("norm_topk_prob", &json!(true), supported));
    }
    Ok(MoeConfig {
        n_routed_experts,
        n_shared_experts,
        num_experts_per_tok,
        moe_intermediate_size,
        scoring_func,
        topk_method,
        n_group,
        topk_group,
        norm_topk_prob,
        routed_scaling_factor,
    })
}

/// `(n_group, topk_group)`; plain greedy choice ignores what the file says about groups.
fn groups(
    f: &mut Fields<'_>,
    method: TopkMethod,
    experts: usize,
    per_token: usize,
) -> Result<(usize, usize), ConfigError> {
    let stated = (f.size("n_group", 1, MAX_EXPERTS)?, f.size("topk_group", 1, MAX_EXPERTS)?);
    if method == TopkMethod::Greedy {
        return Ok((1, 1));
    }
    let n_group = stated.0.ok_or_else(|| f.missing("n_group"))?;
    let topk_group = stated.1.ok_or_else(|| f.missing("topk_group"))?;
    if !experts.is_multiple_of(n_group) {
        return Err(f.invalid("n_group", n_group, format!("it must divide n_routed_experts, {experts}")));
    }
    if topk_group > n_group {
        return Err(f.invalid("topk_group", topk_group, format!("it must be at most n_group, {n_group}")));
    }
    let group_size = experts / n_group;
    if method == TopkMethod::NoauxTc && group_size < 2 {
        let reason = format!("groups of {group_size} of {experts} experts have no top two to sum");
        return Err(f.invalid("n_group", n_group, reason));
    }
    if topk_group * group_size < per_token {
        let reason = format!(
            "{topk_group} groups of {group_size} experts hold fewer than num_experts_per_tok, {per_token}"
        );
        return Err(f.invalid("topk_group", topk_group, reason));
    }
    Ok((n_group, topk_group))
}

/// `rope_scaling` + `rope_theta` as published, or transformers 5's `rope_parameters`; both only if they agree.
fn rope_config(f: &mut Fields<'_>) -> Result<Nested<Rope>, ConfigError> {
    let top_theta = f.number("rope_theta", THETA, is_theta)?;
    let mut found: Option<Nested<Rope>> = None;
    for (field, prefix) in [("rope_parameters", "rope_parameters."), ("rope_scaling", "rope_scaling.")] {
        let Some(map) = f.object(field)? else { continue };
        let rope = rope_object(prefix, map, top_theta)?;
        match &mut found {
            None => found = Some(rope),
            Some(first) if first.value == rope.value => first.unknown.extend(rope.unknown),
            Some(_) => return Err(f.invalid(field, show(&json!(map)), "it disagrees with rope_parameters")),
        }
    }
    if let Some(rope) = found {
        return Ok(rope);
    }
    let theta = top_theta.ok_or_else(|| f.missing("rope_theta"))?;
    Ok(Nested { value: Rope { theta, yarn: None }, unknown: Vec::new() })
}

const THETA: &str = "above 1 and at most 1e12";

fn is_theta(x: f64) -> bool {
    x > 1.0 && x <= 1e12
}

fn rope_object(
    prefix: &'static str,
    map: &Map<String, Value>,
    top_theta: Option<f64>,
) -> Result<Nested<Rope>, ConfigError> {
    let mut f = Fields::new("config.json", prefix, map);
    let theta = match (f.number("rope_theta", THETA, is_theta)?, top_theta) {
        (Some(a), Some(b)) if a != b => return Err(f.invalid("rope_theta", a, format!("rope_theta is {b}"))),
        (Some(theta), _) | (None, Some(theta)) => theta,
        (None, None) => return Err(f.missing("rope_theta")),
    };
    let kind = match (f.str("type")?, f.str("rope_type")?) {
        (Some(a), Some(b)) if a != b => return Err(f.invalid("type", a, format!("rope_type is {b}"))),
        (Some(kind), _) | (None, Some(kind)) => kind,
        (None, None) => return Err(f.missing("type")),
    };
    f.only("partial_rotary_factor", &json!(1.0), "1.0")?;
    let yarn = match kind {
        "default" => None,
        "yarn" => Some(yarn(&mut f)?),
        other => return Err(f.unsupported("type", &json!(other), "yarn, default")),
    };
    let unknown = f.unknown(&[]);
    Ok(Nested { value: Rope { theta, yarn }, unknown })
}

const TURNS: &str = "between 1e-6 and 1e6";

fn is_turns(x: f64) -> bool {
    (1e-6..=1e6).contains(&x)
}

fn yarn(f: &mut Fields<'_>) -> Result<Yarn, ConfigError> {
    f.only("truncate", &json!(true), "true")?;
    if let Some(value) = f.get("attention_factor") {
        return Err(f.unsupported(
            "attention_factor",
            value,
            "mscale and mscale_all_dim, from which it follows",
        ));
    }
    let mscale = f.number("mscale", "above 0 and at most 1000", |x| x > 0.0 && x <= 1e3)?;
    let mscale_all_dim = f.number("mscale_all_dim", "between 0 and 1000", |x| (0.0..=1e3).contains(&x))?;
    // Absent, the published code and transformers agree on 1 and 0; for any other incomplete pair they differ.
    let (mscale, mscale_all_dim) = match (mscale, mscale_all_dim) {
        (Some(m), Some(all)) => (m, all),
        (None, None) => (1.0, 0.0),
        (None, Some(_)) => return Err(f.missing("mscale")),
        (Some(_), None) => return Err(f.missing("mscale_all_dim")),
    };
    if mscale_all_dim == 0.0 && mscale != 1.0 {
        return Err(f.invalid(
            "mscale_all_dim",
            0,
            format!("with mscale {mscale} implementations disagree about it"),
        ));
    }
    Ok(Yarn {
        factor: f.need_number("factor", "between 1 and 1e6", |x| (1.0..=1e6).contains(&x))?,
        beta_fast: f.need_number("beta_fast", TURNS, is_turns)?,
        beta_slow: f.need_number("beta_slow", TURNS, is_turns)?,
        mscale,
        mscale_all_dim,
        original_max_position_embeddings: f.need_size("original_max_position_embeddings", 1, MAX_CONTEXT)?,
    })
}

fn quantization(f: &mut Fields<'_>) -> Result<Nested<Option<Fp8BlockConfig>>, ConfigError> {
    // What stays unquantised shows in the tensors' own dtypes.
    const HARMLESS_IN_QUANTIZATION: &[&str] = &["modules_to_not_convert"];
    let Some(map) = f.object("quantization_config")? else {
        return Ok(Nested { value: None, unknown: Vec::new() });
    };
    let mut q = Fields::new("config.json", "quantization_config.", map);
    let method = q.get("quant_method").ok_or_else(|| q.missing("quant_method"))?;
    if method != "fp8" {
        return Err(q.unsupported("quant_method", method, "fp8"));
    }
    q.only("fmt", &json!("e4m3"), "e4m3")?;
    let scheme = q.get("activation_scheme").ok_or_else(|| q.missing("activation_scheme"))?;
    if scheme != "dynamic" {
        return Err(q.unsupported("activation_scheme", scheme, "dynamic"));
    }
    let block = q.get("weight_block_size").ok_or_else(|| q.missing("weight_block_size"))?;
    let side = |i: usize| block.get(i)?.as_u64().filter(|s| (1..=MAX_BLOCK).contains(s)).map(|s| s as usize);
    let sides = (side(0), side(1), block.as_array().map(Vec::len));
    let (Some(rows), Some(columns), Some(2)) = sides else {
        return Err(q.invalid("weight_block_size", show(block), "it must be two positive sizes"));
    };
    let scale_fmt = match q.str("scale_fmt")? {
        None => ScaleFmt::F32,
        Some("ue8m0") => ScaleFmt::Ue8m0,
        Some(other) => return Err(q.unsupported("scale_fmt", &json!(other), "ue8m0, or absent")),
    };
    let unknown = q.unknown(HARMLESS_IN_QUANTIZATION);
    Ok(Nested { value: Some(Fp8BlockConfig { block: [rows, columns], scale_fmt }), unknown })
}

fn dtype(f: &mut Fields<'_>) -> Result<Option<DType>, ConfigError> {
    let mut found = None;
    for field in ["dtype", "torch_dtype"] {
        let dtype = match f.str(field)? {
            None => continue,
            Some("bfloat16") => DType::BF16,
            Some("float16") => DType::F16,
            Some("float32") => DType::F32,
            Some(other) => return Err(f.unsupported(field, &json!(other), "bfloat16, float16, float32")),
        };
        if found.is_some_and(|first| first != dtype) {
            return Err(f.invalid(field, dtype, "dtype says otherwise"));
        }
        found = Some(dtype);
    }
    Ok(found)
}
