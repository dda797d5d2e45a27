"""What the scripts share: prompts, errors and exit codes, files that appear whole or not at all.

Importing this module costs nothing: neither torch nor openai is imported at the top.
"""

import contextlib
import dataclasses
import enum
import errno
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
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


class ExitCode(enum.IntEnum):
    BUG = 1  # a bug of ours: Python's own traceback and exit code
    USAGE = 2  # wrong usage or configuration
    DATA = 3  # bad data
    API = 4  # the API refuses: key, quota, unknown model
    BUDGET = 5  # retries or budget used up, progress saved
    LOCKED = 6  # output directory in use
    INTEGRITY = 7  # integrity check failed
    DISK = 8  # disk full or unwritable
    PREEMPTED = 75  # checkpoint saved
    INTERRUPTED = 130


class ExpectedError(Exception):
    """A failure that is not a bug. The message says what is wrong, where, and what to do next."""

    def __init__(self, message: str, exit_code: ExitCode):
        super().__init__(message, exit_code)  # both, so that the error can be pickled and sent to other ranks
        self.exit_code = exit_code

    def __str__(self) -> str:
        return self.args[0]


def notice(message: str) -> None:
    """Say on standard error, once for all processes of a job, what the user should know but need not act on."""
    if os.environ.get("RANK", "0") == "0":
        print(f"notice: {message}", file=sys.stderr, flush=True)


def disk_problem(error: BaseException | None) -> str | None:
    """What the system said when a disk was full or unwritable; None for every other error.

    Libraries written in Rust, and torch's sharded saves, hand the system's error number on as text. torch.save hands
    nothing on: whatever the reason, it ends in this one message.
    """
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if found := re.search(r"(?:\(os error |\[Errno )(\d+)", str(error)):
            number = int(found.group(1))
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            return os.strerror(number)
        if "iostream error" in str(error):
            return "a file can't be written in full"
        error = error.__context__
    return None


def run_main(main: Callable[[], Any]) -> None:
    """Run a script's `main`; an expected failure ends in one `error: …` line on standard error and its exit code.

    Under torchrun only local rank 0 prints, so that one mistake is one line.
    """
    try:
        main()
        return
    except ExpectedError as error:
        message, exit_code = str(error), error.exit_code
    except KeyboardInterrupt:
        message, exit_code = "interrupted", ExitCode.INTERRUPTED
    except OSError as error:
        if not (problem := disk_problem(error)):
            raise
        message = f"{problem}: {error.filename or 'output'}; free some space or choose another directory"
        exit_code = ExitCode.DISK
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(exit_code)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[io.IOBase]:
    """Open a file that replaces `path` only when the block ends without an exception: whole or not at all.

    Written beside `path` (same file system), synced, renamed, and the rename synced.
    """
    path = os.path.realpath(path)
    directory = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=directory, prefix=f".{os.path.basename(path)}.", suffix=".tmp")
    try:
        with open(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            # mkstemp makes files private; a new file gets the usual mode, a replaced one keeps its own.
            os.fchmod(handle, os.stat(path).st_mode & 0o777 if os.path.exists(path) else 0o666 & ~_umask())
            yield file
            file.flush()
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_directory(directory)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_directory(directory: str | os.PathLike) -> None:
    """Make renames and new names in a directory survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def jdump(obj: Any, f: Any, mode: str = "w", indent: int | None = 4, default: Callable = str) -> None:
    """Write `obj` as JSON (a str as it is) to a path, whole or not at all, or to an open file."""
    text = obj if isinstance(obj, str) else json.dumps(obj, indent=indent, default=default)
    if hasattr(f, "write"):
        f.write(text)
    elif mode == "w":
        with atomic_write(f) as file:
            file.write(text)
    else:
        with open(f, mode, encoding="utf-8") as file:
            file.write(text)


def jload(f: Any, mode: str = "r") -> Any:
    """Read JSON from a path or an open file."""
    if hasattr(f, "read"):
        return json.load(f)
    with open(f, mode, encoding=None if "b" in mode else "utf-8") as file:
        return json.load(file)


# The pad token that the 2023 recipe adds to LLaMA (its 32,001st row), and what it gave tokenizers without the others.
DEFAULT_SPECIAL_TOKENS = {"pad_token": "[PAD]", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}


def complete_tokenizer(tokenizer: Any, pad_token: str | None = None, grow: bool = True) -> int:
    """Give the tokenizer the special tokens that it lacks; returns how many entries its vocabulary gained.

    `pad_token` names an existing token to pad with, which leaves the vocabulary as it is; without `grow`, one that the
    tokenizer has is chosen and nothing is added. Raises ExpectedError if the vocabulary has no such token.
    """
    if not grow:
        pad_token = pad_token or tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
        if not (pad_token and tokenizer.eos_token):
            raise ExpectedError("the tokenizer has no end-of-text token, and none can be added here", ExitCode.USAGE)
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise ExpectedError(
                f"--pad_token {pad_token!r} is not in the tokenizer's vocabulary; name an existing token such as "
                f"{tokenizer.unk_token or tokenizer.eos_token!r}, or leave the flag out to add [PAD]",
                ExitCode.USAGE,
            )
        tokenizer.pad_token = pad_token
    if not grow:
        return 0
    missing = {name: token for name, token in DEFAULT_SPECIAL_TOKENS.items() if not getattr(tokenizer, name)}
    return tokenizer.add_special_tokens(missing)


def resize_embeddings(model: Any, tokenizer: Any, num_new_tokens: int) -> None:
    """Make room for the tokenizer's newest tokens; their embedding rows become the mean of the rows before them.

    A matrix that already has rows to spare (OPT pads its own to a round number) keeps its size. Tied input and output
    embeddings are one matrix, and the second assignment changes nothing.
    """
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if num_new_tokens == 0:
        return
    first = len(tokenizer) - num_new_tokens
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        with _gathered(embeddings.weight):  # (V, H)
            weight = embeddings.weight.data
            if len(weight):
                weight[first : len(tokenizer)] = weight[:first].mean(dim=0, keepdim=True)


def _gathered(parameter: Any) -> contextlib.AbstractContextManager:
    """ZeRO-3 shards parameters as it loads them; in this context each is whole, and what rank 0 writes is kept."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    from deepspeed.zero import GatheredParameters

    return GatheredParameters(parameter, modifier_rank=0)


def smart_tokenizer_and_embedding_resize(special_tokens_dict: dict[str, str], tokenizer: Any, model: Any) -> None:
    """Add special tokens to the tokenizer and mean-initialised rows for those that are new to the model."""
    resize_embeddings(model, tokenizer, tokenizer.add_special_tokens(special_tokens_dict))


def from_pretrained(loader: Any, name: str, **options: Any) -> Any:
    """`loader.from_pretrained`; a wrong name, a torn file, no network or a missing package become one line."""
    from safetensors import SafetensorError

    try:
        return loader.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ExpectedError(f"--model_name_or_path {name} can't be loaded: {reason}", ExitCode.USAGE)


@dataclasses.dataclass
class OpenAIDecodingArguments:
    """How the teacher decodes; names and defaults of 2023. `stream` has no effect: answers are collected whole."""

    max_tokens: int = 1800
    temperature: float = 0.2
    top_p: float = 1.0
    n: int = 1
    stream: bool = False
    stop: Sequence[str] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    suffix: str | None = None  # legacy completions only, like echo
    logprobs: int | None = None
    echo: bool = False


class Completion(dict):
    """A choice: `text`, `finish_reason`, `total_tokens`, `index` and `logprobs`, readable as attributes and as keys."""

    __getattr__ = dict.__getitem__


def openai_completion(
    prompts: str | Sequence[str] | Sequence[dict[str, str]] | dict[str, str],
    decoding_args: OpenAIDecodingArguments,
    model_name: str | None = None,
    sleep_time: float = 2,
    batch_size: int = 1,
    max_instances: int = sys.maxsize,
    max_batches: int = sys.maxsize,
    return_text: bool = False,
    api: str = "chat",
    base_url: str | None = None,
    max_attempts: int = 10,
    **decoding_kwargs: Any,
) -> Any:
    """Ask an OpenAI-compatible server to answer prompts, as the function of this name did in 2023.

    Args:
        prompts: one prompt or a list; a prompt is a text, or with api="chat" a message {"role", "content"}.
        decoding_args: see OpenAIDecodingArguments.
        model_name: None for a current default.
        sleep_time: seconds before the first retry; doubles with each further one, up to 60.
        batch_size: prompts asked at the same time (each in a request of its own: many servers take no lists).
        max_instances, max_batches: only the first max_instances, or max_batches * batch_size, prompts are answered.
        return_text: texts in place of Completions.
        api: "chat" or "completions" (legacy, for base models).
        base_url: the server; None for OPENAI_BASE_URL, or OpenAI.
        max_attempts: attempts at one request.
        decoding_kwargs: more body fields, such as logit_bias; left out where the server says it does not take them.

    Returns:
        A list with one Completion for each prompt, or for n > 1 a list of n Completions for each; for a single prompt
        its item alone.

    Raises ExpectedError where asking again cannot help, or after max_attempts.
    """
    # Imported here: completions builds on this module, and whoever only reads JSON needs no API client.
    from completions import complete_prompts

    single = isinstance(prompts, (str, dict))
    prompts = [prompts] if single else list(prompts)
    prompts = prompts[: min(max_instances, max_batches * batch_size)]
    answers = complete_prompts(
        prompts,
        batch_size,
        decoding_args.n,
        model_name=model_name,
        decoding=decoding_args,
        api=api,
        base_url=base_url,
        max_attempts=max_attempts,
        sleep_time=sleep_time,
        **decoding_kwargs,
    )
    results = [[choice["text"] if return_text else Completion(choice) for choice in choices] for choices in answers]
    if decoding_args.n == 1:
        results = [choices[0] for choices in results]
    return results[0] if single else results
