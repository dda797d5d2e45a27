"""eval.py judge against `transformers serve`, a server that is not ours."""

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
