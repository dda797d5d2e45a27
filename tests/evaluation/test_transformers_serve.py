"""eval.py judge against `transformers serve`, a server that is not ours."""

import pytest

from alpaca.common import ExpectedError
from tests.evaluation.judging import run_judge, suite, write
from tests.generation import test_transformers_serve
from tests.generation.runs import records
from tests.generation.test_transformers_serve import scripted, serve


class Served:
    def __init__(self, url):
        self.url = url


def test_verdicts_of_a_served_model_are_read(llama, tmp_path, monkeypatch):
    """A judge whose weights say A to everything, over the chat endpoint and the legacy one."""
    monkeypatch.setattr(test_transformers_serve, "ANSWER", "Both have their merits.\nVerdict: A")
    directory = scripted(llama, tmp_path / "model")
    files = write(tmp_path, *suite(3, 1))
    with serve(directory, tmp_path / "home") as url:
        for api in ("chat", "completions"):
            out = tmp_path / api
            report = run_judge(Served(url), files, out, model_name=str(directory), api=api, max_tokens=60)
            assert report["flips"] == 4 and report["win_rate"] == 50 and report["first_position_wins"] == 100
            replies = [record for record in records(out) if "answer" in record]
            assert len(replies) == 8 and all(reply["usage"]["prompt_tokens"] > 100 for reply in replies)


@pytest.mark.soak
def test_a_real_model_as_the_judge(tmp_path):
    """The demo's base model: its verdicts are worth little, but whatever it replies is counted."""
    base = pytest.importorskip("alpaca.demo.base")
    try:
        base.fetch(str(tmp_path / "model"))
    except ExpectedError as error:
        pytest.skip(str(error))
    with serve(tmp_path / "model", tmp_path / "home") as url:
        arguments = {"model_name": str(tmp_path / "model"), "max_tokens": 80, "max_attempts": 2, "concurrency": 1}
        try:
            report = run_judge(Served(url), write(tmp_path, *suite(2, 1)), tmp_path / "judged", **arguments)
        except ExpectedError as error:  # too few verdicts, which the report says too
            assert "lack a verdict" in str(error)
            report = None
    replies = [record for record in records(tmp_path / "judged") if "answer" in record]
    assert 6 <= len(replies) <= 12 and all(reply["answer"].strip() for reply in replies)
    assert report is None or report["wins"] + report["ties"] + report["losses"] + report["missing"] == 3
