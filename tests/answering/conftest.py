import pytest
import torch
import transformers

from alpaca.prompts import format_prompt
from tests.answering.asking import LESSONS


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small models gain nothing by more threads, and lose much where other work keeps the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def taught(llama, tmp_path_factory):
    """The embedded model after learning LESSONS by heart; it ends its answers with the end token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama, padding_side="right", pad_token="</s>")
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    prompts = [format_prompt(example) for example, _ in LESSONS]
    batch = tokenizer([p + a + "</s>" for p, (_, a) in zip(prompts, LESSONS, strict=True)], padding=True)
    ids, seen = torch.tensor(batch["input_ids"]), torch.tensor(batch["attention_mask"])
    labels = ids.masked_fill(seen == 0, -100)
    for row, prompt in enumerate(prompts):
        labels[row, : len(tokenizer(prompt).input_ids)] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    for _ in range(2000):  # 65 do here; so many that no rounding decides whether it gets there
        loss = model(input_ids=ids, attention_mask=seen, labels=labels).loss
        if loss < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss < 0.01
    directory = tmp_path_factory.mktemp("taught")
    model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(llama).save_pretrained(directory)
    return directory
