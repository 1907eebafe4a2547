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
CHECKPOINT_STEPS ?= 1200

# Threads that wait for one another by spinning bring torch to a crawl on a machine that does other work besides.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help demo test test-all test-newest lint bench checkpoint checkpoint-code install install-dev lock docs types release
.DEFAULT_GOAL := help

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## train, compare, generate, save a learned context (6 to 12 minutes on 2 cores)
	$(BIN)/ttt-e2e demo $(ARGS)

test: lint types ## linter, types, and tests without the slow ones (at most 10 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-all: lint types ## linter, types and all tests, the slow ones included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "" $(ARGS)

test-newest: $(NEWEST)/bin/python ## tests with the newest releases, torch excepted; ends in a table of what broke
	$(NEWEST)/bin/python tools/newest.py install --torch "$(TORCH)"
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python tools/newest.py test $(NEWEST_TESTS) -n $(WORKERS) $(ARGS)

lint: $(INSTALLED_DEV) ## linter and formatter, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(INSTALLED) ## time and memory of training, reading and decoding against the plain model
	$(BIN)/ttt-e2e bench $(ARGS)

# The same files are kept from training as are measured. encodings holds near-copies of one another.
HELD_OUT = from ttt_e2e.data import split_documents, standard_library_documents as documents; \
	split_documents(documents(), 8, ["encodings"])[1].select_columns(["text"]).to_json("$(RESULTS)/held-out.jsonl")
RUN = $(CHECKPOINT_RUNS)/$(CHECKPOINT)
RESULTS = $(CHECKPOINT_RUNS)/results
MEASURED = --model $(RUN) --model $(RUN)@learning-off --data $(RESULTS)/held-out.jsonl --documents 24 --dtype bfloat16
READ = held-out files of the standard library

checkpoint: $(INSTALLED) ## train, evaluate and export the small model of model_cards/checkpoints
	$(BIN)/ttt-e2e train --model tiny --recipe pretrain-tiny --data standard-library --output $(RUN) \
		--set data.validation_every=8 --set "data.training_only=[encodings]" \
		--set training.max_steps=$(CHECKPOINT_STEPS) $(if $(wildcard $(RUN)/run.json),--resume)
	@mkdir -p $(RESULTS) && $(BIN)/python -c '$(HELD_OUT)'
	$(BIN)/ttt-e2e evaluate context-length --lengths 512,1024,2048,4096 --output $(RESULTS)/context-length $(MEASURED)
	$(BIN)/ttt-e2e evaluate loss-by-position --lengths 4096 --output $(RESULTS)/loss-by-position $(MEASURED)
	$(BIN)/ttt-e2e export --model $(RUN) --dtype bfloat16 --license apache-2.0 --output $(CHECKPOINT_FOLDER)/$(CHECKPOINT) \
		--results "$(READ)=$(RESULTS)/context-length" --results "$(READ)=$(RESULTS)/loss-by-position"

checkpoint-code: $(INSTALLED) ## write the code of the small model, and what else it repeats of the package
	$(BIN)/python -c 'from ttt_e2e.model_cards import refresh_export as refresh; refresh("$(CHECKPOINT_FOLDER)/$(CHECKPOINT)")'

install: $(INSTALLED) ## only the set-up
install-dev: $(INSTALLED_DEV) ## only the set-up, with what the tests need

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
