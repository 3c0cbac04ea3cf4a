#!/usr/bin/env bash
# Memory rules compared on long real text, models of equal size, data and steps: text -> a model per line of MODELS ->
# held-out loss by segment, side by side. About an hour on two cores; everything lands in ./compare. It can be stopped
# and run again.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/recipes/models.sh

MODELS=(
    "plain model.memory.rule=none"
    "transformer_xl model.memory.rule=none model.local_context=sliding"
    "${RULES[@]}"
)

prepare_source_code

say "a model per rule, $JOBS at a time"
train_models configs/compare_rules.yaml compare "${MODELS[@]}"

say "held-out loss by segment, differences paired by document"
evaluate_models compare evaluation --no-passkey "${MODELS[@]}"
