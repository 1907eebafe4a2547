"""The page on an address of this machine."""

import logging
import os
from collections.abc import Collection
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware

from ..serving.doors import HostCheck, bound_socket

CSS = Path(__file__).with_name("page.css")
LARGEST_FILE = 512 * 2**20  # bytes of an upload
EVERY_ADDRESS = ("0.0.0.0", "::")
# Fonts that every machine has: nothing is fetched from elsewhere.
SANS = ("system-ui", "sans-serif")
MONO = ("ui-monospace", "monospace")


def look() -> dict:
    """The page's looks, as arguments of Gradio's `launch`."""
    theme = gr.themes.Base(
        primary_hue="indigo", neutral_hue="gray", radius_size="sm", spacing_size="sm", font=SANS, font_mono=MONO
    ).set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_large_text_weight="500",
        slider_color="*primary_600",
        checkbox_background_color_selected="*primary_600",
    )
    return {"theme": theme, "css_paths": [CSS], "footer_links": []}


def launch_page(
    page: gr.Blocks, host: str = "127.0.0.1", port: int = 7860, allowed_hosts: Collection[str] = (), wait: bool = True
) -> str:
    """Serve a page until Ctrl-C, or from a thread of its own.

    Args:
        page: of `build_page`.
        host: address to listen on; port: 0 takes a free one.
        allowed_hosts: names by which visitors may call the page, besides localhost and the host.
        wait: return only at the end.

    Returns:
        The page's address.

    Raises:
        OSError: the port is in use, or the host is none of this machine's.
    """
    port = free_port(host, port)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio calls itself
    check = Middleware(HostCheck, names=[host, *allowed_hosts], any_address=host in EVERY_ADDRESS)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=not wait,
        quiet=True,
        share=False,
        ssr_mode=False,
        strict_cors=True,
        max_file_size=LARGEST_FILE,
        app_kwargs={"middleware": [check]},
        **look(),
    )
    return address


def free_port(host: str, port: int) -> int:
    """A port on which nobody listens: the one that is asked for, or for 0 any.

    Raises:
        OSError: somebody does, or the host is none of this machine's.
    """
    with bound_socket(host, port) as listening:
        return listening.getsockname()[1]
