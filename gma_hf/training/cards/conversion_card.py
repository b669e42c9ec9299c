# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The model card of a converted model: its original, its conversion, and its results."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from transformers import PreTrainedModel

from ... import __version__
from .frame import TAGS, bullets, loading_example, make_card, name_of_data, table


# From the names in the results to the name in the card, its format, and the name on the Hub
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
    Write `README.md`, the card of a converted model.

    Args:
        output_dir (`str` or `Path`): the folder of the model.
        model (`PreTrainedModel`): the converted model.
        task (`str`): the pipeline tag of the Hub.
        auto_class (`str`): the Auto class that loads the model.
        results (`dict`): `base_model`, `data`, `date`, `command`, `device`, `versions`; `conversion`, the result of
            [`convert_and_calibrate`]; and, if they were measured, `evaluations`, from the name of a state to its scores, and
            `samples`, from the name of a state to generated texts.
        name (`str`, *optional*): name of the model; by default the name of the folder.
    """
    name = name or Path(output_dir).resolve().name
    evaluations = results.get("evaluations", {})
    last = list(evaluations.values())[-1] if evaluations else {}
    eval_results = [
        EvalResult(
            task_type=task,
            dataset_type="local",
            dataset_name=f"held-out part of {name_of_data(results['data'])}",
            dataset_split="validation",
            metric_type=hub_name,
            metric_name=label,
            metric_value=last[key],
        )
        for key, (label, _, hub_name) in SCORES.items()
        if key in last and hub_name
    ]
    conversion = results["conversion"]
    options = {name: value for name, value in conversion["options"].items() if value not in (None, False, 0)}
    sections = [
        (
            None,
            f"`{results['base_model']}`, whose softmax was replaced by Gaussian Mixture Attention in "
            f"{len(conversion['converted_layers'])} layers with gma_hf {__version__} on {results['date'][:10]}. "
            f"{model.num_parameters():,} parameters.",
        ),
        ("How to load it", loading_example(name, auto_class)),
        ("Results", evaluation_table(evaluations) if evaluations else None),
        ("Conversion", bullets(options), _calibration(conversion), *_samples(results.get("samples", {}))),
        ("Data", bullets(results["data"])),
        (
            "How it was made",
            f"On {results['device']}:\n\n```bash\n{results['command']}\n```",
            bullets(results["versions"]),
        ),
    ]
    card = make_card(
        name,
        sections,
        model_name=name,
        pipeline_tag=task,
        tags=TAGS,
        base_model=results["base_model"],
        eval_results=eval_results or None,
    )
    card.save(Path(output_dir) / "README.md")


def _calibration(conversion: dict[str, Any]) -> str | None:
    if "calibration" not in conversion:
        return None
    layers = conversion["calibration"]["layers"].values()
    before, after = (sum(x[key] for x in layers) / len(layers) for key in ("error_before", "error_after"))
    return (
        f"The mixtures were fitted to {conversion['calibration']['num_tokens']:,} tokens. Relative error of the attention's "
        f"output, mean over the layers: {before:.3f} with random mixtures, {after:.3f} afterwards."
    )


def _samples(samples: dict[str, list[str]]) -> list[str]:
    quoted = {
        state: "\n\n".join("> " + text.replace("\n", "\n> ") for text in texts) for state, texts in samples.items()
    }
    return [f"### Samples: {state}\n\n{texts}" for state, texts in quoted.items()]


def evaluation_table(evaluations: dict[str, dict[str, float]]) -> str:
    """A table with a row per state of the model, and a column per measured score."""
    shown = [key for key in SCORES if any(key in scores for scores in evaluations.values())]
    rows = [
        [state, *(SCORES[key][1].format(scores[key]) if key in scores else "" for key in shown)]
        for state, scores in evaluations.items()
    ]
    return table(["", *(SCORES[key][0] for key in shown)], rows, left=1)
