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

say "documents of up to 3 segments, of about a window, and longer ones"
infini prepare recall:2000,length=1K..2K,pairs=16..128,questions=8,seed=2 --tokenizer train:1024 \
    --valid-fraction 0.001 --out capacity/long
infini prepare recall:4000,length=100..192,pairs=2..6,questions=2 --tokenizer capacity/long \
    --valid-fraction 0.001 --out capacity/short
infini prepare recall:3000,length=500..1K,pairs=4..64,questions=4,seed=1 --tokenizer capacity/long \
    --valid-fraction 0.001 --out capacity/window

say "a model per rule, $JOBS at a time"
train_models configs/recall.yaml capacity "${MODELS[@]}"

say "exact match against the number of pairs"
runs=()
for model in "${MODELS[@]}"; do runs+=("capacity/${model%% *}"); done
infini evaluate "${runs[@]}" --nproc "$JOBS" --no-perplexity --out capacity/evaluation
