# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The GMA model with a head for each task."""

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation import MaxLengthCriteria
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from ..cache_argument import CACHE_NAME, takes_cache, tells_wrappers
from ..configuration import GMAConfig
from .cache_gma import adopt_cache
from .heads_common import GMAGenerationMixin, adds_nothing_without_labels, as_part_of_step
from .modeling_gma import GMAModel, GMAPreTrainedModel


logger = logging.get_logger(__name__)


class GMAForCausalLM(GMAGenerationMixin, GMAPreTrainedModel, GenerationMixin):
    """
    The GMA language model: a causal `GMAModel` and a head that predicts the next token.

    Args:
        config ([`GMAConfig`]): the configuration, with `is_causal=True`.

    Raises:
        ValueError: if the configuration is bidirectional.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: GMAConfig):
        super().__init__(config)
        if not config.is_causal:
            raise ValueError(
                "GMAForCausalLM needs `is_causal=True` in its configuration: a bidirectional model would see the tokens it "
                "is to predict. Use GMAForMaskedLM for a bidirectional one."
            )
        self.model = GMAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

        # Initialize weights and apply final processing
        self.post_init()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        # `generate` asks the cache for its length before the first forward pass
        if isinstance(model_kwargs.get(CACHE_NAME), Cache):
            adopt_cache(model_kwargs[CACHE_NAME], self.config)

    prepare_inputs_for_generation = tells_wrappers(GenerationMixin.prepare_inputs_for_generation)

    def _get_stopping_criteria(self, *args, **kwargs):
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        config = self.config
        rotates = config.position_embedding_type == "rope" and (
            config.rope_on_routing or "full_attention" in config.layer_types
        )
        if config.position_embedding_type != "learned" and not rotates:
            # `generate` warns of texts beyond `max_position_embeddings`, which mean nothing to a model without positions
            for criterion in criteria:
                if isinstance(criterion, MaxLengthCriteria):
                    criterion.max_position_embeddings = None
        return criteria

    @takes_cache
    @adds_nothing_without_labels
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """
        Predict the next token at each position.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): token ids. Pass either `input_ids` or
                `inputs_embeds`.
            attention_mask (`torch.Tensor` of shape `(batch, seen + length)`, *optional*): nonzero at real tokens, zero at
                padding.
            position_ids (`torch.LongTensor` of shape `(batch or 1, length)`, *optional*): positions, see
                [`GMAModel.forward`].
            cache (`Cache`, *optional*): the state to continue from, see [`GMAModel.forward`].
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, hidden_size)`, *optional*): embeddings instead of
                token ids.
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): the token ids themselves: the model shifts
                the labels. The label -100 is ignored.
            use_cache (`bool`, *optional*): whether to return the state; by default `config.use_cache`.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to `0`): compute the logits of the last
                `logits_to_keep` positions only (0: of all positions), or of the positions in the tensor.
            kwargs (`dict`, *optional*): see [`GMAModel.forward`].

        Returns:
            `CausalLMOutputWithPast`: `loss`, `logits` of shape `(batch, kept length, vocab_size)`, `cache`.

        ```python
        >>> import gma_hf
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer

        >>> model = AutoModelForCausalLM.from_pretrained(folder)
        >>> tokenizer = AutoTokenizer.from_pretrained(folder)
        >>> inputs = tokenizer("Once upon a time", return_tensors="pt")
        >>> tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0])
        ```
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache},
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        slice_indices = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, slice_indices, :])

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class GMAForMaskedLM(GMAPreTrainedModel):
    """
    The GMA masked language model: a bidirectional `GMAModel` and a head that predicts the masked tokens.

    Args:
        config ([`GMAConfig`]): the configuration, with `is_causal=False`. A causal configuration gives a warning.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: GMAConfig):
        super().__init__(config)
        if config.is_causal:
            logger.warning(
                "GMAForMaskedLM was given a causal configuration: masked tokens are predicted from what precedes them only. "
                "Use `GMAConfig(is_causal=False)` for a bidirectional model."
            )
        self.model = GMAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

        # Initialize weights and apply final processing
        self.post_init()

    @adds_nothing_without_labels
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """
        Predict the masked tokens.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): token ids. Pass either `input_ids` or
                `inputs_embeds`.
            attention_mask (`torch.Tensor` of shape `(batch, seen + length)`, *optional*): nonzero at real tokens, zero at
                padding.
            position_ids (`torch.LongTensor` of shape `(batch or 1, length)`, *optional*): positions, see
                [`GMAModel.forward`].
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, hidden_size)`, *optional*): embeddings instead of
                token ids.
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): the tokens to predict, at their own positions.
                The label -100 is ignored.
            kwargs (`dict`, *optional*): see [`GMAModel.forward`].

        Returns:
            `MaskedLMOutput`: `loss`, `logits` of shape `(batch, length, vocab_size)`.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class GMAForSequenceClassification(GenericForSequenceClassification, GMAPreTrainedModel):
    """
    The GMA sequence classifier. A causal model pools the last real token. A bidirectional model pools the mean of the real
    tokens.

    Args:
        config ([`GMAConfig`]): the configuration, with `num_labels`.
    """

    def __init__(self, config: GMAConfig):
        super().__init__(config)
        self.dropout = nn.Dropout(config.classifier_dropout)

    @takes_cache
    @as_part_of_step
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """
        Classify each row.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): token ids. Pass either `input_ids` or
                `inputs_embeds`.
            attention_mask (`torch.Tensor` of shape `(batch, seen + length)`, *optional*): nonzero at real tokens, zero at
                padding.
            position_ids (`torch.LongTensor` of shape `(batch or 1, length)`, *optional*): positions, see
                [`GMAModel.forward`].
            cache (`Cache`, *optional*): the state to continue from, see [`GMAModel.forward`].
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, hidden_size)`, *optional*): embeddings instead of
                token ids.
            labels (`torch.Tensor` of shape `(batch,)`, *optional*): classes. With `config.problem_type="regression"`
                numbers, and with `"multi_label_classification"` rows of 0 and 1.
            use_cache (`bool`, *optional*): whether to return the state; by default `config.use_cache`.
            kwargs (`dict`, *optional*): see [`GMAModel.forward`].

        Returns:
            `SequenceClassifierOutputWithPast`: `loss`, `logits` of shape `(batch, num_labels)`.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache},
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        pooled_states = self.pool(hidden_states, self._real_tokens(hidden_states, input_ids, attention_mask))
        pooled_logits = self.score(self.dropout(pooled_states))

        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=pooled_logits, labels=labels, pooled_logits=pooled_logits, config=self.config
            )
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=pooled_logits,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def pool(self, hidden_states: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
        """
        Reduce the states of the tokens to one state per row.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, length, hidden_size)`): the states of the tokens.
            is_real (`torch.BoolTensor` of shape `(batch, length)`): `True` at real tokens.

        Returns:
            `torch.Tensor` of shape `(batch, hidden_size)`: the state of the last real token, or the mean of the real tokens.
        """
        if self.config.is_causal:
            index = torch.arange(is_real.shape[1], device=is_real.device)
            last_real_token = (index * is_real).argmax(dim=1)
            return hidden_states[torch.arange(len(hidden_states), device=hidden_states.device), last_real_token]
        # In float32: a sum over thousands of tokens outgrows 16 bits
        is_real = is_real[..., None].to(torch.float32)
        return ((hidden_states * is_real).sum(dim=1) / is_real.sum(dim=1).clamp(min=1)).to(hidden_states.dtype)

    def _real_tokens(
        self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Which tokens count: the tokens of the attention mask or, without a mask, all tokens but the padding token."""
        batch_size, length = hidden_states.shape[:2]
        if attention_mask is not None:
            return (attention_mask[:, attention_mask.shape[1] - length :] != 0).to(hidden_states.device)
        if input_ids is not None and self.config.pad_token_id is not None:
            return (input_ids != self.config.pad_token_id).to(hidden_states.device)
        if batch_size > 1:
            logger.warning_once(
                f"{self.__class__.__name__} got a batch without `attention_mask` and cannot tell padding from tokens: all "
                "are taken for real. Pass the `attention_mask` that the tokenizer returns."
            )
        return torch.ones(batch_size, length, dtype=torch.bool, device=hidden_states.device)


class GMAForTokenClassification(GenericForTokenClassification, GMAPreTrainedModel):
    """
    The GMA token classifier: one label per token.

    Args:
        config ([`GMAConfig`]): the configuration, with `num_labels`.
    """

    forward = as_part_of_step(GenericForTokenClassification.forward)


class GMAForQuestionAnswering(GenericForQuestionAnswering, GMAPreTrainedModel):
    """
    GMA for extractive question answering: predicts the first and the last token of the answer.

    Args:
        config ([`GMAConfig`]): the configuration.
    """

    forward = adds_nothing_without_labels(GenericForQuestionAnswering.forward)


__all__ = [
    "GMAForCausalLM",
    "GMAForMaskedLM",
    "GMAForQuestionAnswering",
    "GMAForSequenceClassification",
    "GMAForTokenClassification",
]
