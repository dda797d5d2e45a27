r"""Supervised fine-tuning of LLaMA, OPT and other causal language models on Alpaca-format data.

    python train.py --model_name_or_path facebook/opt-125m --data_path alpaca_data.json --output_dir out

    torchrun --nproc_per_node=4 train.py --model_name_or_path <llama-7b> --data_path alpaca_data.json --output_dir out \
        --bf16 True --tf32 True --fsdp "full_shard auto_wrap"

docs/training.md has the recipe's commands. Below, a flag's default follows its name; switches take True or False.
"""

from alpaca.training.flags import DataArguments, ModelArguments, answer_help

if __name__ == "__main__":
    answer_help(__doc__)  # here, because the imports below take seconds

import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from alpaca.common import ExitCode, ExpectedError, run_main
from alpaca.data.examples import IGNORE_INDEX, SupervisedDataset, preprocess
from alpaca.prompts import PROMPT_DICT
from alpaca.training import memory
from alpaca.training.arguments import TrainingArguments, correct_layer_names, parse_arguments
from alpaca.training.attention import choose_collator
from alpaca.training.batches import DataCollatorForSupervisedDataset, DataCollatorWithoutPadding
from alpaca.training.checkpoints import find_checkpoint, record_run
from alpaca.training.data_module import make_supervised_data_module, show_batch
from alpaca.training.lora import add_adapters, merge_adapters
from alpaca.training.models import from_pretrained, load_model, load_tokenizer
from alpaca.training.processes import once_for_all_ranks
from alpaca.training.special_tokens import complete_tokenizer, resize_embeddings, smart_tokenizer_and_embedding_resize
from alpaca.training.trainer import AlpacaTrainer

# The names of 2023, which people import from here.
__all__ = [
    "IGNORE_INDEX",
    "PROMPT_DICT",
    "DataArguments",
    "DataCollatorForSupervisedDataset",
    "ModelArguments",
    "SupervisedDataset",
    "TrainingArguments",
    "make_supervised_data_module",
    "preprocess",
    "smart_tokenizer_and_embedding_resize",
    "train",
]


def estimate_memory(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
    config = from_pretrained(transformers.AutoConfig, model_args.model_name_or_path, cache_dir=training_args.cache_dir)
    collator = choose_collator(config, None, model_args, data_args, training_args)
    plan = memory.read_plan(model_args, training_args, packed=isinstance(collator, DataCollatorWithoutPadding))
    present = torch.cuda.get_device_properties(0).total_memory / memory.GIB if torch.cuda.is_available() else None
    if dist.is_initialized():
        dist.destroy_process_group()  # the simulation makes one of its own
    if training_args.process_index == 0:
        print(memory.describe(config, plan, training_args.estimate_gib or present))


def train() -> None:
    model_args, data_args, training_args = parse_arguments()
    if training_args.disable_tqdm:
        transformers.utils.logging.disable_progress_bar()
    if training_args.estimate_memory:
        return estimate_memory(model_args, data_args, training_args)

    tokenizer = load_tokenizer(model_args, training_args)
    # With LoRA the embeddings are frozen: a new token's row would be in no file that is saved.
    num_new_tokens = complete_tokenizer(tokenizer, model_args.pad_token, grow=not model_args.lora_r)
    data_module = make_supervised_data_module(tokenizer, data_args)
    if data_args.show_batch:
        if training_args.process_index == 0:
            show_batch(data_module["train_dataset"], tokenizer, data_args.show_batch)
        return

    checkpoint = once_for_all_ranks(
        lambda: find_checkpoint(training_args.resume_from_checkpoint, training_args.output_dir, training_args.sharding)
    )
    config = from_pretrained(transformers.AutoConfig, model_args.model_name_or_path, cache_dir=training_args.cache_dir)
    correct_layer_names(training_args, config)
    data_module["data_collator"] = choose_collator(config, tokenizer, model_args, data_args, training_args)
    model = load_model(model_args, training_args)
    resize_embeddings(model, tokenizer, num_new_tokens)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    if model_args.lora_r:
        model = add_adapters(model, model_args, training_args.seed)

    trainer = AlpacaTrainer(
        model=model,
        processing_class=tokenizer,
        args=training_args,
        balance_tokens=data_args.balance_tokens,
        **data_module,
    )
    if training_args.process_index == 0:
        record_run(
            model_args, data_args, training_args, data_module["train_dataset"], model.num_parameters(), checkpoint
        )
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.watch.preempted:
        raise ExpectedError(
            f"stopped by SIGTERM after saving {trainer.watch.preempted}; --resume_from_checkpoint last goes on from "
            "there",
            ExitCode.PREEMPTED,
        )
    trainer.save_state()
    trainer.model.config.use_cache = config.use_cache  # off while training, on for whoever generates
    trainer.save_model()
    if data_module["eval_dataset"] is not None:  # after saving, which must not depend on it
        metrics = {**trainer.evaluate(), "eval_samples": len(data_module["eval_dataset"])}
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics, combined=False)
    if model_args.lora_r and training_args.process_index == 0:
        shutil.rmtree(Path(training_args.output_dir, "merged"), ignore_errors=True)  # made of an earlier run's adapters
        if model_args.lora_merge:
            merge_adapters(model_args, training_args, tokenizer)


def main() -> None:
    """`train()`, and the process group closed behind it.

    A process that exits with an open one is now and then aborted on its way out, and its exit code lost. It can't be
    closed while another process may still wait inside a collective: after errors that are not raised by all together,
    such as a disk that is full for one of them.
    """
    failure = None
    try:
        train()
    except ExpectedError as error:
        failure = error
    if dist.is_initialized() and (failure is None or failure.exit_code != ExitCode.DISK):
        dist.destroy_process_group()
    if failure:
        raise failure


if __name__ == "__main__":
    run_main(main)
