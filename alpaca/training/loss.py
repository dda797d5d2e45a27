"""The loss of a causal language model without float32 logits of a whole micro-batch.

The library computes logits for every token and turns all of them into float32: for 4 x 512 tokens of a 32,001-token
vocabulary 250 MiB, three times over with the softmax and its gradient. Here logits exist for the trained tokens only
(`DataCollatorWithoutPadding(responses_only=True)` names them), in the model's own precision, and in float32 a chunk at
a time. `--use_liger_kernel True` does better still on a GPU, where Liger has a kernel for the model.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 2**24  # logits that are in float32 at a time: 64 MiB, 524 tokens of a 32,001-token vocabulary


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Cross-entropy as transformers' `ForCausalLMLoss` defines it, a chunk of tokens after the other.

    logits (B, T, V), of any float type; labels (B, T), or shift_labels (B, T), which say what each position predicts.
    The sum over all labels, divided by `num_items_in_batch`, or by the number of labels where that is None.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    logits, targets = logits.view(-1, vocab_size), shift_labels.reshape(-1).to(logits.device)
    tokens = max(1, CHUNK // vocab_size)
    if len(logits) <= tokens:
        total = _summed(logits, targets, ignore_index)
    else:  # the softmax is computed again in the backward pass: what is kept of a chunk is its logits as they came
        chunks = zip(logits.split(tokens), targets.split(tokens), strict=True)
        total = sum(
            checkpoint(_summed, chunk, target, ignore_index, use_reentrant=False, preserve_rng_state=False)
            for chunk, target in chunks
        )
    if num_items_in_batch is None:
        num_items_in_batch = (targets != ignore_index).sum()
    elif torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    return total / num_items_in_batch


def _summed(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> torch.Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=ignore_index, reduction="sum")


def use_lean_loss(model: Any) -> None:
    """Have a transformers model compute its loss like this, and return no logits while it trains.

    Returned logits would be turned into float32 by mixed precision, whether someone reads them or not.
    """
    model.loss_function = causal_lm_loss
    forward = model.forward

    @functools.wraps(forward)
    def without_logits(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        return type(outputs)(loss=outputs.loss) if model.training and outputs.loss is not None else outputs

    model.forward = without_logits
