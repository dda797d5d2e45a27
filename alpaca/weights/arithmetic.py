"""What happens to one tensor of a weight diff: words, float32, and the two ways to subtract.

Words are unsigned integers that hold a tensor's bits. The exact difference is taken between words, modulo 2^bits; the
difference of 2023 between float32 values. Everything works on pieces (stretches of a flattened tensor).
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from alpaca.weights.files import DTYPE_BYTES, Checkpoint, bad_data, word_type
from alpaca.weights.output import ShardWriter
from alpaca.weights.work import Work, pieces_of

FLOATS = {"F64", "F32", "F16", "BF16"}


def to_float32(words: np.ndarray, dtype: str) -> np.ndarray:
    """uint16 words of "BF16" → float32."""
    if dtype == "F32":
        return words.view(np.float32)
    if dtype == "BF16":
        return (words.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return words.view({"F16": np.float16, "F64": np.float64}[dtype]).astype(np.float32)


def from_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 → words of `dtype`, rounded to nearest even as torch does."""
    if dtype == "F32":
        return values.view(np.uint32)
    if dtype == "BF16":
        bits = values.view(np.uint32)
        words = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        words[np.isnan(values)] = 0x7FC0
        return words
    with np.errstate(over="ignore"):
        return values.astype({"F16": np.float16, "F64": np.float64}[dtype]).view(word_type(dtype))


def read_float32(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A whole tensor, flat, as float32."""
    tensor = checkpoint.tensors[name]
    values = np.empty(tensor.elements, np.float32)
    for start, stop in pieces_of(tensor.elements):
        values[start:stop] = to_float32(checkpoint.read(name, start, stop), tensor.dtype)
    return values


def mean_of_rows(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """Mean over dimension 0 in float32, by torch, whose order of additions decides the last bits of a diff of 2023."""
    import torch

    values = torch.from_numpy(read_float32(checkpoint, name))
    return values.view(checkpoint.tensors[name].shape[0], -1).mean(dim=0).numpy()


def rotary_buffer(checkpoint: Checkpoint) -> np.ndarray:
    """inv_freq = 1 / θ^(2i/d), float32 (Su et al. 2021, section 3.2.2): models of 2023 computed and saved it."""
    config = checkpoint.config
    try:
        size = config["hidden_size"] // config["num_attention_heads"]
        exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
        powers = float(config.get("rope_theta", 10000)) ** exponents.astype(np.float64)  # rounded, it is torch's power
        return np.float32(1) / powers.astype(np.float32)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise bad_data(f"{checkpoint.directory / 'config.json'}: no attention heads to compute ({error!r})")


@dataclass
class Plan:
    """How a tensor of the tuned model relates to the base: its first rows (dimension 0) are differences.

    Rows after them, or all where the base lacks the tensor, are stored whole; with `mean_rows`, as in 2023, as
    differences from the mean row of the base.
    """

    dtype: str  # of the tuned tensor
    shape: tuple[int, ...]
    as_float32: bool  # the difference is taken between float32 values, not between words
    raw: Checkpoint
    raw_name: str | None = None  # None: the base lacks the tensor
    mean_rows: bool = False
    mean: np.ndarray | None = None  # (elements of a row,) float32, set when the tensor's turn comes
    computed: np.ndarray | None = None  # float32, in place of a base tensor that is computed, not stored

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def diff_dtype(self) -> str:
        """An exact difference is no number: it is stored with an integer type of the same width."""
        return "F32" if self.as_float32 else f"I{8 * DTYPE_BYTES[self.dtype]}"

    def read_base(self, start: int, stop: int) -> np.ndarray | None:
        """The base's words under elements [start, stop), where it has any."""
        stop = min(stop, self.raw.tensors[self.raw_name].elements) if self.raw_name else 0
        return self.raw.read(self.raw_name, start, stop) if start < stop else None

    def base_words(self, words: np.ndarray | None, start: int, stop: int) -> np.ndarray:
        """What the exact difference is taken from: words of the base cast to the tuned type, then zeros."""
        if words is None:
            return np.zeros(stop - start, word_type(self.dtype))
        raw_dtype = self.raw.tensors[self.raw_name].dtype
        if raw_dtype != self.dtype:
            words = from_float32(to_float32(words, raw_dtype), self.dtype)
        missing = stop - start - len(words)
        return np.pad(words, (0, missing)) if missing else words

    def base_float32(self, words: np.ndarray | None, start: int, stop: int) -> np.ndarray:
        """What the float32 difference is taken from: values of the base, then mean rows, or zeros."""
        base = np.zeros(stop - start, np.float32)
        if self.computed is not None:
            base[:] = self.computed[start:stop]
        if self.mean is not None:
            base[:] = self.mean[np.arange(start, stop) % len(self.mean)]
        if words is not None:
            base[: len(words)] = to_float32(words, self.raw.tensors[self.raw_name].dtype)
        return base


def diff_tensor(
    work: Work, plan: Plan, name: str, tuned: Checkpoint, writer: ShardWriter, verify: bool
) -> dict[str, str | None]:
    """Stream one tensor: tuned − base → the diff's shard. Returns sha256 sums of raw, diff, tuned and recovered."""
    hashes = {role: hashlib.sha256() for role in ("raw", "diff", "tuned", "recovered")}
    if plan.mean_rows:
        plan.mean = mean_of_rows(plan.raw, plan.raw_name)
    for start, stop in work.pieces(plan.elements, DTYPE_BYTES[plan.dtype]):
        base, words = plan.read_base(start, stop), tuned.read(name, start, stop)
        pieces = {"raw": base, "tuned": words}
        if plan.as_float32:
            values = plan.base_float32(base, start, stop)
            with np.errstate(all="ignore"):  # infinities and NaNs of a broken model stay what they are
                pieces["diff"] = to_float32(words, plan.dtype) - values
                pieces["recovered"] = from_float32(values + pieces["diff"], plan.dtype)  # not always the tuned bits
        else:
            pieces["diff"] = words - plan.base_words(base, start, stop)
        writer.write(name, start, pieces["diff"])
        for role, piece in pieces.items():
            if verify and piece is not None:
                work.hash(hashes[role], piece)
    if not plan.as_float32:
        hashes["recovered"] = hashes["tuned"]
    return {role: digest.hexdigest() if verify else None for role, digest in hashes.items()}


def recover_tensor(
    work: Work, plan: Plan, name: str, diff: Checkpoint, writer: ShardWriter, unrounded: np.ndarray | None = None
) -> None:
    """Stream one tensor: base + diff → the recovered model's shard.

    unrounded: a float32 array (plan.elements,) that takes the values as they are before the cast to `plan.dtype`.
    """
    if plan.mean_rows:
        plan.mean = mean_of_rows(plan.raw, plan.raw_name)
    for start, stop in work.pieces(plan.elements, DTYPE_BYTES[plan.dtype]):
        base, words = plan.read_base(start, stop), diff.read(name, start, stop)
        if plan.as_float32:
            with np.errstate(all="ignore"):
                values = plan.base_float32(base, start, stop) + to_float32(words, diff.tensors[name].dtype)
            writer.write(name, start, from_float32(values, plan.dtype))
            if unrounded is not None:
                unrounded[start:stop] = values
        else:
            writer.write(name, start, plan.base_words(base, start, stop) + words)
