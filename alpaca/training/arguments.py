"""The flags of train.py: its own, the Trainer's, and the spellings of 2023.

`parse_arguments` turns a command line into the three argument classes, or into one line that says what is wrong with
it, before anything is loaded. `choose_layers_to_wrap` settles FSDP's layer class once the model's config is known.
"""

import difflib
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import transformers
from transformers import HfArgumentParser
from transformers.integrations import get_available_reporting_integrations
from transformers.training_args import OptimizerNames
from transformers.utils import is_bitsandbytes_available, is_liger_kernel_available, is_torchao_available

from alpaca.common import ExitCode, ExpectedError, notice


@dataclass
class ModelArguments:
    model_name_or_path: str = field(default="facebook/opt-125m", metadata={"help": "Model directory or Hub id."})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "dtype of the trained weights. float32 is what 2023 used and what --bf16 True computes from; "
            "bfloat16 and float16 halve the memory and round away small updates.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention kernel: sdpa, eager, or flash_attention_2 and others whose packages are installed. "
            "By default, each example by itself where the model allows that, else the library's choice."
        },
    )
    pad_token: str | None = field(
        default=None,
        metadata={"help": "Pad with this existing token (such as '<unk>') where [PAD] would have been added."},
    )
    lora_r: int = field(
        default=0, metadata={"help": "Train LoRA adapters of this rank, the model frozen; 0: all of it."}
    )
    lora_alpha: float = field(default=16, metadata={"help": "Adapters are scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on what goes into the adapters; 0: none."})
    lora_target_modules: str = field(
        default="all-linear",
        metadata={"help": "Which layers to adapt: names such as q_proj,v_proj, or all-linear (all but the output's)."},
    )
    lora_merge: bool = field(
        default=False, metadata={"help": "Save the whole model too, adapters added in, in the directory merged."}
    )


@dataclass
class DataArguments:
    data_path: str | None = field(
        default=None, metadata={"help": "Training data: a .json or .jsonl file, or a Hub data set (tatsu-lab/alpaca)."}
    )
    val_size: float = field(
        default=0.0,
        metadata={"help": "Hold out this many examples (or this fraction, below 1) and evaluate on them; 0: none."},
    )
    padding_free: bool = field(
        default=True,
        metadata={
            "help": "Lay a micro-batch's examples end to end instead of padding them; a model that would mix them gets "
            "padded batches all the same. False: padding, as in 2023."
        },
    )
    balance_tokens: bool = field(
        default=True,
        metadata={
            "help": "Regroup the examples of each optimizer step into micro-batches of nearly equal token counts. "
            "False: micro-batches of per_device_train_batch_size examples, as in 2023."
        },
    )
    show_batch: int = field(
        default=0, metadata={"help": "Print this many examples, trained tokens told apart, and exit; 0: train."}
    )


SWITCH = {"nargs": "?", "const": True}  # `--flag` alone means `--flag True`, as for the library's own booleans


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    cache_dir: str | None = field(default=None, metadata={"help": "Where Hub downloads are kept."})
    optim: str = field(default="adamw_torch", metadata={"help": "The optimizer; adamw_hf, gone since, is adamw_torch."})
    model_max_length: int = field(default=512, metadata={"help": "Longer examples are cut on the right. In tokens."})

    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Go on from a checkpoint: a path, True (the newest whole one in --output_dir) or last (the same, "
            "and a start from the beginning where there is none)."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Keep a NaN loss out of the log. Here it stops the run."}
    )
    estimate_memory: bool = field(
        default=False, metadata={"help": "Print what the run needs of each GPU's memory, from the config alone; exit."}
    )
    estimate_gpus: int | None = field(
        default=None, metadata={"help": "Estimate for this many GPUs instead of the processes that are running."}
    )
    estimate_gib: float | None = field(
        default=None, metadata={"help": "Compare the estimate with a GPU of this many GiB instead of the one present."}
    )

    # Spellings of 2023 that the library no longer knows. None: not given.
    evaluation_strategy: str | None = field(default=None, metadata={"help": "2023 spelling of --eval_strategy."})
    warmup_ratio: float | None = field(
        default=None, metadata={"help": "2023 spelling of --warmup_steps as a fraction of all steps."}
    )
    no_cuda: bool | None = field(default=None, metadata={"help": "2023 spelling of --use_cpu.", **SWITCH})
    group_by_length: bool | None = field(
        default=None, metadata={"help": "2023 spelling of --train_sampling_strategy group_by_length.", **SWITCH}
    )
    fsdp_transformer_layer_cls_to_wrap: str | None = field(
        default=None, metadata={"help": "2023 spelling of fsdp_config's transformer_layer_cls_to_wrap."}
    )
    logging_dir: str | None = field(
        default=None, metadata={"help": "TensorBoard's directory; today the variable TENSORBOARD_LOGGING_DIR."}
    )
    overwrite_output_dir: bool | None = field(
        default=None, metadata={"help": "Accepted; had no effect in 2023.", **SWITCH}
    )
    save_safetensors: bool | None = field(
        default=None, metadata={"help": "Accepted; weights are always safetensors.", **SWITCH}
    )

    def __post_init__(self):
        map_old_spellings(self)
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        self.half_precision = self.bf16 or self.fp16  # as asked for, with or without a GPU
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if self.use_cpu or accelerator is None:
            self._train_on_cpu()
        elif accelerator.type == "cuda":
            check_precision(self.bf16, self.tf32, torch.cuda.get_device_name(), torch.cuda.get_device_capability())
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every parameter of a causal language model is used
        self._read_fsdp()
        self.zero_config = read_json_flag("deepspeed", self.deepspeed) if self.deepspeed else None
        if self.estimate_memory:  # nothing is started, so the flags need neither a launcher nor the packages
            self.fsdp = self.deepspeed = None
        self._read_deepspeed()
        super().__post_init__()
        self._check_packages()
        if self.n_gpu > 1:
            notice(f"one process uses one GPU; start torchrun --nproc_per_node={self.n_gpu} train.py … to use them all")
            self._n_gpu = 1  # DataParallel would multiply the batch

    @property
    def sharding(self) -> str:
        """How weights and optimizer states are spread over the processes: "none", "fsdp" or "deepspeed"."""
        return "deepspeed" if self.deepspeed else "fsdp" if self.fsdp else "none"

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
            raise ExpectedError(f"--{flag} needs the package: pip install {package}", ExitCode.USAGE)

    def _train_on_cpu(self) -> None:
        if not self.use_cpu and not self.estimate_memory:
            changes = [f"--{name} does not apply" for name in ("tf32", "fp16") if getattr(self, name)]
            notice("; ".join(["no accelerator found, training on the CPU", *changes]))
        self.use_cpu = True
        self.tf32 = None
        self.fp16 = False

    def _read_fsdp(self) -> None:
        """--fsdp "full_shard auto_wrap offload" → fsdp=True and fsdp_config, the form that today's library keeps."""
        words = self.fsdp.split() if isinstance(self.fsdp, str) else ["full_shard"] if self.fsdp else []
        words = ["full_shard"] if words in (["True"], ["true"]) else [] if words in (["False"], ["false"]) else words
        unknown = set(words) - {"full_shard", "shard_grad_op", "auto_wrap", "offload"}
        if unknown:
            raise ExpectedError(
                f"--fsdp {self.fsdp!r}: FSDP2 has full_shard, shard_grad_op, auto_wrap and offload, not "
                f'{", ".join(sorted(unknown))}; the usual value is --fsdp "full_shard auto_wrap"',
                ExitCode.USAGE,
            )
        wrap = self.fsdp_transformer_layer_cls_to_wrap
        if not words:
            if wrap or self.fsdp_config:
                notice("--fsdp_transformer_layer_cls_to_wrap and --fsdp_config do nothing without --fsdp")
            self.fsdp = self.fsdp_config = None
            return
        if self.deepspeed:
            raise ExpectedError("--fsdp and --deepspeed are two ways to shard; give one of them", ExitCode.USAGE)
        config = read_json_flag("fsdp_config", self.fsdp_config)
        config = {name.removeprefix("fsdp_"): value for name, value in config.items()}
        if wrap:
            names = [name.strip() for name in wrap.split(",")]
            if config.get("transformer_layer_cls_to_wrap", names) not in (names, wrap):
                raise ExpectedError(
                    f"--fsdp_transformer_layer_cls_to_wrap {wrap} contradicts --fsdp_config, which says "
                    f"{config['transformer_layer_cls_to_wrap']}; give one of them",
                    ExitCode.USAGE,
                )
            config["transformer_layer_cls_to_wrap"] = names
            self.fsdp_transformer_layer_cls_to_wrap = None
        config.setdefault("reshard_after_forward", "shard_grad_op" not in words)
        config.setdefault("cpu_offload", "offload" in words)
        self.fsdp, self.fsdp_config = True, config
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not self.estimate_memory:
            notice(
                "--fsdp shards a model over processes and there is one, so nothing is sharded; "
                "torchrun --nproc_per_node=N train.py … starts N"
            )
            if "WORLD_SIZE" not in os.environ:
                self.fsdp = None  # without a process group FSDP can't start; fsdp_config is still checked

    def _read_deepspeed(self) -> None:
        if not self.deepspeed:
            return
        if "WORLD_SIZE" not in os.environ:
            raise ExpectedError(
                "--deepspeed needs a launcher, for one process too: torchrun --nproc_per_node=1 train.py …",
                ExitCode.USAGE,
            )
        config = self.zero_config
        try:
            import deepspeed
        except ImportError:
            raise ExpectedError("--deepspeed needs the package: pip install deepspeed", ExitCode.USAGE)
        if "scheduler" in config:
            notice(f"the scheduler block of {self.deepspeed} overrides --lr_scheduler_type {self.lr_scheduler_type}")
        zero = config.get("zero_optimization", {})
        if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
            notice(
                f"{self.deepspeed} leaves ZeRO shards and no loadable model at the end; set "
                "stage3_gather_16bit_weights_on_model_save to true, or merge them with zero_to_fp32.py"
            )
        # DeepSpeed 0.19 calls what torch 2.13 renamed, and each call would say so.
        warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
        if self.use_cpu:
            deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


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
        raise ExpectedError(f"--warmup_ratio {args.warmup_ratio} is not a fraction between 0 and 1", ExitCode.USAGE)
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
    message = f"--{old} {old_value} contradicts --{new} {new_value}, its spelling today; give one of them"
    return ExpectedError(message, ExitCode.USAGE)


def read_json_flag(name: str, value: str | dict | None) -> dict[str, Any]:
    """The value of a flag that takes a JSON file or the JSON itself."""
    if isinstance(value, dict) or value is None:
        return dict(value or {})
    try:
        if value.lstrip().startswith("{"):
            return json.loads(value)
        with open(value, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise ExpectedError(f"--{name} {value}: {error}; give a JSON file or a JSON object", ExitCode.USAGE)


def check_precision(bf16: bool, tf32: bool | None, gpu: str, capability: tuple[int, int]) -> None:
    """Raise ExpectedError where a CUDA GPU is older than Ampere (8.0) and can't do what is asked."""
    if capability >= (8, 0):
        return
    if bf16:
        raise ExpectedError(f"--bf16 True: {gpu} has no bf16 arithmetic; use --fp16 True", ExitCode.USAGE)
    if tf32:
        raise ExpectedError(f"--tf32 True: {gpu} has no tf32 arithmetic; leave the flag out", ExitCode.USAGE)


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Raises ExpectedError (exit 2) for anything wrong with the command line, before anything is loaded."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # Abbreviations are off: a typing error must not become another flag.
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments), allow_abbrev=False)

    def fail(message: str) -> None:
        raise ExpectedError(f"{message}; python train.py --help lists the flags", ExitCode.USAGE)

    parser.error = fail
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        fail(describe_unknown(unknown, list(parser._option_string_actions)))
    given = {argument.split("=")[0].lstrip("-").replace("-", "_") for argument in argv if argument.startswith("--")}
    for old, (new, translate) in RENAMED_FLAGS.items():
        old_value, new_value = getattr(values, old), getattr(values, new)
        if {old, new} <= given and translate(old_value) != new_value:
            raise contradiction(old, old_value, new, new_value)
    if values.data_path is None and not values.estimate_memory:
        fail("--data_path is needed: a .json or .jsonl file, or a Hub data set")
    if values.output_dir is None and not values.show_batch and not values.estimate_memory:
        fail("--output_dir is needed: where checkpoints and the tuned model go")
    if values.lora_r < 0 or (values.lora_merge and not values.lora_r):
        fail(f"--lora_r {values.lora_r}: LoRA needs a rank of at least 1, --lora_merge needs LoRA")
    try:
        return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except (ValueError, ImportError) as error:  # the library's own checks of its flags
        fail(" ".join(str(error).split()))


def describe_unknown(unknown: list[str], known: list[str]) -> str:
    """['--lerning_rate', '1'] → "unknown flag --lerning_rate (--learning_rate?)"."""
    if set(unknown) & {"auto_wrap", "full_shard", "shard_grad_op", "offload"}:
        return f'stray {" ".join(unknown)}: the value of --fsdp needs quotes, --fsdp "full_shard auto_wrap"'
    flag = unknown[0].split("=")[0]
    if not flag.startswith("-"):
        return f"stray argument {flag}; a value with spaces needs quotes"
    near = difflib.get_close_matches(flag, known, n=1)
    return f"unknown flag {flag}" + (f" ({near[0]}?)" if near else "")


def layer_class_names(config: transformers.PretrainedConfig) -> tuple[list[str], set[str], list[str]]:
    """A model's repeated layer classes, all its module classes, and those that it declares for sharding.

    Built on the meta device: no weights are read or allocated.
    """
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    layers = sorted({type(layer).__name__ for modules in lists for layer in modules})
    return layers, {type(module).__name__ for module in model.modules()}, list(model._no_split_modules or layers)


def choose_layers_to_wrap(args: TrainingArguments, config: transformers.PretrainedConfig) -> None:
    """Settle which layer class FSDP wraps: the model's own when none is given, a name's case corrected.

    Raises ExpectedError (exit 2) for a name that no module of the model has.
    """
    by_layer = "TRANSFORMER_BASED_WRAP"
    if args.fsdp_config is None or args.fsdp_config.get("auto_wrap_policy", by_layer) != by_layer:
        return
    layers, modules, declared = layer_class_names(config)
    wanted = args.fsdp_config.get("transformer_layer_cls_to_wrap") or [n for n in declared if n in modules]
    names = []
    for name in wanted:
        match = name if name in modules else {n.lower(): n for n in modules}.get(name.lower())
        if match is None:
            raise ExpectedError(
                f"--fsdp_transformer_layer_cls_to_wrap {name}: this {config.model_type} model has no such class; its "
                f"layers are {', '.join(layers)}. Leave the flag out to use them",
                ExitCode.USAGE,
            )
        if match != name:
            notice(f"--fsdp_transformer_layer_cls_to_wrap {name} is written {match} in transformers; {match} is used")
        names.append(match)
    args.fsdp_config["transformer_layer_cls_to_wrap"] = names
    if args.fsdp:
        args.fsdp_plugin_args["transformer_cls_names_to_wrap"] = ",".join(names)
