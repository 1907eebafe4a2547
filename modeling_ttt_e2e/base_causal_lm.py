"""What the language models of all families have in common: `generate`, and for the baselines the whole head."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache, GenerationMixin, MaxLengthCriteria
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from .causal_lm_loss import hidden_losses, mean_loss, position_labels
from .checks import (
    accept_earlier_cache_names,
    check_flags,
    check_label_arguments,
    check_logits_to_keep,
    check_number_of_items,
    one_input,
    read_attention_mask,
)


class BaseGenerationMixin(GenerationMixin):
    """transformers' `generate`, for models that refuse arguments they do not know and go on at any length.

    `config.max_position_embeddings` is a hint for tools; here nothing is cut at it, and no warning names it.

    Attributes:
        own_cache_class: of the cache that `generate` makes from the configuration; None for transformers' own choice.
    """

    own_cache_class: type[Cache] | None = None

    # `generate` looks for `inputs_embeds` in this signature.
    def prepare_inputs_for_generation(self, input_ids, *args, inputs_embeds=None, tokenizer=None, **kwargs):
        """As transformers', without the tokenizer that it passes on for stop strings."""
        return super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        method = prompt_learning(self)
        if method is not None:
            if model_kwargs.get("cache") is not None:
                raise ValueError(f"`cache` cannot be used with {method} of PEFT, whose prompt begins every text.")
            # PEFT puts the prompt before the inputs of every step in which it sees no cache, and it looks for one under
            # the name of earlier releases: without a cache every step is the whole text after its prompt.
            generation_config.use_cache = model_kwargs["use_cache"] = False
        elif self.own_cache_class is None or model_kwargs.get("cache") is not None:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        elif generation_config.use_cache is not False:
            model_kwargs["cache"] = self.own_cache_class(self.config)

    def _prepare_generated_length(self, generation_config, *, has_default_max_length, input_ids_length, **kwargs):
        new_tokens = generation_config.max_length
        generation_config = super()._prepare_generated_length(
            generation_config,
            has_default_max_length=has_default_max_length,
            input_ids_length=input_ids_length,
            **kwargs,
        )
        if has_default_max_length and generation_config.max_new_tokens is None:
            generation_config.max_length = input_ids_length + new_tokens
        return generation_config

    def _get_stopping_criteria(self, *args, **kwargs):
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                criterion.max_position_embeddings = None
        return criteria


@dataclass
class BaselineCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Transformers' fields, then:

    Args:
        token_nll: [batch, length - 1], at least float32: -log p(label of t+1) at position t, 0 where that label is
            -100 or position t is padding; None without labels. Differentiable. (With `shift_labels`: [batch, length].)
    """

    token_nll: torch.Tensor | None = None


class BaselineCausalLM:
    """A decoder with logits and the loss; stands before the family's `PreTrainedModel` among a model's bases.

    Attributes:
        decoder_class: of `model`, the decoder without its head.
    """

    decoder_class: type[nn.Module]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)  # type: ignore[call-arg]  # PreTrainedModel's: it stands behind this class
        self.model = self.decoder_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @accept_earlier_cache_names
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs,
    ) -> BaselineCausalLMOutputWithPast:
        """As the decoder's own forward, with logits and the loss.

        Args:
            labels: [batch, length]; position t is compared with label t+1, -100 is skipped.
            logits_to_keep: positions whose logits are returned: 0 all, an int the last ones, or a tensor of positions.
            skip_logits: return no logits, and never hold those of more than 1024 positions when gradients are off or
                activation checkpointing is on.
            num_items_in_batch: what the summed loss is divided by (default: the labelled tokens of this call).
            kwargs: `shift_labels` [batch, length], labels that are already aligned with the positions, and arguments of
                the decoder. (Trainer waits for every argument with "label" in its name that stands in the signature.)

        Returns:
            `loss` (the mean of `token_nll` over labelled tokens; 0 when there is none), `logits` [batch, kept
            positions, vocab_size] or None, `token_nll`, and the decoder's fields.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        captured = ("output_hidden_states", "output_attentions")
        check_flags(skip_logits=skip_logits, **{name: kwargs.get(name) for name in captured})
        shape = one_input(input_ids, inputs_embeds)
        check_logits_to_keep(logits_to_keep, shape[1])
        check_number_of_items(num_items_in_batch)
        check_label_arguments(labels, shift_labels, shape, self.config.vocab_size)
        positions_read = 0 if cache is None else cache.get_seq_length()
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden, loss, logits, token_nll = outputs.last_hidden_state, None, None, None
        # `generate` hands masks that it has prepared itself to a forward pass that it compiles.
        mask = attention_mask if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 else None
        targets = position_labels(labels, shift_labels, read_attention_mask(mask, hidden.shape[:2], positions_read))
        if not skip_logits:
            logits = self.lm_head(slice_logits_to_keep(hidden, logits_to_keep))
        if targets is not None:
            checkpointing = self.training and self.is_activation_checkpointing
            token_nll = hidden_losses(self.lm_head, hidden, logits, targets, checkpointing)
            loss = mean_loss(token_nll, targets, num_items_in_batch)
        return BaselineCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            token_nll=token_nll,
        )


def prompt_learning(model) -> str | None:
    """The method of PEFT that puts a learned prompt before a text and generates with `model`, such as "prompt tuning";
    None for adapters and no PEFT."""
    wrapper = getattr(model.prepare_inputs_for_generation, "__self__", None)  # PEFT puts its own one in this place
    config = getattr(wrapper, "active_peft_config", None)
    if config is None or not config.is_prompt_learning:
        return None
    return config.peft_type.value.replace("_", " ").lower()


__all__ = ["BaseGenerationMixin", "BaselineCausalLM"]
