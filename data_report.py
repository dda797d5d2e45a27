"""Look at a data set before training on it: one web page with figures, and the same figures as JSON.

    python data_report.py --data_path alpaca_data.json --output_dir report
    python data_report.py --data_path mine.json --compare alpaca_data.json --against eval_tasks.jsonl \\
        --tokenizer huggyllama/llama-7b --output_dir report

writes report/index.html (nothing else is needed to read it), report/report.json and report/verb_noun.png. Row numbers
count from 0. Charts need matplotlib (pip install -r requirements-dev.txt). Verbs and objects need spaCy and its model
(pip install spacy && python -m spacy download en_core_web_sm); without them the rest of the report is made.
"""

import argparse
import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alpaca.common import (
    ROOT,
    ExitCode,
    ExpectedError,
    atomic_write,
    jdump,
    keep_inputs,
    make_output_directory,
    run_main,
)
from alpaca.data.tasks import load_tasks


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data_path", required=True, help=".json, .jsonl, .csv or .parquet file of examples, or a Hub data set")
    add("--output_dir", required=True, help="directory for index.html, report.json and verb_noun.png")
    add("--compare", metavar="DATA_PATH", help="a second data set, shown beside the first (default: none)")
    add("--against", metavar="FILE", help="evaluation tasks that must not be in the data (default: none)")
    add("--seed_tasks_path", metavar="FILE", default=str(ROOT / "seed_tasks.jsonl"), help="default: seed_tasks.jsonl")
    add("--tokenizer", metavar="DIR_OR_ID", help="count tokens with this tokenizer as well (default: words only)")
    add("--model_max_length", type=int, default=512, help="tokens after which training cuts (default: 512)")
    add("--parser", metavar="DIR_OR_NAME", help="spaCy model (default: en_core_web_sm, where it is installed)")
    add("--verb_noun_png", metavar="FILE", help="where the sunburst goes (default: OUTPUT_DIR/verb_noun.png)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.model_max_length < 1:
        message = f"--model_max_length {args.model_max_length} is no length; give 1 token or more"
        raise ExpectedError(message, ExitCode.USAGE)
    page = import_page()
    from alpaca.data.examples import load_examples
    from alpaca.report import measures, verb_noun

    index, figures = (os.path.join(args.output_dir, name) for name in ("index.html", "report.json"))
    png = args.verb_noun_png or os.path.join(args.output_dir, "verb_noun.png")
    inputs = {name: getattr(args, name) for name in ("data_path", "compare", "against", "seed_tasks_path")}
    for flag, path in (("output_dir", index), ("output_dir", figures), ("verb_noun_png", png)):
        keep_inputs({flag: path}, inputs)
    make_output_directory(args.output_dir, "output_dir")
    data_sets = {args.data_path: load_examples(args.data_path)}
    if args.compare:
        with naming("--compare"):
            data_sets[args.compare] = load_examples(args.compare)
    seeds = load_tasks(args.seed_tasks_path, "--seed_tasks_path")
    tasks = load_tasks(args.against, "--against") if args.against else None
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    parser = verb_noun.load_parser(args.parser)
    if args.verb_noun_png and not parser:
        raise ExpectedError(f"--verb_noun_png needs spaCy and its English model; {verb_noun.INSTALL}", ExitCode.USAGE)

    lengths = {path: measures.measure_lengths(examples, tokenizer) for path, examples in data_sets.items()}
    reports = []
    for path, examples in data_sets.items():
        instructions = [example["instruction"] for example in examples]
        histograms = {
            field: measures.histogram(values, measures.shared_bins([measured[field] for measured in lengths.values()]))
            for field, values in lengths[path].items()
        }
        report = {
            "name": os.path.basename(path.rstrip("/")),
            "data_path": path,
            "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest() if os.path.isfile(path) else None,
            "rows": len(examples),
            "rows_with_input": sum(bool(example["input"]) for example in examples),
            "lengths": histograms,
            "outputs": measures.inspect_outputs([example["output"] for example in examples]),
            "duplicates": measures.find_duplicates(examples),
            "near_duplicates": measures.near_duplicates(instructions),
            "seeds": measures.similarity_to_seeds(examples, seeds),
            "root_verbs": verb_noun.count_verbs(instructions, parser),
        }
        if tokenizer:
            report["tokens"] = measures.token_figures(lengths[path], args.model_max_length)
        if tasks:
            report["contamination"] = measures.contamination(examples, tasks)
        reports.append(report)
    if len({report["name"] for report in reports}) < len(reports):  # two files of the same name
        reports = [report | {"name": report["data_path"]} for report in reports]

    settings = {key: value for key, value in vars(args).items() if key not in ("output_dir", "verb_noun_png")}
    jdump({"settings": settings, "data_sets": reports}, figures)
    with atomic_write(index) as file:
        file.write(page.build(reports, list(data_sets.values()), settings))
    if parser:
        with atomic_write(png, "wb") as file:
            page.sunburst_png(reports[0], file)
    print(f"wrote {index}, report.json" + (f" and {png}" if parser else ""))


def import_page() -> Any:
    """The module that draws; it needs matplotlib, which nothing else in this project does."""
    try:
        from alpaca.report import page
    except ImportError as error:
        raise ExpectedError(
            f"charts need matplotlib ({error}); pip install matplotlib, or pip install -r requirements-dev.txt",
            ExitCode.USAGE,
        )
    return page


@contextlib.contextmanager
def naming(flag: str) -> Iterator[None]:
    """Errors of shared functions name the flag that training uses; here they name the flag of this script."""
    try:
        yield
    except ExpectedError as error:
        raise ExpectedError(re.sub("--(data_path|model_name_or_path)", flag, str(error)), error.exit_code)


def load_tokenizer(name: str) -> Any:
    from alpaca.data.tokenizers import TokenizerLoader
    from alpaca.training.models import from_pretrained
    from alpaca.training.special_tokens import complete_tokenizer

    with naming("--tokenizer"):
        tokenizer = from_pretrained(TokenizerLoader, name)
    complete_tokenizer(tokenizer)
    tokenizer.model_max_length = 1 << 30  # true lengths: the report says what a limit would cut
    return tokenizer


if __name__ == "__main__":
    run_main(main)
