"""train.py as a user runs it: the commands of 2023, one process and two, sharded and not."""

import json
import re
import shlex
import shutil
import sys

import pytest
import torch
import transformers

import train
from alpaca.common import ExpectedError
from tests.conftest import ROOT, run
from tests.training import forked
from tests.training.courses import assert_same_changes, assert_same_course, losses, weights

COMMANDS_OF_2023 = [
    shlex.split(block.replace("\\\n", " "))
    for block in re.findall(
        r"```bash\n(torchrun .*?)```", (ROOT / "tests" / "training" / "commands_of_2023.md").read_text(), re.DOTALL
    )
]
RECIPE = [
    *("--per_device_train_batch_size", "2", "--learning_rate", "2e-4", "--lr_scheduler_type", "cosine"),
    *("--warmup_ratio", "0.03", "--logging_steps", "1", "--max_steps", "4", "--weight_decay", "0."),
]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "few.json"
    records = json.loads((ROOT / "alpaca_data.json").read_text())
    path.write_text(json.dumps(sorted(records, key=lambda record: len(str(record)))[:40]))
    return path


def rates(directory):
    log = json.loads((directory / "trainer_state.json").read_text())["log_history"]
    return [entry["learning_rate"] for entry in log if "loss" in entry]


def assert_loadable(directory, base):
    """The directory holds a whole model under its plain names, and a tokenizer; both load and answer."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert model.generate(**tokenizer("Say", return_tensors="pt"), max_new_tokens=2).shape[0] == 1
    original = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert set(model.state_dict()) == set(original.state_dict())
    assert model.config.use_cache


@pytest.fixture(scope="session")
def one_process(llama, data, tmp_path_factory):
    """The run that the others are compared with: 4 steps of 8 examples in one process."""
    out = tmp_path_factory.mktemp("one")
    flags = ["--gradient_accumulation_steps", "4", "--save_strategy", "no"]
    forked.run_train(out, "--model_name_or_path", llama, "--data_path", data, *RECIPE, *flags)
    assert_loadable(out, llama)
    assert len(losses(out)) == 4
    return out


def test_all_commands_of_2023_are_there():
    text = " ".join(word for command in COMMANDS_OF_2023 for word in command)
    assert len(COMMANDS_OF_2023) == 4
    for value in ("LLaMADecoderLayer", "OPTDecoderLayer", "auto_wrap offload", "default_offload_opt_param.json"):
        assert value in text


def run_as_written(command, llama, opt, out, launch=False):
    """Run a command of 2023 with nothing changed but paths, ports and process counts, and fewer, smaller steps.

    `launch`: by torchrun itself, and not in two processes that are forked.
    """
    assert command[0] == "torchrun" and "train.py" in command
    arguments = command[command.index("train.py") :]
    model = opt if "OPTDecoderLayer" in arguments else llama
    arguments[arguments.index("--model_name_or_path") + 1] = str(model)
    arguments[arguments.index("--output_dir") + 1] = str(out)
    small = ["--max_steps", "1", "--gradient_accumulation_steps", "1", "--model_max_length", "128"]
    if launch:
        result = run(*arguments, *small, processes=2, timeout=500)
        assert result.returncode == 0, result.stderr[-3000:]
        said = result.stderr
    else:
        said = forked.run_train(out, *arguments[1:], *small, processes=2)
    assert_loadable(out, model)
    return said


@pytest.mark.parametrize("command", [c for c in COMMANDS_OF_2023 if "--deepspeed" not in c], ids=lambda c: c[-3])
def test_a_command_of_2023(command, llama, opt, tmp_path):
    launch = "OPTDecoderLayer" in command  # one of them starts as it stands there
    said = run_as_written(list(command), llama, opt, tmp_path / "out", launch)
    for line in (
        "--evaluation_strategy no is spelled --eval_strategy no today",
        "--warmup_ratio 0.03 is spelled --warmup_steps 0.03 today",
        "no accelerator found, training on the CPU; --tf32 does not apply",
        "--fsdp shards nothing on the CPU: the run is plain data-parallel",
    ):
        assert said.count(line) == 1, said
    assert ("LLaMADecoderLayer is written LlamaDecoderLayer" in said) == ("LLaMADecoderLayer" in command)
    assert "batches are padded" not in said


@pytest.mark.parametrize(("processes", "batches"), [(2, ""), (1, "2023"), (2, "2023")])
def test_other_processes_and_other_batches_take_the_same_steps(processes, batches, one_process, llama, data, tmp_path):
    flags = ["--gradient_accumulation_steps", 4 // processes, "--save_strategy", "no"]
    if batches == "2023":
        flags += ["--padding_free", "False", "--balance_tokens", "False"]
    out = tmp_path / "out"
    forked.run_train(out, "--model_name_or_path", llama, "--data_path", data, *RECIPE, *flags, processes=processes)
    assert_same_course(losses(out), losses(one_process))


def test_fsdp_shards_trains_saves_and_resumes(one_process, llama, data, tmp_path):
    flags = [
        *("--model_name_or_path", llama, "--data_path", data, *RECIPE),
        *("--gradient_accumulation_steps", "2", "--save_strategy", "steps", "--save_steps", "2"),
        *("--fsdp", "full_shard auto_wrap offload", "--fsdp_transformer_layer_cls_to_wrap", "LLaMADecoderLayer"),
    ]
    said = forked.run_train(tmp_path / "out", *flags, processes=2, sharded=True)
    local, total = (
        int(number.replace(",", ""))
        for number in re.search(r"FSDP holds ([\d,]+) of ([\d,]+) parameters", said).groups()
    )
    assert total == sum(tensor.numel() for tensor in weights(one_process).values())
    assert 0.49 < local / total < 0.51
    assert_same_course(losses(tmp_path / "out"), losses(one_process))
    assert_loadable(tmp_path / "out", llama)
    whole = weights(tmp_path / "out")
    assert_same_changes(whole, weights(one_process), weights(llama))

    shutil.copytree(tmp_path / "out" / "checkpoint-2", tmp_path / "checkpoint-2")
    flags += ["--resume_from_checkpoint", tmp_path / "checkpoint-2"]
    forked.run_train(tmp_path / "resumed", *flags, processes=2, sharded=True)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "out")
    resumed = weights(tmp_path / "resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.soak  # compiles DeepSpeed's CPU Adam once, which takes minutes
@pytest.mark.timeout(1500)
def test_zero_3_with_both_offloads(one_process, llama, opt, data, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))  # a killed build locks its directory
    config = ["--deepspeed", "./configs/default_offload_opt_param.json"]
    result = run(
        *("train.py", "--model_name_or_path", llama, "--data_path", data, "--output_dir", tmp_path / "out", *RECIPE),
        *("--gradient_accumulation_steps", "2", "--save_strategy", "no", *config),
        processes=2,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-20000:]
    assert_same_course(losses(tmp_path / "out"), losses(one_process))
    assert rates(tmp_path / "out")[1:] == pytest.approx([2e-4 * 0.75, 2e-4 * 0.25, 0], rel=1e-6)  # the cosine's
    assert_loadable(tmp_path / "out", llama)
    assert_same_changes(weights(tmp_path / "out"), weights(one_process), weights(llama))
    command = next(command for command in COMMANDS_OF_2023 if "--deepspeed" in command)
    run_as_written(list(command), llama, opt, tmp_path / "of_2023", launch=True)
    # The benchmark's row, here because it needs the same builds.
    options = ["--model", llama, "--only", "ZeRO-3", "--steps", 2, "--step_examples", 16, "--output", tmp_path / "rows"]
    result = run(ROOT / "benchmarks" / "bench_gpu.py", *options, timeout=600)
    row = json.loads((tmp_path / "rows").read_text())
    assert result.returncode == 0 and "failed" not in row, row
    parameters = sum(tensor.numel() for tensor in weights(llama).values())
    assert row["parameters"] == parameters and row["ours"]["estimated_gib"] > 0


def test_weights_are_trained_in_float32_whatever_the_checkpoint(llama, data, tmp_path):
    base = tmp_path / "bf16"
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    model.generation_config.temperature = 0.6  # as published models have it, and as save_pretrained refuses it
    transformers.AutoTokenizer.from_pretrained(llama).save_pretrained(base)
    model.generation_config.do_sample = True
    model.save_pretrained(base)
    generation = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps({**generation, "do_sample": False}))
    flags = ["--model_name_or_path", base, "--data_path", data, *RECIPE, "--max_steps", "1", "--save_strategy", "no"]
    for dtype, extra in ((torch.float32, []), (torch.bfloat16, ["--dtype", "bfloat16", "--pad_token", "<unk>"])):
        assert "do_sample is now true" in forked.run_train(tmp_path / str(dtype), *flags, *extra)
        assert {tensor.dtype for tensor in weights(tmp_path / str(dtype)).values()} == {dtype}
        rows = len(weights(tmp_path / str(dtype))["model.embed_tokens.weight"])
        assert rows == model.config.vocab_size + (not extra)


def test_held_out_examples_are_evaluated_after_saving(llama, data, tmp_path):
    flags = ["--max_steps", "1", "--val_size", "0.2", "--evaluation_strategy", "no", "--save_strategy", "no"]
    said = forked.run_train(tmp_path / "out", "--model_name_or_path", llama, "--data_path", data, *RECIPE, *flags)
    assert "eval_loss" in said
    log = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert log["eval_samples"] == 8 and log["eval_loss"] > 0


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--fsdp", "full_shard", "--fsdp_transformer_layer_cls_to_wrap", "Wrong"], 2, "layers are LlamaDecoderLayer"),
        (["--pad_token", "<none>"], 2, "not in the tokenizer's vocabulary"),
        (["--val_size", "1000"], 2, "--val_size 1000 of 40 examples"),
        (["--model_max_length", "8"], 3, "raise --model_max_length"),
        (["--model_name_or_path", "facebook/opt-125m"], 2, "--model_name_or_path facebook/opt-125m can't be loaded"),
        (["--data_path", "tatsu-lab/alpaca"], 3, "Hub data set tatsu-lab/alpaca can't be loaded"),
    ],
)
def test_what_is_wrong_is_said_before_weights_are_loaded(flags, code, said, llama, data, tmp_path, monkeypatch):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama / name, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")  # which can't be loaded
    out = tmp_path.with_name(f"{tmp_path.name}-out")
    flags = ["--model_name_or_path", tmp_path, "--data_path", data, "--output_dir", out, *flags]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    with pytest.raises(ExpectedError) as raised:
        train.train()
    assert raised.value.exit_code == code and said in str(raised.value)
    assert not out.exists()


def test_bad_data_is_one_line_and_every_rank_stops(llama, tmp_path):
    (tmp_path / "bad.json").write_text('[{"instruction": 1}]')
    flags = ["--model_name_or_path", llama, "--data_path", tmp_path / "bad.json", "--output_dir", tmp_path / "out"]
    ranks = forked.start_ranks(2, forked.train, tmp_path / "log", *flags)
    for rank in ranks:
        rank.join(300)
    said = (tmp_path / "log").read_text()
    assert [rank.exitcode for rank in ranks] == [3, 3]
    assert said.count("error: ") == 1 and '"instruction" is a number' in said and "Traceback" not in said


def test_show_batch_prints_and_exits(llama, data, tmp_path):
    flags = ["--model_name_or_path", llama, "--data_path", data, "--show_batch", "3"]
    process = forked.start(forked.train, tmp_path / "log", *flags)
    process.join()
    said = (tmp_path / "log").read_text()
    assert process.exitcode == 0 and said.count("--- record") == 3 and "«" in said, said
