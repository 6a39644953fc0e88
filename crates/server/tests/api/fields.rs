//! What requests may hold: what each field becomes, what is refused and how.
use r1_core::{SamplingParams, TokenId};
use r1_server::{SamplingDefaults, ServerConfig, router};
use serde_json::{Value, json};

use crate::support::{EOS, Engine, MAX_MODEL_LEN, chat, complete, model, tokenizer, with};

fn chat_base() -> Value {
    json!({"model": "any", "messages": [{"role": "user", "content": "hi"}]})
}

fn completion_base() -> Value {
    json!({"prompt": "hi"})
}

/// Fields, the values that ask for nothing, and one that asks for something that does not exist.
fn not_yet() -> Vec<(&'static str, Vec<Value>, Value)> {
    vec![
        ("structural_tag", vec![], json!("{}")),
        ("stop_regex", vec![json!("")], json!("a+")),
        ("use_beam_search", vec![json!(false)], json!(true)),
        ("logits_processors", vec![json!([])], json!(["x"])),
        ("lora_path", vec![], json!("x")),
    ]
}

fn not_yet_chat() -> Vec<(&'static str, Vec<Value>, Value)> {
    vec![
        ("functions", vec![json!([])], json!([{"name": "f"}])),
        ("function_call", vec![json!("none"), json!("auto")], json!({"name": "f"})),
        ("suffix", vec![json!("")], json!("tail")),
        ("chat_template", vec![], json!("{{ messages }}")),
        ("documents", vec![json!([])], json!([{"text": "x"}])),
        ("modalities", vec![json!(["text"])], json!(["text", "audio"])),
    ]
}

#[tokio::test]
async fn what_does_not_exist_yet_is_refused_by_name_and_its_neutral_values_are_not() {
    let engine = Engine::saying("ok");
    let router = engine.router(ServerConfig::default());
    let both = || not_yet().into_iter();
    for (field, neutral, asking) in both().chain(not_yet_chat()) {
        for value in neutral.into_iter().chain([Value::Null]) {
            let answer = chat(&router, &with(&chat_base(), &json!({field: value}))).await;
            assert_eq!(answer.status, 200, "{field}: {value}: {}", answer.text);
        }
        let error = chat(&router, &with(&chat_base(), &json!({field: asking}))).await.refused(400);
        assert_eq!(error["param"], field);
        assert_eq!(error["code"], "unsupported_parameter", "{error}");
    }
    for (field, neutral, asking) in both() {
        for value in neutral.into_iter().chain([Value::Null]) {
            let answer = complete(&router, &with(&completion_base(), &json!({field: value}))).await;
            assert_eq!(answer.status, 200, "{field}: {value}: {}", answer.text);
        }
        let error = complete(&router, &with(&completion_base(), &json!({field: asking}))).await.refused(400);
        assert_eq!((&error["param"], &error["code"]), (&json!(field), &json!("unsupported_parameter")));
    }
}

#[tokio::test]
async fn tools_that_must_not_be_called_are_accepted() {
    let engine = Engine::saying("ok");
    let router = engine.router(ServerConfig::default());
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let body = with(&chat_base(), &json!({"tools": tools, "tool_choice": "none"}));
    assert_eq!(chat(&router, &body).await.status, 200);
}

#[tokio::test]
async fn neutral_and_unknown_values_are_accepted() {
    let engine = Engine::saying("ok");
    let router = engine.router(ServerConfig::default());
    let shared = json!({
        "max_tokens": null, "temperature": null, "top_p": null, "n": null, "seed": null, "stop": null, "stream": null,
        "stream_options": null, "logprobs": null, "logit_bias": null, "presence_penalty": null, "user": "someone",
        "metadata": {"a": 1}, "best_of": 1, "top_k": -1, "min_p": 0, "stop_token_ids": null, "ignore_eos": null,
        "priority": null, "frobnicate": {"deeply": ["unknown"]}, "skip_special_tokens": true, "logit_bias": {},
        "stop": [], "repetition_penalty": 1,
    });
    let neutral = json!({
        "response_format": {"type": "text"}, "structured_outputs": {}, "guided_json": null, "guided_choice": [],
        "guided_decoding_backend": "xgrammar", "prompt_logprobs": false, "allowed_token_ids": [], "bad_words": [],
        "truncate_prompt_tokens": null, "regex": null, "service_tier": "auto", "store": false,
    });
    let neutral_chat = json!({
        "tools": [], "tool_choice": "auto", "parallel_tool_calls": true, "reasoning_effort": null, "reasoning": {},
        "continue_final_message": false, "echo": true, "include_reasoning": true,
    });
    for answer in [
        chat(&router, &with(&chat_base(), &shared)).await,
        complete(&router, &with(&completion_base(), &shared)).await,
        chat(&router, &with(&chat_base(), &json!({"top_logprobs": 0, "thinking": null}))).await,
        chat(&router, &with(&chat_base(), &json!({"chat_template_kwargs": null, "top_k": 0}))).await,
        complete(&router, &with(&completion_base(), &json!({"best_of": 2, "n": 2}))).await,
        complete(&router, &with(&completion_base(), &neutral)).await,
        chat(&router, &with(&chat_base(), &neutral)).await,
        chat(&router, &with(&chat_base(), &neutral_chat)).await,
    ] {
        assert_eq!(answer.status, 200, "{}", answer.text);
    }
}

#[tokio::test]
async fn bad_values_are_400_and_name_their_field() {
    let engine = Engine::saying("ok");
    let router = engine.router(ServerConfig::default());
    let called = |call: Value| json!([{"role": "assistant", "tool_calls": [call]}]);
    let tools = |schema: Value| {
        let function = json!({"name": "f", "parameters": schema, "strict": true});
        json!([{"type": "function", "function": function}])
    };
    let many_stops: Vec<String> = (0..17).map(|i| i.to_string()).collect();
    let shared = [
        ("temperature", json!("hot"), "temperature"),
        ("temperature", json!(-1), "temperature"),
        ("temperature", json!(2.5), "temperature"),
        ("top_p", json!(0), "top_p"),
        ("top_p", json!(1.5), "top_p"),
        ("top_k", json!(-2), "top_k"),
        ("min_p", json!(2), "min_p"),
        ("repetition_penalty", json!(0), "repetition_penalty"),
        ("presence_penalty", json!(3), "presence_penalty"),
        ("frequency_penalty", json!(-3), "frequency_penalty"),
        ("logit_bias", json!({"x": 1}), "logit_bias.x"),
        ("logit_bias", json!({"5": "y"}), "logit_bias.5"),
        ("logit_bias", json!({"5": 101}), "logit_bias"),
        ("logit_bias", json!({"99999": 1}), "logit_bias"),
        ("logit_bias", json!([1]), "logit_bias"),
        ("max_tokens", json!(0), "max_tokens"),
        ("max_tokens", json!(-1), "max_tokens"),
        ("max_tokens", json!(1.5), "max_tokens"),
        ("n", json!(0), "n"),
        ("n", json!(129), "n"),
        ("n", json!("two"), "n"),
        ("best_of", json!(0), "best_of"),
        ("best_of", json!(1_000_000), "best_of"),
        ("prompt_logprobs", json!(-1), "prompt_logprobs"),
        ("prompt_logprobs", json!(21), "prompt_logprobs"),
        ("truncate_prompt_tokens", json!(0), "truncate_prompt_tokens"),
        ("allowed_token_ids", json!([99999]), "allowed_token_ids"),
        ("bad_words", json!([""]), "bad_words"),
        ("bad_words", json!("no"), "bad_words"),
        ("guided_regex", json!("("), "guided_regex"),
        ("regex", json!("a{99999}"), "regex"),
        ("guided_json", json!(3), "guided_json"),
        ("guided_json", json!("{"), "guided_json"),
        ("guided_choice", json!("a"), "guided_choice"),
        ("ebnf", json!("root ::= missing"), "ebnf"),
        ("response_format", json!({"type": "yaml"}), "response_format.type"),
        ("response_format", json!({"type": "json_schema"}), "response_format.json_schema"),
        ("response_format", json!("json"), "response_format"),
        ("structured_outputs", json!({"regex": 1}), "structured_outputs.regex"),
        ("seed", json!("lucky"), "seed"),
        ("stop", json!(many_stops), "stop"),
        ("stop", json!([""]), "stop"),
        ("stop", json!(""), "stop"),
        ("stop", json!(7), "stop"),
        ("stop_token_ids", json!([99999]), "stop_token_ids"),
        ("stop_token_ids", json!("x"), "stop_token_ids"),
        ("min_tokens", json!(100_000), "min_tokens"),
        ("stream", json!("yes"), "stream"),
        ("stream_options", json!(true), "stream_options"),
        ("priority", json!("high"), "priority"),
        ("model", json!(7), "model"),
        ("cache_salt", json!(7), "cache_salt"),
        ("cache_salt", json!("x".repeat(257)), "cache_salt"),
        ("skip_special_tokens", json!(3), "skip_special_tokens"),
    ];
    let chat_only = [
        ("messages", json!(null), "messages"),
        ("messages", json!([]), "messages"),
        ("messages", json!("hi"), "messages"),
        ("messages", json!([{"content": "x"}]), "messages[0].role"),
        ("messages", json!([{"role": "wizard", "content": "x"}]), "messages[0].role"),
        ("messages", json!([{"role": "user"}]), "messages[0].content"),
        ("messages", json!([{"role": "user", "content": 7}]), "messages[0].content"),
        (
            "messages",
            json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
            "messages[0].content[0]",
        ),
        (
            "messages",
            json!([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]),
            "messages[0].content[0]",
        ),
        ("messages", json!([{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text"),
        (
            "messages",
            json!([{"role": "assistant", "content": "y", "prefix": true}, {"role": "user", "content": "x"}]),
            "messages[0].prefix",
        ),
        ("messages", json!([{"role": "user", "content": "x", "prefix": true}]), "messages[0].prefix"),
        ("continue_final_message", json!(true), "continue_final_message"),
        ("tools", json!([{"type": "function"}]), "tools[0].function"),
        ("tools", json!([{"type": "function", "function": {"name": "a b"}}]), "tools[0].function.name"),
        ("tools", json!([{"type": "browser"}]), "tools[0].type"),
        ("tools", tools(json!("no schema")), "tools[0].function.parameters"),
        ("tools", tools(json!({"type": "objekt"})), "tools[0].function.parameters"),
        ("tools", json!({}), "tools"),
        ("tool_choice", json!("required"), "tool_choice"),
        ("tool_choice", json!("sometimes"), "tool_choice"),
        ("tool_choice", json!({"type": "function", "function": {"name": "f"}}), "tool_choice"),
        ("parallel_tool_calls", json!("sometimes"), "parallel_tool_calls"),
        ("reasoning_effort", json!("huge"), "reasoning_effort"),
        ("reasoning", json!({"effort": "huge"}), "reasoning.effort"),
        ("thinking_budget", json!(-1), "thinking_budget"),
        (
            "messages",
            json!([{"role": "assistant", "content": "x", "reasoning_content": 3}]),
            "messages[0].reasoning_content",
        ),
        ("messages", json!([{"role": "user", "content": "x", "tool_calls": [{}]}]), "messages[0].tool_calls"),
        ("messages", called(json!(1)), "messages[0].tool_calls[0].function.name"),
        ("messages", called(json!({})), "messages[0].tool_calls[0].function.name"),
        ("messages", called(json!({"function": {}})), "messages[0].tool_calls[0].function.name"),
        (
            "messages",
            called(json!({"function": {"name": "f"}})),
            "messages[0].tool_calls[0].function.arguments",
        ),
        ("top_logprobs", json!(2), "top_logprobs"),
        ("logprobs", json!(2), "logprobs"),
        ("thinking", json!({"type": "maybe"}), "thinking"),
        ("chat_template_kwargs", json!({"thinking": "yes"}), "chat_template_kwargs.thinking"),
        ("chat_template_kwargs", json!({"thinking": true, "enable_thinking": false}), "chat_template_kwargs"),
        ("chat_template_kwargs", json!({"messages": []}), "chat_template_kwargs"),
        ("max_completion_tokens", json!(0), "max_completion_tokens"),
    ];
    let completion_only = [
        ("prompt", json!(null), "prompt"),
        ("prompt", json!({"text": "x"}), "prompt"),
        ("prompt", json!(""), "prompt"),
        ("prompt", json!([]), "prompt"),
        ("prompt", json!([99999]), "prompt"),
        ("logprobs", json!(21), "logprobs"),
        ("logprobs", json!(true), "logprobs"),
        ("echo", json!("x"), "echo"),
    ];
    for (field, value, param) in shared.iter().chain(&chat_only) {
        let answer = chat(&router, &with(&chat_base(), &json!({*field: value}))).await;
        assert_eq!(answer.refused(400)["param"], **param, "{field}: {value}: {}", answer.text);
    }
    for (field, value, param) in shared.iter().chain(&completion_only) {
        let answer = complete(&router, &with(&completion_base(), &json!({*field: value}))).await;
        assert_eq!(answer.refused(400)["param"], **param, "{field}: {value}: {}", answer.text);
    }
    let fim = with(&completion_base(), &json!({"suffix": "tail"}));
    assert_eq!(complete(&router, &fim).await.refused(400)["param"], "suffix", "this model has no FIM tokens");
    let streamed = with(&completion_base(), &json!({"best_of": 3, "stream": true}));
    assert_eq!(complete(&router, &streamed).await.refused(400)["param"], "best_of");
    let two = with(&completion_base(), &json!({"regex": "a", "guided_json": {}}));
    assert_eq!(complete(&router, &two).await.refused(400)["param"], "regex", "a reply has one form");
    let twice = json!({"type": "function", "function": {"name": "f"}});
    let twice = with(&chat_base(), &json!({"tools": [twice, twice]}));
    assert_eq!(chat(&router, &twice).await.refused(400)["param"], "tools");
    let top = with(&chat_base(), &json!({"logprobs": true, "top_logprobs": 21}));
    assert_eq!(chat(&router, &top).await.refused(400)["param"], "top_logprobs");
    assert!(engine.asked().is_empty(), "nothing of this reaches the engine");
}

#[tokio::test]
async fn complaints_speak_of_json_and_not_of_rust() {
    let engine = Engine::saying("ok");
    let router = engine.router(ServerConfig::default());
    for (field, value, message) in [
        ("max_tokens", json!("9"), "max_tokens: must be a whole number, not a string"),
        ("temperature", json!([1]), "temperature: must be a number, not a list"),
        ("stream", json!("yes"), "stream: must be true or false, not a string"),
        ("model", json!(7), "model: must be a string, not 7"),
        ("stream_options", json!(true), "stream_options: must be an object, not true or false"),
        (
            "stream_options",
            json!({"include_usage": 1}),
            "stream_options: `include_usage` must be true or false, not 1",
        ),
        ("stop_token_ids", json!({}), "stop_token_ids: must be a list, not an object"),
        ("stop", json!(7), "stop: must be a string or a list of strings, not 7"),
        ("n", json!(-1), "n: is -1; it must be a whole number from 0 to 18446744073709551615"),
        ("messages", json!([7]), "messages: item 0 must be an object, not 7"),
        ("thinking", json!({"type": "maybe"}), "thinking: `type` must be \"enabled\" or \"disabled\""),
        ("chat_template_kwargs", json!({"tools": []}), "chat_template_kwargs: tools is reserved"),
    ] {
        let error = chat(&router, &with(&chat_base(), &json!({field: value}))).await.refused(400);
        assert_eq!((&error["message"], &error["param"]), (&json!(message), &json!(field)));
    }
}

#[tokio::test]
async fn whole_numbers_may_be_written_as_floats() {
    let engine = Engine::saying("ok");
    let router = engine.router(ServerConfig::default());
    let body = json!({"prompt": [5.0, 6], "max_tokens": 9.0, "n": 2.0, "seed": 3.0, "top_k": 4.0});
    assert_eq!(complete(&router, &body).await.status, 200);
    let asked = engine.asked();
    assert_eq!((asked.len(), asked[0].prompt.len()), (2, 2));
    let params = &asked[0].params;
    assert_eq!((params.max_tokens, params.seed, params.top_k), (9, 3, Some(4)));
}

#[tokio::test]
async fn thinking_must_not_contradict_the_templates_arguments() {
    let engine = Engine::saying("ok");
    let router = engine.router(ServerConfig::default());
    for name in ["thinking", "enable_thinking"] {
        let body = |given: bool| {
            let switches = json!({"thinking": {"type": "disabled"}, "chat_template_kwargs": {name: given}});
            with(&chat_base(), &switches)
        };
        assert_eq!(chat(&router, &body(true)).await.refused(400)["param"], "thinking");
        assert_eq!(chat(&router, &body(false)).await.status, 200);
    }
}

#[tokio::test]
async fn every_field_reaches_the_sampler() {
    let engine = Engine::saying("ok");
    let router = engine.router(ServerConfig::default());
    let body = json!({
        "prompt": [5, 6, 7], "max_tokens": 9, "temperature": 0.25, "top_p": 0.5, "top_k": 40, "min_p": 0.125,
        "repetition_penalty": 1.5, "presence_penalty": -0.5, "frequency_penalty": 0.75, "logit_bias": {"8": -100, "9": 2.5},
        "seed": -3, "min_tokens": 2, "stop_token_ids": [4, 1], "logprobs": 2, "priority": -7, "n": 2,
    });
    assert_eq!(complete(&router, &body).await.status, 200);
    let expected = SamplingParams {
        temperature: 0.25,
        top_p: 0.5,
        top_k: Some(40),
        min_p: 0.125,
        repetition_penalty: 1.5,
        presence_penalty: -0.5,
        frequency_penalty: 0.75,
        logit_bias: vec![(TokenId(8), -100.0), (TokenId(9), 2.5)],
        seed: (-3i64) as u64,
        max_tokens: 9,
        min_tokens: 2,
        stop_token_ids: vec![EOS, TokenId(4)],
        logprobs: Some(2),
    };
    let asked = engine.asked();
    assert_eq!(asked.len(), 2);
    assert_eq!(asked[0].params, expected);
    assert_eq!(asked[1].params, SamplingParams { seed: (-2i64) as u64, ..expected });
    assert_eq!((asked[0].priority, &asked[0].prompt), (-7, &vec![TokenId(5), TokenId(6), TokenId(7)]));
}

#[tokio::test]
async fn silence_means_the_models_defaults_then_openais() {
    let engine = Engine::saying("ok");
    let router = engine.router(ServerConfig::default());
    for _ in 0..2 {
        assert_eq!(complete(&router, &completion_base()).await.status, 200);
    }
    let body = with(&completion_base(), &json!({"ignore_eos": true, "max_tokens": 4, "temperature": 0}));
    assert_eq!(complete(&router, &body).await.status, 200);
    let asked = engine.asked();
    let (silent, again, spoken) = (&asked[0], &asked[1], &asked[2]);
    assert_eq!((silent.params.temperature, silent.params.top_p), (0.6, 0.95), "generation_config.json");
    assert_eq!(
        (silent.params.top_k, silent.params.min_p, silent.params.repetition_penalty),
        (None, 0.0, 1.0)
    );
    assert_eq!(silent.params.max_tokens as usize, MAX_MODEL_LEN - silent.prompt.len(), "what is left");
    assert_eq!(silent.params.stop_token_ids, [EOS]);
    assert_ne!(silent.params.seed, again.params.seed, "a fresh seed for each request");
    assert_eq!((spoken.params.temperature, spoken.params.max_tokens), (0.0, 4));
    assert_eq!(spoken.params.stop_token_ids, []);

    let seeded = engine.router(ServerConfig { seed: Some(40), ..ServerConfig::default() });
    for body in [completion_base(), with(&completion_base(), &json!({"seed": 7})), completion_base()] {
        assert_eq!(complete(&seeded, &body).await.status, 200);
    }
    let seeds: Vec<_> = engine.asked()[3..].iter().map(|asked| asked.params.seed).collect();
    assert_eq!(seeds, [40, 7, 41], "seeds of the server's for those who bring none");

    let mut model = model();
    model.defaults = SamplingDefaults { max_tokens: Some(11), top_k: Some(0), ..SamplingDefaults::default() };
    let router = r1_server::router(ServerConfig::default(), model, engine.handle.clone());
    assert_eq!(complete(&router, &completion_base()).await.status, 200);
    let params = engine.asked()[6].params.clone();
    assert_eq!((params.temperature, params.top_p, params.top_k, params.max_tokens), (1.0, 1.0, None, 11));
}

#[tokio::test]
async fn prompts_come_in_four_forms() {
    let engine = Engine::saying("ok");
    let router = engine.router(ServerConfig::default());
    let tokens = tokenizer().encode("hello there").unwrap();
    let ids: Vec<u32> = tokens.iter().map(|token| token.0).collect();
    for prompt in [json!("hello there"), json!(ids), json!(["hello there", "hello there"]), json!([ids, ids])]
    {
        let answer = complete(&router, &json!({"prompt": prompt})).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
    }
    let asked = engine.asked();
    assert_eq!(asked.len(), 6);
    assert!(asked.iter().all(|asked| asked.prompt == tokens));
}

#[tokio::test]
async fn messages_become_the_templates_prompt() {
    let engine = Engine::saying("ok");
    let router = engine.router(ServerConfig::default());
    let body = json!({"messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b <｜User｜>"}]},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]});
    assert_eq!(chat(&router, &body).await.status, 200);
    let prompt = tokenizer().decode(&engine.asked()[0].prompt, r1_text::ControlText::Show);
    assert_eq!(
        prompt,
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>a\nb <｜User｜><｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>\
         function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>\
         <｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>42<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    );
    let user = tokenizer().token_to_id("<｜User｜>").unwrap();
    let num_user_tokens = engine.asked()[0].prompt.iter().filter(|token| **token == user).count();
    assert_eq!(num_user_tokens, 1, "a client's words are no control token");
}

#[tokio::test]
async fn thinking_is_switched_by_any_of_its_names() {
    let engine = Engine::saying("ok");
    let router = engine.router(ServerConfig::default());
    let off = [
        json!({"thinking": {"type": "disabled"}}),
        json!({"chat_template_kwargs": {"thinking": false}}),
        json!({"chat_template_kwargs": {"enable_thinking": false}}),
    ];
    let on = [
        json!({}),
        json!({"thinking": {"type": "enabled"}}),
        json!({"chat_template_kwargs": {"enable_thinking": true}}),
    ];
    for (switches, ending) in [(off, "<think>\n\n</think>\n\n"), (on, "<｜Assistant｜><think>\n")] {
        for switch in switches {
            assert_eq!(chat(&router, &with(&chat_base(), &switch)).await.status, 200, "{switch}");
            let prompt = &engine.asked().pop().unwrap().prompt;
            let prompt = tokenizer().decode(prompt, r1_text::ControlText::Show);
            assert!(prompt.ends_with(ending), "{switch}: {prompt}");
        }
    }
    let body = with(&chat_base(), &json!({"add_generation_prompt": false}));
    assert_eq!(chat(&router, &body).await.status, 200);
    let prompt = tokenizer().decode(&engine.asked().pop().unwrap().prompt, r1_text::ControlText::Show);
    assert!(prompt.ends_with("<｜User｜>hi"), "{prompt}");
}

#[tokio::test]
async fn over_long_prompts_name_both_numbers() {
    let engine = Engine::saying("ok");
    let router = engine.router(ServerConfig::default());
    let ids = vec![5; 200];
    let error = complete(&router, &json!({"prompt": ids, "max_tokens": 57})).await.refused(400);
    assert_eq!((&error["code"], &error["param"]), (&json!("context_length_exceeded"), &json!("max_tokens")));
    let message = error["message"].as_str().unwrap();
    assert!(["256", "200", "57"].iter().all(|number| message.contains(number)), "{message}");
    let huge = complete(&router, &json!({"prompt": ids, "max_tokens": 5_000_000_000u64})).await.refused(400);
    assert_eq!((&huge["code"], &huge["param"]), (&json!("context_length_exceeded"), &json!("max_tokens")));
    let message = huge["message"].as_str().unwrap();
    assert!(["256", "200", "5000000000"].iter().all(|number| message.contains(number)), "{message}");
    let fits = json!({"prompt": ids, "max_tokens": 56});
    assert_eq!(complete(&router, &fits).await.status, 200);

    for prompt in [json!(vec![5; 256]), json!("word ".repeat(100_000))] {
        let error = complete(&router, &json!({"prompt": prompt})).await.refused(400);
        assert_eq!((&error["code"], &error["param"]), (&json!("context_length_exceeded"), &json!("prompt")));
        assert!(error["message"].as_str().unwrap().contains("256"));
    }
    let long = json!({"messages": [{"role": "user", "content": "word ".repeat(1000)}]});
    let error = chat(&router, &long).await.refused(400);
    assert_eq!((&error["code"], &error["param"]), (&json!("context_length_exceeded"), &json!("messages")));
}

#[tokio::test]
async fn a_base_model_refuses_chat_and_says_what_works() {
    let engine = Engine::saying("ok");
    let mut model = model();
    model.template = None;
    let router = router(ServerConfig::default(), model, engine.handle.clone());
    let error = chat(&router, &chat_base()).await.refused(400);
    assert!(error["message"].as_str().unwrap().contains("/v1/completions"), "{error}");
    assert_eq!(complete(&router, &completion_base()).await.status, 200);
}

#[tokio::test]
async fn any_model_name_is_accepted_unless_names_are_strict() {
    let engine = Engine::saying("ok");
    let lax = engine.router(ServerConfig::default());
    for (asked, replied) in [("org/alias", "org/alias"), ("tiny-r1", "tiny-r1"), ("gpt-4o", "tiny-r1")] {
        let answer = chat(&lax, &with(&chat_base(), &json!({"model": asked}))).await;
        assert_eq!(answer.json()["model"], replied);
    }
    let strict = engine.router(ServerConfig { strict_model_name: true, ..ServerConfig::default() });
    let error = chat(&strict, &with(&chat_base(), &json!({"model": "gpt-4o"}))).await.refused(404);
    assert_eq!((&error["code"], &error["param"]), (&json!("model_not_found"), &json!("model")));
    assert_eq!(chat(&strict, &with(&chat_base(), &json!({"model": "org/alias"}))).await.status, 200);
}

#[tokio::test]
async fn the_cache_salt_reaches_the_engine() {
    let engine = Engine::saying("ok");
    let router = engine.router(ServerConfig::default());
    for salt in [json!("pepper"), json!("x".repeat(256)), json!(""), Value::Null] {
        assert_eq!(chat(&router, &with(&chat_base(), &json!({"cache_salt": salt}))).await.status, 200);
    }
    let salts: Vec<_> = engine.asked().into_iter().map(|asked| asked.cache_salt).collect();
    assert_eq!(salts, [Some("pepper".to_owned()), Some("x".repeat(256)), None, None]);
}

#[tokio::test]
async fn max_tokens_over_the_context_is_named_as_it_was_given() {
    let engine = Engine::saying("ok");
    let router = engine.router(ServerConfig::default());
    for name in ["max_tokens", "max_completion_tokens"] {
        let error = chat(&router, &with(&chat_base(), &json!({name: 1_u64 << 40}))).await.refused(400);
        assert_eq!((&error["param"], &error["code"]), (&json!(name), &json!("context_length_exceeded")));
    }
}
