"""Metrics by adapter: bounded, whatever the number of adapters."""

from prometheus_client import generate_latest

from riverdelta.streams.metrics import Metrics


def series(metrics: Metrics) -> dict[str, float]:
    lines = generate_latest(metrics.registry).decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line.startswith("riverdelta_stream_adapter_"))
    return {
        name.removeprefix("riverdelta_stream_adapter_"): float(value) for name, value in pairs if "_created" not in name
    }


def test_only_the_first_adapters_have_series_of_their_own() -> None:
    metrics = Metrics(2)
    for number in range(1000):
        metrics.seal(f"a{number}", "count", 3)
    metrics.seal("a1", "age", 1)
    metrics.hold((f"a{number}", 1) for number in range(1000))
    assert series(metrics) == {
        'entries_sealed_total{adapter="a0"}': 3,
        'entries_sealed_total{adapter="a1"}': 4,
        'entries_sealed_total{adapter="_others"}': 998 * 3,
        'open_entries{adapter="a0"}': 1,
        'open_entries{adapter="a1"}': 1,
        'open_entries{adapter="_others"}': 998,
    }
    metrics.hold([("a1", 5)])
    assert series(metrics)['open_entries{adapter="a0"}'] == 0
    assert series(metrics)['open_entries{adapter="_others"}'] == 0
    assert metrics.open._value.get() == 5


def test_none_has_when_there_are_to_be_none() -> None:
    metrics = Metrics(0)
    metrics.seal("a0", "count", 3)
    metrics.hold([("a0", 1)])
    assert series(metrics) == {}
    assert metrics.sealed._value.get() == 3
