# Two commands matter: `make demo` and `make test`. Each sets up what is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Two ranks and an engine take some 4 GiB.
FREE_MIB := $(shell awk '/MemAvailable/ {print int($$2 / 1024)}' /proc/meminfo)
CONFIG ?= $(if $(shell test $(FREE_MIB) -ge 5000 && echo roomy),configs/tiny.yaml,configs/tiny_one_rank.yaml)

DRY_RUN ?= --dry-run

.PHONY: demo test test-slow sglang chaos check fmt setup package images run-remote register constraints clean
.DEFAULT_GOAL := demo

demo: $(READY)  ## prompts -> trained, evaluated and registered draft, on this machine
	PATH="$(abspath $(BIN)):$$PATH" pyflyte run workflows/train_draft.py train_draft --inputs-file $(CONFIG)

test: $(READY)  ## units, contracts, integration on a local Ray, Flyte
	$(BIN)/pytest -q

test-slow: $(READY)  ## what `make test` leaves out, a few minutes
	$(BIN)/pytest -q -m slow

sglang: $(VENV)/.sglang  ## SGLang without a GPU: for configs/tiny_sglang.yaml and its tests

$(VENV)/.sglang: $(READY) tools/sglang_cpu.txt
	$(BIN)/python -m pip install --quiet --no-deps -r tools/sglang_cpu.txt
	touch $@

chaos: $(READY)  ## the long form of the fault injection, some 25 minutes
	$(BIN)/pytest -q -s tests/integration/test_chaos.py --faults 60

check: $(READY)  ## lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(READY)

$(READY): pyproject.toml constraints.txt tools/system_libraries.sh
	sh tools/system_libraries.sh
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[cpu,dev]'
	touch $(READY)

IMAGES := --image default=torchspec-flyte:cpu --image gpu=torchspec-flyte:gpu
VERSION ?= $(or $(shell git describe --always --dirty --abbrev=40 --exclude="*" 2>/dev/null),unversioned)

package: $(READY)  ## everything that a Flyte cluster registers, offline
	mkdir -p build
	$(BIN)/pyflyte --pkgs workflows package $(IMAGES) --output build/flyte-package.tgz -f

register: $(READY)  ## what would be registered; DRY_RUN= registers it
	FLYTECTL_CONFIG=flyte.config.yaml $(BIN)/pyflyte register $(DRY_RUN) --copy none --version $(VERSION) $(IMAGES) workflows

run-remote: $(READY)  ## start the pipeline on the cluster of flyte.config.yaml
	FLYTECTL_CONFIG=flyte.config.yaml $(BIN)/pyflyte run --remote --copy all workflows/train_draft.py train_draft --inputs-file $(CONFIG)

images: $(READY)  ## the two images of the tasks, with Docker
	docker build --target cpu --build-arg COMMIT=$(VERSION) --tag torchspec-flyte:cpu .
	docker build --target gpu --build-arg COMMIT=$(VERSION) --tag torchspec-flyte:gpu .

constraints: $(READY)  ## pin what this environment has
	{ head -n 1 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed "s/+cpu$$//" | grep -vxFf tools/sglang_cpu.txt; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf build torchspec-data .mypy_cache .ruff_cache .pytest_cache
