"""Test-time training in its plainest form: one text, one token at a time, ordinary autograd.

    python examples/by_hand.py [TEXT]      the shipped small model reads a text with learning on, then with learning off

Only the plain model is called (`test_time_training=False`); what is learned is written into the weights of its copy.
What `TTTE2EForCausalLM` computes for whole batches is compared with this in the tests.
"""

import copy
import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from ttt_e2e import TTTE2ECache, TTTE2EForCausalLM

MODEL = Path(__file__).parents[1] / "model_cards" / "checkpoints" / "tiny-standard-library"


# --8<-- [start:method]
class ReadingByHand:
    """One sequence, read token by token by a copy of `model`, whose prime MLPs learn; `steps` counts inner steps."""

    def __init__(self, model: TTTE2EForCausalLM):
        self.model, self.config, self.cache = copy.deepcopy(model), model.config, TTTE2ECache(model.config)
        suffix = self.model.model.layers[self.config.num_prefix_layers :]
        self.weights = [layer.weight for block in suffix for layer in block.inner_mlp.projections]
        self.pending, self.steps = [], 0  # the mini-batch so far

    def read(self, token: int, learning: bool = True) -> torch.Tensor:
        """The logits [vocab_size] after one more token."""
        if learning and len(self.pending) == self.config.mini_batch_size:
            self.learn(following=token)  # a full mini-batch waits for the target of its last token
        if not learning or len(self.pending) == self.config.mini_batch_size:
            self.pending = []
        if not self.pending:
            self.before = self.cache.fork()  # keys and values before the mini-batch are constants for its gradient
        with torch.no_grad():
            logits = self.model(torch.tensor([[token]]), cache=self.cache, test_time_training=False).logits[0, -1]
        if learning:
            self.pending.append(token)
        return logits

    @torch.enable_grad()
    def learn(self, following: int) -> None:
        """W <- W - learning rate * clip(gradient of the next-token loss on the mini-batch)."""
        ids, targets = torch.tensor([self.pending]), torch.tensor([*self.pending[1:], following])
        logits = self.model(ids, cache=self.before.fork(), use_cache=False, test_time_training=False).logits[0]
        predicted = targets != self.config.bos_token_id  # nothing predicts the beginning of a text
        nll = cross_entropy(logits, targets, reduction="none")
        loss = (nll * predicted).sum() / predicted.sum().clamp_min(1)
        gradients = torch.autograd.grad(loss, self.weights)
        norm, limit = torch.stack([gradient.norm() for gradient in gradients]).norm(), self.config.inner_max_grad_norm
        clip = min(1.0, limit / float(norm)) if limit else 1.0
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.data -= self.config.inner_learning_rate * clip * gradient
        self.steps += 1


# --8<-- [end:method]
def main() -> None:
    text = Path(sys.argv[1] if len(sys.argv) > 1 else copy.__file__).read_text(encoding="utf-8")
    model = TTTE2EForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(MODEL)(text).input_ids[:1025]
    for learning in (True, False):
        reading = ReadingByHand(model)
        logits = torch.stack([reading.read(token, learning) for token in ids[:-1]])
        halves = cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").split(512)
        means = ", ".join(f"{half.mean():.3f}" for half in halves)
        print(f"learning {'on ' if learning else 'off'}: loss by 512 tokens {means}; {reading.steps} inner steps")


if __name__ == "__main__":
    main()
