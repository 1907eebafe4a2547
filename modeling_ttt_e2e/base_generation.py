"""What `generate` of all families has in common."""

from transformers import GenerationMixin


class BaseGenerationMixin(GenerationMixin):
    """transformers' `generate`, for models that refuse arguments they do not know."""

    # `generate` looks for `inputs_embeds` in this signature.
    def prepare_inputs_for_generation(self, input_ids, *args, inputs_embeds=None, tokenizer=None, **kwargs):
        """As transformers', without the tokenizer that it passes on for stop strings."""
        return super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)


__all__ = ["BaseGenerationMixin"]
