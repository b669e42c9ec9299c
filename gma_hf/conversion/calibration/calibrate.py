# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Fit mixtures to data. The model reads a small corpus as its own teacher, with softmax. Queries and keys of every converted
layer are sampled during this pass. Then each head fits a mixture to its queries and keys, and widens the mixture until GMA
is nearest to softmax.

Why the mixtures are widened: the mixture that explains queries and keys best separates them so sharply that hardly any query
shares a component with a key. Reads and writes need a kernel of the width of softmax, exp(q . k scaled). So each head tries
the fitted variances, and their average over the components, times several temperatures. It takes the candidate with the
smallest error of its output. Behind a window, the weight of the memory is set so that the memory gets the attention that
softmax pays to the tokens outside of the window (sink tokens excepted, which stay visible): on average, and in its growth
with the text.

Mixtures under which queries share next to nothing with keys are rejected. Their memory has almost no effect, which may give
the smallest error at first. But the weight of such a memory is huge, so the smallest change of the mixture would give it an
effect.
"""

import dataclasses
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..checkpoints.install import values_kept_on_error
from ..config import expect_bool, whole_number
from ..runtime.layer import GMAConversion
from .data import Reservoir, as_it_is, join_batches, model_batches, no_cache
from .memory_weight import balance_memory, far_mass
from .mixture_fitting import FittedMixtures, expectation, fit_mixtures, inverse_softplus
from .teacher import SoftmaxCall, as_teacher, expect_gma_layers


# (average the variances over the components?, temperature)
WIDTHS = ((False, 1.0), (False, 4.0), *((True, 2.0**power) for power in range(7)))
VECTORS_PER_COMPONENT = 16  # queries and keys; with fewer vectors, mixtures fit the sample only
SMALLEST_GAIN = 0.99  # error after / error before, above which calibration changed nothing
SMALLEST_OVERLAP = (
    1e-6  # sum_c gamma^Q_c gamma^K_c of a query with the average key; useful mixtures have 1e-5 and more
)


@dataclasses.dataclass
class LayerCalibration:
    """
    The calibration of one layer. Numbers are means over its heads.

    Args:
        log_likelihood_before (`float`): log-likelihood of queries and keys under the old mixtures, in nats per vector.
        log_likelihood_after (`float`): log-likelihood under the fitted mixtures, before their widening.
        error_before (`float`): ||gma - softmax|| / ||softmax|| of the output of the attention, on the hidden states of the
            teacher, with the old mixtures.
        error_after (`float`): the same error with the new mixtures.
        temperature (`float`): the factor of the fitted variances, median over the heads.
        far_mass (`float`, *optional*): share of the attention of softmax outside of the window and outside of sink tokens;
            `None` without a window.
    """

    log_likelihood_before: float
    log_likelihood_after: float
    error_before: float
    error_after: float
    temperature: float
    far_mass: float | None = None


@dataclasses.dataclass
class CalibrationReport:
    """
    The result of [`calibrate`].

    Args:
        layers (`dict[str, LayerCalibration]`): the layers, by the name of the attention module.
        num_tokens (`int`): number of tokens that were read.
        num_samples (`int`): number of tokens that were kept per layer.
        seconds (`float`): duration.
    """

    layers: dict[str, LayerCalibration]
    num_tokens: int
    num_samples: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """
        The report as plain numbers, for JSON.

        Returns:
            `dict`: the fields by name.
        """
        return dataclasses.asdict(self)

    def mean(self, name: str) -> float:
        """
        The mean of one number over the layers.

        Args:
            name (`str`): name of a field of [`LayerCalibration`].

        Returns:
            `float`: the mean.
        """
        return sum(getattr(layer, name) for layer in self.layers.values()) / len(self.layers)


def calibrate(
    model: PreTrainedModel,
    data: Iterable,
    *,
    max_tokens: int = 200_000,
    num_samples: int = 4096,
    evaluation_tokens: int = 4096,
    batch_size: int = 8,
    em_steps: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> CalibrationReport:
    """
    Fit the mixtures of a converted model to the queries and keys that they will route, in place. The fit takes seconds to
    minutes. The weights that the model had before its conversion do not change.

    Args:
        model (`PreTrainedModel`): a model from [`convert_to_gma`], with the weights of the original.
        data (`Iterable`): batches (dictionaries of tensors, as a `DataLoader` returns them, or tensors of token ids `(batch,
            length)`), or single examples (rows of a data set with `input_ids`, which are batched and padded).
        max_tokens (`int`, *optional*, defaults to `200000`): the largest number of tokens to read.
        num_samples (`int`, *optional*, defaults to `4096`): how many tokens are kept per layer. Each token gives a query and
            a key per head.
        evaluation_tokens (`int`, *optional*, defaults to `4096`): how many of the first tokens choose the width of the
            mixtures and measure errors.
        batch_size (`int`, *optional*, defaults to `8`): examples per batch, if `data` are examples.
        em_steps (`int`, *optional*, defaults to `20`): steps of expectation maximisation.
        seed (`int`, *optional*, defaults to `0`): seed of the sample and of the first means.
        progress (`bool`, *optional*, defaults to `True`): whether to show progress bars.

    Returns:
        [`CalibrationReport`]: log-likelihoods and errors per layer, before and after.

    Raises:
        ValueError: if no layer of the model is converted, there are no data or too few, or no sequence is longer than the
            window.
        MemoryError: if the memory of the device is too small. The message says which argument to lower.

    After an error the mixtures are as before. A `UserWarning` says when the data are too few for a good fit, or when no
    candidate comes nearer to softmax.
    """
    start = time.monotonic()
    layers = expect_gma_layers(model)
    check_in_memory(layers)
    sizes = {"max_tokens": max_tokens, "num_samples": num_samples, "evaluation_tokens": evaluation_tokens}
    for name, value in {**sizes, "batch_size": batch_size}.items():
        whole_number(name, value, 1)
    for name, value in {"em_steps": em_steps, "seed": seed}.items():
        whole_number(name, value, 0)
    expect_bool("progress", progress)
    parameters = [parameter for layer in layers.values() for parameter in layer.parameters()]
    names = {layer: name for name, layer in layers.items()}
    reservoirs = {
        layer: Reservoir(num_samples, torch.Generator().manual_seed(seed + i)) for i, layer in enumerate(names)
    }
    longest = dict.fromkeys(names, 0)

    def collect(call: SoftmaxCall) -> None:
        reservoirs[call.layer].add(*call.routed(), call.real())
        longest[call.layer] = max(longest[call.layer], call.query.shape[2])

    num_tokens, evaluation, evaluated = 0, [], 0
    first = reservoirs[next(iter(names))]
    with values_kept_on_error(parameters), as_it_is(model), torch.no_grad(), explain_out_of_memory():
        with as_teacher(model, collect), tqdm(total=max_tokens, unit="token", disable=not progress) as bar:
            bar.set_description("Collecting queries and keys")
            for batch in model_batches(model, data, batch_size):
                model(**no_cache(model, batch))
                if evaluated < evaluation_tokens:
                    evaluation.append(batch)
                    evaluated = first.num_seen
                bar.update(first.num_seen - num_tokens)
                num_tokens = first.num_seen
                if num_tokens >= max_tokens:
                    break
        check_data(layers, num_tokens, longest)
        check_samples(layers, num_tokens, num_samples)

        fitted, likelihood_before = {}, {}
        for layer in tqdm(names, desc="Fitting mixtures", unit="layer", disable=not progress):
            samples = reservoirs.pop(layer).samples(layer.num_heads).float()
            means, variances, prior_logits = current_mixture(layer)
            with torch.autocast(samples.device.type, enabled=False):
                likelihood_before[layer] = expectation(samples, means, variances, prior_logits.log_softmax(dim=-1))[3]
            fitted[layer] = fit_mixtures(
                samples,
                means.shape[1],
                variance_floor=layer.mixture_norm.variance_floor,
                em_steps=em_steps,
                generator=torch.Generator(samples.device).manual_seed(seed),
            )

        reports = {}
        with tqdm(total=len(names), desc="Choosing widths", unit="layer", disable=not progress) as bar:

            def choose(call: SoftmaxCall) -> None:
                report = choose_width(call, fitted[call.layer])
                likelihood = (likelihood_before[call.layer], fitted[call.layer].log_likelihood[-1])
                reports[names[call.layer]] = LayerCalibration(*(x.mean().item() for x in likelihood), **report)
                bar.update()

            # One batch, so that a layer sees all evaluation tokens in one call
            with as_teacher(model, choose):
                model(**no_cache(model, join_batches(evaluation, evaluation_tokens / evaluated)))
    ordered = {name: reports[name] for name in layers}
    warn_if_useless(ordered, num_tokens)
    return CalibrationReport(ordered, num_tokens, min(num_samples, num_tokens), time.monotonic() - start)


def choose_width(call: SoftmaxCall, fitted: FittedMixtures) -> dict[str, Any]:
    """
    Give the layer of a call the fitted mixtures, with the best width for each head. Returns the errors before and after.
    """
    layer = call.layer
    real = call.real()
    before = output_errors(call, real)
    window = layer.window_norm
    far = None if window is None else far_mass(call, real)

    # The old mixture is a candidate, too, so that no head gets worse
    tied = (
        (fitted.prior_logits.exp()[..., None] * fitted.variances).sum(dim=1, keepdim=True).expand_as(fitted.variances)
    )
    widened = [(tied if is_tied else fitted.variances) * temperature for is_tied, temperature in WIDTHS]
    candidates = [current_mixture(layer), *((fitted.means, variances, fitted.prior_logits) for variances in widened)]
    temperatures = torch.tensor([1.0, *(temperature for _, temperature in WIDTHS)])
    errors, weights = [], []
    for candidate in candidates:
        set_mixture(layer, *candidate)
        if far is not None:
            balance_memory(call, real, far)
            weights.append((window.memory_bias.clone(), window.memory_dilution.clone()))
        # In nats, beside errors of about one, so that a candidate with less overlap than any useful mixture loses
        errors.append(output_errors(call, real) + (SMALLEST_OVERLAP / overlap(call, real)).log().clamp(min=0.0))
    best = torch.stack(errors).argmin(dim=0)  # [heads]
    heads = torch.arange(layer.num_heads, device=best.device)
    set_mixture(layer, *(torch.stack(parts)[best, heads] for parts in zip(*candidates, strict=True)))
    if far is not None:
        biases, dilutions = (torch.stack(values)[best, heads] for values in zip(*weights, strict=True))
        window.memory_bias.copy_(biases)
        window.memory_dilution.copy_(dilutions)
    num_real = call.query.shape[0] * call.query.shape[2] if real is None else real.sum()
    return {
        "error_before": before.mean().item(),
        "error_after": output_errors(call, real).mean().item(),
        "temperature": temperatures[best.cpu()].median().item(),
        "far_mass": None if far is None else (far.mean(dim=1).sum() / num_real).item(),
    }


def overlap(call: SoftmaxCall, real: Tensor | None) -> Tensor:
    """How much of a key a query finds in its components, gamma^Q . mean gamma^K; geometric mean over queries, `(heads,)`."""
    layer = call.layer
    query, key = call.routed()
    with torch.autocast(query.device.type, enabled=False):
        gamma_query, gamma_key = (layer.mixture_norm.responsibilities(x.float()) for x in (query, key))
    counted = (
        torch.ones(query.shape[0], 1, query.shape[2], device=query.device) if real is None else real[:, None].float()
    )
    weights = (counted / counted.sum()).unsqueeze(-1)
    mean_key = (gamma_key * weights).sum(dim=(0, 2))
    found = (gamma_query * mean_key[:, None]).sum(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return (found.log() * weights.squeeze(-1)).sum(dim=(0, 2)).exp()


def output_errors(call: SoftmaxCall, real: Tensor | None) -> Tensor:
    """||gma - softmax|| / ||softmax|| of every head over the real tokens, `(num_heads,)`."""
    target = call.output.float()
    difference = call.student().float() - target
    if real is not None:
        difference, target = (x * real[:, None, :, None] for x in (difference, target))
    norms = [x.square().sum(dim=(0, 2, 3)).sqrt() for x in (difference, target)]
    return norms[0] / norms[1].clamp(min=torch.finfo(torch.float32).tiny)


def current_mixture(layer: GMAConversion) -> tuple[Tensor, Tensor, Tensor]:
    """The current means, variances and prior logits, in float32."""
    mixture = layer.mixture_norm
    variances = F.softplus(mixture.raw_variances.float()) + mixture.variance_floor
    return mixture.means.float().clone(), variances, mixture.prior_logits.float().clone()


def set_mixture(layer: GMAConversion, means: Tensor, variances: Tensor, prior_logits: Tensor) -> None:
    mixture = layer.mixture_norm
    floor = mixture.variance_floor
    mixture.means.copy_(means)
    mixture.raw_variances.copy_(inverse_softplus((variances - floor).clamp(min=1e-6 * floor)))
    mixture.prior_logits.copy_(prior_logits)


def check_data(layers: dict[str, GMAConversion], num_tokens: int, longest: dict[GMAConversion, int]) -> None:
    """
    Check that the calibration set is large enough.

    Raises:
        ValueError: if the set is empty or too small, or its sequences are too short.
    """
    if num_tokens == 0:
        raise ValueError(
            "The calibration set is empty. Give batches, or examples with token ids; a few thousand tokens are enough."
        )
    for name, layer in layers.items():
        num_components = layer.mixture_norm.means.shape[1]
        if longest[layer] == 0:
            raise ValueError(f"{name} did not run on the calibration set. Add inputs that it works on.")
        if 2 * num_tokens < num_components:
            raise ValueError(
                f"The calibration set has {num_tokens} tokens, too few to fit {num_components} components per head. Give "
                "more text, or convert with fewer components."
            )
        window = layer.window_norm
        if window is not None and longest[layer] <= window.window_size + window.num_sink_tokens:
            sinks = f" but sink tokens ({window.num_sink_tokens})" if window.num_sink_tokens > 0 else ""
            raise ValueError(
                f"The sequences of the calibration set have {longest[layer]} tokens at most, so nothing ever leaves the "
                f"window of {window.window_size} tokens{sinks}. Give longer sequences, several times the window, or convert "
                "with a smaller `window_size`."
            )


def check_in_memory(layers: dict[str, GMAConversion]) -> None:
    """
    Check that all mixtures are in memory.

    Raises:
        ValueError: for mixtures that Accelerate offloaded, or that have no values yet, because they cannot be changed.
    """
    for name, layer in layers.items():
        if any(parameter.is_meta for parameter in layer.parameters()):
            raise ValueError(
                f"The mixtures of {name} are not in memory (meta device), so calibration could not change them. Calibrate "
                "the model before it is offloaded: offload the original, then convert and calibrate; or load the converted "
                "model with a `device_map` that keeps its converted layers in memory."
            )


def check_samples(layers: dict[str, GMAConversion], num_tokens: int, num_samples: int) -> None:
    """
    Warn of mixtures with too few queries and keys to be fitted well.

    Raises:
        ValueError: if there are fewer than components.
    """
    num_components = max(layer.mixture_norm.means.shape[1] for layer in layers.values())
    num_vectors = 2 * min(num_tokens, num_samples)
    if num_vectors < num_components:
        raise ValueError(
            f"`num_samples={num_samples}` keeps {num_vectors} queries and keys per head, too few to fit {num_components} "
            f"components. Give at least {VECTORS_PER_COMPONENT * num_components // 2}."
        )
    if num_vectors < VECTORS_PER_COMPONENT * num_components:
        warnings.warn(
            f"Calibration has {num_vectors} queries and keys per head to fit {num_components} components, "
            f"{num_vectors / num_components:.1f} for each: the mixtures will not hold for other text. Give at least "
            f"{VECTORS_PER_COMPONENT * num_components // 2} tokens, a few thousand are better, or convert with fewer components.",
            stacklevel=3,
        )


def warn_if_useless(layers: dict[str, LayerCalibration], num_tokens: int) -> None:
    """Warn if calibration has brought no layer nearer to softmax."""
    if all(layer.error_after >= SMALLEST_GAIN * layer.error_before for layer in layers.values()):
        before, after = (
            sum(getattr(layer, name) for layer in layers.values()) / len(layers)
            for name in ("error_before", "error_after")
        )
        warnings.warn(
            f"Calibration on {num_tokens} tokens brought no layer nearer to softmax: the mean error of the attention's output "
            f"was {before:.3g} and is {after:.3g}. Give more text, and text like that which the model was trained on.",
            stacklevel=3,
        )


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """
    Replace the error of a device without enough memory by one that says what to lower.

    Raises:
        MemoryError: instead of the error of the device.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise MemoryError(
                "The memory of the device is too small to calibrate like this. Lower `num_samples` (what is kept of queries "
                "and keys), `evaluation_tokens`, or the size of the batches."
            ) from error
        raise
