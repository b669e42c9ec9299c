# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Language models that differ in the mixer alone, and an AdamW for several of them at once.

    x = x + o_proj(norm per head(mixer(SiLU(short convolution(q, k, v)))) * SiLU(gate))        x = x + SwiGLU(x)

Parameters are a dictionary of tensors `[models, ...]`: models of one architecture with seeds and rates of their own train
side by side, each as if it were alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .operators import chunk_mask, decayed_read, delta_rule_read, features


MIXERS = ("mixture", "signed_sigmoids", "linear", "mamba2_like", "gated_delta", "softmax")
WIDTH = 4  # of the short convolution
DECAYED = ("embedding", "in_proj", "conv", "o_proj", "gate_up", "down")


@dataclass(frozen=True)
class Block:
    """
    One row of the search.

    Attributes:
        mixer: one of `MIXERS`. "linear" has queries and keys of unit length, "mamba2_like" takes them as they are.
        components: of the mixture of a head.
        mixtures: independent mixtures that share these components.
        relative: responsibilities relative to the average component.
        unit_length: of the features; of relative responsibilities this is the correlation of two routes.
        qk_norm: RMSNorm on queries and keys before they are routed.
        variance, mean_std: initial, of the mixture.
        share: initial lambda, the share of the decayed mean of all values that a read adds; None for none.
        tie: q_proj starts equal to k_proj.
        head_eps: of the norm per head.
        output_scale: factor of the initial o_proj; None for 1 / sqrt(2 layers).
        conv_and_gate: short convolution and output gate.
    """

    mixer: str = "mixture"
    components: int = 64
    mixtures: int = 1
    relative: bool = False
    unit_length: bool = False
    qk_norm: bool = False
    variance: float = 0.6931472
    mean_std: float = 0.5
    share: float | None = None
    tie: bool = False
    head_eps: float = 1e-6
    output_scale: float | None = 1.0
    conv_and_gate: bool = True

    def __post_init__(self):
        if self.mixer not in MIXERS:
            raise ValueError(f"There is no mixer {self.mixer!r}. Choose one of {list(MIXERS)}.")
        if self.components % self.mixtures:
            raise ValueError(f"{self.components} components are no multiple of {self.mixtures} mixtures.")


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model; `intermediate` is the width of the MLP."""

    vocab: int
    width: int
    layers: int
    heads: int
    intermediate: int


def rms_norm(x: Tensor, weight: Tensor, eps: float | Tensor = 1e-6) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def product_dtype(device) -> torch.dtype:
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`[models, rows, length, in]` by `[models, in, out]`."""
    dtype = product_dtype(x.device)
    return torch.bmm(x.to(dtype).flatten(1, 2), weight.to(dtype)).unflatten(1, x.shape[1:3])


def mix(x: Tensor, parameters: dict[str, Tensor], earlier: Tensor, valid: Tensor, block: Block, heads: int) -> Tensor:
    """The mixer and its output projection. `valid`, `[WIDTH, length]`, closes taps that reach into another sequence."""
    _, rows, length, width = x.shape
    dim, dtype = width // heads, product_dtype(x.device)
    states, gate, step, beta = linear(x, parameters["in_proj"]).split([3 * width, width, heads, heads], -1)
    if block.conv_and_gate:
        padded, taps = F.pad(states.float(), (0, 0, WIDTH - 1, 0)), parameters["conv"][:, None, None]
        states = F.silu(sum(padded[:, :, j : j + length] * valid[j][:, None] * taps[..., j] for j in range(WIDTH)))
    query, key, value = (
        part.unflatten(-1, (heads, dim)).permute(0, 3, 1, 2, 4) for part in states.split(width, dim=-1)
    )
    if block.mixer == "softmax":
        output = softmax_attention(query.to(dtype), key.to(dtype), value.to(dtype), earlier)
    else:
        query, key = query.float(), key.float()
        if block.qk_norm:
            query = rms_norm(query, parameters["q_norm"][:, None, None, None])
            key = rms_norm(key, parameters["k_norm"][:, None, None, None])
        step = F.softplus(step.float() + parameters["step_bias"][:, None, None]).permute(0, 3, 1, 2)
        log_decay = -parameters["log_rate"].exp()[:, :, None, None] * step
        query, key = (
            features(part.flatten(2, 3), parameters, block).unflatten(2, (rows, length)).to(dtype)
            for part in (query, key)
        )
        if block.mixer == "gated_delta":
            write = torch.sigmoid(beta.float()).permute(0, 3, 1, 2)
            output = delta_rule_read(query, key, value, write, log_decay, earlier)
        else:
            share = parameters["share"][:, :, None, None, None, None] if block.share is not None else None
            output = decayed_read(query, key, value.to(dtype), step, log_decay, earlier, share)
    # A tensor, so that blocks that differ in it alone are compiled once
    eps = parameters["head_eps"][:, None, None, None, None]
    output = rms_norm(output, parameters["head_norm"][:, None, None, None], eps)
    output = output.permute(0, 2, 3, 1, 4).flatten(3)
    if block.conv_and_gate:
        output = output * F.silu(gate.float())
    return linear(output, parameters["o_proj"])


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, earlier: Tensor) -> Tensor:
    """Causal softmax attention with RoPE within the sequences of a row."""
    models, _, rows, length, dim = query.shape
    exponents = torch.arange(dim // 2, device=query.device).float() / (dim // 2)
    angles = torch.arange(length, device=query.device).float()[:, None] * 10000**-exponents
    cos, sin = angles.cos(), angles.sin()

    def rotate(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)

    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (rotate(query), rotate(key), value))
    count = len(earlier)
    same = earlier | torch.eye(count, dtype=torch.bool, device=query.device)
    mask = same.repeat_interleave(length // count, 0).repeat_interleave(length // count, 1)
    mask = mask & torch.ones_like(mask).tril()
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return output.unflatten(0, (models, rows)).transpose(1, 2)


def block_forward(x: Tensor, parameters: dict[str, Tensor], earlier: Tensor, valid: Tensor, block: Block, heads: int):
    """One residual block, `[models, rows, length, width]` float32."""
    normed = rms_norm(x, parameters["input_norm"][:, None, None])
    x = x + mix(normed, parameters, earlier, valid, block, heads).float()
    gate, up = linear(rms_norm(x, parameters["mlp_norm"][:, None, None]), parameters["gate_up"]).float().chunk(2, -1)
    return x + linear(F.silu(gate) * up, parameters["down"]).float()


def rows_of_sequences(length: int, sequence_length: int, device) -> tuple[Tensor, Tensor]:
    """`earlier` and `valid` for rows of `length` tokens that hold sequences of `sequence_length`."""
    position = torch.arange(length, device=device) % sequence_length
    valid = torch.stack([(position >= WIDTH - 1 - tap).float() for tap in range(WIDTH)])
    return chunk_mask(length, sequence_length, device), valid


def hidden_states(
    parameters: dict[str, Tensor], tokens: Tensor, masks, block: Block, sizes: Sizes, forward: Callable = block_forward
) -> Tensor:
    """All blocks over `[models, rows, length]` tokens; the final norm is not in it."""
    models = torch.arange(tokens.shape[0], device=tokens.device)[:, None, None]
    x = parameters["embedding"][models, tokens]
    for index in range(sizes.layers):
        start = f"{index}."
        layer = {name.removeprefix(start): p for name, p in parameters.items() if name.startswith(start)}
        x = forward(x, layer, *masks, block, sizes.heads)
    return x


def make_parameters(block: Block, sizes: Sizes, seeds: list[int], device) -> dict[str, Tensor]:
    """Initial parameters of as many models as there are seeds."""
    drawn = [_draw(block, sizes, torch.Generator().manual_seed(seed)) for seed in seeds]
    parameters = {name: torch.stack([one[name] for one in drawn]).to(device) for name in drawn[0]}
    for name, parameter in parameters.items():
        parameter.requires_grad_(not name.endswith("head_eps"))
    return parameters


def _draw(block: Block, sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    width, heads = sizes.width, sizes.heads
    dim = width // heads

    def normal(*shape: int, std: float = 0.02) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return torch.rand(*shape, generator=generator) * (high - low) + low

    scale = (2 * sizes.layers) ** -0.5 if block.output_scale is None else block.output_scale
    parameters = {"embedding": normal(sizes.vocab, width), "norm": torch.ones(width)}
    for index in range(sizes.layers):
        in_proj = normal(width, 4 * width + 2 * heads)
        layer = {"conv": uniform(3 * width, WIDTH, low=-0.5, high=0.5)}
        if block.tie:
            in_proj[:, width : 2 * width] = in_proj[:, :width]
        layer |= {"in_proj": in_proj, "o_proj": normal(width, width) * scale}
        layer |= {"gate_up": normal(width, 2 * sizes.intermediate), "down": normal(sizes.intermediate, width)}
        layer |= {"input_norm": torch.ones(width), "mlp_norm": torch.ones(width), "head_norm": torch.ones(dim)}
        layer["head_eps"] = torch.tensor(float(block.head_eps))
        # As in Mamba-2: softplus(step_bias) is log-uniform in [0.001, 0.1], the rates uniform in [1, 16]
        step = uniform(heads, low=math.log(1e-3), high=math.log(1e-1)).exp()
        layer["step_bias"] = step + torch.log(-torch.expm1(-step))
        layer["log_rate"] = uniform(heads, low=1.0, high=16.0).log()
        if block.qk_norm:
            layer |= {"q_norm": torch.ones(dim), "k_norm": torch.ones(dim)}
        if block.mixer in ("mixture", "signed_sigmoids"):
            means = normal(heads, block.components, dim, std=block.mean_std)
            layer["means"] = means
            layer["raw_variances"] = torch.full_like(means, math.log(math.expm1(block.variance - 1e-4)))
            # All components are equally responsible for x = 0
            layer["prior_logits"] = 0.5 * means.square().sum(-1) / block.variance
            if block.mixer == "signed_sigmoids":
                layer["prior_logits"] += 0.5 * dim * math.log(block.variance)
        if block.share is not None:
            layer["share"] = torch.full((heads,), block.share)
        parameters |= {f"{index}.{name}": tensor for name, tensor in layer.items()}
    return parameters


class SideBySideAdamW:
    """AdamW with a rate and a gradient norm of its own for each of the models.

    Args:
        parameters: `[models, ...]`.
        rates: a learning rate a model.
        betas, weight_decay, max_norm: as usual; matrices, embeddings and convolutions are decayed.
    """

    def __init__(self, parameters: dict[str, Tensor], rates: list[float], betas, weight_decay=0.1, max_norm=1.0):
        names = [name for name, parameter in parameters.items() if parameter.requires_grad]
        self.parameters = [parameters[name] for name in names]
        self.decays = [weight_decay if name.split(".")[-1] in DECAYED else 0.0 for name in names]
        self.rates = self._spread(torch.tensor(rates, device=self.parameters[0].device))
        self.first, self.second = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.betas, self.max_norm, self.steps = betas, max_norm, 0

    def _spread(self, per_model: Tensor) -> list[Tensor]:
        return [per_model.view(-1, *[1] * (p.dim() - 1)) for p in self.parameters]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update with `factor` times the rates; gradients are None afterwards."""
        self.steps += 1
        (beta1, beta2), steps = self.betas, self.steps
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
        gradients = torch._foreach_mul(gradients, self._spread((self.max_norm / (norm + 1e-6)).clamp(max=1.0)))
        torch._foreach_lerp_(self.first, gradients, 1 - beta1)
        torch._foreach_mul_(self.second, beta2)
        torch._foreach_addcmul_(self.second, gradients, gradients, 1 - beta2)
        root = torch._foreach_sqrt(self.second)
        torch._foreach_mul_(root, (1 - beta2**steps) ** -0.5)
        torch._foreach_add_(root, 1e-8)
        update = torch._foreach_div(self.first, root)
        torch._foreach_mul_(update, factor / (1 - beta1**steps))
        torch._foreach_add_(update, torch._foreach_mul(self.parameters, [factor * decay for decay in self.decays]))
        torch._foreach_mul_(update, self.rates)
        torch._foreach_sub_(self.parameters, update)
        for parameter in self.parameters:
            parameter.grad = None
