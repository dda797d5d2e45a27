"""Answers through the Batch API: half the price, within 24 hours, and no batch is submitted twice."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

from alpaca.common import ExitCode, ExpectedError
from alpaca.teacher.client import Teacher
from alpaca.teacher.replies import BadAnswer


async def run_batch(
    teacher: Teacher,
    batch: dict[str, Any],
    prompts: dict[int, str],
    remember: Callable[[dict[str, Any]], None],
    poll_seconds: float,
) -> tuple[dict[int, dict[str, Any] | str], ExpectedError | None]:
    """Send prompts as a batch, or go on with a batch that an earlier process began.

    `batch` holds what was remembered of it ({} for a new one); `remember` is called with it, to be synced, after every
    step that costs something. → for each prompt's number its answer as Teacher.ask gives it, or in a word why there is
    none; and the error that the run must end with, or None.
    """
    client = teacher.client
    endpoint = "/v1/chat/completions" if teacher.api == "chat" else "/v1/completions"
    bodies = {number: teacher.body(prompt) for number, prompt in prompts.items()}
    for body in bodies.values():
        body.pop("stream", None)  # no field of a batch
    if "input_file_id" not in batch:
        requests = (
            {"custom_id": f"request-{number}", "method": "POST", "url": endpoint, "body": body}
            for number, body in bodies.items()
        )
        data = "".join(json.dumps(request) + "\n" for request in requests).encode()
        upload = await _call(teacher, lambda: client.files.create(file=("batch.jsonl", data), purpose="batch"))
        batch |= {"input_file_id": upload.id}
        remember(batch)

    async def find_or_create():
        # A process killed between creating a batch and remembering it must not create, and pay, a second one.
        for known in (await client.batches.list(limit=100)).data:  # the newest
            if known.input_file_id == batch["input_file_id"]:
                return known
        return await client.batches.create(
            input_file_id=batch["input_file_id"], endpoint=endpoint, completion_window="24h"
        )

    if "batch_id" not in batch:
        batch |= {"batch_id": (await _call(teacher, find_or_create)).id}
        remember(batch)
    while True:
        state = await _call(teacher, lambda: client.batches.retrieve(batch["batch_id"]))
        if state.status in ("completed", "expired", "cancelled", "failed"):
            break
        await teacher.sleep(poll_seconds)
    if state.status == "failed":  # its file was refused: nothing was asked, and nothing is paid
        problems = "; ".join(str(problem.message) for problem in (state.errors and state.errors.data) or [])
        return {}, ExpectedError(
            f"batch {state.id} failed: {teacher.redact(problems) or 'no reason given'}; "
            "if it is too large for the account's queue, lower --batch_requests",
            ExitCode.API,
        )
    results: dict[int, dict[str, Any] | str] = {number: f"batch {state.status}" for number in bodies}
    refusal = None
    for file_id in filter(None, (state.output_file_id, state.error_file_id)):
        content = await _call(teacher, lambda file_id=file_id: client.files.content(file_id))
        for line in content.text.splitlines():
            number, result, error = _read_line(teacher, line, bodies)
            if number in results:
                results[number] = result
            if error and not (error["remedy"] == "request" and teacher.drop_refused_fields(error)):
                refusal = error
    return results, refusal and await teacher.refusal(refusal)


async def _call(teacher: Teacher, operation: Callable[[], Awaitable]) -> Any:
    """One call of the client, with retries; an HTML page or broken JSON counts as a failed attempt."""

    async def attempt():
        try:
            result = await operation()
        except ValueError:
            raise BadAnswer("broken JSON", "")
        if isinstance(result, str):
            raise BadAnswer("HTML page", result)
        return result

    return await teacher.with_retries(attempt)


def _read_line(teacher: Teacher, line: str, bodies: dict[int, dict]) -> tuple[int, dict | str, dict | None]:
    """One line of a batch's result files → request number, answer or fault, error that ends the run or None."""
    try:
        record = json.loads(line)
        number = int(record["custom_id"].removeprefix("request-"))
        response = record.get("response") or {}
        status, payload = response.get("status_code"), json.dumps(response.get("body"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return -1, "broken JSON", None
    if status == 200:
        try:
            return number, teacher.read_answer(payload, bodies.get(number, {})), None
        except BadAnswer as failure:
            return number, failure.kind, None
    if not status:  # never sent, such as batch_expired
        return number, str((record.get("error") or {}).get("code") or "no response"), None
    error = teacher.read_error(status, payload)
    if error["remedy"] == "skip":
        return number, teacher.filtered_answer(), None
    return number, f"HTTP {status}", None if error["remedy"] in ("retry", "limit") else error
