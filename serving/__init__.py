"""The server: many adapters on one base model, behind an OpenAI-compatible HTTP face."""
