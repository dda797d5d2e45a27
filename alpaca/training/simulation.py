"""One training step at true size without allocating anything: PyTorch's fake tensors under its memory tracker.

The model is built on the meta device and moved, as fake tensors, to the "CPU" (autograd on fake CUDA tensors needs a
CUDA build); the process group is a fake one of any size, so that `fully_shard` shards as it would. This is the one file
that touches modules private to PyTorch; `simulate` says so in a line where a version has moved them.
"""

import contextlib
import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import transformers

from alpaca.common import ExitCode, ExpectedError
from alpaca.training.batches import DataCollatorForSupervisedDataset, DataCollatorWithoutPadding
from alpaca.training.loss import use_lean_loss

ON_HOST = {"weights", "gradients", "optimizer states"}  # with offload


@dataclass(frozen=True)
class Layout:
    """How a step is laid out."""

    gpus: int = 1
    fsdp: bool = False
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

    A deep model is simulated at two smaller depths and continued along the line between them. Phases are the forward
    pass, the backward pass of each of the outermost layers, and the optimizer; in each of them every further layer
    costs the same, so that the line is exact, and memory between the outermost layers lies between theirs. Raises
    ExpectedError (exit 2) where this PyTorch can't simulate.
    """
    layers = config.get_text_config().num_hidden_layers
    period = _period(config)
    ends = max(3, period)  # layers at either end that are looked at; FSDP's transfers lag by two
    shallow = 2 * ends + 2 * period + (layers - 2 * ends) % period
    deep = shallow + period
    if layers <= deep:
        return _step(config, layout, ends)
    first, second = (_step(_cut(config, depth), layout, ends) for depth in (shallow, deep))
    share = (layers - shallow) / period
    return {
        phase: {kind: size + share * (second[phase][kind] - size) for kind, size in kinds.items()}
        for phase, kinds in first.items()
        if phase in second
    }


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


def _step(config: transformers.PretrainedConfig, layout: Layout, ends: int) -> dict[str, dict[str, float]]:
    try:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.distributed._tools import fsdp2_mem_tracker, mem_tracker
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError as error:
        raise ExpectedError(f"this PyTorch ({torch.__version__}) can't simulate a step: {error}", ExitCode.USAGE)
    kind_of = {**_kinds(mem_tracker._MemRefType), **_kinds(fsdp2_mem_tracker._FSDPRefType)}
    base = fsdp2_mem_tracker.FSDPMemTracker if layout.fsdp else mem_tracker.MemTracker
    host = ON_HOST if layout.offload else set()

    class Tracker(base):
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

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.gpus)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (layout.gpus,)) if layout.fsdp else None
        model, batch = _build(config, layout)
        layers = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
        mode = FakeTensorMode(allow_non_fake_inputs=True)  # the meta parameters, on their way
        with mode:
            if layout.fsdp:
                _shard(model, layout, mesh)
            model.to_empty(device="cpu")
            batch = {k: mode.from_tensor(v) if torch.is_tensor(v) else v for k, v in batch.items()}
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = _optimizer(trained, layout)
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

            for number, layer in enumerate(layers):
                from_end = number - len(layers)
                where = number if number < ends else from_end if from_end >= -ends else "inner"
                layer.register_forward_hook(name_phase(f"backward, layer {where}"))
            with tracker:
                for step in range(2):  # the optimizer's states are there from the second on
                    tracker.watching = step == 1
                    last = min(layout.accumulation, 2) - 1  # every micro-batch after the second is like it
                    for number in range(last + 1):
                        if layout.fsdp:
                            model.set_requires_gradient_sync(number == last or layout.sync_each_batch)
                        tracker.phase = "forward"
                        with _autocast(layout):
                            loss = model(**batch).loss
                        tracker.phase = "loss"
                        loss.backward()
                        del loss
                        tracker.reset_mod_stats()
                    optimizer.step()
                    optimizer.zero_grad()
            found = {}
            for phase, (_, kinds) in tracker.peaks.items():
                found[phase] = dict.fromkeys(sorted(set(kind_of.values())), 0.0)
                for kind, size in kinds.items():
                    found[phase][kind_of[kind]] += size
            return found
    finally:
        dist.destroy_process_group()


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
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=layout.attention or "sdpa"
        )
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
    """As accelerate does: the layers, the embedding, and what comes behind the layers, each for itself."""
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
    if head is not None and head.weight is not embedding.weight:
        fully_shard(embedding, **options)
        fully_shard(head, **{**options, "reshard_after_forward": False})
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
