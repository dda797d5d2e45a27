"""The model card of a particular model: docs/model_card.md, filled in from the run.json that train.py writes."""

import os
import re
from pathlib import Path
from typing import Any

from alpaca.common import ROOT, ExitCode, ExpectedError, jdump
from alpaca.weights.files import bad_data, read_json

SETTINGS = """num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps learning_rate
lr_scheduler_type warmup_steps weight_decay optim model_max_length bf16 fp16 lora_r seed""".split()
FRONT_MATTER = """---
{base}library_name: transformers
pipeline_tag: text-generation
tags: [alpaca, instruction-tuning]
license: other
---
"""


def without_folders(path: Any) -> str:
    """A path of this machine → its last part; a Hub id or a relative name as it is."""
    return os.path.basename(path.rstrip("/")) if os.path.isabs(path) else path


def model_card(path_tuned: str, path_card: str | None = None, overwrite: bool = False) -> None:
    """Write the model card of a tuned model, as README.md for a hub.

    Args:
        path_tuned: the directory that train.py wrote, with its run.json.
        path_card: directory to put README.md into, such as a weight diff's; path_tuned if it is not given.
        overwrite: replace a README.md that is there.
    """
    if not os.path.isdir(path_tuned):
        raise ExpectedError(f"--path_tuned {path_tuned}: no such directory", ExitCode.USAGE)
    target = Path(path_card or path_tuned)
    if not target.is_dir():
        raise ExpectedError(f"--path_card {target}: no such directory", ExitCode.USAGE)
    if os.path.lexists(target / "README.md") and not overwrite:
        raise ExpectedError(f"{target / 'README.md'}: exists; --overwrite True replaces it", ExitCode.USAGE)
    run = read_json(Path(path_tuned), "run.json")
    try:
        text = filled((ROOT / "docs" / "model_card.md").read_text(encoding="utf-8"), run)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise bad_data(f"{Path(path_tuned) / 'run.json'}: not as train.py writes it ({error!r})")
    jdump(text, target / "README.md")
    print(f"wrote {target / 'README.md'}; search it for **Fill in:**, which only you know")


def filled(template: str, run: dict[str, Any]) -> str:
    """The template with what `run` knows in place of its first **Fill in:**, and a shorter one for the rest."""
    arguments, data = run["arguments"], run["data"]
    base, git = without_folders(arguments["model_name_or_path"]), run["git"] or {}
    batch = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"] * run["processes"]
    settings = [f"{name} {arguments[name]}" for name in SETTINGS if arguments.get(name) not in (None, False, -1)]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    changed = f", with changes in {len(git['changed'])} files" if git.get("changed") else ""
    known = [
        f"**This model's base:** {base}; {run['parameters']:,} parameters.",
        f"**Its data:** {without_folders(data['path'])}, sha256 {data['sha256'] or 'unknown'}; {data['examples']:,} "
        f"examples trained on, {data['left_out']:,} left out; {data['label_tokens']:,} tokens learnt in an epoch.",
        f"**Its code:** commit {git.get('commit', 'unknown')}{changed}; {versions}.",
        f"**Its settings:** {batch} examples a step on {run['processes']} processes; {', '.join(settings)}.",
        "**Fill in:** revision of the base, hardware, hours, date, contact, licence.",
    ]
    lines = "\n".join(f"- {line}" for line in known)
    text, count = re.subn(r"^- \*\*Fill in:\*\* .*$", lambda _: lines, template, count=1, flags=re.MULTILINE)
    if not count:
        raise ValueError("docs/model_card.md has no **Fill in:**")
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", arguments["model_name_or_path"])
    return FRONT_MATTER.format(base=f"base_model: {base}\n" if hub_id else "") + text
