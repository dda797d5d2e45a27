"""What data_report.py finds in a data set: lengths, padding, repetitions, near-duplicates, contamination."""

import collections
import heapq
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from alpaca.data.examples import tokenize
from alpaca.data.similarity import TokenEncoder, rouge_l
from alpaca.prompts import format_prompt

THRESHOLD = 0.7  # ROUGE-L F above which two instructions count as near-duplicates, as in the generation of 2023
BATCH_SIZES = (2, 4, 8, 16, 32, 64, 128)  # examples padded to the longest among them
LISTED = 1000  # rows or pairs that report.json lists of each finding; the counts are of all
PAIR_BLOCK, MATCH_BLOCK = 256, 512  # texts compared at once: enough for all cores, scores of a block in memory
BINS = 40
SEED = 0  # of the random batches


# Words that hardly end a sentence or a line.
DANGLING = set(
    """a an the and or but nor of to at by for with from as than which whose because while into onto my your our their
    its""".split()
)
LIST_ITEM = re.compile(r"\s*([-*•|>#]|\d+[.):]|\S[^.]{0,40}:\s)")
LONG_LINE = 12  # words; a shorter last line may be a title or a verse, which need no full stop


def measure_lengths(examples: Sequence[dict[str, str]], tokenizer: Any | None) -> dict[str, np.ndarray]:
    """Lengths by field, each int (N,), inputs only where there is one: words, with a tokenizer tokens as well.

    "example_tokens" is what training sees, prompt and response with the end token; "prompt_tokens" the prompt's share.
    """
    fields = {
        "instruction": [example["instruction"] for example in examples],
        "input": [example["input"] for example in examples if example["input"]],
        "output": [example["output"] for example in examples],
    }
    lengths = {f"{name}_words": np.array([len(text.split()) for text in texts]) for name, texts in fields.items()}
    if tokenizer:
        for name, texts in fields.items():
            lengths[f"{name}_tokens"] = count_tokens(texts, tokenizer, name)
        prompts = [format_prompt(example) for example in examples]
        whole = tokenize(prompts, [text + tokenizer.eos_token for text in fields["output"]], tokenizer)
        lengths |= {"example_tokens": whole.lengths, "prompt_tokens": whole.prompt_lengths}
    return lengths


def count_tokens(texts: Sequence[str], tokenizer: Any, name: str) -> np.ndarray:
    counts = []
    for first in tqdm(range(0, len(texts), 2000), f"tokenize {name}s", disable=None, leave=False):
        encoded = tokenizer(list(texts[first : first + 2000]), add_special_tokens=False, return_attention_mask=False)
        counts.extend(map(len, encoded["input_ids"]))
    return np.array(counts, dtype=np.int64)


def shared_bins(values: Sequence[np.ndarray]) -> np.ndarray:
    """Left edges of bins of equal whole width up to the 99th percentile of all sets; the last bin takes the rest."""
    together = np.concatenate([v for v in values if len(v)] or [np.zeros(1)])
    top = max(int(np.percentile(together, 99)), 1)
    width = -(-top // BINS)
    return np.arange(0, top + width, width)


def histogram(values: np.ndarray, bins: np.ndarray) -> dict[str, Any]:
    """Counts of values in bins given by their left edges, the last one open; and mean, median, 99th percentile, max."""
    counts = np.bincount(np.searchsorted(bins, values, side="right") - 1, minlength=len(bins))
    summary = {"rows": len(values), "bin_starts": bins.tolist(), "counts": counts.tolist(), "last_bin_is_open": True}
    if len(values):
        summary |= {"mean": round(float(np.mean(values)), 1), "median": float(np.median(values))}
        summary |= {"percentile_99": float(np.percentile(values, 99)), "max": int(np.max(values))}
    return summary


def score_histogram(scores: np.ndarray, first: float = 0.0) -> dict[str, Any]:
    """Counts of similarities from `first` to 1 in bins of 0.05 (0.02 above 0.7): [a, b), the last one [a, 1]."""
    edges = np.round(np.arange(first, 1.001, 0.05 if first < THRESHOLD else 0.02), 2)
    return {"rows": len(scores), "bin_starts": edges[:-1].tolist(), "counts": np.histogram(scores, edges)[0].tolist()}


def token_figures(lengths: dict[str, np.ndarray], model_max_length: int) -> dict[str, Any]:
    """What a length limit cuts, and how much of each batch would be padding, in tokens."""
    whole, prompt = lengths["example_tokens"], lengths["prompt_tokens"]
    kept = np.minimum(whole, model_max_length)
    return {
        "total": int(whole.sum()),
        "model_max_length": model_max_length,
        "rows_cut": int((whole > model_max_length).sum()),
        "rows_without_any_response": int((prompt >= model_max_length).sum()),
        "tokens_cut": int((whole - kept).sum()),
        "padding_share": {str(size): padding_share(kept, size) for size in BATCH_SIZES if size <= len(kept)},
    }


def padding_share(lengths: np.ndarray, batch_size: int) -> float:
    """Share of padding in random batches, each padded to its longest example; a smaller last batch is left out.

    Lengths 2 and 4 in one batch: 2 of 8 positions, 0.25.
    """
    order = np.random.default_rng(SEED).permutation(len(lengths))
    batches = lengths[order[: len(lengths) // batch_size * batch_size]].reshape(-1, batch_size)
    return round(float(1 - batches.sum() / (batches.max(axis=1).sum() * batch_size)), 4)


def inspect_outputs(outputs: Sequence[str]) -> dict[str, Any]:
    """Rows whose output is empty, looks cut off, or holds characters beyond ASCII, and which characters these are."""
    foreign = [row for row, text in enumerate(outputs) if not text.isascii()]
    characters = collections.Counter(c for row in foreign for c in set(outputs[row]) if not c.isascii())
    truncated = [row for row, text in enumerate(outputs) if looks_truncated(text)]
    return {
        "empty": finding([row for row, text in enumerate(outputs) if not text.strip()]),
        "truncated_looking": finding(truncated),
        "non_ascii": finding(foreign) | {"rows_by_character": dict(characters.most_common(20))},
    }


def finding(rows: Sequence[Any]) -> dict[str, Any]:
    return {"count": len(rows), "rows": list(rows[:LISTED])}


def looks_truncated(text: str) -> bool:
    """Whether an output of at least five words seems to stop in the middle.

    It leaves a code block open; or ends on a comma, an opening bracket or a word such as "the"; or its last line is no
    list item, has 12 words or more, and ends in a small-lettered word without punctuation.
    """
    text = text.strip()
    words = text.split()
    if len(words) < 5:
        return False
    last_line = text.rsplit("\n", 1)[-1]
    long_prose = len(last_line.split()) >= LONG_LINE and not LIST_ITEM.match(last_line)
    open_end = long_prose and len(words[-1]) > 1 and words[-1].isalpha() and words[-1].islower()
    return text.count("```") % 2 == 1 or text[-1] in ",([{" or words[-1] in DANGLING or open_end


def find_duplicates(examples: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Rows that repeat an earlier row, wholly or in instruction and input: [row, the first like it]."""
    repeats = {}
    for name, keys in (("whole_rows", ("instruction", "input", "output")), ("prompts", ("instruction", "input"))):
        first = {}
        seen = [(row, first.setdefault(tuple(e[k] for k in keys), row)) for row, e in enumerate(examples)]
        repeats[name] = finding([[row, earlier] for row, earlier in seen if row != earlier])
    return repeats


def similar_pairs(texts: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """All pairs of encoded texts with ROUGE-L F over 0.7, block by block: scores, and the two indices of each pair.

    F = 2·lcs / (a + b) for lengths a ≤ b, and lcs ≤ a; so F > 0.7 needs 2a / (a + b) > 0.7, b < 13/7·a. With the texts
    in order of length each block meets only the texts up to 13/7 of its longest: nothing is lost, and most is skipped.
    """
    order = sorted((i for i, text in enumerate(texts) if text), key=lambda i: len(texts[i]))
    ordered, indices = [texts[i] for i in order], np.array(order, dtype=np.int64)
    lengths = np.array([len(text) for text in ordered])
    with tqdm(total=len(ordered), desc="pairs", unit=" texts", disable=None, leave=False) as progress:
        for first in range(0, len(ordered), PAIR_BLOCK):
            block = ordered[first : first + PAIR_BLOCK]
            end = int(np.searchsorted(7 * lengths, 13 * len(block[-1]), side="right"))
            scores = rouge_l(block, ordered[first:end], workers=-1)  # (B, texts of the block and after it)
            left, right = np.nonzero(scores > THRESHOLD)
            later = right > left
            left, right = left[later], right[later]
            yield scores[left, right], indices[first + left], indices[first + right]
            progress.update(len(block))


def near_duplicates(instructions: Sequence[str]) -> dict[str, Any]:
    """Pairs of rows whose instructions are more than 0.7 alike: their number, their scores, and the most alike.

    Instructions with the same words are compared once and counted as often as they occur.
    """
    encode = TokenEncoder()
    groups = collections.defaultdict(list)
    for row, instruction in enumerate(instructions):
        groups[encode(instruction)].append(row)
    groups.pop("", None)  # no words: similar to nothing
    members = list(groups.values())
    sizes = np.array([len(rows) for rows in members], dtype=np.int64)
    involved = sizes > 1
    same_words = int((sizes * (sizes - 1) // 2).sum())
    shape = score_histogram(np.ones(0), THRESHOLD)
    counts = np.array(shape["counts"], dtype=np.int64)
    counts[-1] += same_words
    total = same_words
    best = [(1.0, -a, -b) for rows in members for a, b in first_pairs(rows)]
    for scores, left, right in similar_pairs(list(groups)):
        weights = sizes[left] * sizes[right]
        counts += np.histogram(scores, [*shape["bin_starts"], 1.0], weights=weights)[0].astype(np.int64)
        total += int(weights.sum())
        involved[left] = involved[right] = True
        found = zip(scores.tolist(), left.tolist(), right.tolist(), strict=True)
        best += [(score, *sorted((-members[i][0], -members[j][0]), reverse=True)) for score, i, j in found]
        best = heapq.nlargest(LISTED, best)
    return {
        "threshold": THRESHOLD,
        "pairs": total,
        "pairs_with_the_same_words": same_words,
        "rows_in_a_pair": int(sizes[involved].sum()),
        "scores": {**shape, "rows": total, "counts": counts.tolist()},
        "most_similar": [[round(score, 4), -a, -b] for score, a, b in heapq.nlargest(LISTED, best)],
    }


def first_pairs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    return ((rows[0], row) for row in rows[1:])


def best_matches(texts: Sequence[str], pool: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Highest ROUGE-L F of each text to the pool (N,), where in the pool (N,); and of each pool text to the texts (M,).

    Texts are encoded already.
    """
    best, where, pool_best = np.zeros(len(texts)), np.zeros(len(texts), dtype=np.int64), np.zeros(len(pool))
    for first in tqdm(range(0, len(texts), MATCH_BLOCK), "compare", disable=None, leave=False):
        scores = rouge_l(texts[first : first + MATCH_BLOCK], pool, workers=-1)  # (B, M)
        rows = slice(first, first + len(scores))
        best[rows], where[rows] = scores.max(axis=1), scores.argmax(axis=1)
        pool_best = np.maximum(pool_best, scores.max(axis=0))
    return best, where, pool_best


def similarity_to_seeds(examples: Sequence[dict[str, str]], seeds: Sequence[dict[str, str]]) -> dict[str, Any]:
    """How close each instruction comes to the nearest seed task."""
    encode = TokenEncoder()
    pool = [encode(seed["instruction"]) for seed in seeds]
    best, where, _ = best_matches([encode(example["instruction"]) for example in examples], pool)
    over = [[row, int(where[row]), round(float(best[row]), 4)] for row in np.flatnonzero(best > THRESHOLD).tolist()]
    return {
        "seed_tasks": len(seeds),
        "mean": round(float(best.mean()), 4),
        "over_threshold": finding(over),  # [row, seed, score]
        "scores": score_histogram(best),
    }


def contamination(examples: Sequence[dict[str, str]], tasks: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Evaluation tasks that the data repeats: by the instruction, and by instruction and input as one text.

    Many tasks share an instruction such as "Correct the grammar" and differ in the input, so that the first count says
    where to look, and the second what leaks. Rows are listed as [row, task, score].
    """
    result = {"tasks": len(tasks)}
    for name, keys in (("instruction", ("instruction",)), ("instruction_and_input", ("instruction", "input"))):
        encode = TokenEncoder()
        pool = [encode("\n".join(task[key] for key in keys)) for task in tasks]
        texts = [encode("\n".join(example[key] for key in keys)) for example in examples]
        best, where, task_best = best_matches(texts, pool)
        rows = np.flatnonzero(best > THRESHOLD)
        rows = rows[np.argsort(-best[rows], kind="stable")].tolist()
        result[name] = {
            "tasks_over_threshold": int((task_best > THRESHOLD).sum()),
            "rows_over_threshold": finding([[row, int(where[row]), round(float(best[row]), 4)] for row in rows]),
            "scores": {**score_histogram(task_best), "mean": round(float(task_best.mean()), 4)},
        }
    return result
