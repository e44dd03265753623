"""The base model: where it lies, and the digest that says which one it is."""

import hashlib
from pathlib import Path

from .digests import digest_of
from .errors import BadInput, NotFound

# What shapes an answer: configuration, weights, tokenizer and template. Other files (a README, say) do not count.
_SUFFIXES = (".json", ".safetensors", ".model", ".jinja", ".txt")


def resolve(base: str) -> Path:
    """The folder of a base model, given as a folder or as a Hugging Face id (fetched on first use)."""
    if not base:
        raise BadInput("No base model is set.", "Give --base FOLDER_OR_HUGGING_FACE_ID, or `base` in riverdelta.toml.")
    folder = Path(base)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise NotFound(f"{folder} holds no config.json.", "Give the folder of a Hugging Face model.")
        return folder.absolute()
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise NotFound(
            f"There is no folder {base}.", "Give a folder, or a Hugging Face id such as google/gemma-3-270m."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base, allow_patterns=[f"*{suffix}" for suffix in _SUFFIXES]))
    except Exception as error:  # the hub's client raises many kinds; each means that the model is not to be had
        raise NotFound(
            f"The base model {base} is neither a folder nor to be had from Hugging Face ({type(error).__name__}).",
            "Check the name, your network and your access, or give a folder.",
        ) from error


def digest(folder: Path) -> str:
    """Hex SHA-256 over the names and contents of the files that shape the base's answers."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in _SUFFIXES)
    held = {}
    for path in files:
        with path.open("rb") as file:
            held[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    if not any(name.endswith(".safetensors") for name in held):
        raise NotFound(f"{folder} holds no safetensors.", "Save the model with save_pretrained.")
    return digest_of(held)
