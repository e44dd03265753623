"""The check of PEFT adapters, with peft itself as the oracle for ranks and scales."""

from pathlib import Path
from typing import Any

import pytest
import torch

from riverdelta.core.errors import Unsupported
from riverdelta.core.peft_format import check_servable

LINEARS = {
    f"model.layers.{layer}.self_attn.{name}": (64, features)
    for layer in (0, 1)
    for name, features in (("q_proj", 64), ("v_proj", 32))
}


def saved(tiny_base: Path, folder: Path, **options: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A fresh adapter as peft saves it: the model, its config and its tensors."""
    import json

    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    given = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), LoraConfig(**given))
    model.save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    return model, json.loads((folder / "adapter_config.json").read_text()), tensors


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"v_proj": 2}},
        {"alpha_pattern": {"layers.1.self_attn.q_proj": 20}},
        {"alpha_pattern": {"q.proj": 20, "q_proj": 10}},
        {"rank_pattern": {"model.layers.0.self_attn.q_proj": 8}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
    ],
)
def test_ranks_and_scales_are_pefts(tiny_base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    model, config, tensors = saved(tiny_base, tmp_path, **options)
    wanted = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    sites = check_servable(config, tensors, LINEARS)
    assert {site.module: (site.rank, pytest.approx(site.scale)) for site in sites} == wanted


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {r".*layers\.0.*": 2}},
        {"alpha_pattern": {r"(q|v)_proj": 2}},
    ],
)
def test_what_serving_has_no_path_for_is_refused(tiny_base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    _, config, tensors = saved(tiny_base, tmp_path, **options)
    with pytest.raises(Unsupported):
        check_servable(config, tensors, LINEARS)


def test_files_that_do_not_belong_together_are_refused() -> None:
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    pair = {f"{prefix}A.weight": torch.ones(4, 64), f"{prefix}B.weight": torch.ones(64, 4)}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    assert check_servable(config, pair, LINEARS)[0].scale == 1.0
    wrong: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (config, {}),
        ({**config, "fan_in_fan_out": True}, pair),
        ({**config, "r": 8}, pair),
        ({**config, "peft_type": "IA3"}, pair),
        (config, {f"{prefix}A.weight": torch.ones(4, 64)}),
        (config, {**pair, "base_model.model.lm_head.weight": torch.ones(2, 2)}),
        (config, {**pair, f"{prefix}B.weight": torch.ones(64, 2)}),
        (config, {f"{prefix}A.weight": torch.ones(4, 32), f"{prefix}B.weight": torch.ones(64, 4)}),
        ({**config, "r": 300}, {f"{prefix}A.weight": torch.ones(300, 64), f"{prefix}B.weight": torch.ones(64, 300)}),
    ]
    for told, tensors in wrong:
        with pytest.raises(Unsupported):
            check_servable(told, tensors, LINEARS)
