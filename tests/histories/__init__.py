"""Random histories of a live stack, each held to a control that never had what was forgotten."""
