//! What a request asks of the sampler. Text (stop strings) is not here: it lives on the HTTP side.

use crate::TokenId;

/// How one sequence draws its tokens. `Default` draws from the full distribution at temperature 1.
///
/// Order of application: `logit_bias`, stop tokens masked below `min_tokens`, repetition, frequency and presence
/// penalties, temperature, `min_p`, `top_k`, `top_p`, draw.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy: the largest logit, the lowest id among equals.
    pub temperature: f32,
    /// Keeps the smallest set of most likely tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keeps this many most likely tokens; `None` keeps all.
    pub top_k: Option<u32>,
    /// Drops tokens less likely than `min_p` times the most likely one; 0 drops none.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output; 1 is neutral.
    pub repetition_penalty: f32,
    /// Subtracted once from tokens that the output holds.
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the output.
    pub frequency_penalty: f32,
    /// Added to single logits, [-100, 100].
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Keys the counter-based generator together with the position: the same seed draws the same numbers
    /// whatever else runs.
    pub seed: u64,
    /// Most tokens to generate, at least 1.
    pub max_tokens: u32,
    /// Stop tokens cannot be drawn before this many tokens.
    pub min_tokens: u32,
    /// Tokens that end the sequence; EOS is among them unless `ignore_eos` was asked for.
    pub stop_token_ids: Vec<TokenId>,
    /// Report the drawn token's log-probability and this many most likely alternatives; `None` reports none.
    pub logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: None,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            max_tokens: 16,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            logprobs: None,
        }
    }
}

/// A sampling parameter outside its range.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{param} is {value}; it must be {range}")]
pub struct InvalidSampling {
    /// The field's name.
    pub param: &'static str,
    /// What was given.
    pub value: f64,
    /// What is allowed.
    pub range: &'static str,
}

impl SamplingParams {
    /// Largest accepted `logprobs`.
    pub const MAX_LOGPROBS: u32 = 20;

    /// Checks every parameter against its range; NaN is outside all of them.
    pub fn validate(&self) -> Result<(), InvalidSampling> {
        let check = |param, value: f32, ok: bool, range| {
            if ok { Ok(()) } else { Err(InvalidSampling { param, value: f64::from(value), range }) }
        };
        let t = self.temperature;
        check("temperature", t, (0.0..=2.0).contains(&t), "between 0 and 2")?;
        check("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "above 0 and at most 1")?;
        check("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "between 0 and 1")?;
        check("top_k", 0.0, self.top_k != Some(0), "at least 1, or absent to keep all")?;
        let r = self.repetition_penalty;
        check("repetition_penalty", r, r > 0.0 && r <= 2.0, "above 0 and at most 2")?;
        for (param, v) in
            [("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)]
        {
            check(param, v, (-2.0..=2.0).contains(&v), "between -2 and 2")?;
        }
        for &(_, bias) in &self.logit_bias {
            check("logit_bias", bias, (-100.0..=100.0).contains(&bias), "between -100 and 100")?;
        }
        check("max_tokens", 0.0, self.max_tokens > 0, "at least 1")?;
        let n = self.logprobs.unwrap_or(0);
        check("logprobs", n as f32, n <= Self::MAX_LOGPROBS, "at most 20")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_each_field_is_checked() {
        SamplingParams::default().validate().unwrap();
        let bad = |change: fn(&mut SamplingParams)| {
            let mut p = SamplingParams::default();
            change(&mut p);
            p.validate().unwrap_err().param
        };
        assert_eq!(bad(|p| p.temperature = -0.1), "temperature");
        assert_eq!(bad(|p| p.temperature = f32::NAN), "temperature");
        assert_eq!(bad(|p| p.top_p = 0.0), "top_p");
        assert_eq!(bad(|p| p.top_k = Some(0)), "top_k");
        assert_eq!(bad(|p| p.min_p = 1.5), "min_p");
        assert_eq!(bad(|p| p.repetition_penalty = 0.0), "repetition_penalty");
        assert_eq!(bad(|p| p.presence_penalty = 2.5), "presence_penalty");
        assert_eq!(bad(|p| p.frequency_penalty = f32::INFINITY), "frequency_penalty");
        assert_eq!(bad(|p| p.logit_bias = vec![(TokenId(1), 101.0)]), "logit_bias");
        assert_eq!(bad(|p| p.max_tokens = 0), "max_tokens");
        assert_eq!(bad(|p| p.logprobs = Some(21)), "logprobs");
    }
}
