#!/usr/bin/env bash
# How many pairs each memory rule holds: documents of names with numbers -> a model per rule -> exact match
# against the number of pairs, side by side. Everything lands in ./capacity. It can be stopped and run again.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/models.sh

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
train_models configs/recall.yaml capacity "${RULES[@]}"

say "exact match against the number of pairs"
evaluate_models capacity --no-perplexity "${RULES[@]}"
