"""Flipped bits: refused, with nothing left, or harmless."""

import os
import random
import shutil

import pytest

import weight_diff
from alpaca.common import ExpectedError
from tests.weights.tiny_checkpoints import REFUSED, assert_same_bits, load, recover


def flip_bits(place, files, count, seed, raw, diff, must_refuse):
    """Flip one random bit at a time. Refused with nothing left, or (`must_refuse` False) the right weights.

    Returns how many flips were refused.
    """
    generator = random.Random(seed)
    expected = load(place / "tuned")
    before = sorted(os.listdir(place))
    refused = 0
    for _ in range(count):
        file = generator.choice(files)
        position = generator.randrange(8 * file.stat().st_size)
        with open(file, "r+b") as handle:
            handle.seek(position // 8)
            byte = handle.read(1)[0]
            handle.seek(position // 8)
            handle.write(bytes([byte ^ (1 << position % 8)]))
        try:
            recover(place / raw, place / diff, place / "out", dtype="bfloat16" if diff == "old" else None)
        except ExpectedError as error:
            assert error.exit_code in REFUSED, (file, position, error)
            assert sorted(os.listdir(place)) == before
            refused += 1
        else:
            assert not must_refuse, f"bit {position} of {file} was not seen"
            assert_same_bits(load(place / "out"), expected)
            shutil.rmtree(place / "out")
        with open(file, "r+b") as handle:
            handle.seek(position // 8)
            handle.write(bytes([byte]))
    recover(place / raw, place / diff, place / "out", dtype="bfloat16" if diff == "old" else None)  # all flipped back
    shutil.rmtree(place / "out")
    return refused


def check_flips(place, count, seed):
    every_diff_file = sorted((place / "diff").iterdir())
    shards = sorted((place / "raw_sharded").glob("*.safetensors"))
    flip_bits(place, every_diff_file + shards, count, seed, "raw_sharded", "diff", must_refuse=True)


def test_flipped_bits_are_refused(place):
    check_flips(place, 40, 0)


def test_flipped_bits_in_old_formats_and_in_indexes_never_give_wrong_weights(place):
    """A zip archive's dates and an index's total are bits that nothing depends on; all others are refused."""
    archives = sorted((place / "raw_bin").glob("*.bin"))
    assert flip_bits(place, archives, 20, 1, "raw_bin", "diff", must_refuse=False) > 5
    shards = sorted((place / "old").glob("*.bin"))
    assert flip_bits(place, shards, 20, 2, "raw", "old", must_refuse=False) > 5
    small = [place / "raw_sharded" / name for name in ("model.safetensors.index.json", "config.json")]
    flip_bits(place, small, 20, 3, "raw_sharded", "diff", must_refuse=False)


def test_verify_sees_any_flipped_bit_of_what_was_written(place):
    recover(place / "raw", place / "diff", place / "out", max_shard_size="40KB")
    generator = random.Random(4)
    for _ in range(40):
        file = generator.choice(sorted((place / "out").iterdir()) + sorted((place / "diff").iterdir()))
        whole = file.read_bytes()
        position = generator.randrange(8 * len(whole))
        changed = bytearray(whole)
        changed[position // 8] ^= 1 << position % 8
        file.write_bytes(changed)
        with pytest.raises(ExpectedError) as caught:
            weight_diff.verify(file.parent)
        assert caught.value.exit_code in REFUSED, (file, position)
        file.write_bytes(whole)
    weight_diff.verify(place / "out")
    (place / "out" / "config.json").unlink()
    with pytest.raises(ExpectedError, match=r"config\.json.*missing"):
        weight_diff.verify(place / "out")


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10, 15))
def test_a_thousand_flipped_bits(place, seed):
    check_flips(place, 200, seed)


@pytest.mark.soak
def test_hundreds_of_flipped_bits_in_old_formats(place):
    flip_bits(place, sorted((place / "old").glob("*.bin")), 150, 20, "raw", "old", must_refuse=False)
    flip_bits(place, sorted((place / "raw_bin").glob("*")), 150, 21, "raw_bin", "diff", must_refuse=False)
