# `make help` lists the targets. Every target that runs Python first makes the environment, unless it is up to date.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Settings, e.g. `make setup PYTHON=python3.13 TORCH_INDEX=https://mirror.example/whl/cpu`
PYTHON ?=
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
NEURON_INDEX ?= https://pip.repos.neuron.amazonaws.com

# The stages and tools of this project, whatever Python environment the caller is in.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV CONDA_PREFIX
export PYTHONUNBUFFERED := 1
# Many container images set it. Without bytecode on disk every process compiles all that it imports, torch and all.
unexport PYTHONDONTWRITEBYTECODE
# Nothing is reported to anyone.
export DO_NOT_TRACK := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export VLLM_NO_USAGE_STATS := 1

READY := .venv/.ready
# The options of tools that talk to the server, or start it.
SERVER = $(if $(HOST),--host '$(HOST)') $(if $(PORT),--port '$(PORT)')
SERVED = $(SERVER) $(if $(ADAPTERS),--adapters $(ADAPTERS))
# Columns: changed params, the adapter's scores, the validation loss. The others are times, scores by category, and scores
# of the base model, which are the same in all experiments. Lowest loss first.
SHOW = [ -t 1 ] || export COLUMNS=120; dvc exp show --no-pager --only-changed --hide-workspace --sort-by validation_loss --drop \
    '^(?!Experiment$$|State$$|(model|data|convert|lora|train)\.|tuned\.(exact_match|rougeL|chrf|loss)$$|validation_loss$$)'

.PHONY: help setup setup-neuron setup-xla repro report sweep experiments compare card test-fast test test-long check-metrics lint deps serve load smoke ui chat doctor device-check plan precompile profile bench profile-train pull-results lock audit

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## only the environment, from requirements.lock
	@echo "setup: .venv ($$(.venv/bin/python --version)) is up to date; '. .venv/bin/activate' puts dvc and the stages' Python on your PATH"

$(READY): requirements.lock pyproject.toml tools/environment.sh
	@PYTHON='$(PYTHON)' TORCH_INDEX='$(TORCH_INDEX)' tools/environment.sh setup $@

setup-neuron: $(READY) ## on Trainium: AWS's packages for backend neuron into .venv, so that it runs all stages
	@NEURON_INDEX='$(NEURON_INDEX)' tools/environment.sh setup-neuron

setup-xla: $(READY) ## .venv-xla, with the real torch_xla: for the tests of backend nxd in `make test-long`
	@TORCH_INDEX='$(TORCH_INDEX)' tools/environment.sh setup-xla

repro: $(READY) ## the whole pipeline with params.yaml; stages that are up to date do not run again
	@python tools/doctor.py --repro
	@dvc repro
	@python tools/show_metrics.py
	@python tools/report.py

report: $(READY) ## write reports/report.html and summary.md of the current results; COMPARE=REV adds another commit
	@python tools/report.py $(if $(COMPARE),--compare '$(COMPARE)')

sweep: $(READY) ## SET="train.lr=1.0e-3,3.0e-4 lora.r=8,16": queue an experiment for each combination, run all; NAME=
	@dvc exp run --queue $(if $(NAME),--name '$(NAME)') $(foreach change,$(SET),--set-param '$(change)')
	@dvc exp run --run-all --jobs 1
	@$(SHOW)

experiments: $(READY) ## list the experiments on the current commit: changed params, scores, losses
	@$(SHOW)

compare: $(READY) ## A=REV B=REV SAMPLES=N: params, metrics and answers that differ (default: HEAD and the working tree)
	@python tools/compare.py $(if $(SAMPLES),--samples '$(SAMPLES)') '$(or $(A),HEAD)' $(if $(B),'$(B)')

card: $(READY) ## BASE=org/name: write the adapter and a model card to reports/adapter, ready to upload to the hub
	@python tools/card.py $(if $(BASE),--base '$(BASE)')

test-fast: $(READY) ## the quick tests: no vLLM, no training, no pipeline; ARGS= goes to pytest
	@pytest -m 'not slow and not long' $(ARGS)

test: $(READY) ## everything a change must pass; ARGS= goes to pytest, e.g. ARGS='-k resume'
	@pytest -n 2 --dist loadgroup -m 'not long' $(ARGS)

test-long: $(READY) ## 20 kills, a minute of load, NxD's own code (NXD_SOURCE=, NXD_SITE=), speed; ARGS= goes to pytest
	@pytest -m long $(ARGS)
	@$(MAKE) --no-print-directory bench

check-metrics: $(READY) ## the last run's metrics against those that HEAD holds, within tolerances for another processor
	@python tools/check_metrics.py

lint: $(READY) ## ruff and mypy
	@ruff check
	@ruff format --check
	@mypy

deps: $(READY) ## write the code that each stage depends on into dvc.yaml, from the imports
	@python tools/write_deps.py

serve: $(READY) ## base model and adapter behind vLLM's OpenAI-compatible server; HOST= PORT= REPLICAS= ADAPTERS="name=path …"
	@python tools/serve.py $(SERVED) $(if $(REPLICAS),--replicas '$(REPLICAS)')

load: $(READY) ## ADAPTERS="other=path": add adapters to the running server, where serve.runtime_adapters allows it
	@python tools/load_adapter.py $(SERVER) $(ADAPTERS)

smoke: $(READY) ## ask the running server one question of base and adapter; HOST= PORT= as for serve
	@python tools/smoke.py $(SERVER)

ui: $(READY) ## base and adapters side by side in the browser, on the running server or one that it starts; as for serve
	@python tools/ui.py $(SERVED)

chat: $(READY) ## a conversation with a model of the running server in the terminal; MODEL=name (default: tuned)
	@python tools/chat.py $(SERVER) $(if $(MODEL),--model '$(MODEL)')

doctor: $(READY) ## check that the pipeline and the server can run on this machine with params.yaml
	@python tools/doctor.py

device-check: $(READY) ## ten steps of a tiny model on the CPU and on the active backend, compared; the first thing on a new machine
	@python tools/device_check.py

plan: $(READY) ## PROFILE=name NODES="1 2 4" SEARCH=1: memory, steps, time; SEARCH ranks layouts (default: params.yaml)
	@python tools/plan.py $(if $(PROFILE),--profile '$(PROFILE)') $(if $(NODES),--nodes $(NODES)) $(if $(filter-out 0,$(SEARCH)),--search)

precompile: $(READY) ## Trainium: compile the training graphs before the run, into neuron.compile_cache
	@python tools/precompile.py

profile: $(READY) ## NAME=llama3-8b-trn2-nxd: write params.yaml from profiles/NAME.yaml and the profiles it extends
	@python tools/write_profile.py '$(NAME)'

bench: $(READY) ## the benchmarks: ratios to a baseline of the same run
	@python bench/convert.py
	@python bench/data.py
	@python bench/train.py
	@python bench/train.py --memory

profile-train: $(READY) ## where a training step's time goes
	@python bench/profile_train.py

pull-results: $(READY) ## REV=commit: that run's adapter, answers and metrics from the DVC remote into reports/REV
	@for path in artifacts/adapter artifacts/answers.jsonl metrics; do \
	    dvc get --quiet --force --rev '$(or $(REV),HEAD)' --out "reports/$(or $(REV),HEAD)/$${path##*/}" . "$$path"; done
	@ls -d 'reports/$(or $(REV),HEAD)'/*

lock: $(READY) ## compile pyproject.toml's dependency groups into requirements.lock
	@tools/environment.sh lock

audit: $(READY) ## known vulnerabilities of the locked packages, asked of osv.dev
	@python tools/audit.py
