#!/usr/bin/env bash
# Installs the compilers that the features `cuda` and `rocm` of crates/gpu call, and prints the environment that names them:
# NVIDIA's 13.0 compiler from PyPI wheels (no CUDA installation, no GPU, no root) and Debian's clang 19 (root or sudo).
#
#   tools/gpu/toolchain.sh [DIR]            both; DIR is target/gpu-toolchain if not given, where the build looks by itself
#   tools/gpu/toolchain.sh --cuda [DIR]     only one of them
#   tools/gpu/toolchain.sh --rocm
#
# What is there already is kept. `eval "$(tools/gpu/toolchain.sh)"` sets the environment; all other output is on stderr.
set -euo pipefail

# 13.0 and no later: a driver of series 580 takes no newer PTX. cccl is what the headers of bf16 and fp8 include.
WHEELS=(nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85)
PACKAGES=(clang-19 lld-19 llvm-19)

say() { echo "toolchain.sh: $*" >&2; }
fail() { say "$*"; exit 1; }

cuda=yes
rocm=yes
dir=
for arg in "$@"; do
    case "$arg" in
        --cuda) rocm=no ;;
        --rocm) cuda=no ;;
        -*) fail "unknown option $arg; usage: tools/gpu/toolchain.sh [--cuda | --rocm] [DIR]" ;;
        *) dir=$arg ;;
    esac
done
dir=${dir:-$(cd "$(dirname "$0")/../.." && pwd)/target/gpu-toolchain}

# Where the wheels put CUDA, if nvcc there is the right one.
cuda_home() {
    local home
    for home in "$dir"/lib/python3*/site-packages/nvidia/cu13; do
        # By its real path: called through a link, nvcc does not find its parts.
        if [[ -x $home/bin/nvcc ]] && "$home/bin/nvcc" --version | grep -q 'V13\.0\.88'; then
            (cd "$home" && pwd -P)
            return
        fi
    done
    return 1
}

if [[ $cuda == yes ]]; then
    if ! cuda_home >/dev/null; then
        command -v python3 >/dev/null || fail "python3 is needed, with its venv module (apt-get install python3-venv)"
        say "installing ${WHEELS[*]} into $dir"
        python3 -m venv "$dir" >&2 || fail "python3 -m venv failed (apt-get install python3-venv)"
        "$dir/bin/pip" install --quiet --disable-pip-version-check --no-deps "${WHEELS[@]}" >&2
    fi
    home=$(cuda_home) || fail "the wheels are installed, but $dir holds no nvcc 13.0.88"
    echo "export R1_CUDA_HOME='$home'"
fi

if [[ $rocm == yes ]]; then
    if ! command -v clang++-19 >/dev/null || ! command -v ld.lld-19 >/dev/null || ! command -v llvm-readelf-19 >/dev/null; then
        command -v apt-get >/dev/null || fail "no apt-get here: install ${PACKAGES[*]} some other way and name clang++ in R1_HIP_CLANG"
        sudo=
        if [[ $(id -u) != 0 ]]; then
            sudo=$(command -v sudo) || fail "neither root nor sudo: have ${PACKAGES[*]} installed"
        fi
        say "installing ${PACKAGES[*]}"
        $sudo apt-get update -qq >&2
        $sudo apt-get install -y -qq --no-install-recommends "${PACKAGES[@]}" >&2
    fi
    echo "export R1_HIP_CLANG='$(command -v clang++-19)'"
fi
