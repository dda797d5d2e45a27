"""Mutated safetensors headers end within seconds: exit 3 or 7, or the model that was meant."""

import json
import os
import random
import struct
import time

import pytest

from alpaca.common import ExpectedError
from alpaca.weights.files import Checkpoint
from tests.weights.test_files import entry, with_header
from tests.weights.tiny_checkpoints import REFUSED, assert_same_bits, load, make_diff, recover, run


@pytest.mark.parametrize("dimensions", [65, 400_000, 8_000_000])
@pytest.mark.parametrize("size", [1, 2**62, 10**4000], ids=["ones", "wide", "4,000 digits"])
@pytest.mark.timeout(60)  # quadratic would be an hour
def test_dimensions_without_end(tmp_path, dimensions, size):
    """The product of so many takes quadratic time: an hour for the longest permitted header."""
    dimensions = min(dimensions, 8_000_000 // len(str(size)))
    (tmp_path / "config.json").write_text("{}")
    with_header(tmp_path / "model.safetensors", {"a": entry(shape=[size] * dimensions)})
    with pytest.raises(ExpectedError) as caught:
        Checkpoint(tmp_path)
    assert caught.value.exit_code in REFUSED and len(str(caught.value)) < 2000


@pytest.mark.timeout(120)
def test_a_name_without_end_and_names_without_number(place):
    many = {f"model.layers.{n}.lm_head.weight": entry(0, 0, (0,)) for n in range(50_000)}
    for header in ({"a" * 8_000_000: entry()}, many | {"last": entry()}):
        with_header(place / "raw" / "model.safetensors", header)
        for action in (
            lambda: recover(place / "raw", place / "diff", place / "out"),
            lambda: recover(place / "raw", place / "old", place / "out"),
            lambda: recover(place / "tuned", place / "raw", place / "out"),
            lambda: make_diff(place / "raw", place / "tuned", place / "out"),
            lambda: make_diff(place / "tuned", place / "raw", place / "out"),
        ):
            with pytest.raises(ExpectedError) as caught:
                action()
            assert caught.value.exit_code in REFUSED and len(str(caught.value)) < 3000


def mutated(text, generator):
    """A header with bytes, numbers, keys or structure changed; sometimes far longer than it was."""
    kind = generator.randrange(8)
    if kind < 2:  # bytes
        text = bytearray(text)
        for _ in range(generator.choice([1, 1, 2, 8])):
            place = generator.randrange(len(text))
            text[place : place + generator.choice([0, 1, 3])] = generator.randbytes(generator.choice([0, 1, 2]))
        return bytes(text)
    if kind == 2:  # a stretch out, doubled, or elsewhere
        start, end = sorted(generator.randrange(len(text)) for _ in range(2))
        other = generator.randrange(len(text))
        return text[:other] + text[start:end] * generator.choice([0, 1, 2, 50]) + text[generator.choice([other, end]) :]
    header = json.loads(text)
    name = generator.choice([name for name in header if name != "__metadata__"])
    huge = [-1, 0, 1, 2**31, 2**63 - 1, 2**64, 10**300, 10**4000, 1.5, 1e308, True, None, "1", [], {}]
    if kind == 3:
        field = generator.choice(["shape", "data_offsets"])
        header[name][field][generator.randrange(len(header[name][field]))] = generator.choice(huge)
    elif kind == 4:
        length = generator.choice([0, 1, 3, 64, 65, 1000, 100_000])
        header[name]["shape"] = [generator.choice([1, 1, 2, 2**40, 0])] * length
    elif kind == 5:
        header[name][generator.choice(["dtype", "shape", "data_offsets", "more"])] = generator.choice(
            [*huge, "F4", "I64", "BF16", "x" * 10_000]
        )
    elif kind == 6:
        header[generator.choice(["__metadata__", "x" * 5000, "a\nb", "", "lm_head.weight", "é" * 99])] = header.pop(
            name
        )
    else:
        for number in range(generator.choice([1, 100, 5000])):
            header[f"{generator.choice(['', 'model.', 'x.'])}{number}.lm_head.weight"] = dict(header[name])
    return json.dumps(header).encode()


def fuzz(place, count, seed):
    """Returns how many were refused, how many gave the model that was meant, and the longest seconds."""
    generator = random.Random(seed)
    expected = load(place / "tuned")
    shard = sorted((place / "diff").glob("model-*.safetensors"))[0]
    files = [
        (place / "raw" / "model.safetensors", "diff"),
        (shard, "diff"),
        (place / "raw" / "model.safetensors", "old"),
    ]
    whole = {file: file.read_bytes() for file, _ in files}
    kept = {file: place / f"kept-{number}" for number, file in enumerate(whole)}
    for file, path in kept.items():
        os.link(file, path)
    counts, longest = {"refused": 0, "right": 0}, 0.0
    for _ in range(count):
        file, diff = generator.choice(files)
        length = struct.unpack("<Q", whole[file][:8])[0]
        text = mutated(whole[file][8 : 8 + length], generator)
        told = (
            len(text) if generator.random() < 0.9 else generator.choice([0, 1, len(text) - 1, 2**24, 2**40, 2**64 - 1])
        )
        file.unlink()  # a new file: the disk is waited for where one is cut short and filled again
        file.write_bytes(struct.pack("<Q", told) + text + whole[file][8 + length :])
        started = time.perf_counter()
        try:
            recover(place / "raw", place / diff, place / "out", overwrite=True, dtype="bfloat16")
        except ExpectedError as error:
            assert error.exit_code in REFUSED and "\n" not in str(error) and len(str(error)) < 5000
            counts["refused"] += 1
        else:
            assert_same_bits(load(place / "out"), expected)
            counts["right"] += 1
        longest = max(longest, time.perf_counter() - started)
        file.unlink()
        os.link(kept[file], file)
    print(f"{count} headers: {counts}, longest {longest:.2f} s")
    return counts, longest


def test_mutated_headers(place):
    counts, longest = fuzz(place, 150, 0)
    assert counts["refused"] > 75 and longest < 60


@pytest.mark.soak
def test_ten_thousand_mutated_headers(place):
    counts, longest = fuzz(place, 10_000, 1)
    assert counts["refused"] > 5000 and longest < 60


def test_a_mutated_header_on_the_command_line(place):
    file = place / "raw" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:8] + content[8:].replace(b'"BF16"', b'"BF17"', 1))
    done = run("recover", "raw", "diff", "out", "--test_inference", "False", cwd=place)
    assert done.returncode == 3 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
