# To be sourced: training several models, each in one process, some at a time (on a machine with GPUs, all on the first).

JOBS="${JOBS:-2}"
# Of an evaluation. On GPUs every process would want one of its own.
PROCESSES="${PROCESSES:-$(if command -v nvidia-smi > /dev/null; then echo 1; else echo "$JOBS"; fi)}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Every memory rule with the gates it is compared with: name, then settings.
RULES=(
    "linear model.memory.rule=linear"
    "linear_gated model.memory.rule=linear model.memory.write_gate=hard"
    "delta model.memory.rule=delta"
    "delta_gated model.memory.rule=delta model.memory.write_gate=hard"
    "deltanet model.memory.rule=deltanet model.memory.write_gate=hard"
    "gated_deltanet model.memory.rule=gated_deltanet model.memory.write_gate=sigmoid"
    "delta_product model.memory.rule=delta_product model.memory.write_gate=sigmoid"
    "kda model.memory.rule=kda model.memory.write_gate=sigmoid"
    "gdn2 model.memory.rule=gdn2"
)

# with_setting SUFFIX SETTING 'NAME [SETTING...]'...: the same models with one more setting, a line each.
with_setting() {
    local suffix=$1 setting=$2 model name settings
    shift 2
    for model in "$@"; do read -r name settings <<< "$model"; echo "${name}_$suffix $settings $setting"; done
}

say() { printf '\n== %s (%d s so far)\n' "$1" "$SECONDS"; }

SOURCE_CODE=python:torch,sympy,numpy,networkx,matplotlib,deepspeed,megatron.core

# Long documents, in compare/text: cut to 64 segments of 64 tokens, so that a run meets the beginning of one often.
prepare_source_code() {
    say "long documents: source code of installed packages"
    infini prepare "$SOURCE_CODE" --tokenizer train:1024 \
        --min-tokens 2048 --max-tokens 4096 --valid-fraction 0.1 --out compare/text
}

# The same text and tokenizer in compare/text_long, cut to 64 segments of 256 tokens.
prepare_longer_documents() {
    say "the same text in longer documents"
    infini prepare "$SOURCE_CODE" --tokenizer compare/text \
        --min-tokens 8192 --max-tokens 16384 --valid-fraction 0.1 --out compare/text_long
}

# prepare_passkeys FOLDER NAME SOURCE...: passkey/FOLDER/NAME, with passkey/FOLDER's tokenizer.
prepare_passkeys() {
    infini prepare "${@:3}" --tokenizer "passkey/$1/tokenizer" --valid-fraction 0.001 --out "passkey/$1/$2"
}

# train_model CONFIG FOLDER NAME [SETTING...]: the log is FOLDER/NAME.log; an interrupted run goes on.
train_model() {
    local config=$1 folder=$2 name=$3 resume=()
    shift 3
    if [ -e "$folder/$name/metrics.jsonl" ]; then resume=(--resume); fi
    if infini train "$config" "name=$name" "run_dir=$folder/$name" "$@" "${resume[@]}" >> "$folder/$name.log" 2>&1; then
        echo "trained $name: $(grep '^step' "$folder/$name.log" | tail -1)"
    else
        echo "$name failed, see $folder/$name.log: $(tail -1 "$folder/$name.log")" >&2
        return 1
    fi
}
export -f train_model

# train_each 'CONFIG FOLDER NAME [SETTING...]'...: JOBS at a time.
train_each() { printf '%s\n' "$@" | xargs -P "$JOBS" -I{} bash -c "train_model {}"; }

# train_models CONFIG FOLDER 'NAME [SETTING...]'...: models of one configuration, JOBS at a time.
train_models() {
    local config=$1 folder=$2
    shift 2
    train_each "${@/#/$config $folder }"
}

# evaluate_models FOLDER OUT OPTION 'NAME [SETTING...]'...: side by side, into FOLDER/OUT.
evaluate_models() {
    local folder=$1 out=$2 option=$3 runs=() model
    shift 3
    for model in "$@"; do runs+=("$folder/${model%% *}"); done
    infini evaluate "${runs[@]}" --nproc "$PROCESSES" "$option" --out "$folder/$out"
}
