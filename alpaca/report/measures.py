"""What data_report.py finds in a data set: lengths, padding, repetitions, near-duplicates, contamination."""

import collections
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from alpaca.data.examples import tokenize
from alpaca.data.similarity import TokenEncoder, rouge_l
from alpaca.data.words import count_words
from alpaca.prompts import format_prompt

THRESHOLD = 0.7  # ROUGE-L F above which two instructions count as near-duplicates, as in the generation of 2023
BATCH_SIZES = (2, 4, 8, 16, 32, 64, 128)  # examples
LISTED = 1000  # rows or pairs that report.json lists of each finding; the counts are of all
BLOCK = 256  # texts compared at once: enough for all cores, and their scores fit in memory
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
    texts = {field: [example[field] for example in examples] for field in ("instruction", "input", "output")}
    texts["input"] = [text for text in texts["input"] if text]
    lengths = {f"{field}_words": np.array([count_words(text) for text in texts[field]], dtype=int) for field in texts}
    if tokenizer:
        lengths |= {f"{field}_tokens": count_tokens(texts[field], tokenizer) for field in texts}
        prompts = [format_prompt(example) for example in examples]
        whole = tokenize(prompts, [text + tokenizer.eos_token for text in texts["output"]], tokenizer)
        lengths |= {"example_tokens": whole.lengths, "prompt_tokens": whole.prompt_lengths}
    return lengths


def count_tokens(texts: Sequence[str], tokenizer: Any) -> np.ndarray:
    counts: list[int] = []
    for first in range(0, len(texts), 2000):  # in one go, 52,000 texts would take a gigabyte
        counts += map(len, tokenizer(texts[first : first + 2000], add_special_tokens=False)["input_ids"])
    return np.array(counts, dtype=int)


def shared_bins(lengths: Sequence[np.ndarray]) -> np.ndarray:
    """Left edges of bins of equal whole width up to the 99th percentile of all sets; the last bin takes the rest."""
    together = np.concatenate(lengths)
    top = max(int(np.percentile(together, 99)), 1) if len(together) else 1
    width = -(-top // BINS)
    return np.arange(0, top + width, width)


def histogram(values: np.ndarray, bins: np.ndarray) -> dict[str, Any]:
    """Counts of values in bins given by their left edges, the last one open; and mean, median, 99th percentile, max."""
    counts = np.histogram(values, [*bins, np.inf])[0]
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
    characters = collections.Counter(c for text in outputs for c in set(text) if not c.isascii())
    return {
        "empty": finding([row for row, text in enumerate(outputs) if not text.strip()]),
        "truncated_looking": finding([row for row, text in enumerate(outputs) if looks_truncated(text)]),
        "non_ascii": finding([row for row, text in enumerate(outputs) if not text.isascii()])
        | {"rows_by_character": dict(characters.most_common(20))},
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
        first: dict[tuple[str, ...], int] = {}
        seen = [(row, first.setdefault(tuple(e[k] for k in keys), row)) for row, e in enumerate(examples)]
        repeats[name] = finding([[row, earlier] for row, earlier in seen if row != earlier])
    return repeats


def similar_pairs(texts: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """All pairs of encoded texts with ROUGE-L F over 0.7, block by block: scores, and the two indices of each pair.

    F = 2·lcs / (a + b) for lengths a ≤ b, and lcs ≤ a; so F > 0.7 needs 2a / (a + b) > 0.7, b < 13/7·a. With the texts
    in order of length each block meets only the texts up to 13/7 of its longest: nothing is lost, and most is skipped.
    """
    order = np.array(sorted((i for i, text in enumerate(texts) if text), key=lambda i: len(texts[i])), dtype=int)
    ordered = [texts[i] for i in order]
    lengths = np.array([len(text) for text in ordered])
    for start in tqdm(range(0, len(ordered), BLOCK), "pairs", disable=None, leave=False):
        block = ordered[start : start + BLOCK]
        end = np.searchsorted(7 * lengths, 13 * len(block[-1]), side="right")
        scores = rouge_l(block, ordered[start:end], workers=-1)  # (texts of the block, these and later ones)
        left, right = np.nonzero(np.triu(scores > THRESHOLD, k=1))  # each pair once
        yield scores[left, right], order[start + left], order[start + right]


def near_duplicates(instructions: Sequence[str]) -> dict[str, Any]:
    """Pairs of rows whose instructions are more than 0.7 alike: their number, their scores, and the most alike."""
    encode = TokenEncoder()
    texts = [encode(instruction) for instruction in instructions]
    shape = score_histogram(np.zeros(0), THRESHOLD)
    counts, in_a_pair = np.array(shape["counts"]), np.zeros(len(texts), dtype=bool)
    most_similar: list[tuple[float, int, int]] = []  # (-score, row, later row)
    for scores, left, right in similar_pairs(texts):
        counts += np.histogram(scores, [*shape["bin_starts"], 1.0])[0]
        in_a_pair[left] = in_a_pair[right] = True
        left, right = np.minimum(left, right), np.maximum(left, right)
        best = np.lexsort((right, left, -scores))[:LISTED]
        found = zip((-scores[best]).tolist(), left[best].tolist(), right[best].tolist(), strict=True)
        most_similar = sorted([*most_similar, *found])[:LISTED]
    total = int(counts.sum())
    return {
        "threshold": THRESHOLD,
        "pairs": total,
        "pairs_with_the_same_words": sum(n * (n - 1) // 2 for text, n in collections.Counter(texts).items() if text),
        "rows_in_a_pair": int(in_a_pair.sum()),
        "not_compared": without_tokens(texts),
        "scores": {**shape, "rows": total, "counts": counts.tolist()},
        "most_similar": [[round(-negative, 4), *rows] for negative, *rows in most_similar],
    }


def without_tokens(encoded: Sequence[str]) -> dict[str, Any]:
    """Rows that no comparison can find alike: they hold no letter or digit of any script."""
    return finding([row for row, text in enumerate(encoded) if not text])


def compare(texts: Sequence[str], pool: Sequence[str]) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """ROUGE-L F of each text to the nearest of the pool (N,), and of each of the pool to the nearest text (M,).

    Also findings: "over_threshold", the texts over 0.7 as [text, its nearest of the pool, score], most alike first;
    and "not_compared", with "pool_not_compared", those without tokens.
    """
    encode = TokenEncoder()
    texts, pool = [encode(text) for text in texts], [encode(text) for text in pool]
    best, where, pool_best = np.zeros(len(texts)), np.zeros(len(texts), dtype=int), np.zeros(len(pool))
    for start in tqdm(range(0, len(texts), BLOCK), "compare", disable=None, leave=False):
        scores = rouge_l(texts[start : start + BLOCK], pool, workers=-1)  # (texts of the block, M)
        best[start : start + BLOCK], where[start : start + BLOCK] = scores.max(axis=1), scores.argmax(axis=1)
        pool_best = np.maximum(pool_best, scores.max(axis=0))
    rows = [row for row in np.argsort(-best, kind="stable").tolist() if best[row] > THRESHOLD]
    over = finding([[row, int(where[row]), round(float(best[row]), 4)] for row in rows])
    not_compared = {"not_compared": without_tokens(texts), "pool_not_compared": without_tokens(pool)}
    return best, pool_best, {"over_threshold": over, **not_compared}


def similarity_to_seeds(examples: Sequence[dict[str, str]], seeds: Sequence[dict[str, str]]) -> dict[str, Any]:
    """How close each instruction comes to the nearest seed task; rows over 0.7 as [row, seed, score]."""
    best, _, findings = compare([e["instruction"] for e in examples], [seed["instruction"] for seed in seeds])
    findings["seed_tasks_not_compared"] = findings.pop("pool_not_compared")
    mean = round(float(best.mean()), 4)
    return {"seed_tasks": len(seeds), "mean": mean, **findings, "scores": score_histogram(best)}


def contamination(examples: Sequence[dict[str, str]], tasks: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Evaluation tasks that the data repeats: by the instruction, and by instruction and input as one text.

    Many tasks share an instruction such as "Correct the grammar" and differ in the input, so that the first count says
    where to look, and the second what leaks. Rows are listed as [row, task, score].
    """
    result: dict[str, Any] = {"tasks": len(tasks)}
    for name, keys in (("instruction", ("instruction",)), ("instruction_and_input", ("instruction", "input"))):
        texts, pool = (["\n".join(entry[key] for key in keys) for entry in entries] for entries in (examples, tasks))
        _, task_best, findings = compare(texts, pool)
        result[name] = {
            "tasks_over_threshold": int((task_best > THRESHOLD).sum()),
            "rows_over_threshold": findings["over_threshold"],
            "rows_not_compared": findings["not_compared"],
            "tasks_not_compared": findings["pool_not_compared"],
            "scores": {**score_histogram(task_best), "mean": round(float(task_best.mean()), 4)},
        }
    return result
