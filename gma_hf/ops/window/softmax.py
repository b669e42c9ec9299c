# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The softmax of the window by custom operators, forward and backward. The equations of the forward pass are in `functional`.
Backwards, with p_ij = e^{s_ij - l_i}, p_i = e^{m_i - l_i}, delta_i = do_i . o_i:

    ds_ij = p_ij (do_i . v_j - delta_i)        dm_i = dlog D_i = p_i (do_i . r_i - delta_i)        dr_i = p_i do_i
    dq = scaling ds K        dk = scaling ds^T Q        dv = p^T do        dsink = -sum_i e^{sink - l_i} delta_i
    dq' = dm u               du = dm^T Q'

Only the inputs, o and l are kept; logits are computed again. On GPUs the kernels of `triton` compute this. Elsewhere, and if
the kernels cannot run, the plain PyTorch of `blocks.py` computes it. If every query has its own sink tokens (packed
sequences), `blocks.py` adds them after the kernels, too.
"""

import torch
from torch import Tensor

from ..dispatch import Way, Ways
from ..operators import differentiate_once, on_one_device, vmapped_by_loops
from ..triton_support import DTYPES, MAX_DIM, is_on_gpu, missing
from .blocks import attend, attend_backward, attend_sinks, attend_sinks_backward, left_window
from .functional import WAYS, SinkTokens, accumulation_dtype


def cannot_run(query: Tensor, key: Tensor, value: Tensor, read: Tensor) -> str | None:
    """Why the kernels cannot run a call, or `None`."""
    if not all(x.dtype in DTYPES for x in (query, value, read)) or key.dtype != query.dtype:
        return "query and key must have the same dtype, and no tensor may be float64."
    if max(query.shape[-1], value.shape[-1]) > MAX_DIM:
        return f"the head or value dimension is above {MAX_DIM}."
    return missing(query.device.type, query.device.index)


# The backends for the two passes of the operators
PASSES = Ways("window", ("triton", "pytorch"))
PASSES.register(Way("triton", cannot_run, is_on_gpu))
PASSES.register(Way("pytorch"))


def uses_kernels(query: Tensor, key: Tensor, value: Tensor, read: Tensor) -> bool:
    """Whether the kernels run a call."""
    return PASSES.choose(query, key, value, read).name == "triton"


# As in `ops`, the two passes are opaque operators to torch.compile and torch.export, and lengths stay dynamic. Defined and
# implemented in two steps: the decorator that does both adds 0.1 ms to every call.
INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? valid, Tensor? runs, Tensor read, Tensor log_weight, "
    "Tensor memory_bias, Tensor memory_query, Tensor? weighing_query, "
    "Tensor? sink_key, Tensor? sink_value, Tensor? visible"
)
OPTIONS = "int size, bool causal, float scaling, float? softcap"

torch.library.define(
    "gma_hf::window_softmax",
    f"({INPUTS}, Tensor? sinks, {OPTIONS}) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "gma_hf::window_softmax_backward",
    f"({INPUTS}, Tensor output, Tensor log_sum, Tensor grad_output, {OPTIONS}) -> ({', '.join(['Tensor'] * 9)})",
    tags=torch.Tag.pt2_compliant_tag,
)


def sink_tokens_of(query: Tensor, key: Tensor, sink_key: Tensor, sink_value: Tensor, visible, size: int) -> SinkTokens:
    """
    The sink tokens of an operator. Without `visible` these are the first keys, which a query sees after they have left its
    window.
    """
    if visible is None:
        visible = left_window(sink_key.shape[2], query.shape[2], key.shape[2], size, key.device)
    return SinkTokens(sink_key, sink_value, visible)


@torch.library.impl("gma_hf::window_softmax", "default")
@on_one_device
def softmax_forward(
    query, key, value, valid, runs, read, log_weight, memory_bias, memory_query, weighing_query, sink_key, sink_value,
    visible, sinks, size, causal, scaling, softcap,
):  # fmt: skip
    """o and l."""
    inputs = (query, key, value, valid, runs, read, log_weight, memory_bias, memory_query, weighing_query)
    options = (size, causal, scaling, softcap)
    if uses_kernels(query, key, value, read):
        from .triton.fused import forward

        return forward(*inputs, sink_key, sink_value, visible, sinks, *options)
    output, log_sum = attend(*inputs, sinks, *options)
    if sink_key is not None:
        sink_tokens = sink_tokens_of(query, key, sink_key, sink_value, visible, size)
        attend_sinks(output, log_sum, query, sink_tokens, scaling, softcap)
    return output, log_sum


@torch.library.register_fake("gma_hf::window_softmax")
@on_one_device
def _(
    query, key, value, valid, runs, read, log_weight, memory_bias, memory_query, weighing_query, sink_key, sink_value,
    visible, sinks, size, causal, scaling, softcap,
):  # fmt: skip
    log_sum = query.new_empty(query.shape[:3], dtype=accumulation_dtype(query, value))
    if uses_kernels(query, key, value, read):
        from .triton.fused import empty_output

        return empty_output(query, value), log_sum
    return value.new_empty(*query.shape[:3], value.shape[-1]), log_sum


@torch.library.impl("gma_hf::window_softmax_backward", "default")
@on_one_device
def softmax_backward(
    query, key, value, valid, runs, read, log_weight, memory_bias, memory_query, weighing_query, sink_key, sink_value,
    visible, output, log_sum, grad_output, size, causal, scaling, softcap,
):  # fmt: skip
    """
    The result of `attend_backward`, and dk beside dv of the sink tokens, `(batch, key_value_heads, s, head_dim + value_dim)`
    in the precision of l; of size 0 if there are none.
    """
    inputs = (query, key, value, valid, runs, read, log_weight, memory_bias, memory_query, weighing_query)
    arguments = (output, log_sum, grad_output, size, causal, scaling, softcap)
    if uses_kernels(query, key, value, read):
        from .triton.fused import backward

        return backward(*inputs, sink_key, sink_value, visible, *arguments)
    grads = attend_backward(*inputs, *arguments)
    if sink_key is None:
        return *grads, log_sum.new_empty(0)
    grad_query, delta = grads[0], grads[6]
    sink_tokens = sink_tokens_of(query, key, sink_key, sink_value, visible, size)
    grad_sinks = attend_sinks_backward(grad_query, query, sink_tokens, log_sum, delta, grad_output, scaling, softcap)
    return *grads, torch.cat(grad_sinks, dim=-1)


@torch.library.register_fake("gma_hf::window_softmax_backward")
@on_one_device
def _(
    query, key, value, valid, runs, read, log_weight, memory_bias, memory_query, weighing_query, sink_key, sink_value,
    visible, output, log_sum, grad_output, size, causal, scaling, softcap,
):  # fmt: skip
    inputs = (query, key, value, read, *(() if weighing_query is None else (weighing_query,)))
    if uses_kernels(query, key, value, read):
        from .triton.fused import empty_grads

        grads = empty_grads(*inputs)
    else:
        grads = tuple(x.new_empty(x.shape) for x in inputs)
    grad_weighing = log_sum.new_empty(0) if weighing_query is None else grads[4]
    grad_sinks = log_sum.new_empty(0)
    if sink_key is not None:
        grad_sinks = log_sum.new_empty(*sink_key.shape[:3], key.shape[-1] + value.shape[-1])
    of_memory = (torch.empty_like(log_sum), log_sum.new_empty(memory_query.shape), torch.empty_like(log_sum))
    return *grads[:4], *of_memory, grad_weighing, grad_sinks


def operator_sinks(key: Tensor, value: Tensor, sink_tokens: SinkTokens, num_sinks: int) -> tuple[Tensor | None, ...]:
    """Keys, values and visibility of the sink tokens that the operators compute."""
    if num_sinks > 0:
        return key.narrow(2, 0, num_sinks), value.narrow(2, 0, num_sinks), None
    return (None, None, None) if sink_tokens.index is not None else sink_tokens[:3]


def window_gradients(grad_output, num_sinks, size, causal, scaling, softcap, *saved) -> tuple[Tensor | None, ...]:
    """Gradients for the tensors that [`WindowSoftmax`] has saved, without its outputs."""
    *inputs, sinks, sink_keys, sink_values, visible, index, output, log_sum = saved
    options = (size, causal, scaling, softcap)
    sink_tokens = SinkTokens(sink_keys, sink_values, visible, index)
    query, key, value = inputs[:3]
    seen = operator_sinks(key, value, sink_tokens, num_sinks)
    *grads, grad_logit, grad_memory_query, delta, grad_weighing, grad_seen = torch.ops.gma_hf.window_softmax_backward(
        *inputs, *seen, output, log_sum, grad_output, *options
    )
    log_weight, memory_bias, memory_query, weighing_query = inputs[6:]
    asked = slice(grad_logit.shape[2] - log_weight.shape[2], None)
    grad_memory = (
        grads[3],
        grad_logit[:, :, asked].to(log_weight.dtype),
        grad_logit.sum(dim=(0, 2)).to(memory_bias.dtype),
        grad_memory_query.to(memory_query.dtype),
        None if weighing_query is None else grad_weighing,
    )
    grad_sinks = None
    if sinks is not None:
        # If a query sees nothing, delta is zero, and there is at least one sink token
        share = torch.exp(sinks.to(log_sum.dtype)[:, None] - log_sum)
        grad_sinks = -(share * delta).sum(dim=(0, 2)).to(sinks.dtype)
    grad_sink_keys = grad_sink_values = None
    if index is not None:
        scaling, softcap = options[2:]
        grad_sink_keys, grad_sink_values = attend_sinks_backward(
            grads[0], query, sink_tokens, log_sum, delta, grad_output, scaling, softcap
        )
    elif seen[0] is not None:
        grad_sink_keys, grad_sink_values = grad_seen.split((key.shape[-1], value.shape[-1]), dim=-1)
    if sink_keys is not None:
        grad_sink_keys, grad_sink_values = (
            grad_sink_keys.to(sink_keys.dtype),
            grad_sink_values.to(sink_values.dtype),
        )
    elif num_sinks > 0:
        for grad, of_sinks in ((grads[1], grad_sink_keys), (grads[2], grad_sink_values)):
            grad.narrow(2, 0, num_sinks).add_(of_sinks)
        grad_sink_keys = grad_sink_values = None
    grad_sink_tokens = (grad_sink_keys, grad_sink_values, None, None)
    return *grads[:3], None, None, *grad_memory, grad_sinks, *grad_sink_tokens


for name in ("window_softmax", "window_softmax_backward"):
    vmapped_by_loops(name)


class WindowSoftmax(torch.autograd.Function):
    """The operator with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query, key, value, valid, runs, read, log_weight, memory_bias, memory_query, weighing_query, sinks,
        sink_keys, sink_values, visible, index, num_sinks, size, causal, scaling, softcap,
    ):  # fmt: skip
        """
        The output o, and l for the backward pass. Every argument has a name: without gradients `torch.compile` counts the
        names, and would pass a context as the first of `*arguments`.
        """
        inputs = (query, key, value, valid, runs, read, log_weight, memory_bias, memory_query, weighing_query)
        sink_tokens = SinkTokens(sink_keys, sink_values, visible, index)
        seen = operator_sinks(key, value, sink_tokens, num_sinks)
        output, log_sum = torch.ops.gma_hf.window_softmax(*inputs, *seen, sinks, size, causal, scaling, softcap)
        if index is not None:
            attend_sinks(output, log_sum, query, sink_tokens, scaling, softcap)
        return output, log_sum

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors, ctx.constants = inputs[:15], inputs[15:]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx, grad_output, _):
        # At once, because checkpointed tensors can be read only once
        saved = ctx.saved_tensors
        if grad_output is None:
            return (None,) * 20
        return *differentiate_once(window_gradients, grad_output, *ctx.constants, *saved), None, None, None, None, None


def window_by_operators(
    query, key, value, valid, runs, read, log_weight, memory_bias, memory_query, weighing_query, sinks, sink_tokens, *options
) -> Tensor:  # fmt: skip
    """The output o. See `window_softmax` for the arguments."""
    sink_tokens = (None,) * 4 if sink_tokens is None else sink_tokens
    output, _ = WindowSoftmax.apply(
        query, key, value, valid, runs, read, log_weight, memory_bias, memory_query, weighing_query, sinks, *sink_tokens,
        *options,
    )  # fmt: skip
    return output


WAYS.register(Way("operators", run=window_by_operators))
