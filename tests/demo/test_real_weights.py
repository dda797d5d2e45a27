"""The pretrained base of the demo through everything else: training, weight diffs, LoRA, answers, the loop, the page.

No test hangs on what a processor's rounding makes of a real model: answers are compared with those of the same weights
on the same processor, asked in the plainest way.
"""

import json
import shutil
import time

import pytest
import safetensors.torch
import torch
import transformers

from alpaca.data.examples import load_examples
from alpaca.demo.compare import answer_all, load
from alpaca.demo.instructions import choose_demonstrations
from alpaca.training import checkpoints
from tests.answering.asking import COUNT, LESSONS, MIXED
from tests.answering.browser import start_browser
from tests.answering.test_web_page import Page, serving
from tests.conftest import ROOT, run
from tests.training import forked
from tests.training.courses import losses, weights

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

FLAGS = ["--use_cpu", "True", "--per_device_train_batch_size", 2, "--learning_rate", "1e-4", "--logging_steps", 1]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The eight shortest of the demonstrations."""
    path = tmp_path_factory.mktemp("data") / "short.json"
    chosen = choose_demonstrations(load_examples(str(ROOT / "alpaca_data.json")), 10_000, 420)
    path.write_text(json.dumps(sorted(chosen, key=lambda row: sum(map(len, row.values())))[:8]))
    return path


@pytest.fixture(scope="module")
def tuned(smollm2, tmp_path_factory):
    """The base after train.py with four examples, over and over: it answers them briefly, and ends."""
    directory = tmp_path_factory.mktemp("by_heart")
    (directory / "data.json").write_text(json.dumps([{**example, "output": text} for example, text in LESSONS]))
    flags = ["--model_name_or_path", smollm2, "--data_path", directory / "data.json", "--save_strategy", "no"]
    flags += [*FLAGS, "--per_device_train_batch_size", 4, "--learning_rate", "3e-4", "--num_train_epochs", 9]
    forked.run_train(directory / "model", *flags, "--warmup_steps", 1, "--lr_scheduler_type", "cosine")
    return directory / "model"


def test_a_killed_run_ends_bitwise_like_an_uninterrupted_one(smollm2, short, tmp_path):
    flags = ["--model_name_or_path", smollm2, "--data_path", short, *FLAGS, "--max_steps", 4, "--save_steps", 2]
    flags += ["--save_total_limit", 1, "--resume_from_checkpoint", "last"]
    forked.run_train(tmp_path / "straight", *flags)
    shutil.rmtree(tmp_path / "straight" / "checkpoint-4")
    killed, log = tmp_path / "killed", tmp_path / "log"
    process = forked.start(forked.train, log, *flags, "--output_dir", killed)
    while not (killed / "checkpoint-2" / checkpoints.MANIFEST).exists():
        assert process.is_alive(), log.read_text()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (killed / "config.json").exists()
    assert f"going on from {killed / 'checkpoint-2'}" in forked.run_train(killed, *flags)
    assert losses(killed) == losses(tmp_path / "straight") and len(losses(killed)) == 4
    name = "model.safetensors"
    assert (killed / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_two_processes_and_one_have_the_same_losses(smollm2, short, tmp_path):
    flags = ["--model_name_or_path", smollm2, "--data_path", short, *FLAGS, "--max_steps", 2, "--save_strategy", "no"]
    forked.run_train(tmp_path / "one", *flags, "--gradient_accumulation_steps", 2)
    forked.run_train(tmp_path / "two", *flags, processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert len(losses(tmp_path / "two")) == 2


def test_the_weight_diff_is_exact(smollm2, tuned, tmp_path):
    rounded = tmp_path / "tuned"
    model = transformers.AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.bfloat16)
    model.save_pretrained(rounded)
    transformers.AutoTokenizer.from_pretrained(tuned).save_pretrained(rounded)
    expected = safetensors.torch.load_file(rounded / "model.safetensors")
    base = safetensors.torch.load_file(smollm2 / "model.safetensors")

    def weight_diff(*words):
        result = run("weight_diff.py", *words)
        assert result.returncode == 0, result.stderr
        return result

    sizes = {}
    for encoding, flags in (("exact", []), ("float32", ["--encoding", "float32"])):
        diff, back = tmp_path / f"diff-{encoding}", tmp_path / f"back-{encoding}"
        weight_diff("make_diff", "--path_raw", smollm2, "--path_tuned", rounded, "--path_diff", diff, *flags)
        paths = ["--path_raw", smollm2, "--path_diff", diff, "--path_tuned", back]
        weight_diff("recover", *paths, "--test_inference", "False")
        weight_diff("verify", "--path", back)
        found = safetensors.torch.load_file(back / "model.safetensors")
        assert found.keys() == expected.keys()
        if encoding == "exact":
            assert all(torch.equal(found[n].view(torch.int16), expected[n].view(torch.int16)) for n in expected)
        for name in expected:  # float32 rounds tuned - raw, which shows where tuned is nearly 0 and raw is not
            apart = (found[name].float() - expected[name].float()).abs()
            assert (apart <= base[name].float().abs() * 2**-23).all()
        sizes[encoding] = (diff / "model.safetensors").stat().st_size
        shutil.rmtree(back)
    in_bfloat16 = 2 * sum(tensor.numel() for tensor in expected.values())
    assert sizes["exact"] == pytest.approx(in_bfloat16, abs=100_000)
    assert sizes["float32"] == pytest.approx(2 * in_bfloat16, abs=100_000)


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


def test_batches_answer_as_one_by_one(tuned):
    """Where two answers part, both next tokens must have been as likely: no more than rounding decided."""
    model, reader = load(str(tuned))
    sampling = {"max_new_tokens": 48, "do_sample": False}
    prompts = [reader.encode(example, 48) for example in MIXED]
    batch = reader.tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    with torch.inference_mode():
        together = model.generate(**batch, **sampling)[:, batch["input_ids"].shape[1] :].tolist()
        for prompt, row in zip(prompts, together, strict=True):
            ids = torch.tensor([prompt])
            options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **sampling}
            alone = model.generate(**options)[0, len(prompt) :].tolist()
            if parted := [place for place, pair in enumerate(zip(alone, row, strict=False)) if len(set(pair)) == 2]:
                logits = model(input_ids=torch.tensor([prompt + alone[: parted[0]]])).logits[0, -1]  # (V,)
                assert abs(float(logits[alone[parted[0]]] - logits[row[parted[0]]])) < 1e-3
    assert len({tuple(row) for row in together}) > 1


def test_the_prompt_loop(tuned):
    """Question after question, each answer is that of the model asked alone, and ends by itself."""
    examples = [example for example, _ in LESSONS]
    expected = [answer_all(*load(str(tuned)), [example], 300)[0] for example in examples]
    assert all(answer.ended for answer in expected)
    lines = []
    for example in examples:
        lines += [":input", example["input"], ""] if example["input"] else []
        lines.append(example["instruction"])
    result = run("inference.py", "--model_name_or_path", tuned, "--device", "cpu", input="\n".join(lines) + "\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "".join(f"{answer.text}\n" for answer in expected)


def test_the_page_streams_and_the_answer_ends_by_itself(tuned, tmp_path):
    expected = answer_all(*load(str(tuned)), [COUNT], 300)[0]
    assert expected.ended
    with serving(tuned, tmp_path / "log") as (_, url):
        chromium = start_browser(tmp_path / "profile")
        try:
            page = Page(chromium, url)
            page.set_length(300)
            page.type("#instruction textarea", COUNT["instruction"] + "\n")
            states = []
            while page.status() != "Done.":
                if (text := page.text("response")) not in states:
                    states.append(text)
            assert page.text("response") == expected.text
        finally:
            chromium.quit()
    assert len(states) > 2 and all(expected.text.startswith(text) for text in states)
    assert states == sorted(states, key=len)
