"""The data of a run: what is held out, what is shown, and the collator that comes with it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from alpaca.common import ExpectedError
from alpaca.data.examples import SupervisedDataset
from alpaca.prompts import format_prompt
from alpaca.training.batches import DataCollatorForSupervisedDataset
from alpaca.training.data_module import hold_out, make_supervised_data_module, show_batch
from alpaca.training.special_tokens import complete_tokenizer
from tests.conftest import ROOT

EXAMPLES = [
    {"instruction": "Name the colons.", "input": "", "output": ":: two of them"},
    {"instruction": "Continue the number", "input": "12", "output": "345"},
]


@pytest.fixture
def tokenizer():
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "configs" / "llama_tiny", model_max_length=512)
    complete_tokenizer(tokenizer)
    return tokenizer


def write(tmp_path, examples):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(examples))
    return str(path)


def test_the_data_module_of_2023_has_the_padding_collator(tmp_path, tokenizer):
    data_args = SimpleNamespace(data_path=write(tmp_path, EXAMPLES))  # 2023's arguments had no more
    module = make_supervised_data_module(tokenizer, data_args)
    assert module.keys() == {"train_dataset", "eval_dataset", "data_collator"}
    assert module["data_collator"] == DataCollatorForSupervisedDataset(tokenizer) and module["eval_dataset"] is None
    batch = module["data_collator"]([module["train_dataset"][0], module["train_dataset"][1]])
    assert batch.keys() == {"input_ids", "labels", "attention_mask"} and len(batch["input_ids"]) == 2


def test_examples_that_lose_their_end_are_counted(tmp_path, tokenizer, capsys):
    longest = len(SupervisedDataset(write(tmp_path, EXAMPLES), tokenizer)[0]["input_ids"])
    data = write(tmp_path, [EXAMPLES[0], {**EXAMPLES[0], "output": EXAMPLES[0]["output"] + " and a third"}])
    for limit, expected in (
        (512, ""),
        (longest, f"notice: 1 of 2 examples are longer than --model_max_length {longest}"),
    ):
        tokenizer.model_max_length = limit
        make_supervised_data_module(tokenizer, SimpleNamespace(data_path=data))
        said = capsys.readouterr().err
        assert said.startswith(expected) and bool(said) == bool(expected)


def test_the_same_examples_are_held_out_the_same_examples_whatever_the_seed(tmp_path, tokenizer):
    dataset = SupervisedDataset(write(tmp_path, [{**EXAMPLES[0], "input": str(i)} for i in range(40)]), tokenizer)
    train, held_out = hold_out(dataset, 10)
    torch.manual_seed(5)
    np.random.seed(5)
    again, held_out_again = hold_out(dataset, 0.25)
    assert (len(train), len(held_out)) == (30, 10)
    assert sorted([*train.rows, *held_out.rows]) == list(range(40))
    assert held_out.rows.tolist() == held_out_again.rows.tolist() and train.rows.tolist() == again.rows.tolist()
    assert torch.equal(held_out[3]["input_ids"], dataset[held_out.rows[3]]["input_ids"])
    assert hold_out(dataset, 0) == (dataset, None)
    for wrong in (40, 100, 1.5, -3, 0.001):
        with pytest.raises(ExpectedError) as error:
            hold_out(dataset, wrong)
        assert error.value.exit_code == 2


def test_show_batch_tells_prompt_and_trained_tokens_apart(tmp_path, tokenizer, capsys):
    show_batch(SupervisedDataset(write(tmp_path, EXAMPLES), tokenizer), tokenizer, 3)
    shown = capsys.readouterr().out
    assert shown.count("--- record") == 2
    assert f"<s> {format_prompt(EXAMPLES[1])}«345</s>»" in shown
