"""llama.cpp through the low-level binding of llama-cpp-python. Run as a process of its own by compare.py:

    python peer.py about
    python peer.py quantize IN.gguf OUT.gguf FORMAT THREADS
    python peer.py measure FILE.gguf THREADS FLASH_ATTN LOAD_MODE CONTEXT STEPS
    python peer.py logprobs FILE.gguf THREADS     (prompts as JSON on standard input)

The last line of the output is JSON.
"""

import ctypes
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

# Numbers of llama.cpp's file types.
FORMATS = {"F32": 0, "BF16": 32, "Q8_0": 7, "Q4_K_M": 15}
FLASH_ATTN = {"auto": -1, "off": 0, "on": 1}
LOAD_MODES = {"auto": -1, "none": 0, "mmap": 1}
# Prefills that are timed; the first of all runs warms up.
PREFILLS = 3
WARMUP_STEPS = 8


def child(arguments, stdin=None):
    """Runs this file with those arguments; gives its output."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, input=stdin, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed with {done.returncode}")
    return done.stdout


def child_json(arguments, stdin=None):
    return json.loads(child(arguments, stdin).splitlines()[-1])


def library():
    """llama_cpp, silent but for errors."""
    import llama_cpp

    @llama_cpp.llama_log_callback
    def log(level, text, _):
        # 4 is an error, 5 goes on with the line before.
        if level == 4:
            sys.stderr.write(text.decode(errors="replace"))

    library.log = log  # kept alive
    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


class Context:
    """A loaded model with a KV cache for some sequences."""

    def __init__(self, path, threads, *, sequences, tokens_each, outputs=None, exact=False, flash_attn="auto", load_mode="auto"):
        self.api = api = library()
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = LOAD_MODES[load_mode]
        self.model = api.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            sys.exit(f"llama.cpp does not load {path}")
        params = api.llama_context_default_params()
        params.n_ctx = sequences * tokens_each
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = FLASH_ATTN[flash_attn]
        if exact:
            params.type_k = params.type_v = api.GGML_TYPE_F32
            params.flash_attn_type = FLASH_ATTN["off"]
        if outputs:
            params.n_outputs_max = params.n_outputs_max_per_seq = outputs
        self.context = api.llama_init_from_model(self.model, params)
        if not self.context:
            sys.exit(f"llama.cpp makes no context for {path}")
        self.vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.batch = api.llama_batch_init(params.n_batch, 0, 1)

    def clear(self):
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def decode(self, rows):
        """One llama_decode of rows (token, position, sequence, whether logits are wanted); gives the seconds that it took."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, logits) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = logits
        start = time.perf_counter()
        status = self.api.llama_decode(self.context, batch)
        self.api.llama_synchronize(self.context)
        took = time.perf_counter() - start
        if status != 0:
            sys.exit(f"llama_decode gave {status}")
        return took

    def prefill(self, tokens, sequence=0):
        last = len(tokens) - 1
        return self.decode([(token, i, sequence, i == last) for i, token in enumerate(tokens)])

    def logits(self, row):
        import numpy

        pointer = self.api.llama_get_logits_ith(self.context, row)
        return numpy.ctypeslib.as_array(pointer, (self.vocab_size,)).copy()


def measure(path, threads, flash_attn, load_mode, context_len, steps):
    """Tokens per second at each point. Sampling is not part of it: the tokens are random ones."""
    sequences = 8
    tokens_each = context_len + WARMUP_STEPS + steps
    # llama.cpp wants cells in multiples of 256 for each sequence.
    tokens_each = -(-tokens_each // 256) * 256
    model = Context(path, threads, sequences=sequences, tokens_each=tokens_each, flash_attn=flash_attn, load_mode=load_mode)
    rng = random.Random(1)
    draw = lambda n: [rng.randrange(model.vocab_size) for _ in range(n)]

    def decode_rate(batch, start):
        took = []
        for i in range(WARMUP_STEPS + steps):
            rows = [(token, start + i, sequence, True) for sequence, token in enumerate(draw(batch))]
            took.append(model.decode(rows))
        return batch / statistics.median(took[WARMUP_STEPS:])

    model.prefill(draw(context_len))
    prefills = []
    for _ in range(PREFILLS):
        model.clear()
        prefills.append(model.prefill(draw(context_len)))
    found = {"prefill_512": context_len / statistics.median(prefills)}
    found["decode_1_512"] = decode_rate(1, context_len)
    model.clear()
    found["decode_1_empty"] = decode_rate(1, 0)
    model.clear()
    for sequence in range(sequences):
        model.prefill(draw(context_len), sequence)
    found["decode_8_512"] = decode_rate(sequences, context_len)
    return found


def logprobs(path, threads, prompts):
    """For every position of every prompt: the best token, and log-probabilities of those that are asked for."""
    import numpy

    longest = max(len(prompt["tokens"]) for prompt in prompts)
    model = Context(path, threads, sequences=1, tokens_each=max(256, longest), outputs=longest, exact=True)
    answers = []
    for prompt in prompts:
        model.clear()
        model.decode([(token, i, 0, True) for i, token in enumerate(prompt["tokens"])])
        rows = []
        for position, asked in enumerate(prompt["asked"]):
            logits = model.logits(position).astype(numpy.float64)
            top = logits.max()
            normalizer = top + numpy.log(numpy.exp(logits - top).sum())
            rows.append({"best": int(logits.argmax()), "logprobs": [float(logits[token] - normalizer) for token in asked]})
        answers.append(rows)
    return answers


def main():
    command, *rest = sys.argv[1:]
    if command == "about":
        api = library()
        import llama_cpp

        info = api.llama_print_system_info().decode().strip()
        print(json.dumps({"llama_cpp_python": llama_cpp.__version__, "llama_cpp_system_info": info}))
    elif command == "quantize":
        source, out, quant, threads = rest
        api = library()
        params = api.llama_model_quantize_default_params()
        params.ftype, params.nthread = FORMATS[quant], int(threads)
        partial = f"{out}.partial"
        if api.llama_model_quantize(source.encode(), partial.encode(), ctypes.byref(params)) != 0:
            sys.exit(f"llama.cpp does not quantize {source} to {quant}")
        Path(partial).rename(out)
    elif command == "measure":
        path, threads, flash_attn, load_mode, context_len, steps = rest
        print(json.dumps(measure(path, int(threads), flash_attn, load_mode, int(context_len), int(steps))))
    elif command == "logprobs":
        path, threads = rest
        print(json.dumps(logprobs(path, int(threads), json.load(sys.stdin))))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
