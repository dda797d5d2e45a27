"""Whole runs of the Trainer in this process: whatever the batches, the steps are those of 2023."""

import json

import accelerate
import pytest
import torch
import transformers

import train
from alpaca.data.examples import IGNORE_INDEX, SupervisedDataset
from alpaca.training.batches import (
    DataCollatorForSupervisedDataset,
    DataCollatorWithoutPadding,
)
from alpaca.training.data_module import hold_out
from alpaca.training.special_tokens import complete_tokenizer, resize_embeddings
from tests.conftest import run
from tests.training import courses, forked
from tests.training.conftest import tiny
from tests.training.courses import assert_same_course


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


# --- evaluation ---


@torch.no_grad()
def loss_over_all_tokens(model, examples):
    """The slow, obvious one: an example at a time."""
    total = tokens = 0
    for row in examples:
        logits = model(row["input_ids"][None], use_cache=False).logits[0, :-1].float()
        labels = row["labels"][1:]
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum").item()
        tokens += (labels != IGNORE_INDEX).sum().item()
    return total / tokens


@pytest.fixture(scope="module")
def expected_loss(tokenizer, examples):
    return loss_over_all_tokens(tiny(tokenizer), examples)


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"per_device_eval_batch_size": 1},
        {"per_device_eval_batch_size": 4},  # 21 examples: uneven
        {"per_device_eval_batch_size": 100, "dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        {"per_device_eval_batch_size": 4, "label_smoothing_factor": 1e-9},  # the library's loss
    ],
    ids=str,
)
def test_eval_loss_is_the_mean_over_all_tokens(padding_free, options, tokenizer, examples, expected_loss, tmp_path):
    trainer = train.AlpacaTrainer(
        model=tiny(tokenizer),
        args=train.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options),
        eval_dataset=examples,
        data_collator=DataCollatorWithoutPadding() if padding_free else DataCollatorForSupervisedDataset(tokenizer),
        balance_tokens=True,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected_loss, rel=1e-5)
    assert trainer.evaluate(examples.select([3]))["eval_loss"] == pytest.approx(
        loss_over_all_tokens(trainer.model, examples.select([3])), rel=1e-5
    )


def test_eval_loss_is_the_training_loss_and_picks_the_best(tokenizer, examples, expected_loss, tmp_path):
    """Nothing is learnt; the loss is rounded in the log. What the best is told by is the figure of `evaluate`."""
    options = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "optim": "sgd"}
    options |= {"metric_for_best_model": "loss", "per_device_eval_batch_size": 3, "weight_decay": 0.0}
    step = {"per_device_train_batch_size": 21, "gradient_accumulation_steps": 1}
    trainer = run_trainer(tokenizer, examples, tmp_path, True, True, **options, **step, warmup_steps=100)
    assert logged(trainer)[0]["loss"] == pytest.approx(expected_loss, rel=1e-5)
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated == [trainer.state.best_metric] == [pytest.approx(expected_loss, rel=1e-5)]


def test_two_processes_evaluate_every_example_once(llama, few_records, tmp_path):
    flags = ["--model_name_or_path", llama, "--data_path", few_records, "--model_max_length", "160"]
    flags += ["--val_size", "13", "--save_strategy", "no"]
    flags += ["--max_steps", "1", "--warmup_steps", "100"]  # its rate is 0, so that nothing is learnt
    more = {1: ["--per_device_eval_batch_size", "13"], 2: ["--per_device_eval_batch_size", "2"]}
    more["padded"] = ["--padding_free", "False", "--per_device_eval_batch_size", "5"]  # 13 are 2 rounds of 2 x 5
    losses = []
    for name, given in more.items():
        forked.run_train(tmp_path / str(name), *flags, *given, processes=1 if name == 1 else 2)
        losses.append(json.loads((tmp_path / str(name) / "eval_results.json").read_text())["eval_loss"])
    assert losses[1:] == [pytest.approx(losses[0], rel=1e-5)] * 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama, model_max_length=160)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    resize_embeddings(model, tokenizer, complete_tokenizer(tokenizer))
    _, held_out = hold_out(SupervisedDataset(str(few_records), tokenizer), 13)
    assert losses[0] == pytest.approx(loss_over_all_tokens(model, held_out), rel=1e-5)


def test_auxiliary_losses_of_routers_are_announced(tokenizer, examples, tmp_path, capsys):
    """And do what the line says: a step of n micro-batches has them n times."""

    def added(accumulation):
        def loss(with_them):
            model = tiny(tokenizer, "mixtral")
            model.config.output_router_logits, model.router_aux_loss_coef = with_them, 0.5
            args = train.TrainingArguments(
                output_dir=str(tmp_path),
                use_cpu=True,
                max_steps=1,
                logging_steps=1,
                per_device_train_batch_size=16 // accumulation,
                gradient_accumulation_steps=accumulation,
                save_strategy="no",
            )
            collator = DataCollatorWithoutPadding()
            trainer = train.AlpacaTrainer(
                model=model, args=args, train_dataset=examples, data_collator=collator, balance_tokens=True
            )
            trainer.train()
            return logged(trainer)[0]["loss"]

        return loss(True) - loss(False)

    once = added(1)
    assert once > 0.3 and "auxiliary loss" not in capsys.readouterr().err
    assert added(4) == pytest.approx(4 * once, rel=0.2)
    said = capsys.readouterr().err
    assert said.count("auxiliary loss") == 1 and "of 4 micro-batches has it 4 times" in said


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
