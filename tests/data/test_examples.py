"""Loading and checking records, and labels against the obvious method, an example at a time."""

import json

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from alpaca.common import ExpectedError
from alpaca.data.examples import IGNORE_INDEX, SupervisedDataset, load_examples, preprocess
from alpaca.prompts import format_prompt
from alpaca.training.special_tokens import complete_tokenizer
from tests.conftest import ROOT, error_line, run

AWKWARD = [
    {"instruction": "Name the colons.", "input": "", "output": ":: two of them"},
    {"instruction": "Continue the number", "input": "12", "output": "345"},
    {"instruction": "Nothing", "input": "", "output": ""},
    {"instruction": "Spaces", "input": "  ", "output": "   leading, and trailing   "},
    {"instruction": "Newlines", "input": "a\n\nb", "output": "\n\n\nafter three"},
    {"instruction": "Scripts", "input": "naïve café", "output": "写一首诗 Напиши 🙂👩‍👩‍👧 \u0301combining"},
    {"instruction": "Special tokens in text", "input": "<s></s><unk>[PAD]", "output": "</s> and <s> in the middle"},
    {"instruction": "Braces {instruction} {0}", "input": "{}", "output": "{input}"},
    {"instruction": "Null byte and controls", "input": "\x00\x07\t", "output": "\u200b\ufeff"},
    {"instruction": "Long prompt " * 200, "input": "", "output": "cut away"},
    {"instruction": "Long output", "input": "", "output": "word, " * 1667},
    {"instruction": "Template words", "input": "### Response:", "output": "### Instruction:\n### Response:"},
]
CORPUS = [format_prompt(example) + example["output"] for example in AWKWARD] * 3


def fast(model, trainer, pre_tokenizer, decoder=None, normalizer=None, post=None):
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder, tokenizer.normalizer = pre_tokenizer, decoder, normalizer
    tokenizer.train_from_iterator(CORPUS, trainer)
    if post:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=post, special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("<s>", "</s>")]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def make_tokenizer(kind):
    special = ["<unk>", "<s>", "</s>"]
    if kind == "llama":
        return transformers.AutoTokenizer.from_pretrained(ROOT / "configs" / "llama_tiny")
    if kind == "byte-level bpe":
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        return fast(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())
    if kind == "byte-level bpe with bos":
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        return fast(models.BPE(), trainer, pre_tokenizers.ByteLevel(), decoders.ByteLevel(), post="<s> $A")
    if kind.startswith("bpe that adds"):
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special)
        post = "<s> $A </s>" if kind == "bpe that adds eos" else "<s> $A"
        return fast(models.BPE(unk_token="<unk>"), trainer, pre_tokenizers.Metaspace(), post=post)
    if kind == "wordpiece":
        trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=special)
        model = models.WordPiece(unk_token="<unk>")
        return fast(model, trainer, pre_tokenizers.BertPreTokenizer(), normalizer=normalizers.Lowercase())
    if kind == "unigram":
        trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>")
        return fast(models.Unigram(), trainer, pre_tokenizers.Metaspace(), normalizer=normalizers.NFKC())
    if kind == "merges across the boundary":
        # No pre-tokenizer: ":" and "::" and what follows may become one token.
        trainer = trainers.BpeTrainer(vocab_size=3000, special_tokens=special, max_token_length=40)
        return fast(models.BPE(unk_token="<unk>"), trainer, None)
    return EndlessByT5Tokenizer() if kind == "byt5 without eos" else transformers.ByT5Tokenizer()


class EndlessByT5Tokenizer(transformers.ByT5Tokenizer):
    """Written in Python, not in Rust."""

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return token_ids_0


KINDS = [
    "llama",
    "byte-level bpe",
    "byte-level bpe with bos",
    "bpe that adds eos",
    "wordpiece",
    "unigram",
    "merges across the boundary",
    "byt5",
]
# What a tokenizer that appends an end token is to be compared with.
APPENDS_NOTHING = {"bpe that adds eos": "bpe that adds bos", "byt5": "byt5 without eos"}


def one_at_a_time(sources, targets, tokenizer):
    """The 2023 method, in its own steps, for a tokenizer that appends nothing."""
    rows = []
    for source, target in zip(sources, targets, strict=True):
        options = {"return_tensors": "pt", "max_length": tokenizer.model_max_length, "truncation": True}
        input_ids = tokenizer(source + target, **options).input_ids[0]
        labels = input_ids.clone()
        labels[: tokenizer(source, **options).input_ids.shape[1]] = IGNORE_INDEX
        rows.append((input_ids, labels))
    return rows


@pytest.mark.parametrize("limit", [64, 512])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_labels_equal_the_obvious_method(kind, limit):
    tokenizer = make_tokenizer(kind)
    complete_tokenizer(tokenizer)
    tokenizer.model_max_length = limit
    sources = [format_prompt(example) for example in AWKWARD]
    targets = [example["output"] + tokenizer.eos_token for example in AWKWARD]
    ours = preprocess(sources, targets, tokenizer)
    plain = tokenizer
    if kind in APPENDS_NOTHING:
        plain = make_tokenizer(APPENDS_NOTHING[kind])
        complete_tokenizer(plain)
        plain.model_max_length = limit
    slow = one_at_a_time(sources, targets, plain)
    for input_ids, labels, (slow_ids, slow_labels) in zip(ours["input_ids"], ours["labels"], slow, strict=True):
        assert input_ids.dtype == labels.dtype == torch.int64
        assert torch.equal(input_ids, slow_ids)
        assert torch.equal(labels, slow_labels)


def test_the_boundary_is_really_crossed():
    """Without this the test above could pass with two parts tokenized apart."""
    tokenizer = make_tokenizer("merges across the boundary")
    source, target = format_prompt(AWKWARD[0]), AWKWARD[0]["output"]
    assert tokenizer(source + target)["input_ids"] != tokenizer(source)["input_ids"] + tokenizer(target)["input_ids"]


def write(tmp_path, value, name="data.json"):
    path = tmp_path / name
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return str(path)


def test_input_may_be_missing_or_null_and_other_columns_are_ignored(tmp_path):
    records = [
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "input": None, "output": "b", "text": 3, "id": 7},
        {"instruction": "a", "input": "c", "output": ""},
    ]
    expected = [{"instruction": "a", "input": i, "output": o} for i, o in (("", "b"), ("", "b"), ("c", ""))]
    assert load_examples(write(tmp_path, records)) == expected
    lines = "\ufeff" + "\n\r\n".join(json.dumps(record) for record in records) + "\r\n"
    assert load_examples(write(tmp_path, lines, "data.jsonl")) == expected


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        ('[{"instruction": "a",\n "output": }]', "data.json", ["line 2 column 12"]),
        ('{"instruction": "a", "output": "b"}\n{"instruction": ', "data.jsonl", ["line 2 column 17"]),
        ("[]", "data.json", ["no examples"]),
        ("", "data.json", ["no examples"]),
        ("[" * 100000, "data.json", ["nested too deeply"]),
        ('{"instruction": "a", "output": "b"}\n' + '{"input":' * 100000, "data.jsonl", ["nested", "after line 2"]),
        ('[{"instruction": "a",\n "output": ' + "9" * 5000 + "}]", "data.json", ["number too large"]),
    ],
)
def test_broken_files_end_in_exit_3_with_the_place(tmp_path, content, name, said):
    with pytest.raises(ExpectedError) as error:
        load_examples(write(tmp_path, content, name))
    assert error.value.exit_code == 3
    assert all(text in str(error.value) for text in [name, *said]), str(error.value)


def test_bad_records_are_named_the_first_five_and_counted(tmp_path):
    good = {"instruction": "a", "input": "", "output": "b"}
    bad = [
        "text",
        {"output": "b"},
        {"instruction": "a"},
        {"instruction": 5, "output": "b"},
        {"instruction": "a", "output": "b", "input": ["c"]},
        {"instruction": None, "output": "b"},
        {"instruction": "\ud800", "output": "b"},
    ]
    path = write(tmp_path, [good, good, *bad])
    with pytest.raises(ExpectedError) as error:
        load_examples(path)
    message = str(error.value)
    assert error.value.exit_code == 3
    assert message.startswith(f"{path}: 7 of 9 records can't be used")
    for fault in (
        "record 2: a string, not an object",
        'record 3: no "instruction"',
        'record 4: no "output"',
        'record 5: "instruction" is a number, not a string',
        'record 6: "input" is a list, not a string',
        "and 2 more",
    ):
        assert fault in message
    assert "record 7" not in message


def test_half_of_a_surrogate_pair_is_found_and_a_whole_one_is_not(tmp_path):
    texts = ["é\ud800", "\udfff", "ok \U0001f600 \ud7ff\ue000"]
    with pytest.raises(ExpectedError, match=r"2 of 3 records .*record 0: .*record 1: ") as error:
        load_examples(write(tmp_path, [{"instruction": "a", "output": text} for text in texts]))
    assert '"output" holds half of a surrogate pair' in str(error.value)


def test_binary_missing_and_directory_paths_end_in_exit_3(tmp_path):
    (tmp_path / "zipped.json").write_bytes(b"PK\x03\x04\xff\xfe")
    for path, said in (
        (tmp_path / "zipped.json", "not UTF-8"),
        (tmp_path / "none.json", "does not exist"),
        (tmp_path, "is a directory"),
    ):
        with pytest.raises(ExpectedError, match=said) as error:
            load_examples(str(path))
        assert error.value.exit_code == 3


def test_a_hub_data_set_without_a_network_says_so():
    with pytest.raises(ExpectedError, match="Hub data set tatsu-lab/alpaca can't be loaded") as error:
        load_examples("tatsu-lab/alpaca")
    assert error.value.exit_code == 3
    assert "\n" not in str(error.value)


@pytest.fixture
def tokenizer():
    tokenizer = make_tokenizer("llama")
    complete_tokenizer(tokenizer)
    tokenizer.model_max_length = 512
    return tokenizer


def test_examples_without_a_response_are_left_out_and_their_records_kept(tmp_path, tokenizer):
    dataset = SupervisedDataset(write(tmp_path, AWKWARD), tokenizer)
    assert dataset.dropped == [9]  # the long prompt
    assert len(dataset) == len(AWKWARD) - 1
    assert dataset.rows.tolist() == [i for i in range(len(AWKWARD)) if i != 9]
    for index, length in enumerate(dataset.lengths):
        assert len(dataset[index]["input_ids"]) == length
        assert (dataset[index]["labels"] != IGNORE_INDEX).any()
        assert dataset[index]["record"] == dataset.rows[index]
    with pytest.raises(ExpectedError, match="raise --model_max_length") as error:
        SupervisedDataset(write(tmp_path, [AWKWARD[9]]), tokenizer)
    assert error.value.exit_code == 3


def test_bad_data_ends_before_any_model_is_loaded(tmp_path, llama):
    """The weights are no weights, so a run that came so far would fail in another way."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((llama / name).read_bytes())
    (model / "model.safetensors").write_bytes(b"none")
    result = run(
        *("train.py", "--model_name_or_path", model, "--output_dir", tmp_path / "out"),
        *("--data_path", write(tmp_path, [{"instruction": "a"}])),
    )
    assert result.returncode == 3
    assert 'record 0: no "output"' in error_line(result)
    assert not (tmp_path / "out").exists()
