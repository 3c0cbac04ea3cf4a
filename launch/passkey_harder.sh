#!/usr/bin/env bash
# The passkey task made harder, with the recipe of configs/passkey_1m.yaml: hidden in real text, and with several named keys.
# Everything lands in ./passkey. It can be stopped and run again. docs/science.md has how far it goes.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/models.sh

# The recipe's three sets in FOLDER, with the TOKENIZER, hidden in filler.
prepare_sets() {
    local folder=$1 tokenizer=$2 short=$3 window=$4 long=$5
    infini prepare $short --tokenizer "$tokenizer" --valid-fraction 0.001 --out "$folder/short"
    infini prepare $window --tokenizer "$tokenizer" --valid-fraction 0.001 --out "$folder/window"
    infini prepare $long --tokenizer "$tokenizer" --valid-fraction 0.001 --out "$folder/long"
}

sets() { echo "data.sets.0.path=$1/short data.sets.1.path=$1/window data.sets.2.path=$1/long"; }

say "real text as filler: source code, with a tokenizer that knows the task's words"
infini prepare python:networkx,numpy passkey:300,length=512..4K --tokenizer train:1024 --out passkey/text/tokenizer
infini prepare python:networkx,numpy --tokenizer passkey/text/tokenizer --min-tokens 4096 --valid-fraction 0.2 \
    --out passkey/text/filler
filler=filler=passkey/text/filler
prepare_sets passkey/text passkey/text/tokenizer passkey:4000,length=128..200,$filler \
    passkey:4000,length=450..520,seed=1,$filler passkey:1500,length=1K..16K,seed=2,$filler

say "up to eight named keys"
infini prepare passkey:300,length=2K,keys=8 --tokenizer train:1024 --valid-fraction 0.01 --out passkey/keys/tokenizer
prepare_sets passkey/keys passkey/keys/tokenizer \
    "passkey:2500,length=128..192,keys=2 passkey:2500,length=200..256,keys=4,questions=2" \
    "passkey:4000,length=450..520,keys=2..8,questions=2,seed=1" \
    "passkey:1500,length=1K..16K,keys=2..8,questions=2,seed=2"

say "a model for each, $JOBS at a time"
train_models configs/passkey_1m.yaml passkey \
    "text/run $(sets passkey/text) model.init_std=0.08" \
    "keys/run $(sets passkey/keys) model.init_std=0.08 model.memory.rule=gated_deltanet"

say "exact match by length"
infini evaluate passkey/text/run --nproc "$JOBS" --no-perplexity 'evaluate.passkey_grid=[]' 'evaluate.passkey_depths=[]' \
    "evaluate.tasks=[\"passkey:60,length=1K/4K/16K/64K,$filler\",\"passkey:60,length=1K/4K/16K/64K\"]"
infini evaluate passkey/keys/run --nproc "$JOBS" --no-perplexity 'evaluate.passkey_grid=[]' 'evaluate.passkey_depths=[]' \
    'evaluate.tasks=["passkey:60,length=1K/4K/16K/64K,keys=1/2/4/8"]'
