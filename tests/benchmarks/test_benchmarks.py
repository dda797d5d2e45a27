"""The benchmarks as commands on small inputs, and the sharding plan's arithmetic by hand; no timing is judged."""

import json
import sys

import pytest
import transformers

from benchmarks.plan_sharding import GPUS_PER_NODE, Cluster, Setting, main, options, ring_speed, seconds_and_bytes
from tests.conftest import ROOT, run


def last_line(script, *arguments):
    result = run(ROOT / "benchmarks" / script, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_growth():
    result = last_line("bench_growth.py", "--rows", 40, 300)
    assert list(result["stages"]) == ["check", "tokenize", "batch 1", "batch 8", "resume"]
    for figures in result["stages"].values():
        assert list(figures) == ["40", "300"]
        assert all(0 <= value for figure in figures.values() for value in figure.values())


def test_tokenizing():
    result = last_line("bench_tokenize.py", "--rows", 100, "--rounds", 1)
    assert result["rows"] == 100 and min(result["one_call_an_example"], result["ours"], result["ratio"]) > 0


def test_similarity():
    result = last_line("bench_dedup.py", "--pools", "50,200")
    assert list(result["pools"]) == ["50", "200"] and "whole_run" not in result
    assert all(value > 0 for figures in result["pools"].values() for value in figures.values())


def test_length_control(tmp_path):
    """Two models and four instructions, the published figures being the raw ones."""
    rows = ["model,instruction,preference,length_baseline,length_model"]
    rows += [
        f"{m},{i},{p},{1000 + i},{2000 - 100 * i * i}" for m in ("m", "n") for i, p in enumerate((1, 0.5, 0.25, 0))
    ]
    (tmp_path / "preferences.csv").write_text("\n".join(rows))
    published = "model,win_rate,length_controlled_win_rate,standard_error\nm,43.75,40,1\nn,43.7506,50,1\n"
    (tmp_path / "published.csv").write_text(published)
    result = last_line("bench_length_control.py", tmp_path / "preferences.csv", tmp_path / "published.csv")
    assert result["models"] == 2 and round(result["raw_largest_error"], 6) == 0.0006
    assert result["raw"]["mean_error"] == (3.75 + 6.25) / 2 and result["ours"] != result["unpenalised"]


# --- a plan for several GPUs ---


@pytest.mark.parametrize(
    ("setting", "moved", "compute", "step"),
    [
        # Gathering once is 2 bytes × 1,000 × 3/4 = 1,500 bytes = 1 s. Forward 0.5 s, backward 1 s.
        # First micro-batch: max(0.5, 1) + max(1, 1) = 2 s; the last also scatters: max(0.5, 1) + max(1, 2) = 3 s.
        (Setting(5, 2), 1500 * 5, 3.0, 5.0),
        (Setting(5, 2, sync_each_batch=True), 1500 * 6, 3.0, 6.0),
        (Setting(5, 2, reshard=False), 1500 * 3, 3.0, 4.0),
        (Setting(5, 2, checkpointing=True), 1500 * 5, 4.0, 1 + 1.5 + 1 + 2),  # 1.5 s backward
    ],
    ids=str,
)
def test_a_step_of_a_plan_is_the_one_worked_out_by_hand(setting, moved, compute, step):
    cluster = Cluster(gpus=4, flops=40_000, link=1500, gib=1)
    figures = seconds_and_bytes(1000, 10, cluster, setting)
    expected = {"bytes": moved, "communication_s": moved / 1500, "compute_s": compute, "step_s": step}
    assert figures == pytest.approx(expected)


def test_a_ring_over_nodes_is_as_fast_as_its_slowest_part():
    assert ring_speed(300, 25, nodes=1) == 300
    assert ring_speed(300, 25, nodes=2) == 25 * GPUS_PER_NODE
    assert ring_speed(300, 50, nodes=2) == 300


def gib(length, gpus, reshard, accumulation, sync_each_batch, checkpointing):
    """In place of a simulation: 12 GiB of states a GPU of eight, 0.005 GiB a token, and what flags save."""
    whole_gradients = 12.6 if accumulation > 1 and not sync_each_batch else 0
    return 8 * 12 / gpus + length * (0.001 if checkpointing else 0.005) + whole_gradients + (0 if reshard else 12.6)


def test_the_recommended_micro_batch_is_the_smallest_that_hides_communication_and_fits():
    parameters = 6_738_415_616
    rows = options(parameters, gib, Cluster(8, 0.5 * 312e12, 0.8 * 300e9, 79.2), 128, 126)
    assert [row["micro_batch"] for row in rows] == [1, 2, 4, 8, 16]
    assert [row["hidden"] for row in rows] == [False, False, False, True, True]
    assert [row.get("recommended", False) for row in rows] == [False, False, False, True, False]
    # 128/8 examples of 126 tokens at 6 FLOPs a parameter; 4 gathers and a scatter of 7/8 of 2 bytes a parameter.
    assert rows[3]["step_s"] == pytest.approx(6 * parameters * 16 * 126 / 156e12)
    assert rows[3]["bytes"] == pytest.approx(5 * 2 * parameters * 7 / 8)
    few_gib = options(parameters, gib, Cluster(8, 0.5 * 312e12, 0.8 * 300e9, 24), 128, 126)
    assert all(row["gib"] <= 0.92 * 24 for row in few_gib)
    assert all("sync_each_batch" in row["flags"] for row in few_gib[:4])  # 12.6 GiB of whole gradients do not fit
    assert options(parameters, gib, Cluster(8, 0.5 * 312e12, 0.8 * 300e9, 12), 128, 126) == []


@pytest.mark.soak
def test_the_plan_is_a_table_and_json(tmp_path, monkeypatch, capsys):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    transformers.LlamaConfig(**sizes, vocab_size=500).save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", f"plan_sharding.py --gpu H200 --nodes 1 --model_name_or_path {tmp_path}".split())
    main()
    *table, last = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| 1 × 8 H200 |") for line in table) == 5 == len(json.loads(last)["rows"])
    assert sum(line.endswith("recommended |") for line in table) == 1
    assert len({line.count("|") for line in table if line.startswith("|")}) == 1
