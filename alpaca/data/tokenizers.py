"""Tokenizers as training needs them, and texts → token ids. Labels, training texts and prompts all come from here.

A text that goes on must not be ended: tokenizers that append an end token themselves (`add_eos_token`, BERT's [SEP])
would mask the first token of each response, and end each prompt before its answer. Texts are always cut on the right.
"""

import json
from collections.abc import Sequence
from typing import Any

import transformers
from tokenizers.processors import TemplateProcessing
from transformers.utils import cached_file

from alpaca.common import notice

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


class TokenizerLoader:
    """`transformers.AutoTokenizer`, with what published LLaMA directories leave out, and without appended end tokens.

    A directory with `tokenizer.model` alone is read as the tokenizer of 2023 read it: `<s>` in front unless
    `add_bos_token` says otherwise, and a space before the first word, also where the class is spelled LLaMATokenizer
    or missing. Special tokens that are the empty string are LLaMA's own there, and none elsewhere.
    """

    @staticmethod
    def from_pretrained(name: str, **options: Any) -> Any:
        cache_dir = options.get("cache_dir")
        config = _read_json(name, "tokenizer_config.json", cache_dir)
        named = {**config, **_read_json(name, "special_tokens_map.json", cache_dir)}
        empty = [key for key in _SPECIAL_TOKENS if "" in (_content(config.get(key)), _content(named.get(key)))]
        loader = transformers.AutoTokenizer
        if _is_llama(config, name, cache_dir):
            options |= {key: _LLAMA_TOKENS.get(key) for key in empty}
            if not _find(name, "tokenizer.json", cache_dir) and _find(name, "tokenizer.model", cache_dir):
                loader = transformers.LlamaTokenizer
                options.setdefault("add_bos_token", config.get("add_bos_token") is not False)
        else:
            options |= dict.fromkeys(empty)
        try:
            tokenizer = loader.from_pretrained(name, **options)
        except RecursionError:
            raise ValueError(
                "endless recursion: an unknown token that is not in the vocabulary, or files nested too deeply"
            )
        for key in empty:
            if getattr(tokenizer, key) == "":
                setattr(tokenizer, key, None)
        _append_nothing(tokenizer)
        return tokenizer


def _find(name: str, file: str, cache_dir: str | None) -> str | None:
    """The path of one of a model's files, in its directory or the Hub's cache; None where it has no such file."""
    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": False}
    return cached_file(name, file, cache_dir=cache_dir, _raise_exceptions_for_connection_errors=False, **options)


def _read_json(name: str, file: str, cache_dir: str | None) -> dict[str, Any]:
    path = _find(name, file, cache_dir)
    if path is None:
        return {}
    with open(path, encoding="utf-8") as opened:
        content = json.load(opened)
    return content if isinstance(content, dict) else {}


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _is_llama(config: dict[str, Any], name: str, cache_dir: str | None) -> bool:
    kind = str(config.get("tokenizer_class") or "").lower().removesuffix("fast")
    if kind in ("", "pretrainedtokenizer", "tokenizersbackend"):  # not said: the model's kind says it
        return _read_json(name, "config.json", cache_dir).get("model_type") == "llama"
    return kind == "llamatokenizer"


def _append_nothing(tokenizer: Any) -> None:
    """Have a tokenizer put nothing behind a text, so that the one saved with the model ends no prompt elsewhere."""
    before, after = added_ids(tokenizer)
    if not after or not tokenizer.is_fast:
        return
    notice(f"this tokenizer ends each text with {''.join(tokenizer.convert_ids_to_tokens(after))} itself; not here")
    tokenizer.add_eos_token = False
    front = tokenizer.convert_ids_to_tokens(before)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*front, "$A"], special_tokens=list(dict(zip(front, before, strict=True)).items())
    )


def added_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a tokenizer puts before and after a text by itself: ([1], []) for LLaMA, ([], [1]) for T5."""
    if tokenizer.is_fast:
        encoding = tokenizer.backend_tokenizer.encode("a")
        whole, is_text = encoding.ids, [not added for added in encoding.special_tokens_mask]
        first, last = is_text.index(True), len(is_text) - is_text[::-1].index(True)
        return whole[:first], whole[last:]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    first = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:first], whole[first + len(bare) :]


def encode(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of texts that go on: begun as the tokenizer does, ended by nothing, cut at its `model_max_length`."""
    max_length = min(tokenizer.model_max_length, 2**31)
    before, after = added_ids(tokenizer)
    if not tokenizer.is_fast:
        rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [(before + ids)[:max_length] for ids in rows]
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(max_length, direction="right")
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=not after)  # computes no offsets
    backend.no_truncation()  # or it would be saved with the tokenizer
    if after:
        return [(before + encoding.ids)[:max_length] for encoding in encodings]
    return [encoding.ids for encoding in encodings]
