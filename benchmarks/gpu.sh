#!/usr/bin/env bash
# The shape of Llama 3 8B on one large GPU (80 GB) in bf16, in at most half an hour; rows go to benchmarks/gpu.csv.
# QPaCA and QLoRA need bitsandbytes. Options: see parts.sh. From the environment:
#
#   BUDGET   memory of the search for the largest batch
#   DEVICE, LENGTHS, ROUNDS, SHRINK   for a trial of the script, such as
#            DEVICE=cpu LENGTHS=16 ROUNDS=1 SHRINK="--layers 2 --hidden 512 --vocab 64 --rank 4" benchmarks/gpu.sh speed
source "$(dirname "$0")/parts.sh"
begin gpu "$@"

BUDGET=${BUDGET:-70GiB}
OUTPUT=${OUTPUT:-benchmarks/gpu.csv}
ALL_LENGTHS=${LENGTHS:-512,1024,2048,4096,8192}
LENGTHS=${LENGTHS:-512,2048,8192}
SHORT=${LENGTHS%%,*}
MIDDLE=$(cut -d, -f2 <<<"$LENGTHS")
COMMON="--model llama3-8b --device ${DEVICE:-cuda} --dtype bfloat16 --rank 16 --rounds ${ROUNDS:-6} --output $OUTPUT"
WHOLE="$COMMON --loss fused"
BLOCKS="$COMMON --scope blocks --layers 8"
PACA_METHODS=frozen,paca,paca+lean,paca+lean+recompute

part speed 150 $WHOLE --methods $PACA_METHODS,lora,lora-tuned --seq $ALL_LENGTHS --measure time,saved,switch $SHRINK
part batches 60 $WHOLE --methods frozen,paca,lora,lora-tuned --seq $SHORT --batch 2,4,8,16 --measure time $SHRINK
part four-bit 120 $WHOLE --methods frozen,qpaca,qlora --seq $LENGTHS --measure time,saved $SHRINK
part launches 240 $BLOCKS --methods $PACA_METHODS,lora,lora-tuned,qpaca,qlora --seq $SHORT --measure launches \
    --compile --cuda-graphs $SHRINK
part compiled 420 $BLOCKS --methods frozen,paca,paca+lean,lora-tuned --seq $LENGTHS --measure time \
    --compile --cuda-graphs $SHRINK
part others 100 $BLOCKS --methods frozen,paca,dora,lora-fa,vera,full --seq $MIDDLE --measure time,saved $SHRINK
part profile 60 $BLOCKS --methods frozen,paca,lora,lora-tuned,qpaca,qlora --seq $MIDDLE --measure time --profile $SHRINK
part memory 110 $WHOLE --methods $PACA_METHODS,lora,lora-tuned --seq $LENGTHS --measure memory $SHRINK
part four-bit-memory 60 $WHOLE --methods qpaca,qlora --baseline qlora --seq $LENGTHS --measure memory $SHRINK
part largest-batch 90 $WHOLE --methods paca+lean,paca,lora,lora-tuned --baseline lora --seq $MIDDLE \
    --measure max-batch --memory "$BUDGET" $SHRINK
finish
