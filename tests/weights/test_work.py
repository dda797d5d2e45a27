"""Pieces and threads: the same bytes whatever their size, bounded memory, an end when one fails."""

import threading

import weight_diff
from tests.weights.tiny_checkpoints import (
    assert_refused,
    make_diff,
    model,
    recover,
    run_between,
    save,
    save_holes,
    tree,
    tuned_from,
)


def test_threads_stop_when_one_fails(place):
    """A job that fails ends the others, and their threads."""
    before = threading.active_count()
    save(model(seed=5), place / "other")
    assert_refused(place, raw="other")
    assert threading.active_count() == before


def test_small_chunks_give_the_same_bytes(tmp_path, monkeypatch):
    """Chunk borders fall inside rows, inside mean rows, and on them."""
    raw = model()
    save(raw, tmp_path / "raw")
    save(tuned_from(raw, vocabulary=303), tmp_path / "tuned")
    results = []
    for chunk in (2**20, 7, 32):
        monkeypatch.setattr("alpaca.weights.work.PIECE", chunk)
        for encoding in weight_diff.ENCODINGS:
            diff, out = tmp_path / f"{encoding}{chunk}", tmp_path / f"out_{encoding}{chunk}"
            make_diff(tmp_path / "raw", tmp_path / "tuned", diff, encoding=encoding)
            recover(tmp_path / "raw", diff, out)
            results.append({encoding: (tree(diff), tree(out))})
    assert results[0] == results[2] == results[4] and results[1] == results[3] == results[5]


def test_memory_does_not_grow_with_the_model(tmp_path):
    """0.8 GB of inputs; the bound is the promised 400 MiB."""
    for name in ("raw", "tuned"):
        sizes = {f"model.layers.{n}.w": 2**24 for n in range(4)} | {"model.embed_tokens.weight": 2**27}
        save_holes(tmp_path / name, sizes)
    # getrusage would count the memory of the process that forked; VmHWM (KiB) is the program's own.
    peak = r'print(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1])'
    peaks = []
    for command in (
        ["make_diff", "raw", "tuned", "diff"],
        ["recover", "raw", "diff", "out", "--test_inference", "False"],
    ):
        done = run_between("", peak, command, tmp_path)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) * 1024)
    assert max(peaks) < 400 * 2**20
