"""The pretrained base of the demo in training: two processes against one, and an adapter against its merged model."""

import json

import pytest
import torch
import transformers

from alpaca.data.examples import load_examples
from alpaca.demo.compare import load
from alpaca.demo.instructions import choose_demonstrations
from tests.answering.asking import MIXED
from tests.conftest import ROOT
from tests.training import forked
from tests.training.courses import losses, weights

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

FLAGS = ["--use_cpu", "True", "--per_device_train_batch_size", 2, "--learning_rate", "1e-4", "--logging_steps", 1]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The eight shortest of the demonstrations."""
    path = tmp_path_factory.mktemp("data") / "short.json"
    chosen = choose_demonstrations(load_examples(str(ROOT / "alpaca_data.json")), 10_000, 420)
    path.write_text(json.dumps(sorted(chosen, key=lambda row: sum(map(len, row.values())))[:8]))
    return path


def test_two_processes_and_one_have_the_same_losses(smollm2, short, tmp_path):
    flags = ["--model_name_or_path", smollm2, "--data_path", short, *FLAGS, "--max_steps", 2, "--save_strategy", "no"]
    forked.run_train(tmp_path / "one", *flags, "--gradient_accumulation_steps", 2)
    forked.run_train(tmp_path / "two", *flags, processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert len(losses(tmp_path / "two")) == 2


def test_an_adapter_and_its_merged_model_say_the_same(smollm2, short, tmp_path):
    flags = ["--model_name_or_path", smollm2, "--data_path", short, *FLAGS, "--learning_rate", "1e-3"]
    flags += ["--max_steps", 3, "--save_strategy", "no", "--lora_r", 8, "--lora_merge", "True"]
    forked.run_train(tmp_path / "lora", *flags)
    adapter, reader = load(str(tmp_path / "lora"))
    merged, _ = load(str(tmp_path / "lora" / "merged"))
    base, _ = load(str(smollm2))
    ids = torch.tensor([reader.encode(MIXED[1], 32)])
    with torch.inference_mode():
        logits = [model(input_ids=ids).logits for model in (adapter, merged, base)]  # (1, T, V) each
    assert (logits[0] - logits[1]).abs().max() < 1e-3 < 0.05 < (logits[0] - logits[2]).abs().max()
    changed = weights(tmp_path / "lora" / "merged")
    same = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).state_dict()
    kept = {name for name in changed if torch.equal(changed[name], same[name])}
    assert kept == {name for name in changed if "proj" not in name}  # embeddings and norms are not adapted
