"""train.py on a GPU, where there is one. The other tests do not see it: these run processes that do."""

import json

import pytest
import torch

from tests.conftest import GPU, ROOT, run
from tests.training.courses import assert_same_course, losses

ASK = "import torch; print(torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0))"


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
