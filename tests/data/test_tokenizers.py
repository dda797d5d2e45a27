"""Published tokenizers with peculiar settings: training and prompts are those of the plain one."""

import json
import shutil

import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, processors

from alpaca.answering.model import load_reader
from alpaca.common import ExpectedError
from alpaca.data.examples import IGNORE_INDEX, preprocess
from alpaca.data.tokenizers import TokenizerLoader, added_ids
from alpaca.prompts import format_prompt
from alpaca.training.special_tokens import complete_tokenizer
from tests.conftest import ROOT

EXAMPLES = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue."},
    {"instruction": "Add.", "input": "2 and 3", "output": "5"},
]
EMPTY = {"bos_token": "", "eos_token": "", "unk_token": ""}
ADDED = {"__type": "AddedToken", "content": "", "lstrip": False, "normalized": True, "rstrip": False}
OLD = {"add_bos_token": None, "add_eos_token": None}
PUBLISHED = {  # what published directories change in tokenizer_config.json; None: has no such key
    "as it is": {},
    "appends the end token": {"add_eos_token": True},
    "cuts on the left": {"truncation_side": "left"},
    "empty special tokens": {"tokenizer_class": "LLaMATokenizer", **EMPTY, **OLD},
    "empty special tokens as objects": {**dict.fromkeys(EMPTY, ADDED), "pad_token": ADDED, **OLD},
    "says nothing of bos": OLD,
    "says nothing of bos, misspelled": {"tokenizer_class": "LLaMATokenizer", **OLD},
    "says nothing of its class": {"tokenizer_class": None, **OLD},
    "names no class of LLaMA": {"tokenizer_class": "PreTrainedTokenizerFast", **OLD},
}


def directory(tmp_path, changes, **more_files):
    source = ROOT / "configs" / "llama_tiny"
    for name in ("tokenizer.model", "config.json"):
        shutil.copy(source / name, tmp_path)
    settings = json.loads((source / "tokenizer_config.json").read_text()) | changes
    settings = {name: value for name, value in settings.items() if value is not None}
    for name, content in {"tokenizer_config": settings, **more_files}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return str(tmp_path)


def texts_of(tokenizer, examples=EXAMPLES):
    targets = [example["output"] + tokenizer.eos_token for example in examples]
    return preprocess([format_prompt(example) for example in examples], targets, tokenizer)


def as_lists(texts):
    return {key: [row.tolist() for row in rows] for key, rows in texts.items()}


@pytest.mark.parametrize("changes", PUBLISHED.values(), ids=PUBLISHED)
def test_all_ways_to_publish_a_llama_give_the_same_training_and_prompts(changes, tmp_path, llama):
    plain = transformers.AutoTokenizer.from_pretrained(ROOT / "configs" / "llama_tiny")
    path = directory(tmp_path, changes)
    tokenizer = TokenizerLoader.from_pretrained(path, model_max_length=100)
    plain.model_max_length = 100
    assert complete_tokenizer(tokenizer) == complete_tokenizer(plain) == 1
    assert len(tokenizer) == len(plain)
    assert as_lists(texts_of(tokenizer)) == as_lists(texts_of(plain))
    long = [{**EXAMPLES[0], "output": "word " * 200}]
    assert as_lists(texts_of(tokenizer, long)) == as_lists(texts_of(plain, long))
    assert len(texts_of(tokenizer, long)["labels"][0]) == 100

    tokenizer.save_pretrained(tmp_path / "tuned")  # as training does; whoever serves it reads it without this project
    shutil.copy(llama / "model.safetensors", tmp_path / "tuned")
    shutil.copy(tmp_path / "config.json", tmp_path / "tuned")
    served = transformers.AutoTokenizer.from_pretrained(tmp_path / "tuned")
    for example, labels in zip(EXAMPLES, texts_of(tokenizer)["labels"], strict=True):
        prompt = load_reader(str(tmp_path / "tuned")).encode(example, 10)
        assert prompt == plain(format_prompt(example))["input_ids"] == served(format_prompt(example))["input_ids"]
        assert len(prompt) == (labels == IGNORE_INDEX).sum()
        assert labels[-1] == 2 != labels[-2]


def test_empty_tokens_may_be_in_the_map_of_special_tokens(tmp_path):
    path = directory(tmp_path, OLD, special_tokens_map=EMPTY)
    tokenizer = TokenizerLoader.from_pretrained(path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)


def test_what_a_directory_says_of_bos_is_kept(tmp_path):
    tokenizer = TokenizerLoader.from_pretrained(directory(tmp_path, {"add_bos_token": False}))
    assert added_ids(tokenizer) == ([], [])


def bert(tmp_path, **options):
    """A word-level tokenizer that puts [CLS] before and [SEP] after each text."""
    words = ["[UNK]", "[CLS]", "[SEP]", "a", "b", "."]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    options = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", **options}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(tmp_path)
    return transformers.AutoTokenizer.from_pretrained(tmp_path)


def test_other_tokens_at_the_end_are_left_out_too(tmp_path, capsys):
    theirs = bert(tmp_path, eos_token="[SEP]")
    assert added_ids(theirs) == ([1], [2])
    ours = TokenizerLoader.from_pretrained(str(tmp_path))
    assert "ends each text with [SEP]" in capsys.readouterr().err
    assert added_ids(ours) == ([1], [])
    for tokenizer in (theirs, ours):  # the functions of 2023 take a tokenizer as it is
        tokenizer.model_max_length = 6
        texts = as_lists(preprocess(["a b .", "a b . a b . a b"], ["b a[SEP]", "b[SEP]"], tokenizer))
        assert texts["input_ids"] == [[1, 3, 4, 5, 4, 3], [1, 3, 4, 5, 3, 4]]
        assert texts["labels"] == [[-100] * 4 + [4, 3], [-100] * 6]


def test_a_tokenizer_written_in_python_ends_no_prompt():
    tokenizer = transformers.ByT5Tokenizer()
    assert added_ids(tokenizer) == ([], [1])
    texts = as_lists(preprocess(["ab"], ["c</s>"], tokenizer))
    assert texts == {"input_ids": [[100, 101, 102, 1]], "labels": [[-100, -100, 102, 1]]}


def test_an_end_token_that_is_split_is_refused(tmp_path):
    tokenizer = TokenizerLoader.from_pretrained(directory(tmp_path, {"split_special_tokens": True}))
    with pytest.raises(ExpectedError, match=r"'</s>' is not one token .*split_special_tokens") as error:
        complete_tokenizer(tokenizer)
    assert error.value.exit_code == 2


def test_empty_tokens_of_other_tokenizers_are_none(tmp_path):
    bert(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "unk_token": "", "pad_token": ""}))
    tokenizer = TokenizerLoader.from_pretrained(str(tmp_path))
    assert tokenizer.unk_token is None and tokenizer.pad_token is None
