#!/usr/bin/env bash
# Memory rules compared on long real text, models of equal size, data and steps: text -> a model per line of MODELS, one
# process each, two at a time -> held-out loss by segment, side by side. Some 40 minutes on two cores; everything lands in
# ./compare. It can be stopped and run again.
set -euo pipefail
cd "$(dirname "$0")/.."

JOBS="${JOBS:-2}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Name, then settings.
MODELS=(
    "plain model.memory.rule=none"
    "transformer_xl model.memory.rule=none model.local_context=sliding"
    "linear model.memory.rule=linear"
    "linear_gated model.memory.rule=linear model.memory.write_gate=hard"
    "delta model.memory.rule=delta"
    "delta_gated model.memory.rule=delta model.memory.write_gate=hard"
    "deltanet model.memory.rule=deltanet model.memory.write_gate=hard"
    "gated_deltanet model.memory.rule=gated_deltanet model.memory.write_gate=sigmoid"
)

say() { printf '\n== %s (%d s so far)\n' "$1" "$SECONDS"; }

say "long documents: source code of installed packages"
infini prepare python:torch,sympy,numpy,networkx,matplotlib,deepspeed,megatron.core --tokenizer train:1024 \
    --min-tokens 4096 --valid-fraction 0.2 --out compare/text

say "a model per rule, $JOBS at a time"
train() {
    local name=$1
    shift
    local resume=()
    if [ -e "compare/$name/metrics.jsonl" ]; then resume=(--resume); fi
    infini train configs/compare_rules.yaml "name=$name" "$@" "${resume[@]}" >> "compare/$name.log" 2>&1
    echo "trained $name: $(grep '^step' "compare/$name.log" | tail -1)"
}
export -f train
printf '%s\n' "${MODELS[@]}" | xargs -P "$JOBS" -I{} bash -c 'train {}'

say "held-out loss by segment, differences paired by document"
runs=()
for model in "${MODELS[@]}"; do runs+=("compare/${model%% *}"); done
infini evaluate "${runs[@]}" --nproc "$JOBS" --no-passkey --out compare/evaluation
