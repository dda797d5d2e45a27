"""Micro-batches: the two collators, and the sampler against plain batches."""

import itertools
import random

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from alpaca.data.examples import IGNORE_INDEX
from alpaca.training.batches import (
    BalancedBatchSampler,
    DataCollatorForSupervisedDataset,
    DataCollatorWithoutPadding,
    sort_and_cut,
    spread,
)
from benchmarks.bench_train import LENGTHS
from tests.training.conftest import tiny


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


@pytest.mark.parametrize("collator", [DataCollatorWithoutPadding, DataCollatorForSupervisedDataset])
def test_an_empty_micro_batch_changes_nothing(collator, tokenizer):
    batch = collator()([]) if collator is DataCollatorWithoutPadding else collator(tokenizer)([])
    model = tiny(tokenizer)
    loss = model(**batch, num_items_in_batch=torch.tensor(7)).loss
    loss.backward()
    assert loss == 0 and all((parameter.grad == 0).all() for parameter in model.parameters())


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
