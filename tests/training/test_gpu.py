"""train.py on a GPU, where there is one. The other tests do not see it: these run processes that do."""

import json

import pytest
import torch

from tests.conftest import GPU, ROOT, run
from tests.training.courses import assert_same_course, losses

ASK = "import torch; print(torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0))"

# Attention in one kernel and in float32 an example at a time, outputs and gradients; prints the largest differences.
COMPARE = """
import itertools, torch
from alpaca.training.attention import attention_by_example
lengths = [5, 1, 300, 17, 128, 64]
bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
cases = [(64, 1, None, None), (128, 4, None, 0.1), (128, 2, 16, None), (256, 8, 4, None)]
for head_dim, groups, window, scaling in cases:
    module = torch.nn.Module()
    module.num_key_value_groups = groups
    torch.manual_seed(0)
    exact = [torch.randn(1, heads, sum(lengths), head_dim, device="cuda").bfloat16().float().requires_grad_()
             for heads in (8, 8 // groups, 8 // groups)]
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    batch = {"cu_seq_lens_q": bounds, "max_length_q": max(lengths), "sliding_window": window, "scaling": scaling}
    torch.cuda.set_sync_debug_mode("error")  # the kernel's way may not wait for the GPU
    ours = attention_by_example(module, *half, None, **batch)[0]
    weights = torch.randn_like(ours)
    (ours * weights).sum().backward()
    torch.cuda.set_sync_debug_mode("default")
    expected = attention_by_example(module, *exact, None, example_lengths=lengths, **batch)[0]
    (expected * weights.float()).sum().backward()
    pairs = [(ours, expected), *((a.grad, b.grad) for a, b in zip(half, exact, strict=True))]
    print(max(((a.float() - b).abs().max() / b.abs().max()).item() for a, b in pairs))
"""


@pytest.fixture(scope="module", autouse=True)
def gpu():
    if torch.version.cuda is None:
        pytest.skip("this PyTorch is not built for CUDA")
    asked = run("-c", ASK, env=GPU)
    if asked.stdout.strip() != "True":
        pytest.skip("no CUDA GPU of the Ampere generation (8.0) or newer")


@pytest.fixture(scope="module")
def train(llama, tmp_path_factory):
    """Runs train.py for four steps of 8 short examples; returns its output directory and what it said."""
    directory = tmp_path_factory.mktemp("gpu")
    records = json.loads((ROOT / "alpaca_data.json").read_text())
    (directory / "few.json").write_text(json.dumps(sorted(records, key=lambda record: len(str(record)))[:40]))

    def train(name, *flags):
        out = directory / name
        result = run(
            *("train.py", "--model_name_or_path", llama, "--data_path", directory / "few.json", "--output_dir", out),
            *("--max_steps", 4, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4),
            *("--learning_rate", "1e-4", "--logging_steps", 1, *flags),
            env=GPU,
        )
        assert result.returncode == 0, result.stderr[-5000:]
        assert "training on the CPU" not in result.stderr
        return out

    return train


def test_a_run_in_bf16_resumes_where_it_stopped(train):
    flags = ["--bf16", "True", "--tf32", "True", "--save_steps", 2]
    whole = train("bf16", *flags)
    log = json.loads((whole / "trainer_state.json").read_text())["log_history"]
    assert all(entry["tokens_per_second"] > 0 for entry in log if "loss" in entry) and len(losses(whole)) == 4
    resumed = train("resumed", *flags, "--resume_from_checkpoint", whole / "checkpoint-2")
    assert losses(resumed)[:2] == losses(whole)[:2]
    assert losses(resumed)[2:] == pytest.approx(losses(whole)[2:], rel=1e-2)
    answer = run(
        "inference.py", "--model_name_or_path", whole, "--instruction", "Count.", "--max_new_tokens", 4, env=GPU
    )
    assert answer.returncode == 0, answer.stderr[-5000:]


@pytest.mark.parametrize("attention", [[], ["--attn_implementation", "sdpa"]], ids=["by example", "masked"])
def test_examples_end_to_end_have_the_losses_of_padded_ones(attention, train):
    flags = ["--tf32", "False", "--save_strategy", "no"]
    padded = train("padded", *flags, "--padding_free", "False", "--balance_tokens", "False")
    assert_same_course(losses(train("packed", *flags, *attention)), losses(padded))


def test_the_kernel_computes_what_the_loop_does():
    result = run("-c", COMPARE, env=GPU)
    assert result.returncode == 0, result.stderr[-5000:]
    assert len(result.stdout.split()) == 4 and all(float(word) < 0.02 for word in result.stdout.split())


@pytest.mark.parametrize("more", [[], ["--torch_compile", "True"]], ids=["eager", "compiled"])
def test_a_run_in_one_kernel_has_the_losses_of_padded_batches(more, train):
    flags = ["--bf16", "True", "--save_strategy", "no"]
    padded = train("padded-bf16", *flags, "--padding_free", "False", "--balance_tokens", "False")
    assert losses(train("kernel", *flags, *more)) == pytest.approx(losses(padded), rel=1e-2)
