"""The documents' tables are what the kept results say."""

from __future__ import annotations

import pytest

from benchmarks import tables


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_generated_from_the_results(document):
    text = document.read_text()
    assert tables.fill(text) == text
