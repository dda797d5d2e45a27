"""Answers of small models, a batch at once or streamed, and directories that hold no model."""

import itertools
import threading

import pytest
import safetensors.torch
import torch
import transformers

import inference
from alpaca.answering import model as answering_model
from tests.answering.asking import GREEDY, LESSONS, MIXED, PASSIVE, ask, load, main, mistake


def test_sampling_follows_its_seed(llama):
    assert load(llama, "--dtype", "bfloat16")[0].dtype == torch.bfloat16
    model, reader = load(llama)  # random: every token is about as likely, so that two draws never agree
    prompt = reader.encode({"instruction": "Say something new.", "input": ""}, 24)
    flags = ["--instruction", "Say something new.", "--temperature", "1.5", "--top_p", "0.95", "--seed", "7"]
    result = ask(llama, *flags, "--max_new_tokens", "24")

    def sample(**settings):
        settings = {"max_new_tokens": 24, "temperature": 1.5, "top_p": 0.95, "seed": 7, **settings}
        return inference.answer(model, reader, [prompt], inference.Sampling(**settings))[0]

    assert result.returncode == 0 and result.stdout == sample() + "\n"
    greedy = sample(temperature=0)
    assert sample() not in (sample(seed=8), greedy)
    assert sample(temperature=0, seed=8) == greedy == sample(top_p=1e-6) == sample(temperature=1e-40)
    assert len(sample(max_new_tokens=3)) < len(sample())


def plain_greedy(model, ids, eos, number):
    """The likeliest token after all those before it, until the end token: no cache, no batch, no `generate`."""
    new = []
    with torch.no_grad():
        while len(new) < number and eos not in new:
            new.append(model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax().item())
    return new


@pytest.mark.parametrize("which", ["taught", "llama", "opt"])
def test_greedy_answers_do_not_depend_on_the_batch(which, request):
    model, reader = load(request.getfixturevalue(which), "--dtype", "float32")
    prompts = [reader.encode(example, GREEDY.max_new_tokens) for example in MIXED]
    assert max(map(len, prompts)) > 2.5 * min(map(len, prompts))
    eos = reader.tokenizer.eos_token_id
    plain = [plain_greedy(model, ids, eos, GREEDY.max_new_tokens) for ids in prompts]
    expected = [reader.tokenizer.decode(ids, skip_special_tokens=True) for ids in plain]
    assert inference.answer(model, reader, prompts, GREEDY) == expected
    assert [inference.answer(model, reader, [prompt], GREEDY)[0] for prompt in prompts] == expected
    if which == "taught":
        assert expected[:2] == ["Blue.", "The roses are watered by the gardener."]
        assert len({len(ids) for ids in plain if ids[-1] == eos}) > 1  # some end while others in the batch go on


def test_a_stream_grows_to_the_whole_answer(taught):
    model, reader = load(taught)
    sampling = inference.Sampling(100, 0, 1, 0)
    for example, answer in LESSONS:
        prompt = reader.encode(example, 100)
        assert inference.answer(model, reader, [prompt], sampling) == [answer]
        shown = list(inference.stream(model, reader, prompt, sampling, threading.Event()))
        assert shown[-1] == answer and len(shown) > len(answer) / 8
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(shown))
        assert "\ufffd" not in "".join(shown)
    sampled = inference.Sampling(20, 1.5, 1, 3)
    *_, last = inference.stream(model, reader, prompt, sampled, threading.Event())
    assert [last] == inference.answer(model, reader, [prompt], sampled)


def test_a_stream_hands_on_what_went_wrong(taught):
    model, reader = load(taught)
    bad = [reader.tokenizer.vocab_size + 1000]  # no such row in the embedding matrix
    with pytest.raises(IndexError):
        list(inference.stream(model, reader, bad, GREEDY, threading.Event()))
    assert answering_model._generating.acquire(timeout=60)  # the next answer need not wait
    answering_model._generating.release()


def test_an_adapter_directory_answers_as_its_merged_model(taught, tmp_path, capsys):
    import peft

    base = transformers.AutoModelForCausalLM.from_pretrained(taught)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    with torch.no_grad():
        for name, weights in tuned.named_parameters():
            weights.mul_(10 if "lora_B" in name else 1)
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    transformers.AutoTokenizer.from_pretrained(taught).save_pretrained(tmp_path / "merged")
    flags = ["--instruction", PASSIVE["instruction"], "--input", PASSIVE["input"], "--max_new_tokens", "12"]
    printed = [main(capsys, directory, *flags) for directory in (tmp_path / "adapter", tmp_path / "merged", taught)]
    assert printed[0] == printed[1] != printed[2]


def copy_without(source, target, *left_out):
    target.mkdir()
    for file in source.iterdir():
        if file.name not in left_out:
            (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_directory_that_lacks_something_is_named(llama, tmp_path, monkeypatch, capsys):
    def refused(path):
        code, line = mistake(monkeypatch, capsys, "--model_name_or_path", path, "--instruction", "x")
        assert code == 2 and str(path) in line
        return line

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no model: neither config.json nor adapter_config.json" in refused(empty)
    assert "no weights" in refused(copy_without(llama, tmp_path / "weightless", "model.safetensors"))
    assert "no tokenizer" in refused(copy_without(llama, tmp_path / "mute", "tokenizer.json", "tokenizer.model"))
    assert "can't be loaded" in refused("no/such-model")
    assert "does not exist" in refused(tmp_path / "missing")

    half = copy_without(llama, tmp_path / "half", "model.safetensors")
    state = safetensors.torch.load_file(llama / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(state, half / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 of the model's tensors: model.layers.1.mlp.up_proj.weight" in refused(half)

    torn = copy_without(llama, tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:100_000])
    assert "can't be loaded" in refused(torn)
    diff = copy_without(llama, tmp_path / "diff")
    (diff / "weight_diff.json").write_text('{"kind": "diff"}')
    assert "weight_diff.py recover" in refused(diff)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "no/such-base"}')
    assert "no weights" in refused(adapter)
