"""What happens to one tensor of a weight diff: the two ways to subtract, and to add.

The exact difference is taken between words, modulo 2^bits; the
difference of 2023 between float32 values. Everything works on pieces (stretches of a flattened tensor).
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from alpaca.weights.casts import cast, from_float32, to_float32
from alpaca.weights.files import DTYPE_BYTES, Checkpoint, bad_data, word_type
from alpaca.weights.output import ShardWriter
from alpaca.weights.work import Work, pieces_of

MAX_HEAD_SIZE = 2**16  # models have 64 to 512; a hostile config could ask for all memory


def read_float32(checkpoint: Checkpoint, name: str, dtype: str | None = None) -> np.ndarray:
    """A whole tensor, flat, as float32; cast to `dtype` on the way, where one is given."""
    tensor = checkpoint.tensors[name]
    dtype = dtype or tensor.dtype
    values = np.empty(tensor.elements, np.float32)
    for start, stop in pieces_of(tensor.elements):
        values[start:stop] = to_float32(cast(checkpoint.read(name, start, stop), tensor.dtype, dtype), dtype)
    return values


def mean_of_rows(checkpoint: Checkpoint, name: str, dtype: str | None = None) -> np.ndarray:
    """Mean over dimension 0 in float32, by torch, whose order of additions decides the last bits of a diff of 2023."""
    import torch

    values = torch.from_numpy(read_float32(checkpoint, name, dtype))
    return values.view(checkpoint.tensors[name].shape[0], -1).mean(dim=0).numpy()


def rotary_buffer(checkpoint: Checkpoint) -> np.ndarray:
    """inv_freq = 1 / θ^(2i/d), float32 (Su et al. 2021, section 3.2.2): models of 2023 computed and saved it."""
    config = checkpoint.config
    try:
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta") or 10000
        if size > MAX_HEAD_SIZE:
            raise ValueError(f"heads of {size}")
        exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
        powers = float(theta) ** exponents.astype(np.float64)  # rounded, it is torch's power
        return np.float32(1) / powers.astype(np.float32)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise bad_data(f"{checkpoint.directory / 'config.json'}: no attention heads to compute ({error!r})")


@dataclass
class Plan:
    """How a tensor of the tuned model relates to the base: its first rows (dimension 0) are differences.

    Rows after them, or all where the base lacks the tensor, are stored whole; with `mean_rows`, as in 2023, as
    differences from the mean row of the base. Rows that only the base has belong to nothing.
    """

    dtype: str  # of the tuned tensor
    shape: tuple[int, ...]
    as_float32: bool  # the difference is taken between float32 values, not between words
    raw: Checkpoint
    raw_name: str | None = None  # None: the base lacks the tensor
    raw_dtype: str | None = None  # what the base is cast to first: another copy of it may have another type
    mean_rows: bool = False
    mean: np.ndarray | None = None  # (elements of a row,) float32, set when the tensor's turn comes
    computed: np.ndarray | None = None  # float32, in place of a base tensor that is computed, not stored
    zeros: bool = False  # a rotary buffer that one side lacks: the difference is zeros, whatever the other side has
    rounded: int = 0  # elements that a float32 difference does not bring back bit for bit, counted by diff_tensor

    def __post_init__(self):
        if self.raw_name:
            self.set_base(self.raw_name)

    def set_base(self, name: str, dtype: str | None = None) -> None:
        self.raw_name, self.raw_dtype = name, dtype or self.raw.tensors[name].dtype

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * DTYPE_BYTES[self.dtype]

    @property
    def diff_dtype(self) -> str:
        """An exact difference is no number: it is stored with an integer type of the same width."""
        return "F32" if self.as_float32 else f"I{8 * DTYPE_BYTES[self.dtype]}"

    def read_base(self, start: int, stop: int) -> np.ndarray | None:
        """The base's words under elements [start, stop), where it has any."""
        base = self.raw.tensors.get(self.raw_name)
        stop = min(stop, base.elements) if base else 0
        return cast(self.raw.read(self.raw_name, start, stop), base.dtype, self.raw_dtype) if start < stop else None

    def base_words(self, words: np.ndarray | None, start: int, stop: int) -> np.ndarray:
        """What the exact difference is taken from: words of the base cast to the tuned type, then zeros."""
        if words is None:
            return np.zeros(stop - start, word_type(self.dtype))
        words = cast(words, self.raw_dtype, self.dtype)
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
            base[: len(words)] = to_float32(words, self.raw_dtype)
        return base


def diff_tensor(
    work: Work, plan: Plan, name: str, tuned: Checkpoint, writer: ShardWriter, verify: bool
) -> dict[str, str | None]:
    """Stream one tensor: tuned − base → the diff's shard. Returns sha256 sums of raw, diff, tuned and recovered."""
    hashes = {role: hashlib.sha256() for role in ("raw", "diff", "tuned", "recovered")}
    if plan.mean_rows:
        plan.mean = mean_of_rows(plan.raw, plan.raw_name, plan.raw_dtype)
    for start, stop in work.pieces(plan.elements, DTYPE_BYTES[plan.dtype]):
        base, words = plan.read_base(start, stop), tuned.read(name, start, stop) if name in tuned.tensors else None
        pieces = {"raw": base, "tuned": words}
        if plan.as_float32:
            values = plan.base_float32(base, start, stop)
            with np.errstate(all="ignore"):  # infinities and NaNs of a broken model stay what they are
                pieces["diff"] = np.zeros_like(values) if plan.zeros else to_float32(words, plan.dtype) - values
                pieces["recovered"] = from_float32(values + pieces["diff"], plan.dtype)
            plan.rounded += 0 if words is None else np.count_nonzero(pieces["recovered"] != words)
        else:
            pieces["diff"] = words - plan.base_words(base, start, stop)
        writer.write(name, start, pieces["diff"])
        for role, piece in pieces.items():
            if verify and piece is not None:
                work.hash(hashes[role], piece)
    if verify and plan.raw_name:  # rows that the base alone has
        for start, stop in pieces_of(plan.raw.tensors[plan.raw_name].elements - plan.elements):
            work.hash(hashes["raw"], plan.read_base(plan.elements + start, plan.elements + stop))
    if not plan.as_float32:
        hashes["recovered"] = hashes["tuned"]
    return {role: digest.hexdigest() if verify else None for role, digest in hashes.items()}


def recover_tensor(
    work: Work,
    plan: Plan,
    name: str,
    diff: Checkpoint,
    writer: ShardWriter,
    verify: bool,
    unrounded: np.ndarray | None = None,
) -> str | None:
    """Stream one tensor: base + diff → the recovered model's shard. Returns the sha256 of what was written.

    unrounded: a float32 array (plan.elements,) that takes the values as they are before the cast to `plan.dtype`.
    """
    digest = hashlib.sha256()
    if plan.mean_rows:
        plan.mean = mean_of_rows(plan.raw, plan.raw_name, plan.raw_dtype)
    for start, stop in work.pieces(plan.elements, DTYPE_BYTES[plan.dtype]):
        base, words = plan.read_base(start, stop), diff.read(name, start, stop)
        if plan.as_float32:
            with np.errstate(all="ignore"):
                values = plan.base_float32(base, start, stop) + to_float32(words, diff.tensors[name].dtype)
            recovered = from_float32(values, plan.dtype)
            if unrounded is not None:
                unrounded[start:stop] = values
        else:
            recovered = plan.base_words(base, start, stop) + words
        writer.write(name, start, recovered)
        if verify:
            work.hash(digest, recovered)
    return digest.hexdigest() if verify else None
