"""Reading: one segment of text and a learned context in, outputs and the next learned context out.

    prefix blocks and the attention of the first suffix block   over the whole segment at once
    learning off: the rest of the suffix                        over the whole segment, fast weights as they are
    learning on: the rest of the suffix                         mini-batch by mini-batch (`learner`)

Axis letters: B batch rows, T tokens of the segment (aligned left; a row's unused columns stand on the right),
D hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from .attention import AttentionInputs, attention_mask, block_masks, valid_columns
from .context import LearnedContext, take_last
from .inner_loop import UpdateRule, log_likelihood_loss, widened
from .layers import KeysValues

# A text of more windows than this is read block by block, so that no mask or score grows with its square.
BLOCKS_FROM_WINDOWS = 4


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of every row.

    Attributes:
        ids: [B, T], or None when only embeddings are known.
        embeddings: [B, T, D], or None to embed the ids.
        counts: real tokens per row.
        position_ids: [1 or B, T].
        next_ids: per row the id that follows its last token here, -1 when unknown.
        labels: [B, T] what each position predicts in the outer loss, or None.
        learning: take inner steps.
        needs_context: the learned context after this segment will be used.
    """

    ids: torch.Tensor | None
    embeddings: torch.Tensor | None
    counts: tuple[int, ...]
    position_ids: torch.Tensor
    next_ids: tuple[int, ...]
    labels: torch.Tensor | None
    learning: bool
    needs_context: bool

    @property
    def length(self) -> int:
        return self.position_ids.shape[1]


@dataclass
class SegmentOutput:
    """Attributes:
    hidden: [B, T, D] after the final norm, or None.
    label_nll: [B, T], or None without labels.
    layers: hidden states before the first block, after every block but the last, and after the final norm, each as
        consecutive chunks [B, t, D], when asked for.
    attentions: per block a list of (weights [B, heads, queries, keys], first query's column per row), when asked for.
    inner: in order of time (rows, inner loss [rows], inner gradient norm [rows]).
    """

    hidden: torch.Tensor | None = None
    label_nll: torch.Tensor | None = None
    layers: list[list[torch.Tensor]] = field(default_factory=list)
    attentions: list[list[tuple[torch.Tensor, tuple[int, ...]]]] = field(default_factory=list)
    inner: list[tuple[tuple[int, ...], torch.Tensor, torch.Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class Wanted:
    """What a call asks for, beyond the learned context."""

    hidden: bool
    layers: bool
    attentions: bool


@dataclass(frozen=True)
class Reader:
    """The decoder as a function of learned contexts.

    Attributes:
        model: the [`TTTE2EModel`] whose modules compute.
        rule: the inner loop's update rule.
        implementation: attention implementation.
        inner_implementation: that of suffix blocks inside inner steps.
        checkpointing: recompute activations in the backward pass.
        wanted: optional outputs.
    """

    model: torch.nn.Module
    rule: UpdateRule
    implementation: str
    inner_implementation: str
    checkpointing: bool
    wanted: Wanted

    @property
    def config(self):
        return self.model.config

    def read_prefix(
        self, context: LearnedContext, segment: Segment, output: SegmentOutput
    ) -> tuple[LearnedContext, torch.Tensor]:
        """The blocks that run over the whole segment at once: all of them, or when learning those that no fast weight
        reaches, the last of them with its attention only.

        Returns:
            The context with the new keys and values of these blocks, and the hidden states [B, T, D] after them.
        """
        x = segment.embeddings if segment.embeddings is not None else self.model.embed_tokens(segment.ids)
        attention = self.attention_inputs(context, segment.position_ids, segment.length, layer=0)
        histories = list(context.histories)
        first_suffix = self.config.num_prefix_layers
        last = first_suffix if segment.learning else self.config.num_hidden_layers - 1
        self._note_layer(output, x)
        for index, layer in enumerate(self.model.layers[: last + 1]):
            history = histories[index]
            if index < first_suffix:
                x, new, weights = layer(x, attention, history)
            else:
                deltas = None if context.fast is None else context.fast.of_layer(index - first_suffix)
                part = "attention" if segment.learning else "whole"
                x, new, weights = self.run_suffix_layer(layer, x, attention, history, deltas, part=part)
            if self.wanted.attentions:
                output.attentions[index].append((weights, (0,) * context.rows))
            if segment.needs_context:
                histories[index] = self.extend(history, new, segment.counts, self.window_before(index))
            if index < first_suffix or not segment.learning:
                self._note_layer(output, x)
        return replace(context, histories=tuple(histories)), x

    def attention_inputs(
        self, context: LearnedContext, position_ids: torch.Tensor, length: int, layer: int
    ) -> AttentionInputs:
        """Angles and masks for `length` new tokens; history columns as in block `layer` and others of its kind."""
        device = position_ids.device
        masks = {}
        for index in range(layer, len(self.model.layers) if self.config.use_attention else 0):
            layer_type = self.config.layer_types[index]
            if layer_type in masks:
                continue
            history = context.histories[index]
            columns = 0 if history is None else history[0].shape[2]
            window = self.config.sliding_window if layer_type == "sliding_attention" else None
            valid = valid_columns(context.tokens, columns, device)
            in_blocks = window is not None and length > BLOCKS_FROM_WINDOWS * window and not self.wanted.attentions
            if "flash" in self.implementation:
                in_blocks = False  # needs no mask and no scores at any length
            make_masks = block_masks if in_blocks else attention_mask
            masks[layer_type] = make_masks(self.implementation, window, columns, length, context.rows, valid, device)
        return AttentionInputs(self.model.rotary_emb(position_ids, self.model.dtype), masks, self.implementation)

    def extend(
        self, history: KeysValues | None, new: KeysValues, counts: Sequence[int], keep: int | None
    ) -> KeysValues:
        """History with the new keys and values, aligned right, at most `keep` columns (None: all)."""
        columns = 0 if history is None else history[0].shape[2]
        ends = [columns + count for count in counts]
        keep = max(ends) if keep is None else keep
        joined = new if history is None else tuple(torch.cat(pair, dim=2) for pair in zip(history, new, strict=True))
        return tuple(take_last(states, ends, keep) for states in joined)

    def window_before(self, index: int) -> int | None:
        """Columns that the first of some new queries of block `index` sees before itself; None: all."""
        sliding = self.config.layer_types[index] == "sliding_attention"
        return self.config.sliding_window - 1 if sliding else None

    def drop_pending(self, context: LearnedContext) -> LearnedContext:
        """Forget the pending mini-batch, and the keys that were kept only to learn from it."""
        if context.pending is None:
            return context
        histories = []
        for index, history in enumerate(context.histories):
            keep = self.window_before(index)
            ends = [history[0].shape[2]] * context.rows
            histories.append(history if keep is None else tuple(take_last(s, ends, keep) for s in history))
        return replace(context, pending=None, histories=tuple(histories))

    def finish(self, output: SegmentOutput, x: torch.Tensor, labels: torch.Tensor | None) -> None:
        """Final norm, and the outer loss without ever holding the logits of more than a mini-batch."""
        hidden = self.model.norm(x)
        output.hidden = hidden if self.wanted.hidden else None
        if self.wanted.layers:
            output.layers[-1] = [hidden]
        if labels is None:
            return

        def nll(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            logits, normalizer = widened(self.model.lm_head(hidden))
            return log_likelihood_loss(logits, labels, normalizer)

        if torch.is_grad_enabled() and self.checkpointing:
            nll = partial(checkpoint, nll, use_reentrant=False)
        size = self.config.mini_batch_size
        output.label_nll = torch.cat(
            [nll(h, own) for h, own in zip(hidden.split(size, dim=1), labels.split(size, dim=1), strict=True)], dim=1
        )

    def run_suffix_layer(self, layer, *args, **kwargs):
        """A suffix block outside inner steps, checkpointed as prefix blocks are."""
        if self.checkpointing and torch.is_grad_enabled():
            return self.model._gradient_checkpointing_func(partial(layer, **kwargs), *args)
        return layer(*args, **kwargs)

    def _note_layer(self, output: SegmentOutput, x: torch.Tensor) -> None:
        if self.wanted.layers:
            output.layers.append([x])
