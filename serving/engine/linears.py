"""The base's frozen linear layers, packed, with the batch's adapters added to what they compute."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from riverdelta.core.errors import Unsupported
from riverdelta.kernels import LoraPool, PackedLinear, Segments, lora_delta

# Siblings that read the same input: one product serves them.
_MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


# Rows a product where a row's bits must not depend on how many there are: on a GPU always so many, on a CPU at most.
_TILE = 64


class Frozen(nn.Module):
    """`x @ weight.T + bias`: packed as `mode` says on a CPU, as it is (mode None) on a GPU; `exact`: in fixed tiles."""

    def __init__(self, weight: Tensor, bias: Tensor | None, mode: str | None, exact: bool = False) -> None:
        super().__init__()
        self.exact = exact
        self.inner: nn.Module
        if mode is None:
            self.inner = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
            self.inner.weight = nn.Parameter(weight, requires_grad=False)
            if bias is not None:
                self.inner.bias = nn.Parameter(bias, requires_grad=False)
            self.dtype = weight.dtype
        else:
            self.inner = PackedLinear(weight, bias, mode)  # type: ignore[arg-type]
            self.dtype = self.inner.dtype

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in `dtype`."""
        x = x.to(self.dtype)
        if not self.exact:
            return torch.as_tensor(self.inner(x))
        tiles = list(torch.split(x.flatten(0, -2), _TILE))
        rows = sum(map(len, tiles))
        # oneDNN sums the product of a single row in an order of its own, cuBLAS that of every height.
        least = _TILE if x.is_cuda else 2
        tiles[-1] = nn.functional.pad(tiles[-1], (0, 0, 0, max(0, least - len(tiles[-1]))))
        out = torch.cat([self.inner(tile) for tile in tiles])[:rows]
        return out.view(*x.shape[:-1], out.shape[-1])


class LoraSite(nn.Module):
    """One frozen product with the batch's adapters added: one module of the base, or several merged."""

    def __init__(
        self, linears: list[nn.Linear], pool: LoraPool, mode: str | None, exact: bool, runtime: "Runtime"
    ) -> None:
        super().__init__()
        weight = torch.cat([m.weight.detach() for m in linears])
        bias = None
        if any(m.bias is not None for m in linears):
            bias = torch.cat([weight.new_zeros(m.out_features) if m.bias is None else m.bias for m in linears])
        self.linear = Frozen(weight, None if bias is None else bias.detach(), mode, exact)
        self.pool = pool
        self.runtime = runtime

    def forward(self, x: Tensor) -> Tensor:
        """[1, rows, in] -> [1, rows, out]."""
        return self.packed(x[0]).to(x.dtype)[None]

    def packed(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out], in the dtype that the product is computed in."""
        x = x.to(self.linear.dtype)
        out = self.linear(x)
        lora_delta(x, self.pool, self.runtime.segments, out)
        return torch.as_tensor(out)


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

    def end_step(self) -> None:
        """Let go of activations."""
        for shared in self.shared:
            shared.clear()


Group = tuple[nn.Module, tuple[str, ...], list[nn.Linear]]


def linear_groups(model: Any, head: nn.Module) -> list[Group]:
    """The decoder's linear layers, those that share an input together: (parent, module paths, layers)."""
    groups = list(_groups(model, head))
    if not groups:
        raise Unsupported(f"{type(model).__name__} has no linear layers to serve.", "Choose a decoder model.")
    return groups


def _groups(model: Any, head: nn.Module) -> Iterator[Group]:
    for path, parent in list(model.named_modules()):
        prefix = f"{path}." if path else ""
        children = {n: c for n, c in parent.named_children() if type(c) is nn.Linear and c is not head}
        for merged in _MERGED:
            if all(n in children for n in merged) and len({children[n].in_features for n in merged}) == 1:
                yield parent, tuple(prefix + n for n in merged), [children.pop(n) for n in merged]
        for name, child in children.items():
            yield parent, (prefix + name,), [child]


def wrap(group: Group, pool: LoraPool, mode: str | None, exact: bool, runtime: Runtime) -> None:
    """Put a group's site in its modules' places."""
    parent, paths, members = group
    site = LoraSite(members, pool, mode, exact, runtime)
    names = [p.rpartition(".")[2] for p in paths]
    if len(members) == 1:
        setattr(parent, names[0], site)
        return
    shared: dict[str, Tensor] = {}
    runtime.shared.append(shared)
    for name, begin, end in zip(names, pool.columns[:-1], pool.columns[1:], strict=True):
        setattr(parent, name, MergedPart(site, slice(begin, end), shared))
