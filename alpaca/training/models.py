"""Models and tokenizers: whether a directory holds one, and loading it from there or from the Hub."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
import xxhash

from alpaca.common import ExitCode, ExpectedError, notice
from alpaca.data.tokenizers import TokenizerLoader
from alpaca.training.arguments import TrainingArguments
from alpaca.training.checks import wrong_usage
from alpaca.training.flags import ModelArguments

_WEIGHTS = re.compile(r"(model|pytorch_model).*\.(safetensors|bin)(\.index\.json)?")
_ADAPTER = re.compile(r"adapter_model.*\.(safetensors|bin)(\.index\.json)?")
TOKENIZER_FILES = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"}


def check_directory(path: str, adapter: bool = True) -> None:
    """Say in one line what a model directory lacks, where the libraries would guess or answer with a traceback.

    `adapter`: whether a LoRA adapter will do. Raises ExpectedError (exit 2).
    """
    if not os.path.isdir(path):
        # A Hub id is name or owner/name; of a wrong one from_pretrained says so.
        if os.path.exists(path) or re.match(r"[./~\\]|\w:[/\\]", path) or path.count("/") > 1:
            what = "is a file" if os.path.exists(path) else "does not exist"
            raise wrong_usage(f"--model_name_or_path {path} {what}; give a model's directory, or a Hub id")
        return
    names = set(os.listdir(path))
    is_adapter = "adapter_config.json" in names
    remedy = "give the --output_dir of a finished training run, or a Hub id"
    if is_adapter and not adapter and "config.json" not in names:
        lacks, remedy = (
            "a LoRA adapter and no model",
            "give its base, or train it with --lora_merge True and give merged",
        )
    elif not is_adapter and "config.json" not in names:
        lacks = "no model: neither config.json nor adapter_config.json"
    elif not any(map((_ADAPTER if is_adapter and adapter else _WEIGHTS).fullmatch, names)):
        lacks = "no weights (model*.safetensors or pytorch_model*.bin; of an adapter adapter_model.safetensors)"
    elif not is_adapter and not names & TOKENIZER_FILES:
        lacks = "no tokenizer (tokenizer.json or tokenizer.model)"
    elif is_diff(path):
        lacks, remedy = "a weight diff and no model", "python weight_diff.py recover makes one of it"
    else:
        return
    raise wrong_usage(f"--model_name_or_path {path} holds {lacks}; {remedy}")


def is_diff(directory: str) -> bool:
    try:
        return json.loads(Path(directory, "weight_diff.json").read_bytes()).get("kind") == "diff"
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def check_tensors(path: str, report: dict[str, Any]) -> None:
    """`report` is from_pretrained's `output_loading_info`. Raises ExpectedError (exit 2) where tensors of the model
    were not read: the library makes them up at random."""
    if missing := sorted(report["missing_keys"]):
        also = f" (it has others, such as {min(report['unexpected_keys'])})" if report["unexpected_keys"] else ""
        raise wrong_usage(
            f"--model_name_or_path {path} lacks {len(missing)} of the model's tensors: {', '.join(missing[:3])}{also}; "
            "copy or download it again, or convert it"
        )
    if mismatched := sorted(report["mismatched_keys"]):
        name, there, expected = mismatched[0]
        raise wrong_usage(
            f"--model_name_or_path {path}: {name} has the shape {tuple(there)}, and config.json says {tuple(expected)} "
            f"({len(mismatched)} tensors differ); give config.json and weights of one model"
        )
    if unused := sorted(report["unexpected_keys"]):
        notice(f"{path}: {len(unused)} tensors are not the model's and are left out: {', '.join(unused[:3])}")


def fingerprint(path: str) -> str | None:
    """Tells one model from another by its weights' files: their sizes, and 64 KiB of each end. None for a Hub id.

    A copy elsewhere has the same; no tensor is read.
    """
    if not os.path.isdir(path):
        return None
    digest = xxhash.xxh3_128()
    for name in sorted(name for name in os.listdir(path) if _WEIGHTS.fullmatch(name)):
        with open(os.path.join(path, name), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{name} {size}".encode() + file.read(2**16))
            file.seek(max(0, size - 2**16))
            digest.update(file.read())
    return digest.hexdigest()


def from_pretrained(loader: Any, name: str, **options: Any) -> Any:
    """`loader.from_pretrained`; a wrong name, a torn file, no network or a missing package become one line."""
    from safetensors import SafetensorError

    try:
        return loader.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError, RecursionError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise ExpectedError(f"--model_name_or_path {name} can't be loaded: {reason}", ExitCode.USAGE)


def load_tokenizer(model_args: ModelArguments, training_args: TrainingArguments) -> Any:
    return from_pretrained(
        TokenizerLoader,
        model_args.model_name_or_path,
        cache_dir=training_args.cache_dir,
        model_max_length=training_args.model_max_length,
        padding_side="right",
    )


def gets_weights_sent(training_args: TrainingArguments) -> bool:
    """Whether this process is sent its shards of the weights by the first one, and so need not read them."""
    config = training_args.fsdp_config or {}
    return bool(training_args.fsdp and config.get("cpu_ram_efficient_loading") and training_args.process_index)


def make_without_weights(model_args: ModelArguments, training_args: TrainingArguments) -> Any:
    """The model with parameters that nothing was written to, so that they take no memory, and its buffers, which are
    not sent. Each has a place of its own: by it the optimizer finds the shard that replaces it."""
    config = from_pretrained(transformers.AutoConfig, model_args.model_name_or_path, cache_dir=training_args.cache_dir)
    with accelerate.init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, model_args.dtype), attn_implementation=model_args.attn_implementation
        )
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.empty_like(parameter, device="cpu")))
    model.tie_weights()
    return model


def load_model(model_args: ModelArguments, training_args: TrainingArguments) -> Any:
    """Raises ExpectedError (exit 2) where files and model do not fit."""
    if gets_weights_sent(training_args):
        return make_without_weights(model_args, training_args)
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # what it has to say of tensors, check_tensors says in a line
    model, report = from_pretrained(
        transformers.AutoModelForCausalLM,
        model_args.model_name_or_path,
        cache_dir=training_args.cache_dir,
        dtype=getattr(torch, model_args.dtype),
        attn_implementation=model_args.attn_implementation,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    transformers.utils.logging.set_verbosity(verbosity)
    check_tensors(model_args.model_name_or_path, report)
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        # Some published models set a temperature without sampling, which can be loaded but not saved again.
        model.generation_config.do_sample = True
        notice("the model's generation_config sets sampling options without do_sample; do_sample is now true")
    return model


def turn_off_cache(config: transformers.PretrainedConfig) -> Callable[[], None]:
    """No keys and values are kept while training; the function returned puts back what the config said, for whoever
    generates. Many configs have no `use_cache` or have it in that of the text model."""
    inner = [getattr(config, name, None) for name in config.sub_configs]
    parts = [config, *(part for part in inner if hasattr(part, "use_cache"))]
    before = [(part, vars(part).get("use_cache")) for part in parts]
    for part in parts:
        part.use_cache = False

    def put_back() -> None:
        for part, value in before:
            if value is None:
                vars(part).pop("use_cache", None)
            else:
                part.use_cache = value

    return put_back


def check_positions(config: transformers.PretrainedConfig, longest: int) -> None:
    """Raise ExpectedError (exit 2) when `longest` tokens are more than a table of learnt positions has (GPT-2, OPT).

    Positions that are computed (LLaMA) have no such end.
    """
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(positions, int) or longest <= positions:
        return
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    for name, module in model.named_modules():
        # OPT's has two rows before the first position.
        if isinstance(module, torch.nn.Embedding) and positions <= module.num_embeddings <= positions + 2:
            if re.search(r"pos|wpe", name):
                raise wrong_usage(
                    f"this {config.model_type} model has {positions:,} positions, and the longest example has "
                    f"{longest:,} tokens; give --model_max_length {positions} or less"
                )
