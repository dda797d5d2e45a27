"""How the texts are written: no filler, no invented names, one form of marks, fences and blanks."""

import re

from tests.data.shipped import EXAMPLES, PROMPT, ROWS, tagged

TEXTS = {f"{name}, {part}": row[part] for name, row in ROWS.items() for part in ("instruction", "input", "output")}
OUTPUTS = {name: row["output"] for name, row in ROWS.items()}
WRITTEN = {name: text for name, text in TEXTS.items() if not name.endswith("input")}  # inputs may have their faults


def those(pattern, texts):
    """The texts in which the pattern is found, by name, with what was found."""
    return {name: found[0] for name, text in texts.items() if (found := re.search(pattern, text, re.MULTILINE))}


FILLER = r"\A(Sure|Certainly|Of course|Absolutely|(Great|Good) question|Here (is|are)|Here's|I hope|As requested)\b"
REFUSAL = r"(?i)\bas an? (ai|artificial intelligence|(large )?language model)\b|\bI (cannot|can't) (help|assist|fulfil)"
CLOSING_OFFER = r"(?i)let me know if|feel free to (ask|reach)|hope this helps|have any (other|more|further) question"


def test_no_filler_no_refusals_no_closing_offers():
    assert those(FILLER, OUTPUTS) == {} and those(REFUSAL, OUTPUTS) == {}
    # An e-mail in the data may close with an offer; an answer may not.
    assert those(CLOSING_OFFER, {name: text.splitlines()[-1] for name, text in OUTPUTS.items()}) == {}


def test_no_placeholders_for_material():
    assert those(r"(?i)lorem ipsum|<noinput>|\[insert\b", WRITTEN) == {}
    assert those(r"(?i)\A\W*(n/?a|none|noinput|no input)\W*\Z", TEXTS) == {}


def test_characters():
    """Quotes, dashes and spaces are plain ASCII; other characters stand where the content needs them."""
    texts = {**TEXTS, "prompt": PROMPT}
    assert those(r"[‘’“”…–—\u00a0\u00ad\u200b\ufeff\ufffd\r\x00-\x08]", texts) == {}
    assert those(r"[ \t]+$", texts) == {}
    assert those(r"\A\s|\s\Z", TEXTS) == {}
    # An input may show mojibake that the task is to repair, and an answer that speaks of encodings too.
    written = {name: text for name, text in WRITTEN.items() if not re.search("UTF-8|encoding", text)}
    assert those(r"[ÃÂâ][\u0080-\u00bf€™]", written) == {}


def outside_code(text):
    text = re.sub(r"^[ \t]*```.*?^[ \t]*```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def test_one_form_of_times_and_percent():
    prose = {name: outside_code(text) for name, text in WRITTEN.items()}
    assert those(r"\d %", prose) == {}
    assert those(r"\d x \d|\d\*\d|\d \* \d", prose) == {}


def test_fences_are_closed_and_name_their_language():
    faults = []
    for name, output in OUTPUTS.items():
        fences = re.findall(r"^[ \t]*```+(.*)$", output, flags=re.MULTILINE)
        if not all(re.fullmatch(r"[a-z+]+", language) for language in fences[::2]) or any(fences[1::2]):
            faults.append((name, fences))
        if len(fences) % 2:
            faults.append((name, "not closed"))
    assert faults == []


SALUTATION = re.compile(r"^(?:Dear|Hi|Hello|Hey) ([^\n,:!]{1,60})[,:!]$", re.MULTILINE)
NAME = r"\[.*?\]|\b[^\W\d][\w'-]*"  # a blank, or a word
# What an address or a signature may say without a name.
NO_NAMES = set(
    "a again all and at aunt best board both carers cheers class colleague colleagues committee community council "
    "customer customers dad dear dr editor everybody everyone families family folks friend friends future "
    "grandfather grandma grandmother grandpa guardians guest guests hiring i in keeper kind landlord little lots "
    "love madam manager many member members mom mr mrs ms mum my neighbor neighbors neighbour neighbours of or "
    "our parent parents professor reader regards residents sales selection self service sincerely sir sirs "
    "student students support team tenant tenants thank the there to uncle warm whoever wishes with year you your "
    "yours".split()
)


def invented_names(row):
    """Words of salutations and signatures that the request does not have, without blanks and words of address.

    Stories in letters are left out: they are to be invented.
    """
    if re.search(r"\b(story|novel|fiction)\b", row["instruction"]):
        return []
    given = f"{row['instruction']}\n{row['input']}".lower()
    found = [name for address in SALUTATION.findall(row["output"]) for name in re.findall(NAME, address)]
    if found:
        last = re.split(r"\n\s*\n", row["output"].strip())[-1]
        if len(last.split()) <= 8 and not re.search(r"[.?!:]$", last):  # a signature: a few words without a full stop
            found += [name for name in re.findall(NAME, last) if not name.islower()]
    names = [name.removesuffix("'s") for name in found if not name.startswith("[")]
    return [name for name in names if name.lower() not in NO_NAMES and name.lower() not in given]


def test_names_in_letters_are_those_of_the_request_or_blanks():
    row = {"instruction": "Write to my boss.", "input": "Eva Lund wants it by Friday", "output": ""}
    assert invented_names({**row, "output": "Dear Ms Lund,\n\nYes.\n\nSincerely,\n[Your name]"}) == []
    assert invented_names({**row, "output": "Dear Mr Olsen,\n\nYes.\n\nYours,\nPaul"}) == ["Olsen", "Paul"]
    assert {name: names for name, row in ROWS.items() if (names := invented_names(row))} == {}


def test_reasoning_comes_before_its_result():
    """An answer tagged so doesn't open with its result, a bare number or word."""
    openings = {row: re.split(r"(?<=[.!?])\s", EXAMPLES[row]["output"])[0].strip("*") for row in tagged("reasoning")}
    bare = r"\A(About |Yes|No\b|True|False|[$€£]?\d[\d.,/]*%?)[^=×/]{0,20}[.!,]?\Z"
    assert {
        row: text for row, text in openings.items() if re.match(bare, text) and not re.match(r"\d+\.\Z", text)
    } == {}
