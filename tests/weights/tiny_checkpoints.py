"""Small random LLaMA checkpoints in every form that weight_diff reads, and what its tests do with them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import weight_diff
from alpaca.common import ExitCode, ExpectedError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "weight_diff.py"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
REFUSED = (ExitCode.DATA, ExitCode.INTEGRITY)
WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def model(dtype=torch.bfloat16, vocabulary=300, tied=False, seed=0, hidden=32, layers=2):
    """Random weights; the same seed gives the same model up to rounding, whatever the other arguments."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        tie_word_embeddings=tied,
    )
    built = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return built.to(dtype)


def tuned_from(raw, dtype=None, vocabulary=None, tied=None, seed=1):
    """A model near `raw`: its values plus noise, the vocabulary grown at the end."""
    config = raw.config
    tuned = model(
        dtype=torch.float32,
        vocabulary=vocabulary or config.vocab_size,
        tied=config.tie_word_embeddings if tied is None else tied,
        seed=seed,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
    )
    base = raw.state_dict()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            rows = base[name].shape[0]
            parameter[:rows] = base[name].float() + 0.001 * parameter[:rows]
    return tuned.to(dtype or raw.dtype)


def save(built, path, sharded=False):
    built.save_pretrained(path, max_shard_size="20KB" if sharded else "5GB")
    return path


def save_bin(state, config, path, shards=1):
    """`pytorch_model.bin`, or shards with an index, as transformers wrote them in 2023."""
    path.mkdir(parents=True)
    config.save_pretrained(path)
    names = list(state)
    if shards == 1:
        torch.save(dict(state), path / "pytorch_model.bin")
        return path
    weight_map = {}
    for shard in range(shards):
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        file = f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        torch.save({name: state[name].clone() for name in part}, path / file)
        weight_map.update(dict.fromkeys(part, file))
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return path


def load(path):
    """All tensors of a directory, by the libraries, whole in memory."""
    state = {}
    for file in sorted(path.glob("*.safetensors")):
        state.update(load_file(file))
    for file in sorted(path.glob("*.bin")):
        state.update(torch.load(file, weights_only=True))
    return state


def bits(tensor):
    return tensor.contiguous().view(WORD[tensor.element_size()])


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and one[name].shape == other[name].shape, name
        assert torch.equal(bits(one[name]), bits(other[name])), name


def save_tokenizer(path, vocabulary=300, appends_end=False):
    """Byte-level: any text becomes ids below 256, and the end token is 256, which some tokenizers append themselves."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.add_tokens([f"<extra_{number}>" for number in range(vocabulary - 256)])
    if appends_end:
        tokens.post_processor = TemplateProcessing(single="$A <extra_0>", special_tokens=[("<extra_0>", 256)])
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<extra_0>").save_pretrained(path)


def save_holes(path, elements):
    """bfloat16 tensors of {name: number of elements} that are one hole in a file: they cost no disk."""
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    header, end = {}, 0
    for name, count in elements.items():
        header[name] = {"dtype": "BF16", "shape": [count], "data_offsets": [end, end + 2 * count]}
        end += 2 * count
    text = json.dumps(header).encode()
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def tree(path):
    """Every file under a directory and its bytes."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def run(*arguments, **options):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def run_between(before, after, arguments, cwd):
    """weight_diff.py with lines of Python before and after it in the same process."""
    program = f"""
import re, runpy, sys
{before}
sys.argv = ["weight_diff.py", *sys.argv[1:]]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
{after}
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


def make_diff(raw, tuned, diff, **options):
    weight_diff.make_diff(str(raw), str(tuned), str(diff), **options)


def recover(raw, diff, out, **options):
    weight_diff.recover(str(raw), str(diff), str(out), **{"test_inference": False, **options})


def assert_refused(place, raw="raw", diff="diff", codes=REFUSED, names=(), **options):
    """recover refuses with one of the codes, names what is wrong, and leaves no trace."""
    before = sorted(os.listdir(place))
    with pytest.raises(ExpectedError) as caught:
        recover(place / raw, place / diff, place / "out", **options)
    assert caught.value.exit_code in codes, caught.value
    assert "\n" not in str(caught.value)
    for name in names:
        assert name in str(caught.value), caught.value
    assert sorted(os.listdir(place)) == before
    return str(caught.value)


def edit(path, change):
    """Load the tensors of one safetensors file, change them, and save them."""
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def slow_exact_difference(raw, tuned):
    """Python integers, an element at a time: (tuned bits − bits of raw cast to tuned's type) mod 2^width."""
    width = 8 * tuned.element_size()
    base = bits(raw.to(tuned.dtype)).flatten().tolist()
    base += [0] * (tuned.numel() - len(base))
    words = [(t - r) % 2**width for t, r in zip(bits(tuned).flatten().tolist(), base, strict=True)]
    return np.array(words, dtype=f"uint{width}")
