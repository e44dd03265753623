"""The engine: scheduler, paged KV cache and adapters around a Hugging Face decoder."""

from .config import EngineConfig
from .engine import Engine
from .errors import (
    AdapterLoadFailed,
    AdapterNotLoaded,
    AdaptersHalted,
    DuplicateRequest,
    EngineStopped,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    SchemaTooHard,
    VersionRevoked,
)
from .request import (
    Event,
    FinishEvent,
    FinishReason,
    GenerationRequest,
    RequestHandle,
    SamplingParams,
    TokenEvent,
    Usage,
)

__all__ = [
    "AdapterLoadFailed",
    "AdapterNotLoaded",
    "AdaptersHalted",
    "DuplicateRequest",
    "Engine",
    "EngineConfig",
    "EngineStopped",
    "Event",
    "FinishEvent",
    "FinishReason",
    "GenerationRequest",
    "InvalidRequest",
    "PromptTooLong",
    "QueueFull",
    "RequestHandle",
    "SamplingParams",
    "SchemaTooHard",
    "TokenEvent",
    "Usage",
    "VersionRevoked",
]
