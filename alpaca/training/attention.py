"""Attention over examples that lie end to end, each computed by itself.

The library's way is one attention over the whole row with a mask that leaves out most of it: 4 examples of 126 tokens
cost what one of 504 does, and a mask keeps the fast kernels away. Known to the library under the name `BY_EXAMPLE`;
flash attention's packages have a kernel for this, and where one is asked for, it is used instead.
"""

import copy
from typing import Any

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from alpaca.common import notice
from alpaca.training.arguments import TrainingArguments
from alpaca.training.batches import DataCollatorForSupervisedDataset, DataCollatorWithoutPadding
from alpaca.training.flags import DataArguments, ModelArguments

BY_EXAMPLE = "sdpa_by_example"


def sdpa_by_example(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    example_lengths: list[int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each example; query, key and value (1, heads, sum of T, head_dim) → (1, sum of T, heads,
    head_dim).

    `example_lengths` comes with the batch. Without it this is the library's sdpa, mask and all.
    """
    if example_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    examples = zip(*(states.split(example_lengths, dim=2) for states in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in examples]
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(BY_EXAMPLE, sdpa_by_example)
AttentionMaskInterface.register(BY_EXAMPLE, sdpa_mask)


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
        narrow |= {"sliding_window": 4, "attention_chunk_size": 4}  # which attention by example would not see
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

    Sets `attn_implementation` where none is given. torch.compile would compile anew for each batch's lengths.
    """
    if not data_args.padding_free:
        return DataCollatorForSupervisedDataset(tokenizer)
    may_choose = model_args.attn_implementation is None and not training_args.torch_compile
    if may_choose and keeps_examples_apart(config, BY_EXAMPLE):
        model_args.attn_implementation = BY_EXAMPLE
        return DataCollatorWithoutPadding(with_lengths=True)
    if keeps_examples_apart(config):
        return DataCollatorWithoutPadding()
    notice(f"batches are padded: {config.model_type} would mix examples that lie end to end (--padding_free False)")
    return DataCollatorForSupervisedDataset(tokenizer)
