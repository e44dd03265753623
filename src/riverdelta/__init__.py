"""Riverdelta: LoRA adapters that keep learning from Kafka streams, and can provably forget.

The packages lie in the repository's root folders; the links beside this file give them their import names.
"""

__version__ = "0.1.0"
