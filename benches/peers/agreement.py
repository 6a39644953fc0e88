"""Whether both sides run the same model: log-probabilities of the same token ids, position by position."""

import json
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import peer

NUM_PROMPTS = 4
PROMPT_TOKENS = 96
# Log-probabilities compared at each position: r1-serve's best ones.
TOP = 5
START_TIMEOUT_S = 300


def prompts(vocab_size):
    rng = random.Random(7)
    return [[rng.randrange(vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(NUM_PROMPTS)]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=START_TIMEOUT_S) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        sys.exit(f"r1-serve answered {error.code}: {error.read().decode()}")


def of_r1_serve(binary, flags, tokenizer, vocab_size):
    """For each prompt: its tokens, and per position after the first token the best tokens with their log-probabilities."""
    port = free_port()
    command = [str(binary), "serve", *flags, "--port", str(port), "--max-model-len", "1024", "--log-level", "error"]
    command += ["--tokenizer", str(tokenizer)] if tokenizer else []
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            if server.poll() is not None:
                sys.exit(f"{' '.join(command)} ended with {server.returncode}")
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    sys.exit("r1-serve does not start")
                time.sleep(0.2)
        found = []
        for tokens in prompts(vocab_size):
            body = {"prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": TOP, "ignore_eos": True}
            choice = post(f"{url}/v1/completions", body)["choices"][0]
            # The first token has no log-probability; entry i is what position i - 1 predicts.
            rows = []
            for entry in choice["prompt_logprobs"][1:]:
                # The prompt's own token is listed too, mostly without a rank.
                ranked = [(value["rank"], int(token), value["logprob"]) for token, value in entry.items() if value["rank"]]
                rows.append([(token, logprob) for _, token, logprob in sorted(ranked)[:TOP]])
            found.append({"tokens": tokens, "rows": rows})
        return found
    finally:
        server.terminate()
        server.wait()


def of_llama_cpp(path, threads, ours):
    """llama.cpp's best token and its log-probabilities of the same tokens, at the same positions."""
    asked = [
        {"tokens": prompt["tokens"], "asked": [[token for token, _ in row] for row in prompt["rows"]]} for prompt in ours
    ]
    return peer.child_json(["logprobs", str(path), str(threads)], json.dumps(asked))


def compare(ours, theirs):
    """Agreement over all positions of all prompts."""
    same = total = 0
    gaps, margins = [], []
    for prompt, answers in zip(ours, theirs):
        for row, answer in zip(prompt["rows"], answers):
            total += 1
            if row[0][0] == answer["best"]:
                same += 1
            else:
                margins.append(row[0][1] - row[1][1])
            gaps += [abs(logprob - other) for (_, logprob), other in zip(row, answer["logprobs"])]
    gaps.sort()
    return {
        "positions": total,
        "same_best_token": same / total,
        "logprob_gap_median": gaps[len(gaps) // 2],
        "logprob_gap_95": gaps[int(len(gaps) * 0.95)],
        "logprob_gap_max": gaps[-1],
        "largest_margin_where_best_differs": max(margins, default=0.0),
    }


def words(found):
    return (
        f"same best token at {found['same_best_token']:.3f} of {found['positions']} positions; gap of log-probabilities: "
        f"median {found['logprob_gap_median']:.5f}, 95 % {found['logprob_gap_95']:.5f}, most {found['logprob_gap_max']:.5f}; "
        f"where the best differs r1-serve's first two are at most {found['largest_margin_where_best_differs']:.5f} apart"
    )
