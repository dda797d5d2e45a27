"""README.md and docs/: every link leads somewhere, every documented command parses."""

import re
import shlex
import subprocess

import pytest
from torch.distributed.run import get_args_parser

from alpaca.training.arguments import parse_arguments

from .conftest import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
JOB = ROOT / "configs" / "slurm.sh"
NEEDED = [
    "--model_name_or_path",
    "m",
    "--data_path",
    "d",
    "--output_dir",
    "o",
]  # where "…" stands for flags shown before


def command_lines(text):
    """The lines of the bash blocks, continued ones joined, placeholders like <base> filled in."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)) if "```" in text else text
    return re.sub("<[^>]*>", "1", blocks.replace("\\\n", " ")).splitlines()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8")):
        if not re.match(r"https?:", target):
            assert (document.parent / target).exists(), target


def test_every_training_command_parses():
    """Those of the documents and of the Slurm job, torchrun's flags too."""
    subprocess.run(["bash", "-n", JOB], check=True)
    parsed = 0
    for path in [*DOCUMENTS, JOB, ROOT / "tests" / "training" / "commands_of_2023.md"]:
        for line in command_lines(path.read_text(encoding="utf-8")):
            if not re.match(r"(srun )?(torchrun|python) .*train\.py ", line) or "--help" in line:
                continue
            words = shlex.split(line.split(" && ")[0], comments=True)
            script = words.index("train.py")
            if "torchrun" in words:
                get_args_parser().parse_args(words[words.index("torchrun") + 1 : script + 1])
            flags = words[script + 1 :]
            if "--deepspeed" in flags:
                flags.remove("--deepspeed")  # its value with it: a run of that command is a test of its own
                flags.remove("./configs/default_offload_opt_param.json")
            if "…" in flags:
                flags.remove("…")
                flags += NEEDED
            parse_arguments(flags)
            parsed += 1
    assert parsed >= 9


def test_the_readme_has_the_command_of_2023_as_it_was_written():
    of_2023 = (ROOT / "tests" / "training" / "commands_of_2023.md").read_text()
    blocks = re.findall(r"```bash\n(torchrun .*?)```", of_2023, re.DOTALL)
    assert len(blocks) == 4 and blocks[0] in (ROOT / "README.md").read_text()
