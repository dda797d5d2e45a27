"""How much memory a training run needs on each GPU, from the model's config and the flags alone.

    python train.py --model_name_or_path <llama-7b> --bf16 True --fsdp "full_shard auto_wrap" \
        --gradient_accumulation_steps 8 --estimate_memory True --estimate_gpus 4 --estimate_gib 80

The figures are those of the real step of the real model, run on fake tensors (`simulation.simulate`). Arithmetic is
only what lies outside of it: DeepSpeed's states (Rajbhandari et al., 2020, section 3) and the buckets of
DistributedDataParallel. What no simulation sees (the CUDA context, buffers of NCCL and cuBLAS, fragmentation) is
`ALLOWANCE` of the device.
"""

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from tqdm import tqdm

from alpaca.training.simulation import Layout, simulate

GIB = 2**30
GPUS_PER_NODE = 8  # where nothing says how many
ALLOWANCE = 0.08  # of the device
STATES = {"adamw": 2, "adam": 2, "lion": 1, "sgd": 0, "adagrad": 1, "rmsprop": 1, "adafactor": 0}  # by prefix
PARTS = ("weights", "gradients", "optimizer states", "gathered", "activations", "temporary")
SYNC = '--accelerator_config \'{"gradient_accumulation_kwargs": {"sync_each_batch": true}}\''


@dataclass(frozen=True)
class Plan:
    """A run: the step's layout, and DeepSpeed's part in it, which can't be simulated."""

    layout: Layout
    zero_stage: int | None = None  # of DeepSpeed; None without it
    zero_offload: frozenset[str] = frozenset()  # "weights", "optimizer states"


def count_parameters(config: transformers.PretrainedConfig, layout: Layout) -> tuple[int, int]:
    """All parameters, and those that are trained."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    if not layout.lora_r:
        return total, total
    wanted = [name.strip() for name in layout.lora_targets.split(",")]
    head, linear = model.get_output_embeddings(), (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    adapted = sum(
        sum(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, linear)
        and (name.split(".")[-1] in wanted or (wanted == ["all-linear"] and module is not head))
    )
    return total + layout.lora_r * adapted, layout.lora_r * adapted


def estimate(config: transformers.PretrainedConfig, plan: Plan) -> dict[str, float]:
    """GiB per GPU of each part at the fullest moment, and their sum; "host" is per GPU too, in the machine's memory."""
    layout = plan.layout
    parts = dict.fromkeys((*PARTS, "host"), 0.0)
    if plan.zero_stage is not None:
        parts |= _deepspeed(config, plan)
    else:
        phases = simulate(config, layout)
        host = ("weights", "gradients", "optimizer states") if layout.offload else ()
        fullest = max(phases.values(), key=lambda kinds: sum(kinds[part] for part in kinds if part not in host))
        parts |= {part: size for part, size in fullest.items() if part not in host}
        if layout.offload:
            total, trained = count_parameters(config, layout)
            width = torch.finfo(getattr(torch, layout.dtype)).bits // 8
            states = STATES[next(name for name in STATES if layout.optimizer.startswith(name))]
            parts["host"] = (width * total + (1 + states) * width * trained) / layout.gpus
        if layout.gpus > 1 and not layout.fsdp:  # DistributedDataParallel's buckets
            parts["gathered"] += max(kinds["gradients"] for kinds in phases.values())
    on_gpu = {part: parts[part] / GIB for part in PARTS}
    return {**on_gpu, "total": sum(on_gpu.values()), "host": parts["host"] / GIB}


def _deepspeed(config: transformers.PretrainedConfig, plan: Plan) -> dict[str, float]:
    """Bytes: states by arithmetic, activations from a step in the type that DeepSpeed computes in."""
    layout, stage = plan.layout, plan.zero_stage
    kinds = simulate(config, replace(layout, gpus=1, dtype=layout.compute_dtype, autocast=False, accumulation=1))
    activations = max(kinds.values(), key=lambda k: k["activations"] + k["temporary"])
    total, trained = count_parameters(config, layout)
    width = torch.finfo(getattr(torch, layout.compute_dtype)).bits // 8
    states = STATES[next((name for name in STATES if layout.optimizer.startswith(name)), "adamw")]
    spread = [layout.gpus if stage >= level else 1 for level in (1, 2, 3)]
    parts = {
        "optimizer states": 4 * (states + (width < 4)) * trained / spread[0],  # and float32 weights beside 16-bit ones
        "gradients": width * trained / spread[1],
        "weights": width * total / spread[2],
        "gathered": width * min(total, 10**9) if stage == 3 else 0,  # stage3_max_live_parameters
        "activations": activations["activations"],
        "temporary": activations["temporary"],
        "host": 0,
    }
    moved = {*plan.zero_offload} | ({"gradients"} if "optimizer states" in plan.zero_offload else set())
    parts["host"] = sum(parts[part] for part in moved)
    return parts | dict.fromkeys(moved, 0)


def remedies(plan: Plan) -> list[tuple[str, Plan]]:
    """Flags that could help, each alone, the cheapest in speed or fidelity first."""
    layout = plan.layout

    def turned(**changes: Any) -> Plan:
        return replace(plan, layout=replace(layout, **changes))

    found = []
    if layout.optimizer == "adamw_torch" and plan.zero_stage is None:
        found.append(("--optim adamw_torch_fused", turned(optimizer="adamw_torch_fused")))
    if layout.fsdp and layout.accumulation > 1 and not layout.sync_each_batch:
        found.append((SYNC, turned(sync_each_batch=True)))
    if layout.gpus > 1 and not layout.fsdp and plan.zero_stage is None:
        found.append(('--fsdp "full_shard auto_wrap"', turned(fsdp=True)))
    if not layout.checkpointing:
        found.append(("--gradient_checkpointing True", turned(checkpointing=True)))
    if layout.batch_size > 1:
        small = {"batch_size": 1, "accumulation": layout.accumulation * layout.batch_size}
        flags = f"--per_device_train_batch_size 1 --gradient_accumulation_steps {small['accumulation']}"
        found.append((flags, turned(**small)))
    if plan.zero_stage is None:
        found.append(
            (f'{2 * layout.gpus} GPUs with --fsdp "full_shard auto_wrap"', turned(gpus=2 * layout.gpus, fsdp=True))
        )
        if not layout.offload:
            found.append(('--fsdp "full_shard auto_wrap offload"', turned(fsdp=True, reshard=True, offload=True)))
    elif plan.zero_stage < 3 or len(plan.zero_offload) < 2:
        offload = frozenset({"weights", "optimizer states"})
        changed = replace(plan, zero_stage=3, zero_offload=offload)
        found.append(("--deepspeed ./configs/default_offload_opt_param.json", changed))
    if not layout.lora_r:
        found.append(("--lora_r 16 --dtype bfloat16", turned(lora_r=16, dtype="bfloat16")))
    return found


def read_plan(model_args: Any, args: Any, packed: bool) -> Plan:
    """The flags of train.py, as its argument classes hold them."""
    # Called activation_checkpointing since transformers 5.23, where the older name is an alias.
    recomputes = args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)
    fsdp = args.fsdp_config or {}
    gpus = args.estimate_gpus or args.world_size
    layout = Layout(
        gpus=gpus,
        fsdp=args.fsdp_config is not None,
        replicas=max(1, gpus // GPUS_PER_NODE) if args.hybrid_shard else 1,
        reshard=bool(fsdp.get("reshard_after_forward", True)),
        offload=bool(fsdp.get("cpu_offload")),
        dtype=model_args.dtype,
        compute_dtype="bfloat16" if args.half_precision or model_args.dtype != "float32" else "float32",
        optimizer=str(getattr(args.optim, "value", args.optim)),
        batch_size=args.per_device_train_batch_size,
        length=args.model_max_length,
        accumulation=args.gradient_accumulation_steps,
        sync_each_batch=bool((args.accelerator_config.gradient_accumulation_kwargs or {}).get("sync_each_batch")),
        packed=packed,
        attention=model_args.attn_implementation,
        checkpointing=bool(recomputes or fsdp.get("activation_checkpointing")),
        lora_r=model_args.lora_r,
        lora_targets=model_args.lora_target_modules,
    )
    if args.zero_config is None:
        return Plan(layout)
    zero = args.zero_config.get("zero_optimization", {})
    names = {"weights": "param", "optimizer states": "optimizer"}
    offload = {part for part, name in names.items() if zero.get(f"offload_{name}", {}).get("device", "none") != "none"}
    return Plan(layout, zero.get("stage", 0), frozenset(offload))


def cut(plan: Plan, lengths: Any) -> Plan:
    """The plan for the longest of the examples, where they are known."""
    return plan if lengths is None else replace(plan, layout=replace(plan.layout, length=int(max(lengths))))


def describe(config: transformers.PretrainedConfig, plan: Plan, device_gib: float | None) -> str:
    """The report that --estimate_memory prints. `device_gib`: of one GPU, None where it is not known."""
    layout, parts = plan.layout, estimate(config, plan)
    parameters, trained = count_parameters(config, replace(layout, lora_r=0))[0], count_parameters(config, layout)[1]
    engine = "DeepSpeed ZeRO-" + str(plan.zero_stage) if plan.zero_stage is not None else "nothing sharded"
    if layout.fsdp:
        engine = f"FSDP, {'full_shard' if layout.reshard else 'shard_grad_op'}"
    if layout.replicas > 1:
        engine = f"FSDP, hybrid_shard in {layout.replicas} machines of {layout.gpus // layout.replicas}"
    lines = [
        f"{parameters / 1e9:.2f}e9 parameters. Naively 7 x 4 x 4 = 112 GB for a 7B model; for this one "
        f"{parameters * 16 / 1e9:.1f} GB = {parameters * 16 / GIB:.1f} GiB: float32 weights, gradients and two "
        "optimizer states on one GPU, without activations.",
        f"This run: {layout.gpus} GPU{'s' * (layout.gpus > 1)}, {engine}"
        + (f", LoRA of rank {layout.lora_r} ({trained:,} trained)" if layout.lora_r else "")
        + f", {layout.dtype} weights, {layout.compute_dtype} arithmetic, micro-batches of at most "
        f"{layout.batch_size} x {layout.length} tokens" + (", gradient checkpointing" if layout.checkpointing else ""),
        "",
        "GiB per GPU at the fullest moment of a simulated step",
        *(f"  {name:<17}{parts[name]:8.2f}" for name in (*PARTS, "total")),
    ]
    if plan.zero_stage is not None:
        lines.append("  (DeepSpeed can't be simulated: its states are arithmetic, the activations are simulated)")
    if parts["host"]:
        whole = parts["host"] * layout.gpus
        lines.append(f"  and {parts['host']:.2f} of the machine's memory for each GPU, {whole:.2f} in all")
    lines.append("")
    if device_gib is None:
        return "\n".join([*lines, "No GPU here to compare with; --estimate_gib 80 compares with one of 80 GiB."])
    usable = device_gib * (1 - ALLOWANCE)
    room = (
        f"{device_gib:.1f} GiB, of which {device_gib * ALLOWANCE:.1f} are kept for CUDA, NCCL, cuBLAS and fragmentation"
    )
    if parts["total"] <= usable:
        return "\n".join([*lines, f"Fits in {room}: {usable - parts['total']:.1f} GiB to spare."])
    lines.append(f"Does not fit in {room}: {parts['total'] - usable:.1f} GiB too many. One flag more, simulated:")
    tried = [
        (flag, estimate(config, changed)["total"])
        for flag, changed in tqdm(remedies(plan), desc="trying flags", disable=None, leave=False, file=sys.stderr)
    ]
    for flag, total in sorted(tried, key=lambda one: one[1] > usable):  # stable: those that fit, the cheapest first
        lines.append(f"  {flag}  ->  {total:.2f} GiB" + (", which fits" if total <= usable else ""))
    return "\n".join(lines)
