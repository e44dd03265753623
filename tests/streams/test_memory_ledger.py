"""The in-memory ledger of the simulation decides as the real one does."""

from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from riverdelta.core.recipe import Recipe
from riverdelta.registry.ledger import Ledger, Manifest, ManifestEntry, Seal

from .memory import MemoryLedger

SUBJECTS = ["a" * 64, "b" * 64]
seals = st.fixed_dictionaries(
    {
        "epoch": st.integers(0, 2),
        "first": st.integers(0, 4),
        "count": st.integers(1, 2),
        "part": st.integers(0, 1),
        "expected": st.sampled_from([0, 0, 5]),
        "subject": st.sampled_from(SUBJECTS),
    }
)
acts = st.lists(
    st.one_of(
        st.tuples(st.just("seal"), st.lists(seals, min_size=1, max_size=3)),
        st.tuples(st.just("forget"), st.sampled_from(SUBJECTS)),
        st.tuples(st.just("allow"), st.sampled_from(SUBJECTS)),
        st.tuples(st.just("positions"), st.integers(0, 9)),
    ),
    max_size=8,
)


def _seal(number: int, asked: dict[str, Any]) -> Seal:
    entry = ManifestEntry(0, asked["part"], asked["expected"], b"", (asked["subject"],))
    manifest = Manifest(("run",), (entry,) * asked["count"])
    moved = {("run", asked["part"]): (asked["expected"], asked["expected"] + 5)}
    return Seal("ada", asked["epoch"], asked["first"], manifest, "count", f"payload-{number}", "sha", moved)


def _seen(ledger: Any) -> tuple[Any, ...]:
    head = ledger.adapter("ada")
    manifests = [(segment.number, segment.first, held.pack()) for segment, held in ledger.manifests("ada", 1)]
    return (
        (head.epoch, head.next_index, head.next_segment),
        manifests,
        ledger.consumed("ada"),
        ledger.suppressed("ada"),
        ledger.allowed_from("ada"),
        ledger.positions("run"),
        ledger.last_fence(),
        ledger.behind(["ada", "bob"]),
        [
            (held.fence, held.began, held.subject, set(held.adapters), held.names("ada"), held.names("bob"))
            for after in (0, 1)
            for held in ledger.forgets(after=after)
        ],
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(acts)
def test_both_decide_alike(tmp_path_factory: Any, plan: list[tuple[str, Any]]) -> None:
    folder: Path = tmp_path_factory.mktemp("ledger")
    real, memory = Ledger.open(f"sqlite:///{folder}/ledger.db"), MemoryLedger()
    for ledger in (real, memory):
        ledger.create("ada", Recipe(), "test")
    for number, (act, given_) in enumerate(plan):
        if act == "seal":
            asked = [_seal(10 * number + place, one) for place, one in enumerate(given_)]
            assert [type(done) for done in real.seal(asked, "t")] == [type(done) for done in memory.seal(asked, "t")]
        elif act == "forget":
            real.forget(str(number), given_, ["ada"], "t")
            memory.forget(given_, ["ada"])
        elif act == "allow":
            ends = {("run", 0): number}
            real.allow(given_, ["ada"], "t", ends=ends)
            memory.allow(given_, ["ada"], ends)
        else:
            for ledger in (real, memory):
                ledger.move_positions({("run", 0, 0): given_, ("run", 1, 0): given_ + 1})
        assert _seen(real) == _seen(memory)
    real.close()
