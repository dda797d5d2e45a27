"""Attention over examples that lie end to end, each computed by itself.

The library's way is one attention over the whole row with a mask that leaves out most of it: 4 examples of 126 tokens
cost what one of 504 does, and a mask keeps the fast kernels away. Known to the library under the name `BY_EXAMPLE`;
flash attention's packages have a kernel for this, and where one is asked for, it is used instead.
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BY_EXAMPLE = "sdpa_by_example"


def sdpa_by_example(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    example_lengths: list[int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each example; query, key and value (1, heads, sum of T, head_dim) → (1, sum of T, heads,
    head_dim).

    `example_lengths` comes with the batch. Without it this is the library's sdpa, mask and all.
    """
    if example_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    examples = zip(*(states.split(example_lengths, dim=2) for states in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in examples]
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(BY_EXAMPLE, sdpa_by_example)
AttentionMaskInterface.register(BY_EXAMPLE, sdpa_mask)
