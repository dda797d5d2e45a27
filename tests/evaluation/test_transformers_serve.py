"""eval.py judge against `transformers serve`, a server that is not ours."""

import pytest

from alpaca.common import ExpectedError
from tests.evaluation.judging import read, run_judge, suite, write
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
@pytest.mark.timeout(900)
def test_a_real_model_as_the_judge_ends_in_good_order(smollm2, served_smollm2, tmp_path):
    """Whatever the verdicts of 135 million parameters are worth, each pair is accounted for."""
    files, out = write(tmp_path, *suite(1, 1)), tmp_path / "judged"
    arguments = {"model_name": str(smollm2), "max_tokens": 24, "max_attempts": 1, "concurrency": 1, "timeout": 300.0}
    try:
        run_judge(Served(served_smollm2), files, out, **arguments)
    except ExpectedError as error:
        assert error.exit_code == 5 and "lack a verdict" in str(error)
    report = read(out)
    assert report["instructions"] == 2 == report["wins"] + report["ties"] + report["losses"] + report["missing"]
    replies = [record for record in records(out) if "answer" in record]
    assert sorted(reply["request"] for reply in replies) == [0, 1, 2, 3]
    assert report["cost"]["completion_tokens"] == sum(reply["usage"]["completion_tokens"] for reply in replies) > 0
    assert not [record for record in records(out) if "fault" in record]
