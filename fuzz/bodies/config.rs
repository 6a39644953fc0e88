//! Whatever the text of a config.json is: an error that names the file, or a config whose every derived number is finite
//! and whose tensors can be listed. Shared by the fuzz target and the replay of its corpus.

use r1_weights::{GenerationDefaults, ModelConfig, expected_tensors};

/// Listing the largest accepted model takes millions of names; beyond this many a part is listed.
const LISTED: usize = 2000;

pub(crate) fn run(data: &[u8]) {
    if let Err(error) = GenerationDefaults::from_json(data, 512) {
        let text = error.to_string();
        assert!(text.contains("generation_config.json"), "{text}");
    }
    let config = match ModelConfig::from_json(data) {
        Ok(config) => config,
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains("config.json"), "{text}");
            return;
        }
    };
    let positive = |x: f32| assert!(x.is_finite() && x > 0.0, "{x}: {config:?}");
    config.inv_freq().into_iter().for_each(positive);
    positive(config.softmax_scale());
    positive(config.attention_scaling());
    positive(config.rms_norm_eps as f32);
    positive(config.moe.routed_scaling_factor as f32);
    for tensor in expected_tensors(&config).take(LISTED) {
        let size = tensor.shape.iter().try_fold(4usize, |n, &d| n.checked_mul(d));
        assert!(size.is_some_and(|n| n > 0), "{tensor:?}");
    }
    let layers = config.num_hidden_layers + config.num_nextn_predict_layers;
    if layers * config.moe.n_routed_experts < LISTED {
        let counts = config.param_counts();
        assert!(0 < counts.active && counts.active <= counts.total, "{counts:?}");
        assert!(config.published_size_bytes() > 0);
    }
}
