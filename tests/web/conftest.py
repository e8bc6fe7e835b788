"""A real browser without a window, and a page to look at with it."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mdm_models import Pipeline
from mdm_models.web import build, serve
from tests.models.small_pipelines import CLIP_MODEL, small_pipeline

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
PATIENCE = 120  # seconds: a busy machine's


class Browser:
    """Chromium, driven by selenium."""

    def __init__(self, downloads: Path):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
            options.add_argument(argument)
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self.downloads = downloads

    def open(self, address: str) -> str:
        """In a new tab, whose handle it returns."""
        self.driver.switch_to.new_window("tab")
        self.driver.get(address)
        self.until(lambda: self.find("#draw"))
        return self.driver.current_window_handle

    def find(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def write(self, selector: str, text: str) -> None:
        [field] = self.find(f"{selector} input, {selector} textarea")
        field.clear()
        field.send_keys(text)

    def click(self, selector: str) -> None:
        self.find(selector)[0].click()

    def until(self, holds: Callable[[], object], what: str = "") -> object:
        deadline = time.monotonic() + PATIENCE
        while not (found := holds()):
            assert time.monotonic() < deadline, f"waited in vain {what}"
            time.sleep(0.05)
        return found

    def requests(self) -> set[str]:
        """All that was asked for since the last call, by address."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    if not (CHROMIUM and DRIVER):
        pytest.skip("there is no browser to test the page with: apt install chromium chromium-driver")
    browser = Browser(tmp_path_factory.mktemp("downloads"))
    yield browser
    browser.driver.quit()


class Slow(Pipeline):
    """A pipeline that waits at each step until it may go on."""

    pause = 0.0  # seconds a step

    def __call__(self, *arguments, callback=None, **more):
        def after_step(*step):
            time.sleep(self.pause)
            if callback:
                callback(*step)

        return super().__call__(*arguments, callback=after_step, **more)


def slow(pipeline: Pipeline) -> Slow:
    return Slow(pipeline.model, pipeline.text_encoder, pipeline.config)


@pytest.fixture(scope="module")
def pictures() -> Slow:
    return slow(small_pipeline())


@pytest.fixture(scope="module")
def address(pictures) -> Iterator[str]:
    blocks = build(pictures, "small_emoji", steps=25)
    yield serve(blocks, "127.0.0.1", None, wait=False)
    blocks.close()


@pytest.fixture(scope="module")
def clips_address() -> Iterator[str]:
    blocks = build(small_pipeline(CLIP_MODEL), "small_emoji_clips", steps=25)
    yield serve(blocks, "127.0.0.1", None, wait=False)
    blocks.close()
