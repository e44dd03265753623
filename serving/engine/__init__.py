"""The engine: scheduler, paged KV cache and adapters around a Hugging Face decoder."""
