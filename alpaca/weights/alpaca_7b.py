"""The release of 2023, whose weight diff has no manifest: recognised, and checked by the sum of its weights."""

from typing import Any

import numpy as np

from alpaca.weights.arithmetic import Plan, read_float32, rotary_buffer
from alpaca.weights.casts import FLOATS
from alpaca.weights.files import Checkpoint, mismatch
from alpaca.weights.plan import find_in_base, is_rotary
from alpaca.weights.work import say

CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32001,
}
SUM = 50637.1836  # in float32, over the recovered weights


def is_alpaca_7b(diff: Checkpoint, plans: dict[str, Plan]) -> bool:
    """Told by its config and a vocabulary that grew by one row."""
    same = all(diff.config.get(key) == value for key, value in CONFIG.items())
    grown = [plan for plan in plans.values() if plan.mean_rows and plan.shape[0] == CONFIG["vocab_size"]]
    return same and bool(grown) and all(p.raw.tensors[p.raw_name].shape[0] == p.shape[0] - 1 for p in grown)


def float32_sum(values: np.ndarray, shape: tuple[int, ...]) -> Any:
    """torch's sum over a tensor: its order of additions is part of the published figure."""
    import torch

    return torch.from_numpy(values).view(shape).sum()


def check_sum(raw: Checkpoint, diff: Checkpoint, sums: dict[str, Any]) -> None:
    """Add the sums of all recovered tensors (name → `float32_sum`), as 2023 did, and compare with the published one.

    In the order of the state dict of 2023, which held rotary buffers: the diff's, else the base's, else computed ones.
    """
    import torch

    parts = [f"self_attn.{part}_proj.weight" for part in "qkvo"] + ["self_attn.rotary_emb.inv_freq"]
    parts += [f"mlp.{part}_proj.weight" for part in ("gate", "down", "up")]
    parts += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    layers = [f"model.layers.{layer}.{part}" for layer in range(diff.config["num_hidden_layers"]) for part in parts]
    total = 0
    for name in ["model.embed_tokens.weight", *layers, "model.norm.weight", "lm_head.weight"]:
        if is_rotary(name) and name not in sums:
            raw_name = find_in_base(name, raw.tensors)
            stored = raw_name and raw.tensors[raw_name].dtype in FLOATS
            values = read_float32(raw, raw_name) if stored else rotary_buffer(diff)
            sums[name] = float32_sum(values, values.shape)
        if name not in sums:
            raise mismatch(f"{diff.directory}: {name} is missing from what should be Alpaca-7B")
        total = total + sums[name]
    if not torch.allclose(total, torch.full_like(total, SUM), atol=1e-2, rtol=0):
        types = ", ".join(sorted({tensor.dtype for name, tensor in raw.tensors.items() if not is_rotary(name)}))
        raise mismatch(
            f"{raw.directory} ({types}) and {diff.directory} sum up to {float(total):.4f}, Alpaca-7B to {SUM}: wrong "
            "base (LLaMA-7B's own type is float16), damaged files, or not that release (if you know it is not: "
            "--check_integrity_naively False)"
        )
    say("the weights sum up to Alpaca-7B's; this float32 sum does not see exchanged values, nor most flipped bits")
