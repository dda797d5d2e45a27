"""train.py with FSDP2 that really shards on CPU processes, which accelerate does on accelerators alone.

torchrun --nproc_per_node=2 tests/training/fsdp_on_cpu.py <train.py's flags>
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch.distributed.fsdp
from accelerate import state
from accelerate.utils import DistributedType

import train
from alpaca.training.processes import run_rank

plain_init = state.AcceleratorState.__init__


def init(self, *args, fsdp_plugin=None, **kwargs):
    plain_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        if fsdp_plugin.cpu_offload:  # nothing to pin for
            fsdp_plugin.cpu_offload = torch.distributed.fsdp.CPUOffloadPolicy(pin_memory=False)
        self.fsdp_plugin = fsdp_plugin


state.AcceleratorState.__init__ = init
run_rank(train.main)
