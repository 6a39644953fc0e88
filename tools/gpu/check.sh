#!/usr/bin/env bash
# Everything that can be said of the GPU backend on one machine, in one table, in minutes: conformance of the kernels, the bundled
# model over HTTP, kernels against the ceilings of the same run. Needs no network, no Rust and no repository there.
#
#   tools/gpu/check.sh --pack DIR [--features cuda,rocm]   builds (tools/gpu/toolchain.sh) and puts what is needed into DIR
#   DIR/check.sh [--device cuda|rocm|emu] [--allow-ptx]    runs it; without --device the first driver that has a GPU
#
# Exit status 0 only if every row of the table is `ok`. With --device emu nothing is measured, all of it runs.
set -uo pipefail

MAX_BYTES=$((50 * 1000 * 1000))
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
device=
features=
pack=
allow_ptx=()

usage() { sed -n '2,8p' "${BASH_SOURCE[0]}" | cut -c3- >&2; exit 2; }
fail() { echo "check.sh: $*" >&2; exit 1; }

while (($#)); do
    case "$1" in
        --device) device=${2:-}; shift 2 || usage ;;
        --features) features=${2:-}; shift 2 || usage ;;
        --pack) pack=${2:-}; shift 2 || usage ;;
        --allow-ptx) allow_ptx=(--allow-ptx); shift ;;
        *) usage ;;
    esac
done

# ---- Packing: a server, a bench and a test binary, stripped -----------------------------------------------------------------------------
if [[ -n $pack ]]; then
    root=$(cd "$here/../.." && pwd)
    cd "$root" || exit 1
    with=()
    [[ -n $features ]] && with=(--features "r1-gpu/${features//,/,r1-gpu/}")
    # All of the workspace, so that what its own build and tests made is not made again.
    cargo build --release --workspace --bins "${with[@]}" || fail "the programs were not built"
    built=$(cargo test --release --workspace --test conformance --test goldens --no-run --message-format=json "${with[@]}") ||
        fail "the tests were not built"
    test_binary() { sed -n "/crates\/gpu\|r1-tests/s/.*\"name\":\"$1\".*\"executable\":\"\([^\"]*\)\".*/\1/p" <<<"$built" | tail -1; }
    conformance=$(test_binary conformance)
    goldens=$(test_binary goldens)
    [[ -x $conformance && -x $goldens ]] || fail "the tests were not built"
    target=$(cargo metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
    mkdir -p "$pack" || exit 1
    for file in "$target/release/r1-serve" "$target/release/r1-gpu-check" "$conformance" "$goldens"; do
        name=$(basename "$file")
        [[ $file == "$conformance" ]] && name=conformance
        [[ $file == "$goldens" ]] && name=goldens
        strip -o "$pack/$name" "$file" || fail "$file was not copied"
        bytes=$(stat -c %s "$pack/$name")
        ((bytes < MAX_BYTES)) || fail "$name has $bytes bytes, which is more than $MAX_BYTES"
        echo "$name: $bytes bytes"
    done
    cp "${BASH_SOURCE[0]}" "$pack/check.sh"
    rm -rf "$pack/fixtures" && cp -r tests/goldens "$pack/fixtures" || fail "the goldens were not copied"
    exit
fi

command -v curl >/dev/null || fail "curl is needed: it asks the server"
for file in r1-serve r1-gpu-check conformance goldens; do
    [[ -x $here/$file ]] || fail "there is no $file beside this script: make a folder with --pack"
done
if [[ -z $device ]]; then
    device=$("$here/r1-gpu-check" devices | sed -n 's/^\(cuda\|rocm\): [0-9]*$/\1/p' | head -1)
    [[ -n $device ]] || { "$here/r1-gpu-check" devices >&2; fail "no driver has a GPU; --device emu runs without one"; }
fi
case "$device" in cuda | rocm | emu) ;; *) usage ;; esac

# ---- Rows of the table --------------------------------------------------------------------------------------------------------------------
work=$(mktemp -d)
server=
trap '[[ -n $server ]] && kill "$server" 2>/dev/null; rm -rf "$work"' EXIT
rows=()
failed=0
# row WHAT STATUS REMARK: STATUS is that of a command
row() {
    local word=ok
    (($2 == 0)) || { word=FAILED; failed=1; }
    rows+=("| $1 | $word | $3 |")
}

echo "== conformance on $device"
threads=1
[[ $device == emu ]] && threads=$(nproc)
start=$SECONDS
R1_GPU_DEVICE=$device R1_GPU_ALLOW_PTX=${allow_ptx[0]:-} \
    timeout 400 "$here/conformance" --test-threads="$threads" 2>&1 | tee "$work/conformance" | grep -E '^test .*FAILED|^test result'
row conformance "${PIPESTATUS[0]}" "$(sed -n 's/^test result: [^.]*\. \([0-9]* passed; [0-9]* failed\).*/\1/p' "$work/conformance"), $((SECONDS - start)) s"
((failed)) && grep -A12 -E '^---- .* stdout' "$work/conformance"

# Tests that were not found fail nothing.
has_passed() { grep -Eq '^test result: ok\. [1-9][0-9]* passed' "$1"; }
has_passed "$work/conformance" || row "conformance ran" 1 "no test passed"

echo "== goldens on $device"
start=$SECONDS
R1_GPU_DEVICE=$device R1_GPU_ALLOW_PTX=${allow_ptx[0]:-} R1_GOLDENS=$here/fixtures \
    timeout 200 "$here/goldens" --test-threads="$threads" gpu_ 2>&1 | tee "$work/goldens" | grep -E '^test .*FAILED|^test result'
row goldens "${PIPESTATUS[0]}" "$(sed -n 's/^test result: [^.]*\. \([0-9]* passed; [0-9]* failed\).*/\1/p' "$work/goldens"), $((SECONDS - start)) s"
((failed)) && grep -A12 -E '^---- .* stdout' "$work/goldens"

has_passed "$work/goldens" || row "goldens ran" 1 "no test passed"

echo "== the bundled model over HTTP on $device"
port=$((20000 + RANDOM % 20000))
"$here/r1-serve" --device "$device" "${allow_ptx[@]}" --port "$port" >"$work/server" 2>&1 &
server=$!
for _ in $(seq 600); do
    curl -sf "http://127.0.0.1:$port/health" >/dev/null && break
    kill -0 "$server" 2>/dev/null || break
    sleep 0.1
done
ask() { # ask STREAM
    curl -sNf --max-time 120 "http://127.0.0.1:$port/v1/chat/completions" -H 'content-type: application/json' \
        -d "{\"messages\":[{\"role\":\"user\",\"content\":\"how many rs are in strawberry\"}],\"temperature\":0,\"stream\":$1}"
}
start=$SECONDS
ask false >"$work/answer"
# The last letter count that the model was taught to give, outside its reasoning.
grep -Eq '"content":"[^"]*\b(3|three)\b' "$work/answer"
row strawberry $? "$(sed -n 's/.*"content":"\([^"]*\)".*/\1/p' "$work/answer" | tr -d '|' | cut -c1-60), $((SECONDS - start)) s"

start=$SECONDS
streams=()
for i in $(seq 16); do
    ask true >"$work/stream.$i" &
    streams+=($!)
done
bad=0
for pid in "${streams[@]}"; do wait "$pid" || bad=$((bad + 1)); done
# Every stream ends well, and all of them say the same.
words() { grep -oE '"(reasoning_)?content":"([^"\\]|\\.)*"' "$1" | sed 's/^"[a-z_]*":"//; s/"$//' | tr -d '\n'; }
for i in $(seq 16); do
    grep -q 'data: \[DONE\]' "$work/stream.$i" || bad=$((bad + 1))
    [[ $(words "$work/stream.$i") == "$(words "$work/stream.1")" ]] || bad=$((bad + 1))
done
[[ -n $(words "$work/stream.1") ]] || bad=$((bad + 1))
((bad == 0))
row "16 streams" $? "$bad differ or broke off, $((SECONDS - start)) s"
((failed)) && tail -20 "$work/server"
kill "$server" 2>/dev/null && wait "$server" 2>/dev/null
server=

echo "== kernels on $device"
ceiling=()
if [[ $device == cuda ]] && command -v python3 >/dev/null; then
    # The best that another library reaches here, where there is one.
    tflops=$(timeout 120 python3 - 2>/dev/null <<'PYTHON'
import time, torch
a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
best = 1e9
for _ in range(6):
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    torch.cuda.synchronize()
    best = min(best, (time.perf_counter() - start) / 10)
print(f"{2 * 8192**3 / best / 1e12:.1f}")
PYTHON
    ) && [[ -n $tflops ]] && ceiling=(--matmul-tflops "$tflops")
fi
timeout 120 "$here/r1-gpu-check" bench "$device" "${allow_ptx[@]}" "${ceiling[@]}" 2>&1 | tee "$work/bench" | sed '/^|/d'
row "kernel benches" "${PIPESTATUS[0]}" "$(grep '^|' "$work/bench" | tail -n +3 | wc -l) kernels, the table above"

echo
grep '^|' "$work/bench"
echo
echo "| check on $device | result | |"
echo "|---|---|---|"
printf '%s\n' "${rows[@]}"
exit $failed
