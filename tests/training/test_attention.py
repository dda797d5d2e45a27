"""Examples laid end to end are computed like padded ones and like each alone; models that would mix them are found."""

import pytest
import torch
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from alpaca.data.examples import IGNORE_INDEX
from alpaca.training.arguments import parse_arguments
from alpaca.training.attention import BY_EXAMPLE, choose_collator, keeps_examples_apart
from alpaca.training.batches import (
    DataCollatorForSupervisedDataset,
    DataCollatorWithoutPadding,
)
from tests.training.conftest import tiny

FROM_5_18 = pytest.mark.skipif(
    transformers.__version__.startswith("5.17."), reason="transformers 5.17 mixes its examples: padded batches"
)


def loss_and_gradients(model, batch, start=0, stop=None, row=0):
    """Loss summed over one example's tokens, and its gradients; the example is columns start:stop of a row."""
    model.zero_grad()
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[row, start:stop]
    labels = batch["labels"][row, start:stop]
    loss = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE_INDEX, reduction="sum")
    loss.backward()
    return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        *[("llama", "sdpa"), ("llama", "eager"), ("llama", BY_EXAMPLE), ("opt", BY_EXAMPLE)],
        *[("mistral", BY_EXAMPLE), ("gemma3_text", BY_EXAMPLE)],  # with windows, in every layer and in some
    ],
)
@pytest.mark.parametrize("use_cache", [False, True])
def test_every_example_has_its_padded_loss_and_gradients(kind, attention, use_cache, examples, tokenizer):
    model = tiny(tokenizer, kind, attention=attention, dtype=torch.float64)
    model.config.use_cache = use_cache  # the batch has the last word
    rows = [examples[i] for i in range(4)]
    collator = DataCollatorWithoutPadding(with_lengths=attention == BY_EXAMPLE)
    flat, padded = collator(rows), DataCollatorForSupervisedDataset(tokenizer)(rows)
    assert flat["input_ids"].shape == (1, sum(len(row["labels"]) for row in rows))
    tolerance = 1e-5 if attention == "eager" or kind == "gemma3_text" else 1e-9  # parts of which are float32 always
    start = 0
    for number, row in enumerate(rows):
        stop = start + len(row["labels"])
        model.set_attn_implementation(attention)
        loss, gradients = loss_and_gradients(model, flat, start, stop)
        model.set_attn_implementation("eager" if attention == "eager" else "sdpa")  # with the library's masks
        expected_loss, expected_gradients = loss_and_gradients(model, padded, row=number)
        assert loss == pytest.approx(expected_loss, rel=tolerance) and loss > 0
        for gradient, expected in zip(gradients, expected_gradients, strict=True):
            size = max(expected.abs().max().item(), 1e-3)  # that of OPT's key biases is 0 but for rounding
            assert torch.allclose(gradient, expected, rtol=tolerance, atol=tolerance * size)
        start = stop


def test_with_a_cache_examples_would_mix(examples, tokenizer):
    """What `use_cache` in the batch prevents: without it the test above could not fail."""
    model = tiny(tokenizer, dtype=torch.float64)
    batch = DataCollatorWithoutPadding()([examples[0], examples[1]])
    apart = model(**batch).logits
    assert (model(**{**batch, "use_cache": True}).logits - apart).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "apart"),
    [("llama", True), ("mistral", True), ("qwen3", True), ("gpt2", True), ("opt", False), ("bloom", False)],
)
def test_which_models_keep_examples_apart(kind, apart, examples, tokenizer):
    """The answer at start-up, from a narrow copy of the published sizes, and what a model of this kind really does."""
    config = transformers.AutoConfig.for_model(kind)
    state = torch.random.get_rng_state()
    assert keeps_examples_apart(config) == apart
    assert torch.equal(torch.random.get_rng_state(), state)
    if kind == "bloom":
        return  # takes no position_ids at all
    model, rows = tiny(tokenizer, kind, dtype=torch.float64), [examples[0], examples[1]]
    together = model(**DataCollatorWithoutPadding()(rows)).logits[0]
    alone = torch.cat([model(row["input_ids"][None], use_cache=False).logits[0] for row in rows])
    assert torch.allclose(together, alone, rtol=1e-5, atol=1e-5) == apart


@pytest.mark.parametrize(
    ("kind", "changes", "by_example"),
    [
        ("llama", {}, True),
        ("llama", {"num_key_value_heads": 8}, True),
        ("qwen3", {}, True),
        ("gpt2", {}, True),
        ("opt", {}, True),
        ("mistral", {"sliding_window": 4096}, True),
        ("gemma3_text", {}, True),
        pytest.param("llama4_text", {}, False, marks=FROM_5_18),  # attention by example sees no chunks
        ("gemma2", {}, False),  # and caps no scores
        pytest.param("doge", {}, False, marks=FROM_5_18),  # nor adds a learnt mask, which at first hides nothing
        ("bloom", {}, None),
    ],
)
def test_the_fastest_exact_attention_is_chosen(kind, changes, by_example, tokenizer, tmp_path, capsys):
    config = transformers.AutoConfig.for_model(kind, **changes)

    def choose(*flags):
        flags = ["--data_path", "x.json", "--output_dir", str(tmp_path), *flags]
        model_args, data_args, training_args = parse_arguments(flags)
        collator = choose_collator(config, tokenizer, model_args, data_args, training_args)
        return collator, model_args.attn_implementation

    collator, attention = choose()
    if by_example is None:
        assert isinstance(collator, DataCollatorForSupervisedDataset) and attention is None
        assert "batches are padded: bloom" in capsys.readouterr().err
        return
    assert collator == DataCollatorWithoutPadding(with_lengths=by_example)
    assert attention == (BY_EXAMPLE if by_example else None)
    if kind != "opt":  # whose own attention mixes examples
        assert choose("--attn_implementation", "sdpa") == (DataCollatorWithoutPadding(), "sdpa")
        assert choose("--torch_compile", "True") == (DataCollatorWithoutPadding(), None)
    assert isinstance(choose("--padding_free", "False")[0], DataCollatorForSupervisedDataset)


def with_keys_apart(module, query, key, value, mask, cu_seq_lens_q=None, **kwargs):
    """Attention by example whose results are right, and in packed rows the keys' gradients are not."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    parts = (states.split(cu_seq_lens_q.diff().tolist(), dim=2) for states in (query, key.detach(), value))
    return torch.cat([sdpa_attention_forward(module, *qkv, None)[0] for qkv in zip(*parts, strict=True)], dim=1), None


def test_gradients_have_to_be_right_too(monkeypatch):
    config = transformers.AutoConfig.for_model("llama")
    transformers.AttentionInterface.register("with_keys_apart", with_keys_apart)
    assert not keeps_examples_apart(config, "with_keys_apart")
    monkeypatch.setattr(torch.Tensor, "detach", lambda states: states)
    assert keeps_examples_apart(config, "with_keys_apart")


def test_examples_in_other_batches_and_saved_models_know_nothing_of_it(examples, tokenizer, tmp_path):
    model = tiny(tokenizer, attention=BY_EXAMPLE, dtype=torch.float64)
    rows = [examples[0], examples[1]]
    together = model(**DataCollatorWithoutPadding(with_lengths=True)(rows)).logits
    assert torch.allclose(model(**DataCollatorWithoutPadding()(rows)).logits, together, atol=1e-9)
    padded = model(**DataCollatorForSupervisedDataset(tokenizer)(rows)).logits
    first = len(rows[0]["labels"])
    assert torch.allclose(padded[0, :first], together[0, :first], atol=1e-9)
    model.save_pretrained(tmp_path)
    assert BY_EXAMPLE not in (tmp_path / "config.json").read_text()
