"""Models and tokenizers, loaded from a directory or the Hub."""

from typing import Any

import torch
import transformers

from alpaca.common import ExitCode, ExpectedError, notice
from alpaca.data.tokenizers import TokenizerLoader
from alpaca.training.arguments import TrainingArguments
from alpaca.training.flags import ModelArguments


def from_pretrained(loader: Any, name: str, **options: Any) -> Any:
    """`loader.from_pretrained`; a wrong name, a torn file, no network or a missing package become one line."""
    from safetensors import SafetensorError

    try:
        return loader.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ExpectedError(f"--model_name_or_path {name} can't be loaded: {reason}", ExitCode.USAGE)


def load_tokenizer(model_args: ModelArguments, training_args: TrainingArguments) -> Any:
    return from_pretrained(
        TokenizerLoader,
        model_args.model_name_or_path,
        cache_dir=training_args.cache_dir,
        model_max_length=training_args.model_max_length,
        padding_side="right",
    )


def load_model(model_args: ModelArguments, training_args: TrainingArguments) -> Any:
    model = from_pretrained(
        transformers.AutoModelForCausalLM,
        model_args.model_name_or_path,
        cache_dir=training_args.cache_dir,
        dtype=getattr(torch, model_args.dtype),
        attn_implementation=model_args.attn_implementation,
    )
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        # Some published models set a temperature without sampling, which can be loaded but not saved again.
        model.generation_config.do_sample = True
        notice("the model's generation_config sets sampling options without do_sample; do_sample is now true")
    return model
