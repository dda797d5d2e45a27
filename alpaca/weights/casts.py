"""Words, the unsigned integers that hold a tensor's bits, cast from one floating type to another as torch does."""

import numpy as np

from alpaca.weights.files import word_type

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


def cast(words: np.ndarray, dtype: str, wanted: str) -> np.ndarray:
    """Words of `dtype` → words of `wanted`; the same bits where the two are one."""
    return words if dtype == wanted else from_float32(to_float32(words, dtype), wanted)
