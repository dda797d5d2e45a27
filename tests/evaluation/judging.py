"""Scripted judges on loopback, and eval.py judge run in this process or in one of its own."""

import json
import re
import subprocess
import sys

import eval as script
from tests.conftest import ROOT
from tests.teacher.teacher_server import TeacherServer

_SHOWN = re.compile(r"<(task|input|answer A|answer B) (\w+)>\n(.*?)\n</\1 \2>", re.DOTALL)


def shown(prompt):
    """What a judge is shown → {"task", "input", "answer A", "answer B"}."""
    return {name: text for name, _, text in _SHOWN.findall(prompt)}


def judge_by(choose, words="I have compared them."):
    """A scripted judge: `choose(a, b, task)` gives "A", "B" or "tie", or a whole reply."""

    def answer(prompt):
        parts = shown(prompt)
        chosen = choose(parts["answer A"], parts["answer B"], parts["task"])
        return f"{words}\nVerdict: {chosen}" if chosen in ("A", "B", "tie") else chosen

    return answer


def better(a, b, task=""):
    """The answers of these tests say how good they are: "quality 7 …"."""
    one, other = (int(re.search(r"quality (-?\d+)", text).group(1)) for text in (a, b))
    return "tie" if one == other else "A" if one > other else "B"


def suite(wins, losses, ties=0):
    """Answers and an opponent's, of which so many win, lose and tie with the judge `better`."""
    qualities = [9] * wins + [1] * losses + [5] * ties
    questions = [{"instruction": f"Task {n}.", "input": f"text {n}" if n % 3 else ""} for n in range(len(qualities))]
    ours = [
        q | {"output": f"quality {quality} ours {'x' * (n % 7)}", "generator": "tuned"}
        for n, (q, quality) in enumerate(zip(questions, qualities, strict=True))
    ]
    theirs = [q | {"output": f"quality 5 theirs {'y' * (n % 5)}", "generator": "base"} for n, q in enumerate(questions)]
    return ours, theirs


def write(directory, ours, theirs):
    directory.mkdir(exist_ok=True, parents=True)
    (directory / "ours.json").write_text(json.dumps(ours))
    (directory / "theirs.json").write_text(json.dumps(theirs))
    return {"answers": str(directory / "ours.json"), "opponent": str(directory / "theirs.json")}


def run_judge(server: TeacherServer, files, output_dir, **arguments):
    """A run in this process, with short waits; → report.json."""
    arguments = {"model_name": "judge-1", "sleep_time": 0.01, "base_url": server.url, **files, **arguments}
    script.judge(output_dir=str(output_dir), **arguments)
    return read(output_dir)


def read(output_dir):
    return json.loads((output_dir / "report.json").read_text())


def start_judge(server, files, output_dir, *flags):
    return subprocess.Popen(
        [
            *(sys.executable, "eval.py", "judge", "--output_dir", str(output_dir), "--base_url", server.url),
            *("--answers", files["answers"], "--opponent", files["opponent"], "--model_name", "judge-1"),
            *("--sleep_time", "0.01", *flags),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
