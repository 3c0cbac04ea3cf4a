#!/usr/bin/env bash
# How many pairs each memory rule holds: documents of names with numbers -> a model per rule -> exact match
# against the number of pairs, side by side; every rule with and without short convolutions. Three quarters of an hour on
# two cores. Everything lands in ./capacity. It can be stopped and run again.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/recipes/models.sh

# A document asks for all that it holds; numbers of one digit, so that an answer is one token.
pairs() { echo "recall:$1,length=$2,pairs=$3,questions=$3,digits=1,seed=$4"; }
say "documents of 2 pairs in a segment, of 4 and 8, and of 16 to 64"
infini prepare "$(pairs 3000 1200..1500 64 2)" "$(pairs 3000 600..800 32 0)" "$(pairs 6000 310..400 16 1)" \
    --tokenizer train:1024 --valid-fraction 0.001 --out capacity/long
infini prepare "$(pairs 6000 54..64 2 3)" --tokenizer capacity/long --valid-fraction 0.001 --out capacity/segment
infini prepare "$(pairs 6000 90..110 4 4)" "$(pairs 6000 165..220 8 5)" --tokenizer capacity/long --valid-fraction 0.001 \
    --out capacity/short

mapfile -t convolved < <(with_setting convolved model.memory.short_convolution=true "${RULES[@]}")
mapfile -t plain < <(with_setting plain model.memory.short_convolution=false "${RULES[@]}")
say "two models per rule, $JOBS at a time"
train_models configs/recall.yaml capacity "${convolved[@]}" "${plain[@]}"

say "exact match against the number of pairs, without short convolutions"
evaluate_models capacity evaluation_plain --no-perplexity "${plain[@]}"
say "and with them"
evaluate_models capacity evaluation_convolved --no-perplexity "${convolved[@]}"
