"""r1-serve beside llama.cpp: the same weights, the same machine, one run.

Converts a BF16 checkpoint of DeepSeek-V3's shape to GGUF, quantizes it with llama.cpp's own code, compares the log-probabilities
that both give for the same token ids, and measures prefill and decode of both in turns. README.md says how to run it.

Each measurement is a process of its own, so neither side's threads nor its memory are in the other's way.
"""

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import agreement
import peer
from to_gguf import Unsupported, convert

HERE = Path(__file__).resolve().parent

# What is measured: name, key, sequences, tokens in the context before the decode steps.
CONTEXT = 512
DECODE_STEPS = 64
POINTS = [
    ("prefill of 512 tokens", "prefill_512", "tokens/s"),
    ("decode, 1 sequence, empty context", "decode_1_empty", "tokens/s"),
    ("decode, 1 sequence, after 512", "decode_1_512", "tokens/s"),
    ("decode, 8 sequences, after 512 each", "decode_8_512", "tokens/s"),
]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a BF16 checkpoint in the official layout")
    parser.add_argument("--r1-serve", type=Path, required=True, metavar="BINARY", help="the binary to measure")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where GGUF files are kept from run to run")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of both sides")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, in each of which both sides run in turns")
    parser.add_argument(
        "--pair",
        action="append",
        metavar="QUANT[=FLAGS]",
        help="a llama.cpp format (F32, BF16, Q8_0, Q4_K_M) and the flags of r1-serve to set beside it, such as "
        "'Q8_0=--model /path/to/fp8'; without a --model among them the same checkpoint. Can be repeated. Default: BF16",
    )
    parser.add_argument("--flash-attn", choices=["auto", "off", "on"], default="auto", help="llama.cpp's")
    parser.add_argument("--load-mode", choices=["auto", "none", "mmap"], default="auto", help="llama.cpp's")
    parser.add_argument("--tokenizer", type=Path, help="for comparing a checkpoint without one; any smaller one will do")
    parser.add_argument("--skip-agreement", action="store_true", help="measure only")
    parser.add_argument("--agreement-only", action="store_true", help="compare log-probabilities only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    args = parser.parse_args()
    args.pairs = [pair.partition("=")[::2] for pair in args.pair or ["BF16"]]
    unknown = {quant for quant, _ in args.pairs} - set(peer.FORMATS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: llama.cpp's side has {', '.join(peer.FORMATS)}")
    if args.threads < 1 or args.rounds < 1:
        parser.error("--threads and --rounds are at least 1")
    return args


def load_average():
    return os.getloadavg()[0]


def gguf_file(args, quant):
    """Makes the file of that format unless it is there."""
    args.work.mkdir(parents=True, exist_ok=True)
    name = args.model.resolve().name
    path = args.work / f"{name}-{quant}.gguf"
    if path.exists():
        return path
    if quant in ("BF16", "F32"):
        print(f"converting to {path}", flush=True)
        convert(args.model, path, widen=quant == "F32")
    else:
        source = gguf_file(args, "BF16")
        print(f"quantizing to {path}", flush=True)
        peer.child(["quantize", str(source), str(path), quant, str(args.threads)])
    return path


def measured(command):
    """Runs a command; gives what it printed, and its peak of resident memory in bytes."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{shlex.join(map(str, command))} failed with {process.returncode}:\n{output}")
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if platform.system() == "Darwin" else 1024
    return output, usage.ru_maxrss * unit


def run_llama(args, path):
    """One round of llama.cpp."""
    options = [str(args.threads), args.flash_attn, args.load_mode, str(CONTEXT), str(DECODE_STEPS)]
    output, rss = measured([sys.executable, str(HERE / "peer.py"), "measure", str(path), *options])
    return {**json.loads(output.splitlines()[-1]), "peak_rss_bytes": rss}


def r1_flags(args, flags):
    """What chooses model and format for r1-serve."""
    flags = shlex.split(flags)
    named = any(flag == "--model" or flag.startswith("--model=") for flag in flags)
    return ["--load-format", "auto", "--threads", str(args.threads), *([] if named else ["--model", str(args.model)]), *flags]


LATENCY = r"latency:\s*([0-9.]+) s"


def one_batch(args, flags, batch, context):
    """Seconds of the prefill and of the median decode step, as `bench one-batch` prints them."""
    sizes = ["--batch-size", str(batch), "--input-len", str(context), "--output-len", str(DECODE_STEPS + 1)]
    command = [str(args.r1_serve), "bench", "one-batch", *sizes, *r1_flags(args, flags)]
    output, rss = measured(command)
    report = output.partition("Benchmark ...")[2]
    prefill = re.search(r"Prefill\. " + LATENCY, report)
    decode = re.search(r"Decode\.\s+median " + LATENCY, report)
    if not prefill or not decode:
        sys.exit(f"{shlex.join(command)} printed no latencies:\n{output}")
    return float(prefill[1]), float(decode[1]), rss, output.splitlines()[0]


def run_r1(args, flags):
    """One round of r1-serve. The largest batch goes first: its warm-up brings all weights back into the page cache, as llama.cpp's
    prefills do before it measures."""
    _, decode_8, rss_8, _ = one_batch(args, flags, 8, CONTEXT)
    prefill, decode, rss, banner = one_batch(args, flags, 1, CONTEXT)
    _, empty, rss_empty, _ = one_batch(args, flags, 1, 1)
    return {
        "prefill_512": CONTEXT / prefill,
        "decode_1_empty": 1 / empty,
        "decode_1_512": 1 / decode,
        "decode_8_512": 8 / decode_8,
        "peak_rss_bytes": max(rss_empty, rss, rss_8),
        "banner": banner,
    }


def summary(rounds):
    keys = [key for _, key, _ in POINTS] + ["peak_rss_bytes"]
    return {key: statistics.median(run[key] for run in rounds) for key in keys}


def table(pair, llama, ours):
    quant, flags = pair
    lines = [f"llama.cpp {quant} | r1-serve {flags or '(same checkpoint)'}", ""]
    lines += ["| | llama.cpp | r1-serve | r1-serve / llama.cpp |", "|---|---|---|---|"]
    for title, key, unit in POINTS:
        lines.append(f"| {title} | {llama[key]:.1f} {unit} | {ours[key]:.1f} {unit} | {ours[key] / llama[key]:.2f} |")
    gb = [side["peak_rss_bytes"] / 1e9 for side in (llama, ours)]
    lines.append(f"| peak resident memory | {gb[0]:.2f} GB | {gb[1]:.2f} GB | {gb[1] / gb[0]:.2f} |")
    return "\n".join(lines)


def agree(args, quant, flags):
    """Log-probabilities of both sides for the same token ids."""
    tokenizer = args.tokenizer
    if tokenizer is None and not (args.model / "tokenizer.json").exists():
        tokenizer = HERE / "../../crates/cli/model/tokenizer.json"
    vocab_size = json.loads((args.model / "config.json").read_text())["vocab_size"]
    ours = agreement.of_r1_serve(args.r1_serve, r1_flags(args, flags), tokenizer, vocab_size)
    theirs = agreement.of_llama_cpp(gguf_file(args, quant), args.threads, ours)
    return agreement.compare(ours, theirs)


def machine():
    """What the figures belong to."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
        model = found[1] if found else model
    return {"cpu": model, "cores": os.cpu_count(), "kernel": platform.release(), "date": time.strftime("%Y-%m-%d %H:%M")}


def main():
    args = arguments()
    about = {**machine(), **peer.child_json(["about"]), "threads": args.threads, "load_average": load_average()}
    print("\n".join(f"{key}: {value}" for key, value in about.items()), flush=True)
    try:
        files = {quant: gguf_file(args, quant) for quant, _ in args.pairs}
    except Unsupported as why:
        sys.exit(f"cannot convert: {why}")
    result = {"about": about, "pairs": []}
    if not args.skip_agreement:
        result["agreement"] = []
        # In F32 both sides round alike, so this tells whether the weights and the model are the same.
        for quant, flags in [("F32", "--dtype float32"), *args.pairs]:
            found = agree(args, quant, flags)
            result["agreement"].append({"llama_cpp": quant, "r1_serve": flags, **found})
            print(f"\nagreement of {quant} and {flags or 'the same checkpoint'}: {agreement.words(found)}", flush=True)
        gguf_file(args, "F32").unlink()
    if not args.agreement_only:
        rounds = [{"llama": [], "r1": []} for _ in args.pairs]
        for i in range(args.rounds):
            for (quant, flags), sides in zip(args.pairs, rounds):
                before = load_average()
                sides["llama"].append({**run_llama(args, files[quant]), "load_average_before": before})
                before = load_average()
                sides["r1"].append({**run_r1(args, flags), "load_average_before": before})
                last = [sides["llama"][-1], sides["r1"][-1]]
                rates = ", ".join(f"{key} {last[0][key]:.1f} | {last[1][key]:.1f}" for _, key, _ in POINTS)
                loads = " | ".join(f"{side['load_average_before']:.2f}" for side in last)
                print(f"round {i + 1} of {args.rounds}, {quant}, llama.cpp | r1-serve: {rates}; load {loads}", flush=True)
        for pair, sides in zip(args.pairs, rounds):
            llama, ours = summary(sides["llama"]), summary(sides["r1"])
            print(f"\n{table(pair, llama, ours)}", flush=True)
            print(f"\nr1-serve said: {sides['r1'][0]['banner']}")
            medians = {"llama_cpp": llama, "r1_serve": ours}
            result["pairs"].append({"llama_cpp": pair[0], "r1_serve": pair[1], "median": medians, "rounds": sides})
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
