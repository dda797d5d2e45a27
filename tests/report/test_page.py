"""The page: it stands alone, and shows what it is given."""

import html.parser
import re
import sys

import data_report
from tests.report.conftest import rows, save


class Page(html.parser.HTMLParser):
    """Collects what a page refers to, and its ids, headings and text."""

    def __init__(self, text):
        super().__init__()
        self.references, self.ids, self.text, self.images = [], [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag not in ("script", "link", "img", "iframe", "image")
        self.references += [attributes[name] for name in ("src", "href", "xlink:href") if name in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.images += attributes.get("role") == "img"

    def handle_data(self, data):
        self.text.append(" ".join(data.split()))


def test_the_page_stands_alone(report):
    text = (report / "out" / "report" / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert all(reference.startswith("#") for reference in page.references)
    assert len(page.ids) == len(set(page.ids))
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert not re.search(r"url\((?!#)", text)
    assert {found for found in re.findall(r"https?://[^\"' <]*", text)} <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert page.images == 3 + 4 + 1 + 1 + 1 + 1 + 2  # words, tokens, padding, verbs, pairs, seeds, tasks
    assert "#010203" not in text and "currentColor" in text and "prefers-color-scheme: dark" in text
    assert "Draw <b>it</b> & go." not in text  # data is text, never markup
    for title in ("Instruction: part.json, 120 rows", "Instruction: faulty.jsonl, 6 rows", "tokens in the example"):
        assert title in page.text
    assert (report / "v.png").read_bytes().startswith(b"\x89PNG")


def test_without_spacy_the_page_says_what_to_install_and_the_rest_is_made(tmp_path, monkeypatch, capsys):
    with_input = [{"instruction": "Add it up.", "input": "1 and 2", "output": "3"}]
    first, second = save(tmp_path / "first.json", rows("A")), save(tmp_path / "second.json", with_input)
    arguments = ["--data_path", first, "--compare", second, "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["data_report.py", *map(str, arguments)])
    monkeypatch.setitem(sys.modules, "spacy", None)
    data_report.main()
    page = Page((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    assert "pip install spacy && python -m spacy download en_core_web_sm" in page.text
    assert "pip install spacy" in capsys.readouterr().err
    assert page.text.count("input, mean words") == 1 and "–" in page.text  # of the set without inputs
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["index.html", "report.json"]
    assert page.images == 3 + 1  # words, seeds
