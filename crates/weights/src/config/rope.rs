//! Rotary embedding and YaRN as numbers: frequencies and the two scalings. Knows no tensor and no position.

/// Rotary position embedding over `qk_rope_head_dim` values, in interleaved pairs `(2i, 2i + 1)`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Context extension; `None` is plain RoPE.
    pub yarn: Option<Yarn>,
}

/// YaRN context extension (arXiv:2309.00071) with DeepSeek's two magnitude scales.
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// How much longer the context is than what the model was first trained on.
    pub factor: f64,
    /// Dimensions that turn more often than this over the original context keep their frequency.
    pub beta_fast: f64,
    /// Dimensions that turn less often than this are interpolated by `factor`.
    pub beta_slow: f64,
    /// Scales cos and sin, over `mscale_all_dim`.
    pub mscale: f64,
    /// Scales the attention logits (squared); 0 leaves them alone.
    pub mscale_all_dim: f64,
    /// Context length before extension, in tokens.
    pub original_max_position_embeddings: usize,
}

/// `0.1 · m · ln(factor) + 1`, and 1 where nothing is extended.
fn magnitude(factor: f64, m: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 }
}

impl Yarn {
    /// What cos and sin are multiplied by.
    fn attention_scaling(&self) -> f64 {
        magnitude(self.factor, self.mscale) / magnitude(self.factor, self.mscale_all_dim)
    }

    /// The index (of pairs) at which a dimension turns `rotations` times over the original context.
    fn correction_dim(&self, rotations: f64, dim: usize, theta: f64) -> f64 {
        let context = self.original_max_position_embeddings as f64;
        dim as f64 * (context / (rotations * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln())
    }
}

impl Rope {
    /// `qk_rope_head_dim / 2` inverse frequencies in f32, one per interleaved pair.
    ///
    /// Each step is rounded to f32 where transformers' tensors are f32, so that angles at long positions agree.
    pub fn inv_freq(&self, qk_rope_head_dim: usize) -> Vec<f32> {
        let dim = qk_rope_head_dim;
        let plain =
            (0..dim).step_by(2).map(|i| f64::from(i as f32 / dim as f32)).map(|x| self.theta.powf(x) as f32);
        let Some(yarn) = &self.yarn else { return plain.map(|p| 1.0 / p).collect() };

        let low = yarn.correction_dim(yarn.beta_fast, dim, self.theta).floor().max(0.0);
        let high = yarn.correction_dim(yarn.beta_slow, dim, self.theta).ceil().min((dim - 1) as f64);
        let width = if high == low { 0.001 } else { high - low };
        plain
            .enumerate()
            .map(|(i, period)| {
                let ramp = ((i as f32 - low as f32) / width as f32).clamp(0.0, 1.0);
                let keep = 1.0 - ramp;
                let interpolated = 1.0 / (yarn.factor as f32 * period);
                let extrapolated = 1.0 / period;
                interpolated * (1.0 - keep) + extrapolated * keep
            })
            .collect()
    }

    /// What cos and sin are multiplied by: 1 without YaRN, and for every model whose two mscales are equal.
    pub fn attention_scaling(&self) -> f32 {
        self.yarn.as_ref().map_or(1.0, |y| y.attention_scaling() as f32)
    }

    /// What the attention logits are multiplied by beyond `head_dim^-0.5`: mscale², or 1.
    pub(crate) fn logit_scaling(&self) -> f64 {
        self.yarn.as_ref().map_or(1.0, |y| magnitude(y.factor, y.mscale_all_dim).powi(2))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v3() -> Rope {
        Rope {
            theta: 10000.0,
            yarn: Some(Yarn {
                factor: 40.0,
                beta_fast: 32.0,
                beta_slow: 1.0,
                mscale: 1.0,
                mscale_all_dim: 1.0,
                original_max_position_embeddings: 4096,
            }),
        }
    }

    #[track_caller]
    fn near(found: f32, expected: f64) {
        let gap = (f64::from(found) - expected).abs() / expected.abs();
        assert!(gap < 3e-7, "{found} is not {expected}: relative gap {gap}");
    }

    #[test]
    fn plain_frequencies_are_powers_of_theta() {
        let rope = Rope { theta: 50000.0, yarn: None };
        let freq = rope.inv_freq(64);
        assert_eq!(freq.len(), 32);
        for (i, &f) in freq.iter().enumerate() {
            near(f, 50000f64.powf(-(i as f64) / 32.0));
        }
        assert_eq!(rope.attention_scaling(), 1.0);
        assert_eq!(rope.logit_scaling(), 1.0);
    }

    /// For theta 1e4, 64 dims, 4096 positions: 32 turns at 10.47 and 1 turn at 22.51 pairs, so the ramp runs from
    /// pair 10 to pair 23.
    #[test]
    fn yarn_keeps_fast_pairs_and_interpolates_slow_ones() {
        let freq = v3().inv_freq(64);
        let plain = |i: usize| 10000f64.powf(-(i as f64) / 32.0);
        for (i, &f) in freq.iter().enumerate() {
            let ramp = ((i as f64 - 10.0) / 13.0).clamp(0.0, 1.0);
            near(f, plain(i) / 40.0 * ramp + plain(i) * (1.0 - ramp));
        }
        near(freq[10], plain(10));
        near(freq[23], plain(23) / 40.0);
    }

    /// Kimi-K2 sets beta_fast = beta_slow = 1 (theta 5e4): one turn at 19.16 pairs, so the ramp is 19 to 20.
    #[test]
    fn equal_betas_make_a_step() {
        let mut rope = Rope { theta: 50000.0, ..v3() };
        let yarn = rope.yarn.as_mut().unwrap();
        (yarn.factor, yarn.beta_fast, yarn.beta_slow) = (32.0, 1.0, 1.0);
        let freq = rope.inv_freq(64);
        let plain = |i: usize| 50000f64.powf(-(i as f64) / 32.0);
        near(freq[19], plain(19));
        near(freq[20], plain(20) / 32.0);
    }

    /// A ramp of width zero (both ends clamped to the same pair) divides by 0.001, not by 0.
    #[test]
    fn an_empty_ramp_is_finite() {
        let mut rope = v3();
        rope.yarn.as_mut().unwrap().original_max_position_embeddings = 1;
        assert!(rope.inv_freq(2).iter().all(|f| f.is_finite() && *f > 0.0));
    }

    #[test]
    fn magnitudes() {
        let mut rope = v3();
        let m = 0.1 * 40f64.ln() + 1.0;
        assert_eq!(rope.attention_scaling(), 1.0);
        assert!((rope.logit_scaling() - m * m).abs() < 1e-12);
        let yarn = rope.yarn.as_mut().unwrap();
        (yarn.mscale, yarn.mscale_all_dim) = (1.0, 0.0);
        near(rope.attention_scaling(), m);
        assert_eq!(rope.logit_scaling(), 1.0);
        let yarn = rope.yarn.as_mut().unwrap();
        (yarn.mscale, yarn.mscale_all_dim) = (0.707, 1.0);
        near(rope.attention_scaling(), (0.0707 * 40f64.ln() + 1.0) / m);
    }
}
