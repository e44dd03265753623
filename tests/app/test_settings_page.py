"""docs/settings.md says what the settings are."""

from pathlib import Path

from riverdelta.app.settings_page import page


def test_page_is_in_step_with_the_settings() -> None:
    held = Path(__file__).parents[2] / "docs" / "settings.md"
    assert held.read_text() == page(), "run: python -m riverdelta.app.settings_page > docs/settings.md"


def test_every_setting_says_what_it_means() -> None:
    rows = [line for line in page().splitlines() if line.startswith("| `")]
    meanings = {row: row.removesuffix(" |").rpartition("| ")[2] for row in rows}
    assert not [row for row, meaning in meanings.items() if not meaning or meaning.startswith(("at least", "above"))]
