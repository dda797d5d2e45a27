"""A tuned model, or an adapter with its base, ready to answer; and its answers: a batch at once, or streamed."""

import argparse
import os
import queue
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from alpaca.common import ExitCode, ExpectedError
from alpaca.data.tokenizers import TokenizerLoader, encode
from alpaca.prompts import format_prompt
from alpaca.training.models import TOKENIZER_FILES, check_directory, check_tensors, from_pretrained


@dataclass
class Sampling:
    """How an answer's tokens are chosen. Temperature 0 takes the likeliest token each time (greedy decoding)."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `generate`. top_k is off: it would otherwise be 50 without anyone asking."""
        options = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        if self.temperature >= 0.001:  # below that, logits divided by it may overflow
            options |= {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return options


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
        try:
            prompt.encode()
        except UnicodeEncodeError:  # half of a surrogate pair
            raise ExpectedError("the text is not valid Unicode; retype it", ExitCode.DATA)
        ids = encode([prompt], self.tokenizer)[0]
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
        if not TOKENIZER_FILES & set(os.listdir(path)):
            path = base
    # Length is checked by `encode`; the tokenizer's own limit is training's, and would only warn.
    tokenizer = from_pretrained(TokenizerLoader, path, padding_side="left", model_max_length=sys.maxsize)
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
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = from_pretrained(transformers.AutoModelForCausalLM, path, **options)
        check_tensors(path, report)
    model.eval()
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    return model


def answer(model: Any, reader: Reader, prompts: list[list[int]], sampling: Sampling) -> list[str]:
    """Answer a batch of prompts (token ids). Greedy answers do not depend on the company a prompt is in."""
    return [reader.decode(ids) for ids in answer_ids(model, reader, prompts, sampling)]


def answer_ids(model: Any, reader: Reader, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
    """The token ids of `answer`: an answer that ended by itself has the end token in it, and padding behind that."""
    batch = reader.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)  # (B, T), left-padded
    torch.manual_seed(sampling.seed)
    with torch.inference_mode():
        ids = model.generate(**batch, **sampling.options())  # (B, T + new)
    return ids[:, batch["input_ids"].shape[1] :].tolist()


_generating = threading.Lock()  # one answer at a time; one that was stopped still finishes its token


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
            with _generating, torch.inference_mode():
                if not stopped.is_set():
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
    while (news := progress.get()) is not None:
        if isinstance(news, BaseException):
            raise news
        text = news
        if not text.endswith("\ufffd"):  # otherwise a character of which not all bytes are there yet
            yield text
    if text.endswith("\ufffd"):
        yield text
