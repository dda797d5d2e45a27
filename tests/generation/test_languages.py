"""Whole runs in another language, and directories of runs that are older than today's rules."""

import json

import pytest

from alpaca.common import ExitCode
from alpaca.generation.self_instruct import prompt_text
from alpaca.teacher.request_log import Log
from generate_instruction import generate_instruction_following_data, replay
from tests.generation.runs import answers, fails, generate, records
from tests.teacher.teacher_server import TeacherServer, answer_text

SEEDS = ["写一首关于雨的短诗", "比较两种早餐的营养", "解释为什么天空是蓝色的", "列出三种节约用水的办法"]
WRITTEN = ["用一句话介绍你的家乡", "说明如何保存新鲜蔬菜", "请说明如何保存新鲜蔬菜", "画一张图片"]


def chinese_run(server, path, **arguments):
    seeds = path.parent / "seeds.jsonl"
    lines = [{"id": text, "instruction": text, "instances": [{"input": "", "output": "好"}]} for text in SEEDS]
    seeds.write_text("".join(json.dumps(line) + "\n" for line in lines))
    generate_instruction_following_data(
        **{"output_dir": str(path), "seed_tasks_path": str(seeds), "base_url": server.url, "num_cpus": 1},
        **{"num_instructions_to_generate": 2, "blacklist": ("图片",), "language": "Chinese", **arguments},
    )


def chinese_answer(prompt):
    return answer_text([{"instruction": text, "input": "", "output": "好"} for text in WRITTEN])


def test_a_run_in_chinese(tmp_path, capsys):
    with TeacherServer(answer=chinese_answer) as server:
        chinese_run(server, tmp_path / "out")
    assert "Everything is written in Chinese," in server.bodies[0]["messages"][0]["content"]
    entries = json.loads((tmp_path / "out" / "regen.json").read_text())
    assert [entry["instruction"] for entry in entries] == WRITTEN[:2]
    assert "too similar 1" in capsys.readouterr().out
    assert records(tmp_path / "out")[0]["run"].keys() >= {"tokenization", "parser"}


def test_seeds_that_the_filters_drop_stop_the_run_before_the_first_request(tmp_path):
    with TeacherServer(answer=chinese_answer) as server:
        with fails(ExitCode.USAGE, r"drop 4 of the 4 seed tasks \(too short 4\)"):
            chinese_run(server, tmp_path / "out", min_words=20)
        assert not server.bodies and records(tmp_path / "out") == []
        chinese_run(server, tmp_path / "out", min_words=11, seeds_anyway=True, num_instructions_to_generate=1)
        assert len(server.bodies) == 1


def test_a_prompt_that_names_no_language_is_not_changed_in_silence(tmp_path, monkeypatch):
    with TeacherServer() as server:
        prompt_text.cache_clear()
        (tmp_path / "prompt.txt").write_text("Write tasks:")
        monkeypatch.setattr("alpaca.generation.self_instruct.ROOT", tmp_path)
        with fails(ExitCode.USAGE, 'does not say "in English"'):
            chinese_run(server, tmp_path / "out")
    prompt_text.cache_clear()


@pytest.mark.parametrize("text", ["ordinary", "dirty"])
def test_an_older_directory_is_replayed_and_resumed_by_its_own_rules(tmp_path, text):
    """A log without "tokenization" and "parser": the entries stay as they were, also when the run goes on."""
    closing = "\n###\n\nThat completes the list." if text == "dirty" else ""
    tasks = [{"instruction": f"Tell me about a{n} b{n} c{n} café", "input": "N/A", "output": "x"} for n in range(3)]
    with TeacherServer(answer=lambda prompt: answer_text(tasks) + closing) as server:
        generate(server, tmp_path, num_instructions_to_generate=3)
        header, *others = records(tmp_path)
        for name in ("tokenization", "parser"):
            del header["run"][name]
        (tmp_path / "requests.jsonl").unlink()
        log = Log(str(tmp_path / "requests.jsonl"))
        for record in (header, *others):
            record.pop("checksum", None)
            log.append(record)
        log.close()
        replay(str(tmp_path))
        old = json.loads((tmp_path / "regen.json").read_text())
        assert [entry["input"] for entry in old] == ["N/A"] * 3  # 2023 knew <noinput> alone
        assert old[2]["output"] == "x" + closing.rstrip()
        tasks[:] = [{**task, "instruction": f"Say more of a{n}z b{n}z c{n}z d{n}z"} for n, task in enumerate(tasks)]
        generate(server, tmp_path, num_instructions_to_generate=6)
    new = json.loads((tmp_path / "regen.json").read_text())
    assert new[:3] == old and [entry["input"] for entry in new] == ["N/A"] * 6
    assert len(answers(tmp_path)) == 2
