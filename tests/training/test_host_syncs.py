"""How often a step waits for the device: on the CPU nothing waits, so what would wait on a GPU is counted."""

import collections

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import TrainerCallback

import train
from alpaca.training.batches import DataCollatorForSupervisedDataset, DataCollatorWithoutPadding
from tests.training.conftest import tiny

READS = {"tolist", "numpy", "cpu", "__array__", "__bool__", "__int__", "__float__", "__index__", "item"}


class CountReads(TorchFunctionMode):
    """Counts tensors that are turned into Python's numbers, or into arrays, or brought to the host."""

    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, function, types, arguments=(), named=None):
        if getattr(function, "__name__", "") in READS:
            self.reads[function.__name__] += 1
        return function(*arguments, **(named or {}))


class CountWaits(TorchDispatchMode):
    """Counts operations that hand the host a value, or whose result's size depends on values."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if any(word in function.name() for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique")):
            self.waits[function.name()] += 1
        return function(*arguments, **(named or {}))


class Boundaries(TrainerCallback):
    """Closes the counts of a step where the next one begins."""

    def __init__(self, *counts):
        self.counts, self.steps = counts, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.on_train_end(args, state, control) if state.global_step else [count.clear() for count in self.counts]

    def on_train_end(self, args, state, control, **kwargs):
        self.steps.append([dict(count) for count in self.counts])
        for count in self.counts:
            count.clear()


def on_the_host(collate):
    """A collator's work is on the CPU anyway, before anything is on the device."""

    class Uncounted(type(collate)):
        def __call__(self, instances):
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                return super().__call__(instances)

    return Uncounted(**vars(collate))


@pytest.mark.parametrize("padding_free", [True, False])
def test_a_step_waits_once_and_no_micro_batch_does(padding_free, tokenizer, examples, tmp_path):
    """Three steps of four micro-batches, each step logged."""
    reads, waits = collections.Counter(), collections.Counter()
    boundaries = Boundaries(reads, waits)
    collate = DataCollatorWithoutPadding(with_lengths=True) if padding_free else None
    trainer = train.AlpacaTrainer(
        model=tiny(tokenizer, attention="sdpa_by_example" if padding_free else "eager"),
        args=train.TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_steps=3,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            logging_steps=1,
            save_strategy="no",
            optim="adamw_torch_fused",  # the other one counts its steps on the host
        ),
        train_dataset=examples,
        data_collator=on_the_host(collate or DataCollatorForSupervisedDataset(tokenizer)),
        balance_tokens=True,
        callbacks=[boundaries],
    )
    with CountReads(reads), CountWaits(waits):
        trainer.train()
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == 3
    assert len(boundaries.steps) == 3
    for counts in boundaries.steps[:-1]:  # behind the last one stands the end of training
        assert counts == [{"tolist": 1}, {}], boundaries.steps
