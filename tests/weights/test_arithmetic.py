"""Casts, differences and mean rows against torch and against Python's integers."""

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import weight_diff
from alpaca.weights import arithmetic
from alpaca.weights.files import Checkpoint
from tests.weights.tiny_checkpoints import (
    DTYPES,
    assert_same_bits,
    bits,
    load,
    make_diff,
    model,
    recover,
    save,
    slow_exact_difference,
    tuned_from,
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_casts_are_those_of_torch(dtype):
    values = torch.cat([torch.randn(20_000), torch.randn(20_000) * 1e-6, torch.randn(20_000) * 1e5])
    values = torch.cat([values, torch.randint(-(2**31), 2**31 - 1, (20_000,), dtype=torch.int32).view(torch.float32)])
    values = values[~values.isnan()]
    kind = weight_diff.DTYPES[{"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype]]
    words = arithmetic.from_float32(values.numpy(), kind)
    cast = values.to(DTYPES[dtype])
    assert np.array_equal(words, bits(cast).numpy().view(words.dtype))
    assert np.array_equal(arithmetic.to_float32(words, kind), cast.float().numpy())


@pytest.mark.parametrize(("raw_type", "tuned_type"), list(itertools.permutations(DTYPES, 2)))
def test_base_of_another_type_is_cast_first(tmp_path, raw_type, tuned_type):
    raw = model(DTYPES[raw_type])
    save(raw, tmp_path / "raw")
    save(tuned_from(raw, DTYPES[tuned_type]), tmp_path / "tuned")
    make_diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "diff")
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out")
    assert_same_bits(load(tmp_path / "out"), load(tmp_path / "tuned"))
    base, tuned, diff = (
        load(tmp_path / name)["model.layers.0.mlp.up_proj.weight"] for name in ("raw", "tuned", "diff")
    )
    slow = slow_exact_difference(base, tuned)
    assert np.array_equal(diff.numpy().view(slow.dtype).ravel(), slow)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_nans_and_signed_zeros_come_back(tmp_path, dtype):
    raw = model(DTYPES[dtype])
    tuned = tuned_from(raw)
    strange = torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0, 0.0, 1e-40, 6e-8])
    with torch.no_grad():
        tuned.model.norm.weight[:7] = strange
        raw.model.norm.weight[3:10] = strange
        raw.model.layers[0].input_layernorm.weight[:7] = strange
    save(raw, tmp_path / "raw")
    save(tuned, tmp_path / "tuned")
    for encoding in weight_diff.ENCODINGS:
        make_diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / encoding, encoding=encoding)
        recover(tmp_path / "raw", tmp_path / encoding, tmp_path / f"out_{encoding}")
    assert_same_bits(load(tmp_path / "out_exact"), load(tmp_path / "tuned"))


def test_float32_encoding_is_the_form_of_2023(tmp_path, capsys):
    """Differences in float32, new rows against the mean row; 16-bit models come back, float32 ones nearly."""
    for dtype, exact in ((torch.bfloat16, True), (torch.float16, True), (torch.float32, False)):
        place = tmp_path / str(dtype)
        raw = model(torch.float16)
        tuned = tuned_from(raw, dtype, vocabulary=302)
        save(raw, place / "raw")
        save(tuned, place / "tuned")
        make_diff(place / "raw", place / "tuned", place / "diff", encoding="float32")
        assert ("will not come back bit for bit" in capsys.readouterr().err) == (not exact)
        base, before, diff = (load(place / name) for name in ("raw", "tuned", "diff"))
        for name, tensor in before.items():
            values = base[name].float()
            if tensor.shape[0] == 302:
                values = torch.cat([values, values.mean(dim=0, keepdim=True).expand(2, -1)])
            assert torch.equal(diff[name], tensor.float() - values), name
        recover(place / "raw", place / "diff", place / "out")
        after = load(place / "out")
        if exact:
            assert_same_bits(after, before)
        else:
            assert all((after[name] - before[name]).abs().max() < 1e-7 for name in before)
            assert not all(torch.equal(after[name], before[name]) for name in before)


def float32_round_trip(base, tuned):
    """What the arithmetic of 2023, in float32, gives back of 16-bit values."""
    return (base.float() + (tuned.float() - base.float())).to(tuned.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_the_float32_encoding_brings_back_of_16_bits(dtype):
    """docs/weights.md: all but values that are tiny beside the base's, by the bits that float32 has more."""
    words = torch.randint(
        -(2**15), 2**15, (2, 2_000_000), dtype=torch.int16, generator=torch.Generator().manual_seed(0)
    )
    base, tuned = words.view(dtype)
    smallest = {torch.bfloat16: 2**-15, torch.float16: 2**-12}[dtype]
    large = base.isfinite() & tuned.isfinite() & (base.float().abs() < 1e30) & (tuned.float().abs() < 1e30)
    kept = large & (tuned != 0) & (tuned.float().abs() >= smallest * base.float().abs())
    same = bits(float32_round_trip(base, tuned)) == bits(tuned)
    assert kept.float().mean() > 0.4 and same[kept].all() and not same[large].all()
    if dtype is torch.float16:  # weights are small: then the difference of two always fits
        assert same[large & (tuned != 0) & ((tuned.float() - base.float()).abs() < 1)].all()


@pytest.mark.parametrize("verify", [True, False])
def test_the_float32_encoding_counts_the_elements_that_it_rounds(tmp_path, capsys, verify):
    """bfloat16 whose exponents lie far apart: 1 − 1.1 × 2^-20 has more bits than float32. A zero loses its sign."""
    raw = model()
    tuned = tuned_from(raw)
    with torch.no_grad():
        raw.model.norm.weight[:3] = 1.0
        tuned.model.norm.weight[:3] = torch.tensor([1.1 * 2**-20, 1.1 * 2**-19, 1.1 * 2**-10])
        tuned.model.layers[0].input_layernorm.weight[5] = -0.0
    save(raw, tmp_path / "raw")
    save(tuned, tmp_path / "tuned")
    make_diff(tmp_path / "raw", tmp_path / "tuned", tmp_path / "diff", encoding="float32", verify=verify)
    total = sum(parameter.numel() for parameter in tuned.parameters())
    said = f"note: 3 of {total:,} elements, in 2 of 21 tensors, will not come back bit for bit; --encoding exact does"
    assert capsys.readouterr().err.count(said) == 1
    recover(tmp_path / "raw", tmp_path / "diff", tmp_path / "out")
    before, after = load(tmp_path / "tuned"), load(tmp_path / "out")
    apart = {name: (bits(before[name]) != bits(after[name])).sum().item() for name in before}
    assert {name: count for name, count in apart.items() if count} == {
        "model.norm.weight": 2,
        "model.layers.0.input_layernorm.weight": 1,
    }
    base = load(tmp_path / "raw")["model.norm.weight"]
    assert torch.equal(after["model.norm.weight"], float32_round_trip(base, before["model.norm.weight"]))


@pytest.mark.parametrize(("rows", "row"), [(100, 64), (32_000, 64), (5000, 128), (17, 32), (257, 1024), (70_000, 32)])
def test_mean_row_has_the_bits_of_torch(tmp_path, rows, row):
    embedding = torch.randn(rows, row, generator=torch.Generator().manual_seed(rows)).to(torch.float16)
    save_file({"model.embed_tokens.weight": embedding}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    expected = embedding.float().mean(dim=0).numpy()
    threads = torch.get_num_threads()
    try:
        with Checkpoint(tmp_path) as checkpoint:
            for number in (1, 4):  # a diff must come back on a machine with other cores
                torch.set_num_threads(number)
                assert np.array_equal(arithmetic.mean_of_rows(checkpoint, "model.embed_tokens.weight"), expected)
    finally:
        torch.set_num_threads(threads)
