#!/usr/bin/env bash
# Does a memory beside a sliding local context beat the sliding context alone? Long real text, models of equal parameters,
# data and steps -> for each seed a model per line of MODELS -> held-out loss by segment, side by side. SEEDS="0 1 2" for
# more. A seed takes 22 minutes of one process and 3 of evaluation, the text 4 before, on a core that does other work
# besides. Everything lands in ./compare. It can be stopped and run again.
#
# SCALE=large is for a GPU: 0.73M parameters, ten times the tokens, and a rival of equal state; SCALE=large_256 is the same with
# segments of 256 tokens. JOBS models at a time share the GPU. ONLY="sliding plain": these models and no others.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/recipes/models.sh

SCALE="${SCALE:-small}"
SLIDING=model.local_context=sliding
GATED_DELTANET="model.memory.rule=gated_deltanet model.memory.write_gate=sigmoid"
# Parameters are equal: the MLP is narrower where the memory has some of its own. The rival of equal state slides over longer
# segments: of 126 beside 64 tokens, 2.3 % fewer bytes than gated_deltanet + sliding has; of 336 beside 256, 4 % more. With these
# lengths the documents of 64 segments are those of 33 and of 49, so that the same tokens are held out; tokens a step are equal to 0.5 %.
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
        GATED_DELTANET+=" model.ffn_hidden_size=304"
        EQUAL_STATE="model.segment_length=126 train.segments_per_window=4 train.lanes=65 evaluate.max_segments=33"
        MODELS=(
            "sliding $SLIDING"
            "gated_deltanet_sliding $GATED_DELTANET $SLIDING"
            "sliding_equal_state $SLIDING $EQUAL_STATE"
            "gdn2_sliding model.memory.rule=gdn2 model.ffn_hidden_size=256 $SLIDING"
            "deltanet_sliding model.memory.rule=deltanet model.memory.write_gate=hard $SLIDING"
            "linear_sliding model.memory.rule=linear $SLIDING"
            "gated_deltanet $GATED_DELTANET"
            "plain"
        )
        ;;
    large_256)
        CONFIG=configs/compare_sliding_large.yaml FOLDER=compare/sliding_large_256
        GATED_DELTANET+=" model.ffn_hidden_size=304"
        LONGER="data.sets.0.path=compare/text_long model.segment_length=256 train.lanes=16"
        EQUAL_STATE="data.sets.0.path=compare/text_long model.segment_length=336 train.segments_per_window=7 train.lanes=14"
        EQUAL_STATE+=" evaluate.max_segments=49"
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
