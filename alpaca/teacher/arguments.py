"""Values of the flags of commands that ask: what cannot be meant is refused before anything is asked."""

import json
import math
import typing
from collections.abc import Callable
from typing import Any

from alpaca.common import ExitCode, ExpectedError

OURS = ("model", "messages", "prompt", "stream", "n", "max_tokens", "temperature", "top_p")  # body fields set elsewhere


def check_values(function: Callable, arguments: dict[str, Any], least: dict[str, float]) -> None:
    """Raises ExpectedError (USAGE) for an argument that is not of its annotation, or too small.

    `least`: of whole numbers, where it is not 1; other numbers are from 0.
    """
    for name, kind in typing.get_type_hints(function).items():
        value, kinds = arguments.get(name), {*typing.get_args(kind)} or {kind}
        from_ = least.get(name, 1)
        if value is None and type(None) in kinds:
            continue
        if bool in kinds and not isinstance(value, bool):
            raise ExpectedError(f"--{name} {value}: give True or False", ExitCode.USAGE)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if int in kinds and not (whole and value >= from_):
            raise ExpectedError(
                f"--{name} {value}: give a whole number{f' from {from_}' if whole else ''}", ExitCode.USAGE
            )
        if float in kinds and not ((whole or isinstance(value, float)) and 0 <= value < math.inf):
            raise ExpectedError(f"--{name} {value}: give a number from 0", ExitCode.USAGE)
    if arguments.get("max_cost") is not None and None in (arguments["price_in"], arguments["price_out"]):
        raise ExpectedError("--max_cost needs --price_in and --price_out: no price is built in", ExitCode.USAGE)


def fields_of(extra_body: str | dict[str, Any]) -> dict[str, Any]:
    """The JSON of --extra_body → body fields. Raises ExpectedError (USAGE)."""
    try:
        fields = json.loads(extra_body) if isinstance(extra_body, str) else extra_body
    except ValueError as error:
        raise ExpectedError(f"--extra_body {extra_body}: {error}; give JSON, in single quotes", ExitCode.USAGE)
    if not isinstance(fields, dict):
        raise ExpectedError(
            """--extra_body: give a JSON object, such as '{"reasoning_effort": "low"}'""", ExitCode.USAGE
        )
    if taken := [name for name in OURS if name in fields]:
        flag = f"use --{taken[0]}" if taken[0] in ("max_tokens", "temperature", "top_p") else "leave it out"
        raise ExpectedError(f"--extra_body: {taken[0]} is set by the command itself; {flag}", ExitCode.USAGE)
    return fields
