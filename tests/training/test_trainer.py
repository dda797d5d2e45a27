"""Whole runs of the Trainer in this process: whatever the batches, the steps are those of 2023."""

import accelerate
import pytest
import torch

import train
from alpaca.data.examples import SupervisedDataset
from alpaca.training.batches import (
    DataCollatorForSupervisedDataset,
    DataCollatorWithoutPadding,
)
from tests.conftest import run
from tests.training import courses
from tests.training.conftest import tiny
from tests.training.courses import assert_same_course

pytestmark = pytest.mark.usefixtures("one_thread")


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def run_trainer(tokenizer, examples, out, padding_free, balance_tokens, resume=None, before=None, **options):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "save_strategy": "no", **options}
    args = train.TrainingArguments(
        output_dir=str(out), use_cpu=True, num_train_epochs=2, logging_steps=1, learning_rate=1e-3, **options
    )
    trainer = train.AlpacaTrainer(
        model=tiny(tokenizer),
        args=args,
        train_dataset=examples,
        eval_dataset=examples,
        data_collator=DataCollatorWithoutPadding() if padding_free else DataCollatorForSupervisedDataset(tokenizer),
        balance_tokens=balance_tokens,
    )
    if before:
        before(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def plain(tokenizer, examples, tmp_path_factory):
    """Two epochs of padded, unbalanced batches, 8 examples a step, the last step of each epoch of 5."""
    trainer = run_trainer(tokenizer, examples, tmp_path_factory.mktemp("plain"), False, False)
    assert len(logged(trainer)) == 6
    return trainer


@pytest.mark.parametrize(
    ("padding_free", "balance_tokens", "options"),
    [
        (True, False, {}),
        (False, True, {}),
        (True, True, {"dataloader_num_workers": 2, "gradient_checkpointing": True}),
        (True, True, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}),
    ],
)
def test_every_step_has_the_loss_of_plain_batches(
    padding_free, balance_tokens, options, plain, tokenizer, examples, tmp_path
):
    trainer = run_trainer(tokenizer, examples, tmp_path, padding_free, balance_tokens, **options)
    for figure in ("loss", "grad_norm"):
        assert_same_course([step[figure] for step in logged(trainer)], [step[figure] for step in logged(plain)])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=3e-3)


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("balance_tokens", [True, False])
def test_record_numbers_reach_the_watch_and_not_the_model(padding_free, balance_tokens, tokenizer, examples, tmp_path):
    noted, given = [], set()

    def listen(trainer):
        add = trainer.watch.add_micro_batch
        trainer.watch.add_micro_batch = lambda inputs, records, loss: (
            noted.extend(records) or add(inputs, records, loss)
        )
        trainer.model.register_forward_pre_hook(lambda module, args, named: given.update(named), with_kwargs=True)

    trainer = run_trainer(tokenizer, examples, tmp_path, padding_free, balance_tokens, before=listen)
    trainer.evaluate()
    assert sorted(noted) == sorted([*examples.rows] * 2)  # two epochs
    assert "input_ids" in given and "records" not in given


def test_resuming_inside_the_second_epoch_goes_on_with_its_batches(tokenizer, examples, tmp_path):
    whole = run_trainer(tokenizer, examples, tmp_path, True, True, save_strategy="steps", save_steps=4)
    resumed = run_trainer(tokenizer, examples, tmp_path, True, True, resume=str(tmp_path / "checkpoint-4"))
    assert [entry["loss"] for entry in logged(resumed)] == [entry["loss"] for entry in logged(whole)]
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_going_on_inside_an_epoch_loads_no_example_of_what_it_skips(tokenizer, examples, tmp_path, monkeypatch):
    loaded, load = [], SupervisedDataset.__getitem__
    monkeypatch.setattr(SupervisedDataset, "__getitem__", lambda self, index: loaded.append(index) or load(self, index))
    trainer = train.AlpacaTrainer(
        model=tiny(tokenizer),
        args=train.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=1),
        train_dataset=examples,
        data_collator=DataCollatorWithoutPadding(),
        balance_tokens=True,
    )
    loader = trainer.get_train_dataloader()
    assert len(loader) == len(examples)
    batches = list(accelerate.skip_first_batches(loader, len(examples) - 3))
    assert len(batches) == len(loaded) == 3


@pytest.mark.soak  # six jobs of two processes
@pytest.mark.timeout(900)
def test_two_processes_with_incomplete_steps_resume_and_match_one(llama, few_records, tmp_path):
    flags = [
        *("train.py", "--model_name_or_path", llama, "--data_path", few_records, "--num_train_epochs", "2"),
        *("--per_device_train_batch_size", "2", "--logging_steps", "1", "--model_max_length", "160"),
    ]

    def losses(name, *more, processes=0):
        result = run(*flags, *more, "--output_dir", tmp_path / name, processes=processes)
        assert result.returncode == 0, result.stderr[-3000:]
        return courses.losses(tmp_path / name)

    plain = losses("plain", "--padding_free", "False", "--balance_tokens", "False", "--gradient_accumulation_steps", 4)
    two = ["--gradient_accumulation_steps", 2]
    assert_same_course(losses("two", *two, "--save_steps", 4, processes=2), plain)
    resumed = losses("more", *two, "--resume_from_checkpoint", tmp_path / "two" / "checkpoint-4", processes=2)
    assert_same_course(resumed, plain)
