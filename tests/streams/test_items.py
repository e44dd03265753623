"""What goes between the dataflow's processes arrives as it was."""

import pickle

from riverdelta.core.keys import SubjectKey
from riverdelta.streams.intake import Intake, Read, Record


def test_parcels_travel() -> None:
    values = (
        b'{"adapter":"ada","subject":["ann","ben"],"id":"1","text":"hi"}',
        b'{"adapter":"ada","type":"interaction","response":"r","digest":"d","prompt":"q","completion":"a"}',
        b"junk",
        None,
    )
    records: list[Record] = [
        (1, at, 1_700_000_000_000, None, value, (("h", None), ("k", b"v"))) for at, value in enumerate(values)
    ]
    read = Read((0, 1), "run", records, {("run", 1): 4, ("run", 2): 9})
    parcels = [parcel for _, parcel in Intake(SubjectKey(bytes(32)), 4).sort(read)]
    assert sum(len(parcel.items) + len(parcel.dead) for parcel in parcels) == len(values)
    assert [pickle.loads(pickle.dumps(parcel)) for parcel in parcels] == parcels
