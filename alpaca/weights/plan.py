"""Which tensor of a tuned model, or of a diff, belongs to which tensor of the base."""

from collections.abc import Container, Iterable

import numpy as np

from alpaca.weights.arithmetic import Plan, read_float32, rotary_buffer
from alpaca.weights.casts import FLOATS
from alpaca.weights.files import Checkpoint, Tensor, first_three, mismatch
from alpaca.weights.manifest import check_against_manifest, read_manifest
from alpaca.weights.work import Sum, Work, say, tensor_hashes

ENCODINGS = ("exact", "float32")
ADDED_ROWS = {  # --added_rows: what the rows that the base lacks are in a diff without manifest
    "mean": "differences from the base's mean row, as the code of 2023 makes them",
    "zero": "differences from rows of zeros, which are the rows themselves, as in Vicuna v0",
    "whole": "the rows themselves",
}

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


def find_in_base(name: str, names: Container[str]) -> str | None:
    """The base's name for a tensor: a bare model lacks the prefix `model.` of one with a head, or the other way."""
    return next((n for n in (name, name.removeprefix("model."), f"model.{name}") if n in names), None)


def untied_names(raw: Checkpoint) -> set[str]:
    return {name for name in raw.tensors if not (is_tied(raw) and is_head(name))}


def is_resized(tensor: Tensor, base: Tensor, other: Checkpoint) -> bool:
    """Is this the base's tensor for another vocabulary, larger or smaller: the one that the config of `other` names?"""
    configs = [config for config in (other.config, other.config.get("text_config")) if isinstance(config, dict)]
    other_rows = tensor.shape[:1] != base.shape[:1] > (0,) and tensor.shape[1:] == base.shape[1:]
    return other_rows and tensor.shape[:1] in [(config.get("vocab_size"),) for config in configs]


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


def fits(tensor: Tensor, base: Tensor, resized: bool) -> bool:
    same_kind = base.dtype == tensor.dtype or {base.dtype, tensor.dtype} <= FLOATS
    return same_kind and (resized or base.shape == tensor.shape)


def refuse_misfits(raw: Checkpoint, other: Checkpoint, plans: dict[str, Plan], problems: list[str]) -> None:
    """Raises (integrity) with `problems` and with the tensors of the base that nothing belongs to."""
    used = {plan.raw_name for plan in plans.values()}
    for name in untied_names(raw):
        needless_head = is_head(name) and other.config.get("tie_word_embeddings") is not False
        if name not in used and not is_rotary(name) and not needless_head:
            problems.append(f"{name}: in {raw.tensors[name].file} only")
    if problems:
        problem = f"{len(problems)} tensors do not; wrong base? {first_three(sorted(problems))}"
        raise mismatch(f"{raw.directory} does not fit {other.directory}: {problem}")


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
        hashes = tensor_hashes(work, "tied weights", [(checkpoint, head, None), (checkpoint, embedding, None)])
        if hashes[0] == hashes[1]:
            say(f"note: {head} is tied to the embedding and stored twice in {checkpoint.directory}; kept once")
            return {name: tensor for name, tensor in checkpoint.tensors.items() if name != head}
    return checkpoint.tensors


# ---------------------------------------------------------------------------------------------------------------------
# The three ways to a plan


def plan_from_models(work: Work, raw: Checkpoint, tuned: Checkpoint, encoding: str) -> dict[str, Plan]:
    """Pair the tensors of a tuned model with those of its base; what the base lacks is stored whole.

    With the encoding of 2023, a rotary buffer that one side lacks is a difference of zeros: the models of that time
    computed it. Raises (integrity) with what does not fit.
    """
    refuse_other_family(raw, tuned)
    raw_names, tied_head = untied_names(raw), embedding_of(raw.tensors) if is_tied(raw) else None
    plans, lacking, problems = {}, [], []
    for name, tensor in tensors_kept(work, tuned).items():
        as_float32 = encoding == "float32" and tensor.dtype in FLOATS
        plan = plans[name] = Plan(tensor.dtype, tensor.shape, as_float32, raw)
        if is_rotary(name) and not as_float32:
            continue  # stored whole, because today's bases lack these buffers
        raw_name = find_in_base(name, raw_names) or (tied_head if is_head(name) and encoding == "float32" else None)
        if raw_name is None and is_rotary(name) and rotary_buffer(tuned).shape == plan.shape:
            plan.computed, plan.zeros = rotary_buffer(tuned), True
        elif raw_name is None:
            lacking.append(name)
        else:
            plan.set_base(raw_name)
            base = raw.tensors[raw_name]
            resized = is_resized(tensor, base, tuned)
            plan.mean_rows = resized and as_float32 and tensor.shape > base.shape
            if not fits(tensor, base, resized):
                problems.append(f"{name}: {describe(tensor)}, {describe(base)}")
    if all(plan.raw_name is None for plan in plans.values()):
        problems += [f"{name}: in {tuned.tensors[name].file} only" for name in lacking]
    refuse_misfits(raw, tuned, plans, problems)
    note_differences(raw, tuned, plans)
    if lacking:
        say(f"note: the base lacks {', '.join(lacking)}; stored whole")
    used = {plan.raw_name for plan in plans.values()}
    for name in sorted(filter(is_rotary, raw_names - used)) if encoding == "float32" else ():
        base = raw.tensors[name]
        if base.dtype in FLOATS:
            plans[name] = Plan(base.dtype, base.shape, True, raw, name, zeros=True)
    return plans


def plan_from_bare_diff(
    work: Work, raw: Checkpoint, diff: Checkpoint, dtype: str, added_rows: str | None
) -> dict[str, Plan]:
    """Pair the tensors of a diff without a manifest, float32 tuned − raw, with those of the base.

    dtype: of the recovered tensors; added_rows: a key of ADDED_ROWS. Raises (integrity) with what does not fit.
    """
    refuse_other_family(raw, diff)
    raw_names, tied_head = untied_names(raw), embedding_of(raw.tensors) if is_tied(raw) else None
    plans, added, problems = {}, [], []
    for name, tensor in tensors_kept(work, diff).items():
        plan = plans[name] = Plan(dtype, tensor.shape, True, raw)
        raw_name = find_in_base(name, raw_names) or (tied_head if is_head(name) else None)
        if raw_name is None and is_rotary(name):
            plan.computed = rotary_buffer(diff)
            if plan.computed.shape != plan.shape:
                problems.append(f"{name}: {describe(tensor)}, not as its config.json says")
        elif raw_name is None:
            problems.append(f"{name}: in {tensor.file} only")
        else:
            plan.set_base(raw_name)
            base = raw.tensors[raw_name]
            resized = is_resized(tensor, base, diff)
            if resized and tensor.shape > base.shape:
                added.append(f"{tensor.shape[0] - base.shape[0]} in {name}")
                plan.mean_rows = added_rows in (None, "mean")
            if tensor.dtype not in FLOATS or not fits(tensor, base, resized):
                problems.append(f"{name}: {describe(tensor)}, {describe(base)}")
    refuse_misfits(raw, diff, plans, problems)
    note_differences(raw, diff, plans)
    if added:
        other = "" if added_rows else "; nothing in the diff says so: if they are not, give --added_rows zero or whole"
        say(f"note: rows that the base lacks ({', '.join(added)}): taken as {ADDED_ROWS[added_rows or 'mean']}{other}")
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


def plan_from_manifest(
    raw: Checkpoint, diff: Checkpoint, manifest: dict, verify: bool
) -> tuple[dict[str, Plan], list[Sum]]:
    """Plans by tensor, and the sums of base and diff (none if the diff was made unverified)."""
    if manifest["kind"] != "diff" or manifest["encoding"] not in ENCODINGS:
        raise mismatch(f"--path_diff {diff.directory}: holds a model, not a diff; are two arguments swapped?")
    refuse_other_family(raw, diff)
    check_against_manifest(diff, manifest)
    embedding = embedding_of(raw.tensors)
    plans, sums, problems = {}, [], []
    for name, entry in manifest["tensors"].items():
        if entry["tuned"] is None:
            continue  # a rotary buffer that the tuned model lacks, for the arithmetic of 2023
        base, dtype = entry["raw"], entry["tuned"]["dtype"]
        as_float32 = manifest["encoding"] == "float32" and dtype in FLOATS
        plan = plans[name] = Plan(dtype, tuple(entry["shape"]), as_float32, raw)
        if entry["dtype"] != plan.diff_dtype:
            raise ValueError(f"type of {name}")
        sums.append(Sum(diff, name, entry["sha256"], "damaged diff"))
        raw_name = base and find_in_base(base["name"], raw.tensors)
        if base and raw_name is None and is_head(base["name"]):
            raw_name = embedding  # this copy of the base stores its tied head once
        there = raw.tensors.get(raw_name)
        if entry.get("computed") is True or (base and there is None and is_rotary(name) and as_float32):
            plan.computed = rotary_buffer(diff)
            if plan.computed.shape != plan.shape:
                raise ValueError(f"shape of {name}")
        elif base:
            if there is None or list(there.shape) != base["shape"]:
                found = describe(there) if there else "missing"
                problems.append(f"{base['name']}: {base['dtype']} {base['shape']} expected, {found}")
                continue
            meaning = "wrong or damaged base"
            if there.dtype != base["dtype"]:
                types = f"{there.dtype}, the diff was made from {base['dtype']}"
                meaning = f"wrong base, or not in its own type (here {types}: get the base in {base['dtype']})"
                if not {there.dtype, base["dtype"]} <= FLOATS:
                    problems.append(f"{base['name']}: {types}")
                elif not verify or entry["tuned"]["recovered_sha256"] is None:
                    problems.append(
                        f"{base['name']}: {types}, and without sha256 sums nothing tells whether a cast helps"
                    )
            plan.set_base(raw_name, base["dtype"])
            plan.mean_rows = entry["mean_rows"] is True
            if there.shape[1:] != plan.shape[1:] or (plan.mean_rows and there.elements == 0):
                raise ValueError(f"shape of {name}")
            sums.append(Sum(raw, raw_name, base["sha256"], meaning, base["dtype"]))
    if problems:
        problem = f"{len(problems)} tensors differ: {first_three(problems)}; get the base that the diff was made from"
        raise mismatch(f"{raw.directory} is not the base of {diff.directory}: {problem}")
    return plans, [entry for entry in sums if entry.sha256 is not None]
