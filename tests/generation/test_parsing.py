"""Answers → tasks: the layout and the filters of 2023, and what teachers and servers really write."""

import json
import random
import re
import string
import time

import pytest

from alpaca.generation.parsing import (
    BLACKLIST,
    DEFAULT_LIMITS,
    find_word_in_string,
    parse_response,
    post_process_gpt3_response,
)
from tests.conftest import ROOT

TASKS = [
    {"instruction": "Name three rivers in Europe.", "input": "", "output": "Rhine, Danube, Elbe"},
    {"instruction": "Sort these words by length.", "input": "pear fig banana", "output": "fig, pear, banana"},
    {
        "instruction": "Explain why the sky is blue.",
        "input": "",
        "output": "Air scatters blue light more.\n\nThat is all.",
    },
]


def written(tasks, first=4, separator="###\n", head=True, header="{n}. {part}:"):
    """Tasks in the layout that the prompt asks for, with variations."""
    parts = []
    for n, task in enumerate(tasks, first):
        lines = [header.format(n=n, part="Instruction") + " " + task["instruction"]]
        lines += [header.format(n=n, part="Input"), task["input"] or "<noinput>"]
        lines += [header.format(n=n, part="Output"), task["output"]]
        parts.append("\n".join(lines) + "\n")
    text = separator.join(parts)
    return text if head else text.removeprefix(header.format(n=first, part="Instruction"))


def parsed(text, finish_reason="stop"):
    return post_process_gpt3_response(3, {"text": text, "finish_reason": finish_reason})


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(written(TASKS, head=False), id="behind the prompt's last line"),
        pytest.param(written(TASKS), id="prompt's last line repeated"),
        pytest.param("###\n" + written(TASKS) + "###\n", id="separators all around"),
        pytest.param(written(TASKS, separator="##\n"), id="two hashes"),
        pytest.param(written(TASKS, separator="\n---\n\n"), id="rules"),
        pytest.param(written(TASKS, separator=""), id="no separators"),
        pytest.param(written(TASKS, separator="\n\n"), id="blank lines"),
        pytest.param("```\n" + written(TASKS) + "```", id="fenced"),
        pytest.param("Here are the tasks:\n\n```text\n" + written(TASKS) + "```\n", id="preamble and fence"),
        pytest.param("Sure! Here is the list.\n" + written(TASKS), id="preamble"),
        pytest.param(written(TASKS).replace("\n", "\r\n"), id="CRLF"),
        pytest.param(written(TASKS, head=False).replace("\n", "\r\n"), id="CRLF behind the prompt"),
        pytest.param(written(TASKS, header="**{n}. {part}:**"), id="bold"),
        pytest.param(written(TASKS, header="{n}. **{part}:**"), id="bold name"),
        pytest.param(written(TASKS, header="### {n}. {part}:", separator=""), id="headings"),
        pytest.param(written(TASKS, header="{n}) {part}:"), id="parenthesis"),
        pytest.param(written(TASKS, first=1), id="numbered from 1"),
        pytest.param(written(TASKS[:2], first=4) + "###\n" + written(TASKS[2:], first=1), id="restart"),
        pytest.param(written(TASKS[:2], first=4) + written(TASKS[2:], first=1), id="restart without separator"),
        pytest.param(written(TASKS[:2]) + "###\n" + written(TASKS[2:], first=4), id="number repeated"),
        pytest.param(written(TASKS, first=18), id="numbers with two digits"),
        pytest.param(written(TASKS, head=False).replace("<noinput>", "<NoInput>"), id="noinput in other case"),
        pytest.param(re.sub(r"\n(\d\. (Input|Output):)\n", r" \1 ", written(TASKS)), id="all in one line"),
    ],
)
def test_what_teachers_write(text):
    assert parsed(text) == TASKS


@pytest.mark.parametrize(
    "task",
    [
        {"instruction": "Explain Markdown headings to me.", "input": "", "output": "Write\n###\nbefore a heading."},
        {
            "instruction": "Continue this list of parts.",
            "input": "5. Output:\n6. Input:",
            "output": "7. Output:\n5. Output: x",
        },
        {"instruction": "Continue this list of parts.", "input": "x", "output": "4. Output: again\n4. Input: again"},
        {
            "instruction": "What does this line ask for?",
            "input": "5. Instruction: Name a colour",
            "output": "A colour.",
        },
        {"instruction": "Write code that prints a rule.", "input": "", "output": "```python\nprint('---')\n```"},
        {
            "instruction": "How many days are in a leap year?",
            "input": "",
            "output": "366\n\n20. is not the answer. 20.",
        },
    ],
)
@pytest.mark.parametrize("separator", ["###\n", "\n##\n\n", ""])
@pytest.mark.parametrize("fence", ["", "```\n"])
def test_quotations_stay_in_their_task(task, separator, fence):
    text = fence + written([task, *TASKS], separator=separator) + fence
    assert parsed(text) == [task, *TASKS]


def test_decoding_stopped_for_length_drops_the_last_task():
    text = written(TASKS, head=False)
    assert parsed(text, "length") == TASKS[:2]
    for cut in range(len(text)):
        complete = text[:cut].count("###")
        begun = text[:cut].endswith("##") and not text[:cut].endswith("###")
        assert parsed(text[:cut], "length") == TASKS[: complete + begun]
    for cut in range(len(text)):  # and without separators nothing of a begun task flows into the one before
        for task in parsed(written(TASKS, separator="")[:cut], "length"):
            assert task in TASKS


def test_empty_answers():
    assert post_process_gpt3_response(3, None) == []
    for text in ("", " \n", "###", "```\n```", "4. Instruction:", "I cannot help with that."):
        assert parsed(text) == []


def slow_reason(instruction, output):
    """The 2023 filters, written out; an empty output is dropped in addition."""
    if not 3 < len(instruction.split()) <= 150:
        return "length"
    words = (
        "image images graph graphs picture pictures file files map maps draw plot video audio music flowchart diagram"
    )
    if any(re.search(rf"\b{word}\b", instruction, re.IGNORECASE) for word in [*words.split(), "go to"]):
        return "word"
    if instruction.startswith("Write a program"):
        return "program"
    if instruction[0] in string.punctuation or not instruction[0].isascii():
        return "first"
    return None if output else "output"


def test_filters_equal_the_2023_ones():
    rng = random.Random(0)
    vocabulary = [
        *BLACKLIST,
        *"Draw MAPS profile roadmap drawing write a the story Write program ¿Qué 写 (a) -x".split(),
    ]
    vocabulary += ["tell", "me", "about", "your", "holiday"] * 12
    seen = set()
    for _ in range(4000):
        instruction = " ".join(rng.choices(vocabulary, k=rng.choice([1, 2, 3, 4, 5, 6, 8, 149, 150, 151])))
        instruction = rng.choice(["", "", "", "Write a program that "]) + instruction
        output = rng.choice(["fine", "fine", "fine", ""])
        tasks, rejected = parse_response(
            3,
            {"text": written([{"instruction": instruction, "input": "", "output": output}]), "finish_reason": "stop"},
            tokenization="ascii",
        )
        expected = slow_reason(instruction, output)
        assert bool(tasks) == (expected is None), instruction
        assert sum(rejected.values()) == (expected is not None)
        seen |= {expected, *rejected}
    assert {"length", "word", "program", "first", "output", None} <= seen
    assert {"too short", "too long", "begins with punctuation", "begins outside ASCII", "empty output"} <= seen


def test_find_word_in_string():
    assert find_word_in_string("map", "Draw a Map.") and find_word_in_string("go to", "Please GO TO the shop")
    assert not find_word_in_string("map", "a roadmap") and not find_word_in_string("file", "my profile")


def test_rejections_are_counted_by_reason():
    tasks = [
        *TASKS,
        {"instruction": "Too short", "input": "", "output": "x"},
        {"instruction": "Draw a house with a garden.", "input": "", "output": "x"},
        {"instruction": "Say nothing at all here.", "input": "", "output": ""},
    ]
    text = written(tasks) + "###\n10. Instruction: no parts here at all\n###\n11. Instruction: cut"
    kept, rejected = parse_response(3, {"text": text, "finish_reason": "length"}, DEFAULT_LIMITS)
    assert kept == TASKS
    assert rejected == {"too short": 1, "blacklisted word": 1, "empty output": 1, "malformed": 1, "cut off": 1}


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_a_megabyte_of_garbage_is_parsed_within_a_second(finish_reason):
    rng = random.Random(0)
    pieces = [
        "4. Instruction:",
        "5. Output:\n",
        "\n",
        "###",
        "\n6. Input:",
        " ",
        "#",
        "```\n",
        "*",
        "1.",
        "a b c d ",
        "\r\n",
        *("<think>", "</think>\n", "<|im_end|>\n", "</s>", "**", "Task 4\n", "Input:", '{"instruction": "', "："),
    ]
    garbage = ["".join(rng.choices(pieces, k=250_000)), "".join(map(chr, rng.choices(range(1, 0xD7FF), k=10**6)))]
    units = (
        " ",
        "\n",
        "#",
        "*",
        "#\n",
        "1. ",
        "9" * 9,
        "4. Instruction: ",
        "4. Instruction:\n",
        "4. Output:\n",
        "`",
        "```\n",
    )
    garbage += [(unit * (10**6 // len(unit) + 1))[: 10**6] for unit in units]
    units = (
        *(
            "```\n\n",
            "<think>\n",
            "</think> \n",
            "<think> </think>",
            "<|im_end|>\n",
            "</s>\n",
            "\n</s>",
            "** ",
            "###\nDone\n",
        ),
        *(
            "Task 4\n",
            "4.\n\n",
            "Input:\n",
            "Instruction:\nInput:\nOutput:\n",
            "- ",
            "：",
            '{"instruction":',
            '{"a":[',
            "analysis",
        ),
        *("<answer>\n", "assistant", "<|channel|>", "(", "no input ", "###\n```\n", "4. Output:\n```\n###\n"),
    )
    garbage += [unit * (10**5 // len(unit)) for unit in units]
    garbage += ["4. Instruction:" + "\n" * 10**6, "4. Input:" * 100_000 + "4. Output:" * 10_000, "###\n\n" * 200_000]
    garbage += ["\n".join(f"{n % 9999}. Instruction: a\n{n % 9999}. Output:" for n in range(30_000))]
    for text in garbage:
        start = time.process_time()
        parse_response(3, {"text": text, "finish_reason": finish_reason})
        # A tenth of a second on an idle machine; parsing in quadratic time would take minutes.
        assert time.process_time() - start < 10.0, text[:40]


# -------------------------------------------------------------------------------------------- ordinary answers, as ever


def parse_of_2023(text, finish_reason, first=4):
    """2023's post_process_gpt3_response up to its filters, written out."""
    tasks = []
    chunks = re.split("###", f"{first}. Instruction:" + text)
    for index, chunk in enumerate(chunks):
        if index == len(chunks) - 1 and finish_reason == "length":
            continue
        pieces = re.split(rf"{index + first}\.\s+(Instruction|Input|Output):", chunk)
        if len(pieces) == 7:
            instruction, given, output = (pieces[i].strip() for i in (2, 4, 6))
            given = "" if given.lower() == "<noinput>" else given
            if output and slow_reason(instruction, output) is None:
                tasks.append({"instruction": instruction, "input": given, "output": output})
    return tasks


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_ordinary_english_answers_are_read_as_in_2023(finish_reason):
    """The shipped data in answers of 17: fields of all kinds, code and Markdown in them. Parser 1 reads the same.

    2023 dropped what begins with a letter of another script, which is kept today.
    """
    examples = json.loads((ROOT / "alpaca_data.json").read_text(encoding="utf-8"))
    examples = [{part: e[part].strip() for part in ("instruction", "input", "output")} for e in examples]
    examples = [e for e in examples if "###" not in "".join(e.values()) and e["instruction"].isascii()]
    random.Random(0).shuffle(examples)
    count = 0
    for begin in range(0, len(examples), 17):
        text = written(examples[begin : begin + 17], head=False)
        expected = parse_of_2023(text, finish_reason)
        assert parsed(text, finish_reason) == expected
        answer = {"text": text, "finish_reason": finish_reason}
        assert parse_response(3, answer, tokenization="ascii", parser=1)[0] == expected
        count += len(expected)
    assert count > 900


# ------------------------------------------------------------------------------------------------- dirt, by its kinds

DRAFT = "Drafts:\n4. Instruction: DRAFT name rivers of it\n4. Input:\n<noinput>\n4. Output:\nDRAFT\n###\nToo plain."
REASONING = [
    "<think>\n{}\n</think>\n\n",
    "<think>{}</think>",
    "{}\n</think>\n\n",
    "<thinking>\n{}\n</thinking>\n",
    "<antThinking>{}</antThinking>\n",
    "<scratchpad>\n{}\n</scratchpad>\n",
    "<reasoning>\n{}\n</reasoning>\n",
    "<seed:think>{}</seed:think>",
    "[THINK]{}[/THINK]",
    "◁think▷{}◁/think▷",
    "<|begin_of_thought|>\n{}\n<|end_of_thought|>\n",
    "<|START_THINKING|>{}<|END_THINKING|>",
    '<details type="reasoning" done="true">\n{}\n</details>\n',
    "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>",
]


@pytest.mark.parametrize("reasoning", REASONING)
def test_drafts_are_no_tasks(reasoning):
    draft = reasoning.format(DRAFT)
    for text in (
        draft + written(TASKS),
        " " + draft + written(TASKS, head=False),
        "4. Instruction: " + draft + written(TASKS, head=False),
        "4. Instruction: " + draft + "\n" + written(TASKS),
    ):
        assert parsed(text) == TASKS
    assert parsed("<|im_start|>assistant\n" + draft + written(TASKS)) == TASKS


@pytest.mark.parametrize(
    "opening", ["<think>\n", " <think>", "4. Instruction: <think>", "<|channel|>analysis<|message|>"]
)
def test_nothing_but_drafts_is_counted_as_such(opening):
    answer = {"text": opening + DRAFT, "finish_reason": "length"}
    assert parse_response(3, answer) == ([], {"reasoning without an answer": 1})


def test_tags_within_a_task_are_its_own():
    tasks = [
        {"instruction": "What does this tag do?", "input": "It wrote <think> and </think> here.", "output": "Hides."}
    ]
    tasks += [{"instruction": "Strike out the old price.", "input": "", "output": "<s>5</s> 4 and <s>6</s>"}]
    tasks += [{"instruction": "Name the method for a new object.", "input": "", "output": "__init__"}]
    tasks += [{"instruction": "Which of these is a fruit?", "input": "a stone", "output": "None"}]
    tasks += [{"instruction": "Which element is this one?", "input": "Na", "output": "**Sodium**, not **Neon**"}]
    assert parsed(written(tasks)) == tasks


@pytest.mark.parametrize("separator", ["###\n", "##\n", "---\n", "***\n\n", "===\n"])
@pytest.mark.parametrize(
    "closing",
    [
        "\nThat completes the list of 20 tasks.",
        "Let me know if you would like more!",
        "Farewell.\n\nAnd good luck.",
        "***",
    ],
)
def test_closing_words_are_no_output(separator, closing):
    assert parsed(written(TASKS, separator=separator) + separator + closing) == TASKS
    fence = "```\n"
    assert parsed(fence + written(TASKS, separator=separator) + fence + closing) == TASKS
    assert parsed(written(TASKS[:2], separator=separator) + separator + written(TASKS[2:], first=6)) == TASKS


def test_words_between_two_parts_of_the_list_are_no_output():
    assert parsed(written(TASKS[:1]) + "###\n\nHere are the rest:\n\n###\n" + written(TASKS[1:], first=5)) == TASKS


def test_a_rule_within_the_last_output_is_its_own_where_tasks_are_divided_otherwise():
    task = {"instruction": "Write a letter in two parts.", "input": "", "output": "Dear you,\n---\nYours truly"}
    assert parsed(written([*TASKS, task])) == [*TASKS, task]
    task["output"] = "```markdown\n# Title\n\n###\n\nText\n```"
    assert parsed(written([*TASKS, task])) == [*TASKS, task]


@pytest.mark.parametrize("between", ["\n", "###\n", "\n---\n\n"])
def test_a_fence_around_each_task_is_not_the_output(between):
    code = {"instruction": "Write one line of code.", "input": "", "output": "```python\nprint(1)\n```"}
    parts = [f"```\n{written([task], first=n)}```\n" for n, task in enumerate([*TASKS, code], 4)]
    assert parsed(between.join(parts)) == [*TASKS, code]
    assert parsed(between.join(parts) + "\nLet me know!") == [*TASKS, code]


@pytest.mark.parametrize(
    "token",
    [
        *("</s>", "<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<end_of_turn>", "<｜end▁of▁sentence｜>"),
        *("[|endofturn|]", "<turn|>", "</assistant>"),
    ],
)
def test_tokens_of_the_chat_template_are_not_the_fields(token):
    dirty = [{**task, "output": task["output"] + token} for task in TASKS]
    assert parsed(written(dirty)) == TASKS
    assert parsed(written(TASKS).strip() + f" {token}\n<|im_start|>user\nMore!") == TASKS
    assert parsed(f"{token} " + written(TASKS, head=False)) == TASKS
    dirty = [{**task, "instruction": task["instruction"] + token, "input": f"{task['input']}{token}"} for task in TASKS]
    assert parsed(written(dirty)) == TASKS


def test_bold_marks_around_a_field_are_not_the_fields():
    text = written([{part: text and f"**{text}**" for part, text in task.items()} for task in TASKS])
    assert parsed(text) == TASKS
    text = re.sub(r"(?m)^(\d\. Instruction: .*)$", r"**\1**", written(TASKS))
    assert parsed(re.sub(r"(\d\. (Input|Output):)\n(.*)", r"**\1** \3", text)) == TASKS


NO_INPUTS = ["No input", "no input.", "N/A", "n/a", "NA", "None", "None.", "(no input)", "[No input]", "`<noinput>`"]
NO_INPUTS += [
    "<No Input>",
    "< noinput >",
    "<noinput/>",
    "\\<noinput\\>",
    "&lt;noinput&gt;",
    "**N/A**",
    "<none>",
    "Not applicable",
    "No input needed",
    "-",
    "—",
    '""',
    "null",
]
NO_INPUTS += [
    "None (no input is needed)",
    "<empty>",
    "无",
    "<无输入>",
    "なし",
    "ไม่มี",
    "لا يوجد",
    "keine Eingabe",
    "<noinput></s>",
]


@pytest.mark.parametrize("mark", NO_INPUTS)
def test_marks_of_no_input(mark):
    assert parsed(written([{**task, "input": mark} for task in TASKS])) == [{**task, "input": ""} for task in TASKS]


@pytest.mark.parametrize("given", ["No", "?", "[]", "{}", "<br>", "none of them", "0", "no inputs were lost", "Nein"])
def test_short_inputs_are_inputs(given):
    assert parsed(written([{**TASKS[0], "input": given}])) == [{**TASKS[0], "input": given}]


@pytest.mark.parametrize(
    "mark", ["<No Output>", "<noinput>", "<nooutput>", "(no output)", "`<no output>`", "**<No Output>**", "<output>"]
)
def test_marks_of_no_output(mark):
    assert parse_response(3, {"text": written([{**TASKS[0], "output": mark}]), "finish_reason": "stop"}) == (
        [],
        {"empty output": 1},
    )


@pytest.mark.parametrize("output", ["None", "N/A", "No output.", "<br>", "[]", "-"])
def test_short_outputs_are_outputs(output):
    assert parsed(written([{**TASKS[0], "output": output}])) == [{**TASKS[0], "output": output}]


PLAIN = [task for task in TASKS if "\n" not in task["output"]]


def laid_out(line, join="\n", tasks=PLAIN, first=4):
    return join.join(
        line.format(n=n, **{**task, "input": task["input"] or "<noinput>"}) for n, task in enumerate(tasks, first)
    )


@pytest.mark.parametrize(
    "text",
    [
        laid_out("{n}. Instruction：{instruction}\n{n}. Input：\n{input}\n{n}. Output：\n{output}", "\n###\n"),
        laid_out("{n}．Instruction：{instruction}\n{n}．Input：\n{input}\n{n}．Output：\n{output}", "\n"),
        laid_out("{n}、Instruction：{instruction}\n{n}、Input：{input}\n{n}、Output：{output}", "\n"),
        laid_out(
            "Task {n} / Instruction: {instruction}\nTask {n} / Input: {input}\nTask {n} / Output: {output}", "\n\n"
        ),
        laid_out("Task {n}\nInstruction: {instruction}\nInput: {input}\nOutput: {output}", "\n\n"),
        laid_out(
            "**Task {n}**\n\n**Instruction:** {instruction}\n**Input:** {input}\n**Output:** {output}", "\n\n---\n\n"
        ),
        laid_out(
            "### Task {n}: Of rivers\n- **Instruction**: {instruction}\n- **Input**: {input}\n- **Output**: {output}"
        ),
        laid_out("Task {n}: {instruction}\nInput: {input}\nOutput: {output}", "\n\n"),
        laid_out("{n}. {instruction}\n   Input: {input}\n   Output: {output}", "\n\n"),
        laid_out("{n}.\nInstruction: {instruction}\nInput: {input}\nOutput: {output}"),
        laid_out("Instruction {n}: {instruction}\nInput {n}: {input}\nOutput {n}: {output}", "\n\n"),
        laid_out("Instruction: {instruction}\nInput: {input}\nOutput: {output}", "\n\n"),
        laid_out("- {n}. Instruction: {instruction}\n- {n}. Input: {input}\n- {n}. Output: {output}"),
        laid_out("* **{n}. Instruction:** {instruction}\n  * **{n}. Input:** {input}\n  * **{n}. Output:** {output}"),
        laid_out("• {n}. Instruction: {instruction}\n• {n}. Input: {input}\n• {n}. Output: {output}"),
        laid_out("({n}) Instruction: {instruction}\n({n}) Input: {input}\n({n}) Output: {output}"),
        laid_out("**{n}.** **Instruction**: {instruction}\n**{n}.** **Input**: {input}\n**{n}.** **Output**: {output}"),
        "Sure:\n\n" + laid_out("{n}. Instruction: {instruction}\nInput:\n{input}\nOutput:\n{output}", "\n###\n"),
        laid_out("Instruction: {instruction}\nInput: {input}\nOutput: {output}", "\n\n").removeprefix("Instruction:"),
        json.dumps(PLAIN),
        json.dumps([{**task, "input": task["input"] or None, "number": 4} for task in PLAIN], indent=2),
        f"Here they are:\n```json\n{json.dumps({'tasks': PLAIN}, indent=2)}\n```\nLet me know!",
        "\n".join(json.dumps({part.capitalize(): text for part, text in task.items()}) for task in PLAIN),
    ],
)
def test_other_layouts_are_read(text):
    assert parsed(text) == PLAIN


def test_of_cut_json_the_whole_objects_are_taken():
    text = json.dumps([*PLAIN, TASKS[2]])
    tasks, rejected = parse_response(3, {"text": text[:-20], "finish_reason": "length"})
    assert tasks == PLAIN and rejected == {"cut off": 1}
    broken = [{"instruction": "Say it in one word."}, *PLAIN]
    assert parse_response(3, {"text": json.dumps(broken), "finish_reason": "stop"}) == (PLAIN, {"malformed": 1})


@pytest.mark.parametrize(
    "reason", ["length", "max_tokens", "MAX_TOKENS", "model_length", "content_filter", "error", "abort"]
)
def test_whatever_stopped_decoding_the_last_task_is_not_whole(reason):
    assert parsed(written(TASKS), reason) == TASKS[:2]


@pytest.mark.parametrize("reason", ["stop", None, "", "STOP", "eos_token", "stop_sequence", "end_turn", "COMPLETE"])
def test_an_answer_that_came_to_its_end_is_whole(reason):
    assert parsed(written(TASKS), reason) == TASKS


@pytest.mark.parametrize(
    ("text", "reason", "counted"),
    [
        ("I can't help with that.", "stop", "unreadable answer"),
        ("| # | Instruction |\n|---|---|\n| 4 | Name a river |", "stop", "unreadable answer"),
        ("", "stop", "empty answer"),
        (" \n", "length", "empty answer"),
        ("", "content_filter", "filtered answer"),
        ("", "refusal", "refused answer"),
    ],
)
def test_an_answer_without_tasks_is_counted_as_what_it_is(text, reason, counted):
    assert parse_response(3, {"text": text, "finish_reason": reason}) == ([], {counted: 1})


def test_parser_1_reads_as_it_did():
    text = written(TASKS) + "###\n\nThat completes the list."
    old = parse_response(3, {"text": text, "finish_reason": "stop"}, parser=1)[0]
    assert old[2]["output"].endswith("###\n\nThat completes the list.") and old[:2] == TASKS[:2]
    text = written([{**TASKS[0], "input": "N/A"}])
    assert parse_response(3, {"text": text, "finish_reason": "max_tokens"}, parser=1)[0][0]["input"] == "N/A"


# -------------------------------------------------------------------------------------------------------- any language


@pytest.mark.parametrize(
    ("instruction", "reason"),
    [
        ("写一首关于雨的短诗", None),
        ("雨について短い詩を書いてください", None),
        ("เขียนบทกวีสั้น ๆ เกี่ยวกับฝน", None),
        ("اكتب قصيدة قصيرة عن المطر", None),
        ("बारिश पर एक छोटी कविता लिखो", None),
        ("Γράψε ένα ποίημα για τη βροχή", None),
        ("Írj egy rövid verset az őszről", None),
        ("Übersetze diesen Satz ins Englische", None),
        ("¿Cuál es la capital de Francia?", None),
        ("Écris un poème sur la pluie", None),
        ("写诗吧", "too short"),
        ("बारिश पर कविता", "too short"),
        ("写" * 151, "too long"),
        ("写" * 150, None),
        ("请画一张图片给我看", "blacklisted word"),
        ("एक नक्शा बनाओ और दिखाओ", "blacklisted word"),
        ("用diagram说明这个过程", "blacklisted word"),
        ("Zeichne eine KARTE von Österreich", "blacklisted word"),
        ("Zeichne die Landkarten von Österreich", None),
        ("🎉 写一首关于雨的短诗", "begins with no letter or digit"),
        ("《红楼梦》讲了什么故事", "begins with no letter or digit"),
    ],
)
def test_filters_in_any_language(instruction, reason):
    limits = DEFAULT_LIMITS._replace(blacklist=(*BLACKLIST, "图片", "नक्शा", "Karte"))
    answer = {"text": written([{"instruction": instruction, "input": "", "output": "x"}]), "finish_reason": "stop"}
    tasks, rejected = parse_response(3, answer, limits)
    assert rejected == ({reason: 1} if reason else {}) and bool(tasks) == (reason is None)


# -------------------------------------------------------------------------------------------------- all kinds together


def dirty_answer(rng, tasks):
    """Tasks as one of many teachers writes them, with dirt of several kinds at once → text, reason, tasks due."""
    separator = rng.choice(["###\n", "###\n", "\n---\n\n", "##\n"])
    mark = rng.choice(["<noinput>", "N/A", "No input", "None", "`<noinput>`", "(no input)"])
    token = rng.choice(["", "", "</s>", "<|im_end|>"])
    bold = rng.choice(["{}", "{}", "**{}**"])
    shown = [
        {"instruction": bold.format(t["instruction"]), "input": t["input"] or mark, "output": t["output"] + token}
        for t in tasks
    ]
    text = written(
        shown, separator=separator, header=rng.choice(["{n}. {part}:", "**{n}. {part}:**", "- {n}. {part}："])
    )
    due, reason = tasks, "stop"
    if rng.random() < 0.2:  # before the last task's output ends
        text = text[: text.rindex(shown[-1]["output"][:3])]
        due, reason = tasks[:-1], rng.choice(["length", "max_tokens", "error"])
    else:
        if rng.random() < 0.3:
            text = f"```\n{text}```\n"
        text += rng.choice(
            ["", separator, separator + "\nThat completes the list.", separator + "\nGoodbye, and good luck."]
        )
    if rng.random() < 0.4:
        text = rng.choice(REASONING).format(written(tasks[::-1])) + text
    return text, reason, due


@pytest.mark.soak
def test_ten_thousand_dirty_answers_give_the_tasks_that_were_written():
    examples = json.loads((ROOT / "alpaca_data.json").read_text(encoding="utf-8"))
    examples = [{part: e[part].strip() for part in ("instruction", "input", "output")} for e in examples]
    rule = re.compile(r"^[ \t]*(#{2,}|-{3,}|={3,}|\*{3,}|_{3,})|```", re.MULTILINE)  # read as a separator at the end
    examples = [e for e in examples if slow_reason(e["instruction"], e["output"]) is None]
    examples = [e for e in examples if not rule.search(e["output"]) and "**" not in "".join(e.values())]
    rng = random.Random(0)
    for number in range(10_000):
        text, reason, due = dirty_answer(rng, rng.sample(examples, 6))
        tasks, rejected = parse_response(3, {"text": text, "finish_reason": reason})
        assert tasks == due, (number, text)
        assert rejected == ({} if reason == "stop" else {"cut off": 1})
