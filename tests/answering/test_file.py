"""`inference.py --data_path`: order, batches, kills and mistakes."""

import json
import signal
import subprocess
import sys
import time

import inference
from tests.answering.asking import COLOUR, MIXED, main, mistake
from tests.conftest import ROOT


def write_questions(path, examples):
    path.write_text(json.dumps(examples))
    return path


def test_a_file_is_answered_in_order_whatever_the_batches(taught, tmp_path, capsys):
    more = [{"instruction": f"Say {word}.", "output": "not read"} for word in ("yes", "no", "nothing at all, please")]
    questions = write_questions(tmp_path / "in.json", [*MIXED, *more])
    flags = ["--data_path", questions, "--dtype", "float32", "--max_new_tokens", "40"]
    files = []
    for batch_size in (1, 4):
        files.append(tmp_path / f"made/{batch_size}.json")
        assert main(capsys, taught, *flags, "--output_path", files[-1], "--batch_size", batch_size) == ""
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(file.name for file in files[0].parent.iterdir()) == ["1.json", "4.json"]
    rows = json.loads(files[0].read_text())
    assert [(row["instruction"], row["input"]) for row in rows] == [
        (example["instruction"], example.get("input", "")) for example in [*MIXED, *more]
    ]
    assert all(list(row) == ["instruction", "input", "output", "generator"] for row in rows)
    assert {row["generator"] for row in rows} == {taught.name}
    assert [row["output"] for row in rows[:2]] == ["Blue.", "The roses are watered by the gardener."]
    assert not any("###" in row["output"] or row["output"] == "not read" for row in rows)


def test_merged_inputs_are_alpaca_evals_form_of_the_same_answers(taught, tmp_path, monkeypatch, capsys):
    questions = write_questions(tmp_path / "in.json", MIXED[:2])
    flags = ["--data_path", questions, "--max_new_tokens", "40", "--output_path"]
    main(capsys, taught, *flags, tmp_path / "plain.json")
    main(capsys, taught, *flags, tmp_path / "merged.json", "--merge_input", "True")
    plain, merged = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plain", "merged"))
    assert [list(row) for row in merged] == [["instruction", "output", "generator"]] * 2
    assert [row["output"] for row in merged] == [row["output"] for row in plain]
    assert merged[0]["instruction"] == COLOUR["instruction"]
    assert merged[1]["instruction"] == f"{MIXED[1]['instruction']}\n\n{MIXED[1]['input']}"
    code, line = mistake(monkeypatch, capsys, "--model_name_or_path", taught, "--merge_input", "True")
    assert code == 2 and "--merge_input goes with --data_path" in line


def test_a_killed_run_goes_on_to_the_same_bytes(taught, tmp_path, monkeypatch, capsys):
    questions = write_questions(tmp_path / "in.json", [{"instruction": f"Say {n}."} for n in range(16)])
    flags = ["--data_path", questions, "--batch_size", "2", "--temperature", "1.5", "--max_new_tokens", "24"]
    flags = ["--device", "cpu", *flags, "--output_path"]
    main(capsys, taught, *flags, tmp_path / "whole.json")

    out, partial = tmp_path / "killed.json", tmp_path / "killed.json.partial.jsonl"
    flags = ["--model_name_or_path", taught, *flags, out]
    process = subprocess.Popen([sys.executable, "inference.py", *flags], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (partial.exists() and partial.read_bytes().count(b"\n") > 4):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)  # in the middle, for as long as it takes
    code, line = mistake(monkeypatch, capsys, *flags)
    assert code == 6 and "another run is writing" in line
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    lines = partial.read_bytes().split(b"\n")
    partial.write_bytes(b"\n".join(lines[:4]) + b"\n" + lines[4][:5])  # a power cut in the middle of a batch

    code, line = mistake(monkeypatch, capsys, *flags, "--seed", "1", "--max_new_tokens", "20")
    assert code == 2 and "other settings (max_new_tokens, seed)" in line
    monkeypatch.setattr(sys, "argv", ["inference.py", *map(str, flags)])
    inference.main()
    assert "notice: 3 answers are there already" in capsys.readouterr().err
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not partial.exists()
    code, line = mistake(monkeypatch, capsys, *flags)
    assert code == 2 and "killed.json exists; remove it" in line


def test_questions_and_places_that_will_not_do(llama, tmp_path, monkeypatch, capsys):
    def refused(data, out=tmp_path / "out.json", **environment):
        flags = ["--model_name_or_path", llama, "--data_path", data, "--output_path", out]
        return mistake(monkeypatch, capsys, *flags)

    good = write_questions(tmp_path / "good.json", [COLOUR])
    code, line = refused(write_questions(tmp_path / "bad.json", [COLOUR, {"instruction": 3}]))
    assert code == 3 and 'record 1: "instruction" is a number' in line
    code, line = refused(write_questions(tmp_path / "empty.json", [COLOUR, {"instruction": " "}]))
    assert code == 3 and "record 1: the instruction is empty" in line
    long = {"instruction": "Summarize.", "input": "word " * 2000}
    code, line = refused(write_questions(tmp_path / "long.json", [long, COLOUR, *[long] * 6]))
    assert code == 3 and "record 0: the prompt's 2,0" in line and "record 6" not in line and "and 2 more" in line
    code, line = refused(tmp_path / "missing.json")
    assert code == 3 and "missing.json does not exist" in line
    code, line = refused(good, tmp_path / "good.json" / "out.json")
    assert code == 2 and "lies in --data_path" in line
    code, line = refused(good, tmp_path / "bad.json" / "out.json")
    assert code == 8 and "can't be written" in line
    partial = tmp_path / "out.json.partial.jsonl"
    for damage in ("no JSON\n", "3\n", '{"seed": 42}\n[1, 2, 3]\n', "[]\n"):
        partial.write_text(damage)
        code, line = refused(good)
        assert code == 3 and "out.json.partial.jsonl is damaged; remove it" in line
    assert not (tmp_path / "out.json").exists()
