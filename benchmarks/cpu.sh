#!/usr/bin/env bash
# Llama-shaped blocks on a CPU: what the project's targets of speed and memory are measured on. Every part takes a few
# minutes on two quiet cores; rows go to benchmarks/cpu-*.csv. Options: see parts.sh.
source "$(dirname "$0")/parts.sh"
begin cpu "$@"

BLOCKS="--model llama3-8b --scope blocks --layers 4 --hidden 1024 --vocab 1024 --device cpu --rank 16"
ALL=frozen,paca,paca-random,paca+lean,paca+lean+recompute,lora,lora-tuned,lora-same-parameters,lora-tuned-same-parameters

part speed-bf16 480 $BLOCKS --dtype bfloat16 --methods $ALL --seq 512 --rounds 15 --measure time,saved \
    --output benchmarks/cpu-blocks.csv
part speed-fp32 480 $BLOCKS --dtype float32 --methods $ALL --seq 512 --rounds 10 --measure time,saved \
    --output benchmarks/cpu-blocks.csv
part long-bf16 480 $BLOCKS --dtype bfloat16 --methods $ALL --seq 2048 --rounds 8 --measure time,saved \
    --output benchmarks/cpu-blocks.csv
part wide 480 $BLOCKS --layers 1 --hidden 4096 --dtype bfloat16 --seq 512,2048 --rounds 8 --measure time,saved \
    --methods frozen,paca,paca-random,paca+lean,paca+lean+recompute,lora,lora-tuned --output benchmarks/cpu-blocks.csv
part short 480 $BLOCKS --dtype bfloat16 --methods $ALL --seq 64,128 --rounds 25 --measure time,saved,switch \
    --output benchmarks/cpu-short.csv
part others 480 $BLOCKS --dtype bfloat16 --methods frozen,paca,dora,lora-fa,vera,full --seq 512 --rounds 8 \
    --measure time,saved --output benchmarks/cpu-others.csv
PROFILED=frozen,paca,paca-random,paca+lean,paca+lean+recompute,lora,lora-tuned
part profile 480 $BLOCKS --dtype bfloat16 --methods $PROFILED --seq 512,2048 --rounds 8 --measure time --profile \
    --output benchmarks/cpu-profile.csv
part profile-fp32 480 $BLOCKS --dtype float32 --methods $PROFILED --seq 512 --rounds 6 --measure time --profile \
    --output benchmarks/cpu-profile.csv
part peak 480 $BLOCKS --dtype bfloat16 --methods $ALL --seq 512,1024 --measure memory --output benchmarks/cpu-blocks.csv
part longest 900 $BLOCKS --dtype bfloat16 --methods frozen,paca,paca+lean,paca+lean+recompute,lora,lora-tuned \
    --baseline lora --seq 256 --measure max-seq --memory 320MiB --output benchmarks/cpu-longest.csv
part logits 300 --model llama3-8b --layers 2 --hidden 1024 --device cpu --methods frozen,paca,lora --seq 2048 \
    --measure memory,saved --loss logits --output benchmarks/cpu-loss.csv
part fused-loss 300 --model llama3-8b --layers 2 --hidden 1024 --device cpu --methods frozen,paca,lora --seq 2048 \
    --measure memory,saved --loss fused --output benchmarks/cpu-loss.csv
# What issue-sized targets are held against: two blocks, every method's freed memory kept.
CORE="--model llama3-8b --scope blocks --layers 2 --hidden 1024 --vocab 1024 --device cpu --rank 16 --dtype bfloat16"
part core 480 $CORE --methods frozen,paca,paca+lean,lora,lora-tuned --seq 64,512,2048 --rounds 15 --measure time \
    --output benchmarks/cpu-core.csv
part core-wide 480 $CORE --layers 1 --hidden 4096 --methods frozen,paca,lora,lora-tuned --seq 512 --rounds 8 \
    --measure time --output benchmarks/cpu-core.csv
part core-four-bit 300 $CORE --methods frozen,paca,qpaca,qlora --seq 64 --rounds 15 --measure time \
    --output benchmarks/cpu-core.csv
part core-compiled 480 $CORE --methods frozen,paca,paca+lean,lora-tuned --seq 512 --rounds 15 --measure time --compile \
    --output benchmarks/cpu-core.csv
if [ -d "${SMOLLM2:-}" ]; then # a folder with SmolLM2-135M-Instruct, such as the demo makes
    part core-real 600 --model "$SMOLLM2" --device cpu --dtype bfloat16 --batch 8 --tokens 112 --rank 16 --rounds 8 \
        --methods frozen,paca,paca:r=72:target_modules=o_proj+down_proj,lora,lora-tuned --measure time \
        --output benchmarks/cpu-core.csv
fi
part four-bit 480 $BLOCKS --layers 2 --dtype bfloat16 --methods frozen,paca,qpaca,qlora --seq 64,512 --rounds 10 \
    --measure time,memory --output benchmarks/cpu-four-bit.csv
part compiled 480 $BLOCKS --layers 2 --dtype bfloat16 --methods frozen,paca,paca+lean,lora-tuned --seq 512 --rounds 15 \
    --measure time --compile --output benchmarks/cpu-compiled.csv
finish
