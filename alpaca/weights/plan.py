"""Which tensor of a tuned model, or of a diff, belongs to which tensor of the base."""

from collections.abc import Iterable

import numpy as np

from alpaca.weights.arithmetic import FLOATS, Plan, read_float32, rotary_buffer
from alpaca.weights.files import Checkpoint, Tensor, mismatch
from alpaca.weights.manifest import check_against_manifest, read_manifest
from alpaca.weights.work import Work, say, tensor_hashes

ENCODINGS = ("exact", "float32")

# ---------------------------------------------------------------------------------------------------------------------
# Names, types and shapes


def is_rotary(name: str) -> bool:
    return name.endswith("rotary_emb.inv_freq")


def is_head(name: str | None) -> bool:
    return f".{name}".endswith(".lm_head.weight")


def is_tied(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.get("tie_word_embeddings") is True


def embedding_of(names: Iterable[str]) -> str | None:
    return next((name for name in names if name.endswith("embed_tokens.weight")), None)


def find_in_base(name: str, names: Iterable[str]) -> str | None:
    """The base's name for a tensor: a bare model lacks the prefix `model.` of one with a head, or the other way."""
    return next((n for n in (name, name.removeprefix("model."), f"model.{name}") if n in names), None)


def tied_embedding(name: str, raw: Checkpoint) -> str | None:
    """What 2023 subtracted from a head where the base ties its own to the embedding."""
    return embedding_of(raw.tensors) if is_head(name) and is_tied(raw) else None


def untied_names(raw: Checkpoint) -> list[str]:
    return [name for name in raw.tensors if not (is_tied(raw) and is_head(name))]


def has_new_rows(tensor: Tensor, base: Tensor, other: Checkpoint) -> bool:
    """Is this the base's tensor for a larger vocabulary, the one that the config of `other` names?"""
    configs = [config for config in (other.config, other.config.get("text_config")) if isinstance(config, dict)]
    more_rows = tensor.shape[:1] > base.shape[:1] > (0,) and tensor.shape[1:] == base.shape[1:]
    return more_rows and tensor.shape[0] in [config.get("vocab_size") for config in configs]


def describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} in {tensor.file}"


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit


def refuse_other_family(raw: Checkpoint, other: Checkpoint) -> None:
    types = [checkpoint.config.get("model_type") for checkpoint in (raw, other)]
    if None not in types and types[0] != types[1]:
        raise mismatch(f"{raw.directory} is a {types[0]!r} model, {other.directory} a {types[1]!r}; give its own base")


def refuse_diff(checkpoint: Checkpoint, flag: str) -> None:
    manifest = read_manifest(checkpoint.directory)
    if manifest and manifest.get("kind") == "diff":
        raise mismatch(f"--{flag} {checkpoint.directory}: a weight diff, not a model; are two arguments swapped?")


def fits(tensor: Tensor, base: Tensor, grown: bool) -> bool:
    same_kind = base.dtype == tensor.dtype or {base.dtype, tensor.dtype} <= FLOATS
    return same_kind and (grown or base.shape == tensor.shape)


def refuse_misfits(raw: Checkpoint, other: Checkpoint, plans: dict[str, Plan], problems: list[str]) -> None:
    """Raises (integrity) with `problems` and with the tensors of the base that nothing belongs to."""
    used = {plan.raw_name for plan in plans.values()}
    for name in untied_names(raw):
        needless_head = is_head(name) and other.config.get("tie_word_embeddings") is not False
        if name not in used and not is_rotary(name) and not needless_head:
            problems.append(f"{name}: in {raw.tensors[name].file} only")
    if problems:
        raise mismatch(f"{raw.directory} does not fit {other.directory}; wrong base? {'; '.join(sorted(problems))}")


def note_differences(raw: Checkpoint, other: Checkpoint, plans: dict[str, Plan]) -> None:
    if any(plan.raw_name not in (None, name) and not is_head(name) for name, plan in plans.items()):
        say("note: tensor names differ by the prefix `model.`; matched without it")
    rotary = [str(checkpoint.directory) for checkpoint in (raw, other) if any(map(is_rotary, checkpoint.tensors))]
    if rotary:
        say(f"note: {' and '.join(rotary)}: rotary_emb.inv_freq buffers of an older checkpoint; harmless")


def tensors_kept(work: Work, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All but the output head, where the config ties it to the embedding and both are stored with the same bytes."""
    head, embedding = next(filter(is_head, checkpoint.tensors), None), embedding_of(checkpoint.tensors)
    if is_tied(checkpoint) and head and embedding:
        hashes = tensor_hashes(work, "tied weights", [(checkpoint, head), (checkpoint, embedding)])
        if hashes[0] == hashes[1]:
            say(f"note: {head} is tied to the embedding and stored twice in {checkpoint.directory}; kept once")
            return {name: tensor for name, tensor in checkpoint.tensors.items() if name != head}
    return checkpoint.tensors


# ---------------------------------------------------------------------------------------------------------------------
# The three ways to a plan


def plan_from_models(work: Work, raw: Checkpoint, tuned: Checkpoint, encoding: str) -> dict[str, Plan]:
    """Pair the tensors of a tuned model with those of its base; what the base lacks is stored whole.

    Raises (integrity) with the full list of what does not fit.
    """
    refuse_other_family(raw, tuned)
    raw_names = untied_names(raw)
    plans, lacking, problems = {}, [], []
    for name, tensor in tensors_kept(work, tuned).items():
        as_float32 = encoding == "float32" and tensor.dtype in FLOATS
        plan = plans[name] = Plan(tensor.dtype, tensor.shape, as_float32, raw)
        if is_rotary(name):
            continue  # stored whole, because today's bases lack these buffers
        plan.raw_name = find_in_base(name, raw_names) or (tied_embedding(name, raw) if encoding == "float32" else None)
        if plan.raw_name is None:
            lacking.append(name)
            continue
        base = raw.tensors[plan.raw_name]
        grown = has_new_rows(tensor, base, tuned)
        plan.mean_rows = grown and as_float32
        if not fits(tensor, base, grown):
            problems.append(f"{name}: {describe(tensor)}, {describe(base)}")
    if all(plan.raw_name is None for plan in plans.values()):
        problems += [f"{name}: in {tuned.tensors[name].file} only" for name in lacking]
    refuse_misfits(raw, tuned, plans, problems)
    note_differences(raw, tuned, plans)
    if lacking:
        say(f"note: the base lacks {', '.join(lacking)}; stored whole")
    return plans


def plan_from_bare_diff(work: Work, raw: Checkpoint, diff: Checkpoint, dtype: str) -> dict[str, Plan]:
    """Pair the tensors of a diff without a manifest, float32 tuned − raw, with those of the base.

    dtype: of the recovered tensors. Raises (integrity) with the full list of what does not fit.
    """
    refuse_other_family(raw, diff)
    raw_names = untied_names(raw)
    plans, problems = {}, []
    for name, tensor in tensors_kept(work, diff).items():
        plan = plans[name] = Plan(dtype, tensor.shape, True, raw)
        plan.raw_name = find_in_base(name, raw_names) or tied_embedding(name, raw)
        if plan.raw_name is None and is_rotary(name):
            plan.computed = rotary_buffer(diff)
            if plan.computed.shape != plan.shape:
                problems.append(f"{name}: {describe(tensor)}, not as its config.json says")
        elif plan.raw_name is None:
            problems.append(f"{name}: in {tensor.file} only")
        else:
            base = raw.tensors[plan.raw_name]
            plan.mean_rows = grown = has_new_rows(tensor, base, diff)
            if tensor.dtype not in FLOATS or not fits(tensor, base, grown):
                problems.append(f"{name}: {describe(tensor)}, {describe(base)}")
    refuse_misfits(raw, diff, plans, problems)
    note_differences(raw, diff, plans)
    if is_tied(diff):
        say("warning: 2023 code subtracted tied weights twice; its diffs of such models are not recovered right")
    refuse_swapped(raw, diff, plans)
    return plans


def refuse_swapped(raw: Checkpoint, diff: Checkpoint, plans: dict[str, Plan]) -> None:
    """Vectors (norms) are near 1 in a model and near 0 in a diff; stop if they are larger in the diff."""
    pairs = [(plan.raw_name, name) for name, plan in plans.items() if len(plan.shape) == 1 and not is_rotary(name)]
    sizes = {
        checkpoint: sum(float(np.abs(read_float32(checkpoint, name)).sum(dtype=np.float64)) for name in names)
        for checkpoint, names in ((raw, [pair[0] for pair in pairs]), (diff, [pair[1] for pair in pairs]))
    }
    if sizes[diff] > 2 * sizes[raw]:
        raise mismatch(f"{diff.directory}: larger numbers than in {raw.directory}; are the two arguments swapped?")
    if sizes[diff] > sizes[raw] / 2:
        say(f"warning: {diff.directory}: numbers as large as the base's; is this a diff?")


def plan_from_manifest(raw: Checkpoint, diff: Checkpoint, manifest: dict) -> tuple[dict[str, Plan], list]:
    """Plans by tensor, and what `check_hashes` needs for base and diff (nothing if the diff was made unverified)."""
    if manifest["kind"] != "diff" or manifest["encoding"] not in ENCODINGS:
        raise mismatch(f"--path_diff {diff.directory}: holds a model, not a diff; are two arguments swapped?")
    refuse_other_family(raw, diff)
    check_against_manifest(diff, manifest)
    plans, sums, problems = {}, [], []
    for name, entry in manifest["tensors"].items():
        base, dtype = entry["raw"], entry["tuned"]["dtype"]
        as_float32 = manifest["encoding"] == "float32" and dtype in FLOATS
        plan = plans[name] = Plan(dtype, tuple(entry["shape"]), as_float32, raw)
        if entry["dtype"] != plan.diff_dtype:
            raise ValueError(f"type of {name}")
        sums.append((diff, name, entry["sha256"], "damaged diff"))
        if base is None:
            continue
        plan.raw_name = find_in_base(base["name"], raw.tensors)
        if plan.raw_name is None and is_head(base["name"]):
            plan.raw_name = embedding_of(raw.tensors)  # this copy of the base stores its tied head once
        there = raw.tensors.get(plan.raw_name)
        if there is None or (there.dtype, list(there.shape)) != (base["dtype"], base["shape"]):
            found = describe(there) if there else "missing"
            problems.append(f"{base['name']}: {base['dtype']} {base['shape']} expected, {found}")
            continue
        plan.mean_rows = entry["mean_rows"] is True
        fitting = there.shape[1:] == plan.shape[1:] and there.elements <= plan.elements
        if not fitting or (plan.mean_rows and there.elements == 0):
            raise ValueError(f"shape of {name}")
        sums.append((raw, plan.raw_name, base["sha256"], "wrong or damaged base"))
    if problems:
        raise mismatch(f"{raw.directory} is not the base of {diff.directory}: {'; '.join(problems)}")
    return plans, [entry for entry in sums if entry[2] is not None]
