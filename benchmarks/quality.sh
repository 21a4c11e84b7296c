#!/usr/bin/env bash
# PaCA against LoRA at equal parameters, time and memory, on four tasks with real weights (docs/notes/quality.md).
#
#   .venv/bin/python -m benchmarks.quality.prepare --data FOLDER    once; without --data from the hub
#   bash benchmarks/quality.sh digits arc gsm8k encyclopedia        or some of them
#   EQUAL=time bash benchmarks/quality.sh digits-seeds digits-wide-seeds     with ten other seeds
#   EQUAL=time bash benchmarks/quality.sh digits-wide arc-wide gsm8k-wide    with 256 columns a layer
#   EQUAL=time bash benchmarks/quality.sh arc-long                           with more steps
#   EQUAL=time bash benchmarks/quality.sh gsm8k-long encyclopedia-long       the same, and 256 columns
#   EQUAL=time bash benchmarks/quality.sh arc-gemma-long                     the same, of a model twice as large
#   EQUAL=memory bash benchmarks/quality.sh encyclopedia-linear              with a rate that falls linearly
#   EQUAL=memory bash benchmarks/quality.sh encyclopedia-long gsm8k-long arc-long    the same, longer, and 256 columns
#   EQUAL=memory bash benchmarks/quality.sh gsm8k-wide arc-wide              with more columns in half batches
#   EQUAL=parameters JOBS=2 OMP_NUM_THREADS=1 bash benchmarks/quality.sh arc arc-long encyclopedia-long gsm8k-long
#
# JOBS processes share the work; with more than one, leave `time` out of EQUAL, as they slow each other down. A part
# that was stopped goes on where it was. What it leaves for the repository lies in benchmarks/quality/TASK-EQUAL/: the
# rows, and the page as HTML and as Markdown.
set -euo pipefail
cd "$(dirname "$0")/.."
PACA=${PACA:-.venv/bin/paca}
METHODS=${METHODS:-paca,lora,lora-tuned}
SEEDS=${SEEDS:-0,1,2}
EQUAL=${EQUAL:-parameters time memory}
RUNS=${RUNS:-runs/quality}
JOBS=${JOBS:-1}
trap 'kill -TERM $(jobs -p) 2>/dev/null; exit 130' INT TERM # Ctrl-C does not reach what runs in the background
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1

for task in "$@"; do
    for equal in $EQUAL; do
        # Steps of 1.6; the grid grows by itself where the best rate is at an end of it. These are the grids that the
        # committed rows began with (tests/comparison compares them).
        config=$task methods=$METHODS seeds=$SEEDS same=$equal own=() changed=() folder=benchmarks/quality
        [ "$equal" = time ] && same=parameters,time
        case $task-$equal in
            digits-parameters) rates=3.2e-3,5e-3,8e-3,1.25e-2 ;;
            digits-time) config=digits64 rates=1.4e-3,2.2e-3,3.5e-3 own=(--lr lora=1.25e-3,2e-3,3.2e-3) ;;
            digits-seeds-time) # other seeds; the committed rows have all ten at both rates of each method
                config=digits64 seeds=3,4,5,6,7,8,9,10,11,12 rates=2.2e-3,3.5e-3 methods=paca,lora
                own=(--lr lora=7.81e-4,1.25e-3 --no-extend)
                ;;
            digits-wide-seeds-time) # the best rates of digits-wide-time, other seeds
                config=digits-wide seeds=3,4,5,6,7,8,9,10,11,12 rates=1.25e-3 methods=paca,lora own=(--no-extend)
                ;;
            digits-wide-time) rates=7.8e-4,1.25e-3,2e-3 own=(--lr lora=1.25e-3,2e-3,3.2e-3) ;;
            digits-wide-*) rates=1.25e-3,2e-3,3.2e-3 ;;
            digits-*)
                rates=2e-3,3.2e-3,5e-3 own=(--lr lora=7.72e-4,1.23e-3,1.96e-3)
                changed=(--set paca.r=16 --set paca.paca_alpha=16)
                ;;
            encyclopedia-parameters)
                rates=7.8e-4,1.25e-3,2e-3
                own=(--lr lora=4.87e-4,7.8e-4,1.25e-3 --lr lora-tuned=4.87e-4,7.8e-4,1.25e-3)
                ;;
            encyclopedia-memory) # the committed rows of paca-wide and paca-factored have the r of their files
                rates=4.87e-4,7.8e-4,1.25e-3 own=(--lr paca-wide=1.9e-4,3.04e-4,4.87e-4)
                methods=paca,paca-wide=$folder/wide.yaml,paca-factored=$folder/factored.yaml,lora,lora-tuned
                ;;
            encyclopedia-linear-memory) # TRL's own schedule
                config=encyclopedia rates=4.87e-4,7.8e-4,1.25e-3 own=(--lr paca-wide=1.9e-4,3.04e-4,4.87e-4)
                changed=(--set train.lr_scheduler_type=linear)
                methods=paca-wide=$folder/wide.yaml,lora,lora-tuned
                ;;
            gsm8k-parameters) rates=7.8e-4,1.25e-3,2e-3 own=(--lr lora-tuned=4.87e-4,7.8e-4,1.25e-3) ;;
            gsm8k-memory)
                rates=7.8e-4,1.25e-3,2e-3
                own=(--lr lora=4.87e-4,7.8e-4,1.25e-3 --lr lora-tuned=3.04e-4,4.87e-4,7.8e-4)
                ;;
            gsm8k-wide-memory) # the committed rows of LoRA are those of gsm8k-memory, by the same count of bytes
                config=gsm8k rates=4.87e-4,7.8e-4,1.25e-3 own=(--lr lora-tuned=3.04e-4,4.87e-4,7.8e-4)
                methods=paca-wide=$folder/wide.yaml,lora,lora-tuned
                ;;
            arc-long-time) # most of an epoch
                config=arc rates=4.87e-4,7.8e-4,1.25e-3 changed=(--set train.max_steps=400)
                ;;
            arc-long-parameters) # along TRL's own schedule
                config=arc rates=4.87e-4,7.8e-4,1.25e-3
                changed=(--set train.max_steps=400 --set train.lr_scheduler_type=linear)
                ;;
            arc-gemma-long-time) # Gemma 3 270M (prepare --gemma); LoRA with r 33; along TRL's own schedule
                config=arc-gemma same=time rates=1.9e-4,3.04e-4,4.87e-4 own=(--lr paca-256=4.7e-5,7.5e-5,1.2e-4)
                changed=(--set train.max_steps=300 --set train.lr_scheduler_type=linear --set eval.limit=600)
                methods=paca-256=$folder/columns256.yaml,lora-tuned=$folder/lora33-tuned.yaml,lora=$folder/lora33.yaml
                ;;
            gsm8k-long-time) # LoRA with r 33; along TRL's own schedule
                config=gsm8k same=time rates=7.8e-4,1.25e-3,2e-3
                own=(--lr paca-256=4.87e-4,7.8e-4,1.25e-3 --lr lora-tuned=1.25e-3,2e-3,3.2e-3)
                changed=(--set train.max_steps=300 --set train.lr_scheduler_type=linear)
                methods=paca-256=$folder/columns256.yaml,lora-tuned=$folder/lora33-tuned.yaml,lora=$folder/lora33.yaml
                ;;
            encyclopedia-long-time) # LoRA with r 33; along TRL's own schedule
                config=encyclopedia same=time rates=4.87e-4,7.8e-4,1.25e-3
                own=(--lr paca-256=1.9e-4,3.04e-4,4.87e-4 --lr paca=7.8e-4,1.25e-3,2e-3)
                changed=(--set train.max_steps=300 --set train.lr_scheduler_type=linear)
                methods=paca-256=$folder/columns256.yaml,paca # steps of two-kinds.yaml were timed beside these
                methods+=,lora-tuned=$folder/lora33-tuned.yaml,lora=$folder/lora33.yaml
                ;;
            gsm8k-long-parameters) # along TRL's own schedule
                config=gsm8k rates=1.25e-3,2e-3,3.2e-3
                changed=(--set train.max_steps=300 --set train.lr_scheduler_type=linear)
                ;;
            encyclopedia-long-parameters)
                config=encyclopedia rates=7.8e-4,1.25e-3,2e-3
                own=(--lr lora=4.87e-4,7.8e-4,1.25e-3)
                changed=(--set train.max_steps=300 --set train.lr_scheduler_type=linear)
                ;;
            encyclopedia-long-memory) # within the memory of r 256 in whole batches; its rows are those of equal time
                config=encyclopedia rates=3.04e-4,4.87e-4,7.8e-4 own=(--lr paca-256=1.9e-4,3.04e-4,4.87e-4)
                changed=(--set train.max_steps=300 --set train.lr_scheduler_type=linear)
                methods=paca-256=$folder/columns256.yaml,lora-tuned,lora
                ;;
            arc-long-memory)
                config=arc rates=3.04e-4,4.87e-4,7.8e-4 own=(--lr paca-256=1.9e-4,3.04e-4,4.87e-4)
                changed=(--set train.max_steps=400 --set train.lr_scheduler_type=linear)
                methods=paca-256=$folder/columns256.yaml,lora,lora-tuned
                ;;
            gsm8k-long-memory) # its rows of paca-256 are those of equal time
                config=gsm8k rates=4.87e-4,7.8e-4,1.25e-3
                changed=(--set train.max_steps=300 --set train.lr_scheduler_type=linear)
                methods=paca-256=$folder/columns256.yaml,lora-tuned,lora
                ;;
            arc-wide-memory) # the committed rows of LoRA are those of arc-memory
                config=arc rates=7.8e-4,1.25e-3
                own=(--lr paca-wide=3.04e-4,4.87e-4,7.8e-4 --lr paca-wide-16bit=3.04e-4,4.87e-4,7.8e-4)
                own+=(--lr paca-wider=3.04e-4,4.87e-4,7.8e-4)
                methods=paca-wide=$folder/arc-wide.yaml,paca-wider=$folder/arc-wider.yaml
                methods+=,paca-wide-16bit=$folder/arc-wide-16bit.yaml,lora,lora-tuned
                ;;
            arc-wide-time | gsm8k-wide-time) # LoRA with r 33, as many parameters as paca's r 64
                config=${task%-wide} same=time rates=7.8e-4,1.25e-3 own=(--lr paca-256=1.9e-4,3.04e-4,4.87e-4)
                [ "$config" = gsm8k ] && rates=7.8e-4,1.25e-3,2e-3 own=(--lr paca-256=4.87e-4,7.8e-4,1.25e-3)
                methods=paca-256=$folder/columns256.yaml,paca,lora=$folder/lora33.yaml
                methods+=,lora-tuned=$folder/lora33-tuned.yaml
                ;;
            arc-*) rates=7.8e-4,1.25e-3 ;;
            *) rates=7.8e-4,1.25e-3,2e-3 ;;
        esac
        compare=("$PACA" compare "$folder/$config.yaml" "${changed[@]}" --methods "$methods" --lr "$rates"
            "${own[@]}" --seeds "$seeds" ${same:+--equal "$same"} --output "$RUNS/$task-$equal")
        for ((job = 1; job < JOBS; job++)); do "${compare[@]}" & done
        "${compare[@]}"
        wait
        mkdir -p "benchmarks/quality/$task-$equal"
        cp "$RUNS/$task-$equal"/{runs.jsonl,comparison.html,comparison.md} "benchmarks/quality/$task-$equal/"
    done
done
