# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The two parts of a memory with parameters: the mixtures of a layer, [`GMAMixture`], and the softmax window in front of them,
[`GMAWindow`].

With a window, every token sees the W nearest tokens by exact softmax, and older tokens through Gaussian Mixture Attention.
Causal, the state S, z of the operator is delayed by W tokens:

    s_ij = scaling * q_i . k_j                  i - W < j <= i, optionally soft-capped
    n_i                                         number of tokens in the memory
    m_i  = a_h + u_h . q_i - b_h log(1 + n_i/W) weight of the memory, learned per head
    D_i  = gamma^Q_i z_{i-W}                    how much the memory holds for a query
    r_i  = gamma^Q_i S_{i-W} / D_i              the normalised read
    o_i  = (sum_j e^{s_ij} v_j + e^{m_i} D_i r_i) / (sum_j e^{s_ij} + e^{m_i} D_i)

The memory acts as one more token, with the value r_i and the logit m_i + log D_i. Window and memory share one normaliser, so
a query decides between near and far as softmax decides between tokens. Bidirectional, the near tokens are the tokens with |i
- j| <= W, and the memory holds the whole sequence: a query cannot leave its neighbours out of this sum, so m_i balances
window and memory. A window in front of a linear memory is known from LoLCATs (Zhang et al., arXiv:2410.10254). The window in
front of a mixture is ours.

Without forgetting, D_i grows in proportion to n_i. The attention that softmax pays to far tokens also grows in this way at
first, but later more slowly, because most far tokens do not matter. b_h removes a part of the growth when the memory holds
more tokens than a window. With b_h = 0 the memory is a sum over its tokens. With b_h = 1 it becomes a mean, whose weight
does not depend on the length of the text. n_i counts the real tokens of the sequence of the query, whatever their write
weights and decays.

Pretrained softmax pays much attention to the first tokens of a sequence (attention sinks, Xiao et al., arXiv:2309.17453). In
a memory, these tokens would lose weight as the text grows. So the first s tokens can stay visible, in causal calls:

    near: i - W < j <= i        sinks: j < s and j <= i - W        memory: s <= j <= i - W
    o_i = (sum_{near, sinks} e^{s_ij} v_j + e^{m_i} D_i r_i) / (sum_{near, sinks} e^{s_ij} + e^{m_i} D_i)
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..ops.attention.call import AttentionCall, State
from ..ops.attention.functional import attend, gaussian_mixture_affinity, gaussian_mixture_responsibilities
from ..ops.window.functional import EMPTY, LOG_NOTHING, SinkTokens, attend_step, window_softmax


if TYPE_CHECKING:
    from ..ops.attention.packed import PackedSequences
    from ..ops.attention.slots import Slots

# Older checkpoints have no `memory_dilution`. It starts at 0, which is their meaning
LACKING_BEFORE = r"\.window_norm\.memory_dilution$"


class GMAMixture(nn.Module):
    """
    One Gaussian mixture per head, shared by queries and keys. Its forward pass is the attention.

    Name the attribute that holds this module `mixture_norm`: every Hugging Face Trainer exempts parameters of a `..._norm`
    from weight decay. A weight decay would pull the components of a mixture towards each other.

    Args:
        num_heads (`int`): number of mixtures.
        num_components (`int`): components per mixture.
        routing_dim (`int`): dimension of queries and keys.
        variance_floor (`float`): smallest variance.
        eps (`float`): constant added to the normaliser of the read.
        correlate (`bool`, *optional*, defaults to `False`): whether tokens write and read by the correlation of their
            routes, see [`gaussian_mixture_attention`].

    Attributes:
        means (`torch.Tensor` of shape `(num_heads, num_components, routing_dim)`): mu.
        raw_variances (`torch.Tensor` of the same shape): omega, with sigma^2 = softplus(omega) + variance_floor.
        prior_logits (`torch.Tensor` of shape `(num_heads, num_components)`): alpha, with pi = softmax(alpha).
    """

    def __init__(
        self,
        num_heads: int,
        num_components: int,
        routing_dim: int,
        variance_floor: float,
        eps: float,
        correlate: bool = False,
    ):
        super().__init__()
        self.correlate = correlate
        self.variance_floor = variance_floor
        self.eps = eps
        self.means = nn.Parameter(torch.empty(num_heads, num_components, routing_dim))
        self.raw_variances = nn.Parameter(torch.empty(num_heads, num_components, routing_dim))
        self.prior_logits = nn.Parameter(torch.empty(num_heads, num_components))

    def reset_parameters(
        self, mean_std: float, variance: float, balanced_priors: bool, orthogonal_means: bool = False
    ):
        """
        Initialise means ~ N(0, `mean_std`^2), equal variances `variance`, and priors. Orthogonal means have the length that
        `routing_dim` normal numbers typically have; no component then looks where another looks. Balanced priors make all components
        equally responsible for x = 0; otherwise the priors are equal. Queries and keys start near zero. With equal priors,
        the component with the shortest mean would then take nearly all tokens.
        """
        if orthogonal_means:
            # Of more components than dimensions, the dimensions are orthogonal
            length = mean_std * math.sqrt(max(self.means.shape[1:]))
            heads = [nn.init.orthogonal_(torch.empty_like(head, dtype=torch.float32)) for head in self.means]
            init.copy_(self.means, length * torch.stack(heads))
        else:
            init.normal_(self.means, mean=0.0, std=mean_std)
        init.constant_(self.raw_variances, math.log(math.expm1(variance - self.variance_floor)))
        if balanced_priors:
            init.copy_(self.prior_logits, 0.5 * self.means.float().square().sum(-1) / variance)
        else:
            init.zeros_(self.prior_logits)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        eps: float | None = None,
        sequence_ids: "Tensor | PackedSequences | None" = None,
        initial_state: State | None = None,
        slots: "Slots | None" = None,
        backend: str = "auto",
        kept: Any = None,
        writes_all: bool = False,
        **kwargs,
    ):
        """
        Compute Gaussian mixture attention.

        Args:
            query, key, value (`torch.Tensor`): see [`gaussian_mixture_attention`]. A forward pre-hook on this module sees
            queries and keys exactly as they are routed.
            eps (`float`, *optional*): constant added to the normaliser of the read; by default `eps` of the mixture.
            sequence_ids (`torch.Tensor` or `PackedSequences`, *optional*): see [`gaussian_mixture_attention`]. With slots,
                packed sequences are given by their lengths.
            initial_state (`tuple[torch.Tensor, torch.Tensor]`, *optional*): see [`gaussian_mixture_attention`].
            slots (`Slots`, *optional*): the slots of the rows or of the packed sequences. The first dimension of
                `initial_state` is then the slot, and the call advances the slots in place, see
                [`gaussian_mixture_attention_in_slots`].
            backend (`str`, *optional*, defaults to `"auto"`): see [`gaussian_mixture_attention`].
            kept ([`KeptValues`], *optional*): keeps the values of parameters that a decoding step needs.
            writes_all (`bool`, *optional*, defaults to `False`): whether no write weight is zero.
            kwargs (`Any`, *optional*): further arguments of [`gaussian_mixture_attention`].

        Returns:
            `torch.Tensor` or `tuple`: see [`gaussian_mixture_attention`].
        """
        call = AttentionCall(
            query,
            key,
            value,
            self.means,
            self.raw_variances,
            self.prior_logits,
            eps=self.eps if eps is None else eps,
            variance_floor=self.variance_floor,
            correlate=self.correlate,
            initial_state=initial_state if slots is None else None,
            kept=kept,
            writes_all=writes_all,
            **kwargs,
        )
        if slots is None:
            return attend(call, sequence_ids, backend)
        result = slots.attend(call, sequence_ids, initial_state, backend)
        return (*result, initial_state) if call.output_normalizer else (result, initial_state)

    def write(
        self, key: torch.Tensor, value: torch.Tensor, write_weight: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The S and z that tokens write into an empty memory without forgetting."""
        no_query = key.new_zeros(key.shape[0], self.means.shape[0], 1, key.shape[3])
        call = AttentionCall(
            no_query,
            key,
            value,
            self.means,
            self.raw_variances,
            self.prior_logits,
            causal=False,
            write_weight=write_weight,
            normalize=False,
            variance_floor=self.variance_floor,
            correlate=self.correlate,
            output_final_state=True,
        )
        return attend(call)[1]

    def affinity(self, query: torch.Tensor, key: torch.Tensor, **kwargs) -> torch.Tensor:
        """
        The matrix `(batch, heads, query_length, key_length)` that the attention implies, for analysis: its cost is
        quadratic.
        """
        return gaussian_mixture_affinity(
            query,
            key,
            self.means,
            self.raw_variances,
            self.prior_logits,
            eps=self.eps,
            variance_floor=self.variance_floor,
            correlate=self.correlate,
            **kwargs,
        )

    def responsibilities(self, states: torch.Tensor) -> torch.Tensor:
        """The responsibilities `(batch, heads, length, num_components)` of queries or keys."""
        return gaussian_mixture_responsibilities(
            states, self.means, self.raw_variances, self.prior_logits, variance_floor=self.variance_floor
        )

    def extra_repr(self) -> str:
        num_heads, num_components, routing_dim = self.means.shape
        return f"num_heads={num_heads}, num_components={num_components}, routing_dim={routing_dim}"


class GMAWindow(nn.Module):
    """
    Softmax over the nearest tokens, merged with the memory of a [`GMAMixture`].

    Name the attribute that holds this module `window_norm`: then its parameters get no weight decay, see [`GMAMixture`].

    Args:
        num_heads (`int`): number of query heads.
        head_dim (`int`): dimension of queries and keys.
        window_size (`int`): W, the number of tokens that a query sees exactly: itself and the W - 1 tokens before it.
            Bidirectional, W tokens to each side.
        num_sink_tokens (`int`, *optional*, defaults to `0`): s, the number of first tokens of a sequence that every later
            query sees exactly, and not through the memory; causal calls only.

    Attributes:
        memory_bias (`torch.Tensor` of shape `(num_heads,)`): a.
        memory_query (`torch.Tensor` of shape `(num_heads, head_dim)`): u.
        memory_dilution (`torch.Tensor` of shape `(num_heads,)`): b. 0: the memory is a sum over its tokens. 1: it becomes a
            mean.

    Raises:
        ValueError: for a window without tokens, or a negative number of sink tokens.
    """

    def __init__(self, num_heads: int, head_dim: int, window_size: int, num_sink_tokens: int = 0):
        super().__init__()
        if window_size < 1:
            raise ValueError(
                f"`window_size` must be at least 1, got {window_size}. Without a window, use the mixture alone."
            )
        if num_sink_tokens < 0:
            raise ValueError(f"`num_sink_tokens` must not be negative, got {num_sink_tokens}. 0 means none.")
        self.num_heads, self.head_dim = num_heads, head_dim
        self.window_size = window_size
        self.num_sink_tokens = num_sink_tokens
        self.memory_bias = nn.Parameter(torch.zeros(num_heads))
        self.memory_query = nn.Parameter(torch.zeros(num_heads, head_dim))
        self.memory_dilution = nn.Parameter(torch.zeros(num_heads))

    def reset_parameters(self):
        """Give the memory the weight of tokens whose logits are zero."""
        init.zeros_(self.memory_bias)
        init.zeros_(self.memory_query)
        init.zeros_(self.memory_dilution)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None,
        runs: Tensor | None,
        read: Tensor,
        log_weight: Tensor,
        growth: Tensor | None,
        *,
        count: Tensor | int | None = None,
        kept: Any = None,
        weighing_query: Tensor | None = None,
        sinks: Tensor | None = None,
        sink_tokens: tuple[Tensor | None, ...] | None = None,
        num_leading: int = 0,
        size: int | None = None,
        causal: bool = True,
        scaling: float,
        softcap: float | None = None,
    ) -> Tensor:
        """
        Merge the read of a memory with the tokens of the window. See [`window_softmax`] for arguments that are not listed
        here.

        Args:
            growth (`torch.Tensor` of shape `(batch or 1, 1, asked or 1)`, *optional*): log(1 + n / W) of the n tokens in the
                memory. Without `growth`, the one query sees all keys, and `log_weight` is D itself.
            count (`torch.Tensor` of shape `(batch,)` or `int`, *optional*): n, if there is no `growth`.
            kept ([`KeptValues`], *optional*): values that depend on parameters alone.
            sink_tokens (`tuple`, *optional*): the fields of `SinkTokens`.
            num_leading (`int`, *optional*, defaults to `0`): how many of the first keys are sink tokens, instead of
                `sink_tokens`.

        Returns:
            `torch.Tensor` of shape `(batch, num_heads, length, value_dim)`: the output, in the dtype of `value`.
        """
        if growth is None:
            return self._step(
                query, key, value, valid, read, log_weight, count, weighing_query, sinks, scaling, softcap, kept
            )
        diluted = torch.addcmul(log_weight, self.memory_dilution[:, None], growth, value=-1)
        return window_softmax(
            query,
            key,
            value,
            valid,
            runs,
            read,
            # An empty memory stays empty
            torch.where(log_weight > LOG_NOTHING, diluted, log_weight),
            self.memory_bias,
            self.memory_query,
            weighing_query,
            sinks,
            None if sink_tokens is None else SinkTokens(*sink_tokens),
            num_sinks=num_leading,
            size=size,
            causal=causal,
            scaling=scaling,
            softcap=softcap,
        )

    def _step(
        self, query, key, value, valid, read, normalizer, count, weighing_query, sinks, scaling, softcap, kept
    ) -> Tensor:
        """The forward pass for one query, with as few operations as possible."""
        parameters = (self.memory_bias, self.memory_query, self.memory_dilution)
        bias, slope, dilution = widened(*parameters) if kept is None else kept.get("window", parameters, widened)
        # An empty memory has log 0 = -inf
        logit = torch.threshold(normalizer, 2 * EMPTY, 0.0).log()
        weighing_query = query if weighing_query is None else weighing_query
        logit = logit + (weighing_query.to(logit.dtype) * slope).sum(dim=-1)
        if isinstance(count, Tensor):
            growth = (count.to(logit.dtype) / self.window_size).log1p()[:, None, None]
            bias = torch.addcmul(bias, dilution, growth, value=-1)
        elif count is not None and count > 0:
            bias = torch.sub(bias, dilution, alpha=math.log1p(count / self.window_size))
        return attend_step(query, key, value, valid, read, logit + bias, scaling, softcap, sinks)

    def check(self, query: Tensor, history: Any) -> None:
        """
        Check that queries and a history belong to this window.

        Raises:
            ValueError: for queries or a history of another window.
        """
        num_heads, head_dim = self.num_heads, self.head_dim
        if query.ndim != 4 or query.shape[1] != num_heads or query.shape[3] != head_dim:
            raise ValueError(
                f"query has shape {list(query.shape)}, expected [batch, heads, length, dim] with {num_heads} heads of "
                f"dimension {head_dim}, as the window was built for."
            )
        if history is None:
            return
        window, sinks = (0 if x is None else x.shape[2] for x in (history.keys, history.sink_keys))
        if window != self.window_size:
            raise ValueError(
                f"The history holds a window of {window} tokens, but `window_size` is {self.window_size}. Was it "
                "written by another model? Pass a history of this layer."
            )
        if sinks != self.num_sink_tokens:
            raise ValueError(
                f"The history has room for {sinks} sink tokens, but `num_sink_tokens` is {self.num_sink_tokens}. Was it "
                "written by another model? Pass a history of this layer."
            )

    def extra_repr(self) -> str:
        sinks = f", num_sink_tokens={self.num_sink_tokens}" if self.num_sink_tokens > 0 else ""
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, window_size={self.window_size}{sinks}"


def widened(memory_bias: Tensor, memory_query: Tensor, memory_dilution: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a `(heads, 1)`, u `(heads, 1, head_dim)` and b `(heads, 1)`, at least in float32."""
    dtype = torch.promote_types(memory_bias.dtype, torch.float32)
    bias, slope, dilution = (x.to(dtype) for x in (memory_bias, memory_query, memory_dilution))
    return bias[:, None], slope[:, None], dilution[:, None]
