"""Completing a tokenizer as in 2023, and the embedding rows that its new tokens get."""

import pytest
import torch
import transformers

from alpaca.common import ExpectedError
from alpaca.training.special_tokens import (
    DEFAULT_SPECIAL_TOKENS,
    complete_tokenizer,
    resize_embeddings,
    smart_tokenizer_and_embedding_resize,
)


def load(directory):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    return transformers.AutoTokenizer.from_pretrained(directory), model


def test_llama_gains_one_row_that_is_the_mean_of_the_others(llama):
    tokenizer, model = load(llama)
    before = [model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()]
    added = complete_tokenizer(tokenizer)
    resize_embeddings(model, tokenizer, added)
    assert (added, tokenizer.pad_token, len(tokenizer)) == (1, "[PAD]", len(before[0]) + 1)
    assert model.config.vocab_size == len(tokenizer)
    for old, embeddings in zip(before, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
        assert torch.equal(embeddings.weight[:-1], old)
        assert torch.equal(embeddings.weight[-1:], old.mean(dim=0, keepdim=True))


def test_the_2023_function_does_the_same(llama):
    tokenizer, model = load(llama)
    smart_tokenizer_and_embedding_resize({"pad_token": "[PAD]"}, tokenizer, model)
    other_tokenizer, other = load(llama)
    resize_embeddings(other, other_tokenizer, complete_tokenizer(other_tokenizer))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    smart_tokenizer_and_embedding_resize({"pad_token": "[PAD]"}, tokenizer, model)  # again: nothing new
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings


def test_all_four_missing_tokens_are_added(llama):
    tokenizer, model = load(llama)
    for name in DEFAULT_SPECIAL_TOKENS:
        setattr(tokenizer, name, None)
    added = complete_tokenizer(tokenizer)
    # LLaMA's vocabulary has the other three already: naming them adds no entry.
    assert added == 1
    assert [getattr(tokenizer, name) for name in DEFAULT_SPECIAL_TOKENS] == list(DEFAULT_SPECIAL_TOKENS.values())
    resize_embeddings(model, tokenizer, added)
    assert tokenizer(tokenizer.eos_token, add_special_tokens=False)["input_ids"] == [2]


def test_an_existing_pad_token_keeps_the_vocabulary(llama):
    tokenizer, model = load(llama)
    size = len(tokenizer)
    added = complete_tokenizer(tokenizer, "<unk>")
    resize_embeddings(model, tokenizer, added)
    assert (added, len(tokenizer), model.config.vocab_size, tokenizer.pad_token_id) == (0, size, size, 0)
    with pytest.raises(ExpectedError, match="not in the tokenizer's vocabulary") as error:
        complete_tokenizer(tokenizer, "<none>")
    assert error.value.exit_code == 2


def test_spare_rows_are_kept_and_used(opt):
    """OPT's matrix is larger than its vocabulary: no row is cut off, and a new token takes a spare one."""
    tokenizer, model = load(opt)
    old = model.get_input_embeddings().weight.clone()
    assert complete_tokenizer(tokenizer) == 0
    resize_embeddings(model, tokenizer, 0)
    assert torch.equal(model.get_input_embeddings().weight, old)
    first = len(tokenizer)
    smart_tokenizer_and_embedding_resize({"additional_special_tokens": ["<new>"]}, tokenizer, model)
    weight = model.get_input_embeddings().weight
    assert len(weight) == len(old)
    assert torch.equal(weight[first], old[:first].mean(dim=0))
    assert torch.equal(weight[first + 1 :], old[first + 1 :])
    assert weight is model.get_output_embeddings().weight  # tied, as it was
