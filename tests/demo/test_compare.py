"""Answers side by side."""

from alpaca.answering.model import Sampling, answer
from alpaca.demo.compare import WIDTH, Answer, answer_all, load, side_by_side, wrap
from alpaca.demo.instructions import INSTRUCTIONS


def test_two_columns_within_eighty():
    long = "A word " * 30 + "Donaudampfschifffahrtsgesellschaftskapitänswitwenrente" * 2
    example = {"instruction": "Why " * 40, "input": "One line.\nAnother."}
    shown = side_by_side(example, Answer(long, 80, False), Answer("Short.\n\nTwo.", 4, True)).splitlines()
    assert max(map(len, shown)) <= WIDTH
    assert shown[0] == "-" * WIDTH and shown[1].startswith("> Why Why")
    assert "> One line." in shown and "> Another." in shown
    rows = [(line[:42].strip(), line[42:]) for line in shown[shown.index("> Another.") + 2 :][:3]]
    assert rows[0] == ("BASE", "TUNED") and rows[1][0].startswith("A word A word")
    assert [right for _, right in rows[1:]] == ["Short.", "Two."]
    assert "[cut off]" in "".join(line[:42] for line in shown)
    assert "[cut off]" not in "".join(line[42:] for line in shown)


def test_an_empty_answer_is_said():
    assert wrap(" \n", 38) == ["(nothing)"]


def test_answers_are_those_of_inference_and_say_whether_they_ended(llama):
    model, reader = load(str(llama))
    found = answer_all(model, reader, INSTRUCTIONS, 12, batch_size=4)
    prompts = [reader.encode(example, 12) for example in INSTRUCTIONS]
    expected = [t for i in (0, 4) for t in answer(model, reader, prompts[i : i + 4], Sampling(12, 0, 1, 0))]
    assert [a.text for a in found] == expected
    assert all(a.tokens == 12 and not a.ended for a in found)
    model.lm_head.weight.data.zero_()
    model.lm_head.weight.data[reader.tokenizer.eos_token_id] = 1  # or its opposite: one of both ends at once
    ended = answer_all(model, reader, INSTRUCTIONS, 12)
    model.lm_head.weight.data.neg_()
    ended += answer_all(model, reader, INSTRUCTIONS, 12)
    assert {(a.text, a.tokens, a.ended) for a in ended if a.ended} == {("", 0, True)}
