"""The benchmarks as commands on small inputs; no timing is judged."""

import json
import sys
from dataclasses import replace

import pytest
import transformers

from alpaca.training import memory, time
from alpaca.training.attention import BY_EXAMPLE
from alpaca.training.simulation import Layout
from benchmarks import simulate_scale
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


# --- from one GPU to 1,024 ---


@pytest.fixture(scope="module")
def model():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, vocab_size=500)
    return config, simulate_scale.Simulated(config, sharded=True)


def test_what_lies_between_the_simulated_sizes_is_what_a_simulation_of_it_gives(model):
    """64 GPUs and three examples, full and hybrid, against the command's own way."""
    config, simulated = model
    on = time.machine("H100", "bfloat16", 400)
    for replicas in (1, 8):
        layout = Layout(gpus=64, fsdp=True, replicas=replicas, compute_dtype="bfloat16", attention=BY_EXAMPLE)
        layout = replace(layout, batch_size=3, length=simulate_scale.TOKENS, optimizer="adamw_torch_fused")
        ours = time.step_seconds(simulated.phases(3, layout, on), 1)
        expected = time.predict(config, layout, on)
        assert ours == pytest.approx(expected, rel=0.02)
        plan = memory.Plan(replace(layout, batch_size=2, length=512))
        assert simulated.gib(64 // replicas, 1024) == pytest.approx(memory.estimate(config, plan)["total"], rel=0.02)


def test_traffic_is_hidden_from_the_micro_batch_on_that_it_says(model):
    simulated, on = model[1], time.machine("A100", "bfloat16", 400)
    layout = Layout(gpus=8, fsdp=True)
    size = simulated.hiding_tokens(layout, on) / simulate_scale.TOKENS
    for factor, hidden in ((1.01, True), (0.98, False)):
        phases = simulated.phases(factor * size, layout, on)
        passes = [sums for phase, sums in phases.items() if phase != "optimizer"]
        assert all(sums["kernels"] >= sums["transfers"] for sums in passes) == hidden


def test_rows_are_what_fits(model, capsys, monkeypatch, tmp_path):
    model[0].save_pretrained(tmp_path)
    arguments = f"simulate_scale.py --gpu H200 --gpus 8 64 --networks 400 --config {tmp_path}"
    monkeypatch.setattr(sys, "argv", arguments.split())
    monkeypatch.setattr(simulate_scale, "Simulated", lambda config, sharded: model[1])  # once is enough
    simulate_scale.main()
    *table, last = capsys.readouterr().out.splitlines()
    rows_shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if "_shard" in line]
    shown = [(row[0], row[1], row[2]) for row in rows_shown]
    assert shown == [("8", "–", "full_shard"), *[("64", "400 Gb/s", name) for name in ("full_shard", "hybrid_shard")]]
    assert len({len(row) for row in rows_shown}) == 1
    rows = json.loads(last)["rows"]
    assert [row["micro_batch"] for row in rows if row["gpus"] == 8] == [1, 2, 4, 8, 16]
    monkeypatch.setitem(time.GPUS, "H200", {**time.GPUS["H200"], "gib": 1e-6})
    assert simulate_scale.rows(model[1], 8, "H200", 400) == []
