#!/usr/bin/env bash
# How many pairs each memory rule holds: documents of names with numbers -> a model per line of MODELS -> exact match
# against the number of pairs, side by side. Everything lands in ./capacity. It can be stopped and run again.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/models.sh

# Name, then settings.
MODELS=(
    "linear model.memory.rule=linear"
    "linear_gated model.memory.rule=linear model.memory.write_gate=hard"
    "delta model.memory.rule=delta"
    "delta_gated model.memory.rule=delta model.memory.write_gate=hard"
    "deltanet model.memory.rule=deltanet model.memory.write_gate=hard"
    "gated_deltanet model.memory.rule=gated_deltanet model.memory.write_gate=sigmoid"
)

# As many questions as pairs: a document asks for all that it holds.
say "documents of 2 pairs in a segment, of 4 and 8, and of 16 to 64"
infini prepare recall:3000,length=1300..1500,pairs=64,questions=64,seed=2 recall:3000,length=650..800,pairs=32,questions=32 \
    recall:6000,length=330..400,pairs=16,questions=16,seed=1 --tokenizer train:1024 --valid-fraction 0.001 \
    --out capacity/long
infini prepare recall:6000,length=56..64,pairs=2,questions=2,seed=3 --tokenizer capacity/long --valid-fraction 0.001 \
    --out capacity/segment
infini prepare recall:6000,length=90..110,pairs=4,questions=4,seed=4 recall:6000,length=170..220,pairs=8,questions=8,seed=5 \
    --tokenizer capacity/long --valid-fraction 0.001 --out capacity/short

say "a model per rule, $JOBS at a time"
train_models configs/recall.yaml capacity "${MODELS[@]}"

say "exact match against the number of pairs"
runs=()
for model in "${MODELS[@]}"; do runs+=("capacity/${model%% *}"); done
infini evaluate "${runs[@]}" --nproc "$JOBS" --no-perplexity --out capacity/evaluation
