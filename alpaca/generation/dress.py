"""What teachers and servers write around a task and its fields, and how it comes off; other layouts."""

import json
import re

SEPARATOR = re.compile(r"[ \t]*(?:#{2,}|-{3,}|={3,}|\*{3,}|_{3,})[ \t]*")
FENCE = re.compile(r"[ \t]*```[\w+-]*[ \t]*")
PART = r"(?P<part>Instruction|Input|Output)"
MARKS = r"#>*_•·●▪‣+\-–— \t"  # of headings, quotations, bold type and lists, ahead of a header


# ----------------------------------------------------------------------------------------------- what is no answer

# <think>, <thinking>, <seed:think>, [THINK], ◁think▷, <|begin_of_thought|>, <|START_THINKING|>, and what closes them.
_THOUGHT = r"(?:\w{1,20}[:_])?(?:(?:ant)?think(?:ing)?|thoughts?|reasoning|reflection|scratchpad)"
_OPENS = (
    rf"<{_THOUGHT}>|\[THINK\]|◁think▷|<\|(?:begin_of_|start_)?{_THOUGHT}\|>|<unused94>(?:thought)?"
    r"|<details type=\"reasoning\"[^<>\n]{0,80}>"
)
_CLOSES = rf"</{_THOUGHT}>|\[/THINK\]|◁/think▷|<\|(?:end_of_|end_|/){_THOUGHT}\|>|<unused95>"
_OPENING = re.compile(rf"(?:^|Instruction[ \t]*[*_]*[:：][*_]*)[ \t]*(?P<tag>{_OPENS})", re.MULTILINE | re.IGNORECASE)
_CLOSING = re.compile(rf"{_CLOSES}|</details>", re.IGNORECASE)
_CLOSING_LINE = re.compile(rf"^[ \t]*(?:{_CLOSES})|(?:{_CLOSES})[ \t]*$", re.MULTILINE | re.IGNORECASE)
# The channels of gpt-oss, as tokens or with the tokens lost.
_FINAL = re.compile(
    r".*<\|channel\|>\s*final\b[^<\n]{0,40}<\|message\|>|\s*(?:assistant)?analysis.*assistantfinal", re.DOTALL
)
_NOT_FINAL = re.compile(r"\s*(?:<\|start\|>\s*assistant)?\s*<\|channel\|>\s*(?:analysis|commentary)\b")
_MENTIONED = ("think", "thought", "reasoning", "reflection", "scratchpad")
_MENTIONED += ("<unused9", "<|channel|>", "assistantfinal")

# </s>, <|im_end|>, <|eot_id|>, <end_of_turn>, <｜end▁of▁sentence｜>, [/INST] …
_TOKEN = (
    r"(?:</s>|</assistant>|<\|[\w▁]{1,40}\|>|\[\|\w{1,40}\|\]|<｜[^<>\n｜]{1,40}｜>|<turn\|>"
    r"|<(?:start_of_turn|end_of_turn|[be]os|pad)>|\[/?INST\]|\[EOS\])"
)
_TOKENS_FIRST = re.compile(
    rf"\s*(?:(?!{_OPENS})(?:{_TOKEN}|<s>)\s*(?:(?:assistant|model)\b(?=\s*(?:\n|<)))?)+", re.IGNORECASE
)
_ROLE = r"(?:user|assistant|system|model)?"  # whose turn the token begins
_TOKEN_LAST = re.compile(rf"{_TOKEN}{_ROLE}\Z", re.IGNORECASE)
_TOKEN_OR_FENCE = re.compile(rf"^[ \t]*```|^[ \t]*{_TOKEN}|{_TOKEN}{_ROLE}[ \t]*$", re.MULTILINE | re.IGNORECASE)
_WRAPPER = re.compile(r"\s*<(answer|response|output|solution)>\s*\n", re.IGNORECASE)

_BLANK_OR_SEPARATOR = rf"(?:[ \t]*\n|{SEPARATOR.pattern}\n)*"
# The fences between two tasks of which each has its own.
_REFENCED = re.compile(
    rf"^[ \t]*```[ \t]*\n({_BLANK_OR_SEPARATOR}){FENCE.pattern}\n(?={_BLANK_OR_SEPARATOR}[^\n]{{0,60}}Instruction)",
    re.MULTILINE | re.IGNORECASE,
)
# A header and nothing behind it but another: what stood between, a draft, has been taken out.
_REPEATED = re.compile(
    r"^[#>*_ \t]*\d{1,4}[.)][ \t]*[*_]*Instruction[ \t]*[*_]*:[*_]*\s*"
    r"(?=(?:[#>*_][#>*_ \t]*)?\d{1,4}[.)][ \t]*[*_]*Instruction)",
    re.MULTILINE | re.IGNORECASE,
)


def strip_reasoning(text: str) -> str:
    """An answer without the drafts that some servers leave in it; "" where it is nothing else.

    A block of reasoning begins on a line or behind a header, and is closed, or the answer was cut inside it. Where the
    server's template wrote the opening tag, all that stands ahead of the closing one is reasoning.
    """
    lowered = text.lower()
    if not any(word in lowered for word in _MENTIONED):  # most answers: spare them the search
        return text
    if final := _FINAL.match(text):
        text = text[final.end() :]
    elif _NOT_FINAL.match(text):
        return ""
    pieces, position = [], 0
    while opening := _OPENING.search(text, position):
        pieces.append(text[position : opening.start("tag")])
        closing = _CLOSING.search(text, opening.end())
        position = closing.end() if closing else len(text)
    text = "".join([*pieces, text[position:]])
    closing = _CLOSING_LINE.search(text)
    return text[closing.end() :] if closing else text


def clean_text(text: str) -> str:
    """An answer without reasoning, tokens of the chat template ahead of it, and a fence of its own around each task."""
    for strip in (_strip_first_tokens, strip_reasoning, _strip_first_tokens):
        text = strip(text)
    if wrapper := _WRAPPER.match(text):
        text = text[wrapper.end() :].rstrip()
        closing = f"</{wrapper[1]}>"
        text = text[: -len(closing)] if text.lower().endswith(closing.lower()) else text
    return _REPEATED.sub("", _REFENCED.sub(r"\1", text))


def _strip_first_tokens(text: str) -> str:
    tokens = _TOKENS_FIRST.match(text) if "<|channel|>" not in text else None
    return text[tokens.end() :] if tokens else text


# ------------------------------------------------------------------------------------------------ what is no field

_BOLD = re.compile(r"(\*{2,3}|__)(?=\S)(?P<inside>(?:(?!\1).)+)(?<=\S)\1", re.DOTALL)
_AROUND = " \t\n`*_\"'“”‘’<>()[]{}（）［］【】「」＜＞〈〉《》.。:：!/"
_BRACKETS = tuple("<([（［【＜〈《")
_NO_INPUT = re.compile(
    r"(?:no[ \t_-]*(?:additional |further |specific |extra |other )?inputs?(?: data)?(?: (?:is|was))?"
    r"(?: (?:needed|required|necessary|provided|given|available|applicable))?(?: (?:for|in) this (?:task|one|case))?"
    r"|none(?: (?:is )?(?:needed|required|necessary|provided|given))?|input not (?:needed|required|applicable)"
    r"|not (?:needed|required|applicable|necessary)|n/a|n\.a|(?-i:NA)|nil|null|[-–—]{1,3})"
    # In the languages that are tested, where a teacher translates the mark.
    r"|[无無](?:输入|輸入)?|没有输入|無需輸入|(?:无需|不需要)输入|(?:入力)?なし|입력 ?없음|없음|ไม่มี(?:ข้อมูล|อินพุต)?"
    r"|لا يوجد(?: إدخال| مدخلات)?|(?:कोई )?इनपुट नहीं|(?:καμία|χωρίς) είσοδος?|nincs(?: bemenet)?"
    r"|keine? (?:eingabe|input)|sin entrada|ningun[ao]|aucune entrée|nessun input|нет(?: ввода| входных данных)?",
    re.IGNORECASE,
)
_EMPTY = re.compile(r"(?:empty|blank|nothing|(?:the )?input(?:, or <noinput>?)?)", re.IGNORECASE)  # in brackets
_NO_OUTPUT = re.compile(r"no[ \t_-]*(?:output|input|response|answer)|[无無](?:输出|輸出)|出力なし", re.IGNORECASE)
_EMPTY_OUTPUT = re.compile(r"empty|blank|none|n/a|(?:the )?output", re.IGNORECASE)  # in angle brackets


def has_no_input(text: str) -> bool:
    """Whether an input field says that there is none: <noinput>, `No input`, N/A, None (not needed), (no input) …"""
    if len(text) > 100:
        return False
    text = text.replace("\\<", "<").replace("\\>", ">").replace("&lt;", "<").replace("&gt;", ">")
    bare = text.strip(" \t\n`*_\"'“”‘’.")
    inside = re.sub(r"(?<=[\w>])\s*[(（][^()（）]*[)）]\Z", "", bare).strip(_AROUND)  # "None (none is needed)"
    if not inside or (bare[:1] in _BRACKETS and _EMPTY.fullmatch(inside)):
        return not bare or (bare[0] in _BRACKETS and bool(inside))
    return _NO_INPUT.fullmatch(inside) is not None


def has_no_output(text: str) -> bool:
    """Whether an output field is a mark of emptiness: <No Output>, <noinput>, <output>. "None" is an answer."""
    if len(text) > 100:
        return False
    bare = text.strip(" \t\n`*_\"'“”‘’.")
    inside = bare.strip(_AROUND)
    if bare[:1] in _BRACKETS or inside.lower() in ("noinput", "nooutput"):
        return bool(_NO_OUTPUT.fullmatch(inside) or (bare[:1] == "<" and _EMPTY_OUTPUT.fullmatch(inside)))
    return not bare and bool(text)  # quotation marks around nothing


def clean_field(text: str) -> str:
    """A field without tokens of the chat template at its end, and without bold marks around the whole of it."""
    text = text.strip()
    while "<s>" not in text and (token := _TOKEN_LAST.search(text, max(0, len(text) - 50))):
        text = text[: token.start()].rstrip()
    if (bold := _BOLD.fullmatch(text)) and not (bold[1] == "__" and bold["inside"].isidentifier()):
        return bold["inside"].strip()
    if text.count("**") % 2 and re.search(r"[^\s*]\*\*\Z", text):  # opened ahead of the header: "**5. Input: x**"
        return text[:-2]
    return text


def cut_at_token(text: str) -> str:
    """An output up to the first token of the chat template that begins or ends a line: the teacher's turn was over."""
    fenced = False
    if "<s>" in text or not ("<" in text or "[" in text):
        return text
    for found in _TOKEN_OR_FENCE.finditer(text):
        if found[0].endswith("```"):
            fenced = not fenced
        elif not fenced:
            return text[: found.start()]
    return text


# ---------------------------------------------------------------------------------------------------- other layouts

_JSON_KEY = re.compile(r'"[^"\n]{0,12}instruction[^"\n]{0,12}"\s*:', re.IGNORECASE)
_PART_LINE = re.compile(
    rf"[{MARKS}]*(?:(?:Task[ \t]*)?#?(?P<number>\d{{1,4}})[.):/\-–—*_ \t]*)?{PART}"
    r"[*_ \t]*#?(?P<behind>\d{1,4})?[*_ \t]*[:：][*_]*",
    re.IGNORECASE,
)
_TASK_LINE = re.compile(
    rf"[{MARKS}]*(?:(?:Task|Example)[ \t]*#?|(?=\d{{1,4}}[.)．、:：]|\d{{1,4}}[*_ \t]*\Z))(?P<number>\d{{1,4}})"
    r"[*_ \t.)．、:：/\-–—]*(?P<title>.*)",
    re.IGNORECASE,
)
MOST_FAILURES = 100  # objects that are no JSON, before an answer is given up


def tasks_in_json(text: str) -> list[tuple[str, str, str] | None]:
    """The tasks of an answer in JSON: a list, one object a line, a list within an object; whole objects of a cut one.

    An object with an instruction but no output is None.
    """
    if not _JSON_KEY.search(text):
        return []
    decoder, tasks, position, failures = json.JSONDecoder(strict=False), [], 0, 0
    while failures < MOST_FAILURES and (position := text.find("{", position)) >= 0:
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            position, failures = position + 1, failures + 1
            continue
        pending = [value]
        while pending:
            value = pending.pop()
            if isinstance(value, dict):
                fields = {re.sub("[^a-z]", "", name.lower()): field for name, field in value.items()}
                if "instruction" in fields:
                    whole = isinstance(fields["instruction"], str) and fields.get("output") is not None
                    parts = (_as_text(fields.get(part)) for part in ("instruction", "input", "output"))
                    tasks.append(tuple(parts) if whole else None)
                    continue
                value = list(value.values())
            if isinstance(value, list):
                pending += reversed(value)
    return tasks


def _as_text(value: object) -> str:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def number_headers(text: str, first_number: int) -> str:
    """An answer whose number stands in a line of its own, or nowhere, in the prompt's layout.

    "Task 4\\nInstruction: …\\nInput: …\\nOutput: …" → "###\\n4. Instruction: …\\n4. Input: …\\n4. Output: …"
    """
    lines = text.split("\n")
    headers = [_PART_LINE.match(line) for line in lines]
    following = [""] * len(lines)  # the part that the next line with text in it begins, or ""
    for number in range(len(lines) - 2, -1, -1):
        below = headers[number + 1]
        if below or not lines[number + 1].strip():
            following[number] = below["part"].lower() if below else following[number + 1]
    titles = [None if header else _TASK_LINE.match(line) for line, header in zip(lines, headers, strict=True)]
    # The part that must come next: within a task, all other headers are quotations. The prompt may have begun a task.
    first = next((number for number, header in enumerate(headers) if header), 0)
    begun = headers[first] and headers[first]["part"].lower() == "input" and not any(titles[:first])
    expected, number, result = "input" if begun else "instruction", first_number - (not begun), []
    for line, header, title, below in zip(lines, headers, titles, following, strict=True):
        part = header["part"].lower() if header else ""
        named = title and (below == "instruction" or (below == "input" and title["title"].strip("*_ \t")))
        if named and expected == "instruction":
            number = int(title["number"]) - (below == "instruction")
            if below == "input":
                result += ["###", f"{number}. Instruction: {title['title'].strip()}"]
                expected = "input"
        elif part == expected:
            if part == "instruction":
                number = int(header["number"] or header["behind"] or number + 1)
                result.append("###")
            result.append(f"{number}. {part.capitalize()}:{line[header.end() :]}")
            expected = {"instruction": "input", "input": "output", "output": "instruction"}[part]
        else:
            result.append(line)
    return "\n".join(result)
