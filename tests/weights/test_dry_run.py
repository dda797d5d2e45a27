"""make_diff --plan True: the files of three published models' shapes, without writing one."""

import json
import math
import re

import pytest

from tests.weights.tiny_checkpoints import make_diff, run, tree

MODELS = {  # model_type, layers, hidden, MLP, heads, key-value heads, head size, vocabulary, norms of q and k
    "LLaMA-2-70B": ("llama", 80, 8192, 28672, 64, 8, 128, 32000, False),
    "Llama-3-8B": ("llama", 32, 4096, 14336, 32, 8, 128, 128256, False),
    "Qwen3-8B": ("qwen3", 36, 4096, 12288, 32, 8, 128, 151936, True),
}
PARAMETERS = {"LLaMA-2-70B": 68_976_648_192, "Llama-3-8B": 8_030_261_248, "Qwen3-8B": 8_190_735_360}


def shapes(name, vocabulary):
    """Tensor names and shapes as transformers saves them."""
    _, layers, hidden, mlp, heads, kv_heads, size, _, norms = MODELS[name]
    found = {"model.embed_tokens.weight": [vocabulary, hidden]}
    for layer in range(layers):
        place = f"model.layers.{layer}"
        found |= {f"{place}.{norm}_layernorm.weight": [hidden] for norm in ("input", "post_attention")}
        found |= {f"{place}.mlp.{part}_proj.weight": [mlp, hidden] for part in ("gate", "up")}
        found[f"{place}.mlp.down_proj.weight"] = [hidden, mlp]
        found[f"{place}.self_attn.q_proj.weight"] = [heads * size, hidden]
        found |= {f"{place}.self_attn.{part}_proj.weight": [kv_heads * size, hidden] for part in "kv"}
        found[f"{place}.self_attn.o_proj.weight"] = [hidden, heads * size]
        if norms:
            found |= {f"{place}.self_attn.{part}_norm.weight": [size] for part in "qk"}
    return found | {"model.norm.weight": [hidden], "lm_head.weight": [vocabulary, hidden]}


def save_sparse(path, name, vocabulary, shard_bytes=5_000_000_000):
    """bfloat16 shards of true names and shapes whose data is one hole: they cost no disk."""
    path.mkdir()
    shards, weight_map, filled = [{}], {}, 0
    for tensor, shape in shapes(name, vocabulary).items():
        size = 2 * math.prod(shape)
        if filled and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [filled, filled + size]}
        filled += size
    for number, header in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        text = json.dumps(header).encode()
        with open(path / file, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in header.values()))
        weight_map |= dict.fromkeys(header, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"model_type": MODELS[name][0], "vocab_size": vocabulary, "hidden_size": MODELS[name][2]}
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))


@pytest.mark.parametrize("name", MODELS)
def test_plan_of_published_shapes(tmp_path, name):
    vocabulary = MODELS[name][7]
    save_sparse(tmp_path / "raw", name, vocabulary)
    save_sparse(tmp_path / "tuned", name, vocabulary + 1)
    assert sum(map(math.prod, shapes(name, vocabulary).values())) == PARAMETERS[name]
    before = sorted(path.name for path in tmp_path.rglob("*"))
    done = run("make_diff", "raw", "tuned", "diff", "--plan", "True", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    files = re.findall(r"^(model-\S+\.safetensors) +([\d.]+) GB$", done.stdout, re.MULTILINE)
    total = 2 * (PARAMETERS[name] + 2 * MODELS[name][2]) / 1e9
    assert abs(sum(float(size) for _, size in files) - total) < 0.01 * len(files)
    assert (
        all(float(size) <= 5 for _, size in files) and f" in {len(files)} files, 0 of them stored whole" in done.stdout
    )
    assert "config.json, model.safetensors.index.json, weight_diff.json: small" in done.stdout
    needed = float(re.search(r"disk: ([\d.]+) GB needed, [\d.]+ GB free in ", done.stdout)[1])
    assert abs(needed - total) < 0.03
    assert re.search(
        r"^time: about \d+ (s|min|h): \d+ MB a second read, subtracted and hashed", done.stdout, re.MULTILINE
    )
    print(f"{name}\n{done.stdout}")


def test_the_plan_is_what_is_then_written(place, capsys):
    before = tree(place)
    arguments = place / "raw", place / "tuned", place / "new"
    for options in ({}, {"max_shard_size": "30KB", "encoding": "float32", "verify": False}):
        make_diff(*arguments, plan=True, overwrite=True, **options)
        planned = set(re.findall(r"[\w.-]+\.(?:safetensors|json)\b(?!\.)", capsys.readouterr().out))
        make_diff(*arguments, overwrite=True, **options)
        assert planned == {path.name for path in (place / "new").iterdir()}
    for path in (place / "new").iterdir():
        path.unlink()
    (place / "new").rmdir()
    assert tree(place) == before


def test_the_plan_refuses_what_the_run_would(place):
    done = run("make_diff", "raw", "tuned", "diff", "--plan", "True", cwd=place)
    assert done.returncode == 2 and "not empty" in done.stderr
