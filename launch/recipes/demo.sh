#!/usr/bin/env bash
# The whole way in minutes on two cores: real text and passkey documents -> shards -> a tiny model trained on two
# processes -> evaluation with and without its memory. `make demo` runs this; everything lands in ./demo.
set -euo pipefail
cd "$(dirname "$0")/../.."

text=python:numpy,networkx,matplotlib,deepspeed,megatron.core

say() { printf '\n== %s (%d s so far)\n' "$1" "$SECONDS"; }

say "a tokenizer, trained on source code and on the task's words"
infini prepare python:networkx passkey:200,length=512..4K --tokenizer train:2048 --out demo/tokenizer

say "the source code of installed packages, one long document per sub-package"
infini prepare "$text" --tokenizer demo/tokenizer --out demo/text

say "passkey documents, short ones to learn from and long ones that outlast a window"
infini prepare passkey:30000,length=96..192,seed=1 --tokenizer demo/tokenizer --out demo/passkey_short
infini prepare passkey:4000,length=256..2048,seed=2 --tokenizer demo/tokenizer --out demo/passkey_long

say "training on two processes"
resume=()
if [ -e demo/run/metrics.jsonl ]; then resume=(--resume); fi
infini train configs/demo.yaml --nproc 2 "${resume[@]}"

say "evaluating, with the memory on, off, and exchanged between documents"
infini evaluate demo/run

say "done"
cat <<'E2'
Exact match with `memory on` at 8 segments and more is what the memory carries: the local attention sees one
segment, and `memory off` is the same model without the read.

  demo/run/evaluation/    results.json, plots (passkey heat maps, loss by segment, training curves)
  demo/run/metrics.jsonl  every number of the run
  infini monitor demo/run  how it went, on one screen
  tensorboard --logdir demo/run
  infini inspect demo/text
E2
