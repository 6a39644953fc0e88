#!/bin/sh
# Reduces every corpus (or those named) to the smallest inputs that cover the same code, at most 300 kB of files of at most
# 50 kB. FROM=<folder> takes the inputs of a long run in first, from <folder>/<target>.
set -eu
cd "$(dirname "$0")/.."
for target in ${*:-safetensors config template detokenizer sse}; do
    corpus="fuzz/corpus/$target"
    [ -z "${FROM:-}" ] || find "$FROM/$target" -type f -exec cp {} "$corpus/" \;
    find "$corpus" -type f -size +50k -delete
    cargo +nightly fuzz cmin "$target" -- -timeout=20
    # The largest go first.
    while [ "$(cat "$corpus"/* | wc -c)" -gt 300000 ]; do
        ls -S "$corpus" | head -n 10 | while read -r file; do rm "$corpus/$file"; done
    done
    echo "$target: $(ls "$corpus" | wc -l) files, $(cat "$corpus"/* | wc -c) bytes"
done
