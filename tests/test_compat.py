# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The private names of other libraries that gma_hf uses: after an upgrade of Transformers, PyTorch or Accelerate, the test of a
name that is gone fails by itself and says what the name was for.
"""

import ast
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipConfig,
    Trainer,
    TrainingArguments,
)

import gma_hf
from gma_hf import compat
from gma_hf.compat import OVERRIDDEN, PROCESSOR_MAPPINGS, USED, Missing, PrivateName


PACKAGE = Path(gma_hf.__file__).parent
OWN_NAMES = ("_gma_", "_softmax_implementations")
OF_NAMED_TUPLES = ("_replace", "_asdict", "_fields")


def tiny_llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=1,
        )
    ).eval()


@pytest.mark.parametrize("private", [*USED.values(), *OVERRIDDEN, *PROCESSOR_MAPPINGS], ids=lambda p: p.name)
def test_the_installed_version_still_has(private):
    private.find()


@pytest.mark.parametrize(
    "private",
    [PrivateName("torch.nn", "_gone", "an example"), PrivateName("transformers._gone", "x", "an example")],
    ids=lambda p: p.owner,
)
def test_a_name_that_is_gone_breaks_its_use_and_says_what_to_do(private):
    missing = compat.find_or_postpone(private)
    assert isinstance(missing, Missing)
    for use in (lambda: missing.get, missing):
        with pytest.raises(ImportError, match=r"which gma_hf needs: an example\. Install a version"):
            use()


def test_one_configuration_takes_an_attention_implementation_and_those_inside_it_do_not():
    config = SiglipConfig(attn_implementation="sdpa")
    compat.set_attention_implementation(config, "anything")
    assert compat.attention_implementation(config) == "anything"
    assert compat.attention_implementation(config.vision_config) == "sdpa"


def test_the_attention_implementation_decides_which_function_a_model_calls():
    calls = []

    def watch(module, query, key, value, attention_mask, **kwargs):
        calls.append(type(module).__name__)
        return query.transpose(1, 2), None

    transformers.AttentionInterface.register("gma_test_of_compat", watch)
    transformers.AttentionMaskInterface.register("gma_test_of_compat", lambda *args, **kwargs: None)
    model = tiny_llama()
    compat.set_attention_implementation(model.config, "gma_test_of_compat")
    model(torch.tensor([[3, 4]]))
    assert calls == ["LlamaAttention"]


def test_collected_attentions_are_seen_during_the_call_only():
    model = tiny_llama()
    model.set_attn_implementation("eager")
    seen = []
    attention = model.model.layers[0].self_attn
    attention.register_forward_hook(lambda *args: seen.append(set(compat.collected_outputs())))
    model(torch.tensor([[3, 4]]), output_attentions=True)
    model(torch.tensor([[3, 4]]))
    assert "attentions" in seen[0]
    assert "attentions" not in seen[1]
    assert compat.collected_outputs() == {}


def test_a_model_whose_class_was_changed_still_returns_its_hidden_states():
    model = tiny_llama()
    for module in (model, model.model):
        module.__class__ = type(f"Other{type(module).__name__}", (type(module),), {})
        compat.register_recorded_outputs(module)
    outputs = model(torch.tensor([[3, 4]]), output_hidden_states=True)
    assert [tuple(x.shape) for x in outputs.hidden_states] == [(1, 2, 16)] * 2


def test_what_is_marked_as_initialised_is_not_initialised_again():
    model = tiny_llama()
    marked, unmarked = model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.gate_proj
    before = marked.weight.clone(), unmarked.weight.clone()
    assert compat.is_initialized(marked), "`PreTrainedModel.__init__` marks what it initialised"
    for module in model.modules():
        module._is_hf_initialized = False
    compat.mark_initialized(marked)
    model.initialize_weights()
    assert torch.equal(marked.weight, before[0])
    assert not torch.equal(unmarked.weight, before[1])


def test_auto_classes_know_configurations_and_models():
    assert compat.config_class_of("llama") is LlamaConfig
    assert compat.config_class_of("no such type") is None
    assert "gma_llama" not in compat.transformers_model_types()
    assert compat.is_known_model_type("gma_llama")
    assert compat.auto_classes_of(LlamaConfig)["AutoModelForCausalLM"] is LlamaForCausalLM
    assert AutoModelForCausalLM._model_mapping[LlamaConfig] is LlamaForCausalLM


def test_a_configuration_shares_the_tokenizer_of_another_one(tmp_path):
    class OtherConfig(LlamaConfig):
        model_type = "gma_test_of_compat"

    transformers.AutoConfig.register("gma_test_of_compat", OtherConfig)
    compat.share_processors(OtherConfig, LlamaConfig)
    source = Path(__file__).parent / "data" / "version_0_1"
    tokenizer_file = next(source.rglob("tokenizer.json"), None)
    if tokenizer_file is None:
        from tokenizers import Tokenizer, models

        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    else:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file))
    tokenizer.save_pretrained(tmp_path)
    OtherConfig().save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("name", ["apply_rotary_pos_emb", "eager_attention_forward"])
def test_modeling_files_hold_their_own(name):
    attention = tiny_llama().model.layers[0].self_attn
    assert compat.function_of_modeling_file(attention, name) is getattr(transformers.models.llama.modeling_llama, name)
    assert compat.function_of_modeling_file(torch.nn.Linear(1, 1), name) is None


def test_torch_export_says_that_it_traces():
    seen = []

    class Model(torch.nn.Module):
        def forward(self, x):
            seen.append(compat.is_exporting())
            return x + 1

    assert hasattr(torch.compiler, "_is_exporting_flag")
    torch.export.export(Model(), (torch.zeros(2),), strict=False)
    Model()(torch.zeros(2))
    assert seen[0] is True
    assert seen[-1] is False


def test_forward_mode_and_transformations_are_seen():
    seen = []

    def function(x):
        seen.append((compat.is_forward_mode(), compat.is_transformed()))
        return (x * x).sum()

    x = torch.ones(2)
    function(x)
    torch.func.jvp(function, (x,), (x,))
    torch.func.grad(function)(x)
    torch.vmap(function)(x[None])
    with torch.autograd.forward_ad.dual_level():
        function(torch.autograd.forward_ad.make_dual(x, x))
    function(x)
    assert seen == [(False, False), (True, True), (False, True), (False, True), (True, False), (False, False)]


def test_tensors_can_be_marked_as_static():
    compat.mark_static_address(torch.zeros(2))


def test_a_trainer_prepares_a_batch(tmp_path):
    trainer = Trainer(tiny_llama(), TrainingArguments(tmp_path, report_to="none", use_cpu=True))
    batch = compat.prepare_inputs(trainer, {"input_ids": torch.tensor([[3, 4]])})
    assert batch["input_ids"].device == torch.device("cpu")
    assert batch["input_ids"].tolist() == [[3, 4]]


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps one state in a process, which other tests may have filled."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_model_that_accelerate_wrapped_gets_its_own_forward_pass_back(fresh_accelerate):
    model = tiny_llama()
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    accelerator.prepare_model(model)
    assert "forward" in vars(model), "accelerate no longer wraps the forward pass: `undo_preparation` is not needed"
    compat.undo_preparation(model)
    assert model(torch.tensor([[3, 4]])).logits.dtype == torch.float32
    assert model.forward.__func__ is LlamaForCausalLM.forward


def private_uses(path: Path) -> list[str]:
    """Where a file uses private names of other libraries."""
    overridden = {private.name for private in OVERRIDDEN}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module != "__future__":
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            found += [f"{path.name}:{node.lineno} {part}" for part in parts if part.startswith("_")]
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
            continue
        owner = node.value
        is_own = isinstance(owner, ast.Name) and owner.id in ("self", "cls")
        known = node.attr in (*overridden, *OF_NAMED_TUPLES) or node.attr.startswith(OWN_NAMES)
        if not known and not (is_own and node.attr != "_attn_implementation"):
            found.append(f"{path.name}:{node.lineno} {node.attr}")
    return found


def test_no_other_file_of_the_package_uses_private_names():
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "compat.py"]
    assert [use for path in files for use in private_uses(path)] == []
