"""Micro-batches laid end to end and balanced, against padding, plain batches and one example at a time."""

import itertools
import json
import random

import accelerate
import pytest
import torch
import transformers
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

import train
from alpaca.data.examples import IGNORE_INDEX, SupervisedDataset
from alpaca.training.arguments import parse_arguments
from alpaca.training.attention import BY_EXAMPLE, choose_collator, keeps_examples_apart
from alpaca.training.batches import (
    BalancedBatchSampler,
    DataCollatorForSupervisedDataset,
    DataCollatorWithoutPadding,
    sort_and_cut,
    spread,
)
from alpaca.training.special_tokens import complete_tokenizer
from benchmarks.bench_train import LENGTHS
from tests.conftest import ROOT, run
from tests.training import courses
from tests.training.courses import assert_same_course


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads that wait for each other on busy cores take many times as long as one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "configs" / "llama_tiny", model_max_length=160)
    complete_tokenizer(tokenizer, "<unk>")
    return tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """21 examples: with 8 a step, two full steps and one of five."""
    records = json.loads((ROOT / "alpaca_data.json").read_text())
    path = tmp_path_factory.mktemp("data") / "21.json"
    path.write_text(json.dumps(random.Random(0).sample(records, 21)))
    return path


@pytest.fixture(scope="module")
def examples(data, tokenizer):
    return SupervisedDataset(str(data), tokenizer)


def tiny(tokenizer, kind="llama", attention="sdpa", dtype=torch.float32):
    """A model of two narrow layers whose random weights are so large that a wrong token would show."""
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model(kind, **sizes, initializer_range=0.2)
    narrow = {
        "intermediate_size": 32,
        "ffn_dim": 32,
        "word_embed_proj_dim": 32,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    for name, value in narrow.items():
        if hasattr(config, name):
            setattr(config, name, value)
    transformers.set_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    return model.eval()  # no dropout


# --- end to end ---


def loss_and_gradients(model, batch, start=0, stop=None, row=0):
    """Loss summed over one example's tokens, and its gradients; the example is columns start:stop of a row."""
    model.zero_grad()
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[row, start:stop]
    labels = batch["labels"][row, start:stop]
    loss = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE_INDEX, reduction="sum")
    loss.backward()
    return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("kind", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("llama", BY_EXAMPLE), ("opt", BY_EXAMPLE)]
)
@pytest.mark.parametrize("use_cache", [False, True])
def test_every_example_has_its_padded_loss_and_gradients(kind, attention, use_cache, examples, tokenizer):
    model = tiny(tokenizer, kind, attention=attention, dtype=torch.float64)
    model.config.use_cache = use_cache  # the batch has the last word
    rows = [examples[i] for i in range(4)]
    collator = DataCollatorWithoutPadding(with_lengths=attention == BY_EXAMPLE)
    flat, padded = collator(rows), DataCollatorForSupervisedDataset(tokenizer)(rows)
    assert flat["input_ids"].shape == (1, sum(len(row["labels"]) for row in rows))
    tolerance = 1e-5 if attention == "eager" else 1e-9  # eager attention takes its softmax in float32
    start = 0
    for number, row in enumerate(rows):
        stop = start + len(row["labels"])
        loss, gradients = loss_and_gradients(model, flat, start, stop)
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


def test_no_token_is_predicted_from_the_example_before_it():
    rows = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([5, 6, 7], [8], [9, 3])]
    batch = DataCollatorWithoutPadding()(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, -100, 3]]
    assert rows[1]["labels"].tolist() == [8]  # the caller's examples are untouched
    bounds, longest = prepare_fa_kwargs_from_position_ids(batch["position_ids"])
    for side, of_library, length in zip("qk", bounds, longest, strict=True):
        assert torch.equal(batch[f"cu_seq_lens_{side}"], of_library) and batch[f"max_length_{side}"] == length


@pytest.mark.parametrize("collator", [DataCollatorWithoutPadding, DataCollatorForSupervisedDataset])
def test_an_empty_micro_batch_changes_nothing(collator, tokenizer):
    batch = collator()([]) if collator is DataCollatorWithoutPadding else collator(tokenizer)([])
    model = tiny(tokenizer)
    loss = model(**batch, num_items_in_batch=torch.tensor(7)).loss
    loss.backward()
    assert loss == 0 and all((parameter.grad == 0).all() for parameter in model.parameters())


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
        ("mistral", {"sliding_window": 4096}, False),  # attention by example sees no window
        ("llama4_text", {}, False),  # nor chunks
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


def test_collator_pads_on_the_right_and_masks_by_length(tmp_path, tokenizer):
    tokenizer.pad_token = "<unk>"  # a pad token that may stand in the text too
    ids = [[1, 0, 5, 2], [1, 7]]
    batch = DataCollatorForSupervisedDataset(tokenizer)(
        [{"input_ids": torch.tensor(i), "labels": torch.tensor([IGNORE_INDEX, *i[1:]])} for i in ids]
    )
    assert batch["input_ids"].tolist() == [[1, 0, 5, 2], [1, 7, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 0, 5, 2], [-100, 7, -100, -100]]
    assert batch["attention_mask"].tolist() == [[True] * 4, [True, True, False, False]]


@pytest.mark.parametrize("padding_free", [True, False])
def test_a_batch_names_its_records_where_that_is_asked_for(padding_free, examples, tokenizer):
    collator = DataCollatorWithoutPadding() if padding_free else DataCollatorForSupervisedDataset(tokenizer)
    rows = [examples[3], examples[0], examples[7]]
    assert "records" not in collator(rows)  # no model takes them
    collator.with_records = True
    assert collator(rows)["records"] == [int(examples.rows[i]) for i in (3, 0, 7)]  # of the data: one is left out
    assert collator([])["records"] == []


# --- balanced ---


def test_spread_balances_and_keeps_every_example():
    assert spread([9, 1, 5, 5], 2) == [[0, 1], [2, 3]]
    rng = random.Random(0)
    for _ in range(100):
        lengths = [rng.randint(1, 30) for _ in range(rng.randint(1, 6))]
        num_groups = rng.randint(1, 4)
        ways = list(itertools.product(range(num_groups), repeat=len(lengths)))
        sums = [
            [sum(n for n, g in zip(lengths, way, strict=True) if g == k) for k in range(num_groups)] for way in ways
        ]
        groups = spread(lengths, num_groups)
        assert sorted(itertools.chain(*groups)) == list(range(len(lengths))) and len(groups) == num_groups
        assert max(sum(lengths[i] for i in group) for group in groups) <= 4 / 3 * min(map(max, sums))


def test_sort_and_cut_keeps_every_example_and_little_padding():
    assert sort_and_cut([9, 1, 5, 1], 2) == [[0, 2], [1, 3]]
    rng = random.Random(0)
    for _ in range(100):
        lengths = [rng.randint(1, 30) for _ in range(rng.randint(1, 40))]
        groups = sort_and_cut(lengths, rng.randint(1, 12))
        assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
        assert max(map(len, groups)) - min(map(len, groups)) <= 1
        joined = [lengths[i] for group in groups for i in group]
        assert joined == sorted(lengths, reverse=True)
    tokens = slots = 0
    for _ in range(100):  # steps of 128 examples, in the lengths of the 52K set
        lengths = rng.choices(LENGTHS, k=128)
        groups = sort_and_cut(lengths, 32)
        tokens, slots = tokens + sum(lengths), slots + sum(max(lengths[i] for i in g) * len(g) for g in groups)
    assert 1 - tokens / slots < 0.04


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("num_examples", [128, 131, 145, 64, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_steps_hold_the_examples_of_plain_steps_whatever_the_world_size(processes, num_examples, padded, drop_last):
    """32 examples a step; 24 with 3 processes. Dealt out by accelerate as in a real run."""
    rng = random.Random(1)
    lengths = [round(min(512, rng.lognormvariate(4.6, 0.6))) for _ in range(num_examples)]
    order = rng.sample(range(num_examples), num_examples)
    batch_size, accumulation = 4, max(1, 8 // processes)
    sampler = BalancedBatchSampler(order, lengths, batch_size, processes, accumulation, padded, drop_last)
    ranks = [list(BatchSamplerShard(sampler, processes, rank)) for rank in range(processes)]
    assert {len(rank) for rank in ranks} == {len(BatchSamplerShard(sampler, processes, 0))}

    plain = list(BatchSampler(order, batch_size * processes, drop_last))  # a round of all processes
    assert len(ranks[0]) == len(plain)
    for first in range(0, len(plain), accumulation):
        wanted = list(itertools.chain(*plain[first : first + accumulation]))
        micro_batches = [batch for rank in ranks for batch in rank[first : first + accumulation]]
        assert sorted(itertools.chain(*micro_batches)) == sorted(wanted)
        tokens = [sum(lengths[i] for i in batch) for batch in micro_batches]
        if not padded and len(wanted) == batch_size * processes * accumulation:
            assert max(tokens) <= max(1.1 * sum(tokens) / len(tokens), *(lengths[i] for i in wanted))
    # What resuming does: the micro-batches after any number of skipped ones are those of the whole run.
    assert list(itertools.islice(BatchSamplerShard(sampler, processes, 0), 1, None)) == ranks[0][1:]


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def run_trainer(tokenizer, examples, out, padding_free, balance_tokens, resume=None, kind="llama", **options):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "save_strategy": "no", **options}
    args = train.TrainingArguments(
        output_dir=str(out), use_cpu=True, num_train_epochs=2, logging_steps=1, learning_rate=1e-3, **options
    )
    trainer = train.AlpacaTrainer(
        model=tiny(tokenizer, kind),
        args=args,
        train_dataset=examples,
        eval_dataset=examples,
        data_collator=DataCollatorWithoutPadding() if padding_free else DataCollatorForSupervisedDataset(tokenizer),
        balance_tokens=balance_tokens,
    )
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
def test_two_processes_with_incomplete_steps_resume_and_match_one(llama, data, tmp_path):
    flags = [
        *("train.py", "--model_name_or_path", llama, "--data_path", data, "--num_train_epochs", "2"),
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
