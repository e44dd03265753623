"""vLLM's and SGLang's LoRA kernels, imported alone from `.peers/` (see `benchmarks.fetch_peers`) with small stubs.

Each class prepares one batch for one site and offers `apply(x, weights, out)`, launched as the peer launches it for a
layer: its own metadata, its own launch sizes, its own buffers.
"""

from __future__ import annotations

import importlib
import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.fetch_peers import FOLDER


def versions() -> dict[str, str]:
    """Which peers are there, and their versions."""
    path = FOLDER / "versions.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _stub(name: str, **content: Any) -> None:
    module = ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module


def _package(name: str) -> None:
    """A package whose own `__init__` is not run, so that only what is asked for is imported."""
    module = ModuleType(name)
    module.__path__ = [str(FOLDER / Path(*name.split(".")))]
    sys.modules[name] = module


def _to_device(data: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(data, dtype=dtype, device=device)


@cache
def _vllm() -> SimpleNamespace:
    for name in ("vllm", "vllm.lora", "vllm.lora.ops", "vllm.lora.ops.triton_ops", "vllm.utils"):
        _package(name)
    switches = {"VLLM_BATCH_INVARIANT": False, "VLLM_LORA_DISABLE_PDL": False, "VLLM_LORA_ENABLE_DUAL_STREAM": False}
    envs = SimpleNamespace(**switches, VLLM_TUNED_CONFIG_FOLDER=None)
    sys.modules["vllm"].envs = envs
    quiet = SimpleNamespace(warning_once=lambda *_: None, info_once=lambda *_: None)
    _stub("vllm.logger", init_logger=lambda _: quiet)
    capability = torch.cuda.get_device_capability()
    platform = SimpleNamespace(
        is_cuda=lambda: True,
        has_device_capability=lambda n: capability[0] * 10 + capability[1] >= n,
        is_device_capability=lambda n: capability[0] * 10 + capability[1] == n,
    )
    _stub("vllm.platforms", current_platform=platform)
    _stub("vllm.triton_utils", tl=tl, triton=triton)
    _stub("vllm.utils.math_utils", next_power_of_2=triton.next_power_of_2)

    def unregistered(**_: Any) -> None:
        raise AttributeError  # the kernels then call their Python functions directly

    _stub("vllm.utils.torch_utils", direct_register_custom_op=unregistered, async_tensor_h2d=_to_device)
    _use_folder()
    ops = "vllm.lora.ops.triton_ops"
    names = ("lora_shrink_op", "lora_expand_op", "lora_kernel_metadata", "utils")
    return SimpleNamespace(**{n: importlib.import_module(f"{ops}.{n}") for n in names})


@cache
def _sglang() -> SimpleNamespace:
    for name in ("sglang", "sglang.kernels", "sglang.kernels.ops", "sglang.kernels.ops.lora", "sglang.srt"):
        _package(name)
    for name in ("sglang.kernels.ops.lora.common", "sglang.kernels.ops.lora.dense", "sglang.srt.lora"):
        _package(name)
    _package("sglang.kernels.ops.lora.moe")
    _stub("sglang.kernels.ops.lora.moe.virtual_experts", _align_block_size_jit=None)
    off = SimpleNamespace(get=lambda: False)
    envs = SimpleNamespace(SGLANG_ENABLE_LORA_CSGMV_SPLIT_K=off, SGLANG_ENABLE_DETERMINISTIC_INFERENCE=off)
    _stub("sglang.srt.environ", envs=envs)
    _stub("sglang.srt.lora.utils", LoRABatchInfo=SimpleNamespace)
    _stub(
        "sglang.srt.utils",
        cached_triton_kernel=lambda _: lambda kernel: kernel,
        get_device_name=torch.cuda.get_device_name,
    )
    _stub("msgspec", Struct=_Struct)
    _use_folder()
    ops = "sglang.kernels.ops.lora"
    names = ("dense.chunked_sgmv_shrink", "dense.chunked_sgmv_expand", "common.lora_a", "common.lora_b")
    found = {n.partition(".")[2]: importlib.import_module(f"{ops}.{n}") for n in (*names, "common.route_view")}
    plans = FOLDER / "sglang/srt/lora/dense/configs/sm90.plans.json"
    return SimpleNamespace(**found, plans=json.loads(plans.read_text())["rows"])


class _Struct:
    """As much of msgspec's as SGLang's routes need."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


def _use_folder() -> None:
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))


class Vllm:
    """vLLM's lora_shrink and lora_expand, as its Punica wrapper calls them: float32 buffer, ranks padded."""

    def __init__(self, in_features: int, parts: tuple[int, ...], ranks: list[int], runs: list[tuple[int, int]]) -> None:
        self.ops = _vllm()
        self.rank, rows = max(ranks), sum(n for _, n in runs)
        mapping = torch.cat([torch.full((n,), slot) for slot, n in runs])
        meta = self.ops.lora_kernel_metadata.LoRAKernelMeta.make(len(ranks), rows, "cuda")
        meta.prepare_tensors(mapping.to(torch.int32))
        self.meta = meta.meta_args(rows, True)
        self.buffer = torch.empty(len(parts), rows, self.rank, dtype=torch.float32, device="cuda")

    @staticmethod
    def weights(a: list[list[Tensor]], b: list[list[Tensor]], rank: int) -> Any:
        """Per part: A [adapters, 1, rank, in] and B [adapters, 1, out, rank], from a[adapter][part]."""
        pads_a = [torch.stack([_pad(w[p], 0, rank) for w in a])[:, None] for p in range(len(a[0]))]
        pads_b = [torch.stack([_pad(w[p], 1, rank) for w in b])[:, None] for p in range(len(b[0]))]
        return pads_a, pads_b

    def apply(self, x: Tensor, weights: Any, out: Tensor) -> None:
        self.ops.lora_shrink_op.lora_shrink(x, weights[0], self.buffer, *self.meta, 1.0)
        self.ops.lora_expand_op.lora_expand(self.buffer, weights[1], out, *self.meta, offset_start=0, add_inputs=True)

    @staticmethod
    def forget() -> None:
        """Empty its caches of pointers: later weights may lie at the same addresses."""
        _vllm().utils._LORA_A_PTR_DICT.clear()
        _vllm().utils._LORA_B_PTR_DICT.clear()


class _Sglang:
    def __init__(self, in_features: int, parts: tuple[int, ...], ranks: list[int], runs: list[tuple[int, int]]) -> None:
        self.ops = _sglang()
        self.in_features, self.parts, self.ranks, self.runs = in_features, parts, ranks, runs
        self.rows, self.rank = sum(n for _, n in runs), max(ranks)
        self.offsets = [sum(parts[:i]) for i in range(len(parts) + 1)]
        self.device_ranks = torch.tensor(ranks, dtype=torch.int32, device="cuda")
        self.scalings = torch.ones(len(ranks), device="cuda")

    @staticmethod
    def weights(a: list[list[Tensor]], b: list[list[Tensor]], rank: int) -> Any:
        """A [adapters, parts * rank, in], an adapter's parts packed at its own rank; B [adapters, out, rank]."""
        stacked = [_pad(torch.cat(w), 0, rank * len(w)) for w in a]
        return torch.stack(stacked), torch.stack([torch.cat([_pad(p, 1, rank) for p in w]) for w in b])


class SglangChunked(_Sglang):
    """SGLang's default backend, csgmv."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        chunk = 128 if self.rows >= 256 else 32 if self.rows >= 64 else 16
        segments = [(slot, min(chunk, n - i)) for slot, n in self.runs for i in range(0, n, chunk)]
        starts = [sum(n for _, n in segments[:i]) for i in range(len(segments) + 1)]
        self.info = SimpleNamespace(
            use_cuda_graph=True,
            num_segments=len(segments),
            seg_indptr=torch.tensor(starts, dtype=torch.int32, device="cuda"),
            weight_indices=torch.tensor([s for s, _ in segments], dtype=torch.int32, device="cuda"),
            lora_ranks=self.device_ranks,
            scalings=self.scalings,
            max_len=chunk,
            permutation=torch.arange(self.rows, dtype=torch.int32, device="cuda"),
        )
        self.slices = torch.tensor(self.offsets, dtype=torch.int32)
        self.device_slices = self.slices.cuda()

    def apply(self, x: Tensor, weights: Any, out: Tensor) -> None:
        h = self.ops.chunked_sgmv_shrink.chunked_sgmv_lora_shrink_forward(x, weights[0], self.info, len(self.parts))
        self.ops.chunked_sgmv_expand.chunked_sgmv_lora_expand_forward(
            h, weights[1], self.info, self.device_slices, max(self.parts), out, self.slices
        )


class SglangPlans(_Sglang):
    """SGLang's triton_v2 backend with the plan that its table names, A and B one after the other."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.plan = self._plan()
        views = self.ops.route_view
        slots = torch.cat([torch.full((n,), slot, dtype=torch.int32) for slot, n in self.runs]).cuda()
        common = {"token_slots": slots, "group_ids": None, "groups_per_slot": 1, "max_loras": len(self.ranks)}
        self.raw = views.RouteView(view=views.RouteViewKind.RAW, block_size=1, **common)
        size = self.plan["block_size"]
        rows: list[int] = []
        buckets: list[int] = []
        row = 0
        for slot, n in self.runs:
            rows += [*range(row, row + n), *([self.rows] * (-n % size))]
            buckets += [slot] * -(-n // size)
            row += n
        self.aligned = views.RouteView(
            view=views.RouteViewKind.ALIGNED,
            block_size=size,
            maybe_sorted_pair_ids=torch.tensor(rows, dtype=torch.int32, device="cuda"),
            maybe_block_bucket_ids=torch.tensor(buckets, dtype=torch.int32, device="cuda"),
            maybe_num_pairs_post_padded=torch.tensor([len(rows)], dtype=torch.int32, device="cuda"),
            **common,
        )
        width, split = self.rank * len(self.parts), int(self.plan["a_tiles"].get("SPLIT_K", 1))
        self.bridge = torch.empty(self.rows, width, dtype=torch.bfloat16, device="cuda")
        self.partial = torch.empty(split, self.rows, width, device="cuda") if split > 1 else None
        self.counters = torch.zeros(len(buckets) * (width // 16 + 1), dtype=torch.int32, device="cuda")
        self.all_slots = torch.empty(self.rows, len(self.ranks) * width, dtype=torch.bfloat16, device="cuda")
        self.geometry = self.ops.lora_b.slice_geometry(
            tuple(self.offsets), self.plan["b_tiles"]["BLOCK_SIZE_N"], torch.device("cuda")
        )

    def _plan(self) -> dict[str, Any]:
        bounds = {
            "max_tokens": self.rows,
            "max_rank": self.rank,
            "max_in_features": self.in_features,
            "max_out_features": self.offsets[-1],
        }
        for row in self.ops.plans:
            if row.get("phase", "decode") != "decode" or "linear" not in row.get("kinds", ["linear"]):
                continue
            if any(value > row.get(name, value) for name, value in bounds.items()):
                continue
            least = {n.replace("max", "min"): v for n, v in bounds.items()}
            if any(value < row.get(name, value) for name, value in least.items()):
                continue
            return dict(row["spec"])
        raise LookupError("no plan of SGLang's matches this site")

    def apply(self, x: Tensor, weights: Any, out: Tensor) -> None:
        a, b = weights
        plan, tiles = self.plan, self.plan["a_tiles"]
        bridge, planes, slot_planes = self.bridge, 1, False
        match plan["a_family"]:
            case "grouped":
                split = int(tiles.get("SPLIT_K", 1))
                self.ops.lora_a.grouped_lora_a(
                    x,
                    a,
                    bridge,
                    self.aligned,
                    config=tiles,
                    pair_input=True,
                    lora_ranks=self.device_ranks,
                    stack=len(self.parts),
                    partial=self.partial,
                    counters=self.counters,
                )
                if split > 1 and tiles.get("SPLIT_MODE", "serial") == "planes":
                    bridge, planes = self.partial, split
            case "per_row":
                self.ops.lora_a.per_row_lora_a(x, a, bridge, self.raw, config=tiles, stack=len(self.parts))
            case "all_slots":
                slots, width, k = a.shape
                torch.matmul(x, a.reshape(slots * width, k).t(), out=self.all_slots)
                bridge, slot_planes = self.all_slots.view(self.rows, slots, width).transpose(0, 1), True
        common = {
            "geometry": self.geometry,
            "config": plan["b_tiles"],
            "add_inplace": True,
            "zero_sentinel": False,
            "lora_ranks": self.device_ranks,
            "scalings": self.scalings,
            "planes": planes,
        }
        if plan["b_family"] == "grouped":
            self.ops.lora_b.grouped_lora_b(bridge, b, out, self.aligned, **common)
        else:
            self.ops.lora_b.per_row_lora_b(bridge, b, out, self.raw, slot_planes=slot_planes, **common)


def _pad(weight: Tensor, dim: int, size: int) -> Tensor:
    missing = list(weight.shape)
    missing[dim] = size - missing[dim]
    return torch.cat([weight, weight.new_zeros(missing)], dim)


PEERS = {"vllm": Vllm, "sglang_csgmv": SglangChunked, "sglang_v2": SglangPlans}
