"""Supervised fine-tuning of LLaMA, OPT and other causal language models on Alpaca-format data.

    python train.py --model_name_or_path facebook/opt-125m --data_path alpaca_data.json --output_dir out

    torchrun --nproc_per_node=4 train.py --model_name_or_path <llama-7b> --data_path alpaca_data.json --bf16 True \
        --output_dir out --fsdp "full_shard auto_wrap" --tf32 True

The README has the full commands. `python train.py --help` lists every flag, the Trainer's own among them.
"""

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import memory
from arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    choose_layers_to_wrap,
    parse_arguments,
)
from attention import BY_EXAMPLE
from callbacks import ProgressBar, ShardingCheck, SpaceCheck, StepWatch
from checkpoints import (
    find_checkpoint,
    finish_checkpoint,
    publish_model,
    record_run,
    remove_checkpoint,
    stage_model,
    writing,
)
from dataset import (  # noqa: F401  the 2023 names that people import from here
    IGNORE_INDEX,
    BalancedBatchSampler,
    DataCollatorForSupervisedDataset,
    DataCollatorWithoutPadding,
    SupervisedDataset,
    make_supervised_data_module,
    once_for_all_ranks,
    preprocess,
    show_batch,
)
from loss import use_lean_loss
from utils import (  # noqa: F401
    PROMPT_DICT,
    ExitCode,
    ExpectedError,
    complete_tokenizer,
    from_pretrained,
    notice,
    resize_embeddings,
    run_main,
    smart_tokenizer_and_embedding_resize,
)


class AlpacaTrainer(Trainer):
    """The Trainer, with the examples of each optimizer step regrouped into micro-batches of equal token counts, steps
    that are looked at before they change the weights, and saves that are whole or absent."""

    def __init__(self, *args, balance_tokens: bool, **kwargs):
        super().__init__(*args, **kwargs)
        if not self.args.label_smoothing_factor:  # which the Trainer computes from all logits
            if isinstance(self.data_collator, DataCollatorWithoutPadding):
                self.data_collator.responses_only = True
            if not self.args.use_liger_kernel:
                use_lean_loss(getattr(self.model, "get_base_model", lambda: self.model)())  # without LoRA's wrapper
        self.balance_tokens = balance_tokens
        self.watch = StepWatch(self.train_dataset)
        for callback in (ShardingCheck(), SpaceCheck(), self.watch):
            self.add_callback(callback)
        if self.pop_callback(ProgressCallback):
            self.add_callback(ProgressBar())

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's order of examples, cut into steps as it cuts them; only the micro-batches are others."""
        args = self.args
        if self.balance_tokens and not self.model_accepts_loss_kwargs:
            notice(
                "this model averages its loss over each micro-batch, so they are left alone (--balance_tokens False)"
            )
            self.balance_tokens = False
        if not self.balance_tokens:
            return super().get_train_dataloader()
        sampler = BalancedBatchSampler(
            self._get_train_sampler(),
            self.train_dataset.lengths,
            self._train_batch_size,
            args.world_size,
            args.gradient_accumulation_steps,
            padded=not isinstance(self.data_collator, DataCollatorWithoutPadding),
            drop_last=args.dataloader_drop_last,
        )
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outcome = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            self.watch.saw(inputs, outcome[0] if return_outputs else outcome)
            if self.is_deepspeed_enabled and self.accelerator.sync_gradients:
                self.watch.look(self.args, self.state, None)  # its backward pass ends with the optimizer's step
        return outcome

    def _get_grad_norm(self, model, grad_norm=None):
        """Called between the clipping of gradients and the optimizer's step."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
        self.watch.look(self.args, self.state, grad_norm)
        return grad_norm

    def log(self, logs, start_time=None):
        super().log({**logs, **self.watch.figures()} if "loss" in logs else logs, start_time)

    def _run_epoch(self, **kwargs):
        if self.state.global_step < self.state.max_steps:  # else a finished run was started again: nothing to train
            super()._run_epoch(**kwargs)

    def _save_checkpoint(self, model, trial):
        directory = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            remove_checkpoint(directory)  # of an earlier, interrupted try
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # old ones stay until this one is whole
        with writing(directory):
            super()._save_checkpoint(model, trial)
            self.args.save_total_limit = limit
            self.accelerator.wait_for_everyone()  # the ranks write their own files
            if self.args.should_save:
                finish_checkpoint(
                    directory,
                    limit,
                    self.state.best_model_checkpoint,
                    sharding=self.args.sharding,
                    processes=self.args.world_size,
                    has_optimizer=not self.args.save_only_model,
                )
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir=None, _internal_call=False):
        """The final model takes an older one's place as a whole; what has a directory of its own is saved there."""
        if output_dir is not None:
            return super().save_model(output_dir, _internal_call)
        staged = once_for_all_ranks(lambda: stage_model(self.args.output_dir))
        with writing(staged):
            super().save_model(staged, _internal_call=True)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            publish_model(self.args.output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)


@torch.no_grad()
def keeps_examples_apart(config: transformers.PretrainedConfig, attention: str | None = None) -> bool:
    """Whether this kind of model computes examples laid end to end exactly as it computes each of them alone.

    `attention` is a kernel's name, None the library's choice. Tried out on a narrow copy with one layer of each type
    and random weights, in a moment. A model that can't be narrowed or run like this counts as one that does not.
    """
    small = copy.deepcopy(config)
    lengths = (5, 9, 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so little work is done long before many threads have found each other
    try:
        kinds = sorted(set(getattr(config, "layer_types", None) or [])) or None
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        narrow = {"num_hidden_layers": len(kinds) if kinds else 2, "layer_types": kinds, "hidden_size": 2 * head}
        narrow |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0}
        narrow |= {"intermediate_size": 64, "moe_intermediate_size": 8}
        narrow |= {"sliding_window": 4, "attention_chunk_size": 4}  # which attention by example would not see
        narrow |= {"initializer_range": 0.3}  # so large that mixing would show
        for name, value in narrow.items():
            if getattr(small, name, None) is not None:
                setattr(small, name, value)
        small._attn_implementation = attention
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](small).float().eval()
            examples = [{"input_ids": (ids := torch.randint(1, 64, (n,))), "labels": ids.clone()} for n in lengths]
        batch = DataCollatorWithoutPadding(responses_only=True, with_lengths=attention == BY_EXAMPLE)(examples)
        outputs = model(**batch)
        together = outputs.logits[0]  # (K, 64): all positions but the last of each example
        alone = torch.cat([model(example["input_ids"][None], use_cache=False).logits[0, :-1] for example in examples])
        loss = torch.nn.functional.cross_entropy(alone, batch["shift_labels"][0])
    except Exception:  # whatever an unknown model trips over, the answer is the safe one
        return False
    finally:
        torch.set_num_threads(threads)
    same_loss = torch.isclose(outputs.loss, loss, rtol=1e-4)
    return bool(same_loss and (together - alone).abs().max() <= 1e-4 * alone.abs().max())


def choose_collator(
    config: transformers.PretrainedConfig,
    tokenizer: Any,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> Any:
    """Batches without padding where the model keeps examples apart, with the fastest attention that does.

    Sets `attn_implementation` where none is given. torch.compile would compile anew for each batch's lengths.
    """
    if not data_args.padding_free:
        return DataCollatorForSupervisedDataset(tokenizer)
    free = model_args.attn_implementation is None and not training_args.torch_compile
    if free and keeps_examples_apart(config, BY_EXAMPLE):
        model_args.attn_implementation = BY_EXAMPLE
        return DataCollatorWithoutPadding(with_lengths=True)
    if keeps_examples_apart(config):
        return DataCollatorWithoutPadding()
    notice(f"batches are padded: {config.model_type} would mix examples that lie end to end (--padding_free False)")
    return DataCollatorForSupervisedDataset(tokenizer)


def load_tokenizer(model_args: ModelArguments, training_args: TrainingArguments) -> Any:
    return from_pretrained(
        transformers.AutoTokenizer,
        model_args.model_name_or_path,
        cache_dir=training_args.cache_dir,
        model_max_length=training_args.model_max_length,
        padding_side="right",
    )


def load_model(model_args: ModelArguments, training_args: TrainingArguments) -> Any:
    model = from_pretrained(
        transformers.AutoModelForCausalLM,
        model_args.model_name_or_path,
        cache_dir=training_args.cache_dir,
        dtype=getattr(torch, model_args.dtype),
        attn_implementation=model_args.attn_implementation,
    )
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        # Some published models set a temperature without sampling, which can be loaded but not saved again.
        model.generation_config.do_sample = True
        notice("the model's generation_config sets sampling options without do_sample; do_sample is now true")
    return model


def add_adapters(model: Any, model_args: ModelArguments, seed: int) -> Any:
    """LoRA (Hu et al., 2021): W x + lora_alpha / lora_r * B A x, where only A (r, in) and B (out, r) are trained.

    Raises ExpectedError (exit 2) when the model has none of the layers that --lora_target_modules names.
    """
    from peft import LoraConfig, get_peft_model

    names = [name.strip() for name in model_args.lora_target_modules.split(",")]
    config = LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules="all-linear" if names == ["all-linear"] else names,
        task_type="CAUSAL_LM",
    )
    transformers.set_seed(seed)  # A starts random, and on every process the same
    try:
        model = get_peft_model(model, config)
    except ValueError as error:
        raise ExpectedError(f"--lora_target_modules {model_args.lora_target_modules}: {error}", ExitCode.USAGE)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    notice(f"LoRA trains {trained:,} parameters beside the model's {model.num_parameters() - trained:,}, which stay")
    return model


def merge_adapters(model_args: ModelArguments, training_args: TrainingArguments, tokenizer: Any) -> None:
    """Save the model with the adapters added to its weights, as one that needs no peft, into output_dir/merged.

    It is made from the files on disk, on the CPU: a sharded model need not fit into one GPU.
    """
    from peft import PeftModel

    unset_hf_deepspeed_config()  # ZeRO-3 would shard what is loaded
    directory = Path(training_args.output_dir, "merged")
    model = load_model(model_args, training_args)
    model = PeftModel.from_pretrained(model, training_args.output_dir).merge_and_unload()
    staged = stage_model(directory)
    with writing(staged):
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
    publish_model(directory)


def estimate_memory(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
    config = from_pretrained(transformers.AutoConfig, model_args.model_name_or_path, cache_dir=training_args.cache_dir)
    collator = choose_collator(config, None, model_args, data_args, training_args)
    padding_free = isinstance(collator, DataCollatorWithoutPadding)
    plan = memory.read_plan(model_args, training_args, padding_free)
    present = torch.cuda.get_device_properties(0).total_memory / memory.GIB if torch.cuda.is_available() else None
    if training_args.process_index == 0:
        shape = memory.read_shape(config, model_args.lora_target_modules)
        print(memory.describe(shape, plan, training_args.estimate_gib or present))


def train() -> None:
    model_args, data_args, training_args = parse_arguments()
    if training_args.disable_tqdm:
        transformers.utils.logging.disable_progress_bar()
    if training_args.estimate_memory:
        return estimate_memory(model_args, data_args, training_args)

    tokenizer = load_tokenizer(model_args, training_args)
    # With LoRA the embeddings are frozen: a new token's row would be in no file that is saved.
    num_new_tokens = complete_tokenizer(tokenizer, model_args.pad_token, grow=not model_args.lora_r)
    data_module = make_supervised_data_module(tokenizer, data_args)
    if data_args.show_batch:
        if training_args.process_index == 0:
            show_batch(data_module["train_dataset"], tokenizer, data_args.show_batch)
        return

    checkpoint = once_for_all_ranks(
        lambda: find_checkpoint(training_args.resume_from_checkpoint, training_args.output_dir, training_args.sharding)
    )
    config = from_pretrained(transformers.AutoConfig, model_args.model_name_or_path, cache_dir=training_args.cache_dir)
    choose_layers_to_wrap(training_args, config)
    data_module["data_collator"] = choose_collator(config, tokenizer, model_args, data_args, training_args)
    model = load_model(model_args, training_args)
    resize_embeddings(model, tokenizer, num_new_tokens)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    if model_args.lora_r:
        model = add_adapters(model, model_args, training_args.seed)

    trainer = AlpacaTrainer(
        model=model,
        processing_class=tokenizer,
        args=training_args,
        balance_tokens=data_args.balance_tokens,
        **data_module,
    )
    if training_args.process_index == 0:
        record_run(
            model_args, data_args, training_args, data_module["train_dataset"], model.num_parameters(), checkpoint
        )
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.watch.preempted:
        raise ExpectedError(
            f"stopped by SIGTERM after saving {trainer.watch.preempted}; --resume_from_checkpoint last goes on from "
            "there",
            ExitCode.PREEMPTED,
        )
    trainer.save_state()
    trainer.model.config.use_cache = config.use_cache  # off while training, on for whoever generates
    trainer.save_model()
    if data_module["eval_dataset"] is not None:  # after saving, which must not depend on it
        metrics = {**trainer.evaluate(), "eval_samples": len(data_module["eval_dataset"])}
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics, combined=False)
    if model_args.lora_r and training_args.process_index == 0:
        shutil.rmtree(Path(training_args.output_dir, "merged"), ignore_errors=True)  # of adapters that are gone
        if model_args.lora_merge:
            merge_adapters(model_args, training_args, tokenizer)


def main() -> None:
    """`train()`, and the process group closed behind it.

    A process that exits with an open one is now and then aborted on its way out, and its exit code lost. It can't be
    closed while another process may still wait inside a collective: after errors that are not raised by all together,
    such as a disk that is full for one of them.
    """
    failure = None
    try:
        train()
    except ExpectedError as error:
        failure = error
    if dist.is_initialized() and (failure is None or failure.exit_code != ExitCode.DISK):
        dist.destroy_process_group()
    if failure:
        raise failure


if __name__ == "__main__":
    run_main(main)
