"""Modules of the base replaced by equivalents of fewer operators, wherever a probe shows that they compute the same.

On a CPU a decode step is bound by its number of operators as much as by its arithmetic. Nothing here knows a model
family: a replacement is tried on every module that has the right parts, and kept if its output is equal.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from riverdelta.kernels import PackedLinear, native

from .attention import AttentionOptions, StepContext, paged_attention, rotate_and_attend
from .linears import LoraSite, MergedPart, Runtime

logger = logging.getLogger(__name__)


class FusedNorm(nn.Module):
    """RMS normalisation over the last dimension in one operator (Zhang & Sennrich 2019)."""

    def __init__(self, weight: Tensor, eps: float, compiled: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps, self.compiled = eps, compiled

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]; fp32 whatever `x` is, where compiled."""
        if self.compiled and x.is_contiguous():
            return native.rms_norm(x, self.weight, self.eps)
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


class FusedAttention(nn.Module):
    """Attention with rotary positions (Su et al. 2021): queries and keys are normalised and rotated together."""

    def __init__(self, inner: Any, options: AttentionOptions, compiled: bool = False) -> None:
        """`inner`: the module replaced; `options`: what it passes to attention."""
        super().__init__()
        self.compiled = compiled
        self.inner, self.site, self.options, self.head_dim = inner, inner.q_proj.site, options, int(inner.head_dim)
        self.heads = inner.q_proj.columns.stop // self.head_dim
        self.kv_heads = inner.k_proj.columns.stop // self.head_dim - self.heads
        self.norm: Tensor | None = None
        self.eps = 0.0
        q_norm, k_norm = getattr(inner, "q_norm", None), getattr(inner, "k_norm", None)
        if isinstance(q_norm, FusedNorm) and isinstance(k_norm, FusedNorm):
            self.norm = torch.cat([q_norm.weight.expand(self.heads, -1), k_norm.weight.expand(self.kv_heads, -1)])
            self.eps = q_norm.eps

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        *,
        paged: StepContext,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """transformers' attention module: `hidden_states` [1, rows, hidden] -> ([1, rows, hidden], None)."""
        if self.compiled:
            qkv = self.site.packed(hidden_states[0]).unflatten(-1, (-1, self.head_dim))
            cosine, sine = (x[0].float().contiguous() for x in position_embeddings)
            norm = (self.norm, self.eps)
            got = rotate_and_attend(self.inner, qkv, norm, (cosine, sine), self.heads, self.options, paged)
            return self.inner.o_proj(got[None].flatten(2)), None
        rotated = self.heads + self.kv_heads
        qkv = self.site(hidden_states)[0].unflatten(-1, (-1, self.head_dim))
        qk = qkv[:, :rotated]
        if self.norm is not None:
            qk = rms_norm(qk, (self.head_dim,), None, self.eps) * self.norm
        cos, sin = position_embeddings
        turn = paged.once(sin, _signed)
        qk = torch.addcmul(qk * cos[0, :, None], qk.roll(self.head_dim // 2, -1), turn[0, :, None])
        heads = qk.transpose(0, 1)[None]
        out = paged_attention(
            self.inner,
            heads[:, : self.heads],
            heads[:, self.heads :],
            qkv[:, rotated:].transpose(0, 1)[None],
            None,
            *self.options,
            paged=paged,
        )[0]
        return self.inner.o_proj(out.flatten(2)), None


def _signed(sin: Tensor) -> Tensor:
    """`sin` for a rotation written as a roll: its first half changes sign."""
    first, second = sin.chunk(2, -1)
    return torch.cat((-first, second), -1)


def fuse_norms(model: nn.Module, compiled: bool = False) -> int:
    """Replace every RMS normalisation of one weight vector; returns how many."""
    count = 0
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if (fused := _fused_norm(module, compiled)) is not None:
                setattr(parent, name, fused)
                count += 1
    return count


def _fused_norm(module: nn.Module, compiled: bool) -> FusedNorm | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    if "RMSNorm" not in type(module).__name__ or not isinstance(weight, Tensor) or weight.ndim != 1 or eps is None:
        return None
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight) * 3
    wanted = module(x)
    for candidate in (weight.detach(), 1.0 + weight.detach().float()):
        fused = FusedNorm(candidate.to(weight.dtype), float(eps), compiled)
        if _equal(fused(x), wanted, weight.dtype):
            return fused
    return None


def fuse_attention(
    model: nn.Module, run: Callable[[], object], cache_dtype: torch.dtype, compiled: bool = False
) -> int:
    """Replace attention modules that `run`, a step of this model, shows to be rotary self-attention."""
    parents = [(p, n, m) for p in model.modules() for n, m in p.named_children() if _has_parts(m)]
    seen = _observed([m for _, _, m in parents], run)
    count = 0
    for parent, name, module in parents:
        if module not in seen:
            continue
        _, kwargs, (wanted, _) = seen[module]
        context: StepContext = kwargs["paged"]
        try:
            fused = FusedAttention(module, context.options[module.layer_idx])  # type: ignore[index]
            fused.compiled = compiled and native.fits_rotate(fused.heads, fused.kv_heads, fused.head_dim)
            got, _ = fused(**kwargs)
        except (TypeError, ValueError, RuntimeError) as error:  # not the module it looked like
            logger.debug("Keeping %s: %s", type(module).__name__, error)
            continue
        if _equal(got, wanted, cache_dtype):
            setattr(parent, name, fused)
            count += 1
    return count


class FusedMlp(nn.Module):
    """A gated MLP whose activation and product are one operator."""

    def __init__(self, inner: Any, activation: str) -> None:
        super().__init__()
        self.inner, self.activation = inner, activation

    def forward(self, x: Tensor) -> Tensor:
        """[1, rows, hidden] -> [1, rows, hidden]."""
        both = self.inner.gate_proj.site.packed(x[0])
        return torch.as_tensor(self.inner.down_proj(native.gated(both, self.activation)[None]))


def fuse_mlps(model: nn.Module) -> int:
    """Replace every gated MLP that one of the compiled activations equals; returns how many."""
    count = 0
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            gate, up, down = (getattr(module, f"{n}_proj", None) for n in ("gate", "up", "down"))
            if not (isinstance(gate, MergedPart) and isinstance(up, MergedPart) and isinstance(down, LoraSite)):
                continue
            if gate.site is not up.site or gate.columns.start or gate.columns.stop % native.LANES:
                continue
            width = gate.site.pool.in_features
            x = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0))
            wanted = module(x)
            for activation in native.ACTIVATIONS:
                fused = FusedMlp(module, activation)
                if _equal(fused(x), wanted, torch.bfloat16):
                    setattr(parent, name, fused)
                    count += 1
                    break
            gate._shared.clear()
    return count


class FusedLayer(nn.Module):
    """A decoder layer in one call, for a CPU with products of ours; by its modules in steps that see much."""

    def __init__(self, inner: Any, runtime: Runtime) -> None:
        """`inner`: the layer replaced, its parts fused. Raises `TypeError` if it is not made of them."""
        super().__init__()
        self.inner, self.runtime = inner, runtime
        attention, mlp = inner.self_attn, inner.mlp
        if not (isinstance(attention, FusedAttention) and attention.compiled and isinstance(mlp, FusedMlp)):
            raise TypeError("other attention or MLP")
        gemma = hasattr(inner, "pre_feedforward_layernorm")
        self.norms = (
            _norm(inner.input_layernorm),
            _norm(inner.post_attention_layernorm) if gemma else None,
            _norm(inner.pre_feedforward_layernorm if gemma else inner.post_attention_layernorm),
            _norm(inner.post_feedforward_layernorm) if gemma else None,
        )
        self.sites = (
            _site(attention.site),
            _site(attention.inner.o_proj),
            _site(mlp.inner.gate_proj.site),
            _site(mlp.inner.down_proj),
        )
        self.attention, self.activation = attention, mlp.activation
        self.native: native.Layer | None = None

    def forward(
        self, hidden_states: Tensor, *args: Any, position_embeddings: Any, paged: StepContext, **kwargs: Any
    ) -> Tensor:
        """transformers' decoder layer: `hidden_states` [1, rows, hidden] -> [1, rows, hidden], fp32."""
        seen = paged.by_row()
        if seen is None:
            kwargs |= {"position_embeddings": position_embeddings, "paged": paged}
            return torch.as_tensor(self.inner(hidden_states, *args, **kwargs))
        if self.native is None:
            self.native = self._described(paged)
        hidden = hidden_states.clone()
        self.native.decode(
            hidden[0],
            position_embeddings[0][0].float().contiguous(),
            position_embeddings[1][0].float().contiguous(),
            paged.positions,
            *seen,
            self.runtime.segments.tiles,
        )
        return hidden

    def _described(self, paged: StepContext) -> native.Layer:
        attention = self.attention
        scaling = attention.options.scaling
        return native.Layer(
            self.sites,
            self.norms,
            self.activation,
            attention.heads,
            (attention.norm, attention.eps),
            attention.head_dim**-0.5 if scaling is None else scaling,
            attention.options.sliding_window or 0,
            paged.cache.layers[int(attention.inner.layer_idx)],
        )


def _norm(module: nn.Module) -> native.Norm:
    if not isinstance(module, FusedNorm):
        raise TypeError(f"another norm: {type(module).__name__}")
    return native.Norm(module.weight.detach().float(), module.eps)


def _site(site: LoraSite) -> native.Site:
    packed = site.linear.inner
    if not (isinstance(packed, PackedLinear) and packed.compiled and isinstance(packed.weight, Tensor)):
        raise TypeError("a product of a library")
    return native.Site(packed.weight, packed.bias, site.pool)


def fuse_layers(model: nn.Module, runtime: Runtime, run: Callable[[], object]) -> int:
    """Replace decoder layers that `run`, a decode step of this model, shows to be norms, attention and a gated MLP
    added to what they read; returns how many."""
    found = [(p, n, m) for p in model.modules() for n, m in p.named_children() if hasattr(m, "self_attn")]
    seen = _observed([m for _, _, m in found], run)
    count = 0
    for parent, name, module in found:
        try:
            args, kwargs, wanted = seen[module]
            fused = FusedLayer(module, runtime)
            if args[0].dtype != torch.float32:
                continue
            got = fused(*args, **kwargs)
            same = _equal(got - args[0], wanted - args[0], torch.bfloat16)
        except (TypeError, AttributeError, KeyError, IndexError) as error:  # not the layer it looked like
            logger.debug("Keeping %s: %s", type(module).__name__, error)
            continue
        if same:
            setattr(parent, name, fused)
            count += 1
    return count


def _observed(
    modules: Iterable[nn.Module], run: Callable[[], object]
) -> dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any], Any]]:
    """What each of these modules that `run` calls is given, and what it returns."""
    seen: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        seen[module] = (args, kwargs, out)

    hooks = [module.register_forward_hook(record, with_kwargs=True) for module in modules]
    run()
    for hook in hooks:
        hook.remove()
    return seen


def _has_parts(module: nn.Module) -> bool:
    parts = [getattr(module, f"{n}_proj", None) for n in "qkv"]
    return (
        all(isinstance(p, MergedPart) for p in parts)
        and len({id(p.site) for p in parts if isinstance(p, MergedPart)}) == 1
        and hasattr(module, "o_proj")
        and hasattr(module, "layer_idx")
        and isinstance(getattr(module, "head_dim", None), int)
    )


def _equal(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    error = (got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6)
    return got.shape == wanted.shape and bool(error < (1e-4 if dtype == torch.float32 else 0.03))
