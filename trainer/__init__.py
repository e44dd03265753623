"""Increments: a parent version, a segment and a recipe make a candidate."""
