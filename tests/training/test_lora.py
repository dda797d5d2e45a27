"""LoRA through train.py: what is trained, what is saved, and that it loads again to the same logits."""

import shutil

import peft
import pytest
import torch
import transformers

from tests.training import forked
from tests.training.courses import assert_same_changes, assert_same_course, losses, weights
from tests.training.test_train import RECIPE, data  # noqa: F401  the fixture is found by its name

FLAGS = ["--lora_r", "4", "--lora_alpha", "32", "--lora_dropout", "0.1", "--learning_rate", "1e-2"]


def adapters(directory):
    return weights(directory, "adapter_model.safetensors")


def logits(model, tokenizer):
    with torch.no_grad():
        return model.eval()(**tokenizer("Give three eggs a name.", return_tensors="pt")).logits


@pytest.fixture(scope="module")
def tuned(llama, data, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("lora") / "out"
    flags = ["--model_name_or_path", llama, "--data_path", data, *RECIPE, *FLAGS]
    said = forked.run_train(out, *flags, "--save_strategy", "steps", "--save_steps", "2", "--lora_merge", "True")
    assert "LoRA trains" in said
    return out


def test_only_the_adapter_is_trained_and_saved_and_it_loads_to_the_merged_model(tuned, llama):
    assert not (tuned / "model.safetensors").exists() and not (tuned / "config.json").exists()
    saved = adapters(tuned)
    assert saved and all("lora_" in name for name in saved)
    assert any(tensor.abs().max() > 0 for name, tensor in saved.items() if "lora_B" in name)

    tokenizer = transformers.AutoTokenizer.from_pretrained(tuned)
    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    before = logits(base, tokenizer)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tuned)
    after = logits(model, tokenizer)
    assert (after - before).abs().max() > 1e-2  # a hundred times the tolerance below
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings and tokenizer.pad_token == "<unk>"

    # By hand: base weights plus alpha / r * B A, which is also what was saved as the merged model.
    state = base.state_dict()
    for name, a in saved.items():
        if "lora_A" in name:
            b = saved[name.replace("lora_A", "lora_B")]
            state[name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")] += 32 / 4 * b @ a
    assert torch.allclose(logits(base, tokenizer), after, atol=1e-4)
    merged, report = transformers.AutoModelForCausalLM.from_pretrained(tuned / "merged", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.allclose(logits(merged, tokenizer), after, atol=1e-4)
    untouched = weights(llama)
    for name, tensor in weights(tuned / "merged").items():
        assert torch.equal(tensor, untouched[name]) == ("proj" not in name), name


def test_resuming_ends_with_the_same_adapter(tuned, llama, data, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    shutil.copytree(tuned / "checkpoint-2", out / "checkpoint-2")
    flags = ["--model_name_or_path", llama, "--data_path", data, *RECIPE, *FLAGS]
    forked.run_train(out, *flags, "--save_strategy", "no", "--resume_from_checkpoint", "last")
    assert losses(out) == losses(tuned)
    assert all(torch.equal(tensor, adapters(tuned)[name]) for name, tensor in adapters(out).items())


def test_fsdp_trains_saves_and_resumes_the_same_adapter(llama, data, tmp_path):  # noqa: F811
    def job(name, *more, **options):
        flags = ["--model_name_or_path", llama, "--data_path", data, *RECIPE, *FLAGS, "--lora_dropout", "0"]
        forked.run_train(tmp_path / name, *flags, *more, **options)
        return tmp_path / name

    single = job("single", "--gradient_accumulation_steps", 2, "--save_strategy", "no")
    fsdp = {"processes": 2, "sharded": True}
    sharding = ["--fsdp", "full_shard auto_wrap", "--gradient_checkpointing", "True"]
    sharded = job("sharded", *sharding, "--save_strategy", "steps", "--save_steps", 2, **fsdp)
    assert_same_course(losses(sharded), losses(single))
    begun_with_zero = {name: torch.zeros_like(b) for name, b in adapters(single).items() if "lora_B" in name}
    assert_same_changes(adapters(sharded), adapters(single), begun_with_zero)
    last = sharded / "checkpoint-2"
    resumed = job("resumed", *sharding, "--resume_from_checkpoint", last, **fsdp)
    assert losses(resumed) == losses(sharded)
    assert all(torch.equal(tensor, adapters(sharded)[n]) for n, tensor in adapters(resumed).items())


def test_what_lora_can_not_do_is_said(llama, data, tmp_path):  # noqa: F811
    flags = ["--model_name_or_path", llama, "--data_path", data, "--output_dir", tmp_path / "out", "--lora_r", 4]
    process = forked.start(forked.train, tmp_path / "log", *flags, "--lora_target_modules", "query")
    process.join()
    said = (tmp_path / "log").read_text()
    assert process.exitcode == 2 and said.count("error: --lora_target_modules query") == 1 and "Traceback" not in said
