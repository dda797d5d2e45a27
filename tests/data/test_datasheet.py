"""What the documents say of the data is what is measured."""

import hashlib
import json
import re

import pytest

from tests.conftest import run
from tests.data import figures
from tests.data.shipped import EXAMPLES, ROOT, TAGS, read

DATASHEET_SECTIONS = "Motivation|Composition|Collection process|Preprocessing, cleaning and labelling|Uses|Distribution"
DATASHEET_SECTIONS += "|Maintenance|What became of the reviewed rows|How the released 52K differs"
MODEL_CARD_SECTIONS = "Model details|Intended use|Factors|Metrics|Evaluation data|Training data|Quantitative analyses"
MODEL_CARD_SECTIONS += "|Ethical considerations|Caveats and recommendations"


@pytest.mark.parametrize(
    ("name", "sections"), [("docs/datasheet.md", DATASHEET_SECTIONS), ("docs/model_card.md", MODEL_CARD_SECTIONS)]
)
def test_documents_have_their_sections(name, sections):
    assert re.findall(r"^## (.*)$", read(name), flags=re.MULTILINE) == sections.split("|")


@pytest.mark.parametrize("part", [figures.shares, figures.sentences, figures.domains])
def test_the_datasheet_has_the_measured_figures(part):
    measured = "\n".join(part())
    assert measured in read("docs/datasheet.md"), f"put this into docs/datasheet.md:\n{measured}"


@pytest.mark.parametrize("name", ["docs/datasheet.md", "docs/data.md"])
def test_documents_state_the_counts(name):
    domains = len({entry["domain"] for entry in TAGS})
    assert f"{len(EXAMPLES):,} demonstrations in {domains} domains" in " ".join(read(name).split())


def test_the_figure_beside_other_sets_is_that_of_the_data(tmp_path):
    result = run("benchmarks/plot_data.py", "--png", tmp_path / "figure.png")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "figure.png").stat().st_size > 10_000 and (ROOT / "assets" / "shipped_data.png").exists()
    *table, last = result.stdout.splitlines()
    assert json.loads(last)["shipped"]["rows"] == len(EXAMPLES)
    assert "\n".join(table) in read("docs/data.md"), f"put this into docs/data.md:\n{result.stdout}"


def test_licences_carry_their_full_text():
    apache = read("LICENSE")
    assert "Apache License" in apache and "END OF TERMS AND CONDITIONS" in apache
    data = read("DATA_LICENSE")
    legal_text = " ".join(data[data.index("Attribution 4.0 International\n") :].split())
    assert all(f"Section {number} --" in legal_text for number in range(1, 9))
    assert hashlib.sha256(legal_text.encode()).hexdigest().startswith("25a40a30d753162c4026b87a389b9534")
