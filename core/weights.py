"""One file per version's weights: canonical safetensors, whose SHA-256 is the version's digest.

The PEFT configuration rides in the file's metadata, so that the digest covers everything that shapes an
answer, and `sha256sum` of the file is all it takes to check it.
"""

import json
from typing import TYPE_CHECKING, Any

from .digests import canonical_json, sha256
from .errors import Corrupt

if TYPE_CHECKING:
    import torch

_CONFIG = "riverdelta"


def encode(config: dict[str, Any], tensors: "dict[str, torch.Tensor]") -> tuple[bytes, str]:
    """The file's bytes and their digest. Tensors are written contiguous, on the CPU, under sorted names."""
    from safetensors.torch import save

    # safetensors keeps metadata in an unordered map: a single key keeps the header's bytes fixed.
    data = save(
        {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)},
        metadata={_CONFIG: canonical_json(config).decode()},
    )
    return data, sha256(data)


def decode(data: bytes, digest: str | None = None) -> "tuple[dict[str, Any], dict[str, torch.Tensor]]":
    """The configuration and tensors of a file; `Corrupt` when it is not the file that `digest` names."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    if digest is not None and sha256(data) != digest:
        raise Corrupt(
            f"The weights of {digest[:12]} do not have that digest.", "Restore them from a backup or rebuild."
        )
    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        return json.loads(header["__metadata__"][_CONFIG]), load(data)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise Corrupt(
            f"Not a weights file of Riverdelta: {error}.", "Import PEFT folders with registry import."
        ) from error
