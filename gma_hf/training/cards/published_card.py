# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
The card of a published model, from prose that a person wrote and from measured numbers, each in its own file.

The folder of a card has `card.yaml` (what the model is for, its training data, its limits), `recipe.yaml` (the arguments of
the training command) and `results.json` (the measurements of the training command and of `gma-hf card`). `README.md` is made
from these files. Do not edit it.
"""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..errors import TrainingInputError
from ..intervals import CONFIDENCE
from .frame import TAGS, bullets, loading_example, make_card, table


BIBTEX = """\
@article{huang2026gaussian,
  title   = {Gaussian Mixture Attention: Linear-Time Sequence Mixing via Probabilistic Latent Routing},
  author  = {Huang, Y. and Raza, H.},
  journal = {arXiv preprint arXiv:2606.18283},
  year    = {2026}
}"""
# A sentence that marks every card of this module
MADE_HERE = "The operator is the work of Y. Huang and H. Raza; the package is `gma_hf`."
WITHOUT_IMPORT = "Programs that do not import `gma_hf` pass `trust_remote_code=True`; the package must be installed."
# Scores of `evaluate_text`: name in the results, in the card, on the hub
SCORES = (("perplexity", "perplexity", "perplexity"), ("word_perplexity", "perplexity per word", "word_perplexity"))


@dataclass
class Energy:
    """
    The assumptions of the estimate of energy and carbon.

    Args:
        power_watts (`float`): power of one device during the training.
        grams_co2_per_kwh (`float`): grams of CO2 equivalent per kWh of electricity.
        source (`str`): the source of the two numbers.
    """

    power_watts: float
    grams_co2_per_kwh: float
    source: str


@dataclass
class CardDescription:
    """
    The prose about a model: the fields of `card.yaml`. Texts are Markdown.

    Args:
        title (`str`): title of the card.
        summary (`str`): the model in two sentences.
        intended_use (`str`): what the model is for, and what it is not for.
        training_data (`str`): the training text, with its licence.
        limits (`str`): what the model does not do well, and what differs from the usual setting.
        license (`str`): identifier of the licence of the weights on the Hub.
        auto_class (`str`): the Auto class that loads the model.
        pipeline_tag (`str`): name of the task on the Hub.
        language (`list[str]`): ISO 639 codes.
        datasets (`list[str]`): names of the training data on the Hub.
        tags (`list[str]`): further tags.
        base_model (`str`, *optional*): the checkpoint from which the model was made.
        evaluation_data (`dict`): for every evaluation of `results.json`: `type` (name on the Hub), `name`, and perhaps
            `config`, `split` and the `label` for the card.
        energy ([`Energy`], *optional*): assumptions of the estimate. Without them there is no estimate.
    """

    title: str
    summary: str
    intended_use: str
    training_data: str
    limits: str
    license: str = "apache-2.0"
    auto_class: str = "AutoModelForCausalLM"
    pipeline_tag: str = "text-generation"
    language: list[str] = field(default_factory=lambda: ["en"])
    datasets: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    base_model: str | None = None
    evaluation_data: dict[str, dict[str, str]] = field(default_factory=dict)
    energy: Energy | None = None

    @classmethod
    def from_yaml(cls, path: Path) -> "CardDescription":
        """
        Read `card.yaml`.

        Raises:
            TrainingInputError: if it is missing, is no mapping, lacks a field or has an unknown field.
        """
        if not path.is_file():
            raise TrainingInputError(
                f"There is no {path}. It says what the model is for: {', '.join(_names(cls))} (those with a default may be "
                "left out)."
            )
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TrainingInputError(f"{path} must hold names and values, for example 'title: GMA on WikiText-103'.")
        energy = values.pop("energy", None)
        try:
            return cls(**values, energy=None if energy is None else Energy(**energy))
        except TypeError as error:
            raise TrainingInputError(f"{path}: {str(error).split('__init__() ')[-1]}.") from error


def write_published_card(folder: str | Path, repo_id: str | None = None) -> Path:
    """
    Write `README.md` from `card.yaml`, `recipe.yaml` and `results.json` of the folder of a card.

    Args:
        folder (`str` or `Path`): the folder of the card.
        repo_id (`str`, *optional*): name on the Hub for the example; by default the name of the folder.

    Returns:
        `Path`: the file.

    Raises:
        TrainingInputError: if a file is missing or wrong, or the Hub would refuse the metadata.
    """
    folder = Path(folder)
    description = CardDescription.from_yaml(folder / "card.yaml")
    if not (folder / "results.json").is_file():
        raise TrainingInputError(
            f"There is no {folder / 'results.json'}: a card without measurements is not written. Measure with "
            "gma-hf card --model."
        )
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    recipe = folder / "recipe.yaml"
    card = published_card(
        description,
        results,
        recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
        repo_id or folder.resolve().name,
    )
    check_metadata(card)
    readme = folder / "README.md"
    expect_made_here(readme)
    card.save(readme.with_suffix(".tmp"))
    readme.with_suffix(".tmp").replace(readme)
    return readme


def expect_made_here(readme: Path) -> None:
    """
    Check that this command made a README, so that no text of a person is lost.

    Raises:
        TrainingInputError: if a person wrote the file.
    """
    if readme.is_file() and MADE_HERE not in readme.read_text(encoding="utf-8"):
        raise TrainingInputError(
            f"{readme} was not made by this command, and would be overwritten. Move the file away; its prose belongs into "
            "card.yaml."
        )


def published_card(description: CardDescription, results: dict[str, Any], recipe: str | None, name: str) -> ModelCard:
    """
    Build the card.

    Args:
        description (`CardDescription`): the prose.
        results (`dict`): `results.json` of a training command. `evaluations` maps a name to the result of `evaluate_text`.
        recipe (`str`, *optional*): text of the recipe.
        name (`str`): name for the example.

    Returns:
        `ModelCard`: the card.
    """
    evaluations = results.get("evaluations", {})
    facts = {"parameters": results.get("num_parameters"), "processes": results.get("num_processes")}
    facts |= {name: results.get(name) for name in ("date", "device")}
    script = "train_clm" if description.pipeline_tag == "text-generation" else "train_mlm"
    procedure = [bullets({**facts, **results.get("data", {}), **results.get("details", {})})]
    if recipe is not None:
        procedure.append(f"The recipe ([recipe.yaml](recipe.yaml)), which `scripts/{script}.py` takes:")
        procedure.append(f"```yaml\n{recipe.strip()}\n```")
    if "command" in results:
        procedure.append(f"The command:\n\n```bash\n{results['command']}\n```")
    labels = {name: data.get("label", name) for name, data in description.evaluation_data.items()}
    shown = [results_table(evaluations, labels), _how_measured(evaluations)] if evaluations else []
    loading = loading_example(name, description.auto_class)
    sections = [
        (None, description.summary),
        ("How to load it", f"{loading}\n\n{WITHOUT_IMPORT}"),
        ("Intended use", description.intended_use),
        ("Training data", description.training_data),
        ("Procedure", *procedure),
        ("Results", *shown),
        ("Limits", description.limits),
        ("Time, energy, carbon", energy_estimate(description.energy, results)),
        ("Versions", bullets(results.get("versions", {}))),
        ("Citation", MADE_HERE, f"```bibtex\n{BIBTEX}\n```"),
    ]
    return make_card(
        description.title,
        sections,
        model_name=description.title,
        pipeline_tag=description.pipeline_tag,
        license=description.license,
        language=description.language,
        tags=[*TAGS, *description.tags],
        datasets=description.datasets or None,
        base_model=description.base_model,
        eval_results=_eval_results(description, evaluations) or None,
    )


def results_table(evaluations: dict[str, dict[str, Any]], labels: dict[str, str]) -> str:
    """A row per text and score, with the confidence interval. `labels` are readable names of the texts."""
    rows = []
    for name, scores in evaluations.items():
        for key, label, _ in SCORES:
            if key in scores:
                low, high = scores[f"{key}_interval"]
                rows.append([labels.get(name, name), label, f"{scores[key]:.2f}", f"{low:.2f} to {high:.2f}"])
    return table(["text", "score", "value", f"{CONFIDENCE:.0%} interval"], rows, left=2)


def results_of_row(report: dict[str, Any], name: str) -> dict[str, Any]:
    """
    The results for a card from a row of a benchmark that trained the model, such as
    `benchmarks/quality/language_modeling.py`.

    Args:
        report (`dict`): content of the JSON file of the benchmark: `setting`, and `rows` with `command`, `date`, `device`,
            `versions`, `parameters`, `train_seconds`, and `<text>_perplexity` and `<text>_word_perplexity`, each with its
            `..._interval`.
        name (`str`): name of the row.

    Returns:
        `dict`: the results.

    Raises:
        TrainingInputError: if there is no such row.
    """
    if name not in report["rows"]:
        raise TrainingInputError(f"There is no row {name!r}; the file has {', '.join(report['rows']) or 'none'}.")
    row = report["rows"][name]
    evaluations: dict[str, dict[str, Any]] = {}
    for key in row:
        found = re.fullmatch(r"(\w+?)_((?:word_)?perplexity)", key)
        if found and f"{key}_interval" in row:
            text, score = found.groups()
            evaluations.setdefault(text, {}).update({score: row[key], f"{score}_interval": row[f"{key}_interval"]})
    told = {"command", "date", "device", "parameters", "train_seconds", "total_seconds"}
    told |= {"redraw_interval", "extrapolation_bucket"}  # of other rows, or of how the model was measured
    details = {
        key: value
        for key, value in {**report["setting"], **row}.items()
        if key not in told and "perplexity" not in key and isinstance(value, (int, float, str))
    }
    return {
        **{key: row[key] for key in ("command", "date", "device", "versions")},
        "num_parameters": row["parameters"],
        "num_processes": 1,
        "details": details,
        "metrics": {"train_runtime": row["train_seconds"]},
        "evaluations": evaluations,
    }


def energy_estimate(energy: Energy | None, results: dict[str, Any]) -> str | None:
    """The measured time, and energy and carbon from assumptions; `None` without a measured time."""
    seconds = results.get("metrics", {}).get("train_runtime")
    if seconds is None:
        return None
    hours = seconds / 3600 * results.get("num_processes", 1)
    text = f"Training took {hours:.2g} device hours ({results.get('device', 'unknown device')})."
    if energy is None:
        return text
    kwh = hours * energy.power_watts / 1000
    return (
        f"{text} Energy and carbon are estimates and were not measured: {kwh:.2g} kWh at {energy.power_watts:g} W, and "
        f"{kwh * energy.grams_co2_per_kwh:.2g} g of CO2 equivalent at {energy.grams_co2_per_kwh:g} g per kWh. Assumptions: "
        f"{energy.source} The estimate does not include the rest of the machine, cooling, and earlier runs."
    )


def check_metadata(card: ModelCard) -> None:
    """
    Check the metadata of a card as far as this is possible without the Hub.

    Raises:
        TrainingInputError: with the missing or wrong field, and the expected values.
    """
    data = card.data
    problems = []
    for name in ("license", "pipeline_tag", "library_name", "language"):
        if not getattr(data, name, None):
            by_option = f" (--{name})" if name in ("license", "language") else ""
            problems.append(f"{name} is missing{by_option}")
    if data.license and not re.fullmatch(r"[a-z0-9]+([.+-][a-z0-9]+)*\+?", str(data.license)):
        problems.append(f"license {data.license!r} is no identifier such as apache-2.0 or cc-by-sa-4.0")
    if data.license == "other" and not (data.license_name and data.license_link):
        problems.append("license 'other' needs license_name and license_link")
    if data.pipeline_tag and data.pipeline_tag not in known_tasks():
        problems.append(f"pipeline_tag {data.pipeline_tag!r} is none of {', '.join(known_tasks())}")
    for language in _listed(data.language):
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual", str(language)):
            problems.append(f"language {language!r} is no ISO 639 code such as en")
    for name in ("datasets", "base_model"):
        for value in _listed(getattr(data, name, None)):
            try:
                validate_repo_id(str(value))
            except HFValidationError as error:
                problems.append(f"{name}: {error}")
    try:
        ModelCard(str(card))  # the hub's own reader: YAML, model-index, types of its entries
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        problems.append(str(error))
    for result in data.eval_results or []:
        if isinstance(result.metric_value, bool) or not isinstance(result.metric_value, (int, float)):
            problems.append(f"the result {result.metric_type!r} has the value {result.metric_value!r}, not a number")
    if problems:
        raise TrainingInputError("The metadata of the model card would be refused: " + "; ".join(problems) + ".")


def known_tasks() -> list[str]:
    """The values of `pipeline_tag` that a Transformers model may have."""
    from transformers.pipelines import PIPELINE_REGISTRY

    return sorted({*PIPELINE_REGISTRY.get_supported_tasks(), "sentence-similarity"})


def _listed(value: Any) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _eval_results(description: CardDescription, evaluations: dict[str, dict[str, Any]]) -> list[EvalResult]:
    found = []
    for name, scores in evaluations.items():
        data = description.evaluation_data.get(name, {})
        for key, label, hub_name in SCORES:
            if key in scores:
                found.append(
                    EvalResult(
                        task_type=description.pipeline_tag,
                        dataset_type=data.get("type", "local"),
                        dataset_name=data.get("name", name),
                        dataset_config=data.get("config", None if data else name),
                        dataset_split=data.get("split", "test"),
                        metric_type=hub_name,
                        metric_name=label,
                        metric_value=scores[key],
                    )
                )
    # The Hub keeps one name for results that agree in everything else, so the numbers of one data set would appear under the
    # other
    names: dict[tuple, str] = {}
    for result in found:
        first = names.setdefault(result.unique_identifier, result.dataset_name)
        if first != result.dataset_name:
            raise TrainingInputError(
                f"{first!r} and {result.dataset_name!r} have the same type, config and split: give them different ones in "
                "`evaluation_data`."
            )
    return found


def _how_measured(evaluations: dict[str, dict[str, Any]]) -> str:
    sizes = ", ".join(
        f"{name}: {scores['num_tokens']:,} tokens and {scores['num_words']:,} words in {scores['num_windows']:,} windows of "
        f"{scores['block_size']:,}"
        for name, scores in evaluations.items()
        if "num_tokens" in scores
    )
    return (
        f"Every token is predicted once, from its own window{f' ({sizes})' if sizes else ''}. The intervals come from a "
        "moving-block bootstrap over the windows. They show how much other texts of the same kind would change the numbers, "
        "and not how much other seeds of the training would."
    )
