"""Ask a tuned model: one instruction, a file of them, a prompt loop, or a web page.

    python inference.py --model_name_or_path out --instruction "Name the four seasons."
    python inference.py --model_name_or_path out                                                # a prompt loop
    python inference.py --model_name_or_path out --data_path questions.json --output_path answers.json
    python inference.py --model_name_or_path out --serve                                        # http://127.0.0.1:7860

Standard output carries answers and nothing else. `python inference.py --help` lists every flag.
"""

import argparse
import fcntl
import hashlib
import json
import os
import queue
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import torch
import transformers
from tqdm import tqdm

from dataset import load_examples
from utils import ExitCode, ExpectedError, atomic_write, format_prompt, from_pretrained, jload, notice, run_main


@dataclass
class Sampling:
    """How an answer's tokens are chosen. Temperature 0 takes the likeliest token each time (greedy decoding)."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `generate`. top_k is off: it would otherwise be 50 without anyone asking."""
        if self.temperature < 0.001:  # 0, or so little that logits divided by it overflow
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
        }


def parse_arguments() -> argparse.Namespace:
    """Raises ExpectedError (exit 2) for anything wrong with the command line, before anything is loaded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    def fail(message: str) -> None:
        raise ExpectedError(f"{message}; python inference.py --help lists the flags", ExitCode.USAGE)

    parser.error = fail
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="model or LoRA adapter: a directory or a Hub id")
    add("--instruction", help="answer this instruction and exit; without it (and without a file): a prompt loop")
    add("--input", default="", help="the text that --instruction is about")
    add("--data_path", help="answer a .json or .jsonl file of {instruction, input}; output, if there, is not read")
    add("--output_path", help="where --data_path's answers go: a JSON list of {instruction, input, output, generator}")
    add("--batch_size", type=int, default=8, help="instructions of a file answered at once (%(default)s)")
    add("--serve", action="store_true", help="open a web page on 127.0.0.1; needs gradio")
    add("--port", type=int, default=7860, help="the page's port (%(default)s)")
    add("--max_new_tokens", type=int, default=512, help="longest answer, in tokens (%(default)s)")
    add("--temperature", type=float, default=0.0, help="0: the likeliest token; 1: as the model says (%(default)s)")
    add(
        "--top_p",
        type=float,
        default=1.0,
        help="sample among the likeliest tokens of this total probability (%(default)s)",
    )
    add("--seed", type=int, default=42, help="seed of the sampling (%(default)s)")
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: as saved (%(default)s)",
    )
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: a GPU if there is one (%(default)s)")
    args = parser.parse_args()

    if args.instruction is not None and not args.instruction.strip():
        fail("--instruction is empty")
    if args.input and args.instruction is None:
        fail("--input goes with --instruction")
    if (args.data_path is None) != (args.output_path is None):
        fail("--data_path and --output_path go together")
    if (args.instruction is not None) + (args.data_path is not None) + args.serve > 1:
        fail("--instruction, --data_path and --serve are three ways to ask; give one of them")
    for name, low, high in (
        ("max_new_tokens", 1, 1_000_000),
        ("batch_size", 1, 100_000),
        ("temperature", 0, 100),
        ("seed", 0, 2**63 - 1),
        ("port", 1, 65535),
    ):
        if not low <= getattr(args, name) <= high:
            fail(f"--{name} {getattr(args, name)} is not between {low} and {high}")
    if not 0 < args.top_p <= 1:
        fail(f"--top_p {args.top_p:g} is not above 0 and at most 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: PyTorch sees no GPU here")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


# Loading --------------------------------------------------------------------------------------------------------------

WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
TOKENIZERS = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"}


def check_directory(path: str) -> None:
    """Say in one line what a model directory lacks, where the libraries would guess or answer with a traceback."""
    if not os.path.isdir(path):
        return  # a Hub id, or a wrong name, of which from_pretrained says so
    names = set(os.listdir(path))
    is_adapter = "adapter_config.json" in names
    stem = "adapter_model" if is_adapter else ("model", "pytorch_model")
    if not is_adapter and "config.json" not in names:
        lacks = "no model: neither config.json nor adapter_config.json"
    elif not any(name.startswith(stem) and name.endswith(WEIGHTS) for name in names):
        lacks = "no weights (model*.safetensors or pytorch_model*.bin; of an adapter adapter_model.safetensors)"
    elif not is_adapter and not names & TOKENIZERS:
        lacks = "no tokenizer (tokenizer.json or tokenizer.model)"
    elif "weight_diff.json" in names and jload(os.path.join(path, "weight_diff.json")).get("kind") == "diff":
        lacks = "a weight diff and no model: python weight_diff.py recover makes one of it"
    else:
        return
    raise ExpectedError(
        f"--model_name_or_path {path} holds {lacks}; give the --output_dir of a finished training run, or a Hub id",
        ExitCode.USAGE,
    )


@dataclass
class Reader:
    """A tokenizer, and how many tokens its model can read and write together (None: no limit is known)."""

    tokenizer: Any
    context_length: int | None

    def encode(self, example: dict[str, str], max_new_tokens: int) -> list[int]:
        """The token ids of an example's prompt, as in training. Raises ExpectedError where the model can't read it."""
        if not example["instruction"].strip():
            raise ExpectedError("the instruction is empty; say what to do", ExitCode.DATA)
        prompt = format_prompt(example)
        if not prompt.isascii() and any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ExpectedError("the text is not valid Unicode; retype it", ExitCode.DATA)
        ids = self.tokenizer(prompt, return_token_type_ids=False)["input_ids"]
        if self.context_length is not None and len(ids) + max_new_tokens > self.context_length:
            raise ExpectedError(
                f"the prompt's {len(ids):,} tokens and an answer of up to {max_new_tokens:,} do not fit into the "
                f"{self.context_length:,} tokens that the model can hold; shorten the text or allow fewer new tokens",
                ExitCode.DATA,
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        """The answer in these token ids, which end at the first end-of-sequence token."""
        if self.tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(self.tokenizer.eos_token_id)]
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def load_reader(path: str) -> Reader:
    """Tokenizer and context length of a model or adapter: quick, and enough to check every prompt."""
    check_directory(path)
    base = path
    if os.path.isfile(os.path.join(path, "adapter_config.json")):
        import peft

        base = from_pretrained(peft.PeftConfig, path).base_model_name_or_path
        if not TOKENIZERS & set(os.listdir(path)):
            path = base
    # Length is checked by `encode`; the tokenizer's own limit is training's, and would only warn.
    tokenizer = from_pretrained(transformers.AutoTokenizer, path, padding_side="left", model_max_length=sys.maxsize)
    if not tokenizer.eos_token:
        raise ExpectedError(
            f"--model_name_or_path {path}: the tokenizer has no end-of-sequence token, so no answer would end; "
            "give a model tuned by train.py",
            ExitCode.USAGE,
        )
    if not tokenizer.pad_token:
        tokenizer.pad_token = tokenizer.eos_token  # stands left of the prompts, where it is masked
    config = from_pretrained(transformers.AutoConfig, base).get_text_config()
    return Reader(tokenizer, getattr(config, "max_position_embeddings", None))


def load_model(args: argparse.Namespace, tokenizer: Any) -> Any:
    """The model, on its device, ready to generate as `Sampling` says and not as its own generation_config does."""
    path = args.model_name_or_path
    options = {"dtype": args.dtype if args.dtype == "auto" else getattr(torch, args.dtype), "device_map": args.device}
    if os.path.isfile(os.path.join(path, "adapter_config.json")):
        import peft

        model = from_pretrained(peft.AutoPeftModelForCausalLM, path, **options)
    else:
        model, report = from_pretrained(transformers.AutoModelForCausalLM, path, output_loading_info=True, **options)
        if missing := sorted(report["missing_keys"]):  # the library makes them up at random
            raise ExpectedError(
                f"--model_name_or_path {path} lacks {len(missing)} of the model's tensors: {', '.join(missing[:3])}; "
                "copy or download it again",
                ExitCode.USAGE,
            )
    model.eval()
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    return model


# Answering ------------------------------------------------------------------------------------------------------------


def answer(model: Any, reader: Reader, prompts: list[list[int]], sampling: Sampling) -> list[str]:
    """Answer a batch of prompts (token ids). Greedy answers do not depend on the company a prompt is in."""
    batch = reader.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)  # (B, T), left-padded
    torch.manual_seed(sampling.seed)
    with torch.inference_mode():
        ids = model.generate(**batch, **sampling.options())  # (B, T + new)
    return [reader.decode(row) for row in ids[:, batch["input_ids"].shape[1] :].tolist()]


_one_at_a_time = threading.Lock()  # an answer that was stopped still finishes its token; the next one waits for that


def stream(
    model: Any, reader: Reader, prompt: list[int], sampling: Sampling, stopped: threading.Event
) -> Iterator[str]:
    """Yield the answer so far, again after each token; the last is what `answer` gives. Setting `stopped` ends it."""
    progress = queue.SimpleQueue()  # the answer so far, after each token; then None, or the exception that ended it
    input_ids = torch.tensor([prompt], device=model.device)  # (1, T)

    def after_token(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        progress.put(reader.decode(ids[0, len(prompt) :].tolist()))
        return torch.tensor([stopped.is_set()], device=ids.device)

    def generate() -> None:
        try:
            with _one_at_a_time, torch.inference_mode():
                torch.manual_seed(sampling.seed)
                model.generate(
                    input_ids=input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    stopping_criteria=[after_token],
                    **sampling.options(),
                )
            progress.put(None)
        except BaseException as error:
            progress.put(error)

    threading.Thread(target=generate).start()
    text = ""
    try:
        while (news := progress.get()) is not None:
            if isinstance(news, BaseException):
                raise news
            text = news
            if not text.endswith("\ufffd"):  # otherwise a character of which not all bytes are there yet
                yield text
        if text.endswith("\ufffd"):
            yield text
    finally:
        stopped.set()


# A file ---------------------------------------------------------------------------------------------------------------


def answer_file(args: argparse.Namespace, sampling: Sampling) -> None:
    """Answer every example of --data_path into --output_path; run again after an interruption, go on where it stopped.

    Answers are appended to OUTPUT.partial.jsonl and synced, a batch at a time. Batches are the same in every run, and
    each starts from the seed, so that an interrupted run ends with the same bytes as an uninterrupted one.
    """
    examples = load_examples(args.data_path, need_output=False)
    if os.path.exists(args.output_path) and not os.path.exists(partial_path(args)):
        raise ExpectedError(
            f"--output_path {args.output_path} exists; remove it or choose another name", ExitCode.USAGE
        )
    reader = load_reader(args.model_name_or_path)
    prompts = encode_all(reader, examples, args)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))  # longest first: little padding
    batches = [order[start : start + args.batch_size] for start in range(0, len(order), args.batch_size)]

    with open_partial(args) as partial:
        answers = read_partial(partial, settings_of(args, sampling, examples), args)
        to_do = [batch for batch in batches if not answers.keys() >= set(batch)]
        if to_do:
            model = load_model(args, reader.tokenizer)
        with tqdm(total=len(examples), initial=len(answers), unit="answer", disable=None) as bar:
            for batch in to_do:
                texts = answer(model, reader, [prompts[index] for index in batch], sampling)
                lines = [json.dumps([index, text]) for index, text in zip(batch, texts, strict=True)]
                partial.write("".join(line + "\n" for line in lines).encode())
                partial.flush()
                os.fsync(partial.fileno())
                bar.update(len(set(batch) - answers.keys()))
                answers.update(zip(batch, texts, strict=True))

        path = args.model_name_or_path
        generator = os.path.basename(os.path.abspath(path)) if os.path.isdir(path) else path
        rows = [{**example, "output": answers[index], "generator": generator} for index, example in enumerate(examples)]
        with atomic_write(args.output_path) as file:
            json.dump(rows, file, indent=2, ensure_ascii=False)
        os.unlink(partial_path(args))


def encode_all(reader: Reader, examples: list[dict[str, str]], args: argparse.Namespace) -> list[list[int]]:
    """The prompt of every example; raises ExpectedError naming the first five that the model can't read."""
    prompts, faults = [], []
    for index, example in enumerate(tqdm(examples, desc="reading", unit="prompt", leave=False, disable=None)):
        try:
            prompts.append(reader.encode(example, args.max_new_tokens))
        except ExpectedError as error:
            faults.append(f"record {index}: {error}")
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ExpectedError(f"{args.data_path}: {'; '.join(faults[:5])}{more}", ExitCode.DATA)
    return prompts


def partial_path(args: argparse.Namespace) -> str:
    return f"{args.output_path}.partial.jsonl"


def open_partial(args: argparse.Namespace) -> BinaryIO:
    """Open the side file, made if need be, locked against a second run."""
    path = partial_path(args)
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        partial = open(path, "a+b")
    except OSError as error:
        raise ExpectedError(
            f"--output_path {args.output_path} can't be written: {error.strerror}; choose another place", ExitCode.DISK
        )
    try:
        fcntl.flock(partial, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        partial.close()
        raise ExpectedError(f"another run is writing {path}; wait for it or choose another name", ExitCode.LOCKED)
    return partial


def settings_of(args: argparse.Namespace, sampling: Sampling, examples: list[dict[str, str]]) -> dict[str, Any]:
    """What answers depend on: a run may only go on with a side file that has the same."""
    path = args.model_name_or_path
    changed = max(entry.stat().st_mtime_ns for entry in os.scandir(path)) if os.path.isdir(path) else None
    questions = json.dumps([[example["instruction"], example["input"]] for example in examples])
    return {
        "model_name_or_path": path,
        "model_changed": changed,
        "questions_sha256": hashlib.sha256(questions.encode()).hexdigest(),
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "device": args.device,
        **asdict(sampling),
    }


def read_partial(partial: BinaryIO, settings: dict[str, Any], args: argparse.Namespace) -> dict[int, str]:
    """Answers of an earlier run, by example; a line torn by a crash is cut off. A file without any gets its heading."""
    partial.seek(0)
    whole = partial.read().rpartition(b"\n")[0]
    try:
        begun_with, *lines = [json.loads(line) for line in whole.splitlines()] or [settings]
        answers = dict(lines)
        differ = [name for name in settings if begun_with.get(name) != settings[name]]
    except (ValueError, TypeError, AttributeError):
        raise ExpectedError(f"{partial_path(args)} is damaged; remove it to start again", ExitCode.DATA)
    if not answers:
        partial.truncate(0)
        partial.write(json.dumps(settings).encode() + b"\n")
        return {}
    if differ:
        raise ExpectedError(
            f"{partial_path(args)} was begun with other settings ({', '.join(differ)}); give the same ones to go on, "
            "or remove it to start again",
            ExitCode.USAGE,
        )
    partial.truncate(len(whole) + 1)
    notice(f"{len(answers)} answers are there already, from {partial_path(args)}")
    return answers


# A prompt loop --------------------------------------------------------------------------------------------------------

HELP = """Type an instruction and press Enter. Ctrl-C stops an answer; the arrow keys bring back earlier instructions.
  :input   the text that the next instruction is about: type or paste it, and end it with an empty line
  :help    this
  :quit    leave; so does Ctrl-D"""


def prompt_loop(model: Any, reader: Reader, sampling: Sampling) -> None:
    """Read instructions and stream answers until :quit or the end of the input."""
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()  # else input() would write its prompt among the answers
    sys.stdin.reconfigure(errors="replace")
    if on_terminal:
        import readline  # noqa: F401  gives input() line editing and history
    if sys.stdin.isatty():
        print(HELP, file=sys.stderr)
    text_input = ""
    while True:
        try:
            line = input("\n> " if on_terminal else "").strip()
            if line == ":quit":
                return
            elif line == ":help":
                print(HELP, file=sys.stderr)
            elif line == ":input":
                text_input = "\n".join(iter(lambda: input(". " if on_terminal else ""), ""))
            elif line.startswith(":"):
                print(f"no command {line.split()[0]}; :help lists them", file=sys.stderr)
            elif line:
                example = {"instruction": line, "input": text_input}
                text_input = ""
                print_stream(model, reader, example, sampling)
        except ExpectedError as error:  # too long
            print(f"error: {error}", file=sys.stderr)
        except EOFError:
            return
        except KeyboardInterrupt:  # at the prompt: a fresh line, as a shell gives
            print(file=sys.stderr)


def print_stream(model: Any, reader: Reader, example: dict[str, str], sampling: Sampling) -> None:
    shown, stopped = "", threading.Event()
    prompt = reader.encode(example, sampling.max_new_tokens)
    try:
        for text in stream(model, reader, prompt, sampling, stopped):
            print(text[len(shown) :], end="", flush=True)
            shown = text
        print(flush=True)
    except KeyboardInterrupt:
        stopped.set()
        print(flush=True)
        print("stopped", file=sys.stderr)


# A web page -----------------------------------------------------------------------------------------------------------


def serve(args: argparse.Namespace, sampling: Sampling) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        import web_page
    except ImportError as error:
        raise ExpectedError(
            f"--serve needs gradio ({error}); pip install gradio, or pip install -r requirements-dev.txt",
            ExitCode.USAGE,
        )
    web_page.check_port(args.port)
    reader = load_reader(args.model_name_or_path)
    model = load_model(args, reader.tokenizer)

    def ask(example: dict[str, str], wanted: Sampling, stopped: threading.Event) -> Iterator[str]:
        return stream(model, reader, reader.encode(example, wanted.max_new_tokens), wanted, stopped)

    web_page.serve(ask, sampling, reader.context_length or 4096, args.port)


def main() -> None:
    args = parse_arguments()
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        if args.data_path is not None:
            answer_file(args, sampling)
        elif args.serve:
            serve(args, sampling)
        else:
            reader = load_reader(args.model_name_or_path)
            example = {"instruction": args.instruction, "input": args.input}
            prompt = reader.encode(example, args.max_new_tokens) if args.instruction is not None else None
            model = load_model(args, reader.tokenizer)
            if prompt is None:
                prompt_loop(model, reader, sampling)
            else:
                print(answer(model, reader, [prompt], sampling)[0])
    except torch.OutOfMemoryError:
        raise ExpectedError(
            "the GPU's memory is full; lower --batch_size or --max_new_tokens, or give --dtype bfloat16",
            ExitCode.USAGE,
        )


if __name__ == "__main__":
    run_main(main)
