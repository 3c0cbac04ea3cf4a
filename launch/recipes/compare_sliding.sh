#!/usr/bin/env bash
# Does a memory beside a sliding local context beat the sliding context alone? Long real text, models of equal parameters,
# data and steps -> for each seed a model per line of MODELS -> held-out loss by segment, side by side. SEEDS="0 1 2" for
# more. A seed takes 22 minutes of one process and 3 of evaluation, the text 4 before, on a core that does other work
# besides. Everything lands in ./compare. It can be stopped and run again.
#
# SCALE=large is for a GPU: 1.5M parameters, ten times the tokens, and a rival of equal state; SCALE=large_256 is the same with
# segments of 256 tokens. JOBS models at a time share the GPU. ONLY="sliding plain": these models and no others.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/recipes/models.sh

SCALE="${SCALE:-small}"
SLIDING=model.local_context=sliding
GATED_DELTANET="model.memory.rule=gated_deltanet model.memory.write_gate=sigmoid"
# Parameters are equal: the MLP is narrower where the memory has some of its own. The rival of equal state slides over longer
# segments: as many bytes as gated_deltanet + sliding to 0.5 %, tokens a step to 0.2 %, and the same held-out tokens.
case "$SCALE" in
    small)
        CONFIG=configs/compare_sliding.yaml FOLDER=compare/sliding
        GATED_DELTANET+=" model.ffn_hidden_size=256"
        MODELS=(
            "sliding $SLIDING"
            "gated_deltanet_sliding $GATED_DELTANET $SLIDING"
            "linear_sliding model.memory.rule=linear $SLIDING"
            "gated_deltanet $GATED_DELTANET"
            "plain"
        )
        ;;
    large)
        CONFIG=configs/compare_sliding_large.yaml FOLDER=compare/sliding_large
        GATED_DELTANET+=" model.ffn_hidden_size=448"
        EQUAL_STATE="model.segment_length=96 train.segments_per_window=6 train.lanes=57 evaluate.max_segments=43"
        MODELS=(
            "sliding $SLIDING"
            "gated_deltanet_sliding $GATED_DELTANET $SLIDING"
            "sliding_equal_state $SLIDING $EQUAL_STATE"
            "gdn2_sliding model.memory.rule=gdn2 model.ffn_hidden_size=385 $SLIDING"
            "deltanet_sliding model.memory.rule=deltanet model.memory.write_gate=hard model.ffn_hidden_size=453 $SLIDING"
            "linear_sliding model.memory.rule=linear $SLIDING"
            "gated_deltanet $GATED_DELTANET"
            "plain"
        )
        ;;
    large_256)
        CONFIG=configs/compare_sliding_large.yaml FOLDER=compare/sliding_large_256
        GATED_DELTANET+=" model.ffn_hidden_size=448"
        LONGER="data.sets.0.path=compare/text_long model.segment_length=256 train.lanes=16"
        EQUAL_STATE="data.sets.0.path=compare/text_long model.segment_length=288 train.segments_per_window=6 train.lanes=19"
        EQUAL_STATE+=" evaluate.max_segments=57"
        MODELS=(
            "sliding $SLIDING $LONGER"
            "gated_deltanet_sliding $GATED_DELTANET $SLIDING $LONGER"
            "sliding_equal_state $SLIDING $EQUAL_STATE"
        )
        ;;
    *)
        echo "SCALE=$SCALE is none of small, large, large_256" >&2
        exit 2
        ;;
esac
if [ -n "${ONLY:-}" ]; then
    read -ra names <<< "$ONLY"
    chosen=()
    for name in "${names[@]}"; do
        for model in "${MODELS[@]}"; do if [ "${model%% *}" = "$name" ]; then chosen+=("$model"); fi; done
    done
    if [ ${#chosen[@]} -ne ${#names[@]} ]; then
        echo "ONLY=$ONLY: the models of SCALE=$SCALE are ${MODELS[*]%% *}" >&2
        exit 2
    fi
    MODELS=("${chosen[@]}")
fi

prepare_source_code
if [ "$SCALE" = large_256 ]; then prepare_longer_documents; fi

for seed in ${SEEDS:-0 1}; do
    say "seed $seed: a model after the other, $JOBS at a time"
    mapfile -t seeded < <(with_setting "seed$seed" "train.seed=$seed" "${MODELS[@]}")
    train_models "$CONFIG" "$FOLDER" "${seeded[@]}"
    say "seed $seed: held-out loss by segment, differences paired by document"
    evaluate_models "$FOLDER" "evaluation_seed$seed" --no-passkey "${seeded[@]}"
done
