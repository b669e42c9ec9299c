# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""
Train a small gated GMA language model on the source code of Python's standard library, which every machine has. Then evaluate
it, generate text, reload the model in a fresh process, and plot what its components specialised on.

    gma-hf demo            # some minutes on two cores; `make demo` stops after 60 steps
"""

import argparse
import keyword
import re
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging as transformers_logging

from .. import GMAConfig
from ..modeling import GMAMixture
from ..training import GMATrainer, GMATrainingArguments, PackedCollator, pack_documents, train_tokenizer
from ..training.errors import TrainingInputError
from ..training.metrics import language_model_metrics, token_statistics
from .shared.progress import show_progress


VOCAB_SIZE = 2048
BLOCK_SIZE = 256
NUM_FILES = 200  # about 3 MB of text
MARK = "demo.txt"  # marks a folder that the demo wrote and may overwrite
PROMPT = "def read_lines(path):\n"

RELOAD = """
import sys, torch, gma_hf
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokens, expected = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    logits = model(tokens).logits
assert torch.equal(logits, expected), "the logits differ"
print(f"{type(model).__name__} from a fresh process: logits identical, {tuple(logits.shape)}")
"""


def say(text: str):
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def standard_library() -> tuple[Dataset, Dataset]:
    """Source files of the standard library as documents, with some files held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__", "pydoc_data", "encodings"}
    files = sorted(path for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts))
    texts = [text for path in files if len(text := path.read_text(encoding="utf-8", errors="ignore")) > 500]
    texts = texts[:: max(1, len(texts) // NUM_FILES)][:NUM_FILES]
    held_out = texts[::20]
    train = [text for index, text in enumerate(texts) if index % 20 != 0]
    return tuple(Dataset.from_dict({"text": part, "document_end": [True] * len(part)}) for part in (train, held_out))


def category(token: str) -> str:
    """The surface category of a token."""
    word = token.strip(" ")
    if not token.strip():
        return "line break" if "\n" in token else "indentation"
    if keyword.iskeyword(word):
        return "keyword"
    if re.fullmatch(r"[A-Z]\w*", word):
        return "Capitalised"
    if re.fullmatch(r"[^\W\d]\w*", word):
        return "word" if token.startswith(" ") else "word part"
    if re.fullmatch(r"\d+", word):
        return "number"
    if any(quote in word for quote in "\"'#"):
        return "quote, comment"
    return "punctuation"


def visible(token: str) -> str:
    """A token as the plot writes it, with visible white space."""
    for white_space, mark in ((" " * 4, "→"), (" ", "·"), ("\n", "↵"), ("\t", "→"), ("$", r"\$")):
        token = token.replace(white_space, mark)
    return token


@torch.no_grad()
def plot_specialisation(model, tokenizer, blocks: Dataset, path: Path):
    """A heat map of the head whose components separate the categories of tokens best."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tokens = torch.tensor([blocks[index]["input_ids"] for index in range(min(24, len(blocks) - 1))])
    keys = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: keys.update({name: (module, args[1])}))
        for name, module in model.named_modules()
        if isinstance(module, GMAMixture)
    ]
    model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()

    strings = [tokenizer.decode([token]) for token in tokens.flatten().tolist()]
    labels = [category(string) for string in strings]
    names = sorted(set(labels), key=labels.count, reverse=True)
    one_hot = torch.nn.functional.one_hot(torch.tensor([names.index(label) for label in labels])).float()
    best = None
    for layer, (mixture, key) in enumerate(keys.values()):
        gamma = mixture.responsibilities(key).transpose(0, 1).flatten(1, 2)  # [heads, tokens, components]
        joint = gamma.transpose(1, 2) @ one_hot / len(labels)  # [heads, components, categories]
        independent = joint.sum(2, keepdim=True) * joint.sum(1, keepdim=True)
        information = (joint * (joint / independent.clamp(min=1e-12)).clamp(min=1e-12).log2()).sum((1, 2))
        head = int(information.argmax())
        if best is None or information[head] > best[0]:
            best = (information[head], layer, head, joint[head], independent[head], gamma[head])
    information, layer, head, joint, independent, gamma = best

    usage = joint.sum(1)
    shown = usage.argsort(descending=True)[:16]
    lift = (joint / independent.clamp(min=1e-12))[shown].clamp(min=1 / 8, max=8).log2()
    order = lift.argmax(1).argsort(stable=True)
    shown, lift = shown[order], lift[order]
    ticks = []
    for component in shown.tolist():
        # The share of the token's writes that goes to the component, minus the component's share of all writes
        excess: dict[str, float] = {}
        for string, weight in zip(strings, gamma[:, component].tolist(), strict=True):
            excess[string] = excess.get(string, 0.0) + weight - float(usage[component])
        top = sorted(excess, key=excess.get, reverse=True)[:4]
        top = [visible(string) for string in top]
        ticks.append(f"{'  '.join(top)}   ({usage[component]:.0%})")

    figure, axes = plt.subplots(figsize=(9, 6.5), layout="constrained")
    image = axes.imshow(lift, cmap="RdBu_r", vmin=-3, vmax=3, aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(ticks)), ticks, family="monospace", fontsize=8)
    axes.set_ylabel("component: its most characteristic tokens (share of all writes)")
    axes.set_title(f"What the components of layer {layer}, head {head} specialised on ({information:.2f} bits)")
    colorbar = figure.colorbar(image, ticks=range(-3, 4), label="how much likelier than average is the category?")
    colorbar.ax.set_yticklabels(["÷8", "÷4", "÷2", "1", "×2", "×4", "×8"])
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="gma-hf demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--max_steps", type=int, default=280)
    arguments = parser.parse_args(argv)
    folder = arguments.output_dir
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARK).is_file())):
        raise TrainingInputError(f"{folder} holds something that the demo did not write. Choose another --output_dir.")
    start = time.time()
    set_seed(0)
    transformers_logging.set_verbosity_error()

    say("1. Text: the source files of Python's standard library")
    train_text, held_out_text = standard_library()
    tokenizer = train_tokenizer(train_text["text"], VOCAB_SIZE)
    train, held_out = (
        pack_documents(text, tokenizer, tokenizer.eos_token_id, BLOCK_SIZE, name, keep_last=name != "train").blocks
        for name, text in (("train", train_text), ("validation", held_out_text))
    )
    held_out = held_out.select(range(min(32, len(held_out))))
    print(f"{len(train_text)} files, {len(train) * BLOCK_SIZE:,} tokens; {len(held_out_text)} files held out")

    say("2. A gated GMA language model, trained with the Trainer")
    config = GMAConfig.from_preset(
        "gated",
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_components=32,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    print(f"{model.num_parameters():,} parameters")
    trainer = GMATrainer(
        model=model,
        args=GMATrainingArguments(
            output_dir=str(arguments.output_dir),
            max_steps=arguments.max_steps,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=16,
            learning_rate=4e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.07,  # of the steps of the run
            weight_decay=0.1,
            adam_beta2=0.95,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            overwrite_output_dir=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=PackedCollator(tokenizer.pad_token_id),
        compute_metrics=language_model_metrics,
        preprocess_logits_for_metrics=token_statistics(shift_labels=True),
    )
    show_progress(trainer)
    before = trainer.evaluate()["eval_perplexity"]
    trainer.train()
    after = trainer.evaluate()
    print(f"perplexity on the held-out files: {before:,.0f} before, {after['eval_perplexity']:.1f} after training")
    print(f"effective components per head: {after['eval_mixture/usage_perplexity']:.1f} of {config.num_components}")

    say("3. It writes")
    model.eval()
    prompt = tokenizer(PROMPT, return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=100, do_sample=True, temperature=0.6, top_k=40)
    print(tokenizer.decode(written[0], skip_special_tokens=True))

    (folder / MARK).write_text("The demo of gma_hf writes this folder anew each time.\n", encoding="utf-8")
    say("4. Saved, and loaded through AutoModelForCausalLM in a fresh process")
    trainer.save_model()
    with torch.no_grad():
        torch.save(
            (prompt["input_ids"], model(prompt["input_ids"]).logits), arguments.output_dir / "expected_logits.pt"
        )
    command = [
        sys.executable,
        "-c",
        RELOAD,
        str(arguments.output_dir),
        str(arguments.output_dir / "expected_logits.pt"),
    ]
    print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    assert AutoTokenizer.from_pretrained(arguments.output_dir).decode(prompt["input_ids"][0]) == PROMPT

    say("5. What the components specialised on")
    plot_specialisation(model, tokenizer, held_out, arguments.output_dir / "components.png")
    print(f"{arguments.output_dir / 'components.png'}")
    say(f"Done in {time.time() - start:.0f} seconds. The model is in {arguments.output_dir}.")
