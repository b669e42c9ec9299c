# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The architectures of Transformers: which are tested, what to know about each, and which cannot be converted. You can try any
model whose attention goes through the attention interface of Transformers.
"""

from typing import NamedTuple

from transformers import PreTrainedModel


class Architecture(NamedTuple):
    """
    One row of the table of architectures.

    Args:
        model_type (`str`): the model type, as in config.json.
        kind (`str`): "decoder", "encoder", "encoder-decoder", "vision encoder", "vision and text encoders"; or "refused".
        tested (`bool`): whether the tests of gma_hf convert this architecture.
        notes (`str`, *optional*, defaults to `""`): what to know about the architecture, or why it is refused.
    """

    model_type: str
    kind: str
    tested: bool
    notes: str = ""


FUSED = "queries, keys and values are one fused projection, which stays as it is"
SLIDING = "a converted sliding-window layer sees the whole past"
LOCAL = "a converted local layer sees the whole sequence"
SOFTCAP = "soft-capping acts in the window (`window_size`) only"
CROSS = "cross-attention stays softmax"

REFUSED = "refused"
REASONS = {
    "it adds relative position biases to its attention scores": (
        "t5",
        "mt5",
        "umt5",
        "longt5",
        "pop2piano",
        "switch_transformers",
        "udop",
        "mpnet",
    ),
    "its attention scores are sums over contents and relative positions": ("deberta", "deberta-v2", "xlnet"),
    "it adds ALiBi biases to its attention scores": ("bloom", "mpt"),
    "it has no attention, its layers are recurrent already": ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"),
    "it attends in blocks or chunks, by masks that a mixture cannot follow": (
        "llama4",
        "llama4_text",
        "longformer",
        "led",
        "big_bird",
        "bigbird_pegasus",
        "reformer",
    ),
    "it computes its attention itself, not through Transformers' attention interface": ("falcon", "gptj", "codegen"),
    "layers of this model share their keys and values": ("gemma3n", "gemma3n_text"),
    "it is a GMA model already": ("gma",),
}

TABLE = (
    Architecture("llama", "decoder", True),
    Architecture("mistral", "decoder", True, SLIDING),
    Architecture("qwen2", "decoder", True, SLIDING),
    Architecture("qwen3", "decoder", True, f"norms of queries and keys stay; {SLIDING}"),
    Architecture("gemma2", "decoder", True, f"{SOFTCAP}; {SLIDING}"),
    Architecture("gemma3_text", "decoder", True, f"norms of queries and keys stay; {SLIDING}"),
    Architecture("phi3", "decoder", True, f"{FUSED}; {SLIDING}"),
    Architecture("gpt2", "decoder", True, FUSED),
    Architecture("gpt_neox", "decoder", True, FUSED),
    Architecture("opt", "decoder", True),
    Architecture("olmo2", "decoder", True, "norms of queries and keys stay"),
    Architecture("smollm3", "decoder", True, "some layers have no positions; they are converted alike"),
    Architecture("stablelm", "decoder", True),
    Architecture("starcoder2", "decoder", True, SLIDING),
    Architecture("granite", "decoder", True),
    Architecture("gpt_oss", "decoder", True, f"attention sinks act in the window (`window_size`) only; {SLIDING}"),
    Architecture("bert", "encoder", True),
    Architecture("roberta", "encoder", True),
    Architecture("distilbert", "encoder", True),
    Architecture("electra", "encoder", True),
    Architecture("modernbert", "encoder", True, f"{FUSED}; {LOCAL}"),
    Architecture("vit", "vision encoder", True),
    Architecture("deit", "vision encoder", True),
    Architecture("dinov2", "vision encoder", True),
    Architecture("siglip", "vision and text encoders", True, "`layers=['vision_model']` or `['text_model']` for one"),
    Architecture("siglip_vision_model", "vision encoder", True),
    Architecture("siglip_text_model", "encoder", True),
    Architecture("bart", "encoder-decoder", True, f"`layers=['encoder']` or `['decoder']` for one; {CROSS}"),
    Architecture("whisper", "encoder-decoder", True, f"`layers=['encoder']` or `['decoder']` for one; {CROSS}"),
    *(
        Architecture(model_type, REFUSED, False, reason)
        for reason, model_types in REASONS.items()
        for model_type in model_types
    ),
)


def supported_architectures() -> tuple[Architecture, ...]:
    """
    The table of architectures.

    Returns:
        `tuple[Architecture, ...]`: the rows. A row of the kind "refused" cannot be converted, and `notes` says why. An
        architecture without a row can be tried: it can be converted if its attention goes through the attention interface of
        Transformers.
    """
    return TABLE


def supported_list() -> str:
    """One sentence with the tested model types."""
    tested = ", ".join(row.model_type for row in TABLE if row.tested)
    return f"Tested architectures are: {tested}. Others that use the interface can be tried."


def check_architecture(model: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: if the architecture is known not to work.
    """
    model_type = model.config.model_type
    for row in TABLE:
        if row.model_type == model_type and row.kind == REFUSED:
            raise ValueError(f"A {model_type} model cannot be converted: {row.notes}. {supported_list()}")
