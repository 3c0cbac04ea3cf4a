#!/usr/bin/env bash
# Does a memory beside a sliding local context beat the sliding context alone? Long real text, models of equal parameters,
# data and steps -> for each seed a model per line of MODELS -> held-out loss by segment, side by side. SEEDS="0 1 2" for
# more. A seed takes 22 minutes of one process and 3 of evaluation, the text 4 before, on a core that does other work
# besides. Everything lands in ./compare. It can be stopped and run again.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/recipes/models.sh

SLIDING=model.local_context=sliding
GATED_DELTANET="model.memory.rule=gated_deltanet model.memory.write_gate=sigmoid model.ffn_hidden_size=256"
MODELS=(
    "sliding $SLIDING"
    "gated_deltanet_sliding $GATED_DELTANET $SLIDING"
    "linear_sliding model.memory.rule=linear $SLIDING"
    "gated_deltanet $GATED_DELTANET"
    "plain"
)

prepare_source_code

for seed in ${SEEDS:-0 1}; do
    say "seed $seed: a model after the other, $JOBS at a time"
    mapfile -t seeded < <(with_setting "seed$seed" "train.seed=$seed" "${MODELS[@]}")
    train_models configs/compare_sliding.yaml compare/sliding "${seeded[@]}"
    say "seed $seed: held-out loss by segment, differences paired by document"
    evaluate_models compare/sliding "evaluation_seed$seed" --no-passkey "${seeded[@]}"
done
