"""PEFT's folder form: adapters trained elsewhere come in, versions go out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from riverdelta.core import weights
from riverdelta.core.digests import sha256
from riverdelta.core.errors import BadInput, Conflict, Corrupt, NotFound, RiverdeltaError, Unsupported
from riverdelta.core.peft_format import check_servable
from riverdelta.core.recipe import Recipe
from riverdelta.core.store import ObjectStore, weights_key

from .ledger import Ledger, VersionRecord
from .ledger.decisions import releasable
from .written import Written

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# What of a PEFT config shapes an answer, and what tells peft how to load it. The rest describes the training elsewhere.
_KEPT = (
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
)


def write_peft_folder(folder: Path, data: bytes, digest: str) -> None:
    """Write a version's weights file, byte for byte, with its configuration as PEFT reads it."""
    config, _ = weights.decode(data, digest)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TENSORS).write_bytes(data)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def export_version(ledger: Ledger, store: ObjectStore, adapter: str, number: int | None, folder: Path) -> VersionRecord:
    """Write a version (None: the release) as a folder that `peft.PeftModel.from_pretrained` loads.

    `Refused` for a revoked or dropped version, `Conflict` where the folder holds another adapter, `BadInput` where
    there can be no folder.
    """
    head = ledger.adapter(adapter)
    number = head.release if number is None else number
    if number == 0:
        raise NotFound(f"{adapter} serves the base: there is nothing to export.", "Name a version: `NAME@7`.")
    versions = ledger.versions(adapter)
    releasable(head, versions, number)
    version = versions[number]
    data = store.get(weights_key(version.digest))
    held = folder / TENSORS
    try:
        if held.exists() and held.read_bytes() != data:
            raise Conflict(f"{folder} holds another adapter.", "Export into a new folder.")
        write_peft_folder(folder, data, version.digest)
    except OSError as error:
        raise BadInput(f"Cannot write {folder}: {error.strerror}.", "Export into a new folder.") from error
    return version


def import_folder(
    ledger: Ledger,
    store: ObjectStore,
    adapter: str,
    folder: Path,
    linears: Mapping[str, tuple[int, int]],
    actor: str,
    reason: str = "",
) -> VersionRecord:
    """Make an adapter trained elsewhere version 1 of a new adapter.

    `linears` are the base's linear layers, as module path -> (in, out) features. `Unsupported` names what serving
    cannot serve; nothing is made then.
    """
    config, tensors, raw = _read(folder)
    sites = check_servable(config, tensors, linears)
    data, digest = _ours(config, raw) or weights.encode(
        {key: config[key] for key in _KEPT if config.get(key) is not None}, tensors
    )
    rank = max(site.rank for site in sites)
    recipe = Recipe.from_dict(
        {
            "lora": {
                "rank": rank,
                "alpha": float(config.get("lora_alpha") or rank),
                "rslora": bool(config.get("use_rslora")),
                "targets": sorted({site.module.rsplit(".", 1)[-1] for site in sites}),
            }
        }
    )
    ledger.check_import(adapter, digest)  # before revoked weights lie in the store again
    key = weights_key(digest)
    written = Written(store, {key: data})
    try:
        return ledger.import_adapter(adapter, recipe, digest, {"imported": True}, actor, reason, written.look)
    except RiverdeltaError:
        ledger.delete_unnamed({key}, store.delete)
        raise


def base_linears(base: Path) -> dict[str, tuple[int, int]]:
    """The linear layers of a base model that an adapter may change, without loading its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, local_files_only=True))
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def _ours(config: dict[str, Any], raw: bytes) -> tuple[bytes, str] | None:
    """A file that was exported from here, and its digest, which stays what it was."""
    try:
        held, _ = weights.decode(raw)
    except Corrupt:
        return None
    return (raw, sha256(raw)) if held == config else None


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not (folder / CONFIG).is_file() or not (folder / TENSORS).is_file():
        raise NotFound(f"{folder} does not hold {CONFIG} and {TENSORS}.", "Save the adapter with save_pretrained.")
    try:
        config = json.loads((folder / CONFIG).read_text())
        if not isinstance(config, dict):
            raise BadInput(f"{folder / CONFIG} is not a JSON object.", "Save the adapter again with peft.")
        raw = (folder / TENSORS).read_bytes()
        return config, load(raw), raw
    except (ValueError, SafetensorError) as error:
        raise Unsupported(f"{folder} cannot be read: {error}.", "Save the adapter again with peft.") from error
