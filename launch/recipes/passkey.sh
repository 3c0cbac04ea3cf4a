#!/usr/bin/env bash
# Passkey retrieval up to a million tokens, from scratch on two cores: sets -> training on two processes -> the heat map
# of depth and length. `make passkey` runs this; everything lands in ./passkey. It can be stopped and run again.
set -euo pipefail
cd "$(dirname "$0")/../.."

say() { printf '\n== %s (%d s so far)\n' "$1" "$SECONDS"; }

say "documents of up to 3 segments, of 8, and of 16 to 512"
infini prepare passkey:4000,length=96..200 --tokenizer train:400 --valid-fraction 0.001 --out passkey/short
infini prepare passkey:4000,length=450..520,seed=1 --tokenizer passkey/short --valid-fraction 0.001 --out passkey/window
infini prepare passkey:1500,length=1K..32K,seed=2 --tokenizer passkey/short --valid-fraction 0.001 --out passkey/long

say "training on two processes"
resume=()
if [ -e passkey/run/metrics.jsonl ]; then resume=(--resume); fi
infini train configs/passkey_1m.yaml --nproc 2 "${resume[@]}"

say "the heat map: 4K to 1M tokens, memory on, off, and exchanged between documents"
infini evaluate passkey/run --nproc 2 --no-perplexity

say "done"
cat <<'END'
  passkey/run/evaluation/    results.json and the heat maps
  passkey/run/metrics.jsonl  every number of the run
A row of ten million tokens (some minutes more):
  infini evaluate passkey/run --nproc 2 --no-perplexity --out passkey/run/evaluation/10m \
    'evaluate.passkey_grid=[{lengths: [10485760], depths: [0.5], documents: 2}]'
END
