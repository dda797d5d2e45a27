"""The special tokens that a tokenizer lacks, and the embedding rows that the new ones need."""

import contextlib
from typing import Any

from alpaca.common import ExitCode, ExpectedError
from alpaca.data.tokenizers import encode

# The pad token that the 2023 recipe adds to LLaMA (its 32,001st row), and what it gave tokenizers without the others.
DEFAULT_SPECIAL_TOKENS = {"pad_token": "[PAD]", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}


def complete_tokenizer(tokenizer: Any, pad_token: str | None = None, grow: bool = True) -> int:
    """Give the tokenizer the special tokens that it lacks; returns how many entries its vocabulary gained.

    `pad_token` names an existing token to pad with, which leaves the vocabulary as it is; without `grow`, one that the
    tokenizer has is chosen and nothing is added. Raises ExpectedError if the vocabulary has no such token, or the
    tokenizer takes its end-of-text token apart.
    """
    if not grow:
        pad_token = pad_token or tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
        if not (pad_token and tokenizer.eos_token):
            raise ExpectedError("the tokenizer has no end-of-text token, and none can be added here", ExitCode.USAGE)
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise ExpectedError(
                f"--pad_token {pad_token!r} is not in the tokenizer's vocabulary; name an existing token such as "
                f"{tokenizer.unk_token or tokenizer.eos_token!r}, or leave the flag out to add [PAD]",
                ExitCode.USAGE,
            )
        tokenizer.pad_token = pad_token
    missing = {name: token for name, token in DEFAULT_SPECIAL_TOKENS.items() if not getattr(tokenizer, name)}
    num_new_tokens = tokenizer.add_special_tokens(missing) if grow else 0
    if encode([f"a{tokenizer.eos_token}"], tokenizer)[0][-1] != tokenizer.eos_token_id:
        raise ExpectedError(
            f"the tokenizer's end-of-text token {tokenizer.eos_token!r} is not one token inside a text, so no answer "
            "would learn to end; look for split_special_tokens or eos_token in its tokenizer_config.json",
            ExitCode.USAGE,
        )
    return num_new_tokens


def resize_embeddings(model: Any, tokenizer: Any, num_new_tokens: int) -> None:
    """Make room for the tokenizer's newest tokens; their embedding rows become the mean of the rows before them.

    A matrix that already has rows to spare (OPT pads its own to a round number) keeps its size. Tied input and output
    embeddings are one matrix, and the second assignment changes nothing.
    """
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        num_new_tokens = max(num_new_tokens, len(tokenizer) - rows)  # also a [PAD] that only the tokenizer had
    if num_new_tokens == 0:
        return
    first = len(tokenizer) - num_new_tokens
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        with _gathered(embeddings.weight):  # (V, H)
            weight = embeddings.weight.data
            if len(weight):
                weight[first : len(tokenizer)] = weight[:first].mean(dim=0, keepdim=True)


def _gathered(parameter: Any) -> contextlib.AbstractContextManager:
    """ZeRO-3 shards parameters as it loads them; in this context each is whole, and what rank 0 writes is kept."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    from deepspeed.zero import GatheredParameters

    return GatheredParameters(parameter, modifier_rank=0)


def smart_tokenizer_and_embedding_resize(special_tokens_dict: dict[str, str], tokenizer: Any, model: Any) -> None:
    """Add special tokens to the tokenizer and mean-initialised rows for those that are new to the model."""
    resize_embeddings(model, tokenizer, tokenizer.add_special_tokens(special_tokens_dict))
