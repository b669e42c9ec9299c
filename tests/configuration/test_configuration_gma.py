# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""A configuration is either possible and complete, or refused with the valid choice in the message."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import AutoConfig, PreTrainedConfig

import gma_hf
from gma_hf import GMAConfig


pytestmark = pytest.mark.quick


def test_defaults_are_the_papers_block():
    assert GMAConfig() == GMAConfig.from_preset("paper")
    config = GMAConfig()
    assert config.normalize_read and config.is_causal and config.position_embedding_type == "learned"
    assert not (config.conv_kernel_size or config.use_decay or config.use_write_weight or config.use_output_gate)
    assert set(config.layer_types) == {"linear_attention"}


def test_gated_preset_is_the_gated_block():
    config = GMAConfig.from_preset("gated", num_hidden_layers=3)
    assert config.conv_kernel_size == 4 and config.use_decay and config.use_write_weight and config.use_output_gate
    assert not config.normalize_read and not config.rope_on_routing
    assert config.num_hidden_layers == 3


@pytest.mark.parametrize("preset", ["gated", "correlated"])
def test_a_bidirectional_block_has_no_decay(preset):
    assert not GMAConfig.from_preset(preset, is_causal=False).use_decay


def test_the_correlated_preset_is_the_gated_block_that_correlates():
    config, gated = GMAConfig.from_preset("correlated"), GMAConfig.from_preset("gated")
    changed = {name for name, value in gated.to_dict().items() if config.to_dict()[name] != value}
    assert changed == {
        "correlate", "use_qk_norm", "variance_init", "mean_init", "head_norm_eps", "tie_qk_init", "scale_output_init"
    }  # fmt: skip
    assert config.correlate and config.variance_init == 10.0 and config.head_norm_eps == 1e-4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 100, "num_attention_heads": 12}, "not a multiple of `num_attention_heads`"),
        ({"num_attention_heads": 12, "num_key_value_heads": 5}, "must divide `num_attention_heads`"),
        ({"num_components": 0}, "`num_components` must be positive"),
        ({"hidden_size": 0}, "`hidden_size` must be positive"),
        ({"position_embedding_type": "alibi"}, "one of ['learned', 'rope', 'none']"),
        (
            {"layer_types": ["linear_attention", "sliding_attention"], "num_hidden_layers": 2},
            "'full_attention' (softmax)",
        ),
        ({"layer_types": ["linear_attention"], "num_hidden_layers": 2}, "one entry per layer"),
        ({"use_decay": True, "is_causal": False}, "`use_decay=True` needs `is_causal=True`"),
        ({"conv_kernel_size": 1}, "0 (no short convolution) or at least 2"),
        ({"conv_kernel_size": -1}, "0 (no short convolution) or at least 2"),
        ({"window_size": -1}, "0 (no window) or at least 1"),
        ({"window_size": 4, "num_sink_tokens": -1}, "0 (none) or at least 1, got -1"),
        ({"num_sink_tokens": 1}, "needs `window_size` above 0"),
        ({"window_size": 4, "num_sink_tokens": 1, "is_causal": False}, "is_causal=False. Set `num_sink_tokens` to 0"),
        ({"position_embedding_type": "rope", "routing_dim": 7}, "`routing_dim` must be even"),
        ({"variance_init": 1e-5}, "must exceed `variance_floor`"),
        ({"time_step_min": 0.5, "time_step_max": 0.1}, "must not be below `time_step_min`"),
        ({"decay_rate_range": (4.0, 2.0)}, "0 < low <= high"),
        ({"correlate": True}, "Got normalize_read=True"),
        ({"correlate": True, "normalize_read": False, "num_components": 1}, "num_components=1"),
        ({"correlate": True, "normalize_read": False, "window_size": 8}, "`window_size=0`"),
        ({"head_norm_eps": 1e-4}, "there is no norm per head"),
        ({"head_norm_eps": 0.0, "normalize_read": False}, "`head_norm_eps` must be positive"),
        ({"prior_init": "zipf"}, "one of ['uniform', 'balanced']"),
        ({"hidden_dropout": 1.0}, "must lie in [0, 1)"),
        ({"hidden_act": "swish2"}, "`hidden_act` must be one of ["),
        ({"position_embedding_type": "rope", "rope_parameters": {"rope_type": "2d"}}, "must be one of ['default',"),
        ({"initializer_range": float("nan")}, "`initializer_range` must not be negative, got nan"),
        ({"read_eps": float("nan")}, "`read_eps` must be positive, got nan"),
    ],
)
def test_impossible_values_are_refused_with_the_valid_choice(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GMAConfig(**values)


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=r"\['correlated', 'delta', 'gated', 'paper'\]"):
        GMAConfig.from_preset("mamba")


def test_a_configuration_survives_disk(tmp_path):
    config = GMAConfig.from_preset(
        "gated",
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        decay_rate_range=(2.0, 8.0),
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        num_labels=5,
    )
    config.save_pretrained(tmp_path)
    reloaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(reloaded, GMAConfig)
    original, reloaded = config.to_dict(), reloaded.to_dict()
    original["decay_rate_range"] = list(original["decay_rate_range"])
    reloaded.pop("_name_or_path"), original.pop("_name_or_path")
    assert reloaded == original


def test_every_field_is_read_somewhere():
    """A field that nothing reads promises something that does not happen."""
    package = Path(gma_hf.__file__).parent
    sources = "\n".join(path.read_text() for path in package.rglob("*.py") if path.name != "configuration_gma.py")
    inherited = {field.name for field in fields(PreTrainedConfig)}
    # These are read by Transformers: generation, initialisation, tying of weights
    read_by_transformers = {"bos_token_id", "eos_token_id", "use_cache", "tie_word_embeddings", "initializer_range"}
    unread = [
        field.name
        for field in fields(GMAConfig)
        if field.name not in inherited | read_by_transformers and not re.search(rf"config\.{field.name}\b", sources)
    ]
    assert unread == []
