"""End to end against `transformers serve`, a server that is not ours, with the embedded model."""

import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
import transformers

import inference
from alpaca.generation.self_instruct import encode_prompt, read_seed_tasks
from alpaca.teacher.client import Completion, OpenAIDecodingArguments, openai_completion

ROOT = Path(__file__).resolve().parents[2]
TASKS = [
    {"instruction": "Name the largest planet in our solar system.", "input": "", "output": "Jupiter"},
    {"instruction": "Sort these three numbers from small to large.", "input": "3, 1, 2", "output": "1, 2, 3"},
]
ANSWER = (
    " Name the largest planet in our solar system.\n2. Input:\n<noinput>\n2. Output:\nJupiter\n###\n"
    "3. Instruction: Sort these three numbers from small to large.\n3. Input:\n3, 1, 2\n3. Output:\n1, 2, 3"
)


def save(model, llama, directory):
    """Model and tokenizer, with a chat template that leaves the prompt as it is."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    return directory


def taught(llama):
    """The embedded model, taught to answer any prompt of ours with two tasks. About 20 CPU-seconds."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    seeds = sorted(read_seed_tasks(str(ROOT / "seed_tasks.jsonl"), 1), key=lambda task: len(str(task)))[:90]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    rng = random.Random(0)
    for _ in range(200):
        prompt = encode_prompt([rng.choice(seeds)])
        given = len(tokenizer(prompt).input_ids)
        ids = torch.tensor([[*tokenizer(prompt + ANSWER).input_ids, tokenizer.eos_token_id]])
        labels = ids.clone()
        labels[:, :given] = -100
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if loss < 0.01:
            break
    return model


@contextlib.contextmanager
def serve(model_directory, home):
    """`transformers serve` on a free port of loopback → its base URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (home / "hub").mkdir(parents=True)
    command = [Path(sys.executable).parent / "transformers", "serve", model_directory, "--device", "cpu"]
    with open(home / "log", "w") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=log,
            env={**os.environ, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"},
        )
        try:
            deadline = time.monotonic() + 90
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < deadline, (home / "log").read_text()
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(20)


def generate(url, model, path, api, *flags):
    """→ exit code and the answers in the log."""
    result = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "generate_instruction",
                "generate_instruction_following_data",
                "--output_dir",
                path,
            ),
            *("--base_url", url, "--model_name", model, "--api", api, "--num_prompt_instructions", "1", *flags),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "Traceback" not in result.stderr, result.stderr
    records = map(json.loads, (path / "requests.jsonl").read_text().splitlines())
    return result.returncode, [record for record in records if "answer" in record]


def test_both_wire_formats_with_a_random_model(llama, tmp_path):
    """Its answers are noise, and they arrive, are counted, logged and parsed."""
    directory = save(transformers.AutoModelForCausalLM.from_pretrained(llama), llama, tmp_path / "model")
    with serve(directory, tmp_path / "home") as url:
        for api in ("completions", "chat"):
            code, answers = generate(url, directory, tmp_path / api, api, "--max_requests", "2", "--max_tokens", "16")
            assert code == 5 and [answer["request"] for answer in answers] == [0, 1]
            for answer in answers:
                assert answer["answer"].strip() and answer["finish_reason"] == "length"
                assert answer["usage"]["completion_tokens"] == 16 and answer["usage"]["prompt_tokens"] > 400
            assert json.loads((tmp_path / api / "regen.json").read_text()) == []
        arguments = OpenAIDecodingArguments(max_tokens=4, n=2)  # this server ignores n
        found = openai_completion("Name a", arguments, str(directory), api="completions", base_url=url)
        assert len(found) == 2 and all(isinstance(choice, Completion) and choice.text for choice in found)
        assert all(choice.finish_reason == "length" for choice in found)


def test_the_readme_asks_it_for_the_answer_that_inference_gives(llama, tmp_path, capsys):
    example = re.search(r"```python\n(from openai .*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    question = {"instruction": "Shorten this.", "input": "It rained all day."}
    assert json.dumps(question) in example
    with serve(llama, tmp_path / "home") as url:
        example = example.replace("http://127.0.0.1:8000/v1", url).replace("<dir>", str(llama))
        exec(example.replace("max_tokens=256", "max_tokens=12"), {})
    reader = inference.load_reader(str(llama))
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    sampling = inference.Sampling(max_new_tokens=12, temperature=0, top_p=1, seed=0)
    assert capsys.readouterr().out == inference.answer(model, reader, [reader.encode(question, 12)], sampling)[0] + "\n"


@pytest.mark.soak
def test_tasks_of_a_taught_model_are_kept(llama, tmp_path):
    directory = save(taught(llama), llama, tmp_path / "model")
    with serve(directory, tmp_path / "home") as url:
        for api in ("completions", "chat"):
            flags = "--num_instructions_to_generate", "2", "--temperature", "0.01", "--max_tokens", "120"
            code, (answer,) = generate(url, directory, tmp_path / api, api, *flags)
            assert code == 0 and answer["finish_reason"] == "stop"
            entries = json.loads((tmp_path / api / "regen.json").read_text())
            assert [{part: entry[part] for part in TASKS[0]} for entry in entries] == TASKS
