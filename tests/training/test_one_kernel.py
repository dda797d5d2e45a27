"""Attention of a packed row in one kernel: on the CPU with stand-ins for torch's `varlen_attn`, which is CUDA's alone.

The kernel itself is compared with the loop in test_gpu.py.
"""

import inspect

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from alpaca.training import attention
from alpaca.training.arguments import parse_arguments
from alpaca.training.attention import BY_EXAMPLE, attention_by_example, choose_collator
from alpaca.training.batches import DataCollatorWithoutPadding
from alpaca.training.loss import use_lean_loss
from tests.training.conftest import tiny

SIGNATURE = inspect.signature(attention.varlen_attn)


def slow_varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), **options
):
    """What `varlen_attn` computes, token by token: (sum of T, heads, head_dim) → the same."""
    assert query.dtype == key.dtype == value.dtype in (torch.bfloat16, torch.float16)
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k == cu_seq_q.diff().max() and type(max_q) is int
    groups = query.shape[1] // key.shape[1]
    assert groups == 1 or options.get("enable_gqa")
    left, right = window_size
    assert right == 0
    q, k, v = query.float(), *(states.float().repeat_interleave(groups, dim=1) for states in (key, value))
    rows = []
    for start, stop in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        for token in range(start, stop):
            first = start if left < 0 else max(start, token - left)
            scores = torch.einsum("hd,thd->ht", q[token], k[first : token + 1])
            weights = (scores * (scale or q.shape[-1] ** -0.5)).softmax(dim=-1)
            rows.append(torch.einsum("ht,thd->hd", weights, v[first : token + 1]))
    return torch.stack(rows).to(query.dtype)


def cheap_varlen_attn(query, key, value, *arguments, **options):
    """No attention at all, but something of its shape that every input has a gradient through."""
    return query + (key + value).repeat_interleave(query.shape[1] // key.shape[1], dim=1)


@pytest.fixture
def kernel(monkeypatch):
    """Puts a stand-in where the kernel is looked for, on the CPU; returns the list of its calls, as torch's names."""

    def put(stand_in, groups_heads=attention.GROUPS_HEADS):
        calls = []

        def called(*arguments, **options):
            calls.append(SIGNATURE.bind(*arguments, **options).arguments)  # what torch's own would accept
            return stand_in(*arguments, **options)

        monkeypatch.setattr(attention, "varlen_attn", called)
        monkeypatch.setattr(attention, "KERNEL_DEVICES", {"cpu"})
        monkeypatch.setattr(attention, "GROUPS_HEADS", groups_heads)
        return calls

    return put


def random_row(lengths, heads, groups, head_dim, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, sum(lengths), head_dim) for count in (heads, heads // groups, heads // groups)]
    states = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return states, torch.randn(1, sum(lengths), heads, head_dim, generator=generator)


@pytest.mark.parametrize(
    "groups_heads",
    [
        pytest.param(True, id="grouped", marks=pytest.mark.skipif(not attention.GROUPS_HEADS, reason="torch 2.11")),
        pytest.param(False, id="torch 2.11"),
    ],
)
@pytest.mark.parametrize(("groups", "window", "scaling"), [(1, None, None), (4, None, 0.3), (2, 4, None), (1, 1, 0.1)])
def test_the_kernel_computes_what_the_loop_does(groups, window, scaling, groups_heads, kernel):
    calls, lengths = kernel(slow_varlen_attn, groups_heads), [5, 1, 9, 2]
    bounds = torch.tensor([0, 5, 6, 15, 17], dtype=torch.int32)
    module = torch.nn.Module()
    module.num_key_value_groups = groups
    batch = {"cu_seq_lens_q": bounds, "max_length_q": 9, "sliding_window": window, "scaling": scaling}
    results = []
    for dtype in (torch.bfloat16, torch.float32):  # the loop is for float32
        states, gradient = random_row(lengths, 4, groups, 8, torch.bfloat16)
        states = [tensor.detach().to(dtype).requires_grad_() for tensor in states]
        if dtype == torch.bfloat16:  # as autocast leaves them: only the values are in 16 bits
            states[:2] = [tensor.detach().float().requires_grad_() for tensor in states[:2]]
        output, _ = attention_by_example(module, *states, None, **batch)
        assert output.shape == gradient.shape
        (output.float() * gradient).sum().backward()
        results.append([output.detach(), *(tensor.grad for tensor in states)])
    assert len(calls) == 1 and calls[0].get("enable_gqa", False) == (groups_heads and groups > 1)
    for ours, expected in zip(*results, strict=True):
        assert torch.allclose(ours.float(), expected.float(), rtol=0.05, atol=0.05)


def test_torchs_own_function_takes_what_it_is_given(monkeypatch):
    """Forward and backward of the real thing on tensors without values, which need no GPU."""
    monkeypatch.setattr(attention, "KERNEL_DEVICES", {"cpu"})
    with FakeTensorMode():
        states = [torch.empty(1, heads, 17, 64, dtype=torch.bfloat16, requires_grad=True) for heads in (8, 2, 2)]
        bounds = torch.empty(5, dtype=torch.int32)
        for window in (None, 4):
            output, _ = attention_by_example(
                torch.nn.Module(), *states, None, cu_seq_lens_q=bounds, max_length_q=9, sliding_window=window
            )
            assert output.shape == (1, 17, 8, 64) and "varlen_attn" in str(output.grad_fn.next_functions)
            output.sum().backward()
        assert all(tensor.grad.shape == tensor.shape for tensor in states)


@pytest.mark.parametrize(
    ("change", "dropout"),
    [(torch.Tensor.float, 0.0), (lambda states: states[..., :4], 0.0), (torch.Tensor.clone, 0.5)],
    ids=["float32", "head_dim 4", "dropout"],
)
def test_what_the_kernel_cannot_do_takes_the_loop(change, dropout, kernel):
    calls = kernel(slow_varlen_attn)
    states, _ = random_row([3, 4], 2, 1, 8, torch.bfloat16)
    bounds = torch.tensor([0, 3, 7], dtype=torch.int32)
    states = [change(tensor) for tensor in states]
    output, _ = attention_by_example(torch.nn.Module(), *states, None, cu_seq_lens_q=bounds, dropout=dropout)
    assert output.shape == (1, 7, 2, states[2].shape[-1]) and output.dtype == states[2].dtype and not calls


@pytest.mark.parametrize("extra", ["softcap", "s_aux", "position_bias"])
def test_what_neither_can_do_is_refused_and_a_mask_is_obeyed(extra, kernel):
    calls = kernel(slow_varlen_attn)
    states, _ = random_row([3, 4], 2, 1, 8, torch.bfloat16)
    batch = {"cu_seq_lens_q": torch.tensor([0, 3, 7], dtype=torch.int32), "max_length_q": 4}
    with pytest.raises(NotImplementedError):
        attention_by_example(torch.nn.Module(), *states, None, **batch, **{extra: torch.ones(2)})
    mask = torch.eye(7, dtype=torch.bool)[None, None]  # each token sees itself
    output, _ = attention_by_example(torch.nn.Module(), *states, mask, **batch)
    assert torch.equal(output, states[2].transpose(1, 2)) and not calls


def packed(examples, count):
    rows = [examples[index] for index in range(count)]
    return DataCollatorWithoutPadding(responses_only=True)(rows), [len(row["labels"]) for row in rows]


@pytest.mark.parametrize(
    ("kind", "lefts"),
    [("llama", [-1, -1]), ("mistral", [15, 15]), ("gemma3_text", [15, 15, 15, 15, 15, -1])],
)
def test_a_model_gives_the_kernel_the_batch_and_each_layer_its_window(kind, lefts, kernel, examples, tokenizer):
    calls = kernel(slow_varlen_attn)
    batch, lengths = packed(examples, 3)
    outcomes = {}
    for name, dtype in (("one kernel", torch.bfloat16), ("loop", torch.float32)):
        model = tiny(tokenizer, kind, attention=BY_EXAMPLE, dtype=dtype, layers=len(lefts))
        outcomes[name] = model(**batch).loss.item()
    assert outcomes["one kernel"] == pytest.approx(outcomes["loop"], rel=0.02)
    assert [call["window_size"] for call in calls] == [(left, 0) for left in lefts]
    for call in calls:
        assert call["query"].shape == (sum(lengths), 4, 8) and call["key"].shape == call["value"].shape
        assert call["key"].shape[1] == (2 if attention.GROUPS_HEADS else 4) and call["max_q"] == max(lengths)
        assert call["cu_seq_q"].tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()]


class Watch(TorchDispatchMode):
    """Notes operations whose result decides what the host does next, and tensors quadratic in the row's length."""

    def __init__(self, length):
        super().__init__()
        self.length, self.waits, self.quadratic = length, [], []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        name = function.name()
        if any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")):
            self.waits.append(name)
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if torch.is_tensor(tensor) and sum(size >= self.length for size in tensor.shape) > 1:
                self.quadratic.append((name, tuple(tensor.shape)))
        return result


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_micro_batch_has_no_host_sync_and_nothing_quadratic(checkpointing, kernel, examples, tokenizer):
    """Forward and backward of a whole LLaMA under mixed precision, with our batches and our loss."""
    calls = kernel(cheap_varlen_attn)
    batch, lengths = packed(examples, 5)
    batch["num_items_in_batch"] = torch.tensor(batch["shift_labels"].numel())  # as the Trainer gives it

    def watched(attention_name):
        model = tiny(tokenizer, attention=attention_name).train()
        use_lean_loss(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with Watch(sum(lengths)) as watch, torch.autocast("cpu", torch.bfloat16):
            model(**batch).loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        return watch

    ours = watched(BY_EXAMPLE)
    assert len(calls) == (4 if checkpointing else 2)
    assert ours.waits == [] and ours.quadratic == []
    librarys = watched("sdpa")  # which this test must tell from ours
    assert librarys.waits and librarys.quadratic


def test_batches_for_the_kernel_have_no_python_lengths(kernel, tmp_path):
    kernel(cheap_varlen_attn)

    def choose(config, *flags):
        flags = ["--data_path", "x.json", "--output_dir", str(tmp_path), "--use_cpu", "True", *flags]
        model_args, data_args, training_args = parse_arguments(flags)
        collator = choose_collator(config, None, model_args, data_args, training_args)
        return collator.with_lengths, model_args.attn_implementation

    llama = transformers.LlamaConfig()
    assert choose(llama) == (True, BY_EXAMPLE)  # float32
    assert choose(llama, "--bf16", "True") == choose(llama, "--dtype", "bfloat16") == (False, BY_EXAMPLE)
    assert choose(llama, "--bf16", "True", "--torch_compile", "True") == (False, BY_EXAMPLE)
    assert choose(transformers.LlamaConfig(attention_dropout=0.1), "--bf16", "True") == (True, BY_EXAMPLE)


def test_torch_compile_makes_one_graph_for_batches_of_all_lengths(kernel, examples, tokenizer, monkeypatch):
    kernel(cheap_varlen_attn)
    monkeypatch.setattr(attention, "varlen_attn", cheap_varlen_attn)  # without the list of calls
    model = tiny(tokenizer, attention=BY_EXAMPLE).to(torch.bfloat16)
    graphs = []
    torch._dynamo.reset()

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model.model, backend=compiler, fullgraph=True)
    for count in (2, 3, 4, 6):
        batch, _ = packed(examples, count)
        for name in ("labels", "shift_labels", "logits_to_keep"):
            del batch[name]
        expected = model.model(**batch).last_hidden_state
        assert torch.equal(compiled(**batch).last_hidden_state, expected)
    torch._dynamo.reset()
    assert len(graphs) <= 2  # the first batch's sizes, and then any
