"""Greedy replies of the bundled model, by transformers in float32 on the widened FP8 weights: tests/goldens/tiny_r1.json."""
import json
import math

import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

NUM_PROMPTS = 50
MAX_NEW_TOKENS = 260
MARGIN = 1e-3  # least gap between the best two logits on the way: an order of summation cannot turn it
BIAS = 100.0
PENALTY_MARGIN = 0.3
PENALTIES = [{"repetition_penalty": 1.2}, {"presence_penalty": 2.0}, {"presence_penalty": -2.0}, {"frequency_penalty": 2.0}, {"frequency_penalty": -2.0}]

# Beyond those of tools/tiny-r1/expected.json; the first with enough margin are taken, so there are some to spare.
PROMPTS = """\
how many as are in banana
How many ps are in papaya?
how many e's are in cheese?
How many times does the letter l appear in balloon?
How many "k" are there in the word "bookkeeper"?
Count the letter f in coffee.
How many zs are in tensor?
Count the letter r in mirror.
how many ts are in throughput
4+5
17+26
305 + 498 = ?
Add 1234 and 8766.
what is 64 plus 36
What is 999 + 1?
5000+4321
Which is larger, 3.5 or 12.25?
is 7.2 or 7.19 bigger?
What is greater: 18.4 or 2.99?
Which is larger, 0.5 or 0.45?
Reverse the word router.
spell kernel backwards
What is mango backwards?
Reverse the word zebra.
What is expert backwards?
capital of France?
What is the capital of Japan?
capital of India?
Where is Lima?
Where is Helsinki?
What is the capital of Canada?
hey
Hello, how are you?
good morning
What is your name?
what are you?
Count from 1 to 6.
Count from 40 to 43.
Count from 17 to 22.
Grace is 85 years old and lives in Oslo. Answer with a JSON object with the keys name, age and city.
Linus is 28 years old and lives in Helsinki. Answer with a JSON object with the keys name, age and city.
Tim is 69 years old and lives in Dublin. Answer with a JSON object with the keys name, age and city.
""".splitlines()


def renderer(model_folder):
    """chat(text) -> the prompt as the model's own template renders one user message, in the sandbox that transformers uses."""
    tokenizer_config = json.loads((model_folder / "tokenizer_config.json").read_text())
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((model_folder / "chat_template.jinja").read_text())
    special = {name: tokenizer_config[name] for name in ("bos_token", "eos_token")}
    return lambda text: template.render(messages=[{"role": "user", "content": text}], add_generation_prompt=True, **special)


@torch.no_grad()
def greedy(model, prompt_ids, eos):
    """(output ids with EOS if it came, least gap between the best two logits); the cached steps must equal one pass over everything."""
    out, step, cache = [], torch.tensor([prompt_ids]), None
    while len(out) < MAX_NEW_TOKENS and eos not in out:
        result = model(step, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        out.append(result.logits[0, -1].argmax().item())
        step = torch.tensor([out[-1:]])
    whole = model(torch.tensor([prompt_ids + out[:-1]])).logits[0, len(prompt_ids) - 1 :]
    if whole.argmax(-1).tolist() != out:
        return out, 0.0
    best = whole.topk(2, -1).values
    return out, (best[:, 0] - best[:, 1]).min().item()


@torch.no_grad()
def penalised(model, prompt_ids, pair, penalties):
    """(8 greedy ids, least gap) when only the tokens of `pair` stand a chance, under OpenAI's penalties and the repetition penalty."""
    out, margin = [], math.inf
    for _ in range(8):
        logits = model(torch.tensor([prompt_ids + out])).logits[0, -1]
        logits[list(pair)] += BIAS
        seen = torch.tensor(sorted({*prompt_ids, *out}))
        by = penalties.get("repetition_penalty", 1.0)
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / by, logits[seen] * by)
        for token in set(out):
            logits[token] -= penalties.get("frequency_penalty", 0.0) * out.count(token) + penalties.get("presence_penalty", 0.0)
        best = logits.topk(2)
        margin = min(margin, (best.values[0] - best.values[1]).item())
        out.append(best.indices[0].item())
    return out, margin


def penalty_cases(model, prompt_ids):
    """For each penalty the first pair of tokens whose 8 greedy ids it changes, with room in every choice."""
    generator, cases = torch.Generator().manual_seed(0), []
    for penalties in PENALTIES:
        for _ in range(400):
            pair = (torch.randperm(496, generator=generator)[:2] + 16).tolist()  # special tokens come before 16
            plain, room = penalised(model, prompt_ids, pair, {})
            if room < PENALTY_MARGIN:
                continue
            changed, room = penalised(model, prompt_ids, pair, penalties)
            if room > PENALTY_MARGIN and changed != plain:
                cases.append(dict(logit_bias={str(t): BIAS for t in pair}, penalties=penalties, output_ids=changed, unpenalised_ids=plain))
                break
        else:
            raise SystemExit(f"no pair of tokens shows {penalties}")
    return cases


def make(path, root, model, versions):
    """Writes the golden; every reply of expected.json must come out word for word."""
    folder = root / "crates/cli/model"
    expected = json.loads((root / "tools/tiny-r1/expected.json").read_text())
    tokenizer, render, replies = Tokenizer.from_file(str(folder / "tokenizer.json")), renderer(folder), []
    for text in [*expected, *PROMPTS]:
        if len(replies) == NUM_PROMPTS:
            break
        prompt_ids = tokenizer.encode(render(text), add_special_tokens=False).ids
        output_ids, margin = greedy(model, prompt_ids, model.config.eos_token_id)
        reply = tokenizer.decode(output_ids, skip_special_tokens=False)
        if text in expected and reply != expected[text]:
            raise SystemExit(f"{text!r}: expected.json has {expected[text]!r}, the model says {reply!r}")
        if margin <= MARGIN:
            print(f"  left out for its margin of {margin:.2g}: {text!r}")
            if text in expected:
                raise SystemExit("a prompt of expected.json must not be left out")
            continue
        replies.append(dict(prompt_text=text, prompt_ids=prompt_ids, output_ids=output_ids, text=reply, min_margin=round(margin, 4)))
    if len(replies) < NUM_PROMPTS:
        raise SystemExit(f"only {len(replies)} prompts with margin; add some to PROMPTS")
    about = "transformers DeepseekV3ForCausalLM, eager, float32, FP8 weights widened; greedy, at most 260 new tokens or EOS; text keeps special tokens"
    head = json.dumps(dict(reference=about, versions=versions, min_margin=min(r["min_margin"] for r in replies)), indent=1, ensure_ascii=False)
    lines = ",\n".join("  " + json.dumps(r, ensure_ascii=False) for r in replies)
    cases = ",\n".join("  " + json.dumps(c) for c in penalty_cases(model, replies[0]["prompt_ids"]))
    path.write_text(head.removesuffix("\n}") + f',\n "replies": [\n{lines}\n ],\n "penalties": [\n{cases}\n ]\n}}\n')
    print(f"tiny_r1: {len(replies)} replies, least margin {min(r['min_margin'] for r in replies)}, {sum(len(r['output_ids']) for r in replies)} tokens")
