"""Tiny random decoders, adapters for them made by peft, and the answers that transformers and peft give."""

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

VOCAB = 512
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def config(family: str) -> PreTrainedConfig:
    """The tiny configuration of a model family; sliding windows are shorter than the tests' sequences."""
    return {
        "llama": lambda: LlamaConfig(**_SHAPE, head_dim=32, attention_bias=True),
        "qwen3": lambda: Qwen3Config(**_SHAPE, head_dim=24, tie_word_embeddings=True),
        "mistral": lambda: MistralConfig(**_SHAPE, sliding_window=11),
        "gemma3": lambda: Gemma3TextConfig(
            **_SHAPE,
            head_dim=32,
            sliding_window=9,
            query_pre_attn_scalar=40,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    }[family]()


def base(family: str) -> Any:
    """A random model of the family, always the same one, with weights large enough to have opinions."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config(family), dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                p.normal_(0, 0.12)
            elif "norm" in name:
                p.add_(torch.randn_like(p) * 0.2)
    return model.eval()


def adapter(family: str, seed: int, rank: int, targets: list[str], **options: Any) -> PeftModel:
    """A random LoRA over `base(family)`, as peft has it."""
    model = get_peft_model(
        base(family), LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=targets, task_type="CAUSAL_LM", **options)
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.1)
    return model.eval()


def exported(model: PeftModel) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What `save_pretrained` writes: configuration and tensors."""
    return model.peft_config["default"].to_dict(), dict(get_peft_model_state_dict(model))


def answer(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """transformers' greedy answer."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None
    )
    return out[0, len(prompt) :].tolist()


def prompt(seed: int, length: int) -> list[int]:
    """A random prompt without special tokens."""
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: 3 special tokens and the 256 bytes, so that most characters span tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: n for n, t in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
