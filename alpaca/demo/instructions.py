"""The six instructions of the demo, and the demonstrations that it trains on.

The instructions were written down before any model had answered them, and stay as they are. The first three are the
examples of the web page.
"""

from collections.abc import Sequence

from alpaca.data.similarity import TokenEncoder, rouge_l

Example = dict[str, str]

INSTRUCTIONS = [
    {"instruction": "Explain in two sentences why the sky is blue.", "input": ""},
    {"instruction": "Write a haiku about rain on a tin roof.", "input": ""},
    {
        "instruction": "Turn the sentence into the passive voice.",
        "input": "The gardener waters the roses every morning.",
    },
    {"instruction": "Name three things to take on a walk.", "input": ""},
    {
        "instruction": "Is the review positive or negative? Answer with one word.",
        "input": "The waiter was rude and the soup was cold.",
    },
    {
        "instruction": "Decline the invitation politely, in one sentence.",
        "input": "Would you like to come to our garden party on Saturday?",
    },
]


def choose_demonstrations(examples: Sequence[Example], count: int, max_characters: int) -> list[Example]:
    """The first `count` examples of at most `max_characters` (instruction, input and output together).

    None whose instruction is close to one of the six, with a ROUGE-L of 0.5 or more.
    """
    encode = TokenEncoder()
    instructions = [encode(example["instruction"]) for example in examples]
    closeness = rouge_l(instructions, [encode(example["instruction"]) for example in INSTRUCTIONS]).max(axis=1)
    lengths = [sum(map(len, example.values())) for example in examples]
    fit = [score < 0.5 and length <= max_characters for score, length in zip(closeness, lengths, strict=True)]
    return [example for example, fits in zip(examples, fit, strict=True) if fits][:count]
