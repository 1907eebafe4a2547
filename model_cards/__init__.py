"""Model cards: a template, and the function that fills it with measured numbers."""

from .card import write_model_card

__all__ = ["write_model_card"]
