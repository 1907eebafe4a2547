"""What `generate` of all families has in common."""

from transformers import Cache, GenerationMixin, MaxLengthCriteria


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


def prompt_learning(model) -> str | None:
    """The method of PEFT that puts a learned prompt before a text and generates with `model`, such as "prompt tuning";
    None for adapters and no PEFT."""
    wrapper = getattr(model.prepare_inputs_for_generation, "__self__", None)  # PEFT puts its own one in this place
    config = getattr(wrapper, "active_peft_config", None)
    if config is None or not config.is_prompt_learning:
        return None
    return config.peft_type.value.replace("_", " ").lower()


__all__ = ["BaseGenerationMixin"]
