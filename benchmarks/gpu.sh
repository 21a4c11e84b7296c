#!/usr/bin/env bash
# The shape of Llama 3 8B on one large GPU (80 GB) in bf16, in at most ten minutes; rows go to benchmarks/gpu.csv.
# QPaCA and QLoRA need bitsandbytes. Options: see parts.sh.
source "$(dirname "$0")/parts.sh"
begin gpu "$@"

COMMON="--model llama3-8b --device cuda --dtype bfloat16 --rank 16 --output benchmarks/gpu.csv"
PACA_METHODS=frozen,paca,paca+lean,paca+lean+recompute
BUDGET=${BUDGET:-70GiB}

part speed 120 $COMMON --loss fused --methods $PACA_METHODS,lora,lora-tuned --seq 512,2048,8192 --rounds 6 \
    --measure time,saved,switch
part batches 60 $COMMON --loss fused --methods frozen,paca,lora,lora-tuned --seq 512 --batch 2,4,8,16 --rounds 5 \
    --measure time
part memory 110 $COMMON --loss fused --methods $PACA_METHODS,lora,lora-tuned --seq 2048,8192 --measure memory
part largest-batch 90 $COMMON --loss fused --methods paca+lean,paca,lora,lora-tuned --baseline lora --seq 2048 \
    --measure max-batch --memory "$BUDGET"
part four-bit 60 $COMMON --loss fused --methods frozen,qpaca,qlora --seq 2048 --rounds 6 --measure time,saved
part four-bit-memory 50 $COMMON --loss fused --methods qpaca,qlora --baseline qlora --seq 2048 --measure memory
part compiled 70 $COMMON --scope blocks --layers 8 --methods frozen,paca,lora-tuned --seq 2048 --rounds 10 \
    --measure time --compile
part profile 40 $COMMON --scope blocks --methods frozen,paca,lora,lora-tuned --seq 2048 --rounds 5 --measure time \
    --profile
finish
