# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""Softmax attention to the nearest tokens and to what a memory has read, in linear time and memory.

    o_i = (sum_{j near i} e^{s_ij} v_j + e^{m_i} r_i) / e^{l_i}     s_ij = scaling q_i . k_j, or c tanh(s / c) of that
    l_i = log(sum_{j near i} e^{s_ij} + e^{m_i} + e^{sink})         m_i = a + u . q_i + log D_i

A memory is one more thing to attend to: its value r_i is what was read, a mean of values, and D_i how much that is a mean of.
Backwards, with p_ij = e^{s_ij - l_i}, p_i = e^{m_i - l_i}, delta_i = do_i . o_i:

    ds_ij = p_ij (do_i . v_j - delta_i)        dm_i = dlog D_i = p_i (do_i . r_i - delta_i)        dr_i = p_i do_i
    dq = scaling ds K + dm u        dk = scaling ds^T Q        dv = p^T do        dsink = -sum_i e^{sink - l_i} delta_i

Only the inputs, o and l are kept; logits are computed again. On GPUs the kernels of `window_kernels` do this; elsewhere,
and where they cannot, the plain PyTorch of `window_blocks`. Sink tokens, if there are, join by `sink_tokens`.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.triton import DTYPES, MAX_DIM, missing
from .kernel_choice import prefers_kernels
from .sink_tokens import SinkTokens, attend_sinks, attend_sinks_backward
from .window_blocks import accumulation_dtype, attend, attend_backward


def cannot_run(query: Tensor, key: Tensor, value: Tensor, read: Tensor) -> str | None:
    """Why the kernels cannot run a call, or None."""
    if not all(x.dtype in DTYPES for x in (query, value, read)) or key.dtype != query.dtype:
        return "query and key must have the same dtype, and no tensor may be float64."
    if max(query.shape[-1], value.shape[-1]) > MAX_DIM:
        return f"the head or value dimension is above {MAX_DIM}."
    return missing(query.device.type, query.device.index)


def uses_kernels(query: Tensor, key: Tensor, value: Tensor, read: Tensor) -> bool:
    """Whether a call goes to the kernels, by the rules of the operator's backends."""
    return prefers_kernels("window", query.is_cuda, cannot_run(query, key, value, read))


# As in `ops`, the two passes are opaque operators to torch.compile and torch.export, and lengths stay dynamic. Defined and
# implemented in two steps: the decorator that does both adds 0.1 ms to every call.
INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? valid, Tensor? runs, Tensor read, Tensor log_weight, "
    "Tensor memory_bias, Tensor memory_query"
)
OPTIONS = "int size, bool causal, float scaling, float? softcap"

torch.library.define(
    "gma_hf::window_softmax",
    f"({INPUTS}, Tensor? sinks, {OPTIONS}) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "gma_hf::window_softmax_backward",
    f"({INPUTS}, Tensor output, Tensor log_sum, Tensor grad_output, {OPTIONS}) -> ({', '.join(['Tensor'] * 7)})",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("gma_hf::window_softmax", "default")
def softmax_forward(query, key, value, valid, runs, read, *arguments):
    """o and l."""
    if uses_kernels(query, key, value, read):
        from .window_fused import forward

        return forward(query, key, value, valid, runs, read, *arguments)
    return attend(query, key, value, valid, runs, read, *arguments)


@torch.library.register_fake("gma_hf::window_softmax")
def _(query, key, value, valid, runs, read, *arguments):
    log_sum = query.new_empty(query.shape[:3], dtype=accumulation_dtype(query, value))
    if uses_kernels(query, key, value, read):
        from .window_fused import empty_output

        return empty_output(query, value), log_sum
    return value.new_empty(*query.shape[:3], value.shape[-1]), log_sum


@torch.library.impl("gma_hf::window_softmax_backward", "default")
def softmax_backward(query, key, value, valid, runs, read, *arguments):
    """What `attend_backward` returns."""
    if uses_kernels(query, key, value, read):
        from .window_fused import backward

        return backward(query, key, value, valid, runs, read, *arguments)
    return attend_backward(query, key, value, valid, runs, read, *arguments)


@torch.library.register_fake("gma_hf::window_softmax_backward")
def _(query, key, value, valid, runs, read, log_weight, memory_bias, memory_query, output, log_sum, *arguments):
    inputs = (query, key, value, read)
    if uses_kernels(*inputs):
        from .window_fused import empty_grads

        grads = empty_grads(*inputs)
    else:
        grads = (x.new_empty(x.shape) for x in inputs)
    return *grads, torch.empty_like(log_sum), log_sum.new_empty(memory_query.shape), torch.empty_like(log_sum)


class WindowSoftmax(torch.autograd.Function):
    """The operator with its gradient."""

    @staticmethod
    def forward(ctx, *arguments):
        inputs, sink_tokens, options = arguments[:10], arguments[10:14], arguments[14:]
        output, log_sum = torch.ops.gma_hf.window_softmax(*inputs, *options)
        if sink_tokens[0] is not None:
            scaling, softcap = options[2:]
            output, log_sum = attend_sinks(output, log_sum, inputs[0], SinkTokens(*sink_tokens), scaling, softcap)
        ctx.save_for_backward(*inputs, *sink_tokens, output, log_sum)
        ctx.options = options
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        # At once: what is checkpointed is there for one look
        *inputs, output, log_sum = ctx.saved_tensors
        *tensors, sinks = inputs[:10]
        sink_tokens = inputs[10:]
        *grads, grad_logit, grad_memory_query, delta = torch.ops.gma_hf.window_softmax_backward(
            *tensors, output, log_sum, grad_output, *ctx.options
        )
        log_weight, memory_bias, memory_query = tensors[6:]
        asked = slice(grad_logit.shape[2] - log_weight.shape[2], None)
        grad_log_weight = grad_logit[:, :, asked].to(log_weight.dtype)
        grad_bias = grad_logit.sum(dim=(0, 2)).to(memory_bias.dtype)
        grad_sinks = None
        if sinks is not None:
            # Where a query sees nothing, delta is zero, and there is a sink at least
            share = torch.exp(sinks.to(log_sum.dtype)[:, None] - log_sum)
            grad_sinks = -(share * delta).sum(dim=(0, 2)).to(sinks.dtype)
        grad_sink_keys = grad_sink_values = None
        if sink_tokens[0] is not None:
            scaling, softcap = ctx.options[2:]
            with torch.autocast(device_type=grad_output.device.type, enabled=False):
                grad_sink_keys, grad_sink_values = attend_sinks_backward(
                    grads[0], tensors[0], SinkTokens(*sink_tokens), log_sum, delta, grad_output, scaling, softcap
                )
        grad_memory_query = grad_memory_query.to(memory_query.dtype)
        grad_memory = (*grads[3:], grad_log_weight, grad_bias, grad_memory_query, grad_sinks)
        grad_sink_tokens = (grad_sink_keys, grad_sink_values, None, None)
        return *grads[:3], None, None, *grad_memory, *grad_sink_tokens, None, None, None, None


def window_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    runs: Tensor | None,
    read: Tensor,
    log_weight: Tensor,
    memory_bias: Tensor,
    memory_query: Tensor,
    sinks: Tensor | None = None,
    sink_tokens: SinkTokens | None = None,
    *,
    size: int,
    causal: bool,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """
    Attention of every query to the near tokens that are valid and of its own run (itself and the `size` - 1 before it, or
    `size` to each side), and to what it read from a memory, by the equations of this file's opening.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, length, head_dim)`): the last `length` tokens.
        key (`torch.Tensor` of shape `(batch, key_value_heads, num_keys, head_dim)`): of the same `length` tokens, if causal
            optionally of the `size` tokens before them as well.
        value (`torch.Tensor` of shape `(batch, key_value_heads, num_keys, value_dim)`): likewise.
        valid (`torch.BoolTensor` of shape `(batch or 1, num_keys)`, *optional*): which tokens may be seen; by default all.
        runs (`torch.LongTensor` of shape `(batch, num_keys)`, *optional*): tokens of different runs are apart.
        read (`torch.Tensor` of shape `(batch, heads, asked, value_dim)`): r, of the last `asked` queries, at most `length`;
            for the others there is no memory.
        log_weight (`torch.Tensor` of shape `(batch, heads, asked)`): log D. What is below log 2e-19 counts as nothing.
        memory_bias (`torch.Tensor` of shape `(heads,)`), memory_query (`torch.Tensor` of shape `(heads, head_dim)`): a and
            u, which tell how much the memory weighs.
        sinks (`torch.Tensor` of shape `(heads,)`, *optional*): logits that join the normaliser alone.
        sink_tokens (`SinkTokens`, *optional*): further tokens that are seen, from before the window.
        size (`int`): W.
        causal (`bool`): look back only.
        scaling (`float`): factor of the logits.
        softcap (`float`, *optional*): c, where logits become c tanh(s / c).

    Returns:
        `torch.Tensor` of shape `(batch, heads, length, value_dim)` in the dtype of `value`; 0 where a query sees nothing.
    """
    return WindowSoftmax.apply(
        query,
        key,
        value,
        valid,
        runs,
        read,
        log_weight,
        memory_bias,
        memory_query,
        sinks,
        *([None] * 4 if sink_tokens is None else sink_tokens),
        size,
        causal,
        scaling,
        softcap,
    )
