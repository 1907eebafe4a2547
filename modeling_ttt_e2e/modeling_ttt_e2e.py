"""TTT-E2E as transformers models: a sliding-window decoder that keeps learning while it reads (arXiv 2512.23675).

`TTTE2EModel` holds the decoder, the head that the inner loss needs, and the whole reading of a call;
`TTTE2EForCausalLM` adds logits, the outer loss and `generate`, and the other classes a head that judges what was read.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from .cache_ttt_e2e import TTTE2ECache
from .call import make_call, run_call
from .causal_lm_loss import per_item
from .checks import accept_earlier_cache_names, check_flags, check_not_reentrant, check_number_of_items
from .configuration_ttt_e2e import TTTE2EConfig
from .generation_ttt_e2e import TTTE2EGenerationMixin
from .heads_ttt_e2e import QuestionAnsweringHead, SequenceClassificationHead, TokenClassificationHead
from .layers import RotaryEmbeddings, TTTE2EDecoderLayer, TTTE2ERMSNorm, TTTE2ESuffixLayer


@dataclass
class TTTE2EModelOutputWithPast(BaseModelOutputWithPast):
    """Transformers' fields, then:

    Args:
        loss: [], the mean of `token_nll` over labelled tokens, 0 when there is none; None without labels.
        token_nll: [batch, length - 1], at least float32: -log p(label of t+1) at position t, 0 where that label is
            -100 or position t is padding; None without labels. Differentiable.
        inner_loss: [batch, mini-batches], detached: the inner loss of each mini-batch that this call completed, under
            the fast weights before its own step; NaN where a row has fewer, None with learning off.
        inner_grad_norm: [batch, mini-batches], detached: the joint L2 norm of the inner gradient before clipping;
            NaN where no step was taken.
    """

    loss: torch.Tensor | None = None
    token_nll: torch.Tensor | None = None
    inner_loss: torch.Tensor | None = None
    inner_grad_norm: torch.Tensor | None = None


@dataclass
class TTTE2ECausalLMOutputWithPast(CausalLMOutputWithPast):
    """Transformers' fields, then those of [`TTTE2EModelOutputWithPast`]."""

    token_nll: torch.Tensor | None = None
    inner_loss: torch.Tensor | None = None
    inner_grad_norm: torch.Tensor | None = None


class TTTE2EPreTrainedModel(PreTrainedModel):
    config: TTTE2EConfig
    config_class = TTTE2EConfig
    base_model_prefix = "model"
    # Of the classes around the base model, which has its own: PEFT looks at the outermost class alone.
    _tied_weights_keys = {"model.lm_head.weight": "model.embed_tokens.weight"}
    supports_gradient_checkpointing = True
    _no_split_modules = ["TTTE2EDecoderLayer", "TTTE2ESuffixLayer"]
    _skip_keys_device_placement = ["cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = False
    _supports_attention_backend = False
    _can_compile_fullgraph = False
    _is_stateful = True
    # Suffix blocks run once per mini-batch, so that hooks would record each of them many times.
    _can_record_outputs = None

    def get_output_embeddings(self) -> nn.Module:
        return self.base_model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.base_model.lm_head = new_embeddings

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=None, every_n_layers=1):
        if enable and self.config.test_time_training:
            check_not_reentrant(gradient_checkpointing_func)
        arguments = (
            {} if gradient_checkpointing_func is None else {"gradient_checkpointing_func": gradient_checkpointing_func}
        )
        super()._set_gradient_checkpointing(enable=enable, every_n_layers=every_n_layers, **arguments)

    def _expand_parallel_plan(self, plan: dict[str, str]) -> dict[str, str]:
        """The rules of a plan by module, where FSDP2's `layers.*` means the prefix blocks: see `sharding`."""
        expanded = super()._expand_parallel_plan(plan)
        suffix = self.base_model.layers[self.config.num_prefix_layers :]
        names = {name for name, module in self.named_modules() if any(module is layer for layer in suffix)}
        # Of the rules by block only FSDP's name a block itself; those of tensor parallelism name layers within.
        return {name: style for name, style in expanded.items() if name not in names}


class TTTE2EModel(TTTE2EPreTrainedModel):
    """The decoder with its head and inner loop.

    Attributes:
        inner_learning_rate_multiplier: scales the inner learning rate while training; a trainer's warm-up sets it.
    """

    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}

    def __init__(self, config):
        config.check()
        super().__init__(config)
        first = config.num_prefix_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            (TTTE2EDecoderLayer if index < first else TTTE2ESuffixLayer)(config, index)
            for index in range(config.num_hidden_layers)
        )
        self.norm = TTTE2ERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbeddings(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.inner_learning_rate_multiplier = 1.0
        self.post_init()

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
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor | None = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        test_time_training: bool | None = None,
        learning_span: tuple[int, int] | None = None,
        shift_labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> TTTE2EModelOutputWithPast:
        """Read tokens, learning on the way, and return hidden states and (with labels) losses.

        Args:
            input_ids: [batch, length]; any length, also one that is no multiple of the mini-batch.
            attention_mask: [batch, length] or, with a cache, [batch, positions read + length]; 0 marks padding, on any
                side. None: nothing is padded.
            position_ids: [batch, length], growing along each row; None counts each row's tokens.
            cache: the learned context to go on from; updated in place unless `use_cache=False`. With learning off also
                a `DynamicCache` of keys and values before the text, as prefix tuning makes it, which stays as it is.
            inputs_embeds: [batch, length, hidden_size] instead of embedding the ids; learning needs the ids too.
            labels: [batch, length]; position t is compared with label t+1, -100 is skipped. Never seen by the inner
                loss.
            use_cache: return the learned context (default: `config.use_cache` when neither training nor given
                labels).
            logits_to_keep: positions whose final hidden state is returned: 0 all, an int the last ones, a tensor as in
                transformers, None no position.
            output_hidden_states: also [batch, length, hidden_size] before the first block, after each block but the
                last, and after the final norm.
            output_attentions: also each block's weights [batch, heads, length, keys before + length] (runs eager
                attention).
            test_time_training: learn while reading (default: `config.test_time_training`).
            learning_span: positions (first, end), counted from the first one ever read, that are learned; None all.
            shift_labels: [batch, length] labels that are already aligned with the positions.

        Raises:
            ValueError, TypeError: an argument that cannot be read, before any work; nothing is changed.
        """
        call = make_call(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            labels=labels,
            shift_labels=shift_labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            test_time_training=test_time_training,
            learning_span=learning_span,
            **kwargs,
        )
        output = run_call(self, call)
        if call.use_cache:
            cache = TTTE2ECache(self.config) if call.cache is None else call.cache
            cache.store(output.context, call.tokens.length, self)
        hidden = output.hidden
        if hidden is not None and not isinstance(logits_to_keep, int):
            hidden = slice_logits_to_keep(hidden, logits_to_keep)
        return TTTE2EModelOutputWithPast(
            last_hidden_state=hidden,
            cache=cache if call.use_cache else None,
            hidden_states=output.layers,
            attentions=output.attentions,
            loss=None if output.token_nll is None else output.token_nll.sum() / call.labelled_tokens.clamp_min(1),
            token_nll=output.token_nll,
            inner_loss=output.inner_loss,
            inner_grad_norm=output.inner_grad_norm,
        )


class TTTE2EForCausalLM(TTTE2EPreTrainedModel, TTTE2EGenerationMixin):
    """The decoder with logits, the outer loss and `generate`. The head itself belongs to [`TTTE2EModel`]."""

    def __init__(self, config):
        super().__init__(config)
        self.model = TTTE2EModel(config)
        self.post_init()

    @property
    def lm_head(self) -> nn.Module:
        return self.model.lm_head

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
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        test_time_training: bool | None = None,
        learning_span: tuple[int, int] | None = None,
        skip_logits: bool = False,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs,
    ) -> TTTE2ECausalLMOutputWithPast:
        """As [`TTTE2EModel.forward`], with logits and the outer loss.

        Args:
            skip_logits: return no logits, and never hold those of more than one mini-batch at a time.
            num_items_in_batch: what the summed outer loss is divided by (default: the labelled tokens of this call);
                the inner loss never sees it.

        Returns:
            `loss` (the mean of `token_nll` over labelled tokens; 0 when there is none), `logits` [batch, kept
            positions, vocab_size] or None, and the base model's fields.
        """
        check_flags(skip_logits=skip_logits)
        check_number_of_items(num_items_in_batch)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=None if skip_logits else logits_to_keep,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            test_time_training=test_time_training,
            learning_span=learning_span,
            return_dict=True,
            **kwargs,
        )
        loss = outputs.loss
        if num_items_in_batch is not None and loss is not None:
            loss = per_item(outputs.token_nll.sum(), num_items_in_batch)
        return TTTE2ECausalLMOutputWithPast(
            loss=loss,
            logits=None if skip_logits else self.lm_head(outputs.last_hidden_state),
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            token_nll=outputs.token_nll,
            inner_loss=outputs.inner_loss,
            inner_grad_norm=outputs.inner_grad_norm,
        )


class TTTE2EForSequenceClassification(SequenceClassificationHead, TTTE2EPreTrainedModel):
    """The decoder with scores of whole rows: a classifier, or a reward model with `num_labels=1`."""

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = TTTE2EModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class TTTE2EForTokenClassification(TokenClassificationHead, TTTE2EPreTrainedModel):
    """The decoder with scores of every token. `config.classifier_dropout` (0.1 without it) is applied before them."""

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = TTTE2EModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class TTTE2EForQuestionAnswering(QuestionAnsweringHead, TTTE2EPreTrainedModel):
    """The decoder with scores of every position as the first and as the last one of an answer in the text."""

    def __init__(self, config):
        super().__init__(config)
        self.model = TTTE2EModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


__all__ = [
    "TTTE2EForCausalLM",
    "TTTE2EForQuestionAnswering",
    "TTTE2EForSequenceClassification",
    "TTTE2EForTokenClassification",
    "TTTE2EModel",
    "TTTE2EPreTrainedModel",
]
