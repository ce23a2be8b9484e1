#!/usr/bin/env bash
# Calibrates in shards on this machine with GNU parallel, merges them, and quantizes:
#
#     docs/shards/parallel.sh EXPERIMENT.yaml [SHARDS]
#
# Run again after an interruption it runs all shards again, which changes nothing.
set -euo pipefail
experiment=$1
count=${2:-4}
parts=$(basename "$experiment" .yaml).parts
mkdir -p "$parts"

# Equal shares of the cores.
threads=$(($(nproc) / count))
export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))

seq 0 $((count - 1)) |
    parallel --quote --halt now,fail=1 --jobs "$count" \
        tsquant calibrate "$experiment" --quiet --shard "{}/$count" -o "$parts/{}.safetensors"

# Not all that is there: an earlier run may have had more shards.
files=()
for ((shard = 0; shard < count; shard++)); do files+=("$parts/$shard.safetensors"); done
tsquant merge "${files[@]}" -o "$parts.safetensors"
tsquant quantize "$experiment" --statistics "$parts.safetensors"
