"""Models, diffs and copies of them, for the tests of weight diffs."""

import shutil

import pytest

from tests.weights.tiny_checkpoints import load, make_diff, model, save, save_bin, save_tokenizer, tuned_from


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """raw, tuned, diff (exact), old (a diff without manifest, three .bin shards), raw_bin, raw_sharded."""
    place = tmp_path_factory.mktemp("made")
    raw = model()
    tuned = tuned_from(raw, vocabulary=301)
    save(raw, place / "raw")
    save(raw, place / "raw_sharded", sharded=True)
    save_bin(raw.state_dict(), raw.config, place / "raw_bin", shards=2)
    save(tuned, place / "tuned", sharded=True)
    make_diff(place / "raw", place / "tuned", place / "diff", max_shard_size="30KB")
    make_diff(place / "raw", place / "tuned", place / "float32", encoding="float32")
    save_bin(load(place / "float32"), tuned.config, place / "old", shards=3)
    return place


@pytest.fixture
def place(made, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def pair(tmp_path):
    raw = model()
    save(raw, tmp_path / "raw")
    save_tokenizer(save(tuned_from(raw), tmp_path / "tuned"))
    return tmp_path
