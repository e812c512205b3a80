# `make help` lists the targets. Every target that runs Python first makes the environment, unless it is up to date.
override SHELL := bash
override .SHELLFLAGS := -efuo pipefail -c
.DEFAULT_GOAL := help

# What a command line may set, e.g. `make plan NODES="1 2"`. A value is text: make expands nothing in it, and recipes read
# it from the environment, in quotes ("$$NODES"), so that no shell parses it either. `words=($$NODES)` only cuts it at blanks.
override SETTINGS := PYTHON TORCH_INDEX NEURON_INDEX ADAPTERS A ARGS B BASE BUNDLE COMPARE HOST LIMIT MODEL NAME NODES PORT PROFILE REPLICAS \
    REPO REV SAMPLES SEARCH SET TASKS UPLOAD
override GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
$(foreach name,$(filter-out -%,$(GIVEN)),$(eval override export $(name) := $$(value $(name))))
# The first three may also come from the caller's environment. The others have common names, as NAME and HOST.
$(foreach name,$(filter-out $(GIVEN) PYTHON TORCH_INDEX NEURON_INDEX,$(SETTINGS)),$(eval undefine $(name)))
$(foreach name,$(filter-out -% $(SETTINGS),$(GIVEN)),$(warning $(name) is not a setting of this Makefile (mistyped?)))

# The stages and tools of this project, whatever Python environment the caller is in.
override export PATH := $(CURDIR)/.venv/bin:$(PATH)
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV CONDA_PREFIX
export PYTHONUNBUFFERED := 1
# Many container images set it. Without bytecode on disk every process compiles all that it imports, torch and all.
unexport PYTHONDONTWRITEBYTECODE
# Nothing is reported to anyone.
export DO_NOT_TRACK := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export VLLM_NO_USAGE_STATS := 1

override READY := .venv/.ready
# The options of tools that talk to the server, or start it.
override SERVER := $${HOST:+--host="$$HOST"} $${PORT:+--port="$$PORT"}
override SERVED := $(SERVER) "$${words[@]/\#/--adapters=}" $${BUNDLE:+--bundle="$$BUNDLE"}
# pytest with these options. Of two that contradict each other the last one counts: that of ARGS.
override pytest = PYTEST_ADDOPTS="$${PYTEST_ADDOPTS-} $(1) $${ARGS-}" pytest
override BENCHMARKS := python bench/convert.py; python bench/data.py; python bench/train.py; python bench/train.py --memory

.PHONY: help setup setup-neuron setup-xla setup-lm-eval repro report sweep experiments compare card push bundle test-fast test test-long check-metrics lint deps serve load smoke lm-eval ui chat doctor device-check plan precompile profile bench profile-train pull-results lock audit

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

setup: $(READY) ## only the environment, from requirements.lock
	@echo "setup: .venv ($$(.venv/bin/python --version)) is up to date; '. .venv/bin/activate' puts dvc and the stages' Python on your PATH"

$(READY): requirements.lock pyproject.toml tools/environment.sh
	@tools/environment.sh setup $@

setup-neuron: $(READY) ## on Trainium: AWS's packages for backend neuron into .venv, so that it runs all stages
	@tools/environment.sh setup-neuron

setup-xla: $(READY) ## .venv-xla, with the real torch_xla: for the tests of backend nxd in `make test-long`
	@tools/environment.sh setup-xla

setup-lm-eval: $(READY) ## .venv-lm-eval, with lm-evaluation-harness: for `make lm-eval`
	@tools/environment.sh setup-lm-eval

repro: $(READY) ## the whole pipeline with params.yaml; stages that are up to date do not run again
	@python tools/doctor.py --repro
	@python tools/repro_plan.py
	@dvc repro
	@python tools/show_metrics.py
	@python tools/report.py
	@echo 'next: open reports/report.html; make ui asks base model and adapter side by side, make serve starts their API'

report: $(READY) ## write reports/report.html and summary.md of the current results; COMPARE="REV …" adds commits or experiments
	@words=($${COMPARE-}); python tools/report.py "$${words[@]/#/--compare=}"

sweep: $(READY) ## SET="train.lr=1.0e-3,3.0e-4 lora.r=8,16": queue an experiment for each combination, run all; NAME=
	@words=($${SET-}); python tools/sweep.py $${NAME:+--name="$$NAME"} -- "$${words[@]}"

experiments: $(READY) ## list the experiments on the current commit: changed params, scores, losses
	@python tools/experiments.py

compare: $(READY) ## A=REV B=REV SAMPLES=N: params, metrics and answers that differ (default: HEAD and the working tree)
	@python tools/compare.py $${SAMPLES:+--samples="$$SAMPLES"} -- "$${A-}" "$${B-}"

card: $(READY) ## BASE=org/name: write the adapter and a model card to reports/adapter, ready to upload to the hub
	@python tools/card.py $${BASE:+--base="$$BASE"}

push: $(READY) ## REPO=org/name BASE=org/name: what an upload of adapter and card to the hub would change; UPLOAD=1 uploads
	@python tools/push.py $${BASE:+--base="$$BASE"} $(if $(filter-out 0,$(UPLOAD)),--upload) -- "$${REPO-}"

bundle: $(READY) ## BASE=org/name: adapter, card, metrics and params in one archive, for `make serve BUNDLE=` elsewhere
	@python tools/bundle.py $${BASE:+--base="$$BASE"}

test-fast: $(READY) ## the quick tests: no vLLM, no training, no pipeline; ARGS= goes to pytest
	@$(call pytest,-m 'not slow and not long')

test: $(READY) ## everything a change must pass; ARGS= goes to pytest, e.g. ARGS='-k resume'
	@$(call pytest,-n 2 --dist loadgroup -m 'not long')

test-long: $(READY) ## 20 kills, a minute of load, NxD's own code (NXD_SOURCE=, NXD_SITE=), speed; ARGS= goes to pytest
	@$(call pytest,-m long)
	@$(BENCHMARKS)

check-metrics: $(READY) ## the last run's metrics against those that HEAD holds, within tolerances for another processor
	@python tools/check_metrics.py

lint: $(READY) ## ruff and mypy
	@ruff check
	@ruff format --check
	@mypy

deps: $(READY) ## write the code that each stage depends on into dvc.yaml, from the imports
	@python tools/write_deps.py

serve: $(READY) ## base model and adapter behind vLLM's OpenAI-compatible server; HOST= PORT= REPLICAS= ADAPTERS="name=path …" BUNDLE=
	@words=($${ADAPTERS-}); python tools/serve.py $(SERVED) $${REPLICAS:+--replicas="$$REPLICAS"}

load: $(READY) ## ADAPTERS="other=path": add adapters to the running server, where serve.runtime_adapters allows it
	@words=($${ADAPTERS-}); python tools/load_adapter.py $(SERVER) -- "$${words[@]}"

smoke: $(READY) ## ask the running server one question of base and adapter; HOST= PORT= as for serve
	@python tools/smoke.py $(SERVER)

lm-eval: $(READY) ## TASKS="facts …": score the running server's base model and adapter with lm-evaluation-harness; LIMIT=N
	@words=($${TASKS-}); python tools/lm_eval.py $(SERVER) $${LIMIT:+--limit="$$LIMIT"} -- "$${words[@]}"

ui: $(READY) ## base and adapters side by side in the browser, on the running server or one that it starts; as for serve
	@words=($${ADAPTERS-}); python tools/ui.py $(SERVED)

chat: $(READY) ## a conversation with a model of the running server in the terminal; MODEL=name (default: tuned)
	@python tools/chat.py $(SERVER) $${MODEL:+--model="$$MODEL"}

doctor: $(READY) ## check that the pipeline and the server can run on this machine with params.yaml
	@python tools/doctor.py

device-check: $(READY) ## ten steps of a tiny model on the CPU and on the active backend, compared; the first thing on a new machine
	@python tools/device_check.py

plan: $(READY) ## PROFILE=name NODES="1 2 4" SEARCH=1: memory, steps, time; SEARCH ranks layouts (default: params.yaml)
	@words=($${NODES-}); python tools/plan.py $${PROFILE:+--profile="$$PROFILE"} "$${words[@]/#/--nodes=}" $(if $(filter-out 0,$(SEARCH)),--search)

precompile: $(READY) ## Trainium: compile the training graphs before the run, into neuron.compile_cache
	@python tools/precompile.py

profile: $(READY) ## NAME=llama3-8b-trn2-nxd: write params.yaml from profiles/NAME.yaml and the profiles it extends
	@python tools/write_profile.py -- "$${NAME-}"

bench: $(READY) ## the benchmarks: ratios to a baseline of the same run
	@$(BENCHMARKS)

profile-train: $(READY) ## where a training step's time goes
	@python bench/profile_train.py

pull-results: $(READY) ## REV=commit: that run's adapter, answers and metrics from the DVC remote into reports/REV
	@python tools/pull_results.py -- "$${REV-}"

lock: $(READY) ## compile pyproject.toml's dependency groups into requirements.lock
	@tools/environment.sh lock

audit: $(READY) ## known vulnerabilities of the locked packages, asked of osv.dev
	@python tools/audit.py
