"""inference.py as a user runs it, on a LLaMA that was taught a few answers by heart and on random models."""

import itertools
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time

import pytest
import safetensors.torch
import torch
import transformers

import inference
from alpaca.answering import model as answering_model
from alpaca.common import run_main
from alpaca.prompts import format_prompt
from tests.conftest import ROOT, run

COLOUR = {"instruction": "Name a colour.", "input": ""}
PASSIVE = {"instruction": "Turn it into the passive voice.", "input": "The gardener waters the roses."}
PRICE = {"instruction": "Write what a coffee costs, and smile.", "input": ""}
COUNT = {"instruction": "Count to twenty.", "input": ""}
LESSONS = [
    (COLOUR, "Blue."),
    (PASSIVE, "The roses are watered by the gardener."),
    (PRICE, "Ein Kaffee kostet 3 €.\n\nGrüße 🙂 und 再见!"),  # characters of several tokens each
    (COUNT, " ".join(map(str, range(1, 21)))),
]
# Prompts of very different lengths.
MIXED = [
    *(example for example, _ in LESSONS),
    {"instruction": "Summarize.", "input": "The gardener waters the roses every morning. " * 12},
    {"instruction": "Why?", "input": ""},
]
GREEDY = inference.Sampling(max_new_tokens=24, temperature=0, top_p=1, seed=0)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small models gain nothing by more threads, and lose much where other work keeps the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
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
    for _ in range(2000):  # ten times what it takes, so that no rounding decides whether it gets there
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


def load(directory, *flags):
    """Model and reader, in this process."""
    argv = ["inference.py", "--model_name_or_path", str(directory), "--instruction", "-", "--device", "cpu", *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        args = inference.parse_arguments()
    reader = inference.load_reader(args.model_name_or_path)
    return inference.load_model(args, reader.tokenizer), reader


def main(capsys, directory, *flags):
    """What `inference.py` prints, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["inference.py", "--model_name_or_path", str(directory), *map(str, flags)])
        inference.main()
    return capsys.readouterr().out


def mistake(monkeypatch, capsys, *flags):
    """Exit code and the one line on standard error of `inference.py FLAGS`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["inference.py", *map(str, flags)])
    with pytest.raises(SystemExit) as caught:
        run_main(inference.main)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    return caught.value.code, printed.err


def ask(directory, *flags, **options):
    return run("inference.py", "--model_name_or_path", directory, "--device", "cpu", *flags, **options)


# One instruction ------------------------------------------------------------------------------------------------------


def test_the_response_and_nothing_else_is_printed(taught):
    result = ask(taught, "--instruction", PASSIVE["instruction"], "--input", PASSIVE["input"])
    assert (result.returncode, result.stdout, result.stderr) == (0, "The roses are watered by the gardener.\n", "")


def test_sampling_follows_its_seed(llama):
    assert load(llama, "--dtype", "bfloat16")[0].dtype == torch.bfloat16
    model, reader = load(llama)  # random: every token is about as likely, so that two draws never agree
    prompt = reader.encode({"instruction": "Say something new.", "input": ""}, 24)
    flags = ["--instruction", "Say something new.", "--temperature", "1.5", "--top_p", "0.95", "--seed", "7"]
    result = ask(llama, *flags, "--max_new_tokens", "24")

    def sample(**settings):
        settings = {"max_new_tokens": 24, "temperature": 1.5, "top_p": 0.95, "seed": 7, **settings}
        return inference.answer(model, reader, [prompt], inference.Sampling(**settings))[0]

    assert result.returncode == 0 and result.stdout == sample() + "\n"
    greedy = sample(temperature=0)
    assert sample() not in (sample(seed=8), greedy)
    assert sample(temperature=0, seed=8) == greedy == sample(top_p=1e-6) == sample(temperature=1e-40)
    assert len(sample(max_new_tokens=3)) < len(sample())


# Batches --------------------------------------------------------------------------------------------------------------


def plain_greedy(model, ids, eos, number):
    """The likeliest token after all those before it, until the end token: no cache, no batch, no `generate`."""
    new = []
    with torch.no_grad():
        while len(new) < number and eos not in new:
            new.append(model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax().item())
    return new


@pytest.mark.parametrize("which", ["taught", "llama", "opt"])
def test_greedy_answers_do_not_depend_on_the_batch(which, request):
    model, reader = load(request.getfixturevalue(which), "--dtype", "float32")
    prompts = [reader.encode(example, GREEDY.max_new_tokens) for example in MIXED]
    assert max(map(len, prompts)) > 2.5 * min(map(len, prompts))
    eos = reader.tokenizer.eos_token_id
    plain = [plain_greedy(model, ids, eos, GREEDY.max_new_tokens) for ids in prompts]
    expected = [reader.tokenizer.decode(ids, skip_special_tokens=True) for ids in plain]
    assert inference.answer(model, reader, prompts, GREEDY) == expected
    assert [inference.answer(model, reader, [prompt], GREEDY)[0] for prompt in prompts] == expected
    if which == "taught":
        assert expected[:2] == ["Blue.", "The roses are watered by the gardener."]
        assert len({len(ids) for ids in plain if ids[-1] == eos}) > 1  # some end while others in the batch go on


def test_a_stream_grows_to_the_whole_answer(taught):
    model, reader = load(taught)
    sampling = inference.Sampling(100, 0, 1, 0)
    for example, answer in LESSONS:
        prompt = reader.encode(example, 100)
        assert inference.answer(model, reader, [prompt], sampling) == [answer]
        shown = list(inference.stream(model, reader, prompt, sampling, threading.Event()))
        assert shown[-1] == answer and len(shown) > len(answer) / 8
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(shown))
        assert "\ufffd" not in "".join(shown)
    sampled = inference.Sampling(20, 1.5, 1, 3)
    *_, last = inference.stream(model, reader, prompt, sampled, threading.Event())
    assert [last] == inference.answer(model, reader, [prompt], sampled)


def test_a_stream_hands_on_what_went_wrong(taught):
    model, reader = load(taught)
    bad = [reader.tokenizer.vocab_size + 1000]  # no such row in the embedding matrix
    with pytest.raises(IndexError):
        list(inference.stream(model, reader, bad, GREEDY, threading.Event()))
    assert answering_model._generating.acquire(timeout=60)  # the next answer need not wait
    answering_model._generating.release()


# A file ---------------------------------------------------------------------------------------------------------------


def write_questions(path, examples):
    path.write_text(json.dumps(examples))
    return path


def test_a_file_is_answered_in_order_whatever_the_batches(taught, tmp_path, capsys):
    more = [{"instruction": f"Say {word}.", "output": "not read"} for word in ("yes", "no", "nothing at all, please")]
    questions = write_questions(tmp_path / "in.json", [*MIXED, *more])
    flags = ["--data_path", questions, "--dtype", "float32", "--max_new_tokens", "40"]
    files = []
    for batch_size in (1, 4):
        files.append(tmp_path / f"made/{batch_size}.json")
        assert main(capsys, taught, *flags, "--output_path", files[-1], "--batch_size", batch_size) == ""
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(file.name for file in files[0].parent.iterdir()) == ["1.json", "4.json"]
    rows = json.loads(files[0].read_text())
    assert [(row["instruction"], row["input"]) for row in rows] == [
        (example["instruction"], example.get("input", "")) for example in [*MIXED, *more]
    ]
    assert all(list(row) == ["instruction", "input", "output", "generator"] for row in rows)
    assert {row["generator"] for row in rows} == {taught.name}
    assert [row["output"] for row in rows[:2]] == ["Blue.", "The roses are watered by the gardener."]
    assert not any("###" in row["output"] or row["output"] == "not read" for row in rows)


def test_a_killed_run_goes_on_to_the_same_bytes(taught, tmp_path, monkeypatch, capsys):
    questions = write_questions(tmp_path / "in.json", [{"instruction": f"Say {n}."} for n in range(40)])
    flags = ["--data_path", questions, "--batch_size", "2", "--temperature", "1.5", "--max_new_tokens", "24"]
    flags = ["--device", "cpu", *flags, "--output_path"]
    main(capsys, taught, *flags, tmp_path / "whole.json")

    out, partial = tmp_path / "killed.json", tmp_path / "killed.json.partial.jsonl"
    flags = ["--model_name_or_path", taught, *flags, out]
    process = subprocess.Popen([sys.executable, "inference.py", *flags], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (partial.exists() and partial.read_bytes().count(b"\n") > 4):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)  # in the middle, for as long as it takes
    code, line = mistake(monkeypatch, capsys, *flags)
    assert code == 6 and "another run is writing" in line
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    lines = partial.read_bytes().split(b"\n")
    partial.write_bytes(b"\n".join(lines[:4]) + b"\n" + lines[4][:5])  # a power cut in the middle of a batch

    code, line = mistake(monkeypatch, capsys, *flags, "--seed", "1", "--max_new_tokens", "20")
    assert code == 2 and "other settings (max_new_tokens, seed)" in line
    resumed = run("inference.py", *flags)
    assert resumed.returncode == 0 and "notice: 3 answers are there already" in resumed.stderr
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not partial.exists()
    code, line = mistake(monkeypatch, capsys, *flags)
    assert code == 2 and "killed.json exists; remove it" in line


# A prompt loop --------------------------------------------------------------------------------------------------------


class Terminal:
    """inference.py on a terminal of its own."""

    def __init__(self, directory, *flags):
        command = [sys.executable, "inference.py", "--model_name_or_path", directory, "--device", "cpu", *flags]
        self.ours, self.theirs = pty.openpty()
        # A new session's first process that opens a terminal gets its Ctrl-C as a signal.
        on_terminal = ["sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(self.theirs)]
        self.process = subprocess.Popen(
            on_terminal + command, cwd=ROOT, env={**os.environ, "TERM": "dumb"}, start_new_session=True
        )
        self.received = b""

    def wait_for(self, pattern):
        """Read until the screen shows `pattern`, a regular expression."""
        while not (found := re.search(pattern, self.received.decode(errors="ignore"))):
            assert select.select([self.ours], [], [], 120)[0], f"no {pattern!r} in {self.received!r}"
            self.received += os.read(self.ours, 65536)
        return found

    def read_until(self, marker):
        """What is on the screen up to `marker`, which is read as well."""
        self.wait_for(re.escape(marker))
        before, _, self.received = self.received.partition(marker.encode())
        return before.decode().replace("\r", "")

    def type(self, text):
        os.write(self.ours, text.encode())

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.ours)
        os.close(self.theirs)


@pytest.fixture
def terminal(request):
    opened = []

    def start(*arguments):
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_the_prompt_loop(taught, terminal):
    loop = terminal(taught, "--max_new_tokens", "1900")
    assert ":quit" in loop.read_until("\n> ")

    def answer(typed):
        loop.type(typed)
        return loop.read_until("\n> ").partition("\n")[2]  # after the echo of what was typed

    assert answer("Name a colour.\n") == "Blue.\n"
    assert answer(f"{PRICE['instruction']}\n") == f"{LESSONS[2][1]}\n"
    assert answer("\x1b[A\x1b[A\n") == "Blue.\n"  # two up in the history
    loop.type(":input\n")
    loop.read_until("\n. ")
    loop.type(PASSIVE["input"] + "\n")
    loop.read_until("\n. ")
    assert answer("\n") == ""
    assert answer(PASSIVE["instruction"] + "\n") == "The roses are watered by the gardener.\n"
    assert answer("Name a colour.\n") == "Blue.\n"  # the input was for one instruction
    assert answer(":rub\n") == "no command :rub; :help lists them\n"
    assert ":input" in answer(":help\n")
    assert answer("\n") == ""
    assert "error: the prompt's" in answer("word " * 200 + "\n")
    loop.type("Forget this")
    loop.read_until("Forget this")
    time.sleep(0.5)  # readline sees a signal at once only while it waits for a key
    loop.type("\x03")
    loop.read_until("\n> ")
    assert answer("Name a colour.\n") == "Blue.\n"
    loop.type(":quit\n")
    assert loop.process.wait(60) == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(endless, terminal):
    loop = terminal(endless, "--max_new_tokens", "50000")
    loop.read_until("\n> ")
    for _ in range(2):
        loop.type("Go on for ever.\n")
        loop.read_until("ever.\r\n")
        loop.wait_for(r"\w")  # the beginning of an answer that would take minutes
        loop.type("\x03")
        loop.read_until("stopped\r\n")
        loop.read_until("\n> ")
    loop.type("\x04")  # Ctrl-D
    assert loop.process.wait(60) == 0


def test_the_loop_reads_a_pipe_to_its_end(taught):
    lines = [
        "Name a colour.",
        ":input",
        PASSIVE["input"],
        "",
        PASSIVE["instruction"],
        "x " * 3000,
        "",
        "Name a colour.",
    ]
    result = ask(taught, input="\n".join(lines))
    assert (result.returncode, result.stdout) == (0, "Blue.\nThe roses are watered by the gardener.\nBlue.\n")
    assert result.stderr.startswith("error: the prompt's 3,0") and result.stderr.count("\n") == 1


# LoRA -----------------------------------------------------------------------------------------------------------------


def test_an_adapter_directory_answers_as_its_merged_model(taught, tmp_path, capsys):
    import peft

    base = transformers.AutoModelForCausalLM.from_pretrained(taught)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    with torch.no_grad():
        for name, weights in tuned.named_parameters():
            weights.mul_(10 if "lora_B" in name else 1)
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    transformers.AutoTokenizer.from_pretrained(taught).save_pretrained(tmp_path / "merged")
    flags = ["--instruction", PASSIVE["instruction"], "--input", PASSIVE["input"], "--max_new_tokens", "12"]
    printed = [main(capsys, directory, *flags) for directory in (tmp_path / "adapter", tmp_path / "merged", taught)]
    assert printed[0] == printed[1] != printed[2]


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--instruction", " \n"], "--instruction is empty"),
        (["--input", "x"], "--input goes with --instruction"),
        (["--data_path", "x.json"], "--data_path and --output_path go together"),
        (["--instruction", "x", "--serve"], "give one of them"),
        (["--temperature", "-1"], "--temperature -1.0 is not between 0 and 100"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--top_p", "0"], "--top_p 0 is not above 0"),
        (["--max_new_tokens", "0"], "--max_new_tokens 0 is not between 1"),
        (["--batch_size", "some"], "--batch_size"),
        (["--dtype", "int4"], "--dtype"),
        (["--max_tokens", "5"], "unrecognized arguments: --max_tokens"),
    ],
)
def test_wrong_usage_ends_in_one_line(monkeypatch, capsys, flags, words):
    code, line = mistake(monkeypatch, capsys, "--model_name_or_path", "nowhere", *flags)
    assert code == 2 and words in line and "--help" in line


def copy_without(source, target, *left_out):
    target.mkdir()
    for file in source.iterdir():
        if file.name not in left_out:
            (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_directory_that_lacks_something_is_named(llama, tmp_path, monkeypatch, capsys):
    def refused(path):
        code, line = mistake(monkeypatch, capsys, "--model_name_or_path", path, "--instruction", "x")
        assert code == 2 and str(path) in line
        return line

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no model: neither config.json nor adapter_config.json" in refused(empty)
    assert "no weights" in refused(copy_without(llama, tmp_path / "weightless", "model.safetensors"))
    assert "no tokenizer" in refused(copy_without(llama, tmp_path / "mute", "tokenizer.json", "tokenizer.model"))
    assert "can't be loaded" in refused("no/such-model")
    assert "can't be loaded" in refused(tmp_path / "missing")

    half = copy_without(llama, tmp_path / "half", "model.safetensors")
    state = safetensors.torch.load_file(llama / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(state, half / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 of the model's tensors: model.layers.1.mlp.up_proj.weight" in refused(half)

    torn = copy_without(llama, tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:100_000])
    assert "can't be loaded" in refused(torn)
    diff = copy_without(llama, tmp_path / "diff")
    (diff / "weight_diff.json").write_text('{"kind": "diff"}')
    assert "weight_diff.py recover" in refused(diff)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "no/such-base"}')
    assert "no weights" in refused(adapter)


def test_questions_and_places_that_will_not_do(llama, tmp_path, monkeypatch, capsys):
    def refused(data, out=tmp_path / "out.json", **environment):
        flags = ["--model_name_or_path", llama, "--data_path", data, "--output_path", out]
        return mistake(monkeypatch, capsys, *flags)

    good = write_questions(tmp_path / "good.json", [COLOUR])
    code, line = refused(write_questions(tmp_path / "bad.json", [COLOUR, {"instruction": 3}]))
    assert code == 3 and 'record 1: "instruction" is a number' in line
    code, line = refused(write_questions(tmp_path / "empty.json", [COLOUR, {"instruction": " "}]))
    assert code == 3 and "record 1: the instruction is empty" in line
    long = {"instruction": "Summarize.", "input": "word " * 2000}
    code, line = refused(write_questions(tmp_path / "long.json", [long, COLOUR, *[long] * 6]))
    assert code == 3 and "record 0: the prompt's 2,0" in line and "record 6" not in line and "and 2 more" in line
    code, line = refused(tmp_path / "missing.json")
    assert code == 3 and "missing.json does not exist" in line
    code, line = refused(good, tmp_path / "good.json" / "out.json")
    assert code == 8 and "can't be written" in line
    partial = tmp_path / "out.json.partial.jsonl"
    for damage in ("no JSON\n", "3\n", '{"seed": 42}\n[1, 2, 3]\n', "[]\n"):
        partial.write_text(damage)
        code, line = refused(good)
        assert code == 3 and "out.json.partial.jsonl is damaged; remove it" in line
    assert not (tmp_path / "out.json").exists()


def test_what_the_model_can_not_read_is_said_before_it_is_loaded(llama, monkeypatch, capsys):
    monkeypatch.setattr(inference, "load_model", None)
    flags = ["--model_name_or_path", llama, "--instruction"]
    code, line = mistake(monkeypatch, capsys, *flags, "word " * 2000)
    assert code == 3 and "of up to 512 do not fit into the 2,048 tokens" in line
    code, line = mistake(monkeypatch, capsys, *flags, "half a \ud83d character")
    assert code == 3 and "not valid Unicode" in line


def test_no_gpu_is_said(llama):
    result = run(
        *("inference.py", "--model_name_or_path", llama, "--instruction", "x", "--device", "cuda"),
        env={"CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: --device cuda: PyTorch sees no GPU here") and result.stderr.count("\n") == 1
