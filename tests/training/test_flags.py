"""`train.py --help`: short, complete, at once, and true to what the parser does."""

import dataclasses
import re
import subprocess
import sys

import transformers

from alpaca.training.arguments import TrainingArguments, parse_arguments
from alpaca.training.flags import GROUPS, DataArguments, ModelArguments, TrainingFlags
from tests.conftest import ROOT, run

OWN = [field for arguments in (ModelArguments, DataArguments, TrainingFlags) for field in dataclasses.fields(arguments)]


def test_help_is_short_and_has_every_own_flag_in_a_group():
    for asked in ("--help", "-h"):
        result = run("train.py", asked)
        assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert len(lines) <= 80 and max(map(len, lines)) <= 120
    first_group = lines.index("Model:")
    commands = [line.strip() for line in lines[:first_group] if "train.py" in line]
    assert [command.split()[0] for command in commands] == ["python", "torchrun"]
    groups, title = {}, None
    for line in lines[first_group:]:
        if found := re.match(r"  --(\w+)", line):
            groups[title].append(found.group(1))
        else:
            title = line.removesuffix(":")
            groups[title] = []
    assert list(groups) == [*dict.fromkeys(GROUPS.values()), "Everything"] and all(groups.values())
    assert sorted(flag for flags in groups.values() for flag in flags) == sorted([f.name for f in OWN] + ["help_all"])
    assert groups["LoRA"] == [name for name in (field.name for field in OWN) if name.startswith("lora_")]
    assert {"save_steps", "resume_from_checkpoint", "output_dir"} < set(groups["Saving and resuming"])
    for field in OWN:
        [line] = [line for line in lines if re.match(rf"  --{field.name}\b", line)]
        assert field.metadata["help"] in line
        assert field.default is None or f"--{field.name} {field.default} " in line


def test_help_imports_nothing_heavy():
    code = "import sys; sys.argv[1:] = ['--help']; import alpaca.training.flags as f\n"
    code += "try: f.answer_help('')\nfinally: sys.stderr.write(' '.join({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy", "accelerate"} & set(done.stderr.split())


def test_help_all_lists_the_trainers_flags_too():
    result = run("train.py", "--help_all", "True")
    assert result.returncode == 0
    listed = set(re.findall(r"^  --(\w+)", result.stdout, re.MULTILINE))
    assert {field.name for field in dataclasses.fields(TrainingArguments) if field.init} <= listed
    assert {field.name for field in OWN} <= listed and len(listed) > 130


def test_a_flag_declared_again_keeps_the_trainers_default():
    of_trainer = {field.name: field for field in dataclasses.fields(transformers.TrainingArguments)}
    defaults = {f.name: (f.default, of_trainer[f.name].default) for f in OWN if f.name in of_trainer}
    changed = {name for name, (own, its) in defaults.items() if own != its and (own or its)}  # False and None are alike
    # --optim: the Trainer's fused AdamW rounds otherwise than that of 2023. --logging_nan_inf_filter hides NaNs.
    assert changed == {"optim", "logging_nan_inf_filter"}


def test_flags_are_read_by_their_declared_types():
    flags = ["--data_path", "x.json", "--output_dir", "o", "--save_steps", "2000", "--lr_scheduler_type", "cosine"]
    model_args, data_args, training_args = parse_arguments(
        [*flags, "--lora_merge", "True", "--lora_r", "4", "--padding_free", "False", "--tf32", "False"]
    )
    assert training_args.save_steps == 2000 and training_args.lr_scheduler_type == "cosine"
    assert (model_args.lora_merge, model_args.lora_r, data_args.padding_free) == (True, 4, False)
