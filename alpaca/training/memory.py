"""How much memory a training run needs on each GPU, from the model's config and the flags alone.

    python train.py --model_name_or_path <llama-7b> --bf16 True --fsdp "full_shard auto_wrap" \
        --gradient_accumulation_steps 8 --estimate_memory True --estimate_gpus 4 --estimate_gib 80

No weights are read or allocated. `estimate` is arithmetic over two records of plain numbers: the model's `Shape` and
the run's `Plan`. What it leaves out is what a config does not tell: the CUDA context, libraries' workspaces and the
allocator's fragmentation, for which `HEADROOM` of the device is kept free.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers

from alpaca.training.loss import CHUNK

GIB = 2**30
HEADROOM = 0.08  # of the device
STATES = {"adamw": 2, "adam": 2, "lion": 1, "sgd": 0, "adagrad": 1, "rmsprop": 1, "adafactor": 0}  # by prefix


@dataclass(frozen=True)
class Shape:
    """What of a model's size matters here. Widths in features, parameters in elements."""

    parameters: int
    layers: int
    layer_parameters: int  # of one repeated layer
    hidden: int
    attention: int  # width of the queries of all heads
    intermediate: int
    vocabulary: int
    heads: int
    gated: bool  # the MLP multiplies two projections (LLaMA) or has one (OPT)
    relu: bool  # whose output is all that its backward pass needs
    rms_norm: bool
    adapted: int = 0  # inputs + outputs of all linear layers that LoRA adapts


@dataclass(frozen=True)
class Plan:
    """How a run is laid out. Bytes are per element."""

    gpus: int = 1
    engine: str = "none"  # or "fsdp" or "deepspeed"
    sharded: str = "nothing"  # or "optimizer", "gradients" (and optimizer states), "weights" (and both)
    offload_weights: bool = False
    offload_optimizer: bool = False
    weight_bytes: int = 4
    compute_bytes: int = 4  # 2 with --bf16 or --fp16
    states: int = 2  # optimizer states per trained weight
    batch_size: int = 8  # examples in a micro-batch
    length: int = 512  # tokens of the longest example
    accumulation: int = 1
    sync_each_batch: bool = False
    padding_free: bool = True
    eager: bool = False  # attention that stores its scores
    checkpointing: bool = False
    lora_r: int = 0


def activation_bytes(shape: Shape, plan: Plan) -> tuple[int, int, int]:
    """What the backward pass needs of one layer, of what is kept of a checkpointed layer, and of the loss.

    Counted tensor by tensor over the forward pass of a LLaMA block: the input of each norm in float32, its normalised
    value, each matrix's input, queries, keys, values and the attention's output, and the MLP's products. For a micro-
    batch whose examples all have the full length.
    """
    tokens, c, h = plan.batch_size * plan.length, plan.compute_bytes, shape.hidden
    # Autocast keeps the stream between layers in the weights' type; FSDP and DeepSpeed cast the weights themselves.
    s = plan.weight_bytes if plan.engine == "none" else c
    cast = s != c  # then each of the five inputs of q, k, v, gate and up is a copy of its own
    norm = (4 if shape.rms_norm else s) * h + (s * h if shape.rms_norm and not plan.lora_r else 0)
    inputs = (5 if shape.gated else 4) * c * h if cast else 2 * c * h
    attention = c * 4 * shape.attention  # keys and values are repeated for all heads
    mlp = c * shape.intermediate * (4 if shape.gated else 1 if shape.relu else 2)
    # Each adapter keeps its own copy of its input and a byte of dropout mask for each feature.
    adapters = 4 * c * h + 6 * h + shape.intermediate if plan.lora_r else 0
    rows, length = (1, tokens) if plan.padding_free else (plan.batch_size, plan.length)
    pairs = rows * length**2  # of tokens: the mask, and with eager attention every head's probabilities
    scores = pairs * shape.heads * (4 + (c if c < 4 else 0)) if plan.eager else pairs * c
    layer = tokens * (2 * norm + inputs + attention + mlp + adapters) + scores
    # In float32 a chunk at a time: the softmax of its logits and two gradients. The logits' gradient is there in chunks
    # and as a whole. As if all tokens were trained on.
    logits = tokens * shape.vocabulary
    if logits <= CHUNK:
        loss = logits * (12 + (c if c < 4 else 0))
    else:
        loss = max(3 * c * logits, 2 * c * logits + 12 * CHUNK)
    return layer, tokens * h * s, loss


def estimate(shape: Shape, plan: Plan) -> dict[str, float]:
    """GiB per GPU of each part, and their sum; "host" is per GPU too, in the machine's own memory.

    The sum is that of the fullest moment: the end of a forward pass, when gradients of earlier micro-batches are there.
    """
    weights, c = plan.weight_bytes * shape.parameters, plan.compute_bytes
    trained = plan.lora_r * shape.adapted or shape.parameters
    trained_bytes = 4 if plan.lora_r else plan.weight_bytes  # adapters are float32 whatever the base
    if plan.lora_r:
        weights += trained_bytes * trained
    gradients, states = trained_bytes * trained, plan.states * trained_bytes * trained
    if plan.engine == "deepspeed" and c < 4:  # weights and gradients in 16 bits, float32 weights with the optimizer
        weights, gradients, states = c * shape.parameters, c * trained, 4 * (plan.states + 1) * trained

    level = ("nothing", "optimizer", "gradients", "weights").index(plan.sharded)
    states /= plan.gpus if level >= 1 else 1
    gradients /= plan.gpus if level >= 2 else 1
    weights /= plan.gpus if level >= 3 or plan.engine == "fsdp" else 1  # FSDP's own copy is always sharded

    rest = shape.parameters - shape.layers * shape.layer_parameters  # embeddings and head
    linear = shape.parameters - shape.vocabulary * shape.hidden  # all but the embedding is multiplied with
    buffers = 0
    if plan.engine == "fsdp":
        if plan.sharded == "weights":  # two layers gathered, the next one already on its way, and the embeddings
            buffers += c * (2 * shape.layer_parameters + rest)
        else:  # shard_grad_op: gathered from the forward pass to the backward pass
            buffers += c * shape.parameters
        if not plan.lora_r:
            buffers += c * (2 * shape.layer_parameters + rest)  # their gradients before they are scattered
        if plan.accumulation > 1 and not plan.sync_each_batch:
            buffers += c * trained  # between micro-batches each GPU adds up whole gradients
    elif plan.engine == "deepspeed":
        buffers += c * min(shape.parameters, 10**9) if level >= 3 else 0  # stage3_max_live_parameters
    else:
        buffers += linear * c if c < plan.weight_bytes else 0  # autocast's 16-bit copies
        buffers += gradients if plan.gpus > 1 else 0  # DistributedDataParallel's buckets

    layer, kept, loss = activation_bytes(shape, plan)
    activations = shape.layers * kept + max(layer, loss) if plan.checkpointing else shape.layers * layer + loss
    host = 0
    if plan.offload_weights:
        host, weights = host + weights, 0
    if plan.offload_optimizer:
        host, states, gradients = host + states + gradients, 0, 0
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer states": states,
        "buffers": buffers,
        "activations": activations,
    }
    return {name: size / GIB for name, size in {**parts, "total": sum(parts.values()), "host": host}.items()}


def remedies(shape: Shape, plan: Plan) -> list[tuple[str, Plan]]:
    """What helps, in order of what it costs in speed or fidelity; each on top of those before it."""
    steps = []

    def turn(flag, condition=True, **changes):
        last = steps[-1][1] if steps else plan
        changed = replace(last, **changes)
        if condition and estimate(shape, changed)["total"] < estimate(shape, last)["total"]:
            steps.append((flag, changed))

    fsdp = {"engine": "fsdp", "sharded": "weights"}
    sync = '--accelerator_config \'{"gradient_accumulation_kwargs": {"sync_each_batch": true}}\''
    turn('--fsdp "full_shard auto_wrap"', plan.gpus > 1 and plan.engine == "none", **fsdp)
    by_fsdp = plan.engine == "fsdp" or bool(steps)
    turn(sync, by_fsdp and plan.accumulation > 1 and not plan.sync_each_batch, sync_each_batch=True)
    turn("--gradient_checkpointing True", not plan.checkpointing, checkpointing=True)
    smaller = f"--per_device_train_batch_size 1 --gradient_accumulation_steps {plan.accumulation * plan.batch_size}"
    turn(smaller, plan.batch_size > 1, batch_size=1, accumulation=plan.accumulation * plan.batch_size)
    offload = {"offload_weights": True, "offload_optimizer": True}
    if by_fsdp or plan.engine == "none":
        launcher = "" if plan.gpus > 1 else "torchrun --nproc_per_node=1 … "
        turn(f'{launcher}--fsdp "full_shard auto_wrap offload"', not plan.offload_weights, **fsdp, **offload)
    else:
        turn(
            "--deepspeed ./configs/default_offload_opt_param.json",
            not plan.offload_weights,
            sharded="weights",
            **offload,
        )
    last = steps[-1][1] if steps else plan
    turn(sync, last.engine == "fsdp" and last.accumulation > 1 and not last.sync_each_batch, sync_each_batch=True)
    turn("--lora_r 16", not plan.lora_r, lora_r=16)
    turn("--dtype bfloat16", plan.weight_bytes > 2, weight_bytes=2)
    return steps


def read_shape(config: transformers.PretrainedConfig, target_modules: str) -> Shape:
    """Count a model on the meta device. `target_modules` is --lora_target_modules."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    layers = max(lists, key=len)
    wanted = [name.strip() for name in target_modules.split(",")]
    adapted = sum(
        sum(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D)
        and (
            name.split(".")[-1] in wanted or (wanted == ["all-linear"] and module is not model.get_output_embeddings())
        )
    )
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=len(layers),
        layer_parameters=sum(parameter.numel() for parameter in layers.parameters()) // len(layers),
        hidden=text.hidden_size,
        attention=head * text.num_attention_heads,
        intermediate=getattr(text, "intermediate_size", None) or getattr(text, "ffn_dim", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        heads=text.num_attention_heads,
        gated=any(name.endswith(("gate_proj", "gate_up_proj")) for name, _ in model.named_modules()),
        relu="relu" in (getattr(text, "activation_function", None), getattr(text, "hidden_act", None)),
        rms_norm=any("RMSNorm" in type(module).__name__ for module in model.modules()),
        adapted=adapted,
    )


def read_plan(model_args: Any, args: Any, padding_free: bool) -> Plan:
    """The flags of train.py, as its argument classes hold them, in numbers."""
    # Called activation_checkpointing since transformers 5.23, where the older name is an alias.
    recomputes = args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)
    plan = Plan(
        gpus=args.estimate_gpus or args.world_size,
        weight_bytes=4 if model_args.dtype == "float32" else 2,
        compute_bytes=2 if args.half_precision or model_args.dtype != "float32" else 4,
        states=next((n for name, n in STATES.items() if args.optim.startswith(name)), 2),
        batch_size=args.per_device_train_batch_size,
        length=args.model_max_length,
        accumulation=args.gradient_accumulation_steps,
        sync_each_batch=bool((args.accelerator_config.gradient_accumulation_kwargs or {}).get("sync_each_batch")),
        padding_free=padding_free,
        eager=model_args.attn_implementation == "eager",
        checkpointing=bool(recomputes or (args.fsdp_config or {}).get("activation_checkpointing")),
        lora_r=model_args.lora_r,
    )
    if args.fsdp_config is not None:
        sharded = "weights" if args.fsdp_config["reshard_after_forward"] else "gradients"
        offload = bool(args.fsdp_config["cpu_offload"])
        return replace(plan, engine="fsdp", sharded=sharded, offload_weights=offload, offload_optimizer=offload)
    if args.zero_config is not None:
        zero = args.zero_config.get("zero_optimization", {})
        offloads = {
            f"offload_{part}": zero.get(f"offload_{name}", {}).get("device", "none") != "none"
            for part, name in (("weights", "param"), ("optimizer", "optimizer"))
        }
        sharded = ("nothing", "optimizer", "gradients", "weights")[zero.get("stage", 0)]
        return replace(plan, engine="deepspeed", sharded=sharded, **offloads)
    return plan


def describe(shape: Shape, plan: Plan, device_gib: float | None) -> str:
    """The report that --estimate_memory prints. `device_gib`: of one GPU, None where it is not known."""
    parts = estimate(shape, plan)
    engine = {"none": "nothing sharded", "fsdp": "FSDP", "deepspeed": "DeepSpeed"}[plan.engine]
    lines = [
        f"{shape.parameters / 1e9:.2f}e9 parameters. Naively 7 x 4 x 4 = 112 GB for a 7B model; for this one "
        f"{shape.parameters * 16 / 1e9:.1f} GB = {shape.parameters * 16 / GIB:.1f} GiB: float32 weights, gradients and "
        "two optimizer states on one GPU, without activations.",
        f"This run: {plan.gpus} GPU{'s' * (plan.gpus > 1)}, {engine}"
        + (f", {plan.sharded} sharded" if plan.gpus > 1 and plan.engine != "none" else "")
        + (f", LoRA of rank {plan.lora_r}" if plan.lora_r else "")
        + f", {8 * plan.weight_bytes}-bit weights, {8 * plan.compute_bytes}-bit arithmetic, micro-batches of at most "
        f"{plan.batch_size} x {plan.length} tokens" + (", gradient checkpointing" if plan.checkpointing else ""),
        "",
        "GiB per GPU",
        *(f"  {name:<17}{parts[name]:8.2f}" for name in list(parts)[:6]),
    ]
    if parts["host"]:
        lines.append(
            f"  and {parts['host']:.2f} of the machine's memory for each GPU, {parts['host'] * plan.gpus:.2f} in all"
        )
    lines.append("")
    if device_gib is None:
        lines.append("No GPU here to compare with; --estimate_gib 80 compares with one of 80 GiB.")
        return "\n".join(lines)
    usable = device_gib * (1 - HEADROOM)
    room = f"{device_gib:.1f} GiB, of which {device_gib * HEADROOM:.1f} are kept for CUDA itself and fragmentation"
    if parts["total"] <= usable:
        lines.append(f"Fits in {room}: {usable - parts['total']:.1f} GiB to spare.")
        return "\n".join(lines)
    lines.append(f"Does not fit in {room}: {parts['total'] - usable:.1f} GiB too many. Turn next, one after the other:")
    for flag, changed in remedies(shape, plan):
        total = estimate(shape, changed)["total"]
        lines.append(f"  {flag}  ->  {total:.2f} GiB" + (", which fits" if total <= usable else ""))
        if total <= usable:
            return "\n".join(lines)
    lines.append("and if that is not enough, more GPUs or a smaller model.")
    return "\n".join(lines)
