# make demo · make test · make lint · make bench · make soak    (each makes .venv first; Python >= 3.10)
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test soak lint bench clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	pip install --quiet -r requirements-dev.txt
	touch $@

test: .venv/installed-dev
	python -m pytest -m "not soak"

soak: .venv/installed-dev
	python -m pytest -m soak

lint: .venv/installed-dev
	ruff check .
	ruff format --check .

clean:
	rm -rf .venv demo
