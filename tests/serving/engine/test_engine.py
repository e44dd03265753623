"""The engine's face: requests, adapters coming and going, revocation, limits and failures."""

import asyncio
import threading
import time
from functools import cache

import pytest
import torch

from riverdelta.core.errors import Unsupported
from riverdelta.serving.engine import (
    AdapterNotLoaded,
    AdaptersHalted,
    DuplicateRequest,
    EngineStopped,
    FinishEvent,
    GenerationRequest,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    SamplingParams,
    TokenEvent,
    VersionRevoked,
)
from riverdelta.serving.engine.request import Bell, RequestHandle

from . import models
from .conftest import Asker, collect, tokens

A, B = "a" * 64, "b" * 64


@cache
def lora(seed: int):
    return models.adapter("llama", seed, 4, models.LINEAR)


def source(seed: int):
    return lambda: models.exported(lora(seed))


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "never happened"
        time.sleep(0.002)


def test_preempted_answers_are_unchanged(engines):
    engine = engines(kv_blocks=24, max_batch=4, prefix_cache=False)
    asker, model = Asker(engine), models.base("llama")
    prompts = [models.prompt(n, 20) for n in range(4)]
    handles = [asker.submit(p, max_tokens=40) for p in prompts]
    assert [tokens(h) for h in handles] == [models.answer(model, p, 40) for p in prompts]
    assert engine.stats()["preemptions"] > 0
    assert engine.stats()["kv_blocks"]["free"] == 24


def test_shared_prefixes_change_no_answer(engines):
    engine = engines()
    engine.load(A, source(1))
    engine.load(B, source(2))
    prompt = models.prompt(1, 30)
    for digest, model in ((None, models.base("llama")), (A, lora(1)), (B, lora(2))):
        wanted = models.answer(model, prompt, 12)
        _, cold = collect(Asker(engine).submit(prompt, digest))
        events, warm = collect(Asker(engine).submit(prompt, digest))
        assert [e.token_id for e in events] == wanted
        assert (cold.usage.cached_tokens, warm.usage.cached_tokens) == (0, 28)
        assert {e.digest for e in events} == {digest}


def test_more_adapters_than_slots_and_memory(engines):
    engine = engines(adapter_slots=2, host_adapter_bytes=200_000)
    fleet = [f"{n:064x}" for n in range(6)]
    for n, digest in enumerate(fleet):
        engine.load(digest, source(n))
    asker = Asker(engine)
    asked = [(n % 6, models.prompt(n, 6), asker.submit(models.prompt(n, 6), fleet[n % 6])) for n in range(18)]
    for seed, prompt, handle in asked:
        assert tokens(handle) == models.answer(lora(seed), prompt, 12)
    tiers = [a["tier"] for a in engine.stats()["adapters"].values()]
    assert sorted(tiers).count("device") == 2
    assert "store" in tiers


def test_revocation_cuts_erases_and_refuses(engines):
    engine = engines(max_model_len=256)
    engine.load(A, source(1))
    engine.load(B, source(2))
    asker = Asker(engine)
    prompt = models.prompt(3, 20)
    cut = [asker.submit(prompt, A, max_tokens=200) for _ in range(2)]
    kept = asker.submit(prompt, B, max_tokens=60)
    until(lambda: engine.stats()["totals"]["answer_tokens"] > 10)
    engine.revoke([A])
    for handle in cut:
        events, end = collect(handle)
        assert events == []
        assert (end.finish_reason, end.error_code) == ("version_revoked", "version_revoked")
        assert end.usage.completion_tokens < 200
    with pytest.raises(VersionRevoked):
        asker.submit(prompt, A)
    with pytest.raises(VersionRevoked):
        engine.load(A, source(1))
    assert A not in engine.stats()["adapters"]
    assert tokens(kept) == models.answer(lora(2), prompt, 60)
    # Nothing of it is left: one adapter's slot and one adapter's blocks are all that is not zero.
    site = next(iter(engine.model.sites.values()))
    assert [bool(site.a[n].any()) for n in range(4)].count(True) == 1
    k, _ = engine.model.cache.layers[0]
    assert int(k.flatten(1).any(1).sum()) <= 20


def test_no_token_of_a_revoked_version_after_the_fence(engines):
    engine = engines(max_model_len=256)
    asker = Asker(engine)
    for n in range(5):
        digest = f"{n:064x}"
        engine.load(digest, source(1))
        handle = asker.submit(models.prompt(n, 9), digest, max_tokens=200)
        seen = []
        reader = threading.Thread(target=lambda h=handle, s=seen: s.extend(h))
        reader.start()
        until(lambda s=seen, n=n: len(s) > n)
        engine.revoke([digest])
        fence = time.monotonic()
        reader.join()
        assert all(e.emitted_at < fence for e in seen[:-1])
        assert seen[-1].finish_reason == "version_revoked"


def test_unload_drains(engines):
    engine = engines(max_model_len=256)
    engine.load(A, source(1))
    asker, prompt = Asker(engine), models.prompt(1, 9)
    handle = asker.submit(prompt, A, max_tokens=100)
    engine.unload(A)
    with pytest.raises(AdapterNotLoaded):
        asker.submit(prompt, A)
    assert tokens(handle) == models.answer(lora(1), prompt, 100)
    until(lambda: A not in engine.stats()["adapters"])
    engine.load(A, source(1))
    assert tokens(asker.submit(prompt, A)) == models.answer(lora(1), prompt, 12)


def test_halted_adapters_leave_the_base(engines):
    engine = engines(max_model_len=256)
    engine.load(A, source(1))
    asker, prompt = Asker(engine), models.prompt(1, 9)
    cut, kept = asker.submit(prompt, A, max_tokens=200), asker.submit(prompt, max_tokens=30)
    engine.halt_adapters(True)
    assert collect(cut)[1].error_code == "adapters_halted"
    with pytest.raises(AdaptersHalted):
        asker.submit(prompt, A)
    assert len(tokens(kept)) == 30
    engine.halt_adapters(False)
    assert len(tokens(asker.submit(prompt, A))) == 12


def test_cancel_frees_what_it_held(engines):
    engine = engines(max_model_len=256)
    handle = Asker(engine).submit(models.prompt(1, 9), max_tokens=200)
    next(iter(handle))
    handle.cancel()
    handle.cancel()
    events, end = collect(handle)
    assert end.finish_reason == "cancelled"
    assert len(events) < 199
    assert engine.stats()["running"] == 0
    assert engine.stats()["kv_blocks"]["free"] == engine.stats()["kv_blocks"]["total"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"use_dora": True}, "use_dora"), ({"modules_to_save": ["lm_head"]}, "modules_to_save")],
)
def test_adapters_that_cannot_be_served_are_refused(engines, options, reason):
    model = models.adapter("llama", 1, 4, models.ATTENTION, **options)
    with pytest.raises(Unsupported, match=reason):
        engines().load(A, lambda: models.exported(model))


def test_adapters_of_another_base_or_rank_or_with_nan_are_refused(engines):
    engine = engines()
    config, tensors = models.exported(lora(1))
    for change, reason in (
        ({k: torch.randn(9, *v.shape[1:]) if "lora_B" in k else v for k, v in tensors.items()}, "another|maps"),
        ({k.replace("q_proj", "w_proj"): v for k, v in tensors.items()}, "no linear layer"),
        ({k: v * float("nan") for k, v in tensors.items()}, "not finite"),
    ):
        with pytest.raises(Unsupported, match=reason):
            engine.load(A, lambda c=change: (config, c))
    with pytest.raises(Unsupported, match="rank 9"):
        engine.load(A, lambda: models.exported(models.adapter("llama", 1, 9, models.ATTENTION)))


def test_a_source_that_fails_later_ends_its_requests_only(engines):
    engine = engines(adapter_slots=1, host_adapter_bytes=1)
    alive = [True]

    def flaky():
        if not alive[0]:
            raise OSError("the store is away")
        return models.exported(lora(1))

    engine.load(A, flaky)
    engine.load(B, source(2))
    alive[0] = False
    asker, prompt = Asker(engine), models.prompt(1, 9)
    _, end = collect(asker.submit(prompt, A))
    assert (end.finish_reason, end.error_code) == ("error", "adapter_load_failed")
    assert "store is away" in end.message
    assert tokens(asker.submit(prompt, B)) == models.answer(lora(2), prompt, 12)
    alive[0] = True
    assert tokens(asker.submit(prompt, A)) == models.answer(lora(1), prompt, 12)


def test_a_seeded_answer_is_independent_of_its_batch_mates(engines):
    engine = engines()
    asker, prompt = Asker(engine), models.prompt(1, 9)
    params = {"temperature": 1.0, "top_p": 0.9, "seed": 5}
    alone = tokens(asker.submit(prompt, **params))
    mates = [asker.submit(models.prompt(n, 3 + n), temperature=1.5) for n in range(4)]
    assert tokens(asker.submit(prompt, **params)) == alone
    assert [len(tokens(m)) for m in mates] == [12] * 4
    assert tokens(asker.submit(prompt, **{**params, "seed": 6})) != alone


def test_text_stop_strings_eos_and_logprobs(engines):
    engine = engines()
    engine.model.eos = frozenset()
    asker, prompt = Asker(engine), models.prompt(2, 9)
    events, end = collect(asker.submit(prompt, max_tokens=30, logprobs=3))
    text = "".join(e.text for e in events)
    assert end.finish_reason == "length"
    assert text == engine.tokenizer.decode([e.token_id for e in events], skip_special_tokens=True)
    assert all(e.top_logprobs[0] == (e.token_id, pytest.approx(e.logprob)) for e in events)
    stop = next(text[n : n + 2] for n in range(3, 20) if "\ufffd" not in text[n : n + 2])
    events, end = collect(asker.submit(prompt, max_tokens=30, stop=(stop,)))
    assert end.finish_reason == "stop"
    assert "".join(e.text for e in events) == text[: text.index(stop)]
    wanted = models.answer(models.base("llama"), prompt, 30)
    engine.model.eos = frozenset([wanted[4]])
    events, end = collect(asker.submit(prompt, ignore_eos=False, max_tokens=30))
    assert [e.token_id for e in events] == wanted[: wanted.index(wanted[4]) + 1]
    assert end.finish_reason == "stop"


def test_what_cannot_be_served_is_refused_with_the_reason(engines):
    engine = engines(max_queue=0)
    with pytest.raises(PromptTooLong, match="exceed 96"):
        Asker(engine).submit([5] * 90)
    with pytest.raises(InvalidRequest, match="empty"):
        Asker(engine).submit([])
    with pytest.raises(InvalidRequest, match="vocabulary"):
        Asker(engine).submit([models.VOCAB])
    with pytest.raises(AdapterNotLoaded):
        Asker(engine).submit([5], A)
    with pytest.raises(QueueFull):
        Asker(engine).submit([5])
    engine.stop()
    with pytest.raises(EngineStopped):
        Asker(engine).submit([5])


def test_equal_ids_are_refused_while_one_runs(engines):
    engine = engines()
    request = GenerationRequest(request_id="x", prompt_ids=[5], sampling=SamplingParams(max_tokens=60))
    handle = engine.submit(request)
    with pytest.raises(DuplicateRequest):
        engine.submit(request)
    list(handle)
    list(engine.submit(request))


def test_events_arrive_on_an_event_loop(engines):
    engine = engines()

    async def ask(n):
        handle = Asker(engine).engine.submit(
            GenerationRequest(request_id=f"async{n}", prompt_ids=models.prompt(n, 4), sampling=SamplingParams())
        )
        return [event async for event in handle]

    async def all_of_them():
        return await asyncio.gather(*(ask(n) for n in range(5)))

    for events in asyncio.run(all_of_them()):
        assert isinstance(events[-1], FinishEvent)
        assert all(isinstance(e, TokenEvent) for e in events[:-1])


def test_who_was_served_least_hears_first(engines, monkeypatch):
    """On an event loop a flood's tokens of the same step would else be told before another's."""
    engine = engines(max_batch=6, prefill_chunk=64)
    told: list[tuple[float, str]] = []
    push = RequestHandle.push

    def telling(handle, event):
        if isinstance(event, TokenEvent):
            told.append((event.emitted_at, handle.request_id))
        push(handle, event)

    monkeypatch.setattr(RequestHandle, "push", telling)

    def ask(tenant, n, max_tokens):
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        asked = {"prompt_ids": models.prompt(n, 4), "sampling": sampling, "tenant": tenant}
        return engine.submit(GenerationRequest(request_id=f"{tenant}{n}", **asked))

    flood = [ask("flood", n, 80) for n in range(4)]
    next(iter(flood[0]))
    alone = [handle for n in range(5) if list(handle := ask("one", n, 1))]
    for handle in flood:
        list(handle)
    for handle in alone:
        at = next(at for at, request_id in told if request_id == handle.request_id)
        assert next(request_id for then, request_id in told if then == at) == handle.request_id


def test_a_step_calls_into_a_loop_once():
    calls = []

    class Loop:
        def call_soon_threadsafe(self, *call):
            calls.append(call)

    bell, loop, events = Bell(), Loop(), [asyncio.Event() for _ in range(3)]
    with bell.held():
        for event in events:
            bell.wake(loop, event)
        assert calls == []
    bell.wake(loop, events[0])
    for function, *arguments in calls:
        function(*arguments)
    assert len(calls) == 2
    assert all(event.is_set() for event in events)


def test_a_failing_step_ends_its_requests_and_three_end_the_engine(engines, monkeypatch):
    engine = engines()
    asker = Asker(engine)
    step = engine.model.step
    failures = iter([RuntimeError("bad step")])

    def fail_once(*args):
        for error in failures:
            raise error
        return step(*args)

    monkeypatch.setattr(engine.model, "step", fail_once)
    assert collect(asker.submit([5]))[1].error_code == "internal_error"
    assert len(tokens(asker.submit([5]))) == 12

    def fail(*_):
        raise RuntimeError("bad step")

    monkeypatch.setattr(engine.model, "step", fail)
    for _ in range(3):
        assert collect(asker.submit([5]))[1].error_code == "internal_error"
    until(lambda: not engine.healthy)


def test_stopping_ends_every_request(engines):
    engine = engines(max_model_len=256)
    handles = [Asker(engine).submit(models.prompt(1, 9), max_tokens=200)]
    engine.stop()
    assert all(collect(h)[1].error_code == "engine_stopped" for h in handles)


def test_revoking_what_had_left_its_slot_erases_it_too(engines):
    engine = engines(adapter_slots=2)
    asker, prompt = Asker(engine), models.prompt(3, 20)
    for digest, seed in ((A, 1), (B, 2)):
        engine.load(digest, source(seed))
        tokens(asker.submit(prompt, digest))
    engine.unload(A)
    until(lambda: A not in engine.stats()["adapters"])
    engine.revoke([A])
    site = next(iter(engine.model.sites.values()))
    assert [bool(site.a[n].any()) for n in range(2)].count(True) == 1
    k, _ = engine.model.cache.layers[0]
    assert int(k.flatten(1).any(1).sum()) == -(-(20 + 11) // 4)


def test_penalties_last_a_whole_answer(engines):
    asker = Asker(engines())
    prompt = models.prompt(3, 9)
    said = tokens(asker.submit(prompt, max_tokens=20, frequency_penalty=2.0, repetition_penalty=50.0))
    assert len(set(said)) == len(said) == 20
