"""Attention over examples that lie end to end, each computed by itself.

The library's way is one attention over the whole row with a mask that leaves out most of it: 4 examples of 126 tokens
cost what one of 504 does, and a mask keeps the fast kernels away. Known to the library under the name `BY_EXAMPLE`:
on CUDA in 16 bits one kernel for the whole row, elsewhere PyTorch's attention once an example. The library is told of
no mask function for this name, so it makes no mask: what tells the examples apart are the bounds that come with the
batch.
"""

import copy
import inspect
from typing import Any

import torch
import transformers
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from alpaca.common import notice
from alpaca.training.arguments import TrainingArguments
from alpaca.training.batches import DataCollatorForSupervisedDataset, DataCollatorWithoutPadding
from alpaca.training.flags import DataArguments, ModelArguments

BY_EXAMPLE = "sdpa_by_example"
KERNEL_DEVICES = {"cuda"}  # where `varlen_attn` runs; needs Ampere (8.0), as bf16 does
GROUPS_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # from torch 2.12 on
# What some models add to attention, which neither of our ways computes.
NOT_COMPUTED = ("softcap", "s_aux", "position_bias", "cache")


def attention_by_example(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    example_lengths: list[int] | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each example; query, key and value (1, heads, sum of T, head_dim) → (1, sum of T, heads,
    head_dim). Key and value may have fewer heads.

    The bounds `cu_seq_lens_q` (B + 1,) and the longest T come with the batch, and so does the list of lengths where
    there is no kernel. Without them each row is one example, whose padding, if any, is on the right. With a
    `sliding_window` of w, a token sees itself and w - 1 before it. A mask that the model itself made is obeyed.
    Raises NotImplementedError for a model that asks for more than this.
    """
    if attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if any(kwargs.get(name) is not None for name in NOT_COMPUTED) or not getattr(module, "is_causal", True):
        raise NotImplementedError(f"{type(module).__name__} needs more than causal attention with a window")
    if cu_seq_lens_q is not None and kernel_takes(query, value, dropout):
        return _in_one_kernel(query, key, value, cu_seq_lens_q, max_length_q, sliding_window, scaling), None
    if cu_seq_lens_q is None:
        example_lengths = [query.shape[2]]
    elif example_lengths is None:
        example_lengths = cu_seq_lens_q.diff().tolist()
    examples = zip(*(states.split(example_lengths, dim=2) for states in (query, key, value)), strict=True)
    outputs = [
        sdpa_attention_forward(module, q, k, v, _window_mask(q, sliding_window), dropout, scaling)[0]
        for q, k, v in examples
    ]
    return torch.cat(outputs, dim=1), None


def kernel_takes(query: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    """Whether `varlen_attn` computes this: 16 bits, a head_dim that its flash attention has, no dropout."""
    in_16_bits = value.dtype in (torch.bfloat16, torch.float16)
    head_dim_fits = query.shape[-1] == value.shape[-1] <= 256 and value.shape[-1] % 8 == 0
    return value.device.type in KERNEL_DEVICES and in_16_bits and head_dim_fits and not dropout


def _in_one_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    sliding_window: int | None,
    scaling: float | None,
) -> torch.Tensor:
    """Bounds and longest T as `varlen_attn` wants them; nothing here waits for the GPU."""
    grouped = key.shape[1] != query.shape[1]
    if grouped and not GROUPS_HEADS:
        key, value = (repeat_kv(states, query.shape[1] // key.shape[1]) for states in (key, value))
    # Rotary embeddings leave query and key in float32 under autocast, which does not cast what this kernel gets.
    states = [
        states[0].transpose(0, 1).to(value.dtype) for states in (query, key, value)
    ]  # (sum of T, heads, head_dim)
    window = (sliding_window - 1 if sliding_window else -1, 0)  # tokens seen before and after a token's own; -1: all
    options = {"enable_gqa": True} if grouped and GROUPS_HEADS else {}
    return varlen_attn(*states, bounds, bounds, longest, longest, scale=scaling, window_size=window, **options)[None]


def _window_mask(query: torch.Tensor, sliding_window: int | None) -> torch.Tensor | None:
    """Which tokens of one example each sees, bool (T, T); None, for all before it, where the window holds them all."""
    length = query.shape[2]
    if not sliding_window or length <= sliding_window:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - sliding_window)


AttentionInterface.register(BY_EXAMPLE, attention_by_example)


def keeps_examples_apart(config: transformers.PretrainedConfig, attention: str | None = None) -> bool:
    """Whether this kind of model computes examples laid end to end exactly as it computes each of them alone: logits,
    loss and the gradient of every parameter.

    `attention` is a kernel's name, None the library's choice. Tried out on a narrow copy with one layer of each type
    and random weights, in a moment. A model that can't be narrowed or run like this counts as one that does not.
    """
    small = copy.deepcopy(config)
    lengths = (5, 9)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so little work is done long before many threads have found each other
    try:
        kinds = sorted(set(getattr(config, "layer_types", None) or [])) or None
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        narrow = {"num_hidden_layers": len(kinds) if kinds else 2, "layer_types": kinds, "hidden_size": 2 * head}
        narrow |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0}
        narrow |= {"intermediate_size": 64, "ffn_dim": 64, "ffn_hidden_size": 64, "moe_intermediate_size": 8}
        narrow |= {"shared_expert_intermediate_size": 8, "num_experts": 8}
        narrow |= {"sliding_window": 4, "attention_chunk_size": 4}  # so small that they would show
        for name, value in narrow.items():
            if getattr(small, name, None) is not None:
                setattr(small, name, value)
        small._attn_implementation = attention
        with torch.random.fork_rng(devices=[]):  # the weights are made on the CPU
            torch.manual_seed(0)
            model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](small).float().eval()
            for parameter in model.parameters():  # none at the 0 or 1 it starts from; so large that mixing would show
                size = 0.3 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5  # and no softmax is all or nothing
                parameter.data += size * torch.randn_like(parameter)
            examples = [{"input_ids": (ids := torch.randint(1, 64, (n,))), "labels": ids.clone()} for n in lengths]
        batch = DataCollatorWithoutPadding(responses_only=True, with_lengths=attention == BY_EXAMPLE)(examples)
        outputs = model(**batch)
        together = outputs.logits[0]  # (K, 64): all positions but the last of each example
        if attention == BY_EXAMPLE:
            model.set_attn_implementation("eager")  # the model's own definition, with windows, caps and all
        alone = torch.cat([model(example["input_ids"][None], use_cache=False).logits[0, :-1] for example in examples])
        loss = torch.nn.functional.cross_entropy(alone, batch["shift_labels"][0])
        same_loss = torch.isclose(outputs.loss, loss, rtol=1e-4)
        if not same_loss or (together - alone).abs().max() > 1e-4 * alone.abs().max():
            return False
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = [
            torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
            for value in (outputs.loss, loss)
        ]
    except Exception:  # whatever an unknown model trips over, the answer is the safe one
        return False
    finally:
        torch.set_num_threads(threads)
    largest = max(gradient.abs().max() for gradient in gradients[1])
    return all(
        bool((one - other).abs().max() <= 1e-3 * other.abs().max() + 1e-5 * largest)
        for one, other in zip(*gradients, strict=True)
    )


def choose_collator(
    config: transformers.PretrainedConfig,
    tokenizer: Any,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> Any:
    """Batches without padding where the model keeps examples apart, with the fastest attention that does.

    Sets `attn_implementation` where none is given. Where attention runs in one kernel, the batches have no list of
    lengths: torch.compile would compile anew for each.
    """
    if not data_args.padding_free:
        return DataCollatorForSupervisedDataset(tokenizer)
    in_one_kernel = runs_in_one_kernel(config, model_args, training_args)
    may_choose = model_args.attn_implementation is None and (in_one_kernel or not training_args.torch_compile)
    if may_choose and keeps_examples_apart(config, BY_EXAMPLE):
        model_args.attn_implementation = BY_EXAMPLE
        return DataCollatorWithoutPadding(with_lengths=not in_one_kernel)
    if keeps_examples_apart(config):
        return DataCollatorWithoutPadding()
    notice(f"batches are padded: {config.model_type} would mix examples that lie end to end (--padding_free False)")
    return DataCollatorForSupervisedDataset(tokenizer)


def runs_in_one_kernel(
    config: transformers.PretrainedConfig, model_args: ModelArguments, training_args: TrainingArguments
) -> bool:
    """Whether `kernel_takes` will say yes while this run trains, as far as config and flags tell."""
    in_16_bits = training_args.bf16 or training_args.fp16 or model_args.dtype in ("bfloat16", "float16")
    dropout = any(getattr(config, name, None) for name in ("attention_dropout", "attn_pdrop"))
    return training_args.device.type in KERNEL_DEVICES and in_16_bits and not dropout
