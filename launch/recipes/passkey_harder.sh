#!/usr/bin/env bash
# The passkey task made harder: hidden in real text, and with several named keys.
# Everything lands in ./passkey; two hours on two cores. It can be stopped and run again. docs/science_record.md has how far it goes.
#
# SCALE=large is for a GPU, minutes there: eight named keys in three seeds, JOBS at a time, and nothing else.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/recipes/models.sh

if [ "${SCALE:-small}" = large ]; then
    say "up to eight named keys, more documents"
    infini prepare passkey:300,length=2K,keys=8 --tokenizer train:1024 --valid-fraction 0.01 --out passkey/eight/tokenizer
    prepare_passkeys eight short passkey:12000,length=130..220,keys=2,questions=2
    prepare_passkeys eight window passkey:8000,length=226..300,keys=4,questions=4 passkey:8000,length=430..520,keys=8,questions=8
    prepare_passkeys eight long4 passkey:1200,length=1K..16K,keys=4,questions=4,seed=2
    prepare_passkeys eight long8 passkey:1200,length=1K..16K,keys=8,questions=8,seed=3

    say "a model per seed, $JOBS at a time"
    models=()
    for seed in ${SEEDS:-0 1 2}; do models+=("seed$seed train.seed=$seed"); done
    train_models configs/passkey_eight.yaml passkey/eight "${models[@]}"

    say "exact match by length and by number of keys"
    evaluate_models passkey/eight evaluation --no-perplexity "${models[@]}"
    exit
fi

say "real text as filler: source code, with a tokenizer that knows the task's words"
infini prepare python:networkx,numpy passkey:300,length=512..4K --tokenizer train:1024 --out passkey/text/tokenizer
infini prepare python:networkx,numpy --tokenizer passkey/text/tokenizer --min-tokens 4096 --valid-fraction 0.2 \
    --out passkey/text/filler
filler=filler=passkey/text/filler
prepare_passkeys text short "passkey:4000,length=128..200,$filler"
prepare_passkeys text window "passkey:4000,length=450..520,seed=1,$filler"
prepare_passkeys text long "passkey:1500,length=1K..16K,seed=2,$filler"

say "up to eight named keys, each document asked for all that it holds"
infini prepare passkey:300,length=2K,keys=8 --tokenizer train:1024 --valid-fraction 0.01 --out passkey/keys/tokenizer
prepare_passkeys keys short passkey:4000,length=130..220,keys=2,questions=2
prepare_passkeys keys window passkey:3000,length=226..300,keys=4,questions=4 passkey:3000,length=430..520,keys=8,questions=8
prepare_passkeys keys long passkey:600,length=1K..16K,keys=4,questions=4,seed=2 passkey:600,length=1K..16K,keys=8,questions=8,seed=2

say "a model in real text and one per memory rule for named keys, $JOBS at a time"
text_sets="data.sets.0.path=passkey/text/short data.sets.1.path=passkey/text/window data.sets.2.path=passkey/text/long"
tied="model.memory.rule=gated_deltanet model.qk_init=tied model.init_std=0.1"
sooner="train.steps=900 train.write_gate_penalty_from=225"
models=("configs/passkey_1m.yaml passkey text/run $text_sets $tied $sooner")
rules=(gated_deltanet deltanet delta linear)
for rule in "${rules[@]}"; do
    models+=("configs/passkey_keys.yaml passkey keys/$rule model.memory.rule=$rule model.memory.short_convolution=true")
done
train_each "${models[@]}"

say "exact match by length"
infini evaluate passkey/text/run --nproc "$JOBS" --no-perplexity 'evaluate.passkey_grid=[]' 'evaluate.passkey_depths=[]' \
    "evaluate.tasks=[\"passkey:100,length=256/1K/4K/16K,$filler\",\"passkey:20,length=64K,$filler\"]"
infini evaluate passkey/keys/gated_deltanet --nproc "$JOBS" --no-perplexity

say "exact match against the number of keys"
infini evaluate "${rules[@]/#/passkey/keys/}" --nproc "$JOBS" --no-perplexity --out passkey/keys/evaluation \
    'evaluate.tasks=["passkey:60,length=4K,keys=2/4/8/16/32"]'
