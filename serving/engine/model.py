"""A Hugging Face decoder made to run packed steps: its own modules, paged attention, linears with LoRA beside them."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from riverdelta.core.errors import Unsupported
from riverdelta.kernels import LoraPool, PackedLinear, Segments, choose_backend, lora_delta

from . import attention
from .config import EngineConfig

logger = logging.getLogger(__name__)

# Siblings that read the same input: one product serves them.
_MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class LoraSite(nn.Module):
    """One frozen linear product with the batch's adapters added: one module of the base, or several merged."""

    def __init__(self, linears: list[nn.Linear], pool: LoraPool, mode: str | None, runtime: "Runtime") -> None:
        super().__init__()
        weight = torch.cat([m.weight.detach() for m in linears])
        biases = [m.bias for m in linears]
        bias = None
        if any(b is not None for b in biases):
            bias = torch.cat([weight.new_zeros(m.out_features) if m.bias is None else m.bias for m in linears])
        self.linear = _frozen(weight, bias, mode)
        self.pool = pool
        self.runtime = runtime

    def forward(self, x: Tensor) -> Tensor:
        """[1, rows, in] -> [1, rows, out]."""
        out = _apply(self.linear, x)
        lora_delta(x[0], self.pool, self.runtime.segments, out[0])
        return out


class MergedPart(nn.Module):
    """One module of a merged site: the first one called computes for all, the others take their columns."""

    def __init__(self, site: LoraSite, columns: slice, shared: dict[str, Tensor]) -> None:
        super().__init__()
        self.site, self.columns, self._shared = site, columns, shared

    def forward(self, x: Tensor) -> Tensor:
        """[1, rows, in] -> [1, rows, this part's width]."""
        if self._shared.get("x") is not x:
            self._shared.update(x=x, out=self.site(x))
        return self._shared["out"][..., self.columns]


class Runtime:
    """What the wrapped modules read during a step."""

    def __init__(self, device: torch.device) -> None:
        self.segments = Segments.build([], device)
        self.shared: list[dict[str, Tensor]] = []


class PagedModel:
    """The decoder, its KV cache and its LoRA pools. `linears`: module path -> (in, out) of what adapters can change."""

    def __init__(self, model: Any, config: EngineConfig) -> None:
        self.device = torch.device(config.device)
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.hf = model.to(device=self.device, dtype=self.dtype).eval().requires_grad_(False)
        self.hf.set_attn_implementation(attention.NAME)
        self.config = self.hf.config.get_text_config()
        self.vocab_size = int(self.config.vocab_size)
        self.max_positions = int(getattr(self.config, "max_position_embeddings", None) or config.max_model_len)
        self.eos = _eos_ids(self.hf)
        self.runtime = Runtime(self.device)
        self.linears: dict[str, tuple[int, int]] = {}
        self.sites: dict[tuple[str, ...], LoraPool] = {}
        self._wrap(config)
        cache_dtype = torch.bfloat16 if self.mode == "bf16" else self.dtype
        self.cache = attention.KVCache(config.blocks, config.block_size, cache_dtype, self.device)

    @classmethod
    def from_pretrained(cls, path: str, config: EngineConfig) -> "PagedModel":
        """Load a model folder (safetensors only: nothing in it is executed)."""
        logger.info("Loading the base model from %s", path)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, config.dtype), use_safetensors=True, trust_remote_code=False
        )
        return cls(model, config)

    @torch.inference_mode()
    def step(
        self, tokens: Tensor, positions: Tensor, context: attention.StepContext, segments: Segments, keep: Tensor
    ) -> Tensor:
        """One packed step: `tokens`, `positions` int64 [rows]; logits [kept, vocab] of the rows `keep`."""
        self.runtime.segments = segments
        try:
            out = self.hf(
                input_ids=tokens[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=keep,
                paged=context,
            )
            return torch.as_tensor(out.logits[0])
        finally:
            for shared in self.runtime.shared:
                shared.clear()

    @torch.inference_mode()
    def check(self) -> None:
        """Two chunks and a decode must agree with the model's own attention, or `Unsupported` is raised."""
        length = min(3 * self.cache.block_size, self.max_positions) - 1
        tokens = torch.arange(length, device=self.device) * 7919 % self.vocab_size
        self.hf.set_attn_implementation("eager")
        self.runtime.segments = Segments.build([], self.device)
        wanted = self.hf(input_ids=tokens[None], use_cache=False).logits[0, -1].float()
        self.hf.set_attn_implementation(attention.NAME)
        at = torch.arange(length, device=self.device)
        for begin, end in ((0, length // 2), (length // 2, length - 1), (length - 1, length)):
            decodes = torch.tensor([end], dtype=torch.int32, device=self.device)[: end - begin == 1]
            context = attention.StepContext(
                self.cache,
                at[begin:end],
                torch.arange(-(-length // self.cache.block_size), dtype=torch.int32, device=self.device)[None][
                    : len(decodes)
                ],
                decodes,
                [] if len(decodes) else [attention.Chunk(0, end - begin, begin, at[:end])],
            )
            keep = torch.tensor([end - begin - 1], device=self.device)
            logits = self.step(tokens[begin:end], at[begin:end], context, Segments.build([], self.device), keep)
        self.cache.zero(list(range(-(-length // self.cache.block_size))))
        error = float((logits[0].float() - wanted).abs().max() / wanted.std())
        exact = self.dtype == torch.float32 and self.mode in (None, "fp32", "torch")
        if not error < (1e-3 if exact else 0.3):
            raise Unsupported(
                f"{type(self.hf).__name__} does not compute the same through the paged cache (off by {error:.2g}).",
                "Its attention has something that serving has no path for; choose another base model.",
            )

    def _wrap(self, config: EngineConfig) -> None:
        head = self.hf.get_output_embeddings()
        groups = list(_groups(self.hf, head))
        mode: str | None = None
        if self.device.type == "cpu":
            shapes = [(sum(m.out_features for m in g), g[0].in_features) for _, _, g in groups]
            shapes.append((head.out_features, head.in_features))
            mode = config.cpu_backend
            if mode == "auto":
                mode = choose_backend(shapes, config.max_batch, exact=config.batch_invariant)
        self.mode = mode
        logger.info("Packing %d linear sites (%s)", len(groups), mode or self.dtype)
        for parent, names, members in groups:
            paths = tuple(names)
            widths = [m.out_features for m in members]
            self.linears.update({p: (m.in_features, m.out_features) for p, m in zip(paths, members, strict=True)})
            pool = LoraPool(
                config.adapter_slots,
                members[0].in_features,
                sum(widths),
                config.max_rank,
                self.dtype,
                self.device,
                parts=widths,
            )
            self.sites[paths] = pool
            site = LoraSite(members, pool, mode, self.runtime)
            if len(members) == 1:
                setattr(parent, paths[0].rpartition(".")[2], site)
                continue
            shared: dict[str, Tensor] = {}
            self.runtime.shared.append(shared)
            for path, begin, end in zip(paths, pool.columns, pool.columns[1:], strict=False):
                setattr(parent, path.rpartition(".")[2], MergedPart(site, slice(begin, end), shared))
        if mode is not None:
            self.hf.set_output_embeddings(_Head(_frozen(head.weight.detach(), head.bias, mode)))


class _Head(nn.Module):
    """The vocabulary projection, packed."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return _apply(self.linear, x)


def _groups(model: Any, head: nn.Module) -> Iterator[tuple[nn.Module, list[str], list[nn.Linear]]]:
    """The decoder's linear layers, those that share an input together: (parent, module paths, layers)."""
    found = 0
    for path, parent in list(model.named_modules()):
        children = {
            name: child for name, child in parent.named_children() if type(child) is nn.Linear and child is not head
        }
        found += len(children)
        for merged in _MERGED:
            if all(n in children for n in merged) and len({children[n].in_features for n in merged}) == 1:
                yield parent, [f"{path}.{n}" for n in merged], [children.pop(n) for n in merged]
        for name, child in children.items():
            yield parent, [f"{path}.{name}" if path else name], [child]
    if not found:
        raise Unsupported(f"{type(model).__name__} has no linear layers to serve.", "Choose a decoder model.")


def _eos_ids(model: Any) -> frozenset[int]:
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = model.config.get_text_config().eos_token_id
    return frozenset([eos] if isinstance(eos, int) else eos or [])


def _frozen(weight: Tensor, bias: Tensor | None, mode: str | None) -> nn.Module:
    if mode is not None:
        return PackedLinear(weight, bias, mode)  # type: ignore[arg-type]
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def _apply(linear: nn.Module, x: Tensor) -> Tensor:
    """`linear` in its own dtype, the answer in that of `x`."""
    dtype = getattr(linear, "dtype", x.dtype)
    return torch.as_tensor(linear(x.to(dtype))).to(x.dtype)
