//! Walks over masks: random ones, and along a given text.

use r1_core::{Allowed, TokenConstraint, TokenId};
use r1_text::{Constraint, ControlText, Format, GrammarError, Grammars, ReplyRules, Tokenizer};

pub(crate) struct World {
    pub(crate) tokenizer: Tokenizer,
    pub(crate) grammars: Grammars,
    pub(crate) eos: TokenId,
    pub(crate) vocab_size: usize,
}

impl World {
    pub(crate) fn new(json: &[u8]) -> Self {
        let tokenizer = Tokenizer::from_bytes(json, None).expect("a tokenizer");
        let eos = tokenizer.token_to_id("<｜end▁of▁sentence｜>").expect("EOS");
        // More logits than tokens, and not a multiple of 32.
        let vocab_size = tokenizer.vocab_size() + 45;
        let grammars = Grammars::new(&tokenizer, &[eos], vocab_size).expect("grammars");
        Self { tokenizer, grammars, eos, vocab_size }
    }

    pub(crate) fn tiny() -> Self {
        Self::new(include_bytes!("../../testdata/tiny-r1-tokenizer.json"))
    }

    pub(crate) fn v3_like() -> Self {
        Self::new(include_bytes!("../../testdata/v3-like-tokenizer.json"))
    }

    pub(crate) fn both() -> [Self; 2] {
        [Self::tiny(), Self::v3_like()]
    }

    pub(crate) fn id(&self, token: &str) -> TokenId {
        self.tokenizer.token_to_id(token).unwrap_or_else(|| panic!("no token {token}"))
    }

    pub(crate) fn constraint(&self, rules: &ReplyRules) -> Constraint {
        match self.grammars.constraint(rules) {
            Ok(constraint) => constraint.expect("rules that demand something"),
            Err(e) => panic!("{e}"),
        }
    }

    pub(crate) fn of_format(&self, format: Format) -> Constraint {
        self.constraint(&ReplyRules { format: Some(format), ..ReplyRules::default() })
    }

    pub(crate) fn refusal(&self, format: Format) -> GrammarError {
        let rules = ReplyRules { format: Some(format), ..ReplyRules::default() };
        match self.grammars.constraint(&rules) {
            Ok(_) => panic!("{:?} was not refused", rules.format),
            Err(error) => error,
        }
    }

    /// The mask, or `None` where any token may come.
    pub(crate) fn mask(&self, constraint: &mut Constraint) -> Option<Vec<u32>> {
        let mut mask = vec![0; self.vocab_size.div_ceil(32)];
        match constraint.fill_mask(&mut mask).expect("a mask") {
            Allowed::Any => None,
            Allowed::Masked => {
                assert!(mask.iter().any(|&word| word != 0), "an empty mask");
                Some(mask)
            }
        }
    }

    pub(crate) fn may(&self, constraint: &mut Constraint, token: TokenId) -> bool {
        self.mask(constraint).is_none_or(|mask| bit(&mask, token))
    }

    pub(crate) fn may_end(&self, constraint: &mut Constraint) -> bool {
        self.may(constraint, self.eos)
    }

    /// Tokens of text in which control tokens are meant.
    pub(crate) fn tokens(&self, text: &str) -> Vec<TokenId> {
        let mut tokens = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let added = self.tokenizer.added_tokens().iter();
            let here = added.filter(|t| rest.starts_with(&t.content)).max_by_key(|t| t.content.len());
            if let Some(token) = here {
                tokens.push(token.id);
                rest = &rest[token.content.len()..];
                continue;
            }
            let starts = self.tokenizer.added_tokens().iter().filter_map(|t| rest.find(&t.content));
            let end = starts.min().unwrap_or(rest.len());
            tokens.extend(self.tokenizer.encode_literal(&rest[..end]).expect("tokens"));
            rest = &rest[end..];
        }
        tokens
    }

    /// Goes along a text without control tokens; gives the part that was allowed.
    pub(crate) fn follow(&self, constraint: &mut Constraint, text: &str) -> String {
        self.follow_tokens(constraint, &self.tokenizer.encode_literal(text).expect("tokens"))
    }

    /// Goes along a text in which control tokens are meant; gives the part that was allowed.
    pub(crate) fn follow_markup(&self, constraint: &mut Constraint, text: &str) -> String {
        self.follow_tokens(constraint, &self.tokens(text))
    }

    pub(crate) fn follow_tokens(&self, constraint: &mut Constraint, tokens: &[TokenId]) -> String {
        let mut done = Vec::new();
        for &token in tokens {
            if !self.may(constraint, token) {
                break;
            }
            constraint.accept(token).expect("the mask allowed it");
            done.push(token);
        }
        self.text(&done)
    }

    /// Whether the text may come, and the reply end there.
    pub(crate) fn accepts(&self, constraint: &Constraint, text: &str) -> bool {
        let mut constraint = constraint.clone();
        self.follow(&mut constraint, text) == text && self.may_end(&mut constraint)
    }

    /// The same of a text in which control tokens are meant.
    pub(crate) fn accepts_markup(&self, constraint: &Constraint, text: &str) -> bool {
        let mut constraint = constraint.clone();
        self.follow_markup(&mut constraint, text) == text && self.may_end(&mut constraint)
    }

    pub(crate) fn text(&self, tokens: &[TokenId]) -> String {
        self.tokenizer.decode(tokens, ControlText::Show)
    }

    /// Draws random allowed tokens to the end of the reply; `None` when it takes more than `max_tokens`. Prefers to end.
    pub(crate) fn random(
        &self,
        constraint: &mut Constraint,
        seed: u64,
        max_tokens: usize,
    ) -> Option<Vec<TokenId>> {
        let mut random = Random(seed);
        let mut reply = Vec::new();
        while reply.len() < max_tokens {
            let token = match self.mask(constraint) {
                None => TokenId(random.below(self.tokenizer.vocab_size()) as u32),
                Some(mask) => {
                    let allowed: Vec<u32> =
                        (0..self.vocab_size as u32).filter(|&id| bit(&mask, TokenId(id))).collect();
                    if bit(&mask, self.eos) && random.below(2) == 0 {
                        self.eos
                    } else if random.below(3) > 0 {
                        // Structure ends what letters go on with.
                        let closing: Vec<u32> = allowed
                            .iter()
                            .copied()
                            .filter(|&id| {
                                let bytes = self.tokenizer.token_bytes(TokenId(id));
                                bytes.iter().any(|b| b"\"]}".contains(b)) && bytes.len() < 3
                            })
                            .collect();
                        let set = if closing.is_empty() { &allowed } else { &closing };
                        TokenId(set[random.below(set.len())])
                    } else {
                        TokenId(allowed[random.below(allowed.len())])
                    }
                }
            };
            constraint.accept(token).expect("the mask allowed it");
            if token == self.eos {
                return Some(reply);
            }
            reply.push(token);
        }
        None
    }
}

pub(crate) fn bit(mask: &[u32], token: TokenId) -> bool {
    mask[token.0 as usize / 32] >> (token.0 % 32) & 1 == 1
}

/// splitmix64
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E3779B97F4A7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58476D1CE4E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D049BB133111EB);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}
