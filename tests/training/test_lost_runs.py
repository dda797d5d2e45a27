"""Runs that must not be lost: preempted or started again with a best model to choose, refused before they begin."""

import json
import os
import re
import shutil
import sys

import pytest
import safetensors.torch
import torch
import transformers

import train
from alpaca.common import ExpectedError
from alpaca.training import checkpoints, models
from tests.conftest import run
from tests.training import forked

STEPS = 6
# The best is the greatest loss, and so an early step.
BEST = {
    "limit 1": [
        "--save_strategy",
        "steps",
        "--save_steps",
        2,
        "--save_total_limit",
        1,
        "--load_best_model_at_end",
        True,
        "--greater_is_better",
        True,
    ],
    "best": ["--save_strategy", "best", "--greater_is_better", True],
}


@pytest.fixture(scope="module")
def flags(base, data):
    return [
        *("--model_name_or_path", base, "--data_path", data, "--val_size", 4, "--learning_rate", "1e-2"),
        *("--max_steps", STEPS, "--per_device_train_batch_size", 4, "--logging_steps", 1),
        *("--eval_strategy", "steps", "--eval_steps", 2, "--resume_from_checkpoint", "last"),
    ]


def finish(log, *flags, function=forked.train, code=0):
    process = forked.start(function, log, *flags)
    process.join(600)
    said = log.read_text()
    assert process.exitcode == code and "Traceback" not in said, said
    return said


def refuse(monkeypatch, *flags):
    """What train.py, in this process, says when it refuses to begin; exit 2."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    with pytest.raises(ExpectedError) as raised:
        train.train()
    assert raised.value.exit_code == 2 and "\n" not in str(raised.value)
    return str(raised.value)


def model(directory):
    return safetensors.torch.load_file(directory / "model.safetensors")


def state(directory):
    return json.loads((directory / "trainer_state.json").read_text())


@pytest.fixture(scope="module", params=list(BEST))
def finished(request, flags, tmp_path_factory):
    """A kind of run, and the directory of one that was not interrupted."""
    out = tmp_path_factory.mktemp("finished") / "out"
    finish(out.parent / "log", *flags, *BEST[request.param], "--output_dir", out)
    return request.param, out


@pytest.mark.timeout(300)
def test_a_preempted_run_is_not_taken_for_a_finished_one(finished, flags, tmp_path):
    (kind, straight), out = finished, tmp_path / "out"
    process = forked.start(forked.train_and_be_stopped, tmp_path / "log-1", 3, *flags, *BEST[kind], "--output_dir", out)
    process.join(600)
    said = (tmp_path / "log-1").read_text()
    assert process.exitcode == 75 and "error: stopped by SIGTERM after saving" in said, said
    checkpoints.verify(out / "checkpoint-3")  # at a step at which nothing is due
    assert not (out / "config.json").exists()
    assert "going on from" in finish(tmp_path / "log-2", *flags, *BEST[kind], "--output_dir", out)
    assert state(out)["log_history"][-1]["step"] == STEPS
    of_both = [[e["eval_loss"] for e in state(d)["log_history"] if "eval_loss" in e] for d in (out, straight)]
    assert of_both[0] == of_both[1] and len(of_both[0]) >= 3
    for name, tensor in model(straight).items():
        assert torch.equal(tensor, model(out)[name])


def test_a_finished_run_that_is_started_again_trains_nothing(finished, flags, tmp_path):
    kind, out = finished
    flags = [*flags, *BEST[kind], "--output_dir", out]
    best = state(out)["best_global_step"]
    assert best < STEPS and (out / f"checkpoint-{STEPS}").exists()
    before = model(out)
    for name, tensor in model(out / f"checkpoint-{best}").items():
        assert torch.equal(before[name], tensor) or kind == "best"
    said = finish(tmp_path / "log-2", *flags)
    assert f"going on from {out}/checkpoint-{STEPS}" in said and "'loss'" not in said
    assert all(torch.equal(tensor, model(out)[name]) for name, tensor in before.items())


def test_every_config_of_the_library_can_be_saved_after_training():
    """Many have no use_cache, or have it inside the text model's config."""
    without = 0
    for kind in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        try:
            config = kind()
        except Exception:  # some need arguments
            continue
        before = config.to_dict()
        without += not hasattr(config, "use_cache")
        put_back = models.turn_off_cache(config)
        assert config.use_cache is False and config.get_text_config(decoder=True).use_cache is False
        put_back()
        assert config.to_dict() == before, kind
    assert without >= 10


def gemma3(directory, tokenizer):
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 32}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def test_a_multimodal_model_is_saved(base, data, tmp_path):
    gemma3(tmp_path / "gemma", transformers.AutoTokenizer.from_pretrained(base))
    flags = ["--model_name_or_path", tmp_path / "gemma", "--data_path", data, "--max_steps", 1]
    finish(tmp_path / "log", *flags, "--save_strategy", "no", "--output_dir", tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert "use_cache" not in config.to_diff_dict() and config.get_text_config().use_cache


def test_adapters_of_a_base_without_a_row_for_its_pad_token_are_merged(base, data, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "base")
    rows = len(model(base)["model.embed_tokens.weight"])
    assert len(tokenizer) == rows + 1
    flags = ["--model_name_or_path", tmp_path / "base", "--data_path", data, "--max_steps", 1, "--save_strategy", "no"]
    finish(tmp_path / "log", *flags, "--lora_r", 2, "--lora_merge", True, "--output_dir", tmp_path / "out")
    merged = model(tmp_path / "out" / "merged")["model.embed_tokens.weight"]
    assert len(merged) == rows + 1
    assert torch.allclose(merged[-1], merged[:-1].mean(dim=0), atol=1e-6)


def copy(base, directory, **config):
    shutil.copytree(base, directory)
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return directory


def adapter(base, directory):
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    (directory / "adapter_model.safetensors").write_bytes(b"")
    return directory


def prefixed(base, directory):
    copy(base, directory)
    tensors = {f"module.{name}": tensor for name, tensor in model(base).items()}
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def nested(base, directory):
    copy(base, directory)
    (directory / "config.json").write_text('{"a":' * 100_000)
    return directory


@pytest.fixture(scope="module")
def gpt2(base, tmp_path_factory):
    """With 64 learnt positions: fewer than the examples have tokens."""
    directory = tmp_path_factory.mktemp("gpt2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (prefixed, r"lacks 12 of the model's tensors: .* \(it has others, such as module\."),
        (
            lambda base, at: copy(base, at, hidden_size=64),
            r"has the shape \(\d+, 32\), and config.json says \(\d+, 64\)",
        ),
        (lambda base, at: copy(base, at, num_hidden_layers=2), r"lacks 9 of the model's tensors: model\.layers\.1"),
        (adapter, "holds a LoRA adapter and no model; give its base"),
        (nested, "can't be loaded: .*recursion"),
        (lambda base, at: at, "does not exist; give a model's directory"),
        (lambda base, at: "no/such/model", "no/such/model does not exist; give a model's directory"),
    ],
    ids=["prefix", "shape", "layers", "adapter", "nested", "missing", "relative"],
)
def test_a_base_that_is_none_is_refused(wrong, said, base, data, tmp_path, monkeypatch):
    path = wrong(base, tmp_path / "model")
    flags = ["--model_name_or_path", path, "--data_path", data, "--max_steps", 1, "--output_dir", tmp_path / "out"]
    assert re.search(said, refuse(monkeypatch, *flags))
    assert not os.path.exists(tmp_path / "out") or not os.listdir(tmp_path / "out")


def test_a_short_table_of_positions_is_refused(gpt2, opt, data, tmp_path, monkeypatch):
    flags = [
        "--model_name_or_path",
        gpt2,
        "--data_path",
        data,
        "--output_dir",
        tmp_path / "out",
        "--pad_token",
        "<unk>",
    ]
    said = refuse(monkeypatch, *flags)
    assert "has 64 positions, and the longest example has" in said and "give --model_max_length 64 or less" in said
    config = transformers.AutoConfig.from_pretrained(opt)
    models.check_positions(config, 1024)
    with pytest.raises(ExpectedError, match="this opt model has 1,024 positions"):
        models.check_positions(config, 1025)
    models.check_positions(transformers.LlamaConfig(max_position_embeddings=64), 1000)


def tree(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("lora", [True, False])
def test_the_users_own_model_stays(lora, base, data, tmp_path, monkeypatch):
    """As the output directory, in it where rotation or a merge would remove it, and around it."""
    out = tmp_path / "out"
    for place in ("out", "out/merged", "out/checkpoint-2", "out/checkpoint-2/deep"):
        shutil.copytree(base, tmp_path / place)
        before = tree(out)
        flags = ["--model_name_or_path", tmp_path / place, "--data_path", data, "--max_steps", 3, "--save_steps", 1]
        flags += ["--save_total_limit", 1, "--output_dir", out, *(["--lora_r", 2] if lora else [])]
        said = refuse(monkeypatch, *flags)
        assert re.search(r"^--output_dir \S+ (is|holds) --model_name_or_path .* which is read", said)
        assert tree(out) == before
        shutil.rmtree(out)
    shutil.copytree(base, out)
    before = tree(out)
    flags[1] = base
    assert "which no run of train.py saved there" in finish(tmp_path / "log", *flags, code=2)  # and as a process
    assert tree(out) == before


def test_an_output_directory_of_one_machine_alone_is_refused(base, data, tmp_path):
    flags = ["--model_name_or_path", base, "--data_path", data, "--max_steps", 1, "--output_dir", "out"]
    ranks = forked.start_ranks(2, forked.train_at_home, tmp_path / "log", tmp_path, *flags)
    for rank in ranks:
        rank.join(600)
    said = (tmp_path / "log").read_text()
    assert [rank.exitcode for rank in ranks] == [2, 2] and said.count("error: ") == 1, said
    assert "is not one directory for all processes: what rank 0 writes there, rank 1 can't see" in said


def test_a_full_memory_ends_in_one_line(base, data, tmp_path):
    flags = ["--model_name_or_path", base, "--data_path", data, "--max_steps", 1, "--output_dir", tmp_path / "out"]
    said = finish(tmp_path / "log", *flags, function=forked.train_with_little_memory, code=2)
    assert "error: the machine's memory is full" in said and "--estimate_memory True" in said


def test_a_rank_ends_without_the_interpreters_tidying_up(tmp_path):
    """In which threads of gloo are now and then caught. What was to be said and done at exit is."""
    cases = [(False, []), (True, []), (True, ["x"]), (True, ["x", "y"])]  # a rank? its arguments
    script = tmp_path / "ranks.py"
    script.write_text(
        "import atexit, os, sys\n"
        "from alpaca.common import ExitCode, ExpectedError\n"
        "from alpaca.training.processes import run_rank\n"
        "class Tidied:\n"
        "    def __del__(self, write=sys.stderr.write):\n"
        "        write('tidied up')\n"
        "def main():\n"
        "    print('said')\n"
        "    if len(sys.argv) > 2:\n"
        "        raise RuntimeError('a bug')\n"
        "    if len(sys.argv) > 1:\n"
        "        raise ExpectedError('refused', ExitCode.DATA)\n"
        "codes = []\n"
        f"for number, (is_rank, arguments) in enumerate({cases}):\n"
        "    if child := os.fork():\n"
        "        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "        continue\n"
        "    for stream in (1, 2):\n"
        "        os.dup2(os.open(f'{number}-{stream}', os.O_WRONLY | os.O_CREAT), stream)\n"
        "    os.environ.update({'WORLD_SIZE': '1'} if is_rank else {})\n"
        "    sys.argv = ['rank', *arguments]\n"
        "    kept = Tidied()\n"
        "    atexit.register(print, 'at exit')\n"
        "    run_rank(main)\n"
        "    break\n"
        "else:\n"
        "    print(codes)\n"
    )
    result = run(script, env={"PYTHONPATH": str(forked.ROOT)}, cwd=tmp_path)
    assert json.loads(result.stdout) == [0, 0, 3, 1], result.stderr
    assert "tidied up" in (tmp_path / "0-2").read_text()
    for number, error in ((1, ""), (2, "error: refused\n"), (3, "a bug\n")):
        said, complained = ((tmp_path / f"{number}-{stream}").read_text() for stream in (1, 2))
        assert said == "said\nat exit\n" and complained.endswith(error) and "tidied up" not in complained


def test_deepspeeds_fixed_sizes_must_be_those_of_the_flags(base, data, tmp_path):
    pytest.importorskip("deepspeed")
    config = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": "auto", "zero_optimization": {}}
    (tmp_path / "fixed.json").write_text(json.dumps(config))
    flags = ["--model_name_or_path", base, "--data_path", data, "--output_dir", tmp_path / "out"]
    flags += ["--per_device_train_batch_size", 2, "--deepspeed", tmp_path / "fixed.json"]
    lock = tmp_path / "extensions" / "cpu_adam" / "lock"  # of a build that was killed
    lock.parent.mkdir(parents=True)
    lock.touch()
    job = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    rank = forked.start(forked.train, tmp_path / "log", *flags, **job)
    rank.join(600)
    said = (tmp_path / "log").read_text()
    assert rank.exitcode == 2 and said.count("error: ") == 1 and "Traceback" not in said, said
    assert "fixed.json has train_micro_batch_size_per_gpu 4, and the flags say 2" in said
    assert f"notice: DeepSpeed waits while {lock} is there" in said


def test_what_windows_lacks_is_not_needed_for_training(base, data, tmp_path):
    flags = ["--model_name_or_path", base, "--data_path", data, "--max_steps", 1, "--output_dir", tmp_path / "out"]
    finish(tmp_path / "log", *flags, function=forked.train_without_unix)
    assert os.path.exists(tmp_path / "out" / "manifest.json")
