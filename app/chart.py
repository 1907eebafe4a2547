"""The picture of two loss curves, as HTML with a drawing in it.

Lines stretch with the page and labels do not, so that both can be read on a phone; colours are those of the page.
"""

import math
from collections.abc import Sequence
from html import escape

from .session import Progress

SHORTEST_AXIS = 1024  # tokens
Points = Sequence[tuple[float, float]]


def draw_curves(progress: Progress) -> str:
    """Loss by position with learning and without.

    Args:
        progress: of a session; the axis grows with what was read, up to the end of the document at hand.
    """
    learning, plain = progress.learning.points(), progress.plain.points()
    first = progress.learning.start
    last = first + _axis_length(progress)
    values = [loss for _, loss in (*learning, *plain)]
    low, high, loss_ticks = ticks(min(values), max(values), 4) if values else (0.0, 4.0, [0.0, 1.0, 2.0, 3.0, 4.0])
    _, _, position_ticks = ticks(first, last, 4)

    def across(position: float) -> float:
        return 100 * (position - first) / (last - first)

    def down(loss: float) -> float:
        return 100 * (high - loss) / (high - low)

    def line(points: Points, kind: str) -> str:
        path = " ".join(f"{across(x):.2f},{down(y):.2f}" for x, y in points)
        return f'<polyline class="{kind}" points="{path}"/>'

    rules = "".join(f'<line x1="0" x2="100" y1="{down(y):.2f}" y2="{down(y):.2f}"/>' for y in loss_ticks)
    losses = "".join(f'<span style="top:{down(y):.2f}%">{y:g}</span>' for y in loss_ticks)
    positions = "".join(
        f'<span style="left:{across(x):.2f}%">{short_number(x)}</span>' for x in position_ticks if first <= x <= last
    )
    return (
        f'<figure class="curves" role="img" aria-label="{escape(_spoken(progress))}" data-points="{len(learning)}">'
        '<figcaption><b>Loss by position</b> nats per token<span class="keys">'
        '<i class="learning"></i>learning<i class="plain"></i>not learning</span></figcaption>'
        f'<div class="plot"><div class="losses">{losses}</div>'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{rules}'
        f"{line(plain, 'plain')}{line(learning, 'learning')}</svg>"
        f'<div class="positions">{positions}</div></div></figure>'
    )


def ticks(low: float, high: float, count: int) -> tuple[float, float, list[float]]:
    """Round numbers over a range, and the range that they span.

    Args:
        low, high: the range; count: of steps, about.
    """
    width = (high - low) / count or 1.0
    power = 10.0 ** math.floor(math.log10(width))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= width * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    marks = [round(step * number, 10) for number in range(first, last + 1)]
    return marks[0], marks[-1], marks


def short_number(number: float) -> str:
    """A count in few letters: 950, 1.5K, 12K, 3M."""
    for size, letter in ((1e6, "M"), (1e3, "K")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def _axis_length(progress: Progress) -> int:
    """Tokens that the axis spans: a power of two, so that a curve grows for a while before it is drawn anew."""
    done = progress.learning.length
    return min(max(SHORTEST_AXIS, 1 << (done - 1).bit_length()), max(done + progress.length - progress.read, 1))


def _spoken(progress: Progress) -> str:
    if progress.learning.mean is None:
        return "No loss yet: nothing has been read"
    return (
        f"Mean loss over {progress.learning.count} tokens: {progress.learning.mean:.3f} nats per token with learning, "
        f"{progress.plain.mean:.3f} without"
    )
