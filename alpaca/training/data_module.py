"""The data of a run: read once for all processes, some of it held out, and shown on request."""

import os
import sys
from typing import Any

import numpy as np

from alpaca.common import ExitCode, ExpectedError, notice
from alpaca.data.examples import IGNORE_INDEX, SupervisedDataset
from alpaca.training.batches import DataCollatorForSupervisedDataset
from alpaca.training.processes import once_for_all_ranks

_HOLD_OUT_SEED = 42  # fixed apart from --seed: runs with different seeds hold out the same examples


def make_supervised_data_module(tokenizer: Any, data_args: Any) -> dict[str, Any]:
    """{"train_dataset", "eval_dataset" (None without --val_size), "data_collator" (padding)}, ready for the Trainer.

    Rank 0 reads and tokenizes; the other ranks receive its arrays. `attention.choose_collator` does without padding.
    """
    dataset = once_for_all_ranks(lambda: SupervisedDataset(data_args.data_path, tokenizer))
    if dataset.dropped:
        more = f" and {len(dataset.dropped) - 10} more" if len(dataset.dropped) > 10 else ""
        notice(
            f"{len(dataset.dropped)} of {len(dataset.texts.lengths)} examples are left out: none of their response is "
            f"within --model_max_length {tokenizer.model_max_length}: records "
            f"{', '.join(map(str, dataset.dropped[:10]))}{more}"
        )
    full = dataset.lengths == tokenizer.model_max_length
    if cut := int((full & (dataset.last_tokens != tokenizer.eos_token_id)).sum()):
        notice(
            f"{cut} of {len(dataset)} examples are longer than --model_max_length {tokenizer.model_max_length} and "
            "lose their end, so that they do not teach the model to stop; a larger one costs memory"
        )
    train_dataset, eval_dataset = hold_out(dataset, getattr(data_args, "val_size", 0))
    collator = DataCollatorForSupervisedDataset(tokenizer)
    return {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "data_collator": collator}


def hold_out(dataset: SupervisedDataset, val_size: float) -> tuple[SupervisedDataset, SupervisedDataset | None]:
    """Split off `val_size` examples (a count, or a fraction below 1), the same ones in every run."""
    if not val_size:
        return dataset, None
    count = round(val_size * len(dataset)) if val_size < 1 else int(val_size)
    if val_size < 0 or (count != val_size and val_size >= 1) or not 0 < count < len(dataset):
        raise ExpectedError(
            f"--val_size {val_size:g} of {len(dataset)} examples leaves none to train on or none to evaluate on; "
            "give a count or a fraction below 1",
            ExitCode.USAGE,
        )
    order = np.random.default_rng(_HOLD_OUT_SEED).permutation(len(dataset))
    return dataset.select(np.sort(order[count:])), dataset.select(np.sort(order[:count]))


def show_batch(dataset: SupervisedDataset, tokenizer: Any, count: int) -> None:
    """Print examples as the model will see them; trained tokens in green on a terminal, in «» elsewhere."""
    before, after = ("\033[32m", "\033[0m") if sys.stdout.isatty() and "NO_COLOR" not in os.environ else ("«", "»")
    for index in range(min(count, len(dataset))):
        input_ids, labels = dataset[index]["input_ids"], dataset[index]["labels"]
        trained = int((labels != IGNORE_INDEX).sum())
        print(f"--- record {dataset.rows[index]}: {len(input_ids)} tokens, {trained} of them trained on")
        prompt, whole = tokenizer.decode(input_ids[:-trained]), tokenizer.decode(input_ids)
        # A word that crosses the boundary decodes differently in two parts; then each part is shown for itself.
        response = whole[len(prompt) :] if whole.startswith(prompt) else tokenizer.decode(input_ids[-trained:])
        print(f"{prompt}{before}{response}{after}\n")
