"""The names of 2023's utils, handed on from where they live: `from utils import openai_completion, jload, jdump`.

Importing this module costs nothing: neither torch nor openai is imported at the top.
"""

from alpaca.common import jdump, jload
from alpaca.prompts import PROMPT_DICT, format_prompt
from alpaca.teacher.client import OpenAIDecodingArguments
from alpaca.teacher.completion import Completion, openai_completion

__all__ = [
    "PROMPT_DICT",
    "Completion",
    "OpenAIDecodingArguments",
    "format_prompt",
    "jdump",
    "jload",
    "openai_completion",
]
