"""The riverdelta command, which wires the packages together."""
