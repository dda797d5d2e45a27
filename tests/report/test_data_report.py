"""data_report.py and what it draws and counts, against slow and obvious versions of the same."""

import html.parser
import itertools
import json
import random
import re

import numpy as np
import pytest
from rouge_score import rouge_scorer
from transformers import AutoTokenizer

import data_report
from alpaca.common import ExitCode, ExpectedError
from alpaca.data.similarity import TokenEncoder, rouge_l
from alpaca.prompts import format_prompt
from alpaca.report import measures, verb_noun
from tests.conftest import ROOT, error_line, run

EXAMPLES = json.loads((ROOT / "alpaca_data.json").read_text(encoding="utf-8"))
TOKENIZER = ROOT / "configs" / "llama_tiny"


def rows(*instructions, output="Yes."):
    return [{"instruction": text, "input": "", "output": output} for text in instructions]


def save(path, examples):
    path.write_text(json.dumps(examples), encoding="utf-8")
    return path


# --- root verbs and objects


def labels():
    """{"seen": [(instruction, (verb, object))], "unseen": …}"""
    parts, part = {"seen": [], "unseen": []}, None
    for line in (ROOT / "tests" / "report" / "verb_noun_labels.tsv").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            part = line.removeprefix("# ") if line.removeprefix("# ") in parts else part
        else:
            verb, noun, instruction = line.split("\t")
            parts[part].append((instruction, (verb.strip("-"), noun.strip("-"))))
    return parts


def test_the_rule_is_as_right_as_it_says():
    right = {part: [verb_noun.by_rule(text) == label for text, label in pairs] for part, pairs in labels().items()}
    together = right["seen"] + right["unseen"]
    assert len(together) >= 200
    assert len({text for pairs in labels().values() for text, _ in pairs}) == len(together)
    stated = (
        f"right for {100 * np.mean(together):.0f} % of {len(together)} instructions labelled by hand, "
        f"{100 * np.mean(right['unseen']):.0f} % of the {len(right['unseen'])} that it was not tuned on"
    )
    assert stated == verb_noun.RULE_ACCURACY
    assert np.mean(right["unseen"]) > 0.9


def test_plurals():
    pairs = "stories:story boxes:box analyses:analysis houses:house classes:class news:news bus:bus pros:pro gas:gas"
    for plural, noun in (pair.split(":") for pair in pairs.split()):
        assert verb_noun.singular(plural) == noun


def test_sunburst_counts_are_the_most_frequent_pairs():
    pairs = [("write", "poem")] * 3 + [("write", noun) for noun in ("ode", "tale", "song", "essay", "essay")]
    pairs += [("name", ""), ("", ""), ("add", "sum"), ("add", "sum")]
    assert verb_noun.sunburst_counts(pairs, verbs=1) == [
        {"verb": "write", "rows": 8, "objects": [["poem", 3], ["essay", 2], ["ode", 1], ["song", 1]]}
    ]
    assert [entry["verb"] for entry in verb_noun.sunburst_counts(pairs)] == ["write", "add"]


@pytest.fixture(scope="module")
def spacy_model(tmp_path_factory):
    """A spaCy pipeline that has learned four sentences by heart and nothing else."""
    import spacy
    from spacy.training import Example

    spacy.util.fix_random_seed(0)
    pipeline = spacy.blank("en")
    pipeline.add_pipe("morphologizer")
    pipeline.add_pipe("trainable_lemmatizer", config={"min_tree_freq": 1})
    pipeline.add_pipe("parser", config={"min_action_freq": 1})
    sentences = (
        ("Wrote short poems .", "write short poem .", "VERB ADJ NOUN PUNCT", "0 2 0 0", "ROOT amod dobj punct"),
        ("Describe the cities .", "describe the city .", "VERB DET NOUN PUNCT", "0 2 0 0", "ROOT det dobj punct"),
        ("What is love ?", "what be love ?", "PRON AUX NOUN PUNCT", "1 1 1 1", "attr ROOT nsubj punct"),
        ("Ask her today .", "ask she today .", "VERB PRON NOUN PUNCT", "0 0 0 0", "ROOT dobj npadvmod punct"),
    )
    examples = []
    for text, lemmas, tags, heads, relations in sentences:
        annotation = {
            "lemmas": lemmas.split(),
            "pos": tags.split(),
            "heads": [int(head) for head in heads.split()],
            "deps": relations.split(),
        }
        examples.append(Example.from_dict(pipeline.make_doc(text), annotation))
    optimizer = pipeline.initialize(lambda: examples)
    for _ in range(60):
        pipeline.update(examples, sgd=optimizer, drop=0.0)
    directory = tmp_path_factory.mktemp("spacy_model")
    pipeline.to_disk(directory)
    return directory


def test_a_spacy_model_is_used_and_named(spacy_model):
    texts = ["Wrote short poems .", "Describe the cities .", "What is love ?", "Ask her today ."]
    pairs, used = verb_noun.root_verbs(texts, verb_noun.load_parser(str(spacy_model)))
    assert pairs == [("write", "poem"), ("describe", "city"), ("", ""), ("ask", "")]
    assert used.startswith("spaCy with en_pipeline")


def test_the_rule_serves_only_where_no_model_was_asked_for(tmp_path):
    assert verb_noun.load_parser("rule") is None
    assert verb_noun.root_verbs(["Write a poem."], None)[0] == [("write", "poem")]
    with pytest.raises(ExpectedError, match=r"--parser .*no_model.* can't be loaded") as caught:
        verb_noun.load_parser(str(tmp_path / "no_model"))
    assert caught.value.exit_code == ExitCode.USAGE


# --- similarity


def random_texts(seed, count=400, words=30):
    """Texts of 0 to 40 words, every third one a light edit of an earlier one."""
    chance = random.Random(seed)
    texts = []
    for number in range(count):
        if number % 3 == 2:
            text = list(chance.choice(texts))
            for _ in range(chance.randrange(6)):
                text[chance.randrange(len(text) + 1) :][:1] = []
                text.insert(chance.randrange(len(text) + 1), chance.randrange(words))
        else:
            text = [chance.randrange(words) for _ in range(chance.randrange(41))]
        texts.append(text)
    return [" ".join(f"w{word}" for word in text) for text in texts]


def test_pruned_pairs_are_all_pairs(monkeypatch):
    monkeypatch.setattr(measures, "PAIR_BLOCK", 37)
    ties = ["a b c d e f g", "a b c d e f g h i j k l m"]  # 2·7 / (7 + 13) = 0.7 exactly: where the bound lies
    for texts in (random_texts(0), [e["instruction"] for e in EXAMPLES[:500]], ties, ["", "?", "one"], ["a", "a b c"]):
        encode = TokenEncoder()
        encoded = [encode(text) for text in texts]
        scores = rouge_l(encoded, encoded)
        expected = {(i, j): scores[i, j] for i, j in zip(*np.nonzero(scores > 0.7), strict=True) if i < j}
        found = {}
        for block_scores, left, right in measures.similar_pairs(encoded):
            for score, i, j in zip(block_scores.tolist(), left.tolist(), right.tolist(), strict=True):
                assert (min(i, j), max(i, j)) not in found
                found[min(i, j), max(i, j)] = score
        assert found == expected


def test_near_duplicates_count_rows_as_often_as_they_occur():
    texts = [*random_texts(1, 60, words=12), "Say it.", "say IT", "Say it!", "...", "...", ""]
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    scored = [(scorer.score(texts[i], texts[j])["rougeL"].fmeasure, i, j) for i, j in pairs_of(len(texts))]
    expected = [pair for pair in scored if pair[0] > 0.7]
    report = measures.near_duplicates(texts)
    assert report["pairs"] == len(expected) == sum(report["scores"]["counts"])
    assert report["rows_in_a_pair"] == len({row for _, *pair in expected for row in pair})
    assert report["pairs_with_the_same_words"] == sum(
        re.findall("[a-z0-9]+", texts[i].lower()) == re.findall("[a-z0-9]+", texts[j].lower()) != []
        for i, j in pairs_of(len(texts))
    )
    rounded = {(round(score, 4), i, j) for score, i, j in expected}
    assert rounded >= {tuple(pair) for pair in report["most_similar"]}
    assert sorted((pair[0] for pair in report["most_similar"]), reverse=True) == [p[0] for p in report["most_similar"]]


def pairs_of(count):
    return itertools.combinations(range(count), 2)


def test_nearest_seeds_and_tasks_are_found():
    seeds = [{"instruction": "Name the capital of France.", "input": ""}, {"instruction": "Add it up.", "input": ""}]
    report = measures.similarity_to_seeds(rows("Add it up", "Name the capital of Spain.", "Sing!"), seeds)
    assert report["over_threshold"] == {"count": 2, "rows": [[0, 1, 1.0], [1, 0, 0.8]]}
    assert report["scores"]["rows"] == sum(report["scores"]["counts"]) == 3

    tasks = [{"instruction": "Fix the grammar.", "input": "he go home"}, {"instruction": "Count.", "input": "a b c d"}]
    examples = [
        {"instruction": "Fix the grammar.", "input": "we was late for the train", "output": ""},
        {"instruction": "Count these letters up.", "input": "a b c d", "output": ""},
    ]
    report = measures.contamination(examples, tasks)
    assert report["tasks"] == 2
    assert report["instruction"]["rows_over_threshold"]["rows"] == [[0, 0, 1.0]]
    both = report["instruction_and_input"]
    assert both["rows_over_threshold"]["rows"] == [[1, 1, 0.7692]]  # 2·5 / (5 + 8)
    assert both["tasks_over_threshold"] == report["instruction"]["tasks_over_threshold"] == 1


def test_duplicates_are_listed_with_the_first_of_their_kind():
    examples = [*rows("A", "B", "A"), *rows("A", output="No.")]
    report = measures.find_duplicates(examples)
    assert report["whole_rows"] == {"count": 1, "rows": [[2, 0]]}
    assert report["prompts"] == {"count": 2, "rows": [[2, 0], [3, 0]]}


# --- lengths, padding, outputs


def test_token_figures_are_those_of_training():
    examples = [e for e in EXAMPLES if e["input"]][:20] + [e for e in EXAMPLES if not e["input"]][:23]
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    lengths = measures.measure_lengths(examples, data_report.load_tokenizer(str(TOKENIZER)))
    whole = [len(tokenizer(format_prompt(e) + e["output"] + tokenizer.eos_token)["input_ids"]) for e in examples]
    prompts = [len(tokenizer(format_prompt(e))["input_ids"]) for e in examples]
    assert lengths["example_tokens"].tolist() == whole
    assert lengths["prompt_tokens"].tolist() == prompts
    assert len(lengths["input_tokens"]) == len(lengths["input_words"]) == 20
    plain = [len(tokenizer(e["output"], add_special_tokens=False)["input_ids"]) for e in examples]
    assert lengths["output_tokens"].tolist() == plain

    limit = int(np.median(prompts))
    figures = measures.token_figures(lengths, limit)
    assert figures["rows_cut"] == sum(length > limit for length in whole)
    assert figures["rows_without_any_response"] == sum(length >= limit for length in prompts) > 0
    assert figures["tokens_cut"] == sum(max(length - limit, 0) for length in whole)
    assert list(figures["padding_share"]) == ["2", "4", "8", "16", "32"]


def test_padding_share_is_counted_batch_by_batch():
    assert measures.padding_share(np.array([2, 4]), 2) == 0.25
    lengths = np.random.default_rng(3).integers(1, 500, 1003)
    order = np.random.default_rng(measures.SEED).permutation(1003)
    positions = padding = 0
    for first in range(0, 1000, 8):
        batch = [lengths[i] for i in order[first : first + 8]]
        positions += 8 * max(batch)
        padding += sum(max(batch) - length for length in batch)
    assert measures.padding_share(lengths, 8) == round(padding / positions, 4)


def test_histograms_count_every_value_once_on_shared_bins():
    first, second = np.arange(100), np.array([0, 0, 1000])
    bins = measures.shared_bins([first, second])
    assert set(np.diff(bins)) == {bins[1]}
    for values in (first, second, np.zeros(0, dtype=int)):
        counts = measures.histogram(values, bins)["counts"]
        ends = [*bins[1:], np.inf]
        assert counts == [sum(a <= v < b for v in values) for a, b in zip(bins, ends, strict=True)]


@pytest.mark.parametrize(
    ("output", "cut"),
    [
        ("", False),
        ("42", False),
        ("It begins with the", False),  # four words: a phrase may end so
        ("The first thing to do is to open the", True),
        ("We need flour, sugar, eggs and butter,", True),
        ("Here is the code:\n```python\nprint(1)", True),
        ("Here is the code:\n```python\nprint(1)\n```", False),
        ("She walked along the shore until the sun had gone down and her feet were", True),
        ("She walked along the shore until the sun had gone down and her feet were cold.", False),
        ("- a tent that two people can put up in the dark within five minutes or so", False),
        ("Roses are red,\nviolets are blue", False),
    ],
)
def test_outputs_that_look_cut_off(output, cut):
    assert measures.looks_truncated(output) == cut


def test_outputs_are_listed_by_row():
    report = measures.inspect_outputs(["fine", " \n", "café, thé", "It ends in the middle of a", ""])
    assert report["empty"] == {"count": 2, "rows": [1, 4]}
    assert report["truncated_looking"] == {"count": 1, "rows": [3]}
    assert report["non_ascii"] == {"count": 1, "rows": [2], "rows_by_character": {"é": 1}}


# --- the command


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


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The README's command with every option, on a small part of the shipped data beside a set with known faults."""
    directory = tmp_path_factory.mktemp("report")
    save(directory / "part.json", EXAMPLES[:120])
    faulty = [*EXAMPLES[:3], EXAMPLES[0], *rows("Draw <b>it</b> & go.", output=""), *rows("Draw it.", output="né")]
    lines = "\n".join(json.dumps(example) for example in faulty)
    (directory / "faulty.jsonl").write_text(lines, encoding="utf-8")
    result = run(
        *(ROOT / "data_report.py", "--data_path", directory / "part.json", "--compare", directory / "faulty.jsonl"),
        *("--against", ROOT / "seed_tasks.jsonl", "--tokenizer", TOKENIZER, "--model_max_length", 200),
        *("--parser", "rule", "--output_dir", directory / "out" / "report", "--verb_noun_png", directory / "v.png"),
    )
    assert result.returncode == 0, result.stderr
    return directory


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


def test_the_json_holds_what_the_page_shows(report):
    first, second = json.loads((report / "out" / "report" / "report.json").read_text())["data_sets"]
    assert (first["name"], first["rows"]) == ("part.json", 120)
    assert first["rows_with_input"] == sum(bool(example["input"]) for example in EXAMPLES[:120])
    assert first["lengths"]["output_words"]["bin_starts"] == second["lengths"]["output_words"]["bin_starts"]
    assert first["tokens"]["model_max_length"] == 200
    assert second["outputs"]["empty"] == {"count": 1, "rows": [4]}
    assert second["outputs"]["non_ascii"]["rows"][-1] == 5
    assert second["duplicates"]["whole_rows"] == {"count": 1, "rows": [[3, 0]]}
    assert second["near_duplicates"]["most_similar"][0] == [1.0, 0, 3]
    assert verb_noun.RULE_ACCURACY in first["root_verbs"]["parser"]
    assert first["contamination"]["tasks"] >= 175
    text = (report / "out" / "report" / "index.html").read_text(encoding="utf-8")
    for shown in (first["tokens"]["total"], first["outputs"]["non_ascii"]["count"], first["seeds"]["seed_tasks"]):
        assert f"{shown:,}" in text


def test_mistakes_end_in_one_line(tmp_path):
    good = save(tmp_path / "good.json", rows("Write a poem."))
    output = tmp_path / "out"
    absent = ["--compare", tmp_path / "absent.json"]
    result = run(ROOT / "data_report.py", "--data_path", good, "--output_dir", output, *absent)
    assert result.returncode == 3
    assert re.search("--compare .*absent.json does not exist", error_line(result))
    without = "import sys; sys.modules['matplotlib'] = None; sys.argv[0] = 'data_report.py'; import data_report as d; "
    result = run("-c", without + "d.run_main(d.main)", "--data_path", good, "--output_dir", output)
    assert result.returncode == 2
    assert "pip install matplotlib" in error_line(result)
    assert not list(output.glob("*"))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[", "can't be read: Expecting value"),
        ("[]", "holds no tasks"),
        ('[{"instruction": 1}]', "record 0"),
        ('[{"instruction": "A"}, {"instruction": "B", "instances": []}]', "record 1"),
        ("3", "record 0"),
    ],
)
def test_a_wrong_file_of_tasks_is_named(tmp_path, text, fault):
    path = tmp_path / "tasks.json"
    path.write_text(text)
    with pytest.raises(ExpectedError, match=f"--against .*tasks.json.*{fault}") as caught:
        data_report.load_tasks(str(path), "--against")
    assert caught.value.exit_code == ExitCode.DATA


def test_tasks_are_read_in_both_forms(tmp_path):
    seeds = [{"instruction": "A", "instances": [{"input": "1", "output": "x"}, {"input": "", "output": "y"}]}]
    (tmp_path / "seeds.jsonl").write_text("\n".join(map(json.dumps, seeds)) + "\n\n")
    assert data_report.load_tasks(str(tmp_path / "seeds.jsonl"), "--against") == [
        {"instruction": "A", "input": "1"},
        {"instruction": "A", "input": ""},
    ]
    path = save(tmp_path / "plain.json", [{"instruction": "B", "input": None, "output": "y"}])
    assert data_report.load_tasks(str(path), "--against") == [{"instruction": "B", "input": ""}]


def test_a_wrong_tokenizer_is_named_by_its_flag(tmp_path):
    with pytest.raises(ExpectedError, match=r"--tokenizer .* can't be loaded") as caught:
        data_report.load_tokenizer(str(tmp_path))
    assert caught.value.exit_code == ExitCode.USAGE


def test_an_unwritable_directory_is_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExpectedError, match="--output_dir") as caught:
        data_report.prepare_directory(str(tmp_path / "file"))
    assert caught.value.exit_code == ExitCode.DISK
