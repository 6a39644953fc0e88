//! Who asks for what: prompts that share their beginnings with each other and with what was generated before, salts,
//! priorities, limits. Knows the scheduler only by what it must refuse.

use std::collections::VecDeque;

use r1_core::{FinishReason, SeqId, TokenId};

use super::device::{extend, next_token, root};
use super::rng::Rng;
use super::{Scenario, Simulation, ensure};
use crate::{NewSequence, SchedError};

/// Earlier conversations that may be continued.
const MAX_TURNS: usize = 4;

/// The engine's side of a sequence.
pub(super) struct Client {
    pub(super) prompt: Vec<TokenId>,
    pub(super) max_len: usize,
    pub(super) priority: i32,
    pub(super) arrival: u64,
    pub(super) salt: Salt,
    pub(super) run_ahead: bool,
    pub(super) paused: bool,
    pub(super) prompt_logits: bool,
    /// Positions of the prompt whose logits have come.
    pub(super) num_logits: usize,
    /// A token divisible by this is a stop token.
    stop_modulus: u32,
    /// Output as it was committed, piece by piece.
    pub(super) streamed: Vec<TokenId>,
    /// Where its prefill began when it was first admitted.
    pub(super) first_start: Option<usize>,
}

impl Client {
    pub(super) fn is_stop(&self, token: TokenId) -> bool {
        token.0.is_multiple_of(self.stop_modulus)
    }

    /// Prompt and output, and the reason it ends, when nothing else runs and nothing is cached.
    pub(super) fn ideal(&self) -> (Vec<TokenId>, FinishReason) {
        let mut tokens = self.prompt.clone();
        let mut history =
            tokens.iter().fold(root(self.salt.as_deref()), |history, &token| extend(history, token));
        loop {
            let token = next_token(history);
            tokens.push(token);
            history = extend(history, token);
            if self.is_stop(token) {
                return (tokens, FinishReason::Stop(token));
            }
            if tokens.len() == self.max_len {
                return (tokens, FinishReason::Length);
            }
        }
    }
}

type Salt = Option<Box<[u8]>>;

/// Where prompts come from.
pub(super) struct Prompts {
    stems: Vec<Vec<TokenId>>,
    /// Tokens and salt of sequences that have ended, the latest last.
    turns: VecDeque<(Vec<TokenId>, Salt)>,
}

impl Prompts {
    pub(super) fn new(scenario: &Scenario) -> Self {
        // Their own generator: they are part of the scenario.
        let mut rng = Rng::new(scenario.seed ^ 0x57e3);
        let stems = (0..scenario.num_stems)
            .map(|_| (0..scenario.config.max_model_len).map(|_| token(&mut rng)).collect())
            .collect();
        Self { stems, turns: VecDeque::new() }
    }

    /// A sequence has ended, and its next turn may come.
    pub(super) fn ended(&mut self, tokens: &[TokenId], salt: Salt) {
        if self.turns.len() == MAX_TURNS {
            self.turns.pop_front();
        }
        self.turns.push_back((tokens.to_vec(), salt));
    }

    /// A prompt of about `len` tokens and its salt.
    fn draw(&self, scenario: &Scenario, len: usize, rng: &mut Rng) -> (Vec<TokenId>, Salt) {
        let mut salt = match rng.range(0, scenario.num_salts) {
            0 => None,
            byte => Some((1..byte).map(|byte| byte as u8).collect()),
        };
        let mut prompt = Vec::new();
        if rng.percent(scenario.shared_percent) {
            if rng.percent(50) && !self.turns.is_empty() {
                let (tokens, its_salt) = &self.turns[rng.range(0, self.turns.len() - 1)];
                prompt.clone_from(tokens);
                if rng.percent(80) {
                    salt.clone_from(its_salt);
                }
            } else {
                prompt.clone_from(&self.stems[rng.range(0, self.stems.len() - 1)]);
                prompt.truncate(len);
            }
            // Some diverge early, some late, and some are the same.
            if rng.percent(50) {
                prompt.truncate(rng.range(0, prompt.len()));
            }
            if rng.percent(20) {
                return (prompt, salt);
            }
        }
        prompt.extend((prompt.len()..len).map(|_| token(rng)));
        (prompt, salt)
    }
}

fn token(rng: &mut Rng) -> TokenId {
    TokenId(rng.range(0, 999) as u32)
}

impl Simulation<'_> {
    /// Adds a sequence, or sees it refused for the right reason.
    pub(super) fn arrive(&mut self) -> Result<(), String> {
        let Scenario { config, max_prompt, max_new_tokens, num_priorities, .. } = self.scenario;
        // Zeros, too, but seldom: they are refused.
        let at_least = usize::from(!self.rng.percent(2));
        let prompt_len = self.rng.range(at_least, *max_prompt);
        let (prompt, salt) = self.prompts.draw(self.scenario, prompt_len, &mut self.rng);
        let prompt_len = prompt.len();
        let max_new_tokens = self.rng.range(at_least, *max_new_tokens);
        let priority = self.rng.range(0, num_priorities - 1) as i32;
        let stop_modulus = self.rng.range(2, 100) as u32;
        let run_ahead = self.rng.percent(self.scenario.run_ahead_percent);
        let percent = self.scenario.prompt_logits_percent;
        let prompt_logits = percent > 0 && self.rng.percent(percent);
        let id = SeqId(self.num_ids);
        let max_len = (prompt_len + max_new_tokens).min(config.max_model_len);
        let expect = if prompt_len == 0 {
            Err(SchedError::EmptyPrompt)
        } else if max_new_tokens == 0 {
            Err(SchedError::NoNewTokens)
        } else if prompt_len >= config.max_model_len {
            Err(SchedError::PromptTooLong { prompt: prompt_len, max_model_len: config.max_model_len })
        } else if config.blocks_for(max_len - 1) > config.num_blocks {
            let needs_blocks = config.blocks_for(max_len - 1);
            Err(SchedError::NeverFits { needs_blocks, num_blocks: config.num_blocks })
        } else if self.state.stats().waiting >= config.max_queued {
            Err(SchedError::QueueFull { max: config.max_queued })
        } else {
            Ok(())
        };
        let found = self.state.add(NewSequence {
            id,
            prompt: prompt.clone(),
            max_new_tokens: max_new_tokens as u32,
            priority,
            cache_salt: salt.clone(),
            run_ahead,
            prompt_logits,
        });
        ensure(found == expect, || format!("add: expected {expect:?}, found {found:?}"))?;
        if found.is_err() {
            self.report.refused += 1;
            return Ok(());
        }
        self.num_ids += 1;
        self.report.added += 1;
        let client = Client {
            prompt,
            max_len,
            priority,
            arrival: id.0,
            salt,
            run_ahead,
            paused: false,
            prompt_logits,
            num_logits: 0,
            stop_modulus,
            streamed: Vec::new(),
            first_start: None,
        };
        self.clients.insert(id, client);
        Ok(())
    }
}
