# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Every private name of Transformers, PyTorch and Accelerate that gma_hf uses, with the reason. No other file of the package
uses one.

A name that a new version has taken away breaks what needs the name, with a message, and not `import gma_hf`.
`tests/test_compat.py` has one test for each name.
"""

import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel


if TYPE_CHECKING:
    from transformers import Trainer


LARGEST_INTEGER = torch.iinfo(torch.int64).max  # that PyTorch computes with


class PrivateName(NamedTuple):
    """
    A private name of another library.

    Attributes:
        owner (`str`): the module that holds the name, or `"module:Class"` for a name of a class.
        name (`str`): the name.
        reason (`str`): what gma_hf needs the name for.
    """

    owner: str
    name: str
    reason: str

    @property
    def package(self) -> str:
        return self.owner.partition(".")[0].partition(":")[0]

    def find(self) -> Any:
        """
        Returns:
            The value of the name.

        Raises:
            ImportError: if the installed version does not have the name.
        """
        module_name, _, class_name = self.owner.partition(":")
        try:
            owner = importlib.import_module(module_name)
            return getattr(getattr(owner, class_name) if class_name else owner, self.name)
        except (ImportError, AttributeError) as error:
            raise ImportError(self.explain()) from error

    def explain(self) -> str:
        """The message for a name that is gone."""
        version = getattr(sys.modules.get(self.package), "__version__", "that is installed")
        return (
            f"{self.package} {version} has no `{self.name}` in {self.owner.replace(':', '.')}, which gma_hf needs: "
            f"{self.reason}. Install a version of {self.package} that requirements/tested.txt names."
        )


class Missing:
    """Replaces a private name that the installed version does not have. Every use raises an `ImportError`."""

    def __init__(self, private: PrivateName):
        self.__dict__["private"] = private

    def __getattr__(self, name: str):
        raise ImportError(self.private.explain())

    def __call__(self, *args, **kwargs):
        raise ImportError(self.private.explain())


USED = {
    "active_collector": PrivateName(
        "transformers.utils.output_capturing",
        "_active_collector",
        "a converted layer must know whether the caller collects attentions",
    ),
    "record_registry": PrivateName(
        "transformers.utils.output_capturing",
        "_CAN_RECORD_REGISTRY",
        "a converted model keeps the hidden states and attentions that its original can return",
    ),
    "config_mapping": PrivateName(
        "transformers.models.auto.configuration_auto",
        "CONFIG_MAPPING",
        "the configuration class of a model type",
    ),
    "config_mapping_names": PrivateName(
        "transformers.models.auto.configuration_auto",
        "CONFIG_MAPPING_NAMES",
        "the model types of Transformers, without an import of their models",
    ),
    "transform_getitem_to_index": PrivateName(
        "torch._dynamo._trace_wrapped_higher_order_op",
        "TransformGetItemToIndex",
        "mask functions of Transformers index tensors inside `torch.vmap`",
    ),
}

# Methods and attributes that Transformers reads from the classes of gma_hf, or that these classes call. A class overrides a
# name by defining it, so the name cannot be in this file.
OVERRIDDEN = (
    PrivateName(
        "transformers:PreTrainedModel", "_can_set_attn_implementation", "it reads the source of a class's module"
    ),
    PrivateName(
        "transformers:PreTrainedModel", "_check_and_adjust_attn_implementation", "'gma' is no choice of softmax layers"
    ),
    PrivateName("transformers:PreTrainedModel", "_is_stateful", "a running sum cannot be rolled back"),
    PrivateName(
        "transformers:PreTrainedModel", "_init_weights", "mixtures, gates and convolutions start in their own way"
    ),
    PrivateName(
        "transformers:PreTrainedModel",
        "_initialize_weights",
        "layers without parameters of their own start in their way, too",
    ),
    PrivateName(
        "transformers:PreTrainedModel", "_keys_to_ignore_on_load_missing", "older checkpoints lack some weights"
    ),
    PrivateName("transformers:PreTrainedModel", "_can_record_outputs", "hidden states and attentions are collected"),
    PrivateName("transformers:PreTrainedModel", "_no_split_modules", "`device_map` keeps each layer on one device"),
    PrivateName("transformers:PreTrainedModel", "_skip_keys_device_placement", "a cache stays where its layers are"),
    PrivateName("transformers:PreTrainedModel", "_supports_sdpa", "softmax layers of hybrid models"),
    PrivateName("transformers:PreTrainedModel", "_supports_flash_attn", "softmax layers of hybrid models"),
    PrivateName("transformers:PreTrainedModel", "_supports_flex_attn", "softmax layers of hybrid models"),
    PrivateName("transformers:PreTrainedModel", "_supports_attention_backend", "softmax layers of hybrid models"),
    PrivateName(
        "transformers:PreTrainedModel", "_can_compile_fullgraph", "`generate` compiles a static cache's steps"
    ),
    PrivateName("transformers:PreTrainedModel", "_supports_context_parallel", "a memory starts anew on every process"),
    PrivateName(
        "transformers:PreTrainedModel", "_tied_weights_keys", "the output layer shares the embeddings' weight"
    ),
    PrivateName("transformers:PreTrainedModel", "_tp_plan", "tensor parallelism of the output layer"),
    PrivateName("transformers:PreTrainedModel", "_pp_plan", "pipeline parallelism of the output layer"),
    PrivateName("torch.nn:Module", "_apply", "a cast of the model must not round the frequencies of rotary positions"),
    PrivateName(
        "transformers:GenerationMixin", "_prepare_cache_for_generation", "`generate` makes a cache of GMA states"
    ),
    PrivateName(
        "transformers:GenerationMixin", "_get_stopping_criteria", "models without positions have no maximum length"
    ),
)

# The registries of Transformers for tokenizers and processors of a configuration
PROCESSOR_MAPPINGS = (
    PrivateName("transformers.models.auto.tokenization_auto", "TOKENIZER_MAPPING", "AutoTokenizer"),
    PrivateName("transformers.models.auto.image_processing_auto", "IMAGE_PROCESSOR_MAPPING", "AutoImageProcessor"),
    PrivateName(
        "transformers.models.auto.feature_extraction_auto", "FEATURE_EXTRACTOR_MAPPING", "AutoFeatureExtractor"
    ),
    PrivateName("transformers.models.auto.processing_auto", "PROCESSOR_MAPPING", "AutoProcessor"),
)


def find_or_postpone(private: PrivateName) -> Any:
    """The value of a name; if the name is gone, an object that says so when it is used."""
    try:
        return private.find()
    except ImportError:
        return Missing(private)


_active_collector = find_or_postpone(USED["active_collector"])
TransformGetItemToIndex = find_or_postpone(USED["transform_getitem_to_index"])


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """The name of the attention implementation of a configuration. No public attribute holds the name."""
    return config._attn_implementation


def set_attention_implementation(config: PreTrainedConfig, name: str | None) -> None:
    """
    Set the attention implementation of one configuration, and of no configuration inside this one. The public
    `set_attn_implementation` is a method of models, checks the name, and changes every configuration of the model.
    """
    config._attn_implementation_internal = name


def collected_outputs() -> dict[str, Any]:
    """What the caller of a model collects, by the names of the outputs; empty outside of a call."""
    return _active_collector.get() or {}


def register_recorded_outputs(model: PreTrainedModel) -> None:
    """
    Register which outputs of the class of a model can be collected, as `PreTrainedModel.__init__` does. This is needed for a
    model whose class was changed after its construction.
    """
    dict.__setitem__(USED["record_registry"].find(), str(type(model)), model._can_record_outputs)


def is_initialized(module: nn.Module) -> bool:
    """Whether Transformers has loaded or initialised a module, so that nothing may initialise the module again."""
    return getattr(module, "_is_hf_initialized", False)


def mark_initialized(module: nn.Module) -> None:
    """Keep Transformers from initialising a module again."""
    module._is_hf_initialized = True


def config_class_of(model_type: str) -> type[PreTrainedConfig] | None:
    """The configuration class of a model type of Transformers; `None` if there is no such type."""
    if model_type not in transformers_model_types():
        return None
    return USED["config_mapping"].find()[model_type]


def transformers_model_types() -> tuple[str, ...]:
    """The model types that Transformers itself has, without an import of any model."""
    return tuple(USED["config_mapping_names"].find())


def is_known_model_type(model_type: str) -> bool:
    """Whether `AutoConfig` knows a model type, registered ones included."""
    return model_type in USED["config_mapping"].find()


def auto_classes_of(config_class: type[PreTrainedConfig]) -> dict[str, type[PreTrainedModel]]:
    """From the names of the Auto classes that know a configuration class to the model class of each."""
    modeling_auto = importlib.import_module("transformers.models.auto.modeling_auto")
    found = {}
    for auto_name in dir(modeling_auto):
        mapping = getattr(getattr(modeling_auto, auto_name), "_model_mapping", None)
        if auto_name.startswith("AutoModel") and mapping is not None and config_class in mapping:
            model_class = mapping[config_class]
            found[auto_name] = model_class[0] if isinstance(model_class, tuple) else model_class
    return found


def share_processors(config_class: type[PreTrainedConfig], other: type[PreTrainedConfig]) -> None:
    """Give a configuration class the tokenizers and processors that the Auto classes know for another one."""
    for private in PROCESSOR_MAPPINGS:
        mapping = private.find()
        if other in mapping:
            mapping.register(config_class, mapping[other], exist_ok=True)


def function_of_modeling_file(module: nn.Module, name: str) -> Callable | None:
    """
    A function of the file that defines a module's class; `None` if the file has no such function. Transformers writes
    `apply_rotary_pos_emb` and `eager_attention_forward` anew into every modeling file, and no registry knows them.
    """
    return getattr(sys.modules.get(type(module).__module__), name, None)


def is_exporting() -> bool:
    """
    Whether `torch.export` traces the code. Before PyTorch 2.13, `torch.compile` treated the public
    `torch.compiler.is_exporting()` as true, so this function reads the flag itself.
    """
    return getattr(torch.compiler, "_is_exporting_flag", False)


def can_use_flash_on_cpu(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether [`flash_attention_on_cpu`] can run: in float32 and without gradients, because its second result has none."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or query.device.type != "cpu":
        return False
    is_exact = query.dtype == key.dtype == value.dtype == torch.float32
    return is_exact and query.shape[3] == value.shape[3] and type(query) is Tensor and not is_exporting()


def flash_attention_on_cpu(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """
    Softmax attention and the logarithm of its normaliser, in one call. `scaled_dot_product_attention` computes the
    logarithm, but does not return it, and on a CPU no public function does.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, False, scale=scaling)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place. Autograd counts the changes, and no public name gives the number."""
    return tensor._version


def is_forward_mode() -> bool:
    """
    Whether forward mode differentiates the code: `torch.func.jvp`, `jacfwd`, `hessian`, dual numbers. Operators without a
    rule for forward mode would return results without tangents, which count as zero. A compiler reports such operators
    itself.
    """
    return not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0


def is_transformed() -> bool:
    """
    Whether a function of `torch.func` runs the code. Inside of `torch.vmap`, a tensor does not show whether a gradient is
    requested outside.
    """
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def is_exporting_to_onnx() -> bool:
    """Whether `torch.onnx.export(dynamo=True)` traces the code. ONNX has standard operators only."""
    return is_exporting() and torch.onnx.is_in_onnx_export()


def mark_static_address(tensor: Tensor) -> None:
    """Tell `torch.compile` that a tensor of a static cache stays where it is, so that CUDA graphs need no copy of it."""
    torch._dynamo.mark_static_address(tensor)


def execution_device(module: nn.Module) -> torch.device:
    """
    The device on which a module computes. The weights of a module that Accelerate offloads are on the CPU or on the disk,
    and appear as meta tensors. A hook of Accelerate moves the weights to the device of the computation for each call.
    """
    for submodule in module.modules():
        hook = getattr(submodule, "_hf_hook", None)
        for single in getattr(hook, "hooks", (hook,)):
            device = getattr(single, "execution_device", None)
            if device is not None:
                return torch.device(device)
        parameter = next(submodule.parameters(recurse=False), None)
        if parameter is not None and not parameter.is_meta:
            return parameter.device
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def parameters_without_values(module: nn.Module) -> list[str]:
    """The names of the parameters on the meta device that no hook of Accelerate loads for a call."""
    names = []
    for name, submodule in module.named_modules():
        if getattr(submodule, "_hf_hook", None) is None:
            own = submodule.named_parameters(recurse=False)
            names += [f"{name}.{key}".lstrip(".") for key, parameter in own if parameter.is_meta]
    return names


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether `add_adapter` put adapters into a model, so that `save_pretrained` saves the adapters alone."""
    return getattr(model, "_hf_peft_config_loaded", False)


@torch.compiler.assume_constant_result
def sequences_are_sharded() -> bool:
    """
    Whether the context parallelism of PyTorch, or the parallelism over sequences of Accelerate, is on: each process then has
    a part of every sequence.
    """
    parallelism = AcceleratorState._shared_state.get("parallelism_config")
    if parallelism is not None and any(
        # Older versions have no parallelism over sequences
        getattr(parallelism, name, False)
        for name in ("cp_enabled", "sp_enabled")
    ):
        return True
    # Without an import, because the module is loaded when a program calls `context_parallel`
    context_parallel = sys.modules.get("torch.distributed.tensor.experimental._context_parallel._attention")
    replaced = getattr(context_parallel, "_replaced_functions", ())
    return torch.nn.functional.scaled_dot_product_attention in replaced


def share_adapter_defaults() -> None:
    """
    Tell PEFT which modules its methods adapt by default: in a converted model the modules of its original, in a native model
    the modules of Llama, which have the same names. Before PEFT is imported, nothing happens. A second call changes nothing.
    """
    constants = sys.modules.get("peft.utils.constants")
    for name in dir(constants):
        mapping = getattr(constants, name)
        if not name.startswith("TRANSFORMERS_MODELS_TO_") or not isinstance(mapping, dict) or "gma_llama" in mapping:
            continue
        if "llama" in mapping:
            mapping.setdefault("gma", mapping["llama"])
        for model_type in list(mapping):
            if model_type != "gma":
                mapping.setdefault(f"gma_{model_type}", mapping[model_type])


def prepare_inputs(trainer: "Trainer", inputs: dict[str, Any]) -> dict[str, Any]:
    """
    A batch in the form in which a `Trainer` passes it to its model: on the device of the model, in the dtype of DeepSpeed.
    """
    return trainer._prepare_inputs(inputs)


def undo_preparation(model: nn.Module) -> None:
    """
    Restore the original forward pass of a model. `Accelerator.prepare` wraps the pass for mixed precision. The next
    `Trainer`, with other arguments, does not wrap a model again.
    """
    if "_original_forward" in vars(model):
        model.forward = vars(model).pop("_original_forward")
    vars(model).pop("_is_accelerate_prepared", None)
