#!/usr/bin/env python3
"""Leaves out each barrier of the kernels in turn and expects a test to fail.

    cargo test --release -p r1-gpu --no-run
    python3 tools/gpu/barriers.py [FILE.cu ...]

The emulated GPU skips the barrier that R1_EMU_SKIP_BARRIER names (`file:line`). Prints a table, and fails when the absence of a barrier is
not found by any test of the gpu crate.
"""
import concurrent.futures
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 600


def barriers(chosen):
    """Every `sync_block()` and `sync_warp()` as (file name, line), the macros' own definitions aside."""
    found = []
    for path in sorted((ROOT / "kernels").rglob("*.cu*")):
        if chosen and path.name not in chosen:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.split("//")[0]
            if re.search(r"\bsync_(block|warp)\(\)", code) and "#define" not in code:
                found.append((path.name, number))
    return found


def binaries():
    """The test binaries of the gpu crate."""
    command = ["cargo", "test", "--release", "-p", "r1-gpu", "--no-run", "--message-format=json"]
    command += os.environ.get("R1_CARGO_FLAGS", "").split()
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    messages = [json.loads(line) for line in lines if line.startswith("{")]
    return [m["executable"] for m in messages if m.get("executable") and m["profile"]["test"]]


def fails(binary, barrier):
    """Names of tests that fail without that barrier; a binary that hangs or dies counts too."""
    environment = os.environ | {"RUST_BACKTRACE": "0"}
    if barrier:
        environment["R1_EMU_SKIP_BARRIER"] = f"{barrier[0]}:{barrier[1]}"
    try:
        run = subprocess.run([binary, "--test-threads", "2"], cwd=ROOT / "crates/gpu", env=environment, capture_output=True,
                             text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return ["(no end)"]
    names = re.findall(r"^test (\S+) \.\.\. FAILED", run.stdout, re.M)
    return names or ([f"(exit status {run.returncode})"] if run.returncode else [])


def main():
    tests = binaries()
    broken = [name for binary in tests for name in fails(binary, None)]
    if broken:
        sys.exit(f"with every barrier in place these fail: {', '.join(broken)}")

    def tried(barrier):
        for binary in tests:
            names = fails(binary, barrier)
            if names:
                return barrier, names
        return barrier, []

    missed = 0
    print("| barrier | found by |\n|---|---|")
    with concurrent.futures.ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 2) // 2)) as pool:
        for (name, line), found in pool.map(tried, barriers(sys.argv[1:])):
            missed += not found
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            print(f"| {name}:{line} | {', '.join(found[:3]) + more if found else '**nothing**'} |", flush=True)
    if missed:
        sys.exit(f"{missed} barriers are superfluous, or no test needs them")


if __name__ == "__main__":
    main()
