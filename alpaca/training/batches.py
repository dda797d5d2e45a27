"""Examples → micro-batches: padded or laid end to end, and of nearly equal token counts."""

import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import BatchSampler

from alpaca.data.examples import IGNORE_INDEX

# What a rank computes when a step has fewer examples than there are ranks: nothing to learn, and no rank waits.
_BLANK = {"input_ids": torch.zeros(2, dtype=torch.int64), "labels": torch.full((2,), IGNORE_INDEX)}


@dataclass
class DataCollatorForSupervisedDataset:
    """Pad the examples of a batch on the right: {"input_ids", "labels", "attention_mask"}, each (B, longest T).

    The mask comes from the lengths, so that a pad token which also occurs in the text is not masked there.
    """

    tokenizer: Any
    with_records: bool = False  # add "records", the examples' numbers in the data, which no model takes

    def __call__(self, instances: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        instances = instances or [_BLANK]

        def pad(key, value):
            return torch.nn.utils.rnn.pad_sequence([i[key] for i in instances], batch_first=True, padding_value=value)

        lengths = torch.tensor([len(instance["input_ids"]) for instance in instances])  # (B,)
        input_ids = pad("input_ids", self.tokenizer.pad_token_id)
        attention_mask = torch.arange(input_ids.shape[1])[None, :] < lengths[:, None]
        batch = {"input_ids": input_ids, "labels": pad("labels", IGNORE_INDEX), "attention_mask": attention_mask}
        return batch | ({"records": _records(instances)} if self.with_records else {})


@dataclass
class DataCollatorWithoutPadding:
    """Lay the examples of a batch end to end: {"input_ids", "labels", "position_ids"}, each (1, sum of T).

    Input ids [5, 6, 7] and [8, 9] → [[5, 6, 7, 8, 9]] with positions [[0, 1, 2, 0, 1]]. No token is predicted from the
    example before it. A model keeps the examples apart when it is given positions that restart, no attention mask, and
    no cache, which is why each batch itself says `use_cache`: a model's own setting can't undo it. The examples' bounds
    ("cu_seq_lens_q" and "cu_seq_lens_k", int32 (B + 1,), "max_length_q" and "max_length_k") spare flash attention
    working them out in every layer.

    With `responses_only` the batch also names the K positions that predict a label, and those labels: the model then
    computes logits for no others. Labels [[-100, 6, 7, -100, 3]] → {"logits_to_keep": [0, 1, 3] (K,), "shift_labels":
    [[6, 7, 3]] (1, K)}.
    """

    responses_only: bool = False
    with_lengths: bool = False  # as "example_lengths", a list, for `attention.sdpa_by_example`
    with_records: bool = False  # as in `DataCollatorForSupervisedDataset`

    def __call__(self, instances: Sequence[dict[str, torch.Tensor]]) -> dict[str, Any]:
        instances = instances or [_BLANK]
        labels = torch.cat([instance["labels"] for instance in instances])
        lengths = torch.tensor([len(instance["labels"]) for instance in instances])
        starts = lengths.cumsum(0) - lengths  # (B,)
        labels[starts] = IGNORE_INDEX
        batch = {
            "input_ids": torch.cat([instance["input_ids"] for instance in instances])[None],
            "labels": labels[None],
            "position_ids": (torch.arange(len(labels)) - starts.repeat_interleave(lengths))[None],
            "use_cache": False,
        }
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        batch |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        batch |= {"max_length_q": int(lengths.max()), "max_length_k": int(lengths.max())}
        if self.with_lengths:
            batch["example_lengths"] = lengths.tolist()
        if self.responses_only:
            batch["logits_to_keep"] = (labels[1:] != IGNORE_INDEX).nonzero()[:, 0]
            batch["shift_labels"] = labels[1:][batch["logits_to_keep"]][None]
        return batch | ({"records": _records(instances)} if self.with_records else {})


def _records(instances: Sequence[dict[str, Any]]) -> list[int]:
    return [instance["record"] for instance in instances if "record" in instance]


def spread(lengths: Sequence[int], num_groups: int) -> list[list[int]]:
    """Deal examples into groups of nearly equal token sums; [9, 1, 5, 5], 2 → [[0, 1], [2, 3]].

    Longest first, each to the group that has least: the longest-processing-time rule of Graham (1969), whose fullest
    group is at most 4/3 of the best possible. With fewer examples than groups, some groups are empty.
    """
    groups = [[] for _ in range(num_groups)]
    heap = [(0, group) for group in range(num_groups)]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens, group = heap[0]
        groups[group].append(index)
        heapq.heapreplace(heap, (tokens + lengths[index], group))
    return groups


def sort_and_cut(lengths: Sequence[int], num_groups: int) -> list[list[int]]:
    """The same where groups are padded: neighbours in length, equally many in each; [9, 1, 5, 1], 2 → [[0, 2], [1, 3]].

    Of the 52K set's steps of 128 examples in micro-batches of 4, some 3 % is then padding.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    bounds = [len(order) * group // num_groups for group in range(num_groups + 1)]
    return [order[first:last] for first, last in itertools.pairwise(bounds)]


class BalancedBatchSampler(BatchSampler):
    """Micro-batches of nearly equal token counts, made only of examples that share an optimizer step anyway.

    `sampler` gives the order of the examples, which is cut into steps of batch_size × num_processes × accumulation, as
    plain batches are. Each step's examples are then regrouped into micro-batches, one each for every process and round
    of accumulation, and yielded in the order in which accelerate deals them: one to each process in turn. Those of one
    round are alike, since the processes wait for each other. An epoch's last step may have fewer examples, and fewer
    rounds; none is repeated to fill it, so that a process may get an empty micro-batch.
    """

    def __init__(
        self,
        sampler: Iterable[int],
        lengths: Sequence[int],
        batch_size: int,
        num_processes: int,
        accumulation: int,
        padded: bool,
        drop_last: bool = False,
    ):
        self.sampler, self.lengths, self.num_processes = sampler, lengths, num_processes
        self.round = batch_size * num_processes  # examples
        self.step = self.round * accumulation  # examples
        self.group = sort_and_cut if padded else spread
        self.drop_last = drop_last
        self.batch_size = None  # tells accelerate that micro-batches differ in their number of examples

    def __len__(self) -> int:
        rounds = len(self.sampler) // self.round if self.drop_last else -(-len(self.sampler) // self.round)
        return rounds * self.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        order = iter(self.sampler)
        while examples := list(itertools.islice(order, self.step)):
            if self.drop_last:
                examples = examples[: len(examples) // self.round * self.round]
            yield from self._micro_batches(examples)

    def _micro_batches(self, examples: list[int]) -> Iterator[list[int]]:
        lengths = [int(self.lengths[example]) for example in examples]
        rounds = -(-len(examples) // self.round)
        groups = self.group(lengths, rounds * self.num_processes) if examples else []
        groups.sort(key=lambda group: sum(lengths[i] for i in group), reverse=True)
        for number in range(rounds):
            one_round = groups[number * self.num_processes : (number + 1) * self.num_processes]
            # Every other round is dealt backwards, so that no process always gets the fullest.
            for group in one_round if number % 2 == 0 else one_round[::-1]:
                yield [examples[i] for i in group]
