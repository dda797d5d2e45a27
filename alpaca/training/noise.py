"""NEFTune (Jain et al., 2023) for examples that lie end to end: noise by the length of each token's own example.

The library divides by the length of the whole row, which makes the noise of B examples laid end to end √B too small.
"""

from typing import Any

import torch


def add_noise_by_example(model: Any, alpha: float) -> None:
    """While the model trains, add noise in ±alpha / √(T·H) to its embeddings (1, sum of T, H), T each example's length.

    The examples' bounds "cu_seq_lens_q" come with the batch, as `DataCollatorWithoutPadding` makes it.
    """
    bounds = {}

    def take_bounds(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        bounds["now"] = kwargs.get("cu_seq_lens_q")

    def add_noise(module: Any, args: Any, embeddings: torch.Tensor) -> torch.Tensor | None:
        if not module.training or bounds.get("now") is None:
            return None
        lengths = bounds["now"].diff()
        lengths = lengths.repeat_interleave(
            lengths, output_size=embeddings.shape[1]
        )  # (sum of T,), of each token's row
        size = (alpha / (lengths * embeddings.shape[2]).sqrt()).to(embeddings.dtype)
        return embeddings + (2 * torch.rand_like(embeddings) - 1) * size[:, None]

    model.register_forward_pre_hook(take_bounds, with_kwargs=True)
    model.get_input_embeddings().register_forward_hook(add_noise)
