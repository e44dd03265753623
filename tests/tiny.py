"""Tiny random models of several architectures, with a byte-level tokenizer, saved as Hugging Face folders."""

from pathlib import Path
from typing import Any

_COMMON: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}


def tiny_config(kind: str) -> Any:
    """A config of `llama`, `qwen3`, `mistral` or `gemma3` (with sliding and full attention layers)."""
    from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen3Config

    if kind == "gemma3":
        return Gemma3TextConfig(
            **{**_COMMON, "num_hidden_layers": 3, "num_key_value_heads": 1},
            sliding_window=32,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            query_pre_attn_scalar=16,
        )
    return {"llama": LlamaConfig, "qwen3": Qwen3Config, "mistral": MistralConfig}[kind](**_COMMON)


def make_tokenizer() -> Any:
    """A tokenizer with one token a byte, start, end and padding tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)} | {"<s>": 256, "</s>": 257, "<pad>": 258}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def make_tiny(kind: str, folder: Path, seed: int = 0) -> Path:
    """Save a random model of a kind with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32)
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embed" not in name:
                weight.data.mul_(3)  # far from uniform, so that greedy answers are stable and differ
    model.generation_config.eos_token_id = 257
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
