"""NEFTune's noise in rows of several examples: for each example what the library gives it alone."""

import pytest

import train
from alpaca.training.batches import DataCollatorForSupervisedDataset, DataCollatorWithoutPadding
from tests.training.conftest import tiny

ALPHA = 5.0


def noise_in_a_run(tokenizer, examples, out, padding_free, batch_size):
    """(an example's length, the noise on it) in the micro-batches of one step; the embeddings are all 0 else."""
    noises = []
    model = tiny(tokenizer)
    model.get_input_embeddings().weight.data.zero_()
    trainer = train.AlpacaTrainer(
        model=model,
        args=train.TrainingArguments(
            output_dir=str(out),
            use_cpu=True,
            max_steps=1,
            warmup_steps=100,  # the rate of the step is 0
            save_strategy="no",
            neftune_noise_alpha=ALPHA,
            per_device_train_batch_size=batch_size,
        ),
        train_dataset=examples,
        eval_dataset=examples,
        data_collator=DataCollatorWithoutPadding() if padding_free else DataCollatorForSupervisedDataset(tokenizer),
        balance_tokens=True,
    )

    def listen(module, args, kwargs):
        lengths = kwargs["cu_seq_lens_q"].diff().tolist() if padding_free else [kwargs["input_ids"].shape[1]]
        given.append(lengths)

    given = []
    model.register_forward_pre_hook(listen, with_kwargs=True)
    first = model.model.layers[0]
    first.register_forward_pre_hook(lambda module, args: noises.append(args[0].detach()[0]))
    trainer.train()
    trained, in_training = len(noises), model.training
    trainer.evaluate()
    assert in_training and not any(noise.any() for noise in noises[trained:])
    rows = zip(given[:trained], noises[:trained], strict=True)
    return [pair for lengths, noise in rows for pair in zip(lengths, noise.split(lengths), strict=True)]


@pytest.mark.parametrize(("padding_free", "batch_size"), [(True, 8), (True, 1), (False, 1)])
def test_noise_is_as_large_as_each_example_asks_for(padding_free, batch_size, tokenizer, examples, tmp_path):
    found = noise_in_a_run(tokenizer, examples, tmp_path, padding_free, batch_size)
    assert len(found) == batch_size
    for length, noise in found:
        size = ALPHA / (length * noise.shape[1]) ** 0.5
        assert noise.shape[0] == length and 0.98 * size < noise.abs().max() <= size * 1.0001
        assert noise.std() == pytest.approx(size / 3**0.5, rel=0.1)  # uniform in ±size


def test_noise_reaches_a_model_with_adapters(tokenizer, examples):
    model = train.add_adapters(tiny(tokenizer), train.ModelArguments(lora_r=2, lora_dropout=0.0), seed=0)
    args = train.TrainingArguments(output_dir="unused", use_cpu=True, neftune_noise_alpha=ALPHA)
    collator = DataCollatorWithoutPadding()
    train.AlpacaTrainer(model=model, args=args, train_dataset=examples, data_collator=collator, balance_tokens=True)
    batch = DataCollatorWithoutPadding()([examples[0], examples[1]])
    losses = [model.train(training)(**batch).loss.item() for training in (True, True, False, False)]
    assert losses[0] != losses[1] and losses[2] == losses[3]
