# Everything a user or a developer runs. The first target that needs them installs uv and the packages, with the hashes
# of constraints/ checked; later ones find the stamp files and start at once. There are two lanes: the newest libraries
# in .venv, for all that names no other, and trn1's frozen set in .venv-trn1, for XLA:CPU, SPMD, NxD and SageMaker.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
TRN1 := .venv-trn1
TRACKERS := .venv-trackers
# The first interpreter that runs and can make a virtual environment (a pyenv shim may exist and do neither).
PYTHON ?= $(shell for p in python3.12 python3.13 python3.11 python3.14 python3.10; do \
	$$p -c 'import ensurepip, venv' >/dev/null 2>&1 && command -v $$p && break; done)
# trn1's libraries end with Python 3.12: one of the system, else one that uv downloads.
TRN1_PYTHON ?= >=3.10,<3.13
FIND_TRN1_PYTHON = { test -x $(TRN1)/bin/python || $(BIN)/uv python find --system '$(TRN1_PYTHON)' \
	|| $(BIN)/uv python install 3.11; } >/dev/null 2>&1
NO_TRN1 = SKIPPED the trn1 lane (XLA:CPU, SPMD, contract):
CURRENT_PIP = VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet
# TORCH=cpu: torch's CPU build, without CUDA's libraries, where the package index has one.
TORCH ?= cuda
CURRENT_LOCK := $(if $(filter cpu,$(TORCH)),$(VENV)/cpu-lock.txt,constraints/current.txt)
CURRENT_SET = -c $(CURRENT_LOCK) $(if $(filter cpu,$(TORCH)),--index-strategy unsafe-best-match) -r pyproject.toml
TRN1_PIP = VIRTUAL_ENV=$(CURDIR)/$(TRN1) $(BIN)/uv pip install --quiet
TRN1_SET = -c constraints/trn1.txt -r pyproject.toml --extra xla --extra tests
LOCK = $(BIN)/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-emit-index-url \
	--custom-compile-command "make lock" --upgrade
SOURCES := esm_neuron tests launchers benchmarks tools examples
DEMO := runs/demo
# make demo MODEL=8M: Meta's weights, from the hub, instead of the network in the package; also a hub id or a folder.
MODEL ?= mini
DEMO_MODEL = $(if $(filter 8M,$(MODEL)),facebook/esm2_t6_8M_UR50D --optim.lr 1.0e-3,$(MODEL))
PAGE := docs/dev/parity.md
DATA := data
BENCH_BATCH := 8
GPU_BENCH = $(BIN)/python benchmarks/throughput.py --backend cuda --precision bf16 --keep runs/bench-gpu
DATASETS := scl2205 disorder amyloid_dms
PYTEST = $(BIN)/python -m pytest
TRN1_PYTEST = $(TRN1)/bin/python -m pytest
# What trn1's lane runs of the unit suite: the engine and all that reads or writes weights.
TRN1_TESTS := tests/xla $(patsubst %,tests/unit/test_%.py,checkpoint compat convert cli dummy_task esm2 evaluate export \
	lanes loading lora lora_layers neuron_env nxd_contract optim other_trainers packaging quantize ranks saving score tasks tensor_parallel \
	trainer trn1_report two_processes weights)

.PHONY: help install install-trn1 demo test test-current test-trn1-lane lint type format clean \
	test-nxd test-peers test-gpu test-trn1 rehearse-trn1 test-launchers test-images test-hub test-trackers fuzz audit soak faults long-run \
	pages parity results bench bench-speed bench-scale bench-smoke bench-gpu gpu-day lock dist release-check

##@ Daily
help: ## list the targets
	@awk -F ':.*## ' '/^##@ / {printf "%s%s\n", gap, substr($$0, 5); gap = "\n"} \
		/^[a-z0-9-]+:.*## / {printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## set up .venv with uv and the newest packages, hashes checked (PYTHON=..., TORCH=cpu: without CUDA)

install-trn1: $(TRN1)/.installed ## set up .venv-trn1 with the packages of a trn1 and torch_xla (TRN1_PYTHON=...: 3.10 to 3.12)

demo: $(VENV)/.package ## fine-tune on real proteins with LoRA on the CPU, then predict: 6 to 14 minutes on 2 cores (MODEL=8M: Meta's)
	rm -rf $(DEMO)
	$(BIN)/esm-neuron train --config configs/demo.yaml --output $(DEMO) --model.name $(DEMO_MODEL)
	$(BIN)/esm-neuron predict --model $(DEMO) --input examples/demo/unknown.fasta --output $(DEMO)/predictions.csv
	@printf '%-12s %s\n' results $(DEMO)/result.json log $(DEMO)/metrics.jsonl checkpoints $(DEMO)/checkpoints \
		adapter $(DEMO)/adapter predictions $(DEMO)/predictions.csv config $(DEMO)/config.yaml

test: test-current test-trn1-lane ## both of the next; suites that need more are skipped and say so

test-current: $(VENV)/.installed ## all tests of the CPU, with the newest libraries
	$(PYTEST) -n 2 --dist loadfile

test-trn1-lane: $(VENV)/.uv ## XLA:CPU, SPMD, NxD's contract and a core of the unit tests, with trn1's libraries
	@if test "$$(uname -sm)" != "Linux x86_64"; then \
		echo "$(NO_TRN1) torch_xla has wheels for Linux on x86-64 alone; run make test-trn1-lane there"; \
	elif ! $(FIND_TRN1_PYTHON); then \
		echo "$(NO_TRN1) no Python 3.10, 3.11 or 3.12 here, and none to download; install one, with"; \
		echo "  $(BIN)/uv python install 3.11 && make test-trn1-lane"; \
	else \
		$(MAKE) --no-print-directory $(TRN1)/.installed; \
		$(TRN1_PYTEST) -n 2 --dist loadfile $(TRN1_TESTS); \
	fi

lint: $(VENV)/.installed ## ruff, the one-way imports, and whether the pages in docs/ are current (parity: a warning)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/lint-imports
	$(BIN)/python tools/pages.py --check
	$(BIN)/python tools/parity_page.py

# For the Python that is there: what numpy's stubs say depends on it.
type: $(VENV)/.installed ## mypy, strict
	$(BIN)/mypy --python-version $$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')

format: $(VENV)/.installed ## rewrite the code in the house style
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean: ## remove the environments, caches and demo runs
	rm -rf $(VENV) $(TRN1) $(TRACKERS) $(DEMO) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

##@ Suites: other libraries or hardware, a network, or hours
test-nxd: $(TRN1)/.nxd-tests ## the real neuronx-distributed on gloo: NXD_SRC=<its source folder>
	$(TRN1_PYTEST) -m nxd

test-gpu: $(VENV)/.installed ## on a CUDA GPU
	$(PYTEST) -m gpu

test-trn1: ## an hour on a trn1 instance (TRN1_MINUTES=...), in the active environment (constraints/neuron.txt): writes docs/dev/trn1-report.md
	python -m pytest -m trn1 tests/trn1

rehearse-trn1: $(TRN1)/.installed ## the hour of test-trn1 on XLA:CPU, with small models: half an hour
	mkdir -p runs
	TRN1_REHEARSAL=1 TRN1_REPORT=runs/trn1-rehearsal.md $(TRN1_PYTEST) -m trn1 tests/trn1

test-launchers: $(TRN1)/.launchers-tests ## the launchers: nodes on this machine, SageMaker's containers, a stand-in for AWS
	PATH="$(CURDIR)/$(TRN1)/bin:$$PATH" $(TRN1_PYTEST) -m launchers tests/launchers

test-images: $(TRN1)/.launchers-tests ## build the images of launchers/, as root, with Debian's buildah and debootstrap: fetches 9 GB of packages, needs 30 GB of disk
	$(TRN1_PYTEST) -m images tests/launchers/test_images.py

test-hub: $(VENV)/.installed ## real checkpoints, downloaded from the Hugging Face hub
	HF_HUB_OFFLINE=0 $(PYTEST) -m hub

test-trackers: $(TRACKERS)/.installed ## wandb offline, an MLflow server on loopback, the Snakemake example: three environments, 0.8 GB
	MLFLOW=$(CURDIR)/$(TRACKERS)/mlflow/bin/mlflow SNAKEMAKE=$(CURDIR)/$(TRACKERS)/snakemake/bin/snakemake \
		$(TRACKERS)/bin/python -m pytest -m trackers tests/trackers

test-peers: $(VENV)/.installed $(TRN1)/.installed ## transformers' and PEFT's own common tests on our pooled models and on Hugging Face's: fetches their source archives
	$(BIN)/python tools/peers.py
	$(BIN)/python tools/peers.py $(TRN1)/bin/python

fuzz: $(VENV)/.installed ## 10,000 cases of each input format, settings, variants and checkpoints, from new seeds: 1 to 2 hours
	rm -f benchmarks/results/fuzz.json
	FUZZ_CASES=10000 FUZZ_COUNTS=benchmarks/results/fuzz.json $(PYTEST) -n 2 tests/unit/test_fuzz_*.py

audit: $(VENV)/.installed ## bandit over our code, pip-audit over the packages of both locks (asks PyPI's advisory service)
	$(BIN)/bandit -q -c pyproject.toml -r esm_neuron launchers
	for lane in current trn1; do \
		$(BIN)/pip-audit -r constraints/$$lane.txt --require-hashes --disable-pip --progress-spinner off; done

soak: $(VENV)/.installed ## kill training at 8 random moments in each of 17 modes, resume it, compare with runs that were not killed
	$(BIN)/python benchmarks/soak.py

faults: $(TRN1)/.installed ## break things on purpose: what training says, what it leaves, how it goes on; some faults need root
	$(TRN1)/bin/python benchmarks/faults.py

long-run: $(VENV)/.installed $(TRN1)/.installed ## an hour of tiny training, half on the CPU, half on XLA:CPU: does memory grow, or files, threads, graphs?
	$(BIN)/python benchmarks/long_run.py
	$(TRN1)/bin/python benchmarks/long_run.py --backend xla

##@ Pages, benchmarks, releases
pages: $(VENV)/.installed ## write the pages that are made from the code or from saved results
	$(BIN)/python tools/pages.py

parity: $(TRN1)/.nxd-tests ## run test-nxd and write docs/dev/parity.md (PAGE=...) from what it saw
	PARITY_PAGE=$(PAGE) $(TRN1_PYTEST) -m nxd

results: $(VENV)/.installed $(DATASETS:%=$(DATA)/%.tsv.gz) ## train every task on real data, with baselines, and write docs/results.md: hours on 2 cores
	$(BIN)/python benchmarks/results.py --data $(DATA)

bench: $(VENV)/.installed $(TRN1)/.installed $(DATA)/scl2205.tsv.gz ## measure all of docs/performance.md: about 3 hours on 2 cores that do nothing else
	$(BIN)/python benchmarks/throughput.py --repeats 5
	$(TRN1)/bin/python benchmarks/throughput.py --backend xla --precision fp32 --rows 128 --repeats 3 --peer-repeats 1
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/packed_accuracy.py
	$(BIN)/python benchmarks/throughput.py --shape esm2_t30_150M --precision fp32 --checkpointing on --rows 16 --warmup 1 --settings ours group_by_length
	$(BIN)/python benchmarks/throughput.py --shape esm2_t33_650M --precision fp32 --checkpointing on --rows 6 --batch 2 --warmup 1 --settings ours group_by_length
	$(BIN)/python benchmarks/packing.py --tsv $(DATA)/scl2205.tsv.gz
	$(BIN)/python benchmarks/packing.py --sequences 50000000
	$(BIN)/python benchmarks/profile_step.py

bench-speed: $(VENV)/.installed ## residues per second beside HF Trainer + PEFT on the same proteins, once each: about 12 minutes
	$(BIN)/python benchmarks/throughput.py

bench-scale: $(VENV)/.installed ## how the cost of reading, checking, predicting grows with the data, beside peers: about 10 minutes
	$(BIN)/python benchmarks/scale.py

bench-smoke: $(VENV)/.installed ## whether the benchmarks run: two or three steps of the shape `tiny`, a few minutes
	rm -rf runs/bench-smoke
	$(BIN)/python benchmarks/throughput.py --shape tiny --rows 32 --max-steps 3 --max-residues 126 --output runs/bench-smoke \
		--precision fp32 --adapters none lora qlora --checkpointing off on --keep runs/bench-smoke/kept
	$(BIN)/python benchmarks/growth.py --shape tiny --rows 32 --fixed-rows 32 --fixed-length 62 --max-residues 126 \
		--max-steps 3 --output runs/bench-smoke
	$(BIN)/python benchmarks/packed_accuracy.py --shape tiny --seeds 1 --steps 2 --every 1 --folder runs/bench-smoke \
		--output runs/bench-smoke

gpu-day: $(VENV)/.installed ## all that a CUDA GPU can show in 45 minutes, with tables; SMOKE=--smoke tries it on the CPU
	$(BIN)/python benchmarks/gpu_day.py $(SMOKE)

bench-gpu: $(VENV)/.installed ## 650M on a CUDA GPU (BENCH_BATCH=4 if it has 24 GB): full, LoRA, QLoRA; speed, MFU, peak memory
	@# all three, though a setting fails: HF's widest batches do not fit every GPU. 10 proteins are 8 of our rows of 512.
	@failed=0; \
	$(GPU_BENCH) --shape esm2_t33_650M --rows 1600 --batch $(BENCH_BATCH) --max-steps 52 --adapters none lora qlora \
		--checkpointing off on --compile off on || failed=1; \
	$(GPU_BENCH) --shape esm2_t33_650M --rows 520 --batch 10 --max-residues 510 --max-steps 52 --adapters qlora \
		--checkpointing on || failed=1; \
	$(GPU_BENCH) --shape esm2_t36_3B --rows 416 --batch 8 --max-steps 12 --adapters qlora --checkpointing on \
		--settings ours || failed=1; \
	exit $$failed

lock: $(VENV)/.uv ## resolve constraints/current.txt, trn1.txt and uv.txt again
	$(LOCK) pyproject.toml --extra cuda --extra tests --extra dev -o constraints/current.txt
	$(LOCK) pyproject.toml -c constraints/trn1.in --extra xla --extra cuda --extra sagemaker --extra tests \
		--extra nxd-tests --extra launchers-tests -o constraints/trn1.txt
	$(LOCK) constraints/uv.in -o constraints/uv.txt

dist: $(VENV)/.installed ## build wheel and source archive in dist/, check them, try the wheel in an empty environment of each lane
	rm -rf dist build
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv build --quiet --no-build-isolation --python $(BIN)/python
	$(BIN)/python tools/check_dist.py dist constraints/current.txt $(BIN)/python
	if $(FIND_TRN1_PYTHON); then $(BIN)/python tools/check_dist.py dist constraints/trn1.txt '$(TRN1_PYTHON)'; fi

release-check: lint type test ## what has to hold before a release: the daily checks, and parity pages of this code
	$(BIN)/python tools/parity_page.py --strict

# What the targets above need.
$(VENV)/.uv: constraints/uv.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.10 to 3.14 with venv found; install one or name it: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r constraints/uv.txt
	touch $@

$(VENV)/cpu-lock.txt: $(VENV)/.uv constraints/current.txt tools/cpu_lock.py
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/python tools/cpu_lock.py constraints/current.txt $@ $(BIN)/uv

$(VENV)/.package: $(VENV)/.uv pyproject.toml constraints/current.txt $(CURRENT_LOCK)
	$(CURRENT_PIP) $(CURRENT_SET)
	$(CURRENT_PIP) --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.installed: $(VENV)/.package
	$(CURRENT_PIP) $(CURRENT_SET) --extra tests --extra dev
	touch $@

$(TRN1)/.installed: $(VENV)/.uv pyproject.toml constraints/trn1.txt
	$(BIN)/uv venv --quiet --allow-existing --python '$(TRN1_PYTHON)' $(TRN1)
	$(TRN1_PIP) $(TRN1_SET)
	$(TRN1_PIP) --no-deps --no-build-isolation -e .
	touch $@

$(TRN1)/.nxd-tests: $(TRN1)/.installed
	$(TRN1_PIP) $(TRN1_SET) --extra nxd-tests
	touch $@

$(TRN1)/.launchers-tests: $(TRN1)/.installed
	$(TRN1_PIP) $(TRN1_SET) --extra sagemaker --extra launchers-tests
	touch $@

# The clients stand beside the packages of .venv; the server and Snakemake pin what they need, so each is on its own.
$(TRACKERS)/.installed: $(VENV)/.installed
	$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python $(TRACKERS)
	$(BIN)/python -c 'import sys; print(f"import site; site.addsitedir({sys.argv[1]!r})")' \
		$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
		> $$($(TRACKERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth
	VIRTUAL_ENV=$(CURDIR)/$(TRACKERS) $(BIN)/uv pip install --quiet -c constraints/current.txt 'wandb>=0.22,<1' 'mlflow-skinny>=3,<4'
	for name in mlflow snakemake; do \
		$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python $(TRACKERS)/$$name; done
	VIRTUAL_ENV=$(CURDIR)/$(TRACKERS)/mlflow $(BIN)/uv pip install --quiet 'mlflow>=3,<4'
	VIRTUAL_ENV=$(CURDIR)/$(TRACKERS)/snakemake $(BIN)/uv pip install --quiet 'snakemake>=9,<10'
	touch $@

$(DATA)/%.tsv.gz: | $(VENV)/.package
	$(BIN)/python examples/datasets/get.py $(firstword $(subst _, ,$*)) --output $(DATA)
