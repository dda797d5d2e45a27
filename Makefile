# make demo · make test · make lint · make bench · make soak    (each makes .venv first; Python >= 3.10)
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Quiet, but for errors: no progress bars, warnings about where pip looked, or news of a newer pip.
PIP := pip install -qq --disable-pip-version-check --root-user-action ignore

.PHONY: demo test soak lint bench clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	@echo "installing requirements.txt into .venv; this takes some minutes"
	$(PIP) -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt tests/report/spacy_model.txt .venv/installed
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-deps -r tests/report/spacy_model.txt
	touch $@

# What reads the base model's file; the tests need it too.
.venv/installed-demo: .venv/installed requirements-dev.txt
	$(PIP) "$$(grep '^gguf' requirements-dev.txt)"
	touch $@

# A pretrained LLaMA, fine-tuned by two processes on the CPU; docs/recipe.md says what this shows and what it does not.
# BASE=<a directory or Hub id> takes another base, BASE=tiny random weights that need no download.
BASE ?= smollm2
demo: export OMP_NUM_THREADS := 1# a process; torchrun would set the same, and say so in a banner
demo: .venv/installed-demo
	@python -m alpaca.demo.run --base "$(BASE)"

# Two files of tests side by side, each in one thread (tests/conftest.py).
test: .venv/installed-dev
	python -m pytest -n 2 --dist loadfile -m "not soak"

soak: .venv/installed-dev
	python -m pytest -m soak

# Each ends in a line of JSON; benchmarks/README.md has results.
bench: .venv/installed-dev
	python benchmarks/bench_train.py
	python benchmarks/bench_tokenize.py
	python benchmarks/bench_weight_diff.py
	python benchmarks/bench_dedup.py
	python benchmarks/bench_growth.py
	python benchmarks/bench_rate_gate.py
	python benchmarks/bench_resume.py
	python benchmarks/bench_startup.py
	python benchmarks/simulate_scale.py

lint: .venv/installed-dev
	ruff check .
	ruff format --check .

clean:
	rm -rf .venv demo
