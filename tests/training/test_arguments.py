"""The command line of train.py: spellings of 2023, contradictions, and flags that the hardware can't do."""

import json
import math
import socket
import warnings

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from alpaca.common import ExitCode, ExpectedError
from alpaca.training import arguments, checks
from alpaca.training.arguments import correct_layer_names, parse_arguments
from alpaca.training.checks import check_precision

NEEDED = ["--data_path", "x.json", "--output_dir", "out", "--val_size", "5"]


def parse(*flags):
    return parse_arguments([*NEEDED, *flags])[2]


def refused(*flags):
    with pytest.raises(ExpectedError) as error:
        parse_arguments([*NEEDED, *flags])
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "value", "said"),
    [
        (["--evaluation_strategy", "no"], "eval_strategy", "no", "--eval_strategy no"),
        (["--evaluation-strategy=epoch"], "eval_strategy", "epoch", "--eval_strategy epoch"),
        (["--warmup_ratio", "0.03"], "warmup_steps", 0.03, "--warmup_steps 0.03"),
        (["--warmup_ratio", "0"], "warmup_steps", 0.0, "--warmup_steps 0.0"),
        (["--no_cuda", "True"], "use_cpu", True, "--use_cpu True"),
        (["--no_cuda"], "use_cpu", True, "--use_cpu True"),
        (["--group_by_length", "True"], "train_sampling_strategy", "group_by_length", "_strategy group_by_length"),
        (["--optim", "adamw_hf"], "optim", "adamw_torch", "--optim adamw_torch"),
        (["--overwrite_output_dir", "True"], "overwrite_output_dir", True, "no effect"),
        (["--save_safetensors", "True"], "save_safetensors", True, "always saved as safetensors"),
    ],
)
def test_old_spellings_keep_their_meaning_and_are_announced_once(old, new, value, said, capsys):
    assert getattr(parse(*old), new) == value
    assert capsys.readouterr().err.count(said) == 1


def test_checkpointing_needs_no_other_name():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        args = parse("--gradient_checkpointing", "True")
    assert args.gradient_checkpointing or args.activation_checkpointing
    assert not said


def test_logging_dir_reaches_tensorboard(monkeypatch, capsys):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "elsewhere")
    parse("--logging_dir", "runs")
    assert arguments.os.environ["TENSORBOARD_LOGGING_DIR"] == "runs"
    assert "TENSORBOARD_LOGGING_DIR=runs" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [1, 3, 7, 1221, 10**9])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.5, 1.0])
def test_warmup_ratio_gives_the_steps_of_2023(ratio, steps):
    assert parse("--warmup_ratio", str(ratio)).get_warmup_steps(steps) == math.ceil(steps * ratio)


@pytest.mark.parametrize(
    "flags",
    [
        ["--evaluation_strategy", "no", "--eval_strategy", "steps", "--eval_steps", "5"],
        ["--evaluation_strategy", "epoch", "--eval_strategy", "no"],  # no is the default: given all the same
        ["--warmup_ratio", "0.1", "--warmup_steps", "5"],
        ["--warmup_ratio", "0.1", "--warmup-steps=0"],
        ["--no_cuda", "False", "--use_cpu", "True"],
        ["--group_by_length", "True", "--train_sampling_strategy", "random"],
    ],
)
def test_contradictions_are_refused(flags):
    assert "contradicts" in refused(*flags)


def test_agreement_of_old_and_new_spelling_is_fine():
    assert parse("--evaluation_strategy", "no", "--eval_strategy", "no").eval_strategy == "no"


BEST = ["--load_best_model_at_end", "True", "--eval_strategy", "steps", "--eval_steps", "5", "--save_steps", "5"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--warmup_ratio", "1.5"], "not a fraction"),
        (["--lerning_rate", "1"], "--learning_rate?"),
        (["--learning", "1"], "unknown flag --learning"),  # no abbreviations
        (["--learning_rate", "fast"], "learning_rate"),
        (["--fsdp", "full_shard", "auto_wrap"], 'needs quotes, --fsdp "full_shard auto_wrap"'),
        (["--fsdp", "no_shard auto_wrap"], "not no_shard"),
        (["--fsdp", "full_shard", "--deepspeed", "x.json"], "give one of them"),
        (["--fsdp", "full_shard", "--fsdp_config", "none.json"], "none.json"),
        (["--fsdp", "full_shard", "--fsdp_config", "{]"], "--fsdp_config"),
        (["--deepspeed", "configs/default_offload_opt_param.json"], "torchrun --nproc_per_node=1"),
        (["--evaluation_strategy", "never"], "never"),
        (["--fp16", "True", "--bf16", "True", "--optim", "no_such"], "no_such"),
        (["--dtype", "int8"], "int8"),
        (["--fsdp", "full_shard", "--fsdp_config", "[" * 100_000], "--fsdp_config"),
        (["--fsdp", "full_shard", "--fsdp_config", '{"a":' * 100_000], "--fsdp_config"),
        (["--fsdp", "full_shard", "--fsdp_config", '{"a": 1' + "0" * 5000 + "}"], "--fsdp_config"),
        (["--val_size", "0", "--eval_strategy", "steps"], "--eval_strategy steps needs examples"),
        (["--val_size", "0", "--eval_on_start", "True"], "--eval_on_start True needs examples"),
        (["--save_strategy", "best"], "--save_strategy best needs evaluations"),
        (["--load_best_model_at_end", "True"], "save and eval strategy"),
        (["--save_on_each_node", "True"], "a directory that all machines share"),
        (["--enable_jit_checkpoint", "True"], "SIGTERM saves a checkpoint without it"),
        (["--auto_find_batch_size", "True"], "it would change the examples of a step"),
        (["--push_to_hub", "True"], "hf upload <user>/<name> <output_dir>"),
        (["--train_sampling_strategy", "batch_rebalance"], "--balance_tokens True"),
        (["--dataloader_persistent_workers", "True"], "give --dataloader_num_workers"),
        (["--torch_compile", "True", "--torch_compile_backend", "no_such"], "one of no, eager"),
        (["--metric_for_best_model", "accuracy", *BEST], "evaluations give eval_loss alone"),
        (["--accelerator_config", "none.json"], "--accelerator_config none.json"),
        (["--accelerator_config", '{"no_such": 1}'], "--accelerator_config has no no_such"),
        (["--accelerator_config", '{"split_batches": true}'], "split_batches would take batches apart"),
        (["--accelerator_config", '{"dispatch_batches": true}'], "dispatch_batches would take batches apart"),
        (["--lr_scheduler_kwargs", "no_such"], "--lr_scheduler_kwargs no_such"),
        (["--lr_scheduler_kwargs", '{"no_such": 1}'], "--lr_scheduler_type linear: "),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "--lr_scheduler_type cosine_with_min_lr: "),
        (["--gradient_checkpointing_kwargs", "[1]"], "--gradient_checkpointing_kwargs [1]"),
        (["--gradient_checkpointing_kwargs", '{"no_such": 1}'], "--gradient_checkpointing_kwargs has no no_such"),
        (["--optim_args", "a=b,c"], "--optim adamw_torch"),
        (["--optim", "galore_adamw"], "--optim galore_adamw: You need to install `galore_torch`"),
        (["--adam_beta1", "2"], "Invalid beta parameter"),
        (["--adam_epsilon", "-1"], "Invalid epsilon value"),
        *(
            ([f"--{name}", value], f"--{name} {value}")
            for name, value in [
                ("per_device_train_batch_size", "0"),
                ("per_device_train_batch_size", "-4"),
                ("per_device_eval_batch_size", "0"),
                ("gradient_accumulation_steps", "0"),
                ("model_max_length", "-1"),
                ("num_train_epochs", "0.0"),
                ("num_train_epochs", "nan"),
                ("max_steps", "0"),
                ("max_steps", "-2"),
                ("save_steps", "0.0"),
                ("logging_steps", "-1.0"),
                ("eval_steps", "0.0"),
                ("save_total_limit", "0"),
                ("learning_rate", "-1.0"),
                ("learning_rate", "inf"),
                ("weight_decay", "inf"),
                ("num_train_epochs", "inf"),
                ("eval_accumulation_steps", "0"),
                ("dataloader_prefetch_factor", "0"),
                ("ddp_timeout", "-1"),
                ("seed", "-1"),
                ("seed", str(2**32)),
                ("neftune_noise_alpha", "-1.0"),
                ("label_smoothing_factor", "2.0"),
                ("lora_alpha", "0.0"),
                ("val_size", "-1"),
                ("lora_r", "-1"),
            ]
        ),
    ],
)
def test_wrong_flags_end_in_one_line(flags, said):
    assert said in refused(*flags)


@pytest.mark.parametrize(
    ("flags", "package"),
    [
        (["--use_liger_kernel", "True"], "liger-kernel"),
        (["--optim", "adamw_bnb_8bit"], "bitsandbytes"),
        (["--optim", "paged_adamw_32bit"], "bitsandbytes"),
        (["--optim", "adamw_torch_8bit"], "torchao"),
        (["--report_to", "comet_ml"], "comet_ml"),
    ],
)
def test_a_missing_package_is_named_before_anything_is_loaded(flags, package):
    """None of them is among the requirements."""
    assert refused(*flags).startswith(
        f"{' '.join(flags).removesuffix(' True')} needs the package: pip install {package}"
    )


def test_every_optimizer_and_schedule_is_tried_or_refused_before_the_model_is_loaded():
    """Those whose package is here make a step; of the others the line says what is missing."""
    lacking = set()
    for optim in OptimizerNames:
        try:
            args = parse("--optim", optim.value)
        except ExpectedError as error:
            assert error.exit_code == ExitCode.USAGE and optim.value in str(error)
            lacking.add(optim.value)
        else:
            kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
            kind([torch.nn.Parameter(torch.zeros(1))], **options).step()
    assert not lacking & {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}
    assert "lomo" in lacking
    needs = {"cosine_with_min_lr": {"min_lr": 0}, "cosine_warmup_with_min_lr": {"min_lr": 0}}
    needs["warmup_stable_decay"] = {"num_decay_steps": 3}
    for kind in SchedulerType:
        flags = ["--lr_scheduler_type", kind.value, "--eval_strategy", "epoch"]
        if kind.value in needs:
            assert f"--lr_scheduler_type {kind.value}: " in refused(*flags)
            flags += ["--lr_scheduler_kwargs", json.dumps(needs[kind.value])]
        parse(*flags)


def test_what_apples_gpu_can_not_do_is_refused():
    """Nothing of it runs here; what is checked is which flags are let through."""
    args = parse("--bf16", "True")
    checks.check_mps(args, 1)
    for name, value in (("fp16", True), ("tf32", True), ("fsdp", True), ("deepspeed", "x"), ("use_liger_kernel", True)):
        plain = getattr(args, name)
        setattr(args, name, value)
        with pytest.raises(ExpectedError, match=rf"--{name}: Apple's GPU \(MPS\) can't do it"):
            checks.check_mps(args, 1)
        setattr(args, name, plain)
    with pytest.raises(ExpectedError, match="serves one process"):
        checks.check_mps(args, 2)


def test_the_last_incomplete_step_may_not_be_all_there_is():
    args = parse("--dataloader_drop_last", "True", "--per_device_train_batch_size", "4")
    checks.check_steps(args, 4)
    checks.check_steps(parse("--per_device_train_batch_size", "4"), 3)
    with pytest.raises(ExpectedError, match="leaves no step: there are 3 examples to train on, and a step takes 4"):
        checks.check_steps(args, 3)


def test_best_is_chosen_by_the_loss():
    flags = ("--save_strategy", "best", "--eval_strategy", "epoch")
    assert parse(*flags).metric_for_best_model == "loss" and parse(*flags).greater_is_better is False


def test_needed_flags_are_asked_for():
    for flags, said in (([], "--data_path is needed"), (["--data_path", "x"], "--output_dir is needed")):
        with pytest.raises(ExpectedError, match=said):
            parse_arguments(flags)
    parse_arguments(["--data_path", "x", "--show_batch", "3"])


def test_without_an_accelerator_the_same_flags_mean_the_cpu(capsys):
    assert not torch.accelerator.is_available(), "this test describes a machine without an accelerator"
    args = parse("--bf16", "True", "--tf32", "True", "--fp16", "False")
    assert args.use_cpu and args.bf16 and not args.tf32
    assert capsys.readouterr().err == ("notice: no accelerator found, training on the CPU; --tf32 does not apply\n")
    assert parse("--fp16", "True").fp16 is False
    assert "--fp16 does not apply" in capsys.readouterr().err


def test_old_gpus_get_the_flag_that_they_can_do():
    check_precision(True, True, "NVIDIA A100-SXM4-80GB", (8, 0))
    check_precision(False, None, "Tesla V100-SXM2-16GB", (7, 0))
    with pytest.raises(ExpectedError, match=r"V100.*use --fp16 True"):
        check_precision(True, True, "Tesla V100-SXM2-16GB", (7, 0))
    with pytest.raises(ExpectedError, match=r"V100.*leave the flag out"):
        check_precision(False, True, "Tesla V100-SXM2-16GB", (7, 0))


@pytest.fixture
def under_torchrun(monkeypatch):
    """This process as the only one of a torchrun job, process group and all: enough for --fsdp to be kept."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 1, "RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("LOCAL_RANK", "0")
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("value", "reshard", "offload"),
    [
        ("full_shard auto_wrap", True, False),
        ("full_shard auto_wrap offload", True, True),
        ("shard_grad_op", False, False),
        ("True", True, False),
    ],
)
def test_fsdp_words_become_the_config_of_today(value, reshard, offload, under_torchrun):
    args = parse("--fsdp", value, "--fsdp_transformer_layer_cls_to_wrap", "A,B")
    assert args.fsdp is True
    assert args.fsdp_plugin_args["fsdp_version"] == 2
    assert args.fsdp_plugin_args["reshard_after_forward"] is reshard
    assert args.fsdp_plugin_args.get("cpu_offload", False) is offload
    assert args.fsdp_config["transformer_layer_cls_to_wrap"] == ["A", "B"]


def test_fsdp_layer_flag_against_fsdp_config(under_torchrun, tmp_path):
    (tmp_path / "fsdp.json").write_text(json.dumps({"fsdp_transformer_layer_cls_to_wrap": ["A"]}))
    flags = ["--fsdp", "full_shard", "--fsdp_config", str(tmp_path / "fsdp.json")]
    assert parse(*flags).fsdp_config["transformer_layer_cls_to_wrap"] == ["A"]
    assert parse(*flags, "--fsdp_transformer_layer_cls_to_wrap", "A").fsdp_config["transformer_layer_cls_to_wrap"]
    assert "contradicts" in refused(*flags, "--fsdp_transformer_layer_cls_to_wrap", "B")


@pytest.mark.parametrize(
    ("family", "given", "wrapped"),
    [
        ("llama", "LlamaDecoderLayer", "LlamaDecoderLayer"),
        ("llama", "LLaMADecoderLayer", "LlamaDecoderLayer"),
        ("opt", "OPTDecoderLayer", "OPTDecoderLayer"),
        ("opt", "LlamaDecoderLayer", None),
    ],
)
def test_a_layer_class_is_corrected_or_refused(family, given, wrapped, under_torchrun, request, capsys):
    config = transformers.AutoConfig.from_pretrained(request.getfixturevalue(family))
    args = parse("--fsdp", "full_shard", "--fsdp_transformer_layer_cls_to_wrap", given)
    if wrapped is None:
        with pytest.raises(ExpectedError, match="its layers are OPTDecoderLayer") as error:
            correct_layer_names(args, config)
        assert error.value.exit_code == 2
        return
    correct_layer_names(args, config)
    assert args.fsdp_plugin_args["transformer_cls_names_to_wrap"] == wrapped
    assert ("is written LlamaDecoderLayer" in capsys.readouterr().err) == (given == "LLaMADecoderLayer")


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_without_the_flag_the_models_own_layers_are_wrapped(family, under_torchrun, request):
    directory = request.getfixturevalue(family)
    args = parse("--fsdp", "full_shard auto_wrap")
    correct_layer_names(args, transformers.AutoConfig.from_pretrained(directory))
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    wrapped = [module for module in model.modules() if fsdp2_prepare_auto_wrap_policy(plugin, model)(module)]
    assert len(wrapped) == model.config.num_hidden_layers
    assert {type(layer).__name__ for layer in wrapped} == set(model._no_split_modules)
