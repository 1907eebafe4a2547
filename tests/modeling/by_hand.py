"""Test-time training in its plainest form, to compare with: one row, one token at a time, ordinary autograd.

Only the plain model is called (`test_time_training=False`); what is learned is written into the weights of its copy.
"""

import copy

import torch

from ttt_e2e import TTTE2ECache


class ReadingByHand:
    """One sequence, read token by token.

    Args:
        model: left as it is; a copy of it learns.

    Attributes:
        steps: inner steps taken.
    """

    def __init__(self, model):
        self.model = copy.deepcopy(model)
        self.config = model.config
        self.cache = TTTE2ECache(model.config)
        self.steps = 0
        self.restart()
        suffix = self.model.model.layers[self.config.num_prefix_layers :]
        self._weights = [p for layer in suffix for p in layer.inner_mlp.parameters()]
        self._initial = [p.detach().clone() for p in self._weights]

    @property
    def fast_weights(self) -> list[torch.Tensor]:
        """What was learned, as differences of gate, up and down of each suffix block."""
        return [new.detach() - old for new, old in zip(self._weights, self._initial, strict=True)]

    def read(self, token: int, learning: bool = True) -> torch.Tensor:
        """The logits [vocab_size] after one more token."""
        if learning and len(self._waiting) == self.config.mini_batch_size:
            self._learn(token)
        if not learning or len(self._waiting) == self.config.mini_batch_size:
            self.restart()
        if not self._waiting:
            self._before = self.cache.fork()
        with torch.no_grad():
            ids = torch.tensor([[token]])
            output = self.model(ids, cache=self.cache, test_time_training=False)
        if learning:
            self._waiting.append(token)
        return output.logits[0, -1]

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
        self._waiting = []

    def _learn(self, following: int) -> None:
        ids = torch.tensor([self._waiting])
        targets = torch.tensor([*self._waiting[1:], following])
        with torch.enable_grad():
            cache = self._before.fork()
            logits = self.model(ids, cache=cache, use_cache=False, test_time_training=False).logits[0]
            nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            wanted = targets != self.config.bos_token_id
            loss = (nll * wanted).sum() / wanted.sum().clamp_min(1)
            gradients = torch.autograd.grad(loss, self._weights)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        factor = min(1.0, self.config.inner_max_grad_norm / float(norm)) if self.config.inner_max_grad_norm else 1.0
        with torch.no_grad():
            for weight, gradient in zip(self._weights, gradients, strict=True):
                weight -= self.config.inner_learning_rate * factor * gradient
        self.steps += 1
