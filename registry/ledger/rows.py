"""Database rows as records."""

from dataclasses import asdict
from typing import Any

import msgspec
from sqlalchemy import Row

from .records import (
    AdapterRecord,
    Cause,
    Fact,
    Forget,
    Hand,
    Lease,
    Outcome,
    PartRecord,
    SegmentRecord,
    Stage,
    VersionRecord,
)


def _given(row: Row[Any], *without: str) -> dict[str, Any]:
    return {key: value for key, value in row._mapping.items() if key not in without}


def adapter_of(row: Row[Any]) -> AdapterRecord:
    """An adapter's head."""
    return AdapterRecord(**_given(row))


def segment_of(row: Row[Any]) -> SegmentRecord:
    """A segment, without its manifest."""
    given = _given(row, "manifest", "outcome", "cause", "hand")
    return SegmentRecord(**given, outcome=Outcome(row.outcome), cause=Cause(row.cause), hand=Hand(row.hand))


def version_of(row: Row[Any]) -> VersionRecord:
    """A version."""
    parts = msgspec.convert(row.parts, tuple[PartRecord, ...])
    return VersionRecord(**_given(row, "saw", "parts"), saw=tuple(row.saw), parts=parts)


def version_row(version: VersionRecord) -> dict[str, Any]:
    """A version as a row."""
    return {**asdict(version), "parts": msgspec.to_builtins(version.parts)}


def fact_of(row: Row[Any]) -> Fact:
    """A fact."""
    return Fact(**_given(row))


def forget_of(row: Row[Any]) -> Forget:
    """A forget procedure."""
    return Forget(**_given(row, "stage"), stage=Stage(row.stage))


def lease_of(row: Row[Any]) -> Lease:
    """A lease."""
    return Lease(**_given(row))
