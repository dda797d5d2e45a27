"""eval.py measure and compare on small models, against slow, obvious code."""

import json
import math
import sys

import numpy as np
import pytest
import torch
import transformers
from rouge_score import rouge_scorer

import eval as script
from alpaca.common import ExitCode, run_main
from alpaca.evaluation.figures import MEASURED, differences_of, figures_of
from alpaca.evaluation.measure import repeats_prompt, row_of
from alpaca.prompts import format_prompt
from tests.answering.asking import LESSONS
from tests.evaluation.judging import better, judge_by, run_judge, suite, write
from tests.generation.runs import fails, wait_for
from tests.teacher.teacher_server import TeacherServer
from tests.training import forked

HELD_OUT = [
    *({**example, "output": text} for example, text in LESSONS[:3]),
    {"instruction": "Name a big animal.", "input": "", "output": "Whale"},
    {"instruction": "Smile.", "input": "", "output": "🙂"},
    {"instruction": "No reference is here.", "input": "", "output": ""},
    {"instruction": "Read this.", "input": "word " * 300, "output": "Too long with its reference. " * 400},
]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "held_out.json"
    path.write_text(json.dumps(HELD_OUT))
    return str(path)


def measure(model, data, output_dir, **arguments):
    arguments = {"max_new_tokens": 40, "batch_size": 3, "dtype": "float32", "device": "cpu", **arguments}
    script.measure(str(model), data, str(output_dir), **arguments)
    return json.loads((output_dir / "report.json").read_text())


def measure_as_a_script(*flags):
    torch.set_num_threads(1)
    sys.argv = ["eval.py", "measure", *flags]
    run_main(script.main)


@pytest.fixture(scope="module")
def measured(taught, held_out, tmp_path_factory):
    directory = tmp_path_factory.mktemp("measured")
    return directory, measure(taught, held_out, directory / "a")


def test_losses_are_those_of_one_example_after_the_other(taught, measured):
    directory, report = measured
    tokenizer = transformers.AutoTokenizer.from_pretrained(taught)
    model = transformers.AutoModelForCausalLM.from_pretrained(taught)
    rows = json.loads((directory / "a" / "rows.json").read_text())["rows"]
    total = tokens = size = 0
    for row, example in zip(rows[:5], HELD_OUT, strict=False):
        prompt = format_prompt(example)
        ids = tokenizer(prompt + example["output"] + "</s>", return_tensors="pt").input_ids
        begin = len(tokenizer(prompt).input_ids)
        with torch.no_grad():
            scores = torch.log_softmax(model(ids).logits[0].double(), dim=-1)
        loss = -sum(float(scores[position - 1, ids[0, position]]) for position in range(begin, ids.shape[1]))
        assert row["loss"] == pytest.approx(loss, rel=1e-3) and row["tokens"] == ids.shape[1] - begin
        total, tokens, size = total + loss, tokens + ids.shape[1] - begin, size + len(example["output"].encode())
    assert [row["loss"] for row in rows[5:]] == [None, None]
    assert report["loss"]["value"] == pytest.approx(total / tokens, rel=1e-3)
    assert report["loss"]["rows"] == 5 and report["loss"]["rows_too_long"] == 1
    assert report["perplexity"]["value"] == pytest.approx(math.exp(total / tokens), rel=1e-3)
    assert report["bits_per_byte"]["value"] == pytest.approx(total / math.log(2) / size, rel=1e-3)
    low, high = report["loss"]["interval"]
    assert low < report["loss"]["value"] < high


def test_answers_beside_their_references(measured):
    directory, report = measured
    rows = json.loads((directory / "a" / "rows.json").read_text())["rows"]
    answers = json.loads((directory / "a" / "answers.json").read_text())
    assert [row["answer"] for row in rows[:3]] == [text for _, text in LESSONS[:3]]  # known by heart
    assert [row["ended"] for row in rows[:3]] == [1, 1, 1]
    assert [row["ended"] for row in rows] == [int(answer["ended"]) for answer in answers]
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    for row in rows:
        if row["rouge_l"] is not None:
            assert row["rouge_l"] == scorer.score(row["reference"], row["answer"])["rougeL"].fmeasure
    assert report["rouge_l"]["rows_not_scored"] == 1 and report["rouge_l"]["rows"] == 5  # 🙂; one has no reference
    assert [row["exact_match"] for row in rows[:5]] == [1, None, None, 0, 0]
    assert report["exact_match"]["rows"] == 3 and report["exact_match"]["value"] == pytest.approx(100 / 3)
    assert report["ends_by_itself"]["rows"] == 7 and set(report) == set(MEASURED)
    assert all({"value", "interval", "rows"} <= set(figure) for figure in report.values())


def test_what_counts_as_repeating_and_as_the_same_word():
    example = {
        "instruction": "Mend this sentence, please.",
        "input": "He go to the market.",
        "output": "He goes there.",
    }
    assert repeats_prompt(example, "He  go to THE market. Yes") and repeats_prompt(
        example, "mend this sentence, please."
    )
    assert repeats_prompt(example, "Fine.\n\n### Instruction:\nMore") and not repeats_prompt(example, "He goes there.")
    assert not repeats_prompt(example | {"output": "He go to the market."}, "He go to the market.")
    assert not repeats_prompt({"instruction": "Say hello.", "input": "", "output": "x"}, "say hello.")
    for reference, text, match in (
        ("Positive", ' "positive." ', 1),
        ("-3", "3", 0),
        ("3", "**3**", 1),
        ("a b", "a b", None),
    ):
        row = row_of({"instruction": "i", "input": "", "output": reference}, {"output": text, "ended": True}, None)
        assert row["exact_match"] == match and row["empty"] == 0 and row["loss"] is None


def test_a_killed_measurement_goes_on_to_the_same_bytes(taught, held_out, measured, tmp_path):
    directory, _ = measured
    flags = ["--model_name_or_path", taught, "--data_path", held_out, "--output_dir", tmp_path / "b"]
    flags += ["--max_new_tokens", 40, "--batch_size", 3, "--dtype", "float32", "--device", "cpu"]
    for written in ("answers.json.partial.jsonl", "losses.jsonl"):
        process = forked.start(measure_as_a_script, tmp_path / "log", *map(str, flags))
        path = tmp_path / "b" / written
        wait_for(
            lambda path=path, process=process: process.exitcode is not None or (path.exists() and path.stat().st_size)
        )
        process.kill()
        process.join()
    losses = tmp_path / "b" / "losses.jsonl"
    if losses.exists():
        losses.write_bytes(losses.read_bytes()[:-7])  # a power cut in the middle of a line
    measure(taught, held_out, tmp_path / "b")
    for name in ("answers.json", "rows.json", "report.json"):
        assert (tmp_path / "b" / name).read_bytes() == (directory / "a" / name).read_bytes()
    with fails(ExitCode.USAGE, r"other settings \(max_new_tokens"):
        measure(taught, held_out, tmp_path / "b", max_new_tokens=30)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "report.json").write_text("{}")
    with fails(ExitCode.USAGE, "holds report.json and no measurement"):
        measure(taught, held_out, tmp_path / "c")
    with fails(ExitCode.USAGE, "lies in --model_name_or_path"):
        measure(taught, held_out, taught / "measured")
    with fails(ExitCode.USAGE, "--device tpu: choose one of"):
        measure(taught, held_out, tmp_path / "d", device="tpu")


def test_compare_measured(llama, taught, held_out, measured, capsys):
    directory, report = measured
    other = measure(llama, held_out, directory / "base", max_new_tokens=8)
    capsys.readouterr()
    script.compare(str(directory / "a"), str(directory / "base"))
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["loss"].endswith(("b is higher", "no difference shown"))
    difference = report["loss"]["value"] - other["loss"]["value"]
    assert f"{difference:.4g}" in lines["loss"]
    script.compare(str(directory / "a"), str(directory / "a"))
    out = capsys.readouterr().out
    assert out.count("no difference shown") == len(MEASURED)
    with fails(ExitCode.USAGE, "nothing to compare"):
        script.compare(str(directory / "a"), str(directory))


def test_paired_differences_are_drawn_with_the_same_rows():
    rng = np.random.default_rng(3)
    hard = rng.normal(0, 5, 300)  # what makes a question hard for both is in neither difference
    one = [{"loss": h + 20 + e, "tokens": 10} for h, e in zip(hard, rng.normal(0.3, 1, 300), strict=True)]
    other = [{"loss": h + 20 + e, "tokens": 10} for h, e in zip(hard, rng.normal(0, 1, 300), strict=True)]
    figures = {"loss": MEASURED["loss"]}
    found = differences_of(one, other, figures)["loss"]
    differences = np.array([(a["loss"] - b["loss"]) / 10 for a, b in zip(one, other, strict=True)])
    error = 1.96 * differences.std() / math.sqrt(300)
    assert found["difference"] == pytest.approx(differences.mean())
    assert found["interval"] == pytest.approx([differences.mean() - error, differences.mean() + error], abs=0.004)
    low, high = figures_of(one, figures)["loss"]["interval"]
    assert high - low > 2 * (found["interval"][1] - found["interval"][0])


def test_compare_judged(tmp_path, capsys):
    good, theirs = suite(30, 10)
    poor, _ = suite(10, 30)
    with TeacherServer(answer=judge_by(better)) as server:
        for name, ours in (("good", good), ("poor", poor)):
            run_judge(server, write(tmp_path / f"{name}_files", ours, theirs), tmp_path / name)
        capsys.readouterr()
        script.compare(str(tmp_path / "good"), str(tmp_path / "poor"))
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("win_rate"))
        assert line.split()[1:4] == ["75", "25", "50"] and line.endswith("a is higher")
        theirs[0]["output"] += " and more"
        run_judge(server, write(tmp_path / "other_files", good, theirs), tmp_path / "other")
        with fails(ExitCode.DATA, "do not hold the same instruction, input, opponents"):
            script.compare(str(tmp_path / "good"), str(tmp_path / "other"))
        run_judge(server, write(tmp_path / "x", poor, suite(30, 10)[1]), tmp_path / "judge-2", model_name="judge-2")
        with fails(ExitCode.USAGE, "different judges"):
            script.compare(str(tmp_path / "good"), str(tmp_path / "judge-2"))


def test_ifeval_strict_and_loose(taught, held_out, tmp_path):
    pytest.importorskip("if_verifiable")
    samples = [
        {"key": 1, "prompt": "Name a colour.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {
            "key": 2,
            "prompt": "Name a colour. Do it twice.",
            "instruction_id_list": ["punctuation:no_comma", "keywords:existence"],
            "kwargs": [{}, {"keywords": ["zebra"]}],
        },
    ]
    (tmp_path / "ifeval.jsonl").write_text("\n".join(map(json.dumps, samples)))
    report = measure(taught, held_out, tmp_path / "m", ifeval=True, ifeval_path=str(tmp_path / "ifeval.jsonl"))
    rows = json.loads((tmp_path / "m" / "rows.json").read_text())["ifeval"]
    assert rows[0]["answer"] == "Blue." and (rows[0]["all_strict"], rows[0]["all_loose"]) == (1, 1)
    assert rows[1]["instructions"] == 2 and rows[1]["all_strict"] == 0
    followed = rows[0]["strict"] + rows[1]["strict"]
    assert report["ifeval_prompt_strict"] | {"interval": 0} == {"value": 50, "interval": 0, "rows": 2}
    assert report["ifeval_instruction_strict"]["value"] == pytest.approx(100 * followed / 3)
