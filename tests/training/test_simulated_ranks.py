"""The simulated step of two ranks against two real ones: what they send, and how much memory they need."""

import json

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.profiler import ProfilerActivity, profile

from alpaca.training.attention import BY_EXAMPLE
from alpaca.training.simulation import Layout, _build, _optimizer, _pass, _shard, count_work, simulate
from tests.training import forked

pytestmark = pytest.mark.timeout(600)
# What FSDP2 calls, newest name first.
SENT = {
    "gather": ("all_gather_single", "all_gather_into_tensor"),
    "scatter": ("reduce_scatter_single", "reduce_scatter_tensor"),
}


def train_and_count(report, *flags):
    """train.py under FSDP2; writes what its second step hands to PyTorch's collectives: [name, bytes of the whole]."""
    from alpaca.training.callbacks import StepWatch

    calls = []

    def watch(kind, name):
        plain = getattr(dist, name)

        def watched(*arguments, **named):
            tensors = [value for value in (*arguments, *named.values()) if torch.is_tensor(value)]
            calls.append([kind, max(tensor.numel() * tensor.element_size() for tensor in tensors)])
            return plain(*arguments, **named)

        setattr(dist, name, watched)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            with open(f"{report}-{args.process_index}", "w") as file:
                json.dump(calls, file)
        calls.clear()

    for kind, names in SENT.items():
        watch(kind, next(name for name in names if hasattr(dist, name)))
    StepWatch.on_step_begin = on_step_begin
    forked.train_sharded(f"{report}-gathered", *flags)


@pytest.mark.parametrize("sync_each_batch", [False, True])
def test_a_simulated_step_sends_what_a_real_one_does(base, data, tmp_path, sync_each_batch):
    """Three micro-batches, in bf16."""
    flags = ["--model_name_or_path", base, "--data_path", data, "--output_dir", tmp_path / "out", "--max_steps", 3]
    flags += ["--save_strategy", "no", "--fsdp", "full_shard auto_wrap", "--bf16", "True"]
    flags += ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 3]
    if sync_each_batch:
        flags += ["--accelerator_config", '{"gradient_accumulation_kwargs": {"sync_each_batch": true}}']
    log = tmp_path / "log"
    ranks = forked.start_ranks(2, train_and_count, log, tmp_path / "calls", *flags)
    for rank in ranks:
        rank.join(300)
    assert [rank.exitcode for rank in ranks] == [0, 0], log.read_text()

    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")  # with the tokens that training added
    layout = Layout(gpus=2, fsdp=True, compute_dtype="bfloat16", batch_size=1, length=64, accumulation=3)
    expected = []
    for operation, number in count_work(config, Layout(**{**vars(layout), "sync_each_batch": sync_each_batch})).items():
        if operation.kind in SENT:
            times = 1 if operation.phase.startswith("last") else 2
            expected += [[operation.kind, operation.bytes]] * round(times * number)
    for rank in (0, 1):
        calls = json.loads((tmp_path / f"calls-{rank}").read_text())
        assert sorted(calls) == sorted(expected)
    scatters = sum(kind == "scatter" for kind, _ in expected)
    assert scatters == (3 if sync_each_batch else 1) * 3  # layer, embedding, and what comes behind the layers


def measure_peak(report, sizes, changes):
    """Steps on memory, and the bytes in use at the fullest moment of a step's passes.

    The least of many steps: what gloo's threads have sent goes when they come to it, in most steps too late.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config, layout = transformers.LlamaConfig(**sizes), Layout(**changes)
    model, batch = _build(config, layout)
    _shard(model, layout, dist.device_mesh.init_device_mesh("cpu", (2,)))
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        torch.nn.init.ones_(getattr(tensor, "_local_tensor", tensor))
    optimizer = _optimizer(list(model.parameters()), layout)

    def step():
        for number in range(layout.accumulation):
            _pass(model, batch, layout, number == layout.accumulation - 1)

    peaks = []
    for _ in range(30):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
        used = peak = 0
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            used += event.nbytes()
            peak = max(peak, used)
        peaks.append(peak)
        optimizer.step()
        optimizer.zero_grad()
    with open(f"{report}-{dist.get_rank()}", "w") as file:
        json.dump(min(peaks[1:]), file)


@pytest.mark.parametrize(
    "changes",
    [{}, {"compute_dtype": "bfloat16"}, {"accumulation": 2, "reshard": False}, {"checkpointing": True}],
    ids=str,
)
def test_the_simulated_peak_is_that_of_two_real_ranks(changes, tmp_path):
    sizes = {"vocab_size": 2000, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 5}
    sizes["num_attention_heads"] = 4
    layout = {"gpus": 2, "fsdp": True, "batch_size": 3, "length": 96, "attention": BY_EXAMPLE, **changes}
    log = tmp_path / "log"
    ranks = forked.start_ranks(2, measure_peak, log, tmp_path / "peak", sizes, layout)
    for rank in ranks:
        rank.join(300)
    assert [rank.exitcode for rank in ranks] == [0, 0], log.read_text()
    measured = min(json.loads((tmp_path / f"peak-{rank}").read_text()) for rank in (0, 1))
    phases = simulate(transformers.LlamaConfig(**sizes), Layout(**layout))
    beside = ("weights", "optimizer states")
    simulated = max(
        sum(size for part, size in kinds.items() if part not in beside)
        for phase, kinds in phases.items()
        if phase != "optimizer"
    )
    print(f"{changes}: simulated {simulated / 2**20:.2f} MiB, measured {measured / 2**20:.2f} MiB")
    assert simulated == pytest.approx(measured, rel=0.05)
