"""The suffix as a function: from the hidden states that enter the inner loop to hidden states and logits.

The inner loop begins after the attention of the first suffix block, the last place that no fast weight reaches:

    for block k of the suffix:   x += attention_k(x) (k > 0);   x += prime_mlp_k(x; W + dW_k);   x += mlp_k(x)
    logits = head(norm(x))
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from .attention import AttentionInputs, attention_mask, valid_columns
from .fast_weights import FastWeights, linear
from .inner_loop import MiniBatch, StepOutput
from .layers import TTTE2ESuffixLayer

Histories = tuple[tuple[tuple[torch.Tensor, torch.Tensor], ...], ...]


@dataclass(frozen=True)
class Suffix:
    """What an inner step evaluates; see `inner_loop.inner_step`.

    Attributes:
        layers: the suffix blocks.
        norm, head: final norm and language-model head.
        implementation: attention implementation of the inner attention layers (the second and later blocks).
        mini_batch_size: tokens of a mini-batch.
        tokens_before: tokens that precede the first mini-batch, per row.
        forget: drop chunks of keys that the next mini-batch cannot see.
        want_hidden, want_layers, want_attentions: what to return.
        masks: those already made, by window, history columns and tokens.
    """

    layers: Sequence[TTTE2ESuffixLayer]
    norm: nn.Module
    head: nn.Module
    implementation: str
    mini_batch_size: int
    tokens_before: tuple[int, ...]
    forget: bool
    want_hidden: bool
    want_layers: bool
    want_attentions: bool
    masks: dict[tuple, torch.Tensor | None] = field(default_factory=dict)

    def parameters(self) -> list[torch.Tensor]:
        """Every parameter that takes a gradient, once."""
        modules = [*self.layers, self.norm, self.head]
        found = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
        return list(found.values())

    def __call__(
        self, batch: MiniBatch, fast: FastWeights | None, histories: Histories, with_logits: bool
    ) -> tuple[StepOutput, Histories, torch.Tensor | None]:
        """Evaluate one mini-batch under `fast`.

        Returns:
            The outputs without losses, the histories with this mini-batch's keys and values, and the logits [B, T, V].
        """
        x = batch.inputs
        outputs, attentions, new_histories = [], [], []
        for index, layer in enumerate(self.layers):
            deltas = None if fast is None else fast.of_layer(index)
            if index == 0:
                x, _, _ = layer(x, None, None, deltas, part="feed_forward")
            else:
                chunks = histories[index - 1]
                sliding_window = layer.self_attn.sliding_window
                history = join(chunks, None if sliding_window is None else sliding_window - 1)
                mask = self._mask(batch, sliding_window, history)
                attention = AttentionInputs(
                    batch.position_embeddings, {layer.self_attn.layer_type: mask}, self.implementation
                )
                x, new, weights = layer(x, attention, history, deltas)
                new_histories.append(self._remember(chunks, new, sliding_window))
                attentions.append(weights)
            outputs.append(x)
        hidden = self.norm(x) if self.want_hidden or self.want_layers or with_logits else None
        output = StepOutput(
            hidden=hidden if self.want_hidden else None,
            label_nll=None,
            inner_loss=None,
            inner_grad_norm=None,
            layers=(*outputs[:-1], hidden) if self.want_layers else (),
            attentions=tuple(attentions) if self.want_attentions else (),
        )
        return output, tuple(new_histories), linear(self.head, hidden) if with_logits else None

    def _mask(self, batch: MiniBatch, sliding_window: int | None, history) -> torch.Tensor | None:
        rows, tokens = batch.inputs.shape[:2]
        columns = 0 if history is None else history[0].shape[2]
        device = batch.inputs.device
        # Columns of this call hold real tokens wherever a real query sees them; only those before it can lack some.
        columns_before = columns - batch.index * self.mini_batch_size
        valid = valid_columns(self.tokens_before, columns_before, device) if columns_before > 0 else None
        if valid is not None:
            valid = torch.cat([valid, valid.new_ones(rows, columns - columns_before)], dim=1)
            return attention_mask(self.implementation, sliding_window, columns, tokens, rows, valid, device)
        key = (sliding_window, columns, tokens)
        if key not in self.masks:
            self.masks[key] = attention_mask(self.implementation, sliding_window, columns, tokens, rows, None, device)
        return self.masks[key]

    def _remember(self, chunks, new, sliding_window: int | None):
        chunks = (*chunks, new)
        if not self.forget or sliding_window is None:
            return chunks
        columns = sum(keys.shape[2] for keys, _ in chunks)
        while chunks and columns - chunks[0][0].shape[2] >= sliding_window - 1:
            columns -= chunks[0][0].shape[2]
            chunks = chunks[1:]
        return chunks


def join(chunks: Sequence[tuple[torch.Tensor, torch.Tensor]], length: int | None):
    """Chunks of keys and values as one pair, cut to the last `length` columns (None: all); None for no chunk."""
    if not chunks:
        return None
    if length is not None:
        # Whole chunks beyond the window go first; then at most one is cut, before joining, which copies less.
        surplus = sum(keys.shape[2] for keys, _ in chunks) - length
        while surplus > 0 and chunks[0][0].shape[2] <= surplus:
            surplus -= chunks[0][0].shape[2]
            chunks = chunks[1:]
        if not chunks:
            return None
        if surplus > 0:
            chunks = (tuple(states[:, :, surplus:] for states in chunks[0]), *chunks[1:])
    return tuple(torch.cat(states, dim=2) if len(states) > 1 else states[0] for states in zip(*chunks, strict=True))
