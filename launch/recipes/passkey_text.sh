#!/usr/bin/env bash
# A passkey hidden in source code, trained with 64 lanes: for a GPU. Everything lands in ./passkey/text_wide; it can be stopped and run
# again. `SEED=1` takes another training seed. docs/science_record.md has how far it goes ("Hidden in source code").
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/recipes/models.sh

folder=passkey/text_wide
say "source code as filler, with a tokenizer that knows the task's words; other packages' for the evaluation"
infini prepare python:networkx,numpy passkey:300,length=512..4K --tokenizer train:1024 --out $folder/tokenizer
infini prepare python:networkx,numpy --tokenizer $folder/tokenizer --min-tokens 4096 --valid-fraction 0.02 --out $folder/filler
infini prepare python:matplotlib,deepspeed --tokenizer $folder/tokenizer --min-tokens 4096 --valid-fraction 0.95 --out $folder/heldout
filler=filler=$folder/filler
prepare_passkeys text_wide short "passkey:24000,length=128..200,$filler"
prepare_passkeys text_wide window "passkey:12000,length=450..520,seed=1,$filler"
prepare_passkeys text_wide long "passkey:2000,length=1K..64K,seed=2,$filler"

say "training"
train_model configs/passkey_text.yaml $folder "seed${SEED:-0}" "train.seed=${SEED:-0}"

say "exact match by length, and where no segment ends with the answer"
infini evaluate "$folder/seed${SEED:-0}" --no-perplexity
