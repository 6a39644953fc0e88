//! Allowed ids and bad words, alone and with grammars.

use r1_core::{TokenConstraint, TokenId};
use r1_text::{Format, ReplyRules, Thinking, bad_word_tokens};

use crate::walk::{Random, World, bit};

#[test]
fn nothing_to_hold_a_reply_to() {
    let world = World::tiny();
    for thinking in [Thinking::None, Thinking::Open, Thinking::MayOpen] {
        let rules = ReplyRules { thinking, ..ReplyRules::default() };
        assert!(world.grammars.constraint(&rules).unwrap().is_none());
    }
}

#[test]
fn bad_words_never_come() {
    for world in World::both() {
        let words = ["hello".to_owned(), " the".to_owned(), "e".to_owned()];
        let bad = bad_word_tokens(&world.tokenizer, &words).unwrap();
        let mut constraint =
            world.constraint(&ReplyRules { bad_words: bad.clone(), ..ReplyRules::default() });
        let mut random = Random(3);
        let mut reply: Vec<TokenId> = Vec::new();
        for _ in 0..300 {
            // Leans towards the words, so that the filter has something to do.
            let wanted = &bad[random.below(bad.len())];
            let token = wanted[random.below(wanted.len())];
            let mask = world.mask(&mut constraint).expect("single tokens are always forbidden");
            if bit(&mask, token) {
                constraint.accept(token).unwrap();
                reply.push(token);
            }
        }
        for word in &bad {
            assert!(!reply.windows(word.len()).any(|w| w == word), "{word:?}");
        }
    }
}

#[test]
fn a_long_bad_word_acts_at_its_last_token_only() {
    let world = World::tiny();
    let word = vec![TokenId(100), TokenId(101), TokenId(102)];
    let mut constraint =
        world.constraint(&ReplyRules { bad_words: vec![word.clone()], ..ReplyRules::default() });
    assert_eq!(world.mask(&mut constraint), None);
    constraint.accept(word[0]).unwrap();
    assert_eq!(world.mask(&mut constraint), None);
    constraint.accept(word[1]).unwrap();
    let mask = world.mask(&mut constraint).expect("one token less");
    assert_eq!(mask.iter().map(|w| w.count_ones()).sum::<u32>() as usize, world.vocab_size - 1);
    assert!(!bit(&mask, word[2]));
    constraint.accept(TokenId(103)).unwrap();
    assert_eq!(world.mask(&mut constraint), None);
}

#[test]
fn allowed_ids_are_the_only_ones() {
    let world = World::tiny();
    let ids = vec![TokenId(40), TokenId(41)];
    let mut constraint =
        world.constraint(&ReplyRules { allowed_token_ids: Some(ids), ..ReplyRules::default() });
    let mask = world.mask(&mut constraint).unwrap();
    assert_eq!(mask.iter().map(|w| w.count_ones()).sum::<u32>(), 2);
    assert!(!world.may_end(&mut constraint));
}

#[test]
fn filters_and_grammars_are_both_obeyed() {
    let world = World::tiny();
    let format = Some(Format::Regex("[0-9]+".into()));
    let mut allowed = world.tokens("12");
    allowed.push(world.eos);
    let constraint = world.constraint(&ReplyRules {
        format: format.clone(),
        allowed_token_ids: Some(allowed),
        ..ReplyRules::default()
    });
    assert!(world.accepts(&constraint, "1221"));
    assert!(!world.accepts(&constraint, "13"));
    let nothing = ReplyRules { format, allowed_token_ids: Some(world.tokens("a")), ..ReplyRules::default() };
    let mut constraint = world.constraint(&nothing);
    let mut mask = vec![0; world.vocab_size.div_ceil(32)];
    let error = constraint.fill_mask(&mut mask).unwrap_err();
    assert!(error.0.contains("allowed_token_ids"), "{error}");
}

#[test]
fn what_is_wrong_is_named() {
    let world = World::tiny();
    let refusal = |rules: ReplyRules| world.grammars.constraint(&rules).err().expect("refused").field;
    let bad_words = vec![vec![TokenId(9)], vec![]];
    assert_eq!(refusal(ReplyRules { bad_words, ..ReplyRules::default() }), "bad_words[1]");
    let ids = |ids: Vec<TokenId>| ReplyRules { allowed_token_ids: Some(ids), ..ReplyRules::default() };
    assert_eq!(refusal(ids(vec![])), "allowed_token_ids");
    assert_eq!(refusal(ids(vec![TokenId(1), TokenId(u32::MAX)])), "allowed_token_ids[1]");
    let closed = ReplyRules { thinking: Thinking::Open, thinking_budget: Some(1), ..ids(vec![TokenId(40)]) };
    assert_eq!(refusal(closed), "thinking_budget");
    assert_eq!(
        bad_word_tokens(&world.tokenizer, &["a".into(), " ".into()]).unwrap_err().field,
        "bad_words[1]"
    );
}
