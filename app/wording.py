"""What the page says: numbers and sentences as HTML. Texts of visitors and of files are escaped."""

from html import escape

from ..serving import StoredContext
from .chart import short_number
from .comparison import Comparison
from .session import Progress


def sentence(text: str = "", is_error: bool = False) -> str:
    """A line below the controls, which screen readers say; errors at once."""
    role, kind = ("alert", "error") if is_error else ("status", "said")
    return f'<p role="{role}" class="{kind}">{escape(text)}</p>'


def where_it_stands(progress: Progress, paused: bool) -> str:
    """Which document is at which token, as a sentence."""
    if not progress.length:
        tokens = f"{progress.tokens:,} tokens are in the learned context." if progress.tokens else ""
        return sentence(tokens or "Nothing has been read yet.")
    if not progress.is_reading:
        return sentence(f"{progress.name} is read: {progress.length:,} tokens. Read another one, or ask.")
    doing = "Paused" if paused else "Reading"
    return sentence(f"{doing}: {progress.name}, {progress.read:,} of {progress.length:,} tokens.")


def numbers(progress: Progress) -> str:
    """The numbers beside the curves."""
    learning, plain = progress.learning.mean, progress.plain.mean
    below = f"{learning - plain:+.3f}" if learning is not None and plain is not None else ""
    entries = (
        ("Mean loss, learning", _loss(learning), below and f"{below} against not learning", "accent"),
        ("Mean loss, not learning", _loss(plain), "the same text, no inner steps", ""),
        ("Tokens read", f"{progress.tokens:,}", "", ""),
        ("Tokens a second", _speed(progress.speed), f"{_speed(progress.plain_speed)} not learning", ""),
        ("Kept", _bytes(progress.kept), "stays the same, however long the text", "accent"),
        ("Full attention would keep", _bytes(progress.full), "keys and values of every token", ""),
    )
    cells = "".join(
        f'<div class="{kind}"><dt>{name}</dt><dd>{value}</dd><small>{note}</small></div>'
        for name, value, note, kind in entries
    )
    return f'<dl class="numbers" data-tokens="{progress.tokens}" data-kept="{progress.kept}">{cells}</dl>'


def comparison_table(own: StoredContext, name: str, other: StoredContext, found: Comparison) -> str:
    """Two contexts side by side.

    Args:
        own: what was read here; name: of the file with the other one.
    """
    rows = [
        ("Tokens", f"{own.tokens:,}", f"{other.tokens:,}"),
        ("Read", _documents(own), _documents(other)),
        ("Bytes", _bytes(own.cache.nbytes), _bytes(other.cache.nbytes)),
        ("Distance from the model's weights", *(f"{length:.3g}" for length in found.lengths)),
    ]
    note = ""
    if found.losses is not None:
        nothing, *losses = found.losses
        rows.append((f"Loss of the passage ({found.passage_tokens:,} tokens)", *map(_loss, losses)))
        note = f"After nothing at all, the loss of the passage is {nothing:.3f}. "
    if found.cosine is not None:
        note += f"The cosine between what the two have learned is {found.cosine:.3f} (1: the same direction)."
    body = "".join(f'<tr><th scope="row">{title}</th><td>{a}</td><td>{b}</td></tr>' for title, a, b in rows)
    head = f'<tr><td></td><th scope="col">Here</th><th scope="col">{escape(name)}</th></tr>'
    return f'<table class="comparison"><thead>{head}</thead><tbody>{body}</tbody></table><p class="said">{note}</p>'


def _documents(context: StoredContext) -> str:
    found = [f"{escape(one.name[:80])} ({short_number(one.tokens)})" for one in context.documents[-8:]]
    more = len(context.documents) - len(found)
    return ", ".join([*([f"{more} before"] if more else []), *found]) or "unknown"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _speed(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _bytes(count: int) -> str:
    if count >= 2**30:
        return f"{count / 2**30:.1f} GiB"
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"
