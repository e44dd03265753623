"""A small base that speaks the language of `tenants`, made on the spot: a Llama of two million weights.

It has read other tenants' text, so it knows how questions and answers go and none of the facts: what a pre-trained
model is to a real stream, at a size where hundreds of increments take minutes on two cores.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.tenants import corpus

STEPS, ROWS = 1000, 48


def small_base(progress: Any = print) -> Path:
    """The folder of the base, made on first use (two minutes) in the user's cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "riverdelta"
    folder = home / f"tenants-base-{STEPS}"
    if not (folder / "config.json").is_file():
        home.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".tenants-", dir=home))
        _make(draft, progress)
        try:
            draft.rename(folder)
        except OSError:
            shutil.rmtree(draft)
    return folder


def _make(folder: Path, progress: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    lines = list(corpus(0, STEPS * ROWS))
    tokenizer = _tokenizer(lines[:20000])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=2e-3, total_steps=STEPS)
    began = time.monotonic()
    for step in range(STEPS):
        held = tokenizer(
            [line + tokenizer.eos_token for line in lines[step * ROWS : (step + 1) * ROWS]],
            return_tensors="pt",
            padding=True,
            return_token_type_ids=False,
        )
        labels = held["input_ids"].masked_fill(held["attention_mask"] == 0, -100)
        loss = model(**held, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 100 == 99:
            progress(f"base: step {step + 1} of {STEPS}, loss {float(loss):.3f}, {time.monotonic() - began:.0f} s")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(lines: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        lines,
        trainers.BpeTrainer(vocab_size=1024, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    start = raw.token_to_id("<s>")
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


if __name__ == "__main__":
    print(small_base())
