# `make help` lists the targets. Everything runs in .venv, which the first target creates; `make gpu` alone uses
# the Python it is given, creates no .venv and downloads nothing.

# The Python that creates .venv: the first of these that starts and is new enough for the pins in requirements.txt.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$python && break; done)
# The Python of `make gpu`: one that already has a torch built for the GPU.
GPU_PYTHON ?= python3
# What pip installs as PyTorch: a matched pair. For another build or release run `make clean` and override it,
# e.g. make test TORCH="torch==2.11.0 triton==3.6.0", or name a local wheel.
TORCH ?= torch==2.13.0 triton==3.7.1
# Models whose blocks the tests convert, in a folder of their own: without what they need to load weights they are no
# whole installation, and torchvision's operators do not load beside a PyTorch for the CPU.
ZOO := timm==1.0.31 torchvision==0.28.0
# More arguments, e.g. make test ARGS="-k masked -x".
ARGS ?=
# The tests on one worker a core, and not on more than pay: ARGS="-n 0" runs them in this process, for a debugger.
WORKERS := -n auto --maxprocesses 4

# Another release of Triton for `make gate`, beside the pinned one: GPU machines have their own.
TRITON ?=
OTHER_TRITON := build/triton-$(TRITON)

# Not dynconv-pose, whose maps at batch 32 take 14 GB.
SHAPES := resnet50 mobilenetv2 lasnet sige-ddpm sbnet laudnet linear
# Filters of pixels. Not ddf and carafe, whose idioms take minutes and gigabytes.
FILTERS := involution dcn
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
BENCH := build/bench
# Whose kernels are modelled: the 3x3 layers of residual networks, masked and gathered, and filters of pixels.
MODELLED := resnet50 .*3x3|groups of 16 .*3x3|involution|dcn

.DEFAULT_GOAL := help
.PHONY: help test lint format docs verify gate model bench demo gpu clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

test: lint ## lint, check the format and run every test that needs no GPU
	$(RUN) -m pytest $(WORKERS) $(ARGS)

lint: $(STAMP) ## check style and format, change nothing
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(STAMP) ## apply the format and the safe fixes
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

docs: $(STAMP) ## build the documentation into build/docs, every warning an error; needs no network
	$(RUN) -m sphinx --quiet --fresh-env --fail-on-warning --keep-going --builder html docs build/docs

verify: $(STAMP) ## compare every op with its dense reference on this machine
	$(RUN) -m dynconv verify $(ARGS)

gate: $(STAMP) $(if $(TRITON),$(OTHER_TRITON)) ## compile every kernel for GPUs that are not here; TRITON=3.6.0 for another release
	$(if $(TRITON),PYTHONPATH=$(OTHER_TRITON)) $(RUN) -m pytest -n 0 tests/test_compile_gate.py $(ARGS)

model: $(STAMP) ## predict from their machine code what the kernels take on an H100: docs/gpu-model.md
	$(RUN) -m dynconv roofline --kernels --device H100 --dtype bfloat16 --shapes resnet50 laudnet involution dcn \
		--layers '$(MODELLED)' --density 0.25 --modes plain in-place --markdown docs/gpu-model.md $(ARGS)

build/triton-%: $(STAMP)
	$(RUN) -m pip install --quiet --no-deps --target $@ triton==$*

bench: $(STAMP) ## measure dense against dynconv, then run the demo; results in build/bench/
	$(RUN) -m dynconv bench --networks all --json $(BENCH)/networks.json
	$(RUN) -m dynconv bench --shapes $(SHAPES) --density 0.75 0.5 0.25 0.1 --json $(BENCH)/bench.json --plot $(BENCH)/bench.png \
		--scaling $(BENCH)/scaling.png $(ARGS)
	$(RUN) -m dynconv bench --shapes $(FILTERS) --json $(BENCH)/filters.json --plot $(BENCH)/filters.png
	$(RUN) -m dynconv demo --out $(BENCH)

demo: $(STAMP) ## a photo through networks that compute only what matters or changed; pictures in build/bench/
	$(RUN) -m dynconv demo --out $(BENCH) $(ARGS)

gpu: ## on a GPU machine, with GPU_PYTHON: tests, sanitizers, benchmarks; call again until all is done
	$(GPU_PYTHON) benchmarks/gpu.py $(ARGS)

clean: ## remove .venv, build products and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find dynconv kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# The stamp makes the second call fast, and a changed requirement install again. --no-build-isolation: the pinned
# setuptools builds, nothing else is fetched. `pip check` proves that the pins meet what pyproject.toml asks for.
$(STAMP): requirements.txt pyproject.toml setup.py Makefile
	@$(or $(wildcard $(RUN)),$(PYTHON),false) -c '$(NEW_ENOUGH)' || { echo "make: requirements.txt needs Python 3.11 or \
	newer, found $(or $(wildcard $(RUN)),$(PYTHON),none); name one, e.g. make test PYTHON=/usr/bin/python3.12" >&2; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check $(TORCH) -r requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(RUN) -m pip check
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/zoo $(ZOO)
	touch $@
