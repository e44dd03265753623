"""Database rows as records."""

from typing import Any

from sqlalchemy import Row

from .records import AdapterRecord, Cause, Fact, Forget, Hand, Lease, Outcome, SegmentRecord, Stage, VersionRecord


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
    return VersionRecord(**_given(row, "saw"), saw=tuple(row.saw))


def fact_of(row: Row[Any]) -> Fact:
    """A fact."""
    return Fact(**_given(row))


def forget_of(row: Row[Any]) -> Forget:
    """A forget procedure."""
    return Forget(**_given(row, "stage"), stage=Stage(row.stage))


def lease_of(row: Row[Any]) -> Lease:
    """A lease."""
    return Lease(**_given(row))
