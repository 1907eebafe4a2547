"""The page: a model that learns while it reads, in a browser.

What a visitor does is in `session` and the files it imports, which know nothing of browsers; `page` shows it with
Gradio. `page` and `launch` are imported by their own names, because they need the package of the extra `app`.
"""

from .archive import pack_context, unpack_context
from .comparison import Comparison, compare_contexts
from .loss_curve import LossCurve
from .model_queue import ModelQueue
from .model_shelf import ModelShelf, shipped_models
from .session import Limits, Progress, Session
from .sessions import Sessions

__all__ = [
    "Comparison",
    "Limits",
    "LossCurve",
    "ModelQueue",
    "ModelShelf",
    "Progress",
    "Session",
    "Sessions",
    "compare_contexts",
    "pack_context",
    "shipped_models",
    "unpack_context",
]
