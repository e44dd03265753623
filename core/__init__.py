"""The nouns that every package shares: names, digests, events, recipes, settings, stores, errors, times, telemetry."""
