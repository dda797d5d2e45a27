"""The loss a chunk at a time, over trained tokens only: the same as the library's, with few logits in float32."""

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers.loss.loss_utils import ForCausalLMLoss

import train
from alpaca.data.examples import IGNORE_INDEX
from alpaca.training import loss
from alpaca.training.batches import DataCollatorForSupervisedDataset, DataCollatorWithoutPadding
from tests.training.courses import assert_same_course

VOCABULARY = 601
LABELS = torch.tensor([[-100, -100, 5, 6, 7, 600, -100], [-100, 0, 1, -100, -100, -100, -100]])


def loss_and_gradient(function, logits, *args, **kwargs):
    logits = logits.clone().requires_grad_()
    value = function(logits, *args, **kwargs)
    value.backward()
    return value.detach(), logits.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 3 * VOCABULARY, 2**24], ids=["1 token", "3 tokens", "all tokens"])
@pytest.mark.parametrize("num_items", [None, 4, torch.tensor(11)])
def test_chunks_add_up_to_the_librarys_loss(dtype, chunk, num_items, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    logits = torch.randn(2, 7, VOCABULARY, generator=torch.manual_seed(0), dtype=dtype) * 4
    expected, expected_gradient = loss_and_gradient(ForCausalLMLoss, logits, LABELS, VOCABULARY, num_items)
    value, gradient = loss_and_gradient(loss.causal_lm_loss, logits, LABELS, VOCABULARY, num_items)
    assert value.dtype == torch.float32 and torch.allclose(value, expected, rtol=1e-6)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-8)

    batch = {"labels": LABELS, "shift_labels": torch.roll(LABELS, -1)}
    shifted, _ = loss_and_gradient(
        loss.causal_lm_loss, logits, vocab_size=VOCABULARY, num_items_in_batch=num_items, **batch
    )
    assert torch.allclose(shifted, expected, rtol=1e-6)


def test_a_batch_names_the_positions_that_predict_a_label():
    rows = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([5, 6, 7], [8], [9, 3])]
    rows[0]["labels"][:2] = IGNORE_INDEX
    batch = DataCollatorWithoutPadding(responses_only=True)(rows)
    assert batch["logits_to_keep"].tolist() == [1, 4] and batch["shift_labels"].tolist() == [[7, 3]]
    nothing = DataCollatorWithoutPadding(responses_only=True)([])
    assert nothing["logits_to_keep"].numel() == 0 and nothing["shift_labels"].shape == (1, 0)


# --- in a training run ---


class Examples(torch.utils.data.Dataset):
    """24 examples of 6 to 29 tokens, about half of them trained on."""

    def __init__(self):
        generator = torch.manual_seed(0)
        self.rows = []
        for length in range(6, 30):
            ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
            labels = ids.clone()
            labels[: length // 2] = IGNORE_INDEX
            self.rows.append({"input_ids": ids, "labels": labels})
        self.lengths = [len(row["labels"]) for row in self.rows]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def trainer(kind, out, padding_free=True, lora_r=0, **options):
    """`kind`: the Trainer of the library, with its own loss, or ours."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.set_seed(0)
    model = transformers.LlamaForCausalLM(config)
    if lora_r:
        model = train.add_adapters(model, train.ModelArguments(lora_r=lora_r, lora_dropout=0.0), seed=0)
    tokenizer = type("Tokenizer", (), {"pad_token_id": 0})
    args = train.TrainingArguments(
        output_dir=str(out),
        use_cpu=True,
        logging_steps=1,
        learning_rate=1e-3,
        save_strategy="no",
        **{"num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **options},
    )
    more = {"balance_tokens": True} if kind is train.AlpacaTrainer else {}
    data = Examples()
    collator = DataCollatorWithoutPadding() if padding_free else DataCollatorForSupervisedDataset(tokenizer)
    return kind(model=model, args=args, train_dataset=data, eval_dataset=data, data_collator=collator, **more)


def curve(a_trainer):
    a_trainer.train()
    log = a_trainer.state.log_history
    return torch.tensor([[entry["loss"], entry["grad_norm"]] for entry in log if "loss" in entry])


@pytest.mark.parametrize("chunk", [5 * VOCABULARY, 2**24], ids=["many chunks", "one chunk"])
@pytest.mark.parametrize(
    "options",
    [{}, {"padding_free": False}, {"lora_r": 4}, {"label_smoothing_factor": 0.1}, {"gradient_checkpointing": True}],
    ids=str,
)
def test_a_run_has_the_librarys_losses(chunk, options, monkeypatch, tmp_path):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    plain = trainer(transformers.Trainer, tmp_path, **{**options, "padding_free": False})
    ours = trainer(train.AlpacaTrainer, tmp_path, **options)
    expected = curve(plain)
    for figure, of_library in zip(curve(ours).T.tolist(), expected.T.tolist(), strict=True):  # losses, gradient norms
        assert len(figure) == 6
        assert_same_course(figure, of_library)
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=3e-3)


class LargestLogits(TorchDispatchMode):
    """Notes how many rows of logits are in one tensor, by type."""

    def __init__(self):
        super().__init__()
        self.rows = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            # Their gradient too; the head's weight and its gradient have rows of 32.
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.shape[-1:] == (VOCABULARY,):
                if tensor.numel() // VOCABULARY != 32:  # not the transposed head
                    rows = max(self.rows.get(tensor.dtype, 0), tensor.numel() // VOCABULARY)
                    self.rows[tensor.dtype] = rows
        return result


def test_float32_logits_are_there_a_chunk_at_a_time(monkeypatch, tmp_path):
    monkeypatch.setattr(loss, "CHUNK", 5 * VOCABULARY)
    # 8 examples in a micro-batch, balanced: of the 24 examples' 420 tokens 216 are trained on, a third in each.
    options = {"bf16": True, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 3, "num_train_epochs": 1}
    with LargestLogits() as library:
        trainer(transformers.Trainer, tmp_path, padding_free=False, **options).train()
    with LargestLogits() as ours:
        trainer(train.AlpacaTrainer, tmp_path, **options).train()
    assert library.rows[torch.float32] > 200
    assert ours.rows[torch.float32] == 5 and 70 <= ours.rows[torch.bfloat16] <= 75
