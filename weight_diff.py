"""Share a fine-tuned model as its difference from the base, and recover it: exact, streamed, verified.

    python weight_diff.py make_diff --path_raw BASE --path_tuned TUNED --path_diff DIFF
    python weight_diff.py recover --path_raw BASE --path_diff DIFF --path_tuned TUNED
    python weight_diff.py verify --path DIFF

BASE, TUNED and DIFF are directories (inputs may be Hub ids). Tensors flow from disk to disk in pieces of a few MB, so
memory does not grow with the model; no model is built. By default the difference is taken between the bits, as
integers that wrap around, so the tuned model comes back bit for bit. `weight_diff.json`, written last, holds a sha256
for every tensor of base, diff and tuned model. A diff without it (the 2023 release) is read as float32 tuned − raw.
"""

import collections
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import checkpoint_files as files
import utils
from checkpoint_files import DTYPE_BYTES, Checkpoint, ShardWriter
from utils import ExitCode, ExpectedError
from weight_arithmetic import FLOATS, Plan, diff_tensor, recover_tensor, rotary_buffer, to_float32
from weight_manifest import (
    MANIFEST,
    THREADS,
    Work,
    check_against_manifest,
    check_archives,
    check_hashes,
    mismatch,
    read_manifest,
    say,
    tensor_hashes,
    well_formed,
    write_manifest,
)

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


# ---------------------------------------------------------------------------------------------------------------------
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


# ---------------------------------------------------------------------------------------------------------------------
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


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def check_flags(**flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ExpectedError(f"--{name} {value}: True or False expected", ExitCode.USAGE)


def make_diff(
    path_raw: str,
    path_tuned: str,
    path_diff: str,
    device: str = "cpu",
    encoding: str = "exact",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    verify: bool = True,
) -> None:
    """Write the difference between a tuned model and its base: safetensors shards and weight_diff.json.

    Args:
        path_raw: the base model, a directory or a Hub id.
        path_tuned: the tuned model, a directory or a Hub id.
        path_diff: directory to write; appears when it is complete.
        device: accepted as in 2023, without effect: disks bound the speed.
        encoding: "exact" (comes back bit for bit) or "float32" (the form of 2023: float32 tuned − raw).
        max_shard_size: largest file, as 5GB or 500MiB (a tensor that is larger gets a file of its own).
        overwrite: replace a directory that is not empty.
        verify: False leaves the sha256 sums out: faster, and recover then has nothing to check against.
    """
    check_flags(overwrite=overwrite, verify=verify)
    if encoding not in ENCODINGS:
        raise ExpectedError(f"--encoding {encoding}: one of {', '.join(ENCODINGS)} expected", ExitCode.USAGE)
    shard_bytes = files.shard_bytes(max_shard_size)
    inputs = {flag: files.local_directory(p, flag) for flag, p in (("path_raw", path_raw), ("path_tuned", path_tuned))}
    if inputs["path_raw"].samefile(inputs["path_tuned"]):
        raise ExpectedError(f"--path_raw and --path_tuned are the same: {inputs['path_raw']}", ExitCode.USAGE)
    output = files.check_output(path_diff, "path_diff", inputs, overwrite)
    work, entries = Work(), {}
    with Checkpoint(inputs["path_raw"]) as raw, Checkpoint(inputs["path_tuned"]) as tuned:
        refuse_diff(raw, "path_raw")
        refuse_diff(tuned, "path_tuned")
        if verify:
            check_archives(work, [raw, tuned])
        plans = plan_tensors(work, raw, tuned, encoding, is_diff=False)
        floats = {name for name, plan in plans.items() if encoding == "float32" and plan.dtype in FLOATS}
        # An exact difference is no number: it is stored with an integer type of the same width.
        types = {n: "F32" if n in floats else f"I{8 * DTYPE_BYTES[plan.dtype]}" for n, plan in plans.items()}

        def job(name: str, plan: Plan) -> None:
            sums = diff_tensor(work, plan, name, tuned, writer, name in floats, verify)
            base = raw.tensors.get(plan.raw_name)
            described = base and {
                "name": plan.raw_name,
                "dtype": base.dtype,
                "shape": base.shape,
                "sha256": sums["raw"],
            }
            entries[name] = {
                **{"dtype": types[name], "shape": plan.shape, "sha256": sums["diff"], "mean_rows": plan.mean_rows},
                "raw": described,
                "tuned": {"dtype": plan.dtype, "sha256": sums["tuned"], "recovered_sha256": sums["recovered"]},
            }

        writer = ShardWriter({name: (types[name], plan.shape) for name, plan in plans.items()}, shard_bytes)
        with files.new_directory(output, writer.total_bytes) as staging:
            for path in files.carried_files(tuned.directory):
                files.copy_file(path, staging)
            jobs = [functools.partial(job, name, plan) for name, plan in plans.items()]
            with writer.open(staging):
                work.run("difference", jobs, sum(tuned.tensors[name].bytes for name in plans))
            write_manifest(staging, "diff", encoding, entries, writer)
    inexact = [e for e in entries.values() if e["tuned"]["recovered_sha256"] != e["tuned"]["sha256"]]
    if inexact:
        say(
            f"note: {len(inexact)} of {len(entries)} tensors will not come back bit for bit; --encoding exact does that"
        )
    say(f"wrote {output}: {work.summary(writer.total_bytes)}")


def recover(
    path_raw: str,
    path_diff: str,
    path_tuned: str | None = None,
    device: str = "cpu",
    test_inference: bool = True,
    check_integrity_naively: bool = True,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    verify: bool = True,
) -> None:
    """Recover a tuned model from its base and a weight diff.

    1. Pair the tensors of base and diff; stop at whatever does not fit.
    2. Compare both with the sha256 sums in weight_diff.json, where the diff has it. Nothing is written before this.
    3. Add, into a hidden directory beside path_tuned.
    4. Read back what was written, compare it with the tuned model's sums, and rename the directory.

    Args:
        path_raw: the base model, a directory or a Hub id.
        path_diff: the weight diff, a directory or a Hub id.
        path_tuned: directory to write; appears when it is complete and checked.
        device: where the test inference runs ("cpu", "cuda"); the recovery itself needs none.
        test_inference: ask the recovered model one question and print its response (loads the model).
        check_integrity_naively: compare the sum of all weights, as in 2023, if this is that release of Alpaca-7B.
        dtype: float32 (default), bfloat16 or float16, for diffs without weight_diff.json; others give theirs back.
        max_shard_size: largest file, as 5GB or 500MiB (a tensor that is larger gets a file of its own).
        overwrite: replace a directory that is not empty.
        verify: False skips the sha256 sums of steps 2 and 4.
    """
    check_flags(test_inference=test_inference, check_integrity_naively=check_integrity_naively)
    check_flags(overwrite=overwrite, verify=verify)
    if path_tuned is None:
        raise ExpectedError("--path_tuned is needed: the directory for the recovered model", ExitCode.USAGE)
    if dtype is not None and dtype not in DTYPES:
        raise ExpectedError(f"--dtype {dtype}: one of {', '.join(DTYPES)} expected", ExitCode.USAGE)
    shard_bytes = files.shard_bytes(max_shard_size)
    inputs = {flag: files.local_directory(p, flag) for flag, p in (("path_raw", path_raw), ("path_diff", path_diff))}
    output = files.check_output(path_tuned, "path_tuned", inputs, overwrite)
    work = Work()
    with Checkpoint(inputs["path_raw"]) as raw, Checkpoint(inputs["path_diff"]) as diff:
        refuse_diff(raw, "path_raw")
        manifest = read_manifest(diff.directory)
        if manifest:
            with well_formed(diff.directory):
                plans, sums = plan_from_manifest(raw, diff, manifest)
                promised = {name: entry["tuned"]["recovered_sha256"] for name, entry in manifest["tensors"].items()}
            types = {name: plan.dtype for name, plan in plans.items()}
            if dtype and {DTYPES[dtype]} != set(types.values()) & FLOATS:
                raise ExpectedError(f"--dtype {dtype}: {MANIFEST} knows the type; leave --dtype out", ExitCode.USAGE)
        else:
            plans, sums, promised = plan_tensors(work, raw, diff, "float32", is_diff=True), [], {}
            prepare_2023(raw, diff, plans)
            types = dict.fromkeys(plans, DTYPES[dtype or "float32"])
        encoding = manifest["encoding"] if manifest else "float32"
        release = not manifest and is_alpaca_7b(diff, plans)
        if not sums and not release:
            say(f"warning: {diff.directory} has no sha256 sums: there is nothing to check the weights against")
        sums_of_2023: dict[str, Any] | None = {} if release and check_integrity_naively else None

        def job(name: str, plan: Plan) -> None:
            as_float32 = encoding == "float32" and plan.dtype in FLOATS
            pieces = recover_tensor(work, plan, name, diff, writer, as_float32, types[name])
            if sums_of_2023 is None:
                collections.deque(pieces, maxlen=0)
            else:
                sums_of_2023[name] = sum_of_2023(list(pieces), plan.shape)

        writer = ShardWriter({name: (types[name], plan.shape) for name, plan in plans.items()}, shard_bytes)
        with files.new_directory(output, writer.total_bytes) as staging:
            if verify:
                check_archives(work, [raw, diff])
                check_hashes(work, "base and diff", sums)
            for path in files.carried_files(diff.directory):
                if not manifest and path.name == "config.json":
                    write_config(diff.config, dtype or "float32", staging)
                elif not manifest or path.name in manifest["files"]:
                    files.copy_file(path, staging)
            jobs = [functools.partial(job, name, plan) for name, plan in plans.items()]
            threads = THREADS if sums_of_2023 is None else 1  # torch's sum wants whole tensors: one at a time
            with writer.open(staging):
                work.run("recover", jobs, writer.total_bytes, threads)
            if sums_of_2023 is not None:
                check_sum_of_2023(raw, diff, sums_of_2023)
            written = check_written(work, staging, plans, promised) if verify else {}
            entries = {n: {"dtype": types[n], "shape": p.shape, "sha256": written.get(n)} for n, p in plans.items()}
            write_manifest(staging, "model", encoding, entries, writer)
    say(f"wrote {output}: {work.summary(writer.total_bytes)}")
    if test_inference:
        ask(output, device)


def check_written(
    work: Work, directory: Path, plans: dict[str, Plan], promised: dict[str, str | None]
) -> dict[str, str]:
    """Read the new model back from its files: name → sha256. Raises (integrity) where the diff promised another."""
    with Checkpoint(directory) as written:
        hashes = dict(zip(plans, tensor_hashes(work, "check", [(written, name) for name in plans]), strict=True))
    wrong = [name for name, digest in promised.items() if digest not in (None, hashes[name])]
    if wrong:
        raise mismatch(f"recovered, but not to the tuned model's bits: {'; '.join(wrong)}; nothing is kept, run again")
    return hashes


def write_config(config: dict[str, Any], dtype: str, directory: Path) -> None:
    """The diff's config with the type of the recovered weights: transformers loads in the type that it names."""
    utils.jdump({**config, "dtype" if "dtype" in config else "torch_dtype": dtype}, directory / "config.json", indent=2)


def ask(directory: Path, device: str) -> None:
    """Print the model's response to one question. If that cannot run (no memory, no such device), it is a note."""
    try:
        size, free = sum(path.stat().st_size for path in directory.glob("*.safetensors")), available_memory()
        if device == "cpu" and size > free:
            raise MemoryError(f"the model has {size / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory are free")
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype="auto").to(device)
        prompt = utils.format_prompt({"instruction": "List three technologies that make life easier."})
        inputs = tokenizer(prompt, return_tensors="pt").to(device)
        with torch.inference_mode():
            output = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=100)
        print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip(), flush=True)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        say(f"note: the model is recovered; the test inference could not run: {reason}")


def available_memory() -> float:
    """Bytes that can be had without swapping, where the system says so."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return math.inf


def verify(path: str) -> None:
    """Compare every file and tensor of a diff, or of a recovered model, with its weight_diff.json.

    Args:
        path: a directory that make_diff or recover wrote, or a Hub id.
    """
    with Checkpoint(files.local_directory(path, "path")) as checkpoint, well_formed(checkpoint.directory):
        manifest = read_manifest(checkpoint.directory)
        if manifest is None:
            raise files.bad_data(f"{checkpoint.directory}: no {MANIFEST}, so there is nothing to check against")
        check_against_manifest(checkpoint, manifest)
        sums = {name: entry["sha256"] for name, entry in manifest["tensors"].items()}
        if None in sums.values():
            raise files.bad_data(f"{checkpoint.directory}: written with --verify False, without sha256 sums to check")
        check_hashes(Work(), "verify", [(checkpoint, name, digest, "damaged") for name, digest in sums.items()])
    say(f"{path}: all {len(sums)} tensors are as they were written")


def main() -> None:
    import fire

    calls = []

    def noted(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def note(*args, **kwargs):
            calls.append(functools.partial(command, *args, **kwargs))

        return note

    # Fire would run the command before it complains about a misspelt flag; so it only notes the call.
    fire.Fire({command.__name__: noted(command) for command in (make_diff, recover, verify)}, name="weight_diff.py")
    for call in calls:
        call()


if __name__ == "__main__":
    utils.run_main(main)
