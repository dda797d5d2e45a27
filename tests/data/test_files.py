"""What files of records may look like, what is taken of them, and what is said of the rest."""

import gzip
import json

import datasets
import pytest

from alpaca.common import ExpectedError
from alpaca.data.examples import load_examples
from alpaca.data.files import read_records
from tests.conftest import error_line, run

EXAMPLES = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue."},
    {"instruction": 'Add, "and" say\nhow.', "input": "2 and 3", "output": "005"},
    {"instruction": "NA", "input": "null", "output": "é 1.0"},
]
COLUMNS = {key: [example[key] for example in EXAMPLES] for key in EXAMPLES[0]}


def as_csv(separator):
    rows = [EXAMPLES[0].keys(), *(example.values() for example in EXAMPLES)]
    cells = [
        ['"' + cell.replace('"', '""') + '"' if set('",;\n') & set(cell) else cell for cell in row] for row in rows
    ]
    return "".join(separator.join(row) + "\r\n" for row in cells)


TEXTS = {
    "list.json": json.dumps(EXAMPLES),
    "list.jsonl": json.dumps(EXAMPLES, indent=2),
    "lines.jsonl": "".join(json.dumps(example) + "\n" for example in EXAMPLES),
    "lines.json": "\n".join(json.dumps(example) for example in EXAMPLES),
    "pretty_printed_one_by_one.jsonl": "\n".join(json.dumps(example, indent=1) for example in EXAMPLES),
    "list.txt": json.dumps(EXAMPLES),
    "in_an_object.json": json.dumps({"version": 1, "data": EXAMPLES, "authors": [{"name": "x"}]}),
    "in_one_line.jsonl": json.dumps({"train": EXAMPLES}),
    "columns.json": json.dumps(COLUMNS),
    "columns_of_pandas.json": json.dumps({key: dict(enumerate(column)) for key, column in COLUMNS.items()}),
    "comma.csv": as_csv(","),
    "semicolon.csv": "\ufeff" + as_csv(";"),
    "tab.tsv": as_csv("\t"),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", TEXTS)
def test_what_can_be_read_in_one_way_is_read(name, zipped, tmp_path, capsys):
    path = tmp_path / f"{name}.gz" if zipped else tmp_path / name
    content = TEXTS[name].encode()
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert load_examples(str(path)) == EXAMPLES
    assert ('the list "data" in it' in capsys.readouterr().err) == name.startswith("in_an")


@pytest.mark.parametrize("name", ["data.parquet", "named_otherwise"])
def test_parquet(name, tmp_path):
    datasets.Dataset.from_list(EXAMPLES).to_parquet(tmp_path / name)
    assert load_examples(str(tmp_path / name)) == EXAMPLES


def test_one_object_is_one_example(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(EXAMPLES[1]))
    assert load_examples(str(tmp_path / "one.json")) == EXAMPLES[1:2]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("two.json", json.dumps({"train": EXAMPLES, "test": EXAMPLES}), ["several lists", "train, test", "by itself"]),
        ("columns.json", json.dumps({**COLUMNS, "input": ["x"]}), ["columns of different lengths"]),
        ("commas.jsonl", "{},\n{}", ["line 1 column 3"]),
        ("ragged.csv", "instruction,output\na,b\na,b,c\n", ["no valid csv", "line 3"]),
        ("headless.csv", "\na,b\n", ["column names"]),
        ("twice.csv", "instruction,output,output\na,b,c\n", ["column names"]),
        ("latin.csv", "instruction,output\nü,b\n".encode("latin-1"), ["not UTF-8"]),
        ("late_latin.csv", b"instruction,output\n" + 9999 * b"a,b\n" + b"\xfc,b\n", ["no valid csv"]),
        ("torn.parquet", b"PAR1xxxx", ["no valid parquet"]),
        ("torn.json.gz", gzip.compress(b"[]" * 999, mtime=0)[:20], ["damaged gzip"]),
        ("book.xlsx", b"PK\x03\x04\xff\xfe", ["not UTF-8", ".csv"]),
        ("numbers.json", "[1, 2]", ["record 0: a number"]),
    ],
)
def test_the_rest_is_refused_with_what_to_do(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ExpectedError) as error:
        load_examples(str(tmp_path / name))
    assert error.value.exit_code == 3 and "\n" not in str(error.value)
    assert all(text in str(error.value) for text in [name, *said]), str(error.value)


# --- fields that no example has ---


def notice_of(tmp_path, capsys, *records, **options):
    path = tmp_path / "fields.json"
    path.write_text(json.dumps(records))
    load_examples(str(path), **options)
    said = capsys.readouterr().err
    assert said.count("\n") == said.count("notice: ") <= 1
    return said


def test_fields_with_content_are_named(tmp_path, capsys):
    turn = {**EXAMPLES[0], "system": "You are an astronomer.", "history": [["Name a planet.", "Venus."]]}
    said = notice_of(tmp_path, capsys, turn, {**EXAMPLES[0], "history": []}, turn)
    assert "of its 3 records" in said and "system (of 2)" in said and "history (of 2)" in said
    dolly = {"instruction": "When did it open?", "context": "1932.", "output": "In 1932."}
    assert "context (of 1)" in notice_of(tmp_path, capsys, dolly)
    assert "response (of 1)" in notice_of(tmp_path, capsys, {**EXAMPLES[0], "response": "Red."})
    assert not notice_of(tmp_path, capsys, {**EXAMPLES[0], "response": "Red."}, need_output=False)
    for value in ("The bridge was opened in 1932.", ["Four words in it."], [{"from": "human"}], {"a": [1]}):
        assert "material (of 1)" in notice_of(tmp_path, capsys, {**EXAMPLES[0], "material": value})


def test_what_is_no_content_is_left_out_without_a_word(tmp_path, capsys):
    similar = {"most_similar_instructions": {"Name three colours of it.": 0.6}, "avg_similarity_score": 0.1}
    text = "Below is an instruction.\n\n### Instruction:\nName a colour.\n\n### Response:\nBlue."
    for more in (similar, {"text": text}, {"id": 7, "category": "open_qa", "tags": ["a", "b"]}, {"history": []}):
        assert not notice_of(tmp_path, capsys, {**EXAMPLES[0], **more})


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"instruction": "a", "context": "b", "response": "c"}, 'no "output" but "response": rename it'),
        ({"Instruction": "a", "Output": "c"}, 'no "instruction" but "Instruction": rename it'),
        ({"question": "a", "answer": "c"}, 'no "instruction" but "question": rename it'),
        ({"messages": [{"role": "user", "content": "a"}]}, 'no "instruction" but "messages": make each question'),
    ],
)
def test_a_field_by_another_name_is_pointed_out(record, said, tmp_path):
    (tmp_path / "renamed.json").write_text(json.dumps([record]))
    with pytest.raises(ExpectedError) as error:
        load_examples(str(tmp_path / "renamed.json"))
    assert said in str(error.value)


def test_inference_and_the_report_read_the_same_forms(tmp_path, llama):
    """Each reads the data first: the tasks of the report, the questions of inference."""
    (tmp_path / "wrapped.json").write_text(json.dumps({"data": EXAMPLES}))
    (tmp_path / "deep.json").write_text("[" * 100000)
    report = ("data_report.py", "--data_path", tmp_path / "wrapped.json", "--output_dir", tmp_path / "report")
    result = run(*report, "--against", tmp_path / "deep.json")
    assert result.returncode == 3 and "nested too deeply" in error_line(result)
    asked = ("inference.py", "--model_name_or_path", llama, "--output_path", tmp_path / "answers.json")
    result = run(*asked, "--data_path", tmp_path / "wrapped.json", "--max_new_tokens", "1")
    assert result.returncode == 0 and len(json.loads((tmp_path / "answers.json").read_text())) == 3
    assert read_records(str(tmp_path / "answers.json"))
