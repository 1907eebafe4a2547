"""The example by hand, with what the tests look at besides."""

import runpy
from pathlib import Path

import torch

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "by_hand.py"))


class ReadingByHand(EXAMPLE["ReadingByHand"]):
    """One sequence, read token by token."""

    def __init__(self, model):
        super().__init__(model)
        self._initial = [weight.detach().clone() for weight in self.weights]

    @property
    def fast_weights(self) -> list[torch.Tensor]:
        """What was learned, as differences of gate, up and down of each suffix block."""
        return [new.detach() - old for new, old in zip(self.weights, self._initial, strict=True)]

    def write(self, prompt: list[int], steps: int, learn: tuple[bool, bool] = (True, True)) -> list[int]:
        """Read a prompt and continue it greedily, never with padding.

        Args:
            learn: whether the prompt, and whether the own text, is learned.
        """
        written = []
        for token in prompt:
            logits = self.read(token, learn[0])
        for _ in range(steps):
            logits[self.config.pad_token_id] = -torch.inf
            written.append(int(logits.argmax()))
            logits = self.read(written[-1], learn[1])
        return written

    def restart(self) -> None:
        """Begin a new mini-batch with the next token."""
        self.pending = []
