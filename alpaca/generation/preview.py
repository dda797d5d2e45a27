"""A look at the first answers: what was asked, what came back, and what would be kept of it, or why not."""

from typing import Any

from alpaca.data.similarity import rouge_l
from alpaca.generation.parsing import judge_tasks
from alpaca.generation.self_instruct import Collection


def describe(collection: Collection, number: int, prompt: str, record: dict[str, Any]) -> str:
    """One request in words, and its answer into the collection, where the next one is compared with it."""
    response = {"text": record["answer"], "finish_reason": record["finish_reason"]}
    judged = judge_tasks(collection.num_prompt_instructions, response, collection.limits, **collection.rules)
    before = len(collection.entries)
    collection.add(record)
    kept = [*collection.new_instructions(before)]
    usage = record["usage"]
    lines = [f"=== request {number}: prompt ===", prompt, f"=== request {number}: answer ===", record["answer"]]
    lines += [
        f"=== request {number}: {len(kept)} of {len(judged)} tasks kept; {usage['prompt_tokens']} + "
        f"{usage['completion_tokens']} tokens, finish_reason {record['finish_reason']} ==="
    ]
    for task, fault in judged:
        shown = " ".join(task.get("instruction", "").split())
        if not fault and task["instruction"] in kept:
            kept.remove(task["instruction"])
            lines.append(f"kept: {shown}")
        else:
            fault = fault or f"too similar: {nearest(collection, task['instruction'])}"
            lines.append(f"dropped, {fault}{': ' if shown else ''}{shown}")
    return "\n".join(lines) + "\n"


def nearest(collection: Collection, instruction: str) -> str:
    """The seed or kept instruction that is most like this one, with its score."""
    scores = rouge_l([collection.encode(instruction)], collection.encoded)[0]
    best = int(scores.argmax())
    return f"{scores[best]:.2f} with {' '.join(collection.instructions[best].split())!r}"
