"""A page with a small model on an address of this machine, and visitors with a browser."""

import importlib.util
import os
import shutil
from contextlib import contextmanager

import pytest

from ttt_e2e.app import ModelShelf, Sessions

from ..serving.small import small_text_model

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 120_000  # milliseconds: other work may keep the machine busy


def missing():
    """What a browser test lacks here, None where all is there."""
    for package in ("gradio", "playwright"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed (pip install 'ttt-e2e[app]' playwright)"
    if not any(map(shutil.which, BROWSERS)):
        return "there is no chromium (apt-get install chromium)"
    return None


def need_a_browser():
    """Skip where there is none, but not where everything must be tested."""
    lacking = missing()
    if lacking and os.environ.get("CI"):
        pytest.fail(lacking)
    if lacking:
        pytest.skip(lacking)


@contextmanager
def open_page():
    """A page with two small models; gives its address and the sessions of its visitors."""
    from ttt_e2e.app.launch import launch_page
    from ttt_e2e.app.page import build_page

    sessions = Sessions()
    shelf = ModelShelf({"small": small_text_model, "other": lambda: small_text_model(seed=1)})
    page = build_page(shelf, sessions=sessions)
    try:
        yield launch_page(page, port=0, wait=False), sessions
    finally:
        page.close(verbose=False)


@contextmanager
def open_browser():
    """Chromium without a window."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, BROWSERS)))
    with sync_playwright() as playwright:
        # There is none in containers, and the page is ours.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visitor:
    """Somebody with a browser of their own.

    Attributes:
        asked: the addresses of everything that the browser asked for.
    """

    def __init__(self, browser, address, **context):
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.asked = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)
        self.page.wait_for_selector("#read")

    def click(self, part):
        self.page.click(f"#{part}:not([disabled])")

    def paste(self, text):
        self.page.fill("#text textarea", text)

    def wait_for(self, said):
        """Until the line below the buttons says something; returns all of it."""
        self.page.wait_for_selector(f"#said >> text={said}")
        return self.page.inner_text("#said")

    def read(self, text):
        self.paste(text)
        self.click("read")
        self.wait_for("is read")

    @property
    def points(self):
        """Points of the curve."""
        return int(self.page.get_attribute("#curves figure", "data-points"))

    @property
    def tokens(self):
        """Tokens in the learned context, as the page shows them."""
        return int(self.page.get_attribute("#numbers dl", "data-tokens"))

    def wait_for_tokens(self, more_than):
        self.page.wait_for_function(f"Number(document.querySelector('#numbers dl').dataset.tokens) > {more_than}")

    def wait_for_points(self, more_than):
        self.page.wait_for_function(f"Number(document.querySelector('#curves figure').dataset.points) > {more_than}")

    def ask(self, message):
        """The last answer, when it is complete."""
        before = self.tokens
        self.page.fill("#message textarea", message)
        self.click("send")
        self.wait_for_tokens(before)
        return self.page.locator("#chat [data-testid=bot]").last.inner_text()

    def save(self, path):
        self.click("save")
        self.page.wait_for_selector("#saved")
        with self.page.expect_download() as download:
            self.page.click("#saved")
        download.value.save_as(path)

    def give(self, path):
        """Drop a saved file."""
        self.page.set_input_files("#stored input[type=file]", path)
        self.page.wait_for_selector(f"#stored >> text={path.stem}")

    def leave(self):
        self.context.close()
