"""One training step at true size without allocating anything: PyTorch's fake tensors under its memory tracker.

The model is built on the meta device and moved, as fake tensors, to the "CPU" (autograd on fake CUDA tensors needs a
CUDA build); the process group is a fake one of any size, so that `fully_shard` shards as it would. `simulate` gives the
step's memory, `count_work` what it computes, reads, writes and sends. This is the one file that touches modules private
to PyTorch (`PRIVATE`); a line says so where a version has moved them.
"""

import collections
import contextlib
import copy
import functools
import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

from alpaca.common import ExitCode, ExpectedError
from alpaca.training.batches import DataCollatorForSupervisedDataset, DataCollatorWithoutPadding
from alpaca.training.loss import use_lean_loss

ON_HOST = {"weights", "gradients", "optimizer states"}  # with offload
# What is used here of PyTorch's private modules.
PRIVATE = {
    "torch._subclasses.fake_tensor": ["FakeTensorMode"],
    "torch.distributed._tools.mem_tracker": ["MemTracker", "_MemRefType"],
    "torch.utils._python_dispatch": ["TorchDispatchMode", "_disable_current_modes"],
    "torch.distributed.tensor._sharding_prop": ["ShardingPropagator"],
    "torch.distributed._tools.fsdp2_mem_tracker": ["FSDPMemTracker", "_FSDPRefType"],
    "torch.testing._internal.distributed.fake_pg": ["FakeStore"],
}
TRACKER = ["_update_peak_stats", "_curr_mem_snap", "_in_opt", "_param_to_grad_hook_handles", "reset_mod_stats"]


@dataclass(frozen=True)
class Layout:
    """How a step is laid out."""

    gpus: int = 1
    fsdp: bool = False
    replicas: int = 1  # hybrid_shard: groups of GPUs that each hold the whole model, sharded inside
    reshard: bool = True  # full_shard; False: shard_grad_op
    offload: bool = False
    dtype: str = "float32"  # of the weights
    compute_dtype: str = "float32"  # "bfloat16" with --bf16, also for --fp16
    autocast: bool = True  # what --bf16 does without FSDP and DeepSpeed
    optimizer: str = "adamw_torch"
    batch_size: int = 8  # examples in a micro-batch
    length: int = 512  # tokens of each
    accumulation: int = 1
    sync_each_batch: bool = False
    packed: bool = True
    attention: str | None = None
    checkpointing: bool = False
    lora_r: int = 0
    lora_targets: str = "all-linear"


def simulate(config: transformers.PretrainedConfig, layout: Layout) -> dict[str, dict[str, float]]:
    """The bytes on one GPU, by kind, at the fullest moment of each phase of a step: {phase: {kind: bytes}}.

    Phases are the forward pass, the backward pass of each of the outermost layers, and the optimizer; in each of them
    every further layer costs the same, and memory between the outermost layers lies between theirs. Raises
    ExpectedError (exit 2) where this PyTorch can't simulate.
    """
    ends = max(3, _period(config))  # layers at either end that are looked at; FSDP's transfers lag by two
    flat = _by_depth(config, ends, lambda shallow: _flat(_step(shallow, layout, ends)))
    phases: dict[str, dict[str, float]] = {}
    for (phase, kind), size in flat.items():
        phases.setdefault(phase, {})[kind] = size
    return phases


def _flat(phases: dict[str, dict[str, float]]) -> dict[tuple[str, str], float]:
    return {(phase, kind): size for phase, kinds in phases.items() for kind, size in kinds.items()}


def _by_depth(config: transformers.PretrainedConfig, ends: int, figures: Callable[[Any], dict]) -> dict:
    """`figures` of the config; for a deep model, those of two smaller depths and on along the line between them.

    The line is exact where every layer between the `ends` outermost ones costs the same.
    """
    layers, period = config.get_text_config().num_hidden_layers, _period(config)
    shallow = 2 * ends + period + (layers - 2 * ends) % period
    deep = shallow + period
    if layers <= deep:
        return figures(config)
    first, second = (figures(_cut(config, depth)) for depth in (shallow, deep))
    share = (layers - shallow) / period
    return {key: (1 - share) * first.get(key, 0) + share * second.get(key, 0) for key in {**first, **second}}


def _period(config: transformers.PretrainedConfig) -> int:
    """After how many layers their types begin again."""
    types = getattr(config.get_text_config(), "layer_types", None) or [None]
    return next(p for p in range(1, len(types) + 1) if all(t == types[i % p] for i, t in enumerate(types)))


def _cut(config: transformers.PretrainedConfig, layers: int) -> transformers.PretrainedConfig:
    """The same model with fewer layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    whole = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return config


@contextlib.contextmanager
def _fakes(config: transformers.PretrainedConfig, layout: Layout) -> Iterator[SimpleNamespace]:
    """Model, optimizer and micro-batch, sharded as the layout says, of tensors that have a shape and no memory."""
    private = _private()
    dist.init_process_group("fake", store=private.FakeStore(), rank=0, world_size=layout.gpus)
    try:
        sizes = (layout.replicas, layout.gpus // layout.replicas) if layout.replicas > 1 else (layout.gpus,)
        names = ("replicate", "shard")[-len(sizes) :]
        mesh = dist.device_mesh.init_device_mesh("cpu", sizes, mesh_dim_names=names) if layout.fsdp else None
        model, batch = _build(config, layout)
        mode = private.FakeTensorMode(allow_non_fake_inputs=True)  # the meta parameters, on their way
        with mode:
            if layout.fsdp:
                _shard(model, layout, mesh)
            model.to_empty(device="cpu")
            batch = {k: mode.from_tensor(v) if torch.is_tensor(v) else v for k, v in batch.items()}
            optimizer = _optimizer([parameter for parameter in model.parameters() if parameter.requires_grad], layout)
            with _shapes_apart(private):
                yield SimpleNamespace(model=model, batch=batch, optimizer=optimizer, private=private)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _shapes_apart(private: SimpleNamespace) -> Iterator[None]:
    """Hides from counters that a sharded tensor learns an operation's outcome by running it on fakes of whole tensors.

    They are not the step's, and PyTorch 2.11 asks in each step.
    """
    propagator, ask = private.ShardingPropagator, private.ask

    def apart(*arguments):
        with private._disable_current_modes():
            return ask(*arguments)

    propagator._propagate_tensor_meta_non_cached = apart
    try:
        yield
    finally:
        propagator._propagate_tensor_meta_non_cached = ask


def _private() -> SimpleNamespace:
    try:
        modules = {module: importlib.import_module(module) for module in PRIVATE}
        found = {name: getattr(modules[m], name) for m, names in PRIVATE.items() for name in names}
        return SimpleNamespace(**found, ask=found["ShardingPropagator"]._propagate_tensor_meta_non_cached)
    except (ImportError, AttributeError) as error:
        raise ExpectedError(
            f"this PyTorch ({torch.__version__}) can't simulate a step: {error}; --estimate_memory and --estimate_time "
            "need one that requirements.txt allows",
            ExitCode.USAGE,
        )


def _pass(
    model: Any, batch: dict[str, Any], layout: Layout, last: bool, between: Callable[[], None] = lambda: None
) -> None:
    """Forward and backward of a micro-batch, the step's last one or another."""
    if layout.fsdp:
        model.set_requires_gradient_sync(last or layout.sync_each_batch)
    with _autocast(layout):
        loss = model(**batch).loss
    between()
    loss.backward()


def _step(config: transformers.PretrainedConfig, layout: Layout, ends: int) -> dict[str, dict[str, float]]:
    with _fakes(config, layout) as fakes:
        private, model, optimizer = fakes.private, fakes.model, fakes.optimizer
        kind_of = {**_kinds(private._MemRefType), **_kinds(private._FSDPRefType)}
        host = ON_HOST if layout.offload else set()

        class Tracker(private.FSDPMemTracker if layout.fsdp else private.MemTracker):
            """Keeps the fullest moment of each phase, of what lies on the GPU, instead of every module's."""

            phase, peaks, watching = "forward", {}, False

            def _update_peak_stats(self, peak_state):
                phase = "optimizer" if self._in_opt else self.phase
                if not self.watching or (layout.offload and phase == "optimizer"):
                    return
                for kinds in self._curr_mem_snap.values():
                    on_gpu = {kind: size for kind, size in kinds.items() if kind != "Total"}
                    total = sum(size for kind, size in on_gpu.items() if kind_of[kind] not in host)
                    if total > self.peaks.get(phase, (0, None))[0]:
                        self.peaks[phase] = total, on_gpu

        tracker = Tracker(model, optimizer) if layout.fsdp else Tracker()
        tracker.peaks = {}
        if not layout.fsdp:
            nothing = SimpleNamespace(remove=lambda: None)  # a frozen weight can't be hooked, as the tracker would
            frozen = (parameter for parameter in model.parameters() if not parameter.requires_grad)
            tracker._param_to_grad_hook_handles.update((parameter, (nothing, nothing)) for parameter in frozen)
            tracker.track_external(model, optimizer)

        def name_phase(phase):  # from the moment on when the layer's backward pass begins
            def hook(module, inputs, output):
                hidden = output[0] if isinstance(output, tuple) else output
                if hidden.requires_grad:
                    hidden.register_hook(lambda gradient: setattr(tracker, "phase", phase))

            return hook

        layers = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
        for number, layer in enumerate(layers):
            from_end = number - len(layers)
            where = number if number < ends else from_end if from_end >= -ends else "inner"
            layer.register_forward_hook(name_phase(f"backward, layer {where}"))
        with tracker:
            for step in range(2):  # the optimizer's states are there from the second on
                tracker.watching = step == 1
                last = min(layout.accumulation, 2) - 1  # every micro-batch after the second is like it
                for number in range(last + 1):
                    tracker.phase = "forward"
                    _pass(model, fakes.batch, layout, number == last, lambda: setattr(tracker, "phase", "loss"))
                    tracker.reset_mod_stats()
                optimizer.step()
                optimizer.zero_grad()
        found = {}
        for phase, (_, kinds) in tracker.peaks.items():
            found[phase] = dict.fromkeys(sorted(set(kind_of.values())), 0.0)
            for kind, size in kinds.items():
                found[phase][kind_of[kind]] += size
        return found


class Operation(NamedTuple):
    """One kernel or one collective of a step."""

    phase: str  # "forward" and "backward" of a micro-batch that is not the step's last, "last forward", … "optimizer"
    kind: str  # "kernel"; FSDP's "copy" beside them; or a collective: "gather", "scatter", "reduce"
    flops: int
    bytes: int  # read and written; of a collective, the tensor that is whole


COLLECTIVES = {"_allgather_base_": ("gather", 0), "_reduce_scatter_base_": ("scatter", 1), "allreduce_": ("reduce", 0)}
NO_KERNEL = re.compile("empty|^_unsafe_view$|^set_$|^resize_$|^lift")


def _attention_flops(query, key, value, *_, **__):
    """Scores and their products with the values. PyTorch 2.11's own refuses fewer heads of keys than of queries."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (key.shape[-1] + value.shape[-1])


def _attention_backward_flops(_, query, key, value, *__, **___):
    """Scores again; gradients of scores and values; of queries and keys."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (3 * key.shape[-1] + 2 * value.shape[-1])


FLOPS = {
    **flop_counter.flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def count_work(config: transformers.PretrainedConfig, layout: Layout) -> dict[Operation, float]:
    """How often each operation runs in the micro-batches of a step that differ, and in the optimizer, on one GPU.

    FLOPs are those of PyTorch's `FlopCounterMode`, which takes causal attention for full. Raises ExpectedError (exit 2)
    where this PyTorch can't simulate.
    """
    return _by_depth(config, max(3, _period(config)), lambda shallow: _work(shallow, layout))


def _work(config: transformers.PretrainedConfig, layout: Layout) -> dict[Operation, float]:
    with _fakes(config, layout) as fakes:
        count = CountWork()
        for last in [False, True] if layout.accumulation > 1 else [True]:
            prefix = "last " if last else ""
            with count:
                count.phase = f"{prefix}forward"
                between = functools.partial(setattr, count, "phase", f"{prefix}backward")
                _pass(fakes.model, fakes.batch, layout, last, between)
        fakes.optimizer.step()  # makes its states
        count.phase = "optimizer"
        with count:
            torch.nn.utils.clip_grad_norm_(fakes.model.parameters(), 1.0)
            fakes.optimizer.step()
        return dict(count.operations)


class CountWork(TorchDispatchMode):
    """Counts the operations that reach the device, in the phase that it is told."""

    def __init__(self):
        super().__init__()
        self.phase, self.operations = "", collections.Counter()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        outcome = function(*arguments, **named)
        name = function.overloadpacket.__name__
        if function.namespace == "c10d":
            if name in COLLECTIVES:
                kind, whole = COLLECTIVES[name]
                self._add(kind, 0, _bytes(arguments[whole]))
        elif name == "all_gather_copy_in":  # takes the whole buffer too, of which it writes its own part
            self._add("copy", 0, 2 * _bytes(arguments[0]))
        elif function.namespace in ("aten", "fsdp") and not (function.is_view or NO_KERNEL.search(name)):
            formula = FLOPS.get(function.overloadpacket)
            flops = 0 if formula is None else formula(*arguments, **named, out_val=outcome)
            written = outcome
            if not function._schema.returns:
                mutable = [argument.alias_info is not None for argument in function._schema.arguments]
                written = [one for one, changes in zip(arguments, mutable, strict=False) if changes]
            self._add("copy" if name == "chunk_cat" else "kernel", flops, _bytes((arguments, named)) + _bytes(written))
        return outcome

    def _add(self, kind: str, flops: int, size: int) -> None:
        self.operations[Operation(self.phase, kind, flops, size)] += 1


def _bytes(tree: Any) -> int:
    """Of all tensors, each at most as large as what it is a view of."""
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if torch.is_tensor(leaf)]
    tensors = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)


def _kinds(reference_types: Any) -> dict[Any, str]:
    """PyTorch's kinds of memory → the few of a report."""
    names = {"PARAM": "weights", "SHARDED_PARAM": "weights", "GRAD": "gradients", "SHARDED_GRAD": "gradients"}
    names |= {"OPT": "optimizer states", "OPTSTATE": "optimizer states", "ACT": "activations", "TEMP": "temporary"}
    names |= {"BUFFER": "activations", "INP": "activations", "OTH": "activations"}
    return {kind: names.get(kind.name, "gathered") for kind in reference_types}


def _build(config: Any, layout: Layout) -> tuple[Any, dict[str, Any]]:
    """The model on the meta device, as train.py prepares it, and the fullest micro-batch."""
    dtype = getattr(torch, layout.dtype)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=layout.attention)
        use_lean_loss(model)
        if layout.lora_r:
            from peft import LoraConfig, get_peft_model

            names = [name.strip() for name in layout.lora_targets.split(",")]
            targets = "all-linear" if names == ["all-linear"] else names
            model = get_peft_model(model, LoraConfig(r=layout.lora_r, target_modules=targets, task_type="CAUSAL_LM"))
    if layout.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if layout.lora_r and layout.checkpointing:
        model.enable_input_require_grads()
    model.train()
    for module in model.modules():  # drops layers by a number that it reads from a tensor, in transformers 5.17 always
        if hasattr(module, "layerdrop"):
            module.training = False  # of this module alone; memory is at its fullest with all layers
    ids = torch.ones(layout.length, dtype=torch.int64)
    rows = [{"input_ids": ids.clone(), "labels": ids.clone()} for _ in range(layout.batch_size)]
    if layout.packed:
        batch = DataCollatorWithoutPadding(responses_only=True, with_lengths=layout.attention is not None)(rows)
    else:
        batch = DataCollatorForSupervisedDataset(type("Tokenizer", (), {"pad_token_id": 0}))(rows)
        batch["use_cache"] = False
    batch["num_items_in_batch"] = torch.tensor(layout.batch_size * layout.length)
    return model, batch


def _shard(model: Any, layout: Layout, mesh: Any) -> None:
    """As accelerate does: each layer, the embedding, and the last norm with the head, which stay gathered."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    inner = model.get_base_model() if layout.lora_r else model
    compute = getattr(torch, layout.compute_dtype)
    same = layout.compute_dtype == layout.dtype
    policy = MixedPrecisionPolicy() if same else MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=compute)
    options = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": layout.reshard}
    wanted = set(inner._no_split_modules or ())
    for module in [module for module in inner.modules() if type(module).__name__ in wanted]:
        fully_shard(module, **options)
    head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    norms = [module for _, module in inner.base_model.named_children() if "Norm" in type(module).__name__]
    tied = head is not None and head.weight is embedding.weight
    if not tied:
        fully_shard(embedding, **options)
    tail = [*norms[-1:], *([embedding] if tied else []), *([] if head is None else [head])]
    if tail:
        fully_shard(tail, **{**options, "reshard_after_forward": False})
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _optimizer(parameters: list[torch.nn.Parameter], layout: Layout) -> torch.optim.Optimizer:
    if layout.optimizer.startswith("sgd"):
        return torch.optim.SGD(parameters, lr=1e-3, foreach=True)
    if layout.optimizer.startswith("adafactor"):
        return torch.optim.Adafactor(parameters, lr=1e-3, foreach=False)
    fused = layout.optimizer.endswith("fused")
    return torch.optim.AdamW(parameters, lr=1e-3, fused=fused or None, foreach=None if fused else True)


def _autocast(layout: Layout) -> contextlib.AbstractContextManager:
    if not layout.autocast or layout.fsdp or layout.compute_dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast("cpu", getattr(torch, layout.compute_dtype))
