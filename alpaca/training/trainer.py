"""The Hugging Face Trainer with this project's batches, checks and saves."""

import contextlib
from collections import ChainMap
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import ProgressCallback, Trainer
from transformers.trainer_utils import SaveStrategy

from alpaca.common import ExitCode, ExpectedError, notice
from alpaca.data.examples import IGNORE_INDEX
from alpaca.training.batches import BalancedBatchSampler, DataCollatorWithoutPadding
from alpaca.training.callbacks import ProgressBar, ShardingCheck, SpaceCheck, StepWatch
from alpaca.training.checkpoints import (
    describe_files,
    finish_checkpoint,
    publish_model,
    remove_checkpoint,
    stage_model,
    writing,
)
from alpaca.training.loss import use_lean_loss
from alpaca.training.noise import add_noise_by_example
from alpaca.training.processes import gather_from_all_ranks, once_for_all_ranks

WHOLE, IN_PARTS = "FULL_STATE_DICT", "SHARDED_STATE_DICT"  # FSDP's layouts of a checkpoint

# transformers 5.17 has a process's optimizer loaded to "cpu:1", as the second process calls its CPU; torch knows "cpu".
torch.serialization.register_package(
    11, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
)


def layout_of(checkpoint: str) -> str:
    """How FSDP wrote a checkpoint: whole by the first rank, as this project did at first, or in parts."""
    return WHOLE if Path(checkpoint, "pytorch_model_fsdp.bin").exists() else IN_PARTS


def _set_layout(plugin: Any, layout: Any) -> None:
    plugin.state_dict_config = plugin.optim_state_dict_config = None  # those of the layout before
    plugin.set_state_dict_type(layout)


class AlpacaTrainer(Trainer):
    """The Trainer, with the examples of each optimizer step regrouped into micro-batches of equal token counts, steps
    that are checked before they change the weights, and saves that are whole or absent."""

    def __init__(self, *args, balance_tokens: bool, identity: dict[str, Any] | None = None, **kwargs):
        if kwargs["args"].device.type == "cuda" and kwargs["args"].dataloader_pin_memory:
            kwargs["args"].accelerator_config.non_blocking = True  # or each micro-batch waits for the GPU to be copied
        super().__init__(*args, **kwargs)
        self.args.remove_unused_columns = False  # "record" is for the collator, which asks for no more than it needs
        self.data_collator.with_records = True
        without_lora = getattr(self.model, "get_base_model", lambda: self.model)()
        if not self.args.label_smoothing_factor:  # smoothing needs the logits of all tokens, the library's loss
            if isinstance(self.data_collator, DataCollatorWithoutPadding):
                self.data_collator.responses_only = True
            if not self.args.use_liger_kernel:
                use_lean_loss(without_lora)
        if self.neftune_noise_alpha and isinstance(self.data_collator, DataCollatorWithoutPadding):
            add_noise_by_example(without_lora, self.neftune_noise_alpha)
            self.neftune_noise_alpha = None  # the library's own, which takes the row for one example
        self._say_what_routers_add()
        self.balance_tokens = balance_tokens
        self.identity = identity or {}  # of the run, for the checkpoints' manifests
        self._saved_step = -1  # that of the newest checkpoint which this process wrote
        self.watch = StepWatch()
        for callback in (ShardingCheck(), SpaceCheck(), self.watch):
            self.add_callback(callback)
        if self.pop_callback(ProgressCallback):
            self.add_callback(ProgressBar())
        if self.is_fsdp_enabled:
            self._read_fsdp_plugin()

    def _read_fsdp_plugin(self) -> None:
        """Checkpoints that every rank writes its own part of, unless --fsdp_config says otherwise. Adapters are small,
        and a model that nothing will go on from (--save_only_model) has to load as one."""
        plugin = self.accelerator.state.fsdp_plugin
        persistent = {name for name, _ in self.model.named_buffers()} & set(self.model.state_dict())
        if plugin.cpu_ram_efficient_loading and persistent:
            raise ExpectedError(
                f"this model's buffer {min(persistent)} can't be sent to other processes; add --fsdp_config "
                "'{\"cpu_ram_efficient_loading\": false}', with which each process loads the whole model first",
                ExitCode.USAGE,
            )
        in_parts = not (hasattr(self.model, "peft_config") or self.args.save_only_model)
        if in_parts and "state_dict_type" not in self.args.fsdp_config:
            _set_layout(plugin, IN_PARTS)

    @contextlib.contextmanager
    def _fsdp_layout(self, layout):
        """Save or load like this for a while. Does nothing without FSDP."""
        if not self.is_fsdp_enabled:
            yield
            return
        plugin = self.accelerator.state.fsdp_plugin
        before = plugin.state_dict_type
        _set_layout(plugin, layout)
        try:
            yield
        finally:
            _set_layout(plugin, before)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with self._fsdp_layout(layout_of(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with self._fsdp_layout(layout_of(checkpoint)) if checkpoint else contextlib.nullcontext():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self):
        with self._fsdp_layout(layout_of(self.state.best_model_checkpoint)):
            super()._load_best_model()

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's order of examples, cut into steps as it cuts them; only the micro-batches are others."""
        args = self.args
        if self.balance_tokens and not self.model_accepts_loss_kwargs:
            notice("this model averages its loss over each micro-batch; they stay as they are (--balance_tokens False)")
            self.balance_tokens = False
        if not self.balance_tokens:
            return super().get_train_dataloader()
        batch_size, accumulation = self._train_batch_size, args.gradient_accumulation_steps
        drop_last = args.dataloader_drop_last
        return self._balanced(self.train_dataset, self._get_train_sampler(), batch_size, accumulation, drop_last)

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """Every example once, on any number of processes, in micro-batches of nearly equal token counts."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        batch_size = self.args.eval_batch_size
        return self._balanced(dataset, SequentialSampler(dataset), batch_size, -(-len(dataset) // batch_size), False)

    def _balanced(self, dataset: Any, sampler: Any, batch_size: int, accumulation: int, drop_last: bool) -> DataLoader:
        args = self.args
        batch_sampler = BalancedBatchSampler(
            sampler,
            dataset.lengths,
            batch_size,
            args.world_size,
            accumulation,
            padded=not isinstance(self.data_collator, DataCollatorWithoutPadding),
            drop_last=drop_last,
        )
        loader = DataLoader(
            dataset,
            batch_sampler=batch_sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers and dataset is self.train_dataset,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        records = inputs.pop("records", [])
        outcome = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            self.watch.add_micro_batch(inputs, records, outcome[0] if return_outputs else outcome)
            if self.is_deepspeed_enabled and self.accelerator.sync_gradients:
                self._check_step(None)  # its backward pass ends with the optimizer's step
        return outcome

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """A micro-batch of an evaluation: its loss and number of trained tokens are kept for `evaluation_loop`."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"][:, 1:]
        tokens = (labels != IGNORE_INDEX).sum()
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs).detach().float()
        self._evaluated.append(torch.stack([torch.where(tokens > 0, loss * tokens, 0), tokens]))
        return loss, None, None

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """The library's, with the loss over all trained tokens of all processes: it would average micro-batches."""
        self._evaluated = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = torch.stack(self._evaluated).cpu().double().sum(dim=0).tolist()
        loss, tokens = (sum(values) for values in zip(*gather_from_all_ranks(sums), strict=True))
        output.metrics[f"{metric_key_prefix}_loss"] = loss / tokens
        return output

    def _say_what_routers_add(self) -> None:
        config, args = self.model.config.get_text_config(), self.args
        parts = args.gradient_accumulation_steps * args.world_size
        if getattr(config, "output_router_logits", False) and parts > 1:
            notice(
                "this model adds an auxiliary loss for its routers (output_router_logits) to each micro-batch, so that "
                f"a step of {parts} micro-batches has it {parts} times, in the loss that is logged as well; divide "
                "router_aux_loss_coef in its config.json by as much, or set output_router_logits to false"
            )

    def _get_grad_norm(self, model, grad_norm=None):
        """Called between the clipping of gradients and the optimizer's step."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        return self._check_step(grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm)

    def _check_step(self, grad_norm):
        self.loss_to_log, grad_norm = self.watch.check_step(self.args, self.state, self._tr_loss, grad_norm)
        return grad_norm

    def _maybe_log_save_evaluate(
        self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=None
    ):
        """The library asks the device for loss, norm and FLOPs one by one; the step's check has brought what it logs.

        FLOPs are added up at every save and at the end.
        """
        steps = self.state.global_step - self._globalstep_last_logged
        if self.control.should_log and steps:
            tr_loss.zero_()
            logs = {"loss": self.loss_to_log / steps, "grad_norm": grad_norm}
            logs["learning_rate"] = self._get_learning_rate() if learning_rate is None else learning_rate
            self._total_loss_scalar += self.loss_to_log
            self._globalstep_last_logged = self.state.global_step
            self.log(logs, start_time)
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate
        )

    def log(self, logs, start_time=None):
        super().log({**logs, **self.watch.figures()} if "loss" in logs else logs, start_time)

    def _run_epoch(self, model, trial, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # a finished run is started again
            return
        super()._run_epoch(model=model, trial=trial, **kwargs)
        # Whatever --save_strategy is, a run that SIGTERM stops is saved. "best" saves the last step too: a finished run
        # that is started again would otherwise train from its best step to the end once more.
        over = self.state.global_step >= self.state.max_steps and self.args.save_strategy == SaveStrategy.BEST
        if (self.watch.stop_now or over) and self._saved_step != self.state.global_step:
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _finalize_training(self, *arguments):
        """What the library does at the end, less what would undo a preemption or the newest checkpoint: the best model
        is the result of a finished run only, and the checkpoint beside the best one is how a run is known as finished.
        """
        self.watch.end(self.args, self.state)
        self.args.load_best_model_at_end &= not self.watch.preempted
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        outcome = super()._finalize_training(*arguments)
        self.args.save_total_limit = limit
        return outcome

    def _save_checkpoint(self, model, trial):
        directory = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            remove_checkpoint(directory)  # of an earlier, interrupted try
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # old ones stay until this one is whole
        with writing(directory):
            super()._save_checkpoint(model, trial)
            self.args.save_total_limit = limit
            self.accelerator.wait_for_everyone()  # the ranks write their own files, and hash them
            described = gather_from_all_ranks(describe_files(directory, self.args.process_index, self.args.world_size))
            if self.args.should_save:
                finish_checkpoint(
                    directory,
                    limit,
                    self.state.best_model_checkpoint,
                    dict(ChainMap(*described)),
                    sharding=self.args.sharding,
                    processes=self.args.world_size,
                    has_optimizer=not self.args.save_only_model,
                    identity=self.identity,
                )
        self.accelerator.wait_for_everyone()
        self._saved_step = self.state.global_step

    def save_model(self, output_dir=None, _internal_call=False):
        """The final model takes an older one's place as a whole; what has a directory of its own is saved there."""
        if output_dir is not None:
            return super().save_model(output_dir, _internal_call)
        staged = once_for_all_ranks(lambda: stage_model(self.args.output_dir))
        with writing(staged), self._fsdp_layout(WHOLE):
            super().save_model(staged, _internal_call=True)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish_model(self.args.output_dir)
        self.accelerator.wait_for_everyone()
