#!/usr/bin/env bash
# The best rate of PaCA by rank and model, on ARC and for a classifier, one seed (docs/notes/learning-rate.md).
#
#   .venv/bin/python -m benchmarks.quality.prepare --data FOLDER --gemma    once; without --data from the hub
#   bash benchmarks/rates.sh
#
# A part that was stopped goes on where it was. The rows lie in benchmarks/rates/NAME.jsonl.
set -euo pipefail
cd "$(dirname "$0")/.."
PACA=${PACA:-.venv/bin/paca}
RUNS=${RUNS:-runs/rates}
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1

search() { # NAME TASK R RATES
    "$PACA" compare "benchmarks/quality/$2.yaml" --set "paca.r=$3" --set "paca.paca_alpha=$3" --methods paca \
        --lr "$4" --seeds 0 --extend --output "$RUNS/$1"
    cp "$RUNS/$1/runs.jsonl" "benchmarks/rates/$1.jsonl"
}

mkdir -p benchmarks/rates
search gemma3-270m-r64 arc-gemma 64 7.8e-4,1.25e-3,2e-3
search gemma3-270m-r16 arc-gemma 16 5e-4,8e-4,1.25e-3
search smollm2-135m-r16 arc 16 2e-3,3.2e-3,5e-3
search smollm2-135m-kinds-r16 kinds 16 3e-4,2e-3,3.2e-3,5e-3,8e-3
