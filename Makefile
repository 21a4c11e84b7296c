# The two commands that matter: `make demo` and `make test`. Each sets up .venv first; the second time is fast.
#   make demo PYTHON=/path/to/python3    make .venv with this one (3.11 or newer; once it is made: after `make clean`)
#   make demo REDO=1                     train the demo again from the start

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_RUN := runs/demo
# Three for two cores, as tests wait for processes. Neighbours go to one worker, which makes what they share once.
PYTEST_ARGS ?= -n 3 --dist worksteal -m "not slow"

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install demo test slow matrix sequences sharded kills endurance families fuzz launches pefts-tests docs notebooks browser wheel release lint clean demo-clean
.DEFAULT_GOAL := help

help:
	@echo "make demo        teach a small language model to write exact JSON, and show what changed"
	@echo "make test        run the tests"
	@echo "make slow        run those that take long, each marked with why: 100, in 5 minutes; CI runs both"
	@echo "make matrix      run every cell of docs/support-matrix.md and write the page anew"
	@echo "make kills       kill runs, merges and exports 200 times, and compare what comes out (20 minutes)"
	@echo "make endurance   2,000 steps on a tiny model, twice; every weight is compared after each"
	@echo "make families    a first run on a tiny model of each family of language models that transformers has"
	@echo "make fuzz        10,000 adapters that were damaged or made to do harm (an hour of one core); CASES=, SEED="
	@echo "make launches    DDP, FSDP2 and ZeRO by torchrun and accelerate launch, with 2 and 4 processes, against one process"
	@echo "make pefts-tests run PEFT's own tests of LoRA with PaCA in its place (three minutes; fetched from the index)"
	@echo "make sequences   2,000 random sequences of operations beside a float64 model (docs/reliability.md)"
	@echo "make sharded     800 of them on models that FSDP2 shards, in 2 and 4 processes (15 minutes)"
	@echo "make docs        the documentation as a site in build/site, from docs/ and the code"
	@echo "make browser     the tests that need a browser (a minute; needs a Chromium: apt install chromium)"
	@echo "make notebooks   run docs/notebooks and keep what they print"
	@echo "make wheel       dist/ for upload; checked, and tried with each Python that is here (a minute)"
	@echo "make release     the same, trained with, also with the oldest libraries allowed (an hour, 12 GB); how to upload"
	@echo "make lint        ruff and mypy"
	@echo "make install     only set up $(VENV)"
	@echo "make demo-clean  remove the demo's run and its data; downloaded packages stay in .cache"
	@echo "make clean       remove $(VENV) and everything that was built or downloaded; runs/ stays"

install: $(STAMP)
	@echo "Ready. For paca on your path: . $(BIN)/activate"

$(STAMP): pyproject.toml tools/make_venv.sh
	@bash tools/make_venv.sh "$(VENV)" "$(PYTHON)"
	@touch $@

demo: $(STAMP)
	@$(BIN)/python -m demo.prepare
	@if [ -n "$(REDO)" ]; then rm -rf $(DEMO_RUN); fi
	@if [ -f $(DEMO_RUN)/summary.json ]; then \
		echo "Trained already; here is the result. To train again: make demo REDO=1"; exit; \
	elif compgen -G "$(DEMO_RUN)/checkpoints/checkpoint-*/whole.json" >/dev/null; then \
		$(BIN)/paca train recipes/demo.yaml --resume; \
	else \
		$(BIN)/paca train recipes/demo.yaml; \
	fi; status=$$?; if [ $$status = 130 ]; then echo "Or: make demo, which goes on from a saved checkpoint"; fi; exit $$status
	@$(BIN)/python -m demo.show

test: $(STAMP)
	@echo "About 8,900 tests; the first results come after a minute ..."
	@# Tests start processes by the hundred: what one of them compiles is kept for the others, whatever is set here.
	@PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

slow: $(STAMP)
	@PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal -m slow

matrix: $(STAMP)
	@OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m support_matrix $(ROWS)

notebooks: $(STAMP)
	@$(BIN)/python -m pip install --quiet --editable ".[notebooks]"
	@$(BIN)/python tools/run_notebooks.py $(if $(MODEL),--model $(MODEL))

browser: $(STAMP)
	@command -v chromium chromium-browser >/dev/null || { echo "There is no chromium here. Debian, Ubuntu: apt install chromium"; exit 1; }
	@$(BIN)/python -m pip install --quiet --editable ".[browser]"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/training/reporting/test_runs_in_browser.py

kills: $(STAMP)
	@OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m kills

endurance: $(STAMP)
	@OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m endurance

families: $(STAMP)
	@OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m families $(NAMES)

pefts-tests: $(STAMP)
	@OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m pefts_tests

fuzz: $(STAMP)
	@PYTHONPATH=tests $(BIN)/python -m hostile_adapters --cases $(or $(CASES),10000) --seed $(or $(SEED),0)

launches: $(STAMP)
	@OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m distributed.launches $(ARGS); one=$$?; \
		OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m distributed.launched_runs && exit $$one

sequences: $(STAMP)
	@OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m operation_sequences --ctrl-c 1 $(ARGS)

sharded: $(STAMP)
	@OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m distributed.sharded_sequences --sequences 500 $(ARGS)
	@OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m distributed.sharded_sequences --sequences 300 --processes 4 $(ARGS)

docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build  # with --quiet its strict mode sees no warning
	@echo "build/site/index.html"

wheel: $(STAMP)
	@$(BIN)/python -m pip install --quiet --editable ".[release]"
	@rm -rf dist && $(BIN)/python -m build --outdir dist . >build.log 2>&1 || { cat build.log; exit 1; }
	@rm build.log
	@$(BIN)/python -m twine check --strict dist/*
	@$(BIN)/python tools/try_wheel.py dist/*.whl

release: wheel
	@$(BIN)/python tools/try_wheel.py dist/*.whl --train
	@$(BIN)/python tools/try_wheel.py dist/*.whl --lowest
	@echo "All of it passed. To publish: git tag, then $(BIN)/python -m twine upload dist/* (CONTRIBUTING.md)"

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

demo-clean:
	rm -rf $(DEMO_RUN) .cache/demo/data

clean:
	rm -rf $(VENV) .cache build dist .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
	find src tests demo -type d -name __pycache__ -prune -exec rm -rf {} +
