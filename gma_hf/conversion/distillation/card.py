# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The model card of a converted model: what it was, what became of it, and how it was brought back."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from ... import __version__
from ...training.cards.model_card import without_folder


# Names in the results, and how the card writes them: name, format, name on the hub
SCORES = {
    "eval_perplexity": ("perplexity", "{:.2f}", "perplexity"),
    "eval_kl": ("KL to the original (nats per token)", "{:.4f}", None),
    "eval_hidden_cosine": ("cosine to the original's hidden states", "{:.4f}", None),
    "eval_embedding_cosine": ("cosine to the original's embeddings", "{:.4f}", "cosine_similarity"),
}


def write_conversion_card(
    output_dir: str | Path,
    model: PreTrainedModel,
    task: str,
    auto_class: str,
    results: dict[str, Any],
    name: str | None = None,
) -> None:
    """
    Write `README.md`.

    Args:
        output_dir (`str` or `Path`): the folder of the model.
        model (`PreTrainedModel`): the converted model.
        task (`str`): the hub's pipeline tag.
        auto_class (`str`): the Auto class that loads the model.
        results (`dict`): `base_model`, `data`, `date`, `command`, `device`, `versions`; `conversion`, as
            [`convert_and_calibrate`] returns it; and, where they were measured, `evaluations`, from the name of a state to its
            scores, and `samples`, likewise to generated texts.
        name (`str`, *optional*): the model's name; by default that of the folder.
    """
    name = name or Path(output_dir).resolve().name
    evaluations = results.get("evaluations", {})
    last = list(evaluations.values())[-1] if evaluations else {}
    data_name = str(results["data"].get("dataset") or ", ".join(results["data"].get("train_files", ["local files"])))
    metadata = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag=task,
        tags=["gma", "gaussian-mixture-attention"],
        base_model=results["base_model"],
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type="local",
                dataset_name=f"held-out part of {data_name}",
                dataset_split="validation",
                metric_type=hub_name,
                metric_name=label,
                metric_value=last[key],
            )
            for key, (label, _, hub_name) in SCORES.items()
            if key in last and hub_name
        ]
        or None,
    )
    conversion = results["conversion"]
    num_layers = len(conversion["converted_layers"])
    options = {name: value for name, value in conversion["options"].items() if value not in (None, False, 0)}
    sections = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {name}",
        f"`{results['base_model']}`, whose softmax was replaced by Gaussian Mixture Attention in {num_layers} layers with "
        f"gma_hf {__version__} on {results['date'][:10]}. {model.num_parameters():,} parameters.",
        "## How to load it",
        f"```python\nimport gma_hf  # registers the architecture\nfrom transformers import {auto_class}, AutoTokenizer\n\n"
        f'model = {auto_class}.from_pretrained("{name}")\ntokenizer = AutoTokenizer.from_pretrained("{name}")\n```',
    ]
    if evaluations:
        sections += ["## What became of it", evaluation_table(evaluations)]
    sections += ["## Conversion", bullets(options)]
    if "calibration" in conversion:
        layers = conversion["calibration"]["layers"].values()
        before, after = (sum(x[key] for x in layers) / len(layers) for key in ("error_before", "error_after"))
        sections.append(
            f"The mixtures were fitted to {conversion['calibration']['num_tokens']:,} tokens. Relative error of the "
            f"attention's output, mean over the layers: {before:.3f} with random mixtures, {after:.3f} afterwards."
        )
    for state, texts in results.get("samples", {}).items():
        quoted = "\n\n".join("> " + text.replace("\n", "\n> ") for text in texts)
        sections.append(f"### Samples: {state}\n\n{quoted}")
    sections += [
        "## Data",
        bullets(results["data"]),
        "## How it was made",
        f"On {results['device']}:\n\n```bash\n{results['command']}\n```",
        bullets(results["versions"]),
    ]
    ModelCard("\n\n".join(sections) + "\n").save(Path(output_dir) / "README.md")


def evaluation_table(evaluations: dict[str, dict[str, float]]) -> str:
    """A line per state of the model, a column per score that was measured."""
    shown = [key for key in SCORES if any(key in scores for scores in evaluations.values())]
    lines = ["| | " + " | ".join(SCORES[key][0] for key in shown) + " |", "|---|" + "---:|" * len(shown)]
    for state, scores in evaluations.items():
        cells = [SCORES[key][1].format(scores[key]) if key in scores else "" for key in shown]
        lines.append(f"| {state} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bullets(values: dict[str, Any]) -> str:
    """A list of names and values, without the folders of this machine."""
    lines = []
    for name, value in values.items():
        if value is None:
            continue
        entries = value if isinstance(value, list) else [value]
        lines.append(f"- {name.replace('_', ' ')}: " + ", ".join(without_folder(str(entry)) for entry in entries))
    return "\n".join(lines)
