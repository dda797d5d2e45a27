"""`inference.py --serve` in a headless Chromium, against a model whose answers take minutes unless they are stopped."""

import contextlib
import json
import signal
import socket
import subprocess
import sys

import psutil
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

import inference
from tests.answering.asking import mistake
from tests.answering.browser import start_browser
from tests.conftest import ROOT

QUESTION = "Go on for ever."


@contextlib.contextmanager
def serving(directory, log):
    """`inference.py --serve` on a free port → its process and address. Ctrl-C must end it, without a traceback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "inference.py", "--model_name_or_path", directory, "--device", "cpu", "--serve"]
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--max_new_tokens", "50000"],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.PIPE,
            text=True,
        )
    try:
        url = f"http://127.0.0.1:{port}/"
        assert process.stderr.readline() == f"notice: the page is at {url}; Ctrl-C ends it\n", process.stderr.read()
        yield process, url
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0 and err == "", err
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(endless, tmp_path_factory):
    with serving(endless, tmp_path_factory.mktemp("server") / "log") as started:
        yield started


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    started = start_browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.quit()


class Page:
    """The page in a tab of the browser."""

    def __init__(self, chromium, url):
        self.chromium = chromium
        self.tab = chromium.current_window_handle
        chromium.get(url)
        self.wait(lambda: self.find("#instruction textarea"))

    def find(self, selector):
        return next(iter(self.chromium.find_elements(By.CSS_SELECTOR, selector)), None)

    def wait(self, condition):
        return WebDriverWait(self.chromium, 120, poll_frequency=0.05).until(lambda _: condition())

    def text(self, name):
        return self.find(f"#{name} textarea").get_property("value")

    def status(self):
        return self.find("#status").text.strip()

    def keys(self, *keys):
        """Into whatever has the focus."""
        webdriver.ActionChains(self.chromium).send_keys(*keys).perform()

    def type(self, selector, text):
        field = self.find(selector)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text)

    def paste(self, name, text):
        """Long texts, at once."""
        self.chromium.execute_script(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))",
            self.find(f"#{name} textarea"),
            text,
        )

    def set_length(self, tokens):
        if not self.find("#max_new_tokens input[type=number]"):
            self.find("#sampling button").click()
            self.wait(lambda: self.find("#max_new_tokens input[type=number]"))
        self.type("#max_new_tokens input[type=number]", f"{tokens}\t")


@pytest.fixture
def page(chromium, server):
    opened = Page(chromium, server[1])
    yield opened
    for tab in chromium.window_handles[1:]:
        chromium.switch_to.window(tab)
        chromium.close()
    chromium.switch_to.window(chromium.window_handles[0])


@pytest.fixture(scope="module")
def eight_tokens(endless):
    """The greedy answer to QUESTION, 8 tokens of it."""
    reader = inference.load_reader(str(endless))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["inference.py", "--model_name_or_path", str(endless), "--device", "cpu"])
        model = inference.load_model(inference.parse_arguments(), reader.tokenizer)
    prompt = reader.encode({"instruction": QUESTION, "input": ""}, 8)
    return inference.answer(model, reader, [prompt], inference.Sampling(8, 0, 1, 0))[0]


def test_with_the_keyboard_alone(page):
    for _ in range(10):
        if page.chromium.switch_to.active_element == page.find("#instruction textarea"):
            break
        page.keys(Keys.TAB)
    for _ in range(2):  # stopping leaves the model free for the next question
        page.keys(QUESTION, Keys.ENTER)
        page.wait(lambda: page.status() == "Answering …")
        first = page.text("response")
        page.wait(lambda first=first: len(page.text("response")) > len(first))
        assert page.text("response").startswith(first) and page.status() == "Answering …"
        page.keys(Keys.TAB, Keys.TAB, Keys.TAB)
        assert page.chromium.switch_to.active_element == page.find("button#stop")
        page.keys(Keys.ENTER)
        page.wait(lambda: page.status() == "Stopped.")
        with_shift = webdriver.ActionChains(page.chromium).key_down(Keys.SHIFT)
        with_shift.send_keys(Keys.TAB, Keys.TAB, Keys.TAB).key_up(Keys.SHIFT).perform()  # back to the instruction
        page.keys(Keys.END, "!")


def test_the_answer_is_the_one_of_the_command_line(page, eight_tokens):
    page.type("#instruction textarea", QUESTION)
    page.set_length(8)
    page.find("button#answer").click()
    page.wait(lambda: page.status() == "Done.")
    assert page.text("response") == eight_tokens


def test_a_new_question_takes_the_place_of_the_answer_under_way(page, eight_tokens):
    page.type("#instruction textarea", QUESTION + "\n")
    page.wait(lambda: page.text("response"))
    page.set_length(8)
    page.find("button#answer").click()
    page.wait(lambda: page.status() == "Done.")
    assert page.text("response") == eight_tokens


def test_mistakes_are_said_on_the_page(page, eight_tokens):
    page.type("#instruction textarea", " \n")
    page.wait(lambda: page.status() == "Not answered: the instruction is empty; say what to do.")
    page.type("#instruction textarea", QUESTION)
    page.paste("input", "word " * 60_000)
    page.find("button#answer").click()
    page.wait(lambda: "do not fit into the 100,000 tokens" in page.status())
    page.paste("input", "")
    page.set_length(8)
    page.find("button#answer").click()
    page.wait(lambda: page.status() == "Done.")
    assert page.text("response") == eight_tokens


def test_others_wait_in_line(page, server, eight_tokens):
    page.type("#instruction textarea", QUESTION + "\n")
    page.wait(lambda: page.text("response"))
    page.chromium.switch_to.new_window("tab")
    other = Page(page.chromium, server[1])
    other.type("#instruction textarea", QUESTION)
    other.set_length(8)
    other.find("button#answer").click()
    other.wait(lambda: other.status() == "Waiting for the model …")
    other.find("button#stop").click()
    other.wait(lambda: other.status() == "Stopped.")
    other.find("button#answer").click()
    other.wait(lambda: other.status() == "Waiting for the model …")
    page.chromium.switch_to.window(page.tab)
    assert page.status() == "Answering …"
    page.chromium.get("about:blank")  # who leaves makes room
    page.chromium.switch_to.window(other.tab)
    other.wait(lambda: other.status() == "Done.")
    assert other.text("response") == eight_tokens


def test_notice_and_examples(page):
    assert "A research artifact" in page.find("body").text
    page.find("#example-2").click()
    page.wait(lambda: page.text("input") == "The gardener waters the roses every morning.")
    assert page.text("instruction") == "Turn the sentence into the passive voice."


def test_nothing_is_asked_of_the_outside(chromium, server):
    chromium.get("about:blank")
    for log in ("performance", "browser"):  # what came before
        chromium.get_log(log)
    page = Page(chromium, server[1])
    page.type("#instruction textarea", QUESTION + "\n")
    page.wait(lambda: page.text("response"))
    messages = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked and not [url for url in asked if not url.startswith((server[1], "data:", "blob:"))]
    assert not [entry for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"]
    chromium.get("about:blank")


def test_it_listens_on_loopback_only(server):
    listening = [c.laddr.ip for c in psutil.Process(server[0].pid).net_connections("inet") if c.status == "LISTEN"]
    assert listening == ["127.0.0.1"]


def test_ctrl_c_ends_it_in_the_middle_of_an_answer(chromium, endless, tmp_path):
    with serving(endless, tmp_path / "log") as (_, url):
        page = Page(chromium, url)
        page.type("#instruction textarea", QUESTION + "\n")
        page.wait(lambda: page.text("response"))


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(server, tmp_path, monkeypatch, capsys):
    port = server[1].rstrip("/").rpartition(":")[2]
    code, line = mistake(monkeypatch, capsys, "--model_name_or_path", tmp_path, "--serve", "--port", port)
    assert code == 2 and line == f"error: --port {port}: Address already in use; choose another port\n"
