"""Which tensor of a tuned model, or of a diff, belongs to which tensor of the base."""

import math
from typing import Any

import numpy as np

from alpaca.weights import files
from alpaca.weights.arithmetic import FLOATS, Plan, rotary_buffer, to_float32
from alpaca.weights.files import DTYPE_BYTES, Checkpoint
from alpaca.weights.manifest import Work, check_against_manifest, mismatch, read_manifest, say, tensor_hashes

ENCODINGS = ("exact", "float32")
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # what --dtype takes
# The config of the 2023 release, and the float32 sum over its recovered weights.
ALPACA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32001,
}
ALPACA_7B_SUM = 50637.1836


# Which tensor belongs to which


def is_rotary(name: str) -> bool:
    return name.endswith("rotary_emb.inv_freq")


def is_head(name: str | None) -> bool:
    return f".{name}".endswith(".lm_head.weight")


def is_tied(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.get("tie_word_embeddings") is True


def find_in_base(name: str, names: Any) -> str | None:
    """The base's name for a tensor: a bare model lacks the prefix `model.` of one with a head, or the other way."""
    return next((n for n in (name, name.removeprefix("model."), f"model.{name}") if n in names), None)


def embedding_of(names: Any) -> str | None:
    return next((name for name in names if name.endswith("embed_tokens.weight")), None)


def same_family(raw: Checkpoint, other: Checkpoint) -> None:
    types = [checkpoint.config.get("model_type") for checkpoint in (raw, other)]
    if None not in types and types[0] != types[1]:
        raise mismatch(f"{raw.directory} is a {types[0]!r} model, {other.directory} a {types[1]!r}; give its own base")


def refuse_diff(checkpoint: Checkpoint, flag: str) -> None:
    manifest = read_manifest(checkpoint.directory)
    if manifest and manifest.get("kind") == "diff":
        raise mismatch(f"--{flag} {checkpoint.directory}: a weight diff, not a model; are two arguments swapped?")


def stored_twice(work: Work, checkpoint: Checkpoint) -> str | None:
    """The output head, where the config ties it to the embedding and the two are stored with the same bytes."""
    head, embedding = next(filter(is_head, checkpoint.tensors), None), embedding_of(checkpoint.tensors)
    if not is_tied(checkpoint) or not head or not embedding:
        return None
    hashes = tensor_hashes(work, "tied weights", [(checkpoint, head), (checkpoint, embedding)])
    return head if hashes[0] == hashes[1] else None


def plan_tensors(work: Work, raw: Checkpoint, other: Checkpoint, encoding: str, is_diff: bool) -> dict[str, Plan]:
    """Pair the tensors of a tuned model, or of a diff without a manifest, with those of the base.

    Raises (integrity) with the full list of what does not fit.
    """
    same_family(raw, other)
    configs = [config for config in (other.config, other.config.get("text_config")) if isinstance(config, dict)]
    vocabularies = [config.get("vocab_size") for config in configs]
    raw_names = [name for name in raw.tensors if not (is_tied(raw) and is_head(name))]
    twice = stored_twice(work, other)
    if twice:
        say(f"note: {twice} is tied to the embedding and stored twice in {other.directory}; kept once")
    plans, used, lacking, problems = {}, set(), [], []
    for name, tensor in other.tensors.items():
        if name == twice:
            continue
        plan = plans[name] = Plan(tensor.dtype, tensor.shape, raw)
        if is_rotary(name) and not is_diff:
            continue  # stored whole, because today's bases lack these buffers
        raw_name = find_in_base(name, raw_names)
        if raw_name is None and is_head(name) and is_tied(raw) and encoding == "float32":
            raw_name = embedding_of(raw_names)  # 2023 subtracted the base's tied head
        if raw_name is None:
            lacking += [] if is_rotary(name) else [name]
            continue
        used.add(raw_name)
        base = raw.tensors[raw_name]
        more_rows = 0 < math.prod(base.shape[:1]) < math.prod(tensor.shape[:1]) and base.shape[1:] == tensor.shape[1:]
        grown = more_rows and tensor.shape[0] in vocabularies
        wrong_type = base.dtype != tensor.dtype and not {base.dtype, tensor.dtype} <= FLOATS
        if wrong_type or (base.shape != tensor.shape and not grown) or (is_diff and tensor.dtype not in FLOATS):
            ours, theirs = (f"{t.dtype} {list(t.shape)} in {t.file}" for t in (tensor, base))
            problems.append(f"{name}: {ours}, {theirs}")
        plan.raw_name, plan.mean_rows = raw_name, grown and encoding == "float32" and tensor.dtype in FLOATS
    for name in set(raw_names) - used:
        needless_head = is_head(name) and other.config.get("tie_word_embeddings") is not False
        if not is_rotary(name) and not needless_head:
            problems.append(f"{name}: in {raw.tensors[name].file} only")
    if is_diff or not used:
        problems += [f"{name}: in {other.tensors[name].file} only" for name in lacking]
    if problems:
        raise mismatch(f"{raw.directory} does not fit {other.directory}; wrong base? {'; '.join(sorted(problems))}")
    if any(plan.raw_name not in (None, name) and not is_head(name) for name, plan in plans.items()):
        say("note: tensor names differ by the prefix `model.`; matched without it")
    rotary = [str(checkpoint.directory) for checkpoint in (raw, other) if any(map(is_rotary, checkpoint.tensors))]
    if rotary:
        say(f"note: {' and '.join(rotary)}: rotary_emb.inv_freq buffers of an older checkpoint; harmless")
    if lacking:
        say(f"note: the base lacks {', '.join(lacking)}; stored whole")
    return plans


def plan_from_manifest(raw: Checkpoint, diff: Checkpoint, manifest: dict[str, Any]) -> tuple[dict[str, Plan], list]:
    """Plans by tensor, and what `check_hashes` needs for base and diff (nothing if the diff was made unverified)."""
    if manifest["kind"] != "diff" or manifest["encoding"] not in ENCODINGS:
        raise mismatch(f"--path_diff {diff.directory}: holds a model, not a diff; are two arguments swapped?")
    same_family(raw, diff)
    check_against_manifest(diff, manifest)
    plans, sums, problems = {}, [], []
    for name, entry in manifest["tensors"].items():
        base, dtype = entry["raw"], entry["tuned"]["dtype"]
        mean_rows = base is not None and entry["mean_rows"] is True
        plan = plans[name] = Plan(dtype, tuple(entry["shape"]), raw, mean_rows=mean_rows)
        is_float = manifest["encoding"] == "float32" and dtype in FLOATS
        if entry["dtype"] != ("F32" if is_float else f"I{8 * DTYPE_BYTES[dtype]}"):
            raise ValueError(f"type of {name}")
        sums.append((diff, name, entry["sha256"], "damaged diff"))
        if base is None:
            continue
        plan.raw_name = find_in_base(base["name"], raw.tensors)
        if plan.raw_name is None and is_head(base["name"]):
            plan.raw_name = embedding_of(raw.tensors)  # this copy of the base stores its tied head once
        there = raw.tensors.get(plan.raw_name)
        if there is None or (there.dtype, list(there.shape)) != (base["dtype"], base["shape"]):
            found = f"{there.dtype} {list(there.shape)} in {there.file}" if there else "missing"
            problems.append(f"{base['name']}: {base['dtype']} {base['shape']} expected, {found}")
            continue
        fits = there.shape[1:] == plan.shape[1:] and there.elements <= plan.elements
        if not fits or (plan.mean_rows and there.elements == 0):
            raise ValueError(f"shape of {name}")
        sums.append((raw, plan.raw_name, base["sha256"], "wrong or damaged base"))
    if problems:
        raise mismatch(f"{raw.directory} is not the base of {diff.directory}: {'; '.join(problems)}")
    return plans, [entry for entry in sums if entry[2] is not None]


# Diffs without a manifest: what 2023 did


def rotary_of(diff: Checkpoint) -> np.ndarray:
    try:
        return rotary_buffer(diff.config)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise files.bad_data(f"{diff.directory / 'config.json'}: no attention heads to compute ({error!r})")


def prepare_2023(raw: Checkpoint, diff: Checkpoint, plans: dict[str, Plan]) -> None:
    """Compute buffers that only the diff has, and stop if the diff is larger than what it is added to."""
    for name, plan in plans.items():
        if is_rotary(name) and plan.raw_name is None:
            plan.computed = rotary_of(diff)
            if plan.computed.shape != plan.shape:
                raise mismatch(f"{name}: {list(plan.shape)} in {diff.tensors[name].file}, not as its config.json says")
    if is_tied(diff):
        say("warning: 2023 code subtracted tied weights twice; its diffs of such models are not recovered right")
    sizes = {raw: 0.0, diff: 0.0}  # of vectors (norms): near 1 in a model, near 0 in a diff
    for name, plan in plans.items():
        if len(plan.shape) == 1 and plan.raw_name and not is_rotary(name):
            for checkpoint, key in ((raw, plan.raw_name), (diff, name)):
                tensor = checkpoint.tensors[key]
                values = to_float32(checkpoint.read(key, 0, tensor.elements), tensor.dtype)
                sizes[checkpoint] += float(np.abs(values).sum(dtype=np.float64))
    if sizes[diff] > 2 * sizes[raw]:
        raise mismatch(f"{diff.directory}: larger numbers than in {raw.directory}; are the two arguments swapped?")
    if sizes[diff] > sizes[raw] / 2:
        say(f"warning: {diff.directory}: numbers as large as the base's; is this a diff?")


def is_alpaca_7b(diff: Checkpoint, plans: dict[str, Plan]) -> bool:
    """The release of 2023? Told by its config and a vocabulary that grew by one row."""
    same = all(diff.config.get(key) == value for key, value in ALPACA_7B.items())
    grown = [plan for name, plan in plans.items() if plan.mean_rows and plan.shape[0] == ALPACA_7B["vocab_size"]]
    return same and bool(grown) and all(p.raw.tensors[p.raw_name].shape[0] == p.shape[0] - 1 for p in grown)


def sum_of_2023(pieces: list[np.ndarray], shape: tuple[int, ...]) -> Any:
    """torch's float32 sum over a tensor."""
    import torch

    return torch.from_numpy(np.concatenate(pieces)).view(shape).sum()


def check_sum_of_2023(raw: Checkpoint, diff: Checkpoint, sums: dict[str, Any]) -> None:
    """Add the sums of all recovered tensors, as 2023 did, and compare with the published one.

    In the order of the state dict of 2023, which held rotary buffers: the diff's, else the base's, else computed ones.
    """
    import torch

    parts = [f"self_attn.{part}_proj.weight" for part in "qkvo"] + ["self_attn.rotary_emb.inv_freq"]
    parts += [f"mlp.{part}_proj.weight" for part in ("gate", "down", "up")]
    parts += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    layers = [f"model.layers.{layer}.{part}" for layer in range(diff.config["num_hidden_layers"]) for part in parts]
    total = 0
    for name in ["model.embed_tokens.weight", *layers, "model.norm.weight", "lm_head.weight"]:
        if is_rotary(name) and name not in sums:
            values, raw_name = rotary_of(diff), find_in_base(name, raw.tensors)
            if raw_name and raw.tensors[raw_name].dtype in FLOATS:
                tensor = raw.tensors[raw_name]
                values = to_float32(raw.read(raw_name, 0, tensor.elements), tensor.dtype)
            sums[name] = sum_of_2023([values], values.shape)
        if name not in sums:
            raise mismatch(f"{diff.directory}: {name} is missing from what should be Alpaca-7B")
        total = total + sums[name]
    if not torch.allclose(total, torch.full_like(total, ALPACA_7B_SUM), atol=1e-2, rtol=0):
        raise mismatch(
            f"{raw.directory} and {diff.directory} sum up to {float(total):.4f}, Alpaca-7B to {ALPACA_7B_SUM}: "
            "wrong base, damaged files, or not that release (if you know it is not: --check_integrity_naively False)"
        )
    say("the weights sum up to Alpaca-7B's; this float32 sum does not see exchanged values, nor most flipped bits")
