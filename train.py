r"""Supervised fine-tuning of LLaMA, OPT and other causal language models on Alpaca-format data.
    python train.py --model_name_or_path facebook/opt-125m --data_path alpaca_data.json --output_dir out
    torchrun --nproc_per_node=4 train.py --model_name_or_path <llama-7b> --data_path alpaca_data.json --output_dir out \
        --bf16 True --tf32 True --fsdp "full_shard auto_wrap"

docs/training.md has the recipe's commands. Below, a flag's default follows its name; switches take True or False.
"""

from alpaca.common import run_main
from alpaca.training.flags import DataArguments, ModelArguments, answer_help

if __name__ == "__main__":
    run_main(lambda: answer_help(__doc__))  # here, because the imports below take seconds

from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from alpaca.common import ExitCode, ExpectedError, keep_inputs, make_output_directory, memory_problem
from alpaca.data.examples import IGNORE_INDEX, SupervisedDataset, preprocess
from alpaca.prompts import PROMPT_DICT
from alpaca.training import memory, time
from alpaca.training.arguments import TrainingArguments, correct_layer_names, parse_arguments
from alpaca.training.attention import choose_collator
from alpaca.training.batches import DataCollatorForSupervisedDataset, DataCollatorWithoutPadding
from alpaca.training.checkpoints import check_own, find_checkpoint, remove_merged
from alpaca.training.checks import check_steps
from alpaca.training.data_module import make_supervised_data_module, show_batch
from alpaca.training.lora import add_adapters, merge_adapters
from alpaca.training.models import (
    check_directory,
    check_positions,
    fingerprint,
    from_pretrained,
    load_model,
    load_tokenizer,
    turn_off_cache,
)
from alpaca.training.processes import check_shared, once_for_all_ranks, run_rank
from alpaca.training.run_record import identity_of, record_run
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


def estimate(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
    """Print what the run needs and takes. Data, where it is given, says how long examples are and how many steps."""
    config = from_pretrained(transformers.AutoConfig, model_args.model_name_or_path, cache_dir=training_args.cache_dir)
    collator = choose_collator(config, None, model_args, data_args, training_args)
    plan = memory.read_plan(model_args, training_args, packed=isinstance(collator, DataCollatorWithoutPadding))
    present = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    if training_args.estimate_time:
        machine = time.read_machine(plan, training_args, present and present.name)
    lengths = None
    if data_args.data_path:
        tokenizer = load_tokenizer(model_args, training_args)
        complete_tokenizer(tokenizer, model_args.pad_token, grow=not model_args.lora_r)
        lengths = make_supervised_data_module(tokenizer, data_args)["train_dataset"].lengths
    if dist.is_initialized():
        dist.destroy_process_group()  # the simulation makes one of its own
    if training_args.process_index:
        return
    if training_args.estimate_memory:
        here = present and present.total_memory / memory.GIB
        print(memory.describe(config, memory.cut(plan, lengths), training_args.estimate_gib or here))
    if training_args.estimate_time:
        layout, run = time.read_run(plan.layout, training_args, data_args, lengths)
        print(time.describe(config, layout, machine, run))


def train() -> None:
    model_args, data_args, training_args = parse_arguments()
    if training_args.disable_tqdm:
        transformers.utils.logging.disable_progress_bar()
    if training_args.estimates:
        return estimate(model_args, data_args, training_args)
    if not data_args.show_batch:
        check_paths(model_args, data_args, training_args)

    tokenizer = load_tokenizer(model_args, training_args)
    # With LoRA the embeddings are frozen: a new token's row would be in no file that is saved.
    num_new_tokens = complete_tokenizer(tokenizer, model_args.pad_token, grow=not model_args.lora_r)
    data_module = make_supervised_data_module(tokenizer, data_args)
    train_dataset, eval_dataset = data_module["train_dataset"], data_module["eval_dataset"]
    if data_args.show_batch:
        if training_args.process_index == 0:
            show_batch(train_dataset, tokenizer, data_args.show_batch)
        return
    check_steps(training_args, len(train_dataset))
    config = from_pretrained(transformers.AutoConfig, model_args.model_name_or_path, cache_dir=training_args.cache_dir)
    check_positions(config, max(int(dataset.lengths.max()) for dataset in (train_dataset, eval_dataset) if dataset))

    identity = identity_of(model_args, train_dataset, fingerprint(model_args.model_name_or_path))
    checkpoint = once_for_all_ranks(
        lambda: find_checkpoint(
            training_args.resume_from_checkpoint, training_args.output_dir, training_args.sharding, identity
        )
    )
    correct_layer_names(training_args, config)
    data_module["data_collator"] = choose_collator(config, tokenizer, model_args, data_args, training_args)
    once_for_all_ranks(lambda: make_output_directory(training_args.output_dir, "output_dir"))
    check_shared(training_args.output_dir)
    model = load_model(model_args, training_args)
    resize_embeddings(model, tokenizer, num_new_tokens)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    put_cache_back = turn_off_cache(model.config)
    if model_args.lora_r:
        model = add_adapters(model, model_args, training_args.seed)

    trainer = AlpacaTrainer(
        model=model,
        processing_class=tokenizer,
        args=training_args,
        balance_tokens=data_args.balance_tokens,
        identity=identity,
        **data_module,
    )
    if training_args.process_index == 0:
        record_run(model_args, data_args, training_args, train_dataset, model.num_parameters(), checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.watch.preempted:
        raise ExpectedError(
            f"stopped by SIGTERM after saving {trainer.watch.preempted}; --resume_from_checkpoint last goes on from "
            "there",
            ExitCode.PREEMPTED,
        )
    # Nothing that can fail stands before this.
    put_cache_back()
    trainer.save_model()
    trainer.save_state()
    if eval_dataset is not None:
        metrics = {**trainer.evaluate(), "eval_samples": len(eval_dataset)}
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics, combined=False)
    if model_args.lora_r and training_args.process_index == 0:
        remove_merged(training_args.output_dir)  # made of an earlier run's adapters
        if model_args.lora_merge:
            merge_adapters(model_args, training_args, tokenizer)


def check_paths(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
    """Raises ExpectedError (exit 2) before anything is loaded: no model to train, or one that would be written over."""
    outputs, base = {"output_dir": training_args.output_dir}, model_args.model_name_or_path
    check_directory(base, adapter=False)
    keep_inputs(outputs, {"model_name_or_path": base, "data_path": data_args.data_path})
    checkpoint = training_args.resume_from_checkpoint
    if (
        Path(checkpoint or "").parent.resolve() != Path(training_args.output_dir).resolve()
    ):  # one of its own is no input
        keep_inputs(outputs, {"resume_from_checkpoint": checkpoint})
    check_own(training_args.output_dir)


def main() -> None:
    """`train()`; a memory that is full is said in a line. `run_rank` ends the process, with its group still open."""
    try:
        train()
    except (RuntimeError, MemoryError) as error:
        if not (problem := memory_problem(error)):
            raise
        raise ExpectedError(
            f"{problem}. --estimate_memory True says what to turn; first a smaller --per_device_train_batch_size with "
            "more --gradient_accumulation_steps. What was saved before is whole (--resume_from_checkpoint last)",
            ExitCode.USAGE,
        )


if __name__ == "__main__":
    run_rank(main)
