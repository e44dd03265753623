"""The shape of a LoRA on a base, as peft resolves it on a copy of the model without weights."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from riverdelta.core.errors import Unsupported
from riverdelta.core.peft_format import LoraSite, TensorLike, check_servable
from riverdelta.core.recipe import Lora


@dataclass(frozen=True)
class Target:
    """One linear layer that learns: its module path, PEFT's names for A and B, their shapes and their scale."""

    module: str
    a_key: str
    b_key: str
    a_shape: tuple[int, int]
    b_shape: tuple[int, int]
    scale: float


@dataclass(frozen=True)
class LoraShape:
    """The targets in order of PEFT's names, and the adapter_config.json that PEFT reads."""

    targets: tuple[Target, ...]
    config: dict[str, Any]


def resolve(config: Any, lora: Lora) -> LoraShape:
    """Which modules of a base with this Hugging Face `config` a LoRA changes; `Unsupported` when none can be."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(config)
    options = {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "target_modules": lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for what it has renamed
            model = get_peft_model(bare, LoraConfig(**options))
    except ValueError as error:  # peft says which targets it could not find or adapt
        raise Unsupported(f"peft cannot adapt this base: {error}", "Check lora.targets in the recipe.") from error
    held = model.peft_config["default"]
    # What shapes an answer and nothing else: no paths, versions or defaults that another release may rename.
    written = {**options, "peft_type": "LORA", "target_modules": sorted(held.target_modules), "inference_mode": True}
    tensors = {name: tensor for name, tensor in get_peft_model_state_dict(model).items() if "lora_" in name}
    linears = {
        path.removesuffix(".base_layer"): (module.in_features, module.out_features)
        for path, module in bare.named_modules()
        if type(module) is torch.nn.Linear
    }
    return shape_of(written, tensors, check_servable(written, tensors, linears))


def shape_of(config: dict[str, Any], tensors: Mapping[str, TensorLike], sites: Sequence[LoraSite]) -> LoraShape:
    """The shape of an adapter that exists, from its configuration and tensors."""
    targets = tuple(
        Target(site.module, site.a_key, site.b_key, _size(tensors[site.a_key]), _size(tensors[site.b_key]), site.scale)
        for site in sites
    )
    return LoraShape(targets, config)


def _size(tensor: TensorLike) -> tuple[int, int]:
    rows, columns = tensor.shape
    return int(rows), int(columns)
