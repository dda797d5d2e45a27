"""The flags of train.py, each declared once: type, default, help with its unit. `--help` is made from them.

Of the Trainer's own flags, those that users of this project turn are declared here again, in words that fit a line and
with the Trainer's defaults, except for `--optim` and `--logging_nan_inf_filter`. Nothing heavy is imported: `--help`
answers at once.
"""

import sys
from dataclasses import dataclass, field, fields
from typing import Any

SWITCH = {"nargs": "?", "const": True}  # `--flag` alone means `--flag True`, as for the library's own booleans


def flag(default: Any, help: str, **options: Any) -> Any:
    """`options` are argparse's."""
    return field(default=default, metadata={"help": help, **options})


@dataclass
class ModelArguments:
    model_name_or_path: str = flag("facebook/opt-125m", "Model directory or Hub id.")
    pad_token: str | None = flag(None, "Pad with this existing token (such as '<unk>') where [PAD] would be added.")
    attn_implementation: str | None = flag(None, "sdpa, eager, flash_attention_2 …; by default by example, if right.")
    dtype: str = flag(
        "float32",
        "Of the weights; bfloat16 and float16 halve them and round small updates away.",
        choices=["float32", "bfloat16", "float16"],
    )
    lora_r: int = flag(0, "Train LoRA adapters of this rank, the model frozen; 0: all of it.")
    lora_alpha: float = flag(16, "Adapters are scaled by lora_alpha / lora_r.")
    lora_dropout: float = flag(0.05, "Dropout on what goes into the adapters; 0: none.")
    lora_target_modules: str = flag("all-linear", "Names such as q_proj,v_proj; all-linear: all but the output's.")
    lora_merge: bool = flag(False, "Save the whole model too, adapters added in, in output_dir/merged.")


@dataclass
class DataArguments:
    data_path: str | None = flag(None, "A .json or .jsonl file, or a Hub data set (tatsu-lab/alpaca).")
    val_size: float = flag(0.0, "Hold out so many examples (below 1: this fraction) and evaluate on them; 0: none.")
    show_batch: int = flag(0, "Print so many examples, trained tokens told apart, and exit; 0: train.")
    padding_free: bool = flag(True, "Lay examples end to end where the model keeps them apart; False: pad them.")
    balance_tokens: bool = flag(True, "Regroup a step's examples into micro-batches of equal tokens; False: 2023's.")


@dataclass
class TrainingFlags:
    """What `arguments.TrainingArguments` has beside the rest of the Trainer's flags."""

    cache_dir: str | None = flag(None, "Where Hub downloads are kept.")
    model_max_length: int = flag(512, "Tokens; longer examples are cut on the right.")
    per_device_train_batch_size: int = flag(8, "Examples that a process computes at once (a micro-batch); 2023: 4.")
    gradient_accumulation_steps: int = flag(1, "Micro-batches a step. Processes × examples × this = 128 in 2023.")

    num_train_epochs: float = flag(3.0, "Times that every example is seen.")
    max_steps: int = flag(-1, "Stop after so many steps, whatever the epochs; -1: epochs count.")
    learning_rate: float = flag(5e-5, "Its peak; 2023: 2e-5 for 7B, 1e-5 for 13B.")
    warmup_steps: float = flag(0, "Steps (below 1: fraction of all steps) until the peak; 2023: 0.03.")
    lr_scheduler_type: str = flag("linear", "How the rate falls after the peak: linear, cosine (2023), constant …")
    weight_decay: float = flag(0.0, "AdamW's.")
    optim: str = flag("adamw_torch", "adamw_torch_fused is faster on GPUs; adamw_hf, gone since, is adamw_torch.")
    seed: int = flag(42, "Of example order, dropout and adapters; held-out examples do not depend on it.")

    bf16: bool = flag(False, "Compute in bfloat16, weights staying as they are (Ampere GPUs and newer).")
    fp16: bool = flag(False, "The same in float16 with loss scaling, for older GPUs.")
    tf32: bool | None = flag(None, "Multiply float32 matrices in tf32 (Ampere GPUs and newer).")
    use_cpu: bool = flag(False, "Train on the CPU, as happens anyway where there is no accelerator.")

    fsdp: str | None = flag(None, 'Shard over processes: "full_shard auto_wrap"; + offload: in CPU memory.', **SWITCH)
    fsdp_config: str | None = flag(None, "More settings of FSDP: a JSON file or object.")
    deepspeed: str | None = flag(None, "Shard with DeepSpeed: a JSON file (configs/default_offload_opt_param.json).")

    gradient_checkpointing: bool | None = flag(None, "Keep no activations: a third more work.", **SWITCH)
    use_liger_kernel: bool = flag(False, "Fused GPU kernels of the package liger-kernel.")
    estimate_memory: bool = flag(False, "Print what the run needs of each GPU's memory, from the config alone; exit.")
    estimate_gpus: int | None = flag(None, "Estimate for so many GPUs instead of the processes that are running.")
    estimate_gib: float | None = flag(None, "Compare the estimate with a GPU of so many GiB, not the one present.")
    estimate_time: bool = flag(False, "Predict how long the run takes, and what it costs, and exit.")
    estimate_gpu: str | None = flag(None, "The GPU to predict for: A100, H100 or H200; by default the one present.")
    estimate_network: float = flag(400.0, "Gb/s between machines of eight GPUs.")
    estimate_efficiency: float | None = flag(
        None, "Share of the peak that matrix products reach; by default published."
    )
    price_per_gpu_hour: float | None = flag(None, "Money for a GPU for an hour; --estimate_time adds it up.")

    output_dir: str | None = flag(None, "Where checkpoints and the tuned model go.")
    save_strategy: str = flag("steps", "When to write checkpoints: no, steps, epoch or best.")
    save_steps: float = flag(500, "Steps (below 1: fraction of all steps) between checkpoints.")
    save_total_limit: int | None = flag(None, "Checkpoints to keep; the disk must hold one more. By default all.")
    resume_from_checkpoint: str | None = flag(None, "A path, True (newest whole one) or last (that or a new start).")

    logging_steps: float = flag(500, "Steps (below 1: fraction of all steps) between log lines; 2023: 1.")
    logging_nan_inf_filter: bool = flag(False, "Keep a NaN loss out of the log. Here it stops the run.")
    report_to: str | None = flag("none", "Where else the log goes: tensorboard, wandb …")
    eval_strategy: str = flag("no", "When to evaluate before the end: no, steps or epoch; needs --val_size.")

    # None: not given.
    evaluation_strategy: str | None = flag(None, "Today --eval_strategy.")
    warmup_ratio: float | None = flag(None, "Today --warmup_steps below 1: a fraction of all steps.")
    no_cuda: bool | None = flag(None, "Today --use_cpu.", **SWITCH)
    group_by_length: bool | None = flag(None, "Today --train_sampling_strategy group_by_length.", **SWITCH)
    fsdp_transformer_layer_cls_to_wrap: str | None = flag(None, "The layers' class; by default the model's own.")
    logging_dir: str | None = flag(None, "TensorBoard's directory; today the variable TENSORBOARD_LOGGING_DIR.")
    overwrite_output_dir: bool | None = flag(None, "Had no effect in 2023 either.", **SWITCH)
    save_safetensors: bool | None = flag(None, "Has no effect: weights are always safetensors.", **SWITCH)


# The flags with which a group of --help begins, or goes on.
GROUPS = {
    "model_name_or_path": "Model",
    "cache_dir": "Model",
    "data_path": "Data",
    "model_max_length": "Data",
    "padding_free": "Batches",
    "per_device_train_batch_size": "Batches",
    "num_train_epochs": "Steps",
    "dtype": "Precision",
    "bf16": "Precision",
    "fsdp": "Sharding and memory",
    "estimate_memory": "Before renting",
    "output_dir": "Saving and resuming",
    "lora_r": "LoRA",
    "logging_steps": "Log and evaluation",
    "evaluation_strategy": "Spellings of 2023",
}


def short_help(introduction: str) -> str:
    """`introduction`, and every flag declared here on a line of its own, with its default, in groups."""
    groups: dict[str, list[str]] = {title: [] for title in GROUPS.values()}
    title = ""
    for one in (one for arguments in (ModelArguments, DataArguments, TrainingFlags) for one in fields(arguments)):
        title = GROUPS.get(one.name, title)
        shown = f"--{one.name}" if one.default is None else f"--{one.name} {one.default}"
        groups[title].append(f"  {shown:<34} {one.metadata['help']}")
    groups["Everything"] = [f"  {'--help_all':<34} List all other flags of the Trainer too."]
    return "\n".join([introduction, *(line for title, lines in groups.items() for line in (f"{title}:", *lines))])


def answer_help(introduction: str) -> None:
    """Print the help and leave, if that is what the command line asks for."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(short_help(introduction))
        sys.exit(0)
