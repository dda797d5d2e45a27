"""What watches a training run: sharding, disk space, preemption, non-finite steps, throughput."""

import itertools
import math
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_pt_utils import get_model_param_count

from alpaca.common import WINDOWS, ExitCode, ExpectedError, notice
from alpaca.training import checkpoints
from alpaca.training.processes import gather_from_all_ranks, is_running, once_for_all_ranks, processes_beside_this

# Dense bf16 peaks in TFLOP/s, from the vendors' data sheets (half of the figures "with sparsity"). The first name that
# the device's name contains counts.
DENSE_BF16_PEAKS = {
    **{"GB200": 2500, "B200": 2250, "GH200": 989, "H200 NVL": 835, "H200": 989},
    **{"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989, "H20": 148},
    **{"A100": 312, "A800": 312, "A40": 150, "A30": 165, "A10G": 70, "A10": 125},
    **{"L40S": 362, "L40": 181, "L4": 121, "RTX 6000 Ada": 364, "RTX A6000": 155, "RTX 4090": 165, "RTX 3090": 71},
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of one device; None when it is not in the table."""
    peaks = (peak for name, peak in DENSE_BF16_PEAKS.items() if re.search(rf"\b{name}\b", device_name))
    return next((1e12 * peak for peak in peaks), None)


class ShardingCheck(TrainerCallback):
    """Says before the first step how the parameters really lie; FSDP that shards nothing is an error on a GPU."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not args.fsdp:
            return
        sharded = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
        if sharded:
            total = sum(parameter.numel() for parameter in model.parameters())
            local = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
            notice(f"FSDP holds {local:,} of {total:,} parameters on rank {args.process_index} of {args.world_size}")
        elif args.use_cpu:
            notice("--fsdp shards nothing on the CPU: the run is plain data-parallel, a whole model in each process")
        else:
            what = "--fsdp was asked for, but the parameters are not sharded; check --fsdp_config"
            raise ExpectedError(what, ExitCode.USAGE)


class SpaceCheck(TrainerCallback):
    """Raises before the first step when the disk can't take one checkpoint and the model, and says when it may not take
    all checkpoints: how many those will be, and how large with other optimizers than Adam, is not known for certain."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        total = get_model_param_count(model)
        trained = get_model_param_count(model, trainable_only=True)
        word = next(model.parameters()).element_size()  # bytes
        saved = trained if hasattr(model, "peft_config") else total
        # DeepSpeed's keep the weights twice, as shards to resume from and as a model.
        checkpoint = word * saved * (2 if args.deepspeed else 1)
        if not args.save_only_model:
            checkpoint += trained * state_bytes(args.optim, word)
        sizes = (checkpoint, word * saved, saves_to_come(args, state), args.save_total_limit)
        once_for_all_ranks(lambda: checkpoints.check_space(args.output_dir, *sizes))


def state_bytes(optim: str, word: int) -> int:
    """At least so many bytes of optimizer state a trained weight: for Adam two of the weight's size, a byte each in
    8-bit forms; for Adafactor, SGD and what is not known none."""
    if not re.match("adamw_(torch|apex)(?!_[48]bit)|paged_adamw_32bit|adamw_hf", optim):
        return 2 if re.search("adamw.*8bit", optim) else 0
    return 2 * word


def saves_to_come(args: Any, state: Any) -> int:
    """How many checkpoints this run will still write, its last one included. Of those of "best" one is certain."""
    epoch = math.ceil(state.max_steps / state.num_train_epochs)  # steps
    left = state.max_steps - state.global_step
    every = {"steps": state.save_steps, "epoch": epoch, "best": left}.get(args.save_strategy)
    return math.ceil(left / max(1, every)) if every else 0


class ProgressBar(ProgressCallback):
    """The library's bar, with the latest figures on it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and "loss" in logs:
            shown = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "padding_share", "mfu")
            self.training_bar.set_postfix({name: f"{logs[name]:.3g}" for name in shown if name in logs})


class Preemption:
    """SIGTERM asks for a checkpoint and an end at the next step.

    It is noticed by a thread, because the main one may sit in a collective, waiting for a process that was killed:
    launchers send SIGTERM then too. When a process of the same job on this machine is gone, there is no next step, and
    this one ends at once.
    """

    def __init__(self):
        self.asked = False
        self._over = threading.Event()

    def start(self, peers: list[int]) -> None:
        """`peers`: the process ids that end this process by ending."""
        if WINDOWS:  # where no one sends SIGTERM
            self._over.set()
            return
        signals, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        signal.signal(signal.SIGTERM, lambda *_: None)  # a handler, or the pipe would get no byte
        signal.set_wakeup_fd(self._wakeup)
        threading.Thread(target=self._listen, args=(signals, peers), daemon=True).start()

    def _listen(self, signals: int, peers: list[int]) -> None:
        while not self.asked:
            byte = os.read(signals, 1)
            if not byte:
                break
            self.asked = byte[0] == signal.SIGTERM
        while not self._over.wait(0.5):
            if not all(map(is_running, peers)):
                print("error: a process of this job was killed; ending this one too", file=sys.stderr, flush=True)
                os._exit(ExitCode.BUG)
        os.close(signals)

    def stop(self) -> None:
        """No more is asked for from here on; a process that has saved for SIGTERM is not killed by another one."""
        if self._over.is_set():
            return
        self._over.set()
        signal.signal(signal.SIGTERM, signal.SIG_IGN if self.asked else signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        os.close(self._wakeup)


class StepWatch(TrainerCallback):
    """Checks every step before it changes the weights, with one small all-reduce and one look at its outcome.

    Stops the run when a loss or the gradient norm is not finite, ends it in good order after SIGTERM (`preempted` is
    then the checkpoint's directory), and counts tokens for the log. The look is the only time in a step that the host
    waits for the device, so it brings what the log needs too. What it costs: the device idles from the end of the
    backward pass until the optimizer's first kernels have been launched.
    """

    def __init__(self):
        self.preemption = Preemption()
        self.preempted: str | None = None
        self.stop_now = False
        # Record numbers and loss of each of this rank's micro-batches in the step under way.
        self.micro_batches: list[tuple[list[int], torch.Tensor]] = []
        self.new_tokens = self.new_slots = 0  # this rank's, not yet added up; a slot holds a token or padding
        self.tokens, self.slots, self.seconds = 0, 0, 0.0  # of all ranks since the last log line

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.preemption.start(processes_beside_this())
        # A parameter costs a token 2 FLOPs forward and 2 backward through the activations, and 2 more if it is trained.
        self.flops_per_token = 4 * get_model_param_count(model) + 2 * get_model_param_count(model, trainable_only=True)
        self.peak = peak_flops(torch.cuda.get_device_name()) if args.device.type == "cuda" else None
        if self.peak:
            self.peak *= args.world_size
        self.counted_until = time.perf_counter()

    def add_micro_batch(self, inputs: dict[str, torch.Tensor], records: list[int], loss: torch.Tensor) -> None:
        self.micro_batches.append((records, loss.detach()))
        slots = inputs["input_ids"].numel()
        self.new_slots += slots
        self.new_tokens += inputs["attention_mask"].sum() if "attention_mask" in inputs else slots

    def check_step(self, args, state, loss: torch.Tensor, grad_norm: Any) -> tuple[float, float | None]:
        """Before the weights change: raises ExpectedError (exit 7) on every rank when they should not.

        `loss` is this rank's, summed since the last log line; returned as the mean over the ranks. `grad_norm` is the
        same on all ranks, and returned as a number; None where it is not known yet.
        """
        losses = torch.stack([loss for _, loss in self.micro_batches])
        counts = [self.preemption.asked, (~losses.isfinite()).sum(), self.new_tokens, self.new_slots, loss]
        report = torch.stack([self._on_device(count, args.device) for count in counts])
        if args.world_size > 1:
            dist.all_reduce(report)
        if grad_norm is not None:
            report = torch.cat([report, self._on_device(grad_norm, args.device)[None]])
        asked, bad_losses, tokens, slots, loss, *norm = report.tolist()
        grad_norm = norm[0] if norm else None
        # fp16's gradients overflow now and then, and its loss scaler leaves out such a step by itself.
        bad_norm = grad_norm is not None and not args.fp16 and not math.isfinite(grad_norm)
        if bad_losses or bad_norm:
            raise self._describe(state.global_step + 1, bool(bad_losses), grad_norm)
        self.stop_now = bool(asked)
        self.tokens, self.slots = self.tokens + tokens, self.slots + slots
        self.new_tokens = self.new_slots = 0
        now = time.perf_counter()
        self.seconds += now - self.counted_until
        self.counted_until = now
        return loss / args.world_size, grad_norm

    @staticmethod
    def _on_device(value: Any, device: torch.device) -> torch.Tensor:
        """A float32 scalar there; a number is filled in by the device, since copying one would wait for it."""
        if torch.is_tensor(value):
            return value.detach().to(device, torch.float32)
        return torch.full((), float(value), device=device)

    def _describe(self, step: int, bad_losses: bool, grad_norm: Any) -> ExpectedError:
        suspects = [records for records, loss in self.micro_batches if not (bad_losses and loss.isfinite())]
        records = sorted(set().union(*itertools.chain(*gather_from_all_ranks(suspects))))
        what = (
            "the loss is not finite in the micro-batches of" if bad_losses else f"the gradient norm is {grad_norm} over"
        )
        return ExpectedError(
            f"step {step}: {what} records {', '.join(map(str, records))} (counted from 0). "
            f"Stopped with the weights of step {step - 1}; look at these records, or lower --learning_rate",
            ExitCode.INTEGRITY,
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.micro_batches.clear()
        if self.stop_now:
            control.should_training_stop = True
            control.should_save = False  # the Trainer saves when this step's evaluation is over

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stop_now and not float(state.epoch).is_integer():  # the library calls it the epoch's end all the same
            control.should_evaluate = control.should_save = control.should_log = False

    def on_save(self, args, state, control, **kwargs):
        self.counted_until = time.perf_counter()  # saving is no part of tokens/s

    on_evaluate = on_save

    def end(self, args, state) -> None:
        """After the last step: all ranks agree whether this end is one that SIGTERM asked for, with all steps saved."""
        asked = torch.tensor(int(self.preemption.asked), device=args.device)
        if args.world_size > 1:
            dist.all_reduce(asked)
        directory = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if asked and once_for_all_ranks((directory / checkpoints.MANIFEST).exists):
            self.preempted = str(directory)
        self.preemption.stop()

    def figures(self) -> dict[str, float]:
        """What happened since the last call: tokens/s over all ranks, the share of padding, MFU where it is known.

        MFU is 6·N·tokens (N: all parameters; 4·N and 2 for each trained one where some are frozen) over the dense
        bf16 peak of all devices. Padding is no token, and recomputed activations are no work done.
        """
        tokens_per_second = self.tokens / self.seconds
        figures = {"tokens_per_second": tokens_per_second, "padding_share": 1 - self.tokens / self.slots}
        if self.peak:
            figures["mfu"] = self.flops_per_token * tokens_per_second / self.peak
        self.tokens, self.slots, self.seconds = 0, 0, 0.0
        return figures
