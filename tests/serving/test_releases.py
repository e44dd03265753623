"""Release plans: whatever moves, nobody waits for weights that could have been loaded first, and all ends as wanted."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from riverdelta.serving.releases import Release, plan

NAMES = ["a", "b", "c", "d"]
DIGESTS = ["", "d1", "d2", "d3", "d4", "d5"]
release = st.builds(lambda number: Release(number, DIGESTS[number]), st.integers(0, len(DIGESTS) - 1))
releases = st.dictionaries(st.sampled_from(NAMES), release)
served = st.dictionaries(st.sampled_from(NAMES), release | st.none())
digests = st.sets(st.sampled_from(DIGESTS[1:]))


@given(served, releases, digests, digests, digests, digests)
def test_a_plan_is_safe(served, wanted, loaded, loading, failing, pinned):
    steps = plan(served, wanted, loaded, loading=loading, failing=failing, pinned=pinned)
    fenced = {name for name, held in served.items() if held is None}
    assert fenced <= steps.flips.keys(), "what is fenced off is read anew at once"
    served = {name: held for name, held in served.items() if held is not None}
    assert not set(steps.loads) & (loaded | loading | failing | {""})
    for name, to in steps.flips.items():
        assert to == wanted.get(name)
        assert name in fenced or to != served.get(name)
        answers = name in served and (not served[name].digest or served[name].digest in loaded)
        if to is not None and answers and to.digest not in ("", served[name].digest):
            assert to.digest in loaded, "an adapter that answered would make its callers wait"
    kept = {r.digest for r in wanted.values()} | {r.digest for n, r in served.items() if n not in steps.flips} | pinned
    assert not set(steps.unloads) & kept
    assert set(steps.unloads) <= loaded


@given(served, releases, digests)
def test_loading_what_is_asked_for_leads_to_what_is_wanted(served, wanted, loaded):
    loaded = set(loaded)
    for _ in range(3):
        steps = plan(served, wanted, loaded)
        served = {**served, **steps.flips}
        served = {name: held for name, held in served.items() if held is not None}
        loaded = loaded - set(steps.unloads) | set(steps.loads)
    assert served == wanted
    assert plan(served, wanted, loaded).flips == {}
    assert loaded <= {held.digest for held in wanted.values()}


class Fleet(RuleBasedStateMachine):
    """Releases move and fences fall while loads are under way, fail, and end in any order."""

    def __init__(self):
        super().__init__()
        self.wanted, self.served = {}, {}
        self.loaded, self.loading, self.failing, self.revoked, self.pinned = set(), set(), set(), set(), set()

    @rule(name=st.sampled_from(NAMES), to=release)
    def release_moves(self, name, to):
        if to.digest not in self.revoked:
            self.wanted[name] = to

    @rule(digest=st.sampled_from(DIGESTS[1:]))
    def fence(self, digest):
        self.revoked.add(digest)
        self.loaded.discard(digest)
        self.pinned.discard(digest)
        for name, held in self.wanted.items():
            if held.digest == digest:
                self.wanted[name] = Release(0, "")
        for name, held in self.served.items():
            if held is not None and held.digest == digest:
                self.served[name] = None

    @rule()
    def follow(self):
        steps = plan(
            self.served,
            self.wanted,
            self.loaded,
            loading=self.loading,
            failing=self.failing,
            pinned=self.pinned,
        )
        self.served.update(steps.flips)
        self.loaded -= set(steps.unloads)
        self.loading |= set(steps.loads)
        self.failing.clear()

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), works=st.booleans())
    def load_ends(self, data, works):
        digest = data.draw(st.sampled_from(sorted(self.loading)))
        self.loading.discard(digest)
        if works and digest not in self.revoked:
            self.loaded.add(digest)
        elif not works:
            self.failing.add(digest)

    @rule(digest=st.sampled_from(DIGESTS[1:]))
    def asked_by_number(self, digest):
        if digest not in self.revoked:
            self.pinned.add(digest)
            self.loaded.add(digest)

    @invariant()
    def nothing_revoked_is_read(self):
        assert not self.loaded & self.revoked
        assert not {held.digest for held in self.wanted.values()} & self.revoked

    def teardown(self):
        for _ in range(4):
            self.follow()
            for digest in list(self.loading):
                self.loading.discard(digest)
                if digest not in self.revoked:
                    self.loaded.add(digest)
        assert self.served == self.wanted


TestFleet = Fleet.TestCase
TestFleet.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
