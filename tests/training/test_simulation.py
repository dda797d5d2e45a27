"""The private modules that a simulated step rests on, and what the step shows: no wait for the device, no mask."""

import importlib

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from alpaca.common import ExpectedError
from alpaca.training import simulation
from alpaca.training.attention import BY_EXAMPLE
from alpaca.training.simulation import PRIVATE, TRACKER, Layout, _fakes, _pass, simulate
from tests.conftest import ROOT

LLAMA = transformers.LlamaConfig(
    vocab_size=500, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4
)


@pytest.mark.parametrize("module", PRIVATE)
def test_this_pytorch_has_what_is_used_of(module):
    """Fails where a new version of PyTorch has moved it: then `simulation.PRIVATE` and its users are to follow."""
    found = importlib.import_module(module)
    assert not [name for name in PRIVATE[module] if not hasattr(found, name)]


@pytest.mark.parametrize("layout", [Layout(), Layout(gpus=2, fsdp=True)], ids=["MemTracker", "FSDPMemTracker"])
def test_the_memory_tracker_has_what_ours_overrides(layout):
    with _fakes(LLAMA, layout) as fakes:
        private = fakes.private
        tracker = private.FSDPMemTracker(fakes.model, fakes.optimizer) if layout.fsdp else private.MemTracker()
    assert not [name for name in TRACKER if not hasattr(tracker, name)]


def test_nothing_else_touches_them():
    files = [*ROOT.glob("*.py"), *ROOT.glob("alpaca/**/*.py"), *ROOT.glob("benchmarks/*.py")]
    users = {path.name for path in files if any(module in path.read_text() for module in PRIVATE)}
    assert users == {"simulation.py"}


@pytest.mark.parametrize("missing", ["torch.distributed._tools.gone", "torch._subclasses.fake_tensor"])
def test_without_them_a_line_says_so(missing, monkeypatch):
    monkeypatch.setattr(simulation, "PRIVATE", {**PRIVATE, missing: ["Gone"]})
    with pytest.raises(ExpectedError, match=r"this PyTorch \(.*\) can't simulate a step: .*[gG]one") as error:
        simulate(LLAMA, Layout())
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


def test_without_what_a_sharded_tensor_asks_with_a_line_says_so(monkeypatch):
    propagator = importlib.import_module("torch.distributed.tensor._sharding_prop").ShardingPropagator
    monkeypatch.delattr(propagator, "_propagate_tensor_meta_non_cached")
    with pytest.raises(ExpectedError, match=r"can't simulate a step: .*_propagate_tensor_meta_non_cached"):
        simulate(LLAMA, Layout())


def test_a_model_that_drops_layers_is_simulated_with_all_of_them():
    """By a random number that it reads from a tensor, which a fake one does not have."""
    sizes = {"vocab_size": 500, "hidden_size": 64, "ffn_dim": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
    peaks = [
        simulate(
            transformers.OPTConfig(**sizes, word_embed_proj_dim=64, layerdrop=share), Layout(batch_size=2, length=32)
        )
        for share in (0.0, 0.5)
    ]
    assert peaks[0] == peaks[1]


class Shapes(TorchDispatchMode):
    """Keeps the shapes of all tensors that a step makes."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        outcome = function(*arguments, **(named or {}))
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(outcome) if torch.is_tensor(leaf)]
        self.shapes |= {tuple(tensor.shape) for tensor in tensors}
        return outcome

    def squares(self, tokens):
        return [shape for shape in self.shapes if sum(size >= tokens for size in shape) >= 2]


def shapes_of_a_step(layout, leave_out=()):
    """A fake tensor has no value: a step that reads one, which on a GPU would wait for it, raises."""
    with _fakes(LLAMA, layout) as fakes, Shapes() as made:
        batch = {name: value for name, value in fakes.batch.items() if name not in leave_out}
        _pass(fakes.model, batch, layout, last=True)
        fakes.optimizer.step()
    return made


@pytest.mark.parametrize("changes", [{}, {"compute_dtype": "bfloat16"}, {"gpus": 4, "fsdp": True}], ids=str)
def test_a_packed_step_reads_no_scalar_and_makes_no_square_of_its_tokens(changes):
    layout = Layout(batch_size=8, length=128, optimizer="adamw_torch_fused", attention=BY_EXAMPLE, **changes)
    made = shapes_of_a_step(layout)
    assert (1, 8 * 128, 64) in made.shapes and not made.squares(8 * 128)


def test_both_would_be_seen():
    masked = shapes_of_a_step(Layout(batch_size=8, length=128))  # the library's attention, with a mask for the row
    assert masked.squares(8 * 128)
    from torch._subclasses.fake_tensor import DataDependentOutputException

    with pytest.raises(DataDependentOutputException):  # the loop over examples would ask the device for their lengths
        shapes_of_a_step(Layout(batch_size=8, length=128, attention=BY_EXAMPLE), leave_out=["example_lengths"])
