"""What a run is: its record, and what it can't change when it goes on from a checkpoint."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from alpaca.common import ROOT, ExitCode, ExpectedError, jdump
from alpaca.weights.files import sha256_of_file

RUN = "run.json"

# What checkpoints keep of a run, in words.
_IDENTITY = {
    "lora": "LoRA rank, alpha and target modules",
    "base": "base model (--model_name_or_path)",
    "examples": "examples (--data_path, --val_size, --model_max_length, the tokenizer)",
}


def identity_of(model_args: Any, dataset: Any, base: str | None) -> dict[str, Any]:
    """What a run can't change when it goes on from a checkpoint. `base`: the base model's fingerprint."""
    lora = [model_args.lora_r, model_args.lora_alpha, model_args.lora_target_modules] if model_args.lora_r else None
    examples = xxhash.xxh3_128(np.ascontiguousarray(dataset.texts.ids))
    for numbers in (dataset.texts.lengths, dataset.texts.prompt_lengths, dataset.rows):
        examples.update(np.ascontiguousarray(numbers))
    return {"lora": lora, "base": base, "examples": examples.hexdigest()}


def check_identity(checkpoint: Path, begun_with: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise ExpectedError (exit 2) where a checkpoint is another run's. What is not recorded is not compared."""
    for name, words in _IDENTITY.items():
        before, here = begun_with.get(name, identity[name]), identity[name]
        if before != here and not (name == "base" and None in (before, here)):  # a Hub id has no fingerprint
            values = f" ({before or 'no LoRA'}, now {here or 'no LoRA'})" if name == "lora" else ""
            raise ExpectedError(
                f"{checkpoint} is of a run with other {words}{values}; give what it was begun with, or choose another "
                "--output_dir to start anew",
                ExitCode.USAGE,
            )


def record_run(
    model_args: Any, data_args: Any, training_args: Any, dataset: Any, parameters: int, resumed_from: str | None
) -> None:
    """Write run.json, which says what a run was. `dataset` is the SupervisedDataset that is trained on."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate", "deepspeed", "peft", "tokenizers", "safetensors", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    texts, rows = dataset.texts, dataset.rows
    trained_on = texts.lengths[rows] - texts.prompt_lengths[rows]
    data_path = data_args.data_path
    facts = {
        "arguments": {**vars(model_args), **vars(data_args), **training_args.to_dict()},
        "resumed_from": resumed_from,
        "data": {
            "path": data_path,
            "sha256": sha256_of_file(data_path) if os.path.isfile(data_path) else None,  # a Hub data set has none
            "records": len(texts.lengths),
            "left_out": len(dataset.dropped),
            "examples": len(rows),  # trained on; those of --val_size are not among them
            "tokens": int(texts.lengths[rows].sum()),  # an epoch's
            "label_tokens": int(trained_on.sum()),  # of these, those that are learnt
        },
        "parameters": parameters,
        "processes": training_args.world_size,
        "versions": versions,
        "git": _git_state(),
    }
    jdump(facts, os.path.join(training_args.output_dir, RUN))


def _git_state() -> dict[str, Any] | None:
    """{"commit", "changed": files that differ from it}, or None where this is no git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", os.fspath(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no").splitlines()
        return {"commit": git("rev-parse", "HEAD").strip(), "changed": [line[3:] for line in changed]}
    except (OSError, subprocess.SubprocessError):
        return None
