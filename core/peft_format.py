"""Which PEFT adapters Riverdelta can serve, and why not the others: one check for serving and for import."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from .errors import Unsupported

MAX_RANK = 256
# Options of peft's LoraConfig that change what an adapter computes and that serving has no path for,
# with the values under which they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "modules_to_save": (None, [], ()),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "fan_in_fan_out": (False, None),
    "target_parameters": (None, [], ()),
    "arrow_config": (None,),
    "corda_config": (None,),
    "eva_config": (None,),
    "loftq_config": (None, {}),
}
_PREFIX = "base_model.model."


class TensorLike(Protocol):
    """What the check needs of a tensor."""

    @property
    def shape(self) -> Any: ...


@dataclass(frozen=True)
class LoraSite:
    """One linear layer that the adapter changes: its module path in the base, its rank and its scale."""

    module: str
    rank: int
    scale: float
    a_key: str
    b_key: str


def check_servable(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorLike],
    linears: Mapping[str, tuple[int, int]] | None = None,
) -> tuple[LoraSite, ...]:
    """The sites of a PEFT LoRA adapter, or `Unsupported` with the reason that it cannot be served.

    `config` is adapter_config.json, `tensors` the contents of adapter_model.safetensors (PEFT's key names),
    `linears` the base's linear layers as module path -> (in_features, out_features); without it, shapes are
    only checked against each other.
    """
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise Unsupported(f"The adapter is of kind {kind}.", "Only LoRA adapters can be served.")
    for option, neutral in _NEUTRAL.items():
        if option in config and config[option] not in neutral:
            raise Unsupported(
                f"The adapter uses {option}={config[option]!r}, which serving has no path for.",
                f"Train it with {option}={neutral[0]!r}.",
            )
    sites = []
    left = set(tensors)
    for a_key in sorted(tensors):
        if not a_key.endswith(".lora_A.weight"):
            continue
        b_key = a_key.replace(".lora_A.", ".lora_B.")
        if b_key not in tensors:
            raise Unsupported(f"{a_key} has no {b_key} beside it.", "Export the adapter again with peft.")
        left -= {a_key, b_key}
        module = a_key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        sites.append(_site(config, module, a_key, b_key, tensors, linears))
    if left:
        raise Unsupported(
            f"The adapter holds tensors that are not LoRA matrices of linear layers: {_some(left)}.",
            "Only lora_A.weight and lora_B.weight pairs can be served.",
        )
    if not sites:
        raise Unsupported("The adapter holds no LoRA matrices.", "Was it saved with peft's save_pretrained?")
    return tuple(sites)


def _site(
    config: Mapping[str, Any],
    module: str,
    a_key: str,
    b_key: str,
    tensors: Mapping[str, TensorLike],
    linears: Mapping[str, tuple[int, int]] | None,
) -> LoraSite:
    a, b = tuple(tensors[a_key].shape), tuple(tensors[b_key].shape)
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise Unsupported(
            f"{module} has lora_A of shape {a} and lora_B of shape {b}.", "They must be [r, in] and [out, r]."
        )
    rank = int(a[0])
    if not 1 <= rank <= MAX_RANK:
        raise Unsupported(f"{module} has rank {rank}.", f"Ranks 1 to {MAX_RANK} can be served.")
    if linears is not None:
        if module not in linears:
            raise Unsupported(f"The base model has no linear layer {module}.", "Is the adapter made for this base?")
        if linears[module] != (a[1], b[0]):
            raise Unsupported(
                f"{module} maps {linears[module][0]} to {linears[module][1]} features in the base, "
                f"{a[1]} to {b[0]} in the adapter.",
                "Is the adapter made for this base?",
            )
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
    declared = _pattern(config.get("rank_pattern"), module, config.get("r", rank))
    if declared != rank:
        raise Unsupported(
            f"{module} has rank {rank}, its config says {declared}.", "The two files do not belong together."
        )
    scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    return LoraSite(module, rank, float(scale), a_key, b_key)


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for suffix, value in (patterns or {}).items():
        # To peft these are regular expressions; here they end a path, a dot standing for any character.
        if not re.fullmatch(r"[\w.]+", suffix):
            raise Unsupported(f"The adapter has a pattern {suffix[:80]!r}.", "Name modules by the end of their path.")
        if re.fullmatch(rf"(.*\.)?{suffix}", module):
            return value
    return default


def _some(keys: Collection[str]) -> str:
    shown = sorted(keys)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
