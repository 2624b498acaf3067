# Everything runs in .venv, which `make setup` makes from requirements.lock and keeps up to date.
PY ?= python3
ACCELERATOR ?=

BIN := .venv/bin
PEERS := .venv-peers/.made
PLANNER := .venv/.made-plan-tpu
GPU_PLANNER := .venv/.made-plan-gpu
STAMP := .venv/.made$(if $(ACCELERATOR),-$(ACCELERATOR))
comma := ,
EXTRAS := test$(if $(ACCELERATOR),$(comma)$(ACCELERATOR))
CPU_DEVICES := $(if $(ACCELERATOR),,--cpu_devices 4)
# Compiled test programs are kept between runs and shared by the test processes.
TEST_ENV := JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/jax

.PHONY: help setup train test test-slow fuzz lint verify contract claims faults faults-short faults-long compare plans bench bench-peers bench-tpu lock clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make or update .venv; PY=python3.11 names the Python, ACCELERATOR=tpu|cuda12 the chip

train: setup ## train configs/quickstart.py into runs/quickstart, or resume it
	$(BIN)/moejax train configs/quickstart.py --workdir runs/quickstart $(CPU_DEVICES)

test: setup ## run the tests
	$(TEST_ENV) $(BIN)/python -m pytest -n 2

test-slow: setup ## the tests that train or compile for minutes
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m slow

lint: setup ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

fuzz: setup ## a thousand malformed configs and inputs of each kind: never a traceback, never a hang
	MOEJAX_FUZZ_EXAMPLES=1000 $(TEST_ENV) $(BIN)/python -m pytest tests/test_fuzz.py

verify: setup ## check that every layout computes the same
	$(BIN)/moejax verify configs/quickstart.py --cpu_devices 8

contract: setup ## check every router, dispatch and transport, into docs/contract.md (an hour)
	$(BIN)/moejax verify configs/quickstart.py --cpu_devices 8 --all --page docs/contract.md

claims: setup ## try claims of the literature at CPU size, into docs/claims.md (an hour)
	$(TEST_ENV) $(BIN)/moejax claims --workdir runs/claims --page docs/claims.md

faults: setup ## break real trainings in 60 ways, into docs/faults.md (40 minutes; goes on where interrupted)
	$(TEST_ENV) $(BIN)/python -m faults

faults-short: setup ## the same, without tests and with 10 kills (9 minutes)
	$(TEST_ENV) $(BIN)/python -m faults --form short

faults-long: setup ## 200 kills, and their line in docs/faults.md (an hour)
	$(TEST_ENV) $(BIN)/python -m faults --form long

compare: setup ## MoE against dense over 3 seeds, into docs/quickstart.md (an hour)
	$(BIN)/python benchmarks/compare.py train.steps=900

plans: $(PLANNER) $(GPU_PLANNER) ## published models on pods that are not here, into docs/planning.md (an hour)
	$(BIN)/python benchmarks/plans.py --write docs/planning.md

bench: setup ## speed and compile time of the train step, into the README table
	$(BIN)/python benchmarks/step.py --readme README.md
	$(BIN)/python benchmarks/compile.py

bench-peers: setup $(PEERS) ## speed next to Hugging Face transformers, which has .venv-peers
	$(BIN)/python benchmarks/peers.py

bench-tpu: $(PLANNER) ## FLOPs and exchanged bytes of the MoE layer compiled for TPUs, which needs none
	$(BIN)/python benchmarks/tpu_layer.py

lock: setup ## resolve requirements.lock anew from pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --upgrade --all-extras \
	  --no-emit-index-url --no-annotate --no-header pyproject.toml --output-file requirements.lock

clean: ## remove the environments and caches; runs stay
	rm -rf .venv .venv-peers .cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml requirements.lock
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "moejax needs Python 3.11 or newer, and $(PY) is not one; name one: make PY=python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PY) -m venv --clear .venv || { rm -rf .venv; \
	  echo "$(PY) cannot make a virtual environment; on Debian and Ubuntu: sudo apt-get install python3-venv" >&2; \
	  exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock uv
	VIRTUAL_ENV=.venv $(BIN)/uv pip install --constraint requirements.lock --editable ".[$(EXTRAS)]"
	@touch $@

.venv/.made-%: $(STAMP)
	VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet --constraint requirements.lock --editable ".[$*]"
	@touch $@

# pip, not uv: it takes a CPU wheel of torch from where its own configuration says there is one
$(PEERS): benchmarks/peers/requirements.txt
	$(PY) -m venv --clear .venv-peers
	.venv-peers/bin/python -m pip install --quiet --requirement $<
	@touch $@
