"""Pictures of the page, taken in chromium: one on a wide screen in the light, one on a phone in the dark.

    python tools/page_pictures.py docs [--model FOLDER] [--tokens 20000]

The model reads the first text that is there, until so many tokens, and writes on a little.
"""

import argparse
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from ttt_e2e.app import shipped_models
from ttt_e2e.app.launch import launch_page
from ttt_e2e.app.page import build_page

PICTURES = {
    "app.png": {"top": "body", "viewport": {"width": 1000, "height": 1160}, "color_scheme": "light"},
    "app-phone.png": {
        "top": "#read",
        "viewport": {"width": 390, "height": 844},
        "color_scheme": "dark",
        "is_mobile": True,
    },
}
COLOURS = 128  # of a picture: text and two lines need no more
PATIENCE = 1_800_000  # milliseconds


def take(browser: Browser, address: str, path: Path, tokens: int, top: str, **context) -> None:
    """Let a new visitor read, and take a picture.

    Args:
        path: of the picture; tokens: after which reading is paused; top: what the picture begins with; context: of the
            browser.
    """
    page = browser.new_context(**context).new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.click(".there >> nth=0")
    page.wait_for_function(f"Number(document.querySelector('#numbers dl').dataset.tokens) >= {tokens}")
    page.click("#pause")
    page.wait_for_selector("#said >> text=Paused")
    page.evaluate("top => { document.activeElement.blur(); document.querySelector(top).scrollIntoView() }", top)
    page.screenshot(path=path)
    page.context.close()
    Image.open(path).convert("RGB").quantize(COLOURS).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", action="append", default=[], help="as of `ttt-e2e app`")
    parser.add_argument("--tokens", type=int, default=7_800)
    asked = parser.parse_args()
    page = build_page(shipped_models(asked.model))
    address = launch_page(page, port=0, wait=False)
    with sync_playwright() as playwright:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for name, context in PICTURES.items():
            take(browser, address, asked.folder / name, asked.tokens, **context)
    page.close(verbose=False)


if __name__ == "__main__":
    main()
