"""The command line of train.py: its own flags, the Trainer's, and the spellings of 2023.

`parse_arguments` turns a command line into the three argument classes, or into one line that says what is wrong with
it, before anything is loaded. `flags` declares those that --help shows.
"""

import difflib
import inspect
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.checkpoint import checkpoint
from transformers import HfArgumentParser
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import OptimizerNames
from transformers.utils import is_bitsandbytes_available, is_liger_kernel_available, is_torchao_available

from alpaca.common import ExpectedError, notice
from alpaca.training.checks import (
    check_mps,
    check_precision,
    check_sizes,
    refuse_what_would_lose_runs,
    rehearse_optimizer,
    wrong_usage,
)
from alpaca.training.flags import DataArguments, ModelArguments, TrainingFlags


@dataclass
class TrainingArguments(TrainingFlags, transformers.TrainingArguments):
    """The Trainer's arguments and this project's; those of `flags.TrainingFlags` are declared there."""

    def __post_init__(self):
        map_old_spellings(self)
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        check_sizes(self)
        refuse_what_would_lose_runs(self)
        self._read_json_flags()
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"  # as for --load_best_model_at_end
        self.half_precision = self.bf16 or self.fp16  # as asked for, with or without a GPU
        self.in_tf32 = self.tf32
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if self.use_cpu or accelerator is None:
            self._train_on_cpu()
        elif accelerator.type == "cuda":
            check_precision(self.bf16, self.tf32, torch.cuda.get_device_name(), torch.cuda.get_device_capability())
        elif accelerator.type == "mps":
            check_mps(self, int(os.environ.get("WORLD_SIZE", "1")))
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every parameter of a causal language model is used
        self._read_fsdp()
        self.zero_config = read_json_flag("deepspeed", self.deepspeed) if self.deepspeed else None
        if self.estimates:  # nothing is started, so the flags need neither a launcher nor the packages
            self.fsdp = self.deepspeed = None
        self._read_deepspeed()
        super().__post_init__()
        if self.deepspeed and (mismatches := self.hf_deepspeed_config.mismatches):
            reasons = "; ".join(" ".join(mismatch.strip("- ").split()) for mismatch in mismatches)
            raise wrong_usage(
                f'{self.deepspeed} contradicts the flags: {reasons}. Write "auto" there, or give the same'
            )
        self._check_packages()
        if not self.estimates:
            rehearse_optimizer(self)
        if self.n_gpu > 1:
            notice(f"one process uses one GPU; start torchrun --nproc_per_node={self.n_gpu} train.py … to use them all")
            self._n_gpu = 1  # DataParallel would multiply the batch

    @property
    def estimates(self) -> bool:
        """Whether the run is only estimated."""
        return self.estimate_memory or self.estimate_time

    @property
    def sharding(self) -> str:
        """How weights and optimizer states are spread over the processes: "none", "fsdp" or "deepspeed"."""
        return "deepspeed" if self.deepspeed else "fsdp" if self.fsdp else "none"

    def _read_json_flags(self) -> None:
        for name in ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "accelerator_config"):
            if getattr(self, name) is not None:
                setattr(self, name, read_json_flag(name, getattr(self, name)))
        known = {
            "accelerator_config": [field.name for field in fields(AcceleratorConfig)],
            "gradient_checkpointing_kwargs": inspect.signature(checkpoint).parameters,
        }
        for name, keys in known.items():
            if unknown := set(getattr(self, name) or {}) - set(keys):
                raise wrong_usage(f"--{name} has no {', '.join(sorted(unknown))}")
        config = self.accelerator_config or {}
        for name in ("split_batches", "dispatch_batches"):
            if config.get(name):
                raise wrong_usage(
                    f"--accelerator_config: {name} would take batches apart that are made for each process"
                )

    def _check_packages(self) -> None:
        """What the library would miss only after the model is loaded."""
        missing = set(self.report_to) - set(get_available_reporting_integrations()) - {"none"}
        needed = [(f"report_to {name}", name) for name in sorted(missing)]
        if self.use_liger_kernel and not is_liger_kernel_available():
            needed.append(("use_liger_kernel", "liger-kernel"))
        optim = OptimizerNames(self.optim).value
        if re.search("adamw_torch_[48]bit", optim) and not is_torchao_available():
            needed.append((f"optim {optim}", "torchao"))
        elif re.search("bnb|_8bit|paged|lion|^ademamix", optim) and not is_bitsandbytes_available():
            needed.append((f"optim {optim}", "bitsandbytes"))
        if needed:
            flag, package = needed[0]
            raise wrong_usage(f"--{flag} needs the package: pip install {package}")

    def _train_on_cpu(self) -> None:
        if not self.use_cpu and not self.estimates:
            changes = [f"--{name} does not apply" for name in ("tf32", "fp16") if getattr(self, name)]
            notice("; ".join(["no accelerator found, training on the CPU", *changes]))
        self.use_cpu = True
        self.tf32 = None
        self.fp16 = False

    def _read_fsdp(self) -> None:
        """--fsdp "full_shard auto_wrap offload" → fsdp=True and fsdp_config, the form that today's library keeps."""
        usual = {"true": "full_shard", "false": "", "none": ""}
        words = usual.get(str(self.fsdp).lower(), str(self.fsdp)).split()
        self.hybrid_shard = "hybrid_shard" in words
        unknown = set(words) - {"full_shard", "shard_grad_op", "hybrid_shard", "auto_wrap", "offload"}
        if unknown:
            raise wrong_usage(
                f"--fsdp {self.fsdp!r}: FSDP2 has full_shard, shard_grad_op, hybrid_shard, auto_wrap and offload, "
                f'not {", ".join(sorted(unknown))}; the usual value is --fsdp "full_shard auto_wrap"'
            )
        wrap = self.fsdp_transformer_layer_cls_to_wrap
        if not words:
            if wrap or self.fsdp_config:
                notice("--fsdp_transformer_layer_cls_to_wrap and --fsdp_config do nothing without --fsdp")
            self.fsdp = self.fsdp_config = None
            return
        if self.deepspeed:
            raise wrong_usage("--fsdp and --deepspeed are two ways to shard; give one of them")
        config = read_json_flag("fsdp_config", self.fsdp_config)
        config = {name.removeprefix("fsdp_"): value for name, value in config.items()}
        if wrap:
            names = [name.strip() for name in wrap.split(",")]
            if config.get("transformer_layer_cls_to_wrap", names) not in (names, wrap):
                raise wrong_usage(
                    f"--fsdp_transformer_layer_cls_to_wrap {wrap} contradicts --fsdp_config, which says "
                    f"{config['transformer_layer_cls_to_wrap']}; give one of them"
                )
            config["transformer_layer_cls_to_wrap"] = names
            self.fsdp_transformer_layer_cls_to_wrap = None
        config.setdefault("reshard_after_forward", "shard_grad_op" not in words)
        config.setdefault("cpu_offload", "offload" in words)
        # The first process of a machine reads the model and sends each its part: not 8 × 27 GB of host memory for 7B.
        config.setdefault("cpu_ram_efficient_loading", not self.use_cpu)
        self.fsdp, self.fsdp_config = True, config
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not self.estimates:
            notice(
                "--fsdp shards a model over processes and there is one, so nothing is sharded; "
                "torchrun --nproc_per_node=N train.py … starts N"
            )
            if "WORLD_SIZE" not in os.environ:
                self.fsdp = None  # without a process group FSDP can't start; fsdp_config is still checked
        if self.hybrid_shard and not self.estimates:
            self._replicate_over_machines()

    def _replicate_over_machines(self) -> None:
        """hybrid_shard: the model is sharded inside each machine, and gradients are summed over machines."""
        processes, inside = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if processes == inside:
            notice("--fsdp hybrid_shard on one machine is full_shard")
        elif inside == 1 or processes % inside:
            raise wrong_usage(
                f"--fsdp hybrid_shard shards a model over the processes of each machine, equally many: {processes} in "
                f"all, {inside} here; use full_shard"
            )
        else:
            from accelerate import ParallelismConfig

            self.parallelism_config = ParallelismConfig(dp_replicate_size=processes // inside, dp_shard_size=inside)

    def _read_deepspeed(self) -> None:
        if not self.deepspeed:
            return
        if "WORLD_SIZE" not in os.environ:
            raise wrong_usage(
                "--deepspeed needs a launcher, even for one process: torchrun --nproc_per_node=1 train.py …"
            )
        config = self.zero_config
        try:
            import deepspeed
        except ImportError:
            raise wrong_usage("--deepspeed needs the package: pip install deepspeed")
        say_which_builds_are_locked()
        if "scheduler" in config:
            notice(f"the scheduler block of {self.deepspeed} overrides --lr_scheduler_type {self.lr_scheduler_type}")
        zero = config.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise wrong_usage(f"--deepspeed {self.deepspeed}: zero_optimization is no JSON object")
        if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
            notice(
                f"{self.deepspeed} leaves ZeRO shards and no loadable model at the end; set "
                "stage3_gather_16bit_weights_on_model_save to true, or merge them with zero_to_fp32.py"
            )
        # Starting DeepSpeed may compile; what the library compares after that, too, is compared here.
        step = self.per_device_train_batch_size * self.gradient_accumulation_steps * int(os.environ["WORLD_SIZE"])
        for key, ours in {
            "train_micro_batch_size_per_gpu": self.per_device_train_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "train_batch_size": step,
            "gradient_clipping": self.max_grad_norm,
        }.items():
            if config.get(key, "auto") not in ("auto", ours):
                raise wrong_usage(
                    f'{self.deepspeed} has {key} {config[key]}, and the flags say {ours}; write "auto" there, or give '
                    "the same"
                )
        # DeepSpeed 0.19 calls what torch 2.13 renamed, and each call would say so.
        warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
        if self.use_cpu:
            deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


def say_which_builds_are_locked() -> None:
    """DeepSpeed compiles at its first start; one that was killed then makes later ones wait for ever, in silence."""
    from torch.utils.cpp_extension import get_default_build_root  # with setuptools

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    if locks := sorted(map(str, [*root.glob("*/lock"), *root.glob("*/*/lock")])):
        notice(
            f"DeepSpeed waits while {', '.join(locks)} is there; a start that was killed leaves it behind: remove it "
            "if no other is compiling"
        )


# 2023 flag → (today's flag, how its value translates). 1.0 stays just below 1, where it would become one step.
RENAMED_FLAGS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "evaluation_strategy": ("eval_strategy", str),
    "warmup_ratio": ("warmup_steps", lambda ratio: min(ratio, math.nextafter(1.0, 0.0))),
    "no_cuda": ("use_cpu", bool),
    "group_by_length": ("train_sampling_strategy", lambda grouped: "group_by_length" if grouped else "random"),
}


def map_old_spellings(args: TrainingArguments) -> None:
    """Give the flags of 2023 their meaning, say today's spelling once, and refuse contradictions with it."""
    if args.warmup_ratio is not None and not 0 <= args.warmup_ratio <= 1:
        raise wrong_usage(f"--warmup_ratio {args.warmup_ratio} is not a fraction between 0 and 1")
    defaults = {f.name: f.default for f in fields(args)}
    for old, (new, translate) in RENAMED_FLAGS.items():
        value = getattr(args, old)
        if value is None:
            continue
        if getattr(args, new) not in (defaults[new], translate(value)):
            raise contradiction(old, value, new, getattr(args, new))
        setattr(args, new, translate(value))
        setattr(args, old, None)
        notice(f"--{old} {value} is spelled --{new} {value if new == 'warmup_steps' else translate(value)} today")
    if args.fsdp_transformer_layer_cls_to_wrap and args.fsdp:
        wrap = json.dumps({"transformer_layer_cls_to_wrap": args.fsdp_transformer_layer_cls_to_wrap})
        notice(f"--fsdp_transformer_layer_cls_to_wrap is spelled --fsdp_config '{wrap}' today")
    if args.optim == "adamw_hf":
        args.optim = "adamw_torch"
        notice("--optim adamw_hf is spelled --optim adamw_torch today")
    if args.logging_dir is not None:
        os.environ["TENSORBOARD_LOGGING_DIR"] = args.logging_dir
        notice(f"--logging_dir is spelled TENSORBOARD_LOGGING_DIR={args.logging_dir} in the environment today")
    if args.overwrite_output_dir is not None:
        notice("--overwrite_output_dir has no effect, as in 2023; --resume_from_checkpoint says whether to go on")
    if args.save_safetensors is not None:
        notice("--save_safetensors has no effect: weights are always saved as safetensors")


def contradiction(old: str, old_value: Any, new: str, new_value: Any) -> ExpectedError:
    return wrong_usage(f"--{old} {old_value} contradicts --{new} {new_value}, its spelling today; give one of them")


def read_json_flag(name: str, value: str | dict | None) -> dict[str, Any]:
    """The value of a flag that takes a JSON file or the JSON itself."""
    if isinstance(value, dict) or value is None:
        return dict(value or {})
    try:
        if value.lstrip().startswith("{"):
            config = json.loads(value)
        else:
            with open(value, encoding="utf-8") as file:
                config = json.load(file)
        if isinstance(config, dict):
            return config
        error = "no JSON object"
    except (OSError, ValueError, RecursionError) as reason:
        error = reason
    raise wrong_usage(f"--{name} {value[:200]}: {error}; give a JSON file or a JSON object")


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Raises ExpectedError (exit 2) for anything wrong with the command line, before anything is loaded."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # transformers 5.23 calls it activation checkpointing, 5.17 doesn't know that word.
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing", category=FutureWarning)
    # Abbreviations are off: a typing error must not become another flag.
    types = (ModelArguments, DataArguments, TrainingArguments)
    parser = HfArgumentParser(types, usage="train.py <flags>", allow_abbrev=False, add_help=False)
    parser.add_argument("--help_all", "--help-all", action="help", help="List all flags and exit.")

    def fail(message: str) -> None:
        raise wrong_usage(f"{message}; python train.py --help lists the flags")

    parser.error = fail
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        fail(describe_unknown(unknown, list(parser._option_string_actions)))
    given = {argument.split("=")[0].lstrip("-").replace("-", "_") for argument in argv if argument.startswith("--")}
    for old, (new, translate) in RENAMED_FLAGS.items():
        old_value, new_value = getattr(values, old), getattr(values, new)
        if {old, new} <= given and translate(old_value) != new_value:
            raise contradiction(old, old_value, new, new_value)
    estimates = values.estimate_memory or values.estimate_time
    if values.data_path is None and not estimates:
        fail("--data_path is needed: a .json or .jsonl file, or a Hub data set")
    if values.output_dir is None and not values.show_batch and not estimates:
        fail("--output_dir is needed: where checkpoints and the tuned model go")
    if values.lora_r < 0 or (values.lora_merge and not values.lora_r):
        fail(f"--lora_r {values.lora_r}: LoRA needs a rank of at least 1, --lora_merge needs LoRA")
    if values.lora_alpha <= 0 or not 0 <= values.lora_dropout < 1:
        fail(f"--lora_alpha {values.lora_alpha} --lora_dropout {values.lora_dropout}: alpha above 0, dropout below 1")
    if not (values.val_size >= 0 and values.show_batch >= 0):
        fail(f"--val_size {values.val_size:g} --show_batch {values.show_batch}: give 0 or more")
    try:
        parsed = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        check_evaluation(parsed[2], values.val_size)
        return parsed
    except (ValueError, ImportError) as error:  # the library's own checks of its flags
        fail(" ".join(str(error).split()))


def check_evaluation(args: TrainingArguments, val_size: float) -> None:
    """Raise ExpectedError (exit 2) where evaluations are wanted, or the best model, with nothing to go by."""
    needs = [("eval_strategy", args.eval_strategy.value, "no"), ("eval_on_start", args.eval_on_start, False)]
    for name, value, off in needs:
        if value != off and not val_size:
            raise wrong_usage(f"--{name} {value} needs examples to evaluate on: give --val_size, such as 500 or 0.01")
    if args.metric_for_best_model not in (None, "loss", "eval_loss"):
        raise wrong_usage(f"--metric_for_best_model {args.metric_for_best_model}: evaluations give eval_loss alone")
    if args.save_strategy == "best" and args.eval_strategy == "no":
        raise wrong_usage("--save_strategy best needs evaluations: give --eval_strategy and --val_size")


def describe_unknown(unknown: list[str], known: list[str]) -> str:
    """['--lerning_rate', '1'] → "unknown flag --lerning_rate (--learning_rate?)"."""
    if set(unknown) & {"auto_wrap", "full_shard", "shard_grad_op", "hybrid_shard", "offload"}:
        return f'stray {" ".join(unknown)}: the value of --fsdp needs quotes, --fsdp "full_shard auto_wrap"'
    flag = unknown[0].split("=")[0]
    if not flag.startswith("-"):
        return f"stray argument {flag}; a value with spaces needs quotes"
    near = difflib.get_close_matches(flag, known, n=1)
    return f"unknown flag {flag}" + (f" ({near[0]}?)" if near else "")


def correct_layer_names(args: TrainingArguments, config: transformers.PretrainedConfig) -> None:
    """Write the layer classes that FSDP is told to wrap as the model does; told none, it takes the model's own.

    Raises ExpectedError (exit 2) for a name that no module of the model has, before any weights are read.
    """
    wanted = (args.fsdp_config or {}).get("transformer_layer_cls_to_wrap")
    if not wanted:
        return
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    classes = {name.lower(): name for name in (type(module).__name__ for module in model.modules())}
    for name in (names := [wanted] if isinstance(wanted, str) else wanted):
        if name.lower() not in classes:
            raise wrong_usage(
                f"--fsdp_transformer_layer_cls_to_wrap {name}: this {config.model_type} model has no such class; its "
                f"layers are {', '.join(sorted(model._no_split_modules))}. Leave the flag out to use them"
            )
        if (right := classes[name.lower()]) != name:
            notice(f"--fsdp_transformer_layer_cls_to_wrap {name} is written {right} in transformers; {right} is used")
    args.fsdp_config["transformer_layer_cls_to_wrap"] = names = [classes[name.lower()] for name in names]
    if args.fsdp:
        args.fsdp_plugin_args["transformer_cls_names_to_wrap"] = ",".join(names)
