#!/usr/bin/env python3
"""What each kernel takes of a GPU, as the compilers tell it: registers, spilled bytes, shared memory.

    tools/gpu/resources.py           compiles all kernels and writes benches/results/kernel-resources.md
    tools/gpu/resources.py --check   compiles, writes nothing; fails where a kernel spills (ALLOWED aside) or the kept table lists other kernels

Compilers and flags are those of crates/gpu/build.rs (tools/gpu/toolchain.sh installs them). Needs no GPU.
"""

import argparse
import concurrent.futures
import glob
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"
TABLE = ROOT / "benches/results/kernel-resources.md"
HEADER = """# What each kernel takes of a GPU

Written by `tools/gpu/resources.py` from what the compilers say (ptxas 13.0, clang 19); nothing here was measured on a GPU. Shared
memory that the launch chooses is not in it. On NVIDIA a thread has at most 255 registers, on AMD 512 vector registers (accumulation
registers among them) and 102 scalar ones.

"""

# Spills that cost nothing, and why; all others fail.
NO_FP8 = "nothing launches it: without FP8 units there are no FP8 activations"
CHOSEN = "not a register: the expert's description, of the table or the shared expert's, is picked at run time and lies in scratch memory"
ALLOWED = {
    ("gemm_fp8_tall", "sm_80"): NO_FP8,
    ("linear_norm_fp8_middle", "sm_80"): NO_FP8,
    ("mla_absorb_simt", "sm_80"): "the form for what tiles do not take; not cured yet",
} | {
    ("mla_finish_w8", arch): "a small array in scratch memory; not cured yet" for arch in ("gfx90a", "gfx942")
} | {
    (f"moe_gate_up_{form}", arch): CHOSEN
    for form in ("simt", "bf16_16", "bf16_64", "w8_16", "w8_64", "fp8_16", "fp8_64")
    for arch in ("gfx90a", "gfx942")
}


def flags(name):
    lines = (KERNELS / name).read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout + done.stderr


def nvcc():
    homes = [os.environ["R1_CUDA_HOME"]] if "R1_CUDA_HOME" in os.environ else []
    homes += glob.glob(str(ROOT / "target/gpu-toolchain/lib/python3*/site-packages/nvidia/cu13"))
    homes += [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ] + ["/usr/local/cuda"]
    for home in homes:
        if os.access(f"{home}/bin/nvcc", os.X_OK):
            return f"{home}/bin/nvcc"
    sys.exit("no nvcc: tools/gpu/toolchain.sh installs it")


def clang():
    found = os.environ.get("R1_HIP_CLANG") or shutil.which("clang++-19")
    if not found or not shutil.which("llvm-readelf-19"):
        sys.exit("no clang++-19 or no llvm-readelf-19: tools/gpu/toolchain.sh installs them")
    return found


def names(source):
    return re.findall(r"^R1_KERNEL\((\w+),", source.read_text(), re.MULTILINE)


def nvidia(source, out):
    """{(kernel, target): row} from `ptxas -v`."""
    text = run([nvcc(), "-fatbin", "-Xptxas", "-v", *flags("nvcc.flags"), f"-I{KERNELS}", "-o", f"{out}/{source.stem}.fatbin", str(source)])
    rows = {}
    key = None
    for line in text.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            key = entry.groups()
            rows[key] = {"registers": None, "spilled": 0, "shared": 0}
        elif spill := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            rows[key]["spilled"] = max(map(int, spill.groups()))
        elif used := re.search(r"Used (\d+) registers", line):
            rows[key]["registers"] = used.group(1)
            smem = re.search(r"(\d+) bytes smem", line)
            rows[key]["shared"] = int(smem.group(1)) if smem else 0
    return rows


def amd(source, arch, out):
    """{(kernel, target): row} from the code object's metadata."""
    path = f"{out}/{source.stem}.{arch}.hsaco"
    options = [flag for flag in flags("hip.flags") if not flag.startswith("--offload-arch=")]
    run([clang(), *options, "-c", f"--offload-arch={arch}", f"-I{KERNELS}", "-o", path, str(source)])
    rows = {}
    # A list of maps, one per kernel, whose own keys stand at the same depth.
    for kernel in re.split(r"^  - ", run(["llvm-readelf-19", "--notes", path]), flags=re.MULTILINE)[1:]:
        values = dict(re.findall(r"^ {0,4}\.(\w+): +(\S+)$", kernel, re.MULTILINE))
        if "vgpr_count" not in values:
            continue
        value = lambda key: int(values.get(key, "0"))
        registers = f"{value('vgpr_count')} + {value('sgpr_count')}"
        if value("sgpr_spill_count"):
            # Kept in lanes of vector registers, which are counted; where those do not suffice, the private segment grows.
            registers += f" ({value('sgpr_spill_count')} in lanes)"
        rows[(values["name"], arch)] = {
            "registers": registers,
            # Or scratch that is no spill: an array that the compiler could not keep in registers.
            "spilled": max(4 * value("vgpr_spill_count"), value("private_segment_fixed_size")),
            "shared": value("group_segment_fixed_size"),
        }
    return rows


def report(rows, of_file):
    targets = sorted({target for _, target in rows}, key=lambda target: (target[0] != "s", target))
    lines = ["| file | kernel | " + " | ".join(targets) + " |", "|---" * (2 + len(targets)) + "|"]
    for name, file in of_file.items():
        cells = []
        for target in targets:
            row = rows[(name, target)]
            cell = row["registers"]
            if row["spilled"]:
                cell += f", **{row['spilled']} B spilled**"
            if row["shared"]:
                cell += f", {row['shared']} B static"
            cells.append(cell)
        lines.append(f"| {file} | `{name}` | " + " | ".join(cells) + " |")
    lines.append("")
    lines.append("Registers of a thread; AMD: vector + scalar, and how many scalars more lie in lanes of vector registers. Where nothing else is said, a kernel spills nothing and has no static shared memory.")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail on spills and on a table of other kernels")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    check = parser.parse_args().check
    jobs = parser.parse_args().jobs
    sources = sorted(KERNELS.glob("*.cu"))
    of_file = {name: source.name for source in sources for name in names(source)}
    archs = [flag.split("=")[1] for flag in flags("hip.flags") if flag.startswith("--offload-arch=")]
    rows = {}
    with tempfile.TemporaryDirectory() as out, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        work = [pool.submit(nvidia, source, out) for source in sources]
        work += [pool.submit(amd, source, arch, out) for source in sources for arch in archs]
        for result in work:
            rows.update(result.result())
    targets = {target for _, target in rows}
    missing = [f"{name} for {target}" for name in of_file for target in targets if (name, target) not in rows]
    if missing or not rows:
        sys.exit(f"the compilers said nothing about {', '.join(missing) or 'any kernel'}")
    table = report(rows, of_file)
    print(table, end="")
    spilling = [f"{name} on {target}: {row['spilled']} bytes" for (name, target), row in sorted(rows.items()) if row["spilled"] and (name, target) not in ALLOWED]
    superfluous = [f"{name} on {target}" for name, target in ALLOWED if not rows.get((name, target), {}).get("spilled")]
    if superfluous:
        sys.exit(f"ALLOWED lists what does not spill: {', '.join(superfluous)}")
    if not check:
        TABLE.write_text(HEADER + table)
    else:
        kept = TABLE.read_text() if TABLE.exists() else ""
        kept_names = set(re.findall(r"^\| \S+ \| `(\w+)` \|", kept, re.MULTILINE))
        if kept_names != set(of_file):
            different = ", ".join(sorted(kept_names ^ set(of_file)))
            sys.exit(f"{TABLE.relative_to(ROOT)} does not list the same kernels ({different}): run tools/gpu/resources.py and commit it")
    if spilling:
        sys.exit("kernels that spill:\n  " + "\n  ".join(spilling))


if __name__ == "__main__":
    main()
