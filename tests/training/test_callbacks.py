"""What watches a run, as far as it needs none; the rest is in test_long_runs.py."""

import pytest

from alpaca.training.callbacks import peak_flops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10G", 70),
        ("NVIDIA RTX A4000", None),
    ],
)
def test_peaks(name, tflops):
    assert peak_flops(name) == (tflops and tflops * 1e12)
