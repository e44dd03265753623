"""The engine as a side of `benchmarks.serving`: BASE ADAPTERS, then a round a line of standard input."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from riverdelta.serving.engine import Engine, EngineConfig, FinishEvent, GenerationRequest, SamplingParams, TokenEvent


def main() -> None:
    """Serve rounds until standard input ends."""
    base, adapters = sys.argv[1], Path(sys.argv[2])
    engine = Engine.from_pretrained(
        base, EngineConfig(max_batch=32, max_model_len=512, prefix_cache=False, adapter_slots=16, max_rank=16)
    )
    folders = sorted(adapters.iterdir(), key=lambda f: int(f.name))
    for folder in folders:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        engine.load(folder.name, lambda c=config, t=tensors: (c, t))  # type: ignore[misc]
    engine.start()
    print(
        json.dumps({"linears": engine.model.mode, "head": "int8 screen" if engine.model.screen else "full"}), flush=True
    )
    for line in sys.stdin:
        print(json.dumps(round_of(engine, [f.name for f in folders], json.loads(line))), flush=True)
    engine.stop()


def round_of(engine: Engine, digests: list[str], asked: dict[str, Any]) -> dict[str, Any]:
    """All requests at once, to the end of the last."""
    sampling = SamplingParams(max_tokens=asked["answer"], temperature=0.0, ignore_eos=True)
    begin = time.perf_counter()
    handles = [
        engine.submit(
            GenerationRequest(
                request_id=str(n),
                prompt_ids=prompt,
                digest=digests[n % len(digests)] if asked["case"] == "adapters" else None,
                sampling=sampling,
            )
        )
        for n, prompt in enumerate(asked["prompts"])
    ]
    events = [list(handle) for handle in handles]
    seconds = time.perf_counter() - begin
    assert all(isinstance(e[-1], FinishEvent) and e[-1].finish_reason == "length" for e in events)
    tokens = [[e.token_id for e in answer if isinstance(e, TokenEvent)] for answer in events]
    return {"seconds": seconds, "tokens": tokens}


if __name__ == "__main__":
    main()
