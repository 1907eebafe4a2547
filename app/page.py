"""The page as a Gradio app: its parts, and which event goes to which handler."""

from dataclasses import dataclass, fields
from typing import Any

import gradio as gr

from .chart import draw_curves
from .handlers import ASK, CONTINUE, Handlers
from .model_queue import ModelQueue
from .model_shelf import ModelShelf
from .session import Limits, Session
from .sessions import Sessions
from .texts import texts_there
from .wording import numbers, sentence

TITLE = "A model that keeps learning while it reads"
ABOUT = (
    f"# {TITLE}\n"
    "Give it a long text. It reads with a short window and trains a few of its own layers on what it reads, so that "
    "the loss falls and what it keeps stays the same size. The learned context is yours alone, and gone when you leave."
)
AT_ONCE = 8  # readings and answers that share the model; more wait in Gradio's queue
WAITING = 64
KEPT_FILES = (600, 3600)  # seconds: how often saved and uploaded files are looked at, and how long they stay


@dataclass(frozen=True)
class Parts:
    """What is on the page."""

    model: gr.Dropdown
    text: gr.Textbox
    file: gr.File
    read: gr.Button
    pause: gr.Button
    go_on: gr.Button
    forget: gr.Button
    said: gr.HTML
    curves: gr.HTML
    numbers: gr.HTML
    mode: gr.Radio
    learn: gr.Checkbox
    length: gr.Slider
    chat: gr.Chatbot
    message: gr.Textbox
    send: gr.Button
    stop: gr.Button
    save: gr.Button
    saved: gr.DownloadButton
    stored: gr.File
    load: gr.Button
    compare: gr.Button
    passage: gr.Textbox
    comparison: gr.HTML

    def everything(self) -> list[Any]:
        """All parts, as outputs of a handler that changes some of them."""
        return [getattr(self, field.name) for field in fields(self)]


def build_page(shelf: ModelShelf, limits: Limits | None = None, sessions: Sessions | None = None) -> gr.Blocks:
    """The page, ready for `launch_page` or `.launch()`. The first model is loaded.

    Args:
        limits: what is refused.
        sessions: where the visitors are kept.

    Raises:
        ValueError, OSError: the first model cannot be loaded.
    """
    limits, queue = limits or Limits(), ModelQueue()
    sessions = Sessions() if sessions is None else sessions
    first = Session(shelf.get(shelf.names[0]), queue, limits)
    texts = texts_there()
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=KEPT_FILES) as page:
        gr.Markdown(ABOUT)
        parts, examples = _lay_out(shelf, first, limits, list(texts))
        handlers = Handlers(shelf, queue, sessions, limits, parts)
        _connect(page, parts, handlers)
        for button, (name, text) in zip(examples, texts.items(), strict=True):
            _on(button.click, handlers.reader_of(name, text), [parts.model], parts, works=True)
    return page.queue(max_size=WAITING, default_concurrency_limit=None)


def _lay_out(shelf: ModelShelf, first: Session, limits: Limits, texts: list[str]) -> tuple[Parts, list[gr.Button]]:
    """All parts in their order on the page, and the buttons of the texts that are there."""
    parts: dict[str, Any] = {}
    parts["model"] = gr.Dropdown(shelf.names, value=shelf.names[0], label="Model", elem_id="model", filterable=False)

    gr.Markdown("## Read")
    with gr.Row():
        parts["text"] = gr.Textbox(
            label="Text",
            placeholder="Paste a long text (Shift+Enter reads it)",
            lines=5,
            max_lines=5,
            scale=3,
            elem_id="text",
        )
        parts["file"] = gr.File(
            label="or a file (UTF-8)", file_count="single", height=160, scale=2, min_width=220, elem_id="file"
        )
    with gr.Row():
        parts["read"] = gr.Button("Read", variant="primary", min_width=130, elem_id="read")
        parts["pause"] = gr.Button("Pause", interactive=False, min_width=130, elem_id="pause")
        parts["go_on"] = gr.Button("Go on", interactive=False, min_width=130, elem_id="go-on")
        parts["forget"] = gr.Button("Forget all", min_width=130, elem_id="forget")
    with gr.Row():
        examples = [
            gr.Button(f"Read {name}", size="sm", variant="secondary", min_width=160, elem_classes="there")
            for name in texts
        ]
    parts["said"] = gr.HTML(sentence("Nothing has been read yet."), elem_id="said")
    parts["curves"] = gr.HTML(draw_curves(first.progress()), elem_id="curves")
    parts["numbers"] = gr.HTML(numbers(first.progress()), elem_id="numbers")

    gr.Markdown("## Ask, or let it write on")
    parts["chat"] = gr.Chatbot(
        show_label=False, height=260, render_markdown=False, elem_id="chat", buttons=[], placeholder="No questions yet"
    )
    parts["message"] = gr.Textbox(
        label="Message", placeholder="What is it about?", lines=1, max_lines=4, elem_id="message"
    )
    with gr.Row():
        parts["mode"] = gr.Radio([ASK, CONTINUE], value=ASK, show_label=False, min_width=200, elem_id="mode")
        parts["learn"] = gr.Checkbox(True, label="Learn from what we write", min_width=200, elem_id="learn")
        parts["length"] = gr.Slider(
            16, limits.new_tokens, 256, step=16, label="Tokens at most", min_width=160, elem_id="length"
        )
    with gr.Row():
        parts["send"] = gr.Button("Send", variant="primary", min_width=90, elem_id="send")
        parts["stop"] = gr.Button("Stop", interactive=False, min_width=90, elem_id="stop")

    gr.Markdown("## Keep")
    with gr.Row():
        with gr.Column(min_width=220):
            parts["save"] = gr.Button("Save what was learned", elem_id="save")
            parts["saved"] = gr.DownloadButton("Download", visible=False, elem_id="saved")
            parts["passage"] = gr.Textbox(
                label="A passage to compare on, if you like", lines=2, max_lines=4, elem_id="passage"
            )
        with gr.Column(min_width=220):
            parts["stored"] = gr.File(label="A saved file (.zip)", file_count="single", height=130, elem_id="stored")
            with gr.Row():
                parts["load"] = gr.Button("Load it", min_width=90, elem_id="load")
                parts["compare"] = gr.Button("Compare with here", min_width=90, elem_id="compare")
    parts["comparison"] = gr.HTML(elem_id="comparison")
    return Parts(**parts), examples


def _connect(page: gr.Blocks, parts: Parts, handlers: Handlers) -> None:
    document = [parts.model, parts.text, parts.file]
    for event in (parts.read.click, parts.text.submit):
        _on(event, handlers.read, document, parts, works=True)
    _on(parts.go_on.click, handlers.go_on, [parts.model], parts, works=True)
    for button in (parts.pause, parts.stop):
        button.click(handlers.stop, None, None, queue=False, api_visibility="private", show_progress="hidden")
    _on(parts.forget.click, handlers.forget, [parts.model], parts)
    message = [parts.model, parts.message, parts.mode, parts.learn, parts.length, parts.chat]
    for event in (parts.send.click, parts.message.submit):
        _on(event, handlers.write, message, parts, works=True)
    _on(parts.save.click, handlers.save, [parts.model], parts)
    _on(parts.load.click, handlers.load, [parts.model, parts.stored], parts)
    _on(parts.compare.click, handlers.compare, [parts.model, parts.stored, parts.passage], parts)
    _on(parts.model.change, handlers.choose, [parts.model], parts)
    page.unload(handlers.leave)


def _on(event: Any, handler: Any, inputs: list, parts: Parts, works: bool = False) -> None:
    """Connect an event; those that work with the model for long share its queue."""
    limits = {"concurrency_id": "model", "concurrency_limit": AT_ONCE} if works else {"concurrency_limit": AT_ONCE}
    event(handler, inputs, parts.everything(), show_progress="hidden", api_visibility="private", **limits)
