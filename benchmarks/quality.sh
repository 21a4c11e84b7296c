#!/usr/bin/env bash
# PaCA against LoRA at equal parameters, time and memory, on four tasks with real weights (docs/guides/comparing.md).
#
#   .venv/bin/python -m benchmarks.quality.prepare --data FOLDER    once; without --data from the hub
#   bash benchmarks/quality.sh digits arc gsm8k encyclopedia        or some of them
#
# A part that was stopped goes on where it was. Times count, so keep nothing else running. What it leaves for the
# repository lies in benchmarks/quality/TASK-EQUAL/: the rows, and the page as HTML and as Markdown.
set -euo pipefail
cd "$(dirname "$0")/.."
PACA=${PACA:-.venv/bin/paca}
METHODS=${METHODS:-paca,lora,lora-tuned}
SEEDS=${SEEDS:-0,1,2}
EQUAL=${EQUAL:-parameters time memory}
RUNS=${RUNS:-runs/quality}

for task in "$@"; do
    # Steps of 1.6; the grid grows by itself where the best rate is at an end of it.
    case $task in
        digits) rates=3.2e-3,5e-3,8e-3,1.25e-2 ;;
        *) rates=2e-3,3.2e-3,5e-3 ;;
    esac
    for equal in $EQUAL; do
        "$PACA" compare "benchmarks/quality/$task.yaml" --methods "$METHODS" --lr "$rates" --seeds "$SEEDS" \
            --equal "$equal" --output "$RUNS/$task-$equal"
        mkdir -p "benchmarks/quality/$task-$equal"
        cp "$RUNS/$task-$equal"/{runs.jsonl,comparison.html,comparison.md} "benchmarks/quality/$task-$equal/"
    done
done
