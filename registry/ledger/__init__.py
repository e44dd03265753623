"""The ledger: the one ordered history of facts about each adapter, and the source of truth."""

from .claiming import Claim
from .decisions import Line, Mode
from .leases import Fence
from .ledger import Increment, Ledger, Work
from .records import (
    AdapterRecord,
    Cause,
    Fact,
    Forget,
    Gap,
    Hand,
    Lease,
    Manifest,
    ManifestEntry,
    Outcome,
    PartRecord,
    SegmentRecord,
    Stage,
    VersionRecord,
)
from .sealing import Seal

__all__ = [
    "AdapterRecord",
    "Cause",
    "Claim",
    "Fact",
    "Fence",
    "Forget",
    "Gap",
    "Hand",
    "Increment",
    "Lease",
    "Ledger",
    "Line",
    "Manifest",
    "ManifestEntry",
    "Mode",
    "Outcome",
    "PartRecord",
    "Seal",
    "SegmentRecord",
    "Stage",
    "VersionRecord",
    "Work",
]
