"""The root verb of an instruction and its direct object: "Write me a short poem about rain." → ("write", "poem").

spaCy parses the instructions; its figure counts the pairs (Wang et al. 2022, "Self-Instruct", section 3.3).
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from alpaca.common import ExitCode, ExpectedError, notice

DEFAULT_MODEL = "en_core_web_sm"
INSTALL = f"pip install spacy && python -m spacy download {DEFAULT_MODEL}"
Pair = tuple[str, str]  # (verb, object), "" where there is none


def load_parser(name: str | None) -> Any | None:
    """The spaCy pipeline of this name or directory. By default spaCy's small English one, or None and a notice.

    Raises ExpectedError (exit 2) if a pipeline that was asked for can't be loaded.
    """
    try:
        import spacy

        return spacy.load(name or DEFAULT_MODEL, exclude=["ner"])
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        if name:
            raise ExpectedError(f"--parser {name} can't be loaded ({reason}); {INSTALL}", ExitCode.USAGE)
        notice(f"no verbs and objects ({reason}); to have them: {INSTALL}")
        return None


def root_verbs(instructions: Sequence[str], parser: Any) -> list[Pair]:
    documents = parser.pipe(instructions, batch_size=256)
    return [
        first_pair(document)
        for document in tqdm(documents, "parse", len(instructions), unit=" texts", disable=None, leave=False)
    ]


def first_pair(document: Any) -> Pair:
    """Of the first sentence of a spaCy document whose root is a verb: its lemma and that of its direct object."""
    for sentence in document.sents:
        if sentence.root.pos_ == "VERB":
            objects = [word for word in sentence.root.children if word.dep_ in ("dobj", "obj")]
            # A noun has two letters or more: of "e-mail" spaCy makes "e", "-", "mail".
            nouns = [word.lemma_.lower() for word in objects if word.pos_ in ("NOUN", "PROPN") and len(word) > 1]
            return sentence.root.lemma_.lower(), nouns[0] if nouns else ""
    return "", ""


def count_verbs(instructions: Sequence[str], parser: Any | None) -> dict[str, Any] | None:
    """What report.json says of verbs and objects; None without a parser."""
    if parser is None:
        return None
    pairs = root_verbs(instructions, parser)
    return {
        "parser": f"spaCy with {parser.meta['lang']}_{parser.meta['name']} {parser.meta['version']}",
        "rows_with_verb": sum(bool(verb) for verb, _ in pairs),
        "rows_with_object": sum(all(pair) for pair in pairs),
        "top": most_frequent(pairs),
    }


def most_frequent(pairs: Sequence[Pair], verbs: int = 20, objects: int = 4) -> list[dict[str, Any]]:
    """The most frequent verbs that have an object, each with its most frequent objects, ties in alphabetical order.

    [("write", "poem"), ("write", "poem"), ("name", "")] → [{"verb": "write", "rows": 2, "objects": [["poem", 2]]}]
    """
    objects_of: dict[str, Counter] = {}
    for verb, noun in sorted(pair for pair in pairs if all(pair)):  # sorted, and most_common keeps the order of ties
        objects_of.setdefault(verb, Counter())[noun] += 1
    totals = Counter({verb: nouns.total() for verb, nouns in objects_of.items()})
    return [
        {"verb": verb, "rows": rows, "objects": [list(item) for item in objects_of[verb].most_common(objects)]}
        for verb, rows in totals.most_common(verbs)
    ]
