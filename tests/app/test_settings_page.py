"""docs/settings.md says what the settings are."""

from pathlib import Path

from riverdelta.app.settings_page import page


def test_page_is_in_step_with_the_settings() -> None:
    held = Path(__file__).parents[2] / "docs" / "settings.md"
    assert held.read_text() == page(), "run: python -m riverdelta.app.settings_page > docs/settings.md"
