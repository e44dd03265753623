"""Bytewax dataflows that turn events on Kafka into sealed segments."""
