"""What can be said of a model without a judge: its loss on references, and its own answers beside them.

Everything computed is kept in the output directory as it comes: answers by inference's file answering, losses a batch
at a time. An interrupted run goes on, and ends with the same bytes.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from alpaca.answering.file import answer_file, settings_of
from alpaca.answering.model import Reader, Sampling, load_model, load_reader
from alpaca.common import ExitCode, ExpectedError, jdump, jload
from alpaca.data.examples import IGNORE_INDEX, load_examples, tokenize
from alpaca.data.files import read_records
from alpaca.data.similarity import TokenEncoder, rouge_l
from alpaca.evaluation.figures import IFEVAL, MEASURED, figures_of
from alpaca.prompts import format_prompt
from alpaca.teacher.request_log import Log

WRITTEN = ("settings.json", "answers.json", "ifeval_questions.json", "ifeval_answers.json", "rows.json", "report.json")
SHORTEST_REPEATED = 4  # words of an instruction or input that an answer is said to repeat
INSTALL_IFEVAL = "pip install if-verifiable"


def measure_model(args: argparse.Namespace, sampling: Sampling, ifeval_path: str | None, ifeval: bool) -> dict:
    """Measure into --output_dir, which the caller has locked; → the figures, as in report.json."""
    examples = load_examples(args.data_path, need_output=False)
    samples = read_ifeval(ifeval_path) if ifeval else []
    settings = settings_of(args, sampling, examples) | {
        "data_path": args.data_path,
        "references_sha256": _sha256([example["output"] for example in examples]),
        "ifeval_sha256": _sha256([sample["prompt"] for sample in samples]) if ifeval else None,
    }
    keep_settings(args.output_dir, settings)
    reader = load_reader(args.model_name_or_path)
    answers = answers_of(args, sampling, args.data_path, "answers")
    losses = losses_of(args, reader, examples)
    rows = [row_of(*of_row) for of_row in zip(examples, answers, losses, strict=True)]
    report = figures_of(rows, MEASURED)
    report["rouge_l"]["rows_not_scored"] = sum(row["reference"] != "" and row["rouge_l"] is None for row in rows)
    report["loss"]["rows_too_long"] = sum(row["reference"] != "" and row["loss"] is None for row in rows)
    kept = {"rows": rows}
    if ifeval:
        questions = os.path.join(args.output_dir, "ifeval_questions.json")
        jdump([{"instruction": sample["prompt"], "input": ""} for sample in samples], questions)
        given = answers_of(args, sampling, questions, "ifeval_answers")
        kept["ifeval"] = [ifeval_row(sample, answer["output"]) for sample, answer in zip(samples, given, strict=True)]
        report |= figures_of(kept["ifeval"], IFEVAL)
    jdump(kept, os.path.join(args.output_dir, "rows.json"))
    jdump(report, os.path.join(args.output_dir, "report.json"))
    return report


def _sha256(texts: list[str]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def keep_settings(output_dir: str, settings: dict[str, Any]) -> None:
    """A directory holds one measurement. Raises ExpectedError (USAGE) where it holds another, or something else."""
    path = os.path.join(output_dir, "settings.json")
    if os.path.exists(path):
        known = jload(path)
        if differ := [name for name, value in settings.items() if known.get(name) != value]:
            raise ExpectedError(
                f"{output_dir} holds a measurement with other settings ({', '.join(differ)}); give the same ones, or "
                "choose another --output_dir",
                ExitCode.USAGE,
            )
    elif unknown := sorted({*os.listdir(output_dir)} - {".lock"}):
        raise ExpectedError(
            f"{output_dir} holds {unknown[0]} and no measurement; choose an --output_dir that is empty", ExitCode.USAGE
        )
    else:
        jdump(settings, path)


def answers_of(args: argparse.Namespace, sampling: Sampling, data_path: str, name: str) -> list[dict[str, Any]]:
    """The model's answers to a file of questions, those of an earlier run included."""
    path = os.path.join(args.output_dir, f"{name}.json")
    if not os.path.exists(path) or os.path.exists(f"{path}.partial.jsonl"):
        answer_file(argparse.Namespace(**{**vars(args), "data_path": data_path, "output_path": path}), sampling, True)
    return jload(path)


# ----------------------------------------------------------------------------------------------------------------- loss


def losses_of(args: argparse.Namespace, reader: Reader, examples: list[dict[str, str]]) -> list[tuple | None]:
    """For each example the summed loss of its response in nats, and its tokens; None without a reference, or too long.

    Tokens and masks are those of training: prompt, response and end token, of which the prompt is masked.
    """
    found: dict[int, tuple[float, int]] = {}
    indices = [index for index, example in enumerate(examples) if example["output"]]
    texts = tokenize(
        [format_prompt(examples[index]) for index in indices],
        [examples[index]["output"] + reader.tokenizer.eos_token for index in indices],
        reader.tokenizer,
    )
    limit = reader.context_length or max(texts.lengths, default=0)
    order = sorted(range(len(indices)), key=lambda row: -texts.lengths[row])  # longest first: little padding
    order = [row for row in order if texts.prompt_lengths[row] < texts.lengths[row] <= limit]
    with contextlib.closing(Log(os.path.join(args.output_dir, "losses.jsonl"))) as log:
        found = {record["row"]: (record["loss"], record["tokens"]) for record in log.records}
        batches = [order[start : start + args.batch_size] for start in range(0, len(order), args.batch_size)]
        batches = [batch for batch in batches if not found.keys() >= {indices[row] for row in batch}]
        model = load_model(args, reader.tokenizer) if batches else None
        for batch in tqdm(batches, desc="loss", unit="batch", disable=None):
            ids = [torch.from_numpy(texts.ids[texts.starts[r] : texts.starts[r] + texts.lengths[r]]) for r in batch]
            losses = batch_losses(model, ids, [int(texts.prompt_lengths[row]) for row in batch])
            for row, loss in zip(batch, losses, strict=True):
                tokens = int(texts.lengths[row] - texts.prompt_lengths[row])
                if indices[row] not in found:
                    log.append({"row": indices[row], "loss": loss, "tokens": tokens})
                found[indices[row]] = loss, tokens
    return [found.get(index) for index in range(len(examples))]


@torch.inference_mode()
def batch_losses(model: Any, ids: list[torch.Tensor], prompt_lengths: list[int]) -> list[float]:
    """Token ids, (T_i,) each, and how many of each are the prompt's → the others' cross-entropy, summed, in nats."""
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).long()  # (B, T), right-padded
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    labels = padded.masked_fill(mask == 0, IGNORE_INDEX)
    for row, length in enumerate(prompt_lengths):
        labels[row, :length] = IGNORE_INDEX
    logits = model(input_ids=padded.to(model.device), attention_mask=mask.to(model.device)).logits  # (B, T, V)
    targets = labels.to(logits.device)
    return [
        float(F.cross_entropy(logits[row, :-1].float(), targets[row, 1:], ignore_index=IGNORE_INDEX, reduction="sum"))
        for row in range(len(ids))
    ]


# -------------------------------------------------------------------------------------------------------------- answers


def row_of(example: dict[str, str], answer: dict[str, Any], loss: tuple[float, int] | None) -> dict[str, Any]:
    """Everything measured of one example; None for what it does not have."""
    reference, text = example["output"], answer["output"]
    encode = TokenEncoder()
    tokens = encode(reference)
    one_word = len(reference.split()) == 1
    return {
        "instruction": example["instruction"],
        "input": example["input"],
        "reference": reference,
        "answer": text,
        "loss": loss and loss[0],
        "tokens": loss and loss[1],
        "bytes": len(reference.encode()) if reference else None,
        # Without a letter or digit in the reference there is nothing that these tokens could find.
        "rouge_l": float(rouge_l([encode(text)], [tokens])[0, 0]) if tokens else None,
        "exact_match": int(_word(text) == _word(reference)) if one_word else None,
        "ended": int(answer["ended"]),
        "repeats_prompt": int(repeats_prompt(example, text)),
        "empty": int(not text.strip()),
        "answer_characters": len(text),
        "reference_characters": len(reference) if reference else None,
    }


def _word(text: str) -> str:
    """ "Positive." and "positive" are one word; "-3" keeps its sign."""
    return re.sub(r"^[\s\"'“‘(*]+|[\s\"'”’)*.,;:!?]+$", "", text).casefold()


def repeats_prompt(example: dict[str, str], answer: str) -> bool:
    """Whether an answer goes on with the template, or says instruction or input again where the reference does not."""
    if "### Instruction:" in answer or "### Response:" in answer:
        return True
    said, wanted = (" ".join(text.casefold().split()) for text in (answer, example["output"]))
    parts = (" ".join(example[part].casefold().split()) for part in ("instruction", "input"))
    return any(part in said and part not in wanted for part in parts if len(part.split()) >= SHORTEST_REPEATED)


# --------------------------------------------------------------------------------------------------------------- IFEval


def read_ifeval(path: str | None) -> list[dict[str, Any]]:
    """IFEval's prompts and what can be verified of the answers (Zhou et al. 2023), from a file of theirs or the Hub."""
    try:
        import if_verifiable
    except ImportError as error:
        raise ExpectedError(f"--ifeval needs if-verifiable ({error}); {INSTALL_IFEVAL}", ExitCode.USAGE)
    if path:
        samples = read_records(path, "--ifeval_path")
    else:
        try:
            samples = [vars(sample) for sample in if_verifiable.get_eval_data("ifeval")]
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ExpectedError(
                f"google/IFEval can't be loaded ({reason}); give --ifeval_path a file of it", ExitCode.DATA
            )
    for number, sample in enumerate(samples):
        if not isinstance(sample, dict) or not {"prompt", "instruction_id_list", "kwargs"} <= sample.keys():
            message = f"{path}: record {number} lacks prompt, instruction_id_list or kwargs; give IFEval's own file"
            raise ExpectedError(message, ExitCode.DATA)
    return samples


def ifeval_row(sample: dict[str, Any], answer: str) -> dict[str, Any]:
    """How many of a prompt's instructions the answer follows, strictly and loosely, and whether all."""
    from if_verifiable import IFEvalSample, evaluate_output_for_sample

    fields = {name: sample.get(name) for name in ("key", "prompt", "instruction_id_list", "kwargs")}
    try:
        results, _ = evaluate_output_for_sample("ifeval", IFEvalSample(**fields), answer)
    except LookupError as error:  # NLTK's sentence splitter
        reason = " ".join(str(error).split())[:120]
        raise ExpectedError(
            f"IFEval needs NLTK's data ({reason}); python -m nltk.downloader punkt punkt_tab", ExitCode.USAGE
        )
    strict, loose = (sum(getattr(result, name) for result in results) for name in ("strict_pass", "loose_pass"))
    total = len(sample["instruction_id_list"])
    row = {"prompt": sample["prompt"], "answer": answer, "instructions": total, "strict": strict, "loose": loose}
    return row | {"all_strict": int(strict == total), "all_loose": int(loose == total)}
