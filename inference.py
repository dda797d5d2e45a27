"""Ask a tuned model: one instruction, a file of them, a prompt loop, or a web page.

    python inference.py --model_name_or_path out --instruction "Name the four seasons."
    python inference.py --model_name_or_path out                                                # a prompt loop
    python inference.py --model_name_or_path out --data_path questions.json --output_path answers.json
    python inference.py --model_name_or_path out --serve                                        # http://127.0.0.1:7860

Standard output carries answers and nothing else.
"""

import argparse
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from alpaca.answering.file import answer_file
from alpaca.answering.model import Reader, Sampling, answer, load_model, load_reader, stream
from alpaca.common import ExitCode, ExpectedError, run_main


def parse_arguments() -> argparse.Namespace:
    """Raises ExpectedError (exit 2) for anything wrong with the command line, before anything is loaded."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="python inference.py --model_name_or_path DIR [FLAG …]",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=120),
        allow_abbrev=False,
    )

    def fail(message: str) -> None:
        raise ExpectedError(f"{message}; python inference.py --help lists the flags", ExitCode.USAGE)

    parser.error = fail
    parser.add_argument("--model_name_or_path", required=True, help="model or LoRA adapter: a directory or a Hub id")

    add = parser.add_argument_group("what to answer (none of these: a prompt loop)").add_argument
    add("--instruction", help="answer this instruction and exit")
    add("--input", default="", help="the text that --instruction is about")
    add(
        "--data_path",
        help="answer a file of {instruction, input} (.json, .jsonl, .csv …); output, if there, is not read",
    )
    add("--output_path", help="where --data_path's answers go: a JSON list of {instruction, input, output, generator}")
    add(
        "--merge_input",
        default="False",
        choices=["True", "False"],
        help="True: write each input into its instruction, as AlpacaEval, which reads no input, wants it (%(default)s)",
    )
    add("--serve", action="store_true", help="open a web page on 127.0.0.1; needs gradio")
    add("--port", type=int, default=7860, help="the page's port (%(default)s)")

    add = parser.add_argument_group("answers").add_argument
    add("--max_new_tokens", type=int, default=512, help="longest answer, in tokens (%(default)s)")
    add("--temperature", type=float, default=0.0, help="0: the likeliest token; 1: as the model says (%(default)s)")
    add(
        "--top_p",
        type=float,
        default=1.0,
        help="sample of the likeliest tokens of this total probability (%(default)s)",
    )
    add("--seed", type=int, default=42, help="seed of the sampling (%(default)s)")

    add = parser.add_argument_group("speed and memory").add_argument
    add("--batch_size", type=int, default=8, help="instructions of a file answered at once (%(default)s)")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    add("--dtype", default="auto", choices=dtypes, help="auto: as saved (%(default)s)")
    add(
        "--device",
        default="auto",
        choices=["auto", "cpu", "cuda", "mps"],
        help="auto: a GPU if there is one (%(default)s)",
    )
    args = parser.parse_args()

    args.merge_input = args.merge_input == "True"
    if args.merge_input and args.data_path is None:
        fail("--merge_input goes with --data_path")
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
    if args.device == "mps" and not torch.backends.mps.is_available():
        fail("--device mps: PyTorch sees no Apple GPU here")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return args


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
        print(flush=True)
        print("stopped", file=sys.stderr)
    finally:
        stopped.set()


# A web page -----------------------------------------------------------------------------------------------------------


def serve(args: argparse.Namespace, sampling: Sampling) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        from alpaca import web_page
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
