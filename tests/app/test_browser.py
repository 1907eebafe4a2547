"""The page in a real browser. Where there is none the tests are skipped, except in continuous integration."""

import re
import time
from urllib.parse import urlparse

import pytest

from ..serving.small import BOOK
from . import browsing
from .browsing import PATIENCE, Visitor, need_a_browser, open_browser, open_page

ENDLESS = BOOK * 1500  # nobody waits for its end


@pytest.fixture(scope="module")
def served():
    need_a_browser()
    with open_page() as (address, sessions):
        yield address, sessions


@pytest.fixture(scope="module")
def browser(served):
    with open_browser() as browser:
        yield browser


@pytest.fixture
def visit(served, browser):
    """Opens the page for one more visitor."""
    visitors = []

    def open_one(**context):
        visitors.append(Visitor(browser, served[0], **context))
        return visitors[-1]

    yield open_one
    for visitor in visitors:
        visitor.leave()


def test_a_missing_browser_is_a_reason_to_skip_but_for_continuous_integration(monkeypatch):
    monkeypatch.setattr(browsing, "missing", lambda: "there is no chromium")
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no chromium"):
        need_a_browser()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no chromium"):
        need_a_browser()


def until(condition, seconds=60):
    """Wait for something outside of the browser."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


def test_reading_asking_saving_and_loading(visit, tmp_path):
    visitor = visit()
    visitor.paste(ENDLESS)
    visitor.click("read")
    visitor.wait_for_points(0)
    before = visitor.points
    visitor.wait_for_points(before)  # it grows
    visitor.click("pause")
    paused = visitor.wait_for("Paused")
    assert f"{visitor.tokens:,} of " in paused
    before = visitor.tokens
    visitor.click("go-on")
    visitor.wait_for_tokens(before)
    visitor.click("pause")
    visitor.wait_for("Paused")
    learning, plain = (float(text) for text in visitor.page.locator("#numbers dd").all_inner_texts()[:2])
    assert learning < plain

    visitor.page.locator("#length input[type=number]").fill("16")
    assert visitor.ask("where does the water go?")
    visitor.save(tmp_path / "saved.zip")
    saved = visitor.tokens
    visitor.click("forget")
    visitor.wait_for("All is forgotten")
    assert visitor.tokens == 0
    visitor.give(tmp_path / "saved.zip")
    visitor.click("load")
    visitor.wait_for("tokens were read")
    assert visitor.tokens == saved
    hosts = {urlparse(url).hostname for url in visitor.asked if not url.startswith(("data:", "blob:"))}
    assert hosts == {"127.0.0.1"}  # nothing comes from elsewhere


@pytest.mark.slow
def test_a_broken_file_is_a_sentence_and_the_page_goes_on(visit, tmp_path):
    visitor = visit()
    visitor.read(BOOK)
    before = visitor.tokens
    broken = tmp_path / "broken.zip"
    broken.write_bytes(b"PK\x03\x04 once upon a time")
    visitor.give(broken)
    visitor.click("load")
    said = visitor.wait_for("is no learned context")
    assert "choose a file that this page has saved" in said
    assert visitor.page.get_attribute("#said p", "role") == "alert"
    visitor.read(BOOK)
    assert visitor.tokens == 2 * before


@pytest.mark.slow
def test_a_context_of_another_model_says_what_to_do(visit, tmp_path):
    visitor = visit()
    visitor.read(BOOK)
    visitor.save(tmp_path / "saved.zip")
    visitor.page.click("#model input")
    visitor.page.get_by_role("option", name="other").click()
    visitor.wait_for("It has read nothing")
    assert visitor.tokens == 0
    visitor.give(tmp_path / "saved.zip")
    visitor.click("load")
    assert "Choose the model that has read it" in visitor.wait_for("read with other weights")


@pytest.mark.slow
def test_two_visitors_do_not_mix(visit, tmp_path):
    one, other = visit(), visit()
    one.paste(BOOK * 40)
    other.paste(BOOK[::-1] * 30)
    one.click("read")
    other.click("read")
    one.wait_for("is read")
    other.wait_for("is read")
    assert one.tokens != other.tokens
    one.save(tmp_path / "one.zip")
    other.save(tmp_path / "other.zip")
    alone = visit()
    alone.read(BOOK * 40)
    alone.save(tmp_path / "alone.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "alone.zip").read_bytes()
    alone.give(tmp_path / "other.zip")
    alone.click("compare")
    alone.page.wait_for_selector("#comparison table")
    assert f"{other.tokens:,}" in alone.page.inner_text("#comparison")


@pytest.mark.slow
def test_ten_megabytes_can_be_pasted(visit):
    visitor = visit(permissions=["clipboard-read", "clipboard-write"])
    page = visitor.page
    page.set_default_timeout(4 * PATIENCE)
    text = "".join(f"{number:079d}\n" for number in range(2**17))
    page.evaluate("text => navigator.clipboard.writeText(text)", text)
    page.focus("#text textarea")
    page.keyboard.press("Control+V")
    assert page.evaluate("document.querySelector('#text textarea').value.length") == len(text) == 10 * 2**20
    visitor.click("read")
    visitor.wait_for_points(1)
    visitor.click("pause")
    assert re.search(r"of \d+,\d{3},\d{3} tokens", visitor.wait_for("Paused"))
    visitor.click("forget")
    visitor.wait_for("All is forgotten")
    too_long = {"name": "long.txt", "mimeType": "text/plain", "buffer": b"x" * (16 * 2**20 + 1)}
    page.set_input_files("#file input[type=file]", too_long)
    page.wait_for_selector("#file >> text=long")
    visitor.click("read")
    visitor.wait_for("16,777,217 characters, but 16,777,216 are read here at most")


@pytest.mark.slow
def test_reloading_in_mid_reading_begins_anew_and_ends_the_reading(visit, served):
    sessions = served[1]
    visitor = visit()
    visitor.paste(ENDLESS)
    visitor.click("read")
    visitor.wait_for_points(0)
    [left] = [session for session in sessions.all() if session.progress().is_reading]
    visitor.page.reload()
    visitor.page.wait_for_selector("#read")
    assert visitor.tokens == 0
    assert until(lambda: left.is_closed)
    assert until(lambda: left not in sessions.all())
    stopped = left.context.tokens
    visitor.read(BOOK)
    assert left.context.tokens == stopped  # nobody reads on for a visitor who has left


@pytest.mark.slow
def test_a_phone_in_the_dark_and_the_keyboard_alone(visit):
    visitor = visit(viewport={"width": 360, "height": 740}, color_scheme="dark")
    page = visitor.page
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(int(part) for part in background.strip("rgba()").split(",")[:3]) < 60
    page.focus("#text textarea")
    page.keyboard.insert_text(BOOK)
    page.keyboard.press("Shift+Enter")
    visitor.wait_for("is read")
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "forget":
            break
    page.keyboard.press("Enter")
    visitor.wait_for("All is forgotten")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
