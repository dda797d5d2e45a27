"""LoRA adapters (Hu et al., 2021): added before training, merged into the weights after it."""

from pathlib import Path
from typing import Any

import transformers
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from alpaca.common import ExitCode, ExpectedError, notice
from alpaca.training.arguments import TrainingArguments
from alpaca.training.checkpoints import MERGED, publish_model, stage_model, writing
from alpaca.training.flags import ModelArguments
from alpaca.training.models import load_model
from alpaca.training.special_tokens import resize_embeddings


def add_adapters(model: Any, model_args: ModelArguments, seed: int) -> Any:
    """LoRA (Hu et al., 2021): W x + lora_alpha / lora_r * B A x, where only A (r, in) and B (out, r) are trained.

    Raises ExpectedError (exit 2) when the model has none of the layers that --lora_target_modules names.
    """
    from peft import LoraConfig, get_peft_model

    names = [name.strip() for name in model_args.lora_target_modules.split(",")]
    config = LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules="all-linear" if names == ["all-linear"] else names,
        task_type="CAUSAL_LM",
    )
    transformers.set_seed(seed)  # A starts random, and on every process the same
    try:
        model = get_peft_model(model, config)
    except ValueError as error:
        raise ExpectedError(f"--lora_target_modules {model_args.lora_target_modules}: {error}", ExitCode.USAGE)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    notice(f"LoRA trains {trained:,} parameters beside the model's {model.num_parameters() - trained:,}, which stay")
    return model


def merge_adapters(model_args: ModelArguments, training_args: TrainingArguments, tokenizer: Any) -> None:
    """Save the model with the adapters added to its weights, as one that needs no peft, into output_dir/merged.

    It is made from the files on disk, on the CPU: a sharded model need not fit into one GPU.
    """
    from peft import PeftModel

    unset_hf_deepspeed_config()  # ZeRO-3 would shard what is loaded
    directory = Path(training_args.output_dir, MERGED)
    model = load_model(model_args, training_args)
    resize_embeddings(model, tokenizer, 0)  # as before training
    model = PeftModel.from_pretrained(model, training_args.output_dir).merge_and_unload()
    staged = stage_model(directory)
    with writing(staged):
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
    publish_model(directory)
