# Copyright 2026 The gma_hf authors. Licensed under the Apache License, Version 2.0.
"""The training of the demo: a small gated language model of the source code of Python's standard library, which every machine has."""

import sysconfig
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ... import GMAConfig
from ...training import GMATrainer, GMATrainingArguments, PackedCollator, pack_documents, train_tokenizer
from ...training.metrics import language_model_metrics, token_statistics
from .progress import show_progress


VOCAB_SIZE = 2048
BLOCK_SIZE = 256
NUM_FILES = 200  # about 3 MB of text


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


def train_small_model(folder: Path, max_steps: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """
    Train, save, and print perplexities before and after.

    Args:
        folder (`Path`): where the model and its tokenizer are saved.
        max_steps (`int`): steps of 2,048 tokens.

    Returns:
        `tuple[PreTrainedModel, PreTrainedTokenizerBase, str]`: the model, its tokenizer, and text that it never saw.
    """
    train_text, held_out_text = standard_library()
    tokenizer = train_tokenizer(train_text["text"], VOCAB_SIZE)
    train, held_out = (
        pack_documents(text, tokenizer, tokenizer.eos_token_id, BLOCK_SIZE, name, keep_last=name != "train").blocks
        for name, text in (("train", train_text), ("validation", held_out_text))
    )
    held_out = held_out.select(range(min(32, len(held_out))))
    print(f"{len(train_text)} files, {len(train) * BLOCK_SIZE:,} tokens; {len(held_out_text)} files held out")
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
            output_dir=str(folder),
            max_steps=max_steps,
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
    trainer.save_model()
    return model, tokenizer, "\n".join(held_out_text["text"])
