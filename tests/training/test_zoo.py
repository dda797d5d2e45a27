"""Simulated steps of many published architectures at their true sizes; -s prints the table of docs/training.md."""

import pytest
import transformers

from alpaca.training.attention import BY_EXAMPLE, keeps_examples_apart
from alpaca.training.memory import GIB, count_parameters
from alpaca.training.simulation import Layout, simulate
from tests.training.zoo import ZOO

OF_EVERY_RUN = ["OPT-350M", "GPT-2"]


def simulated_row(name):
    kind, values, published = ZOO[name]
    config = transformers.AutoConfig.for_model(kind, **values)
    parameters = count_parameters(config, Layout())[0]
    assert parameters / 1e9 == pytest.approx(published, rel=0.01)
    by_example = keeps_examples_apart(config, BY_EXAMPLE)
    packed = by_example or keeps_examples_apart(config)
    layout = Layout(
        gpus=8,
        fsdp=True,
        compute_dtype="bfloat16",
        batch_size=1,
        packed=packed,
        attention=BY_EXAMPLE if by_example else None,
        optimizer="adamw_torch_fused",
    )
    fullest = max(simulate(config, layout).values(), key=lambda kinds: sum(kinds.values()))
    states = 16 * parameters / 8
    ours = sum(fullest[part] for part in ("weights", "gradients", "optimizer states"))
    assert 0.7 * states < ours < 1.5 * states
    batches = "by example" if by_example else "end to end, masked" if packed else "padded"
    beside = sum(fullest.values()) - ours
    print(
        f"| {name} | {kind} | {parameters / 1e9:.3g} | {batches} | {ours / GIB:.1f} | {beside / GIB:.1f} |", flush=True
    )


@pytest.mark.parametrize("name", OF_EVERY_RUN)
def test_some_architectures(name):
    simulated_row(name)


@pytest.mark.soak
@pytest.mark.parametrize("name", [name for name in ZOO if name not in OF_EVERY_RUN])
def test_all_other_architectures(name):
    simulated_row(name)


def test_the_zoo_is_large():
    assert len(ZOO) >= 30 and len({kind for kind, *_ in ZOO.values()}) >= 20
