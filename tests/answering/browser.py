"""A Chromium or Chrome for the tests of the web page: one that is there, else one that is fetched."""

import json
import os
import shutil
import subprocess

import pytest
from selenium import webdriver
from selenium.webdriver.common.selenium_manager import SeleniumManager


def from_path():
    browsers = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    browser = next(filter(None, map(shutil.which, browsers)), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


def from_selenium_manager():
    """A browser and a driver that fit each other, downloaded where need be into ~/.cache/selenium."""
    command = [SeleniumManager._get_binary(), "--browser", "chrome", "--avoid-stats", "--timeout", "20"]
    result = subprocess.run([*command, "--output", "json"], capture_output=True, text=True, timeout=180, check=False)
    found = json.loads(result.stdout)["result"]
    if found["code"]:
        raise OSError(found["message"])
    return found["browser_path"], found["driver_path"]


def from_debian():
    for command in (
        ["update", "-qq"],
        ["install", "-y", "-qq", "--no-install-recommends", "chromium", "chromium-driver"],
    ):
        subprocess.run(["apt-get", *command], capture_output=True, timeout=240, check=True, stdin=subprocess.DEVNULL)
    return from_path()


def start_browser(profile):
    """Start it headless, asking nothing of the outside. Where none can be had, the test is skipped or, with
    REQUIRE_BROWSER in the environment, fails."""
    found, reasons = None, []
    for attempt in (from_path, from_selenium_manager, *([from_debian] if os.geteuid() == 0 else [])):
        try:
            if found := attempt():
                break
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            reasons.append(f"{attempt.__name__}: {str(error)[-150:]}")
    if not found:
        reason = "NO BROWSER, SO THE WEB PAGE IS NOT TESTED: install chromium and chromium-driver"
        return (pytest.fail if os.environ.get("REQUIRE_BROWSER") else pytest.skip)(f"{reason} ({'; '.join(reasons)})")
    options = webdriver.ChromeOptions()
    options.binary_location, driver = found
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1000,1100"),
        f"user-data-dir={profile}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    # With the paths of both given, Selenium Manager is not asked.
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
