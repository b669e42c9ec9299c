# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The classes of converted models, and their registration with the Auto classes. `LlamaForCausalLM` becomes
`GMALlamaForCausalLM`, with a `GMALlamaConfig` whose model type is "gma_llama". So a program without gma_hf refuses the
checkpoint, instead of loading it as a Llama without mixtures.

The classes are created when they are needed. Every class can be imported from this module by its name:

    from gma_hf.conversion.checkpoints.classes import GMALlamaForCausalLM

`import gma_hf` registers a placeholder for every model type of Transformers, so that `gma_llama` is known without importing
any model. The real classes are created and registered when a program needs one.
"""

import functools
import inspect
import json
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel

from ...cache_argument import CACHE_NAME, takes_cache, tells_wrappers
from ...compat import (
    attention_implementation,
    auto_classes_of,
    config_class_of,
    is_initialized,
    is_known_model_type,
    mark_initialized,
    share_adapter_defaults,
    share_processors,
    transformers_model_types,
)
from ...modeling.heads_common import (
    GMAGenerationMixin,
    adds_nothing_without_labels,
    adds_up_to_a_step,
    as_part_of_step,
    is_other_label,
    loss_type_of,
    trains_whole_steps,
)
from ...modeling.memory_parts import LACKING_BEFORE
from ...parallel.heads import PartOfRow
from ...remote_code import LoadsAlone, add_remote_code, expect_no_file, write_whole
from ..config import GMAConversionConfig
from ..runtime.attention import IMPLEMENTATION
from ..runtime.layer import GMAConversion
from .install import install_layers, restore_softmax_implementations, use_linear_masks


PREFIX = "GMA"
TYPE_PREFIX = "gma_"

# Projections of attention are computed in shards and gathered, because a mixture belongs to a whole head and every rank runs
# the attention. Modules between them that were sharded (norms of queries and keys) are whole again.
GATHERED_STYLES = {"colwise": "colwise_gather_output", "rowwise": "rowwise_split_input"}
ATTENTION_NAMES = ("attn", "attention")
# Arguments of heads that compute a loss without labels
LOSS_ARGUMENTS = ("return_loss", "bool_masked_pos", "mask_time_indices", "future_values")


class ConvertedConfigMixin:
    """
    The part of the configuration of a converted model that the original does not have.

    Attributes:
        gma (`dict`): the fields of [`GMAConversionConfig`].
    """

    def __post_init__(self, **kwargs):
        # `None` in the configurations that Transformers makes to learn the defaults
        if self.gma is not None:
            GMAConversionConfig.from_dict(self.gma)
        super().__post_init__(**kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Do nothing: every folder that `save_pretrained` writes already loads with `trust_remote_code=True`."""

    # GMA gives its implied affinity, for which no other attention implementation has to be chosen
    @property
    def output_attentions(self) -> bool:
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value: bool):
        if attention_implementation(self) == IMPLEMENTATION:
            self._output_attentions = value
        else:
            PreTrainedConfig.output_attentions.fset(self, value)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dictionary. PEFT reads from it which modules to adapt."""
        share_adapter_defaults()
        return super().to_dict()

    def validate_output_attentions(self):
        """Check `output_attentions`, as part of the `@strict` validation."""
        if attention_implementation(self) != IMPLEMENTATION:
            super().validate_output_attentions()

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True):
        """Write the configuration in one step. See [`PreTrainedConfig.to_json_file`] for the arguments."""
        write_whole(json_file_path, self.to_json_string(use_diff=use_diff))

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """
        Save the configuration, and a small file with which programs that do not import gma_hf load the folder by
        `trust_remote_code=True`. See [`PreTrainedConfig.save_pretrained`] for the arguments.

        Raises:
            ValueError: if the folder has a checkpoint of the original model, which would be overwritten.
        """
        self.expect_no_original(save_directory)
        add_remote_code(self, save_directory, "gma_hf.conversion.checkpoints.classes", auto_class_names(type(self)))
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def expect_no_original(self, save_directory: str | os.PathLike):
        config_file = Path(save_directory) / "config.json"
        if not config_file.is_file():
            return
        try:
            saved_type = json.loads(config_file.read_text(encoding="utf-8")).get("model_type")
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"{config_file} is damaged, so it does not tell which checkpoint the folder holds. Save to another folder, or "
                "delete the file if the checkpoint may be overwritten."
            ) from error
        if saved_type == self.softmax_class.model_type:
            raise ValueError(
                f"{save_directory} holds a {saved_type} checkpoint, which the converted model would overwrite. Save to "
                "another folder, or empty this one."
            )


class ConvertedModelMixin(PartOfRow, LoadsAlone):
    """The part of the class of a converted model that the original does not have."""

    # The context parallelism of PyTorch, which Transformers would use, does not pass the memory on; `gma_hf.context_parallel`
    # does
    _supports_context_parallel = False

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Do nothing: every folder that `save_pretrained` writes already loads with `trust_remote_code=True`."""

    @property
    def loss_type(self) -> str | None:
        return loss_type_of(self.softmax_class, vars(self).get("loss_type"))

    @loss_type.setter
    def loss_type(self, value: str | None):
        vars(self)["loss_type"] = value

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # Transformers looks for this in the source of the class's module, which a class made at run time has not
        return cls.softmax_class._can_set_attn_implementation()

    @property
    def _is_stateful(self) -> bool:
        # A running sum cannot be rolled back, as assisted decoding would need
        return any(layer["is_causal"] for layer in self.config.gma["layers"].values())

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """
        See [`PreTrainedModel.save_pretrained`].

        Raises:
            ValueError: if the folder is a file.
        """
        expect_no_file(save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

    def post_init(self):
        install_layers(self)
        super().post_init()
        self._keys_to_ignore_on_load_missing = {*(self._keys_to_ignore_on_load_missing or ()), LACKING_BEFORE}
        use_linear_masks(self)

    def _apply(self, fn, recurse=True):
        # A cast must not round the frequencies of rotary positions, as `from_pretrained(dtype=...)` does not
        frequencies = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name.endswith("inv_freq")
        ]
        super()._apply(fn, recurse)
        for module, name, buffer in frequencies:
            applied = getattr(module, name)
            if applied.dtype != buffer.dtype:
                setattr(module, name, buffer.to(applied.device))
        return self

    def initialize_weights(self):
        # `_init_weights` of models inside of this one does not know mixtures
        initialize_layers(module for module in self.modules() if isinstance(module, GMAConversion))
        super().initialize_weights()

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        # Converted layers always stay GMA; the name is for the remaining softmax layers
        if attn_implementation == IMPLEMENTATION:
            attn_implementation = None
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs):
        """Choose the attention implementation of the remaining softmax layers. Converted layers stay GMA."""
        restore_softmax_implementations(self)
        try:
            super().set_attn_implementation(attn_implementation, *args, **kwargs)
        finally:
            use_linear_masks(self)


def initialize_layers(layers: Iterable[GMAConversion]) -> None:
    """Initialise the new parameters of converted modules, unless they were loaded or initialised before."""
    for layer in layers:
        if not is_initialized(layer):
            layer.reset_parameters()
            for submodule in layer.modules():
                mark_initialized(submodule)


# Conversions in several threads must get the same classes
_lock = threading.RLock()


def made_once(function: Callable) -> Callable:
    """`functools.cache` for several threads: no value is computed twice."""
    cached = functools.cache(function)

    @functools.wraps(function)
    def locked(*args):
        with _lock:
            return cached(*args)

    return locked


@made_once
def converted_config_class(config_class: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """From `LlamaConfig` to `GMALlamaConfig`."""
    members = {
        "__module__": __name__,
        "__doc__": f"[`{config_class.__name__}`] of a model that was converted to Gaussian Mixture Attention.",
        "__annotations__": {"gma": Any},
        "gma": None,
        "model_type": TYPE_PREFIX + config_class.model_type,
        "softmax_class": config_class,
        "base_model_tp_plan": gathered_plan(config_class.base_model_tp_plan),
    }
    return strict(type(PREFIX + config_class.__name__, (ConvertedConfigMixin, config_class), members))


@made_once
def converted_model_class(
    model_class: type[PreTrainedModel], config_class: type[PreTrainedConfig]
) -> type[PreTrainedModel]:
    """From `LlamaForCausalLM`, with the `LlamaConfig` of its instances, to `GMALlamaForCausalLM`."""
    members = {
        "__module__": __name__,
        "__doc__": f"[`{model_class.__name__}`] that was converted to Gaussian Mixture Attention.",
        "config_class": converted_config_class(config_class),
        "softmax_class": model_class,
    }
    names = inspect.signature(model_class.forward).parameters
    if "labels" in names:
        # Many heads ignore `num_items_in_batch`, and some have no argument for it
        members |= {
            "forward": as_part_of_step(model_class.forward),
            "accepts_loss_kwargs": property(adds_up_to_a_step),
        }
    elif "start_positions" in names and "end_positions" in names:
        members["forward"] = adds_nothing_without_labels(model_class.forward)
    elif any(name in LOSS_ARGUMENTS or is_other_label(name) for name in names):
        members["forward"] = trains_whole_steps(model_class.forward)
    if CACHE_NAME == "cache" and CACHE_NAME in names:
        # Of a cache under each of two names, Transformers ignores one
        members["forward"] = takes_cache(members.get("forward", model_class.forward))
    generates = ()
    if issubclass(model_class, GenerationMixin):
        generates = (GMAGenerationMixin,)
        members["prepare_inputs_for_generation"] = tells_wrappers(model_class.prepare_inputs_for_generation)
    return type(PREFIX + model_class.__name__, (ConvertedModelMixin, *generates, model_class), members)


def gathered_plan(plan: dict[str, str] | None) -> dict[str, str] | None:
    """The tensor-parallel plan of a model whose attention is computed on every rank."""
    if plan is None:
        return None
    gathered = {}
    for name, style in plan.items():
        module_names = name.split(".")[:-1]
        if not any(module_name.endswith(ATTENTION_NAMES) for module_name in module_names):
            gathered[name] = style
        elif style in GATHERED_STYLES or style in GATHERED_STYLES.values():
            gathered[name] = GATHERED_STYLES.get(style, style)
    return gathered


def auto_class_names(config_class: type[PreTrainedConfig]) -> dict[str, str]:
    """From the Auto classes that know the original model to the names of the converted classes."""
    names = {"AutoConfig": config_class.__name__}
    for auto_name, model_class in softmax_auto_classes(config_class.softmax_class).items():
        names[auto_name] = PREFIX + model_class.__name__
    return names


@made_once
def softmax_auto_classes(config_class: type[PreTrainedConfig]) -> dict[str, type[PreTrainedModel]]:
    """From the names of the Auto classes that know a configuration of Transformers to its model class in each."""
    return auto_classes_of(config_class)


class ConvertedConfigPlaceholder:
    """Replaces the configuration class of a converted model type until the class is needed."""

    model_type: str

    def __new__(cls, *args, **kwargs) -> PreTrainedConfig:
        return cls.resolve()(*args, **kwargs)

    @classmethod
    def resolve(cls) -> type[PreTrainedConfig]:
        return register_converted_type(cls.model_type.removeprefix(TYPE_PREFIX))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> PreTrainedConfig:
        return cls.resolve().from_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> PreTrainedConfig:
        return cls.resolve().from_pretrained(*args, **kwargs)


def register_placeholders() -> None:
    """Register the model types of converted models. A second call changes nothing."""
    for model_type in transformers_model_types():
        name = TYPE_PREFIX + model_type
        if not is_known_model_type(name):
            placeholder = ConvertedConfigPlaceholder
            AutoConfig.register(name, type(placeholder.__name__, (placeholder,), {"model_type": name}))


@made_once
def register_converted_type(model_type: str) -> type[PreTrainedConfig]:
    """
    Register the converted classes of a model type of Transformers with the Auto classes that know the original.

    Args:
        model_type (`str`): for example "llama".

    Returns:
        `type[PreTrainedConfig]`: the converted configuration class.

    Raises:
        ValueError: if Transformers has no such model type.
    """
    softmax_config_class = config_class_of(model_type)
    if softmax_config_class is None:
        raise ValueError(
            f"{model_type!r} is no model type of the installed Transformers, so that a converted checkpoint could not be "
            "loaded again. Models with code of their own are not supported."
        )
    config_class = converted_config_class(softmax_config_class)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_name, model_class in softmax_auto_classes(softmax_config_class).items():
        converted = converted_model_class(model_class, softmax_config_class)
        getattr(transformers, auto_name).register(config_class, converted, exist_ok=True)
    share_processors(config_class, softmax_config_class)
    return config_class


def __getattr__(name: str):
    """`GMALlamaForCausalLM` and every other converted class, by its name: for imports, pickles and remote code."""
    original = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(original, type) and issubclass(original, PreTrainedConfig):
        return converted_config_class(original)
    if isinstance(original, type) and issubclass(original, PreTrainedModel):
        return converted_model_class(original, original.config_class)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
