"""Where output may go, and that it is whole or not there: full disks, kills, interrupts."""

import errno
import fcntl
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

from alpaca.common import ExitCode, ExpectedError
from tests.weights.tiny_checkpoints import (
    SCRIPT,
    make_diff,
    model,
    recover,
    run,
    save,
    save_holes,
    tree,
    tuned_from,
)


@pytest.mark.parametrize("output", ["raw", "raw/", "./diff", "link_to_raw", "link_to_parent/diff", "."])
@pytest.mark.parametrize("overwrite", [False, True])
def test_output_is_never_an_input(place, monkeypatch, output, overwrite):
    (place / "link_to_raw").symlink_to("raw")
    (place / "link_to_parent").symlink_to(".")
    before = tree(place)
    monkeypatch.chdir(place)
    with pytest.raises(ExpectedError, match="which is read") as caught:
        recover("raw", "diff", output, overwrite=overwrite)
    assert caught.value.exit_code == ExitCode.USAGE and tree(place) == before


def test_output_that_exists(place):
    (place / "out").mkdir()
    recover(place / "raw", place / "diff", place / "out")  # an empty directory is free
    whole = tree(place / "out")
    with pytest.raises(ExpectedError, match=r"not empty.*--overwrite True") as caught:
        recover(place / "raw", place / "diff", place / "out")
    assert caught.value.exit_code == ExitCode.USAGE
    (place / "out" / "model.safetensors").write_bytes(b"old")
    recover(place / "raw", place / "diff", place / "out", overwrite=True)
    assert tree(place / "out") == whole
    (place / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ExpectedError, match=r"would delete thesis\.tex") as caught:
        recover(place / "raw", place / "diff", place / "out", overwrite=True)
    assert caught.value.exit_code == ExitCode.USAGE and (place / "out" / "thesis.tex").exists()
    with pytest.raises(ExpectedError, match="lies in --path_raw"):
        recover(place / "raw", place / "diff", place / "raw" / "config.json", overwrite=True)
    (place / "link").symlink_to("elsewhere")
    recover(place / "raw", place / "diff", place / "link")
    assert (place / "elsewhere" / "weight_diff.json").exists()


def test_failed_overwrite_leaves_the_old_directory(place):
    recover(place / "raw", place / "diff", place / "out")
    before = tree(place / "out")
    save(model(seed=5), place / "other")
    with pytest.raises(ExpectedError):
        recover(place / "other", place / "diff", place / "out", overwrite=True)
    assert tree(place / "out") == before
    assert not [name for name in os.listdir(place) if name.startswith(".")]


def test_free_space_is_checked_first(tmp_path):
    """A base and a tuned model of 8 TB, made of a hole: no machine has room for the difference."""
    for name in ("raw", "tuned"):
        save_holes(tmp_path / name, {"model.norm.weight": 2**42})
    done = run("make_diff", "raw", "tuned", "diff", cwd=tmp_path)
    assert done.returncode == 8 and "8796.09 GB needed" in done.stderr and done.stderr.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["raw", "tuned"]


@pytest.mark.parametrize("limit", [0, 1000, 20_000, 60_000])
def test_file_that_cannot_grow_is_exit_8_and_leaves_nothing(place, limit):
    """The system refuses to write beyond `limit` bytes a file, as it does when a disk or quota is full."""

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    before = sorted(os.listdir(place))
    for command in (
        ["make_diff", "raw", "tuned", "new"],
        ["recover", "raw", "diff", "new", "--test_inference", "False"],
    ):
        done = run(*command, cwd=place, preexec_fn=limited)
        assert done.returncode == 8, (command, done.stderr)
        assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
        assert sorted(os.listdir(place)) == before


def test_full_disk(place):
    """A file system of a few files' room, where mounting is permitted; elsewhere the limits above are the test."""
    disk = place / "disk"
    disk.mkdir()
    for options in ("size=16m", "size=64m,nr_inodes=4"):
        mount = f"mount -t tmpfs -o {options} none disk && exec {sys.executable} {SCRIPT} make_diff raw tuned disk/new"
        script = f"({mount}); code=$?; ls -A disk; exit $code"
        if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
            return
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", f"{script}"],
            cwd=place,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        if "mount:" in done.stderr:
            return
        assert (done.returncode, done.stdout) == (8, ""), done.stderr
        assert done.stderr.count("\n") == 1
        assert os.strerror(errno.ENOSPC) in done.stderr or "needed" in done.stderr


def test_unwritable_place(place):
    (place / "file").write_text("")
    done = run("recover", "raw", "diff", "file/out", cwd=place)
    assert done.returncode in (2, 8) and done.stderr.count("\n") == 1
    done = run("recover", "raw", "diff", "/proc/out", cwd=place)
    assert done.returncode == 8 and done.stderr.count("\n") == 1, done.stderr


def test_second_run_at_the_same_time_is_refused(place):
    staging = place / ".out.unfinished"
    staging.mkdir()

    lock = os.open(staging, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    done = run("recover", "raw", "diff", "out", cwd=place)
    os.close(lock)
    assert done.returncode == 6 and done.stderr.count("\n") == 1
    assert staging.exists()


@pytest.fixture(scope="session")
def larger(tmp_path_factory):
    """20 MB a side: time enough to be killed while reading, writing, checking and renaming."""
    place = tmp_path_factory.mktemp("larger")
    raw = model(hidden=512, layers=3)
    save(raw, place / "raw")
    save(tuned_from(raw, vocabulary=301), place / "tuned")
    make_diff(place / "raw", place / "tuned", place / "diff")
    return place


def kill_at_any_moment(place, command, output, count, seed, old=None):
    """Kill -9 after a random time. `output` is absent, whole, or (with `old`) the old one; a rerun cleans up."""
    generator = random.Random(seed)
    arguments = [sys.executable, str(SCRIPT), *command]
    started = time.perf_counter()
    assert subprocess.run(arguments, cwd=place, capture_output=True, check=False).returncode == 0
    duration = time.perf_counter() - started
    whole = tree(place / output)
    states = {"absent": 0, "whole": 0}
    for _ in range(count):
        shutil.rmtree(place / output, ignore_errors=True)
        if old:
            shutil.copytree(place / old, place / output)
        with subprocess.Popen(arguments, cwd=place, stderr=subprocess.DEVNULL) as process:
            time.sleep(generator.uniform(0.25, 1.1) * duration)
            process.send_signal(signal.SIGKILL)
        if not (place / output).exists():
            states["absent"] += 1
        else:
            found = tree(place / output)
            assert found == whole or (old and found == tree(place / old))
            states["whole"] += 1
    shutil.rmtree(place / output, ignore_errors=True)
    assert subprocess.run(arguments, cwd=place, capture_output=True, check=False).returncode == 0
    assert tree(place / output) == whole
    assert not [name for name in os.listdir(place) if name.startswith(".")]
    shutil.rmtree(place / output)
    return states


RECOVER = ["recover", "raw", "diff", "killed", "--test_inference", "False", "--overwrite", "True"]


def test_killed_at_any_moment(larger):
    assert sum(kill_at_any_moment(larger, RECOVER, "killed", 10, 0).values()) == 10
    kill_at_any_moment(larger, ["make_diff", "raw", "tuned", "killed"], "killed", 10, 1)


@pytest.mark.soak
def test_killed_at_any_moment_many_times(larger):
    kill_at_any_moment(larger, RECOVER, "killed", 60, 2)
    kill_at_any_moment(larger, RECOVER, "killed", 60, 3, old="tuned")
    kill_at_any_moment(larger, ["make_diff", "raw", "tuned", "killed"], "killed", 60, 4)


def test_killed_between_the_renames_the_old_directory_comes_back(place):
    """The one moment of an overwrite at which neither stands in its place."""
    recover(place / "raw", place / "diff", place / "out")
    before = tree(place / "out")
    (place / "out").rename(place / ".out.replaced")
    save(model(seed=5), place / "other")
    with pytest.raises(ExpectedError):
        recover(place / "other", place / "diff", place / "out")
    assert tree(place / "out") == before and not (place / ".out.replaced").exists()


def test_interrupt_cleans_up(tmp_path):
    for name in ("raw", "tuned"):
        save_holes(tmp_path / name, {"model.norm.weight": 2**31})  # seconds of work
    arguments = [sys.executable, str(SCRIPT), "make_diff", "raw", "tuned", "diff"]
    process = subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not (tmp_path / ".diff.unfinished" / "model.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "error: interrupted\n")
    assert sorted(os.listdir(tmp_path)) == ["raw", "tuned"]
