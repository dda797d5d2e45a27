"""End to end against `transformers serve`, a server that is not ours, with the embedded model."""

import contextlib
import json
import os
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
from alpaca.teacher.client import OpenAIDecodingArguments
from alpaca.teacher.completion import Completion, openai_completion
from generate_instruction import replay
from tests.conftest import ROOT

TASKS = [
    {"instruction": "Name the largest planet in our solar system.", "input": "", "output": "Jupiter"},
    {"instruction": "Sort these three numbers from small to large.", "input": "3, 1, 2", "output": "1, 2, 3"},
]
ANSWER = (
    " Name the largest planet in our solar system.\n2. Input:\n<noinput>\n2. Output:\nJupiter\n###\n"
    "3. Instruction: Sort these three numbers from small to large.\n3. Input:\n3, 1, 2\n3. Output:\n1, 2, 3"
)


def scripted(llama, directory):
    """A model that gives ANSWER to everything, by its weights rather than by training: no rounding can change that.

    Each line of ANSWER is a token of its own. Attention and MLP add nothing, so that the last token alone decides on
    the next: after the n-th line comes the n+1-th, after the last the end, and after any other token the first.
    """
    lines = ANSWER.splitlines(keepends=True)
    assert len(set(lines)) == len(lines)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    tokenizer.add_tokens([transformers.AddedToken(line, normalized=False) for line in lines])
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    chain = [*tokenizer.convert_tokens_to_ids(lines), tokenizer.eos_token_id]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embeddings[:, 0] = 1.0  # (tokens, hidden): each token one of the first len(lines) + 1 directions
        for direction, token in enumerate(chain):
            embeddings[token] = torch.eye(embeddings.shape[1])[direction + 1]
            head[token, direction] = 10.0
    model.save_pretrained(directory)
    return directory


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
            env={**os.environ, "HF_HOME": str(home)},
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
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:  # in the middle of an answer, on a machine that does other work
                process.kill()
                process.wait()


def generate(url, model, path, api, *flags, timeout=120):
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
        timeout=timeout,
    )
    assert "Traceback" not in result.stderr, result.stderr
    records = map(json.loads, (path / "requests.jsonl").read_text().splitlines())
    return result.returncode, [record for record in records if "answer" in record]


def test_both_wire_formats(llama, tmp_path):
    """Answers arrive, are counted, logged and parsed, whole ones and those cut off for length."""
    directory = scripted(llama, tmp_path / "model")
    with serve(directory, tmp_path / "home") as url:
        for api in ("completions", "chat"):
            flags = "--num_instructions_to_generate", "2", "--temperature", "0.01", "--max_tokens", "120"
            code, (answer,) = generate(url, directory, tmp_path / api, api, *flags)
            assert code == 0 and answer["finish_reason"] == "stop" and answer["answer"].strip() == ANSWER.strip()
            entries = json.loads((tmp_path / api / "regen.json").read_text())
            assert [{part: entry[part] for part in TASKS[0]} for entry in entries] == TASKS
            cut = tmp_path / f"{api}_cut"
            code, answers = generate(url, directory, cut, api, "--max_requests", "2", "--max_tokens", "4")
            assert code == 5 and [answer["request"] for answer in answers] == [0, 1]
            for answer in answers:
                assert answer["answer"].strip() and answer["finish_reason"] == "length"
                assert answer["usage"]["completion_tokens"] == 4 and answer["usage"]["prompt_tokens"] > 400
            assert json.loads((cut / "regen.json").read_text()) == []
        arguments = OpenAIDecodingArguments(max_tokens=4, n=2)  # this server ignores n
        found = openai_completion("Name a", arguments, str(directory), api="completions", base_url=url)
        assert len(found) == 2 and all(isinstance(choice, Completion) and choice.text for choice in found)
        assert all(choice.finish_reason == "length" for choice in found)


def documented_client(url, model):
    """The documented lines, of 12 tokens, and the answer that inference.py gives to their question."""
    documents = "\n".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    example = re.search(r"```python\n(from openai .*?)```", documents, re.DOTALL).group(1)
    question = {"instruction": "Shorten this.", "input": "It rained all day."}
    assert json.dumps(question) in example
    example = example.replace("http://127.0.0.1:8000/v1", url).replace("<dir>", str(model))
    exec(example.replace("max_tokens=256", "max_tokens=12"), {})
    reader = inference.load_reader(str(model))
    model = transformers.AutoModelForCausalLM.from_pretrained(model)
    sampling = inference.Sampling(max_new_tokens=12, temperature=0, top_p=1, seed=0)
    return inference.answer(model, reader, [reader.encode(question, 12)], sampling)[0]


def test_the_documented_client_gets_the_answer_that_inference_gives(llama, tmp_path, capsys):
    with serve(llama, tmp_path / "home") as url:
        answer = documented_client(url, llama)
    assert capsys.readouterr().out == answer + "\n"


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_real_model_as_the_teacher(smollm2, served_smollm2, tmp_path):
    """What 135 million parameters write is worth little, and all of it is accounted for."""
    flags = "--max_requests", "2", "--max_tokens", "48", "--concurrency", "1", "--timeout", "300"
    code, answers = generate(served_smollm2, smollm2, tmp_path / "run", "completions", *flags, timeout=600)
    assert code == 5 and [answer["request"] for answer in answers] == [0, 1]
    assert all(answer["answer"].strip() and answer["usage"]["completion_tokens"] <= 48 for answer in answers)
    before = (tmp_path / "run" / "regen.json").read_bytes()
    assert isinstance(json.loads(before), list)
    (tmp_path / "run" / "regen.json").unlink()
    replay(str(tmp_path / "run"))
    assert (tmp_path / "run" / "regen.json").read_bytes() == before


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_the_documented_client_with_a_real_model(smollm2, served_smollm2, capsys):
    answer = documented_client(served_smollm2, smollm2)
    assert answer.strip() and capsys.readouterr().out == answer + "\n"
