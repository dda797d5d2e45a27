"""What flags of train.py can't mean, by themselves or on this machine: one line each, before anything is loaded.

All raise ExpectedError (exit 2).
"""

import math
import re

import torch
import transformers
from accelerate.utils import DynamoBackend
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from alpaca.common import ExitCode, ExpectedError


def wrong_usage(message: str) -> ExpectedError:
    return ExpectedError(message, ExitCode.USAGE)


# Flags whose value counts something → the least that it can mean.
LEAST = {
    **dict.fromkeys(["model_max_length", "per_device_train_batch_size", "per_device_eval_batch_size"], 1),
    **dict.fromkeys(["gradient_accumulation_steps", "save_total_limit", "estimate_gpus"], 1),
    **dict.fromkeys(["eval_accumulation_steps", "dataloader_prefetch_factor", "ddp_timeout"], 1),
    **dict.fromkeys(["learning_rate", "warmup_steps", "weight_decay", "dataloader_num_workers", "max_grad_norm"], 0),
    **dict.fromkeys(["seed", "data_seed", "neftune_noise_alpha", "label_smoothing_factor"], 0),
    "price_per_gpu_hour": 0,
}
MOST = {"seed": 2**32 - 1, "data_seed": 2**32 - 1, "label_smoothing_factor": 1}
ABOVE_ZERO = ("num_train_epochs", "save_steps", "logging_steps", "eval_steps", "estimate_gib", "estimate_network")


def check_sizes(args: TrainingArguments) -> None:
    """Raise ExpectedError (exit 2) for sizes that nothing can have; the library takes some for "none" or "all"."""
    for name in (*LEAST, *ABOVE_ZERO):
        value, least = getattr(args, name), LEAST.get(name)
        if value is None:
            continue
        if not ((value > 0 if least is None else value >= least) and math.isfinite(value)):
            raise wrong_usage(f"--{name} {value}: give {'more than 0' if least is None else f'{least} or more'}")
        if value > MOST.get(name, value):
            raise wrong_usage(f"--{name} {value}: give at most {MOST[name]}")
    if args.estimate_efficiency is not None and not 0 < args.estimate_efficiency <= 1:
        raise wrong_usage(f"--estimate_efficiency {args.estimate_efficiency}: give a share above 0, at most 1")
    if args.max_steps < -1 or args.max_steps == 0:
        raise wrong_usage(f"--max_steps {args.max_steps}: give 1 or more, or -1 to let the epochs count")


# Flags of the library that would lose a run or change its steps → why, or what to do instead.
NOT_HERE = {
    "save_on_each_node": "checkpoints are written once, to a directory that all machines share",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint without it, and only a finished run saves a model",
    "auto_find_batch_size": "it would change the examples of a step; --estimate_memory True says what fits",
    "push_to_hub": "it would need the hub at every save; when the run is over, hf upload <user>/<name> <output_dir>",
}


def refuse_what_would_lose_runs(args: TrainingArguments) -> None:
    for name, reason in NOT_HERE.items():
        if getattr(args, name):
            raise wrong_usage(f"--{name}: {reason}; leave it out")
    if args.train_sampling_strategy == "batch_rebalance":
        raise wrong_usage("--train_sampling_strategy batch_rebalance: --balance_tokens True, the default, does that")
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise wrong_usage("--dataloader_persistent_workers needs workers: give --dataloader_num_workers")
    backend = args.torch_compile_backend
    if backend and backend.upper() not in DynamoBackend.__members__:
        known = ", ".join(name.lower() for name in DynamoBackend.__members__)
        raise wrong_usage(f"--torch_compile_backend {backend}: one of {known} expected")


def rehearse_optimizer(args: TrainingArguments) -> None:
    """Make the optimizer and the schedule of a single weight: what they lack, or are not given rightly, would be said
    when the model is loaded. Raises ExpectedError (exit 2)."""
    flag = f"--optim {OptimizerNames(args.optim).value}"
    try:
        kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **options)
        flag = f"--lr_scheduler_type {args.lr_scheduler_type.value}"
        steps = {"num_warmup_steps": args.get_warmup_steps(1000), "num_training_steps": 1000}
        transformers.get_scheduler(
            args.lr_scheduler_type, optimizer, **steps, scheduler_specific_kwargs=args.lr_scheduler_kwargs
        )
    except Exception as error:  # of many packages
        if not re.search("pass a `?model", str(error)):  # some take the model, which is not there yet
            raise wrong_usage(f"{flag}: {' '.join(str(error).split())}")


def check_steps(args: TrainingArguments, examples: int) -> None:
    """Raise ExpectedError (exit 2) when no step would be made of so many examples."""
    needed = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.dataloader_drop_last and examples < needed:
        raise wrong_usage(
            f"--dataloader_drop_last True leaves no step: there are {examples} examples to train on, and a step takes "
            f"{needed}; leave the flag out or take smaller steps"
        )


def check_mps(args: TrainingArguments, processes: int) -> None:
    """Raise ExpectedError (exit 2) for what PyTorch can't do on Apple's GPU (MPS)."""
    asked = {"fp16": args.fp16, "tf32": args.tf32, "fsdp": args.fsdp, "deepspeed": args.deepspeed}
    asked["use_liger_kernel"] = args.use_liger_kernel
    for name in (name for name, value in asked.items() if value):
        instead = "use --bf16 True or leave it out" if name == "fp16" else "leave it out, or add --use_cpu True"
        raise wrong_usage(f"--{name}: Apple's GPU (MPS) can't do it; {instead}")
    if processes > 1:
        raise wrong_usage(
            "Apple's GPU (MPS) serves one process; start train.py without torchrun, or add --use_cpu True"
        )


def check_precision(bf16: bool, tf32: bool | None, gpu: str, capability: tuple[int, int]) -> None:
    """Raise ExpectedError where a CUDA GPU is older than Ampere (8.0) and can't do what is asked."""
    if capability >= (8, 0):
        return
    if bf16:
        raise wrong_usage(f"--bf16 True: {gpu} has no bf16 arithmetic; use --fp16 True")
    if tf32:
        raise wrong_usage(f"--tf32 True: {gpu} has no tf32 arithmetic; leave the flag out")
