"""The two prompts that a model is trained and asked with."""

from typing import Any

# Published weights only work with these two templates, character for character.
PROMPT_DICT = {
    "prompt_input": (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    ),
    "prompt_no_input": (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:"
    ),
}


def format_prompt(example: dict[str, Any]) -> str:
    """{"instruction": …, "input": … (may be missing, None or "")} → the prompt the model is trained on."""
    template = "prompt_input" if example.get("input") else "prompt_no_input"
    return PROMPT_DICT[template].format_map(example)
