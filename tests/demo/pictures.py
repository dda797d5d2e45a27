"""The two pictures of the demo, from what `make demo` left: the web page with its first example, and the terminal.

    make demo | tee demo/shown.txt
    python -m tests.demo.pictures

The answer on the page is greedy, to the first of the page's own examples.
"""

import html
import tempfile
from pathlib import Path

from selenium.webdriver.common.by import By

from tests.answering.browser import start_browser
from tests.answering.test_web_page import Page, serving
from tests.conftest import ROOT

STYLE = "margin:0;padding:16px;background:#1e1e1e;color:#e6e6e6;font:15px/1.3 monospace;display:inline-block"


def picture_page(chromium, directory):
    with serving(ROOT / "demo" / "tuned", directory / "log") as (_, url):
        page = Page(chromium, url)
        page.set_length(256)
        page.find("#sampling button").click()
        page.find("#example-0").click()
        page.wait(lambda: page.text("instruction"))
        page.find("button#answer").click()
        page.wait(lambda: page.status() == "Done.")
        chromium.set_window_size(1000, 1080)
        chromium.execute_script("window.scrollTo(0, 0)")
        chromium.save_screenshot(str(ROOT / "assets" / "web_page.png"))


def picture_terminal(chromium, directory):
    text = (ROOT / "demo" / "shown.txt").read_text(encoding="utf-8")
    page = directory / "demo.html"
    page.write_text(f'<meta charset="utf-8"><body style="margin:0"><pre style="{STYLE}">{html.escape(text)}</pre>')
    chromium.get(page.as_uri())
    chromium.set_window_size(800, 4000)
    chromium.find_element(By.TAG_NAME, "pre").screenshot(str(ROOT / "assets" / "demo.png"))


def main():
    with tempfile.TemporaryDirectory() as folder:
        chromium = start_browser(Path(folder, "profile"))
        try:
            picture_page(chromium, Path(folder))
            picture_terminal(chromium, Path(folder))
        finally:
            chromium.quit()


if __name__ == "__main__":
    main()
