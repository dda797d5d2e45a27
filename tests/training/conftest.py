"""What several files here train on: a tokenizer, few examples, small models."""

import json
import random

import pytest
import torch
import transformers

from alpaca.data.examples import SupervisedDataset
from alpaca.training.special_tokens import complete_tokenizer
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "configs" / "llama_tiny", model_max_length=160)
    complete_tokenizer(tokenizer, "<unk>")
    return tokenizer


@pytest.fixture(scope="module")
def few_records(tmp_path_factory):
    """21 examples, short ones, so that none is left out: with 8 a step, two full steps and one of five."""
    records = [record for record in json.loads((ROOT / "alpaca_data.json").read_text()) if len(str(record)) < 450]
    path = tmp_path_factory.mktemp("data") / "21.json"
    path.write_text(json.dumps(random.Random(0).sample(records, 21)))
    return path


@pytest.fixture(scope="module")
def examples(few_records, tokenizer):
    return SupervisedDataset(str(few_records), tokenizer)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A LLaMA of one layer: saving it takes as long as a step."""
    directory = tmp_path_factory.mktemp("base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "configs" / "llama_tiny")
    tokenizer.save_pretrained(directory)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.set_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **shape, attention_dropout=0.1)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "few.json"
    records = json.loads((ROOT / "alpaca_data.json").read_text())
    path.write_text(json.dumps(sorted(records, key=lambda record: len(str(record)))[:34]))
    return path


def tiny(tokenizer, kind="llama", attention="sdpa", dtype=torch.float32, layers=2):
    """A model of few narrow layers whose random weights are so large that a wrong token would show."""
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model(kind, **sizes, initializer_range=0.2)
    narrow = {
        "intermediate_size": 32,
        "ffn_dim": 32,
        "word_embed_proj_dim": 32,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 16,
    }
    for name, value in narrow.items():
        if hasattr(config, name):
            setattr(config, name, value)
    transformers.set_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    return model.eval()  # no dropout
