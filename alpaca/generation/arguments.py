"""Values of generate_instruction.py's flags that cannot be meant are refused here, before anything is asked."""

import math
from collections.abc import Callable
from typing import Any

from alpaca.teacher.arguments import check_values, fields_of


def checked(function: Callable, arguments: dict[str, Any]) -> dict[str, Any]:
    """→ the arguments, the blacklist as a list of words. Raises ExpectedError (USAGE) for one that cannot be meant."""
    check_values(function, arguments, {"seed": -math.inf, "min_words": 0})
    words = arguments.get("blacklist")
    if isinstance(words, str):  # of the command line: "draw,go to" or "()", also "('draw', 'go to')"
        words = [word.strip(" '\"") for word in words.strip("()[] ").split(",")]
    if words is not None:
        words = [str(word) for word in words if str(word).strip()]
    if arguments.get("extra_body"):
        arguments = {**arguments, "extra_body": fields_of(arguments["extra_body"])}
    return {**arguments, "blacklist": words}
