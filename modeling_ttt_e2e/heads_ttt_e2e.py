"""Heads that judge a text instead of writing one: a label for all of it, one for each token, or the span of an answer.

The base model reads, learning on the way, as it does for the language model; its own head serves the inner loss alone.
A checkpoint of the language model loads into these classes, with nothing missing but the new head.

These are mixins: `modeling_ttt_e2e` makes models of them, so that one file of a Hub folder holds all classes.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from .cache_ttt_e2e import TTTE2ECache
from .call import check_inputs
from .causal_lm_loss import NO_TARGET, logits_nll, mean_loss, per_item
from .checks import accept_earlier_cache_names, check_extra_arguments, check_number_of_items, read_attention_mask
from .context import gather_positions
from .twice_differentiable import at_least_float32

# Arguments of the base model that mean nothing to a head.
LANGUAGE_MODELLING = ("labels", "shift_labels", "logits_to_keep")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


class SequenceClassificationHead:
    """Scores of a whole row, from its last token."""

    @accept_earlier_cache_names
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: TTTE2ECache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """As [`TTTE2EModel.forward`], with scores, and a loss of the kind that `config.problem_type` names.

        Args:
            attention_mask: also says which token is a row's last one, whatever side the padding is on; without it
                the last position is.
            labels: `single_label_classification`: [batch] ids of labels, -100 for none. `regression` and
                `multi_label_classification`: [batch, num_labels] numbers, or [batch] for a single one. Where
                `config.problem_type` is None the first call with labels sets it, as in transformers.
            use_cache: return the learned context (default: as in the base model, but not with labels).
            num_items_in_batch: what the summed loss is divided by (default: the labels of this call).

        Returns:
            `loss`, `logits` [batch, num_labels], and the base model's `cache`, `hidden_states` and `attentions`.

        Raises:
            ValueError, TypeError: an argument that cannot be read, before any work; nothing is changed.
        """
        text = (input_ids, attention_mask, position_ids, cache, inputs_embeds)
        shape, token_mask, read = checked_reading(self, text, num_items_in_batch, kwargs)
        behind = padding_behind(token_mask)
        if labels is not None:
            self.config.problem_type = problem_type(self.config, labels)
            check_sequence_labels(labels, shape[0], self.config)
            use_cache = bool(use_cache)
        outputs = read(use_cache=use_cache, logits_to_keep=1 if behind is None else int(behind.max()) + 1)
        hidden = outputs.last_hidden_state
        if behind is not None:
            hidden = gather_positions(hidden, hidden.shape[1] - 1 - behind[:, None])
        logits = self.score(hidden[:, -1])
        loss = None
        if labels is not None:
            loss = sequence_loss(logits, labels.to(logits.device), self.config.problem_type, num_items_in_batch)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class TokenClassificationHead:
    """Scores of every token."""

    @accept_earlier_cache_names
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: TTTE2ECache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """As [`TTTE2EModel.forward`], with scores.

        Args:
            cache: as in the base model. It is updated in place, which is the way to get the learned context.
            labels: [batch, length] ids of labels, -100 for none.
            num_items_in_batch: what the summed loss is divided by (default: the labels of this call).

        Returns:
            `loss` (0 when nothing is labelled), `logits` [batch, length, num_labels], and the base model's
            `hidden_states` and `attentions`.

        Raises:
            ValueError, TypeError: an argument that cannot be read, before any work; nothing is changed.
        """
        text = (input_ids, attention_mask, position_ids, cache, inputs_embeds)
        shape, token_mask, read = checked_reading(self, text, num_items_in_batch, kwargs)
        if labels is not None:
            check_label_ids(labels, shape, self.config.num_labels)
            labels = labels if token_mask is None else labels.masked_fill(~token_mask, NO_TARGET)
        outputs = read()
        logits = self.score(self.dropout(outputs.last_hidden_state))
        return TokenClassifierOutput(
            loss=None if labels is None else label_loss(logits, labels.to(logits.device), num_items_in_batch),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class QuestionAnsweringHead:
    """Scores of every position as the first and as the last one of an answer."""

    @accept_earlier_cache_names
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: TTTE2ECache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """As [`TTTE2EModel.forward`], with scores.

        Args:
            cache: as in the base model. It is updated in place, which is the way to get the learned context.
            start_positions, end_positions: [batch] positions of this call. One that lies behind them is left out, as in
                transformers.
            num_items_in_batch: what the summed losses are divided by (default: the positions that are not left out).

        Returns:
            `loss` (half that of the starts and half that of the ends), `start_logits` and `end_logits`
            [batch, length], the lowest number of their dtype at padding, and the base model's `hidden_states` and
            `attentions`.

        Raises:
            ValueError, TypeError: an argument that cannot be read, before any work; nothing is changed.
        """
        text = (input_ids, attention_mask, position_ids, cache, inputs_embeds)
        shape, token_mask, read = checked_reading(self, text, num_items_in_batch, kwargs)
        given = {"start_positions": start_positions, "end_positions": end_positions}
        answers = answer_positions(given, shape, token_mask)
        outputs = read()
        logits = self.qa_outputs(outputs.last_hidden_state)
        if token_mask is not None:
            # An answer never lies in padding, and padding has no share in the probabilities.
            logits = logits.masked_fill(~token_mask.to(logits.device)[..., None], torch.finfo(logits.dtype).min)
        ends = [part.contiguous() for part in logits.unbind(dim=-1)]
        loss = None
        if answers is not None:
            pairs = zip(ends, answers, strict=True)
            losses = [label_loss(part, positions.to(part.device), num_items_in_batch) for part, positions in pairs]
            loss = (losses[0] + losses[1]) / 2
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=ends[0],
            end_logits=ends[1],
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def checked_reading(
    head: nn.Module, text: tuple, items: int | torch.Tensor | None, further: dict
) -> tuple[tuple[int, int], torch.Tensor | None, Callable]:
    """Check what every head is given; nothing is read yet.

    Args:
        text: `input_ids`, `attention_mask`, `position_ids`, `cache` and `inputs_embeds` of the head's call.
        items: what its summed loss is divided by.
        further: arguments of the base model.

    Returns:
        Rows and length of the call; which positions hold a token, bool [batch, length], None when all do; and the base
        model as a function of what is left to say, which by default returns a cache where it is given one.

    Raises:
        ValueError, TypeError: an argument that cannot be read, or that a head would ignore.
    """
    check_number_of_items(items)
    check_extra_arguments({name: value for name, value in further.items() if name in LANGUAGE_MODELLING})
    input_ids, attention_mask, _, cache, inputs_embeds = text
    shape = check_inputs(input_ids, inputs_embeds, head.config)
    token_mask = read_attention_mask(attention_mask, shape, 0 if cache is None else cache.get_seq_length())
    arguments = {"use_cache": cache is not None, "return_dict": True}
    arguments |= {name: value for name, value in further.items() if name not in LANGUAGE_MODELLING}
    return shape, token_mask, partial(head.model, *text, **arguments)


def padding_behind(token_mask: torch.Tensor | None) -> torch.Tensor | None:
    """How many positions of padding stand behind each row's last token, [batch]; None when nothing is padded.

    Raises:
        ValueError: a row has no token.
    """
    if token_mask is None:
        return None
    empty = (~token_mask.any(dim=1)).nonzero()
    if len(empty):
        raise ValueError(f"`attention_mask` leaves row {int(empty[0])} no token to judge it by: leave the row out.")
    return token_mask.flip(1).int().argmax(dim=1)


def problem_type(config, labels: torch.Tensor) -> str:
    """What the labels of whole rows are; where the configuration does not say, as transformers infers it.

    Raises:
        ValueError: the configuration names an unknown type.
    """
    if config.problem_type is None:
        if config.num_labels == 1:
            return "regression"
        return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
    if config.problem_type not in PROBLEM_TYPES:
        raise ValueError(f"`config.problem_type` must be one of {list(PROBLEM_TYPES)}, got {config.problem_type!r}.")
    return config.problem_type


def check_sequence_labels(labels: torch.Tensor, rows: int, config) -> None:
    """Labels of whole rows, of the configured problem type."""
    if config.problem_type == "single_label_classification":
        check_label_ids(labels, (rows,), config.num_labels)
    elif tuple(labels.shape) not in {(rows, config.num_labels), (rows,) if config.num_labels == 1 else None}:
        raise ValueError(
            f"`labels` has shape {tuple(labels.shape)}; for `problem_type={config.problem_type!r}` it must be "
            f"[batch, num_labels] = {(rows, config.num_labels)}."
        )


def check_label_ids(labels: torch.Tensor, shape: tuple[int, ...], num_labels: int) -> None:
    """Integers of a shape; -100 or ids of labels."""
    if tuple(labels.shape) != tuple(shape) or labels.is_floating_point():
        raise ValueError(
            f"`labels` must be integers of shape {tuple(shape)}, got {labels.dtype} {tuple(labels.shape)}."
        )
    bad = labels[(labels != NO_TARGET) & ((labels < 0) | (labels >= num_labels))]
    if bad.numel():
        raise ValueError(
            f"`labels` holds {int(bad[0])}, which is neither {NO_TARGET} (no label) nor one of the model's labels "
            f"(0..{num_labels - 1}): load it with `num_labels=` as many as there are."
        )


def answer_positions(
    positions: Mapping[str, torch.Tensor | None], shape: tuple[int, int], token_mask: torch.Tensor | None
) -> list[torch.Tensor] | None:
    """The positions in which answers begin and end, two tensors [batch]; `NO_TARGET` for one that is left out.

    Args:
        positions: by the argument's name.

    Raises:
        ValueError: only one of them is given, or it points at no token.
    """
    missing = [name for name, given in positions.items() if given is None]
    if len(missing) == len(positions):
        return None
    if missing:
        raise ValueError(f"`{missing[0]}` is None, but the other end of the answers is given: give both, or none.")
    return [_answer_positions(name, given, shape, token_mask) for name, given in positions.items()]


def _answer_positions(
    name: str, given: torch.Tensor, shape: tuple[int, int], token_mask: torch.Tensor | None
) -> torch.Tensor:
    rows, length = shape
    if given.numel() != rows or given.is_floating_point() or bool((given < 0).any()):
        raise ValueError(f"`{name}` must be {rows} positions, one for each row and not negative, got {given}.")
    positions = given.reshape(rows)
    positions = positions.masked_fill(positions >= length, NO_TARGET)
    if token_mask is not None:
        in_padding = (positions != NO_TARGET) & ~token_mask.gather(1, positions.clamp_min(0)[:, None]).squeeze(1)
        if bool(in_padding.any()):
            row = int(in_padding.nonzero()[0])
            raise ValueError(
                f"`{name}` of row {row} is {int(positions[row])}, padding: name a token's position, or {length} (the "
                "length) to leave the row out."
            )
    return positions


def label_loss(scores: torch.Tensor, labels: torch.Tensor, items: int | torch.Tensor | None) -> torch.Tensor:
    """-log p(label), summed over what is labelled and divided by `items` (None: by how much that is); 0 for nothing.

    Args:
        scores: [..., choices].
        labels: [...], `NO_TARGET` for none.
    """
    return mean_loss(logits_nll(scores, labels), labels, items)


def sequence_loss(
    logits: torch.Tensor, labels: torch.Tensor, problem: str, items: int | torch.Tensor | None
) -> torch.Tensor:
    """The loss of whole rows: logits [batch, num_labels] against labels as the problem type has them."""
    if problem == "single_label_classification":
        return label_loss(logits, labels, items)
    logits = logits.to(at_least_float32(logits.dtype))
    distance = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
    total = distance(logits, labels.reshape(logits.shape).to(logits.dtype), reduction="sum")
    return per_item(total, labels.numel() if items is None else items)
