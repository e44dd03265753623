"""The frozen base model as the trainer runs it: rows of several adapters side by side in one flat step."""

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from riverdelta.core import base as base_files
from riverdelta.core.errors import Unsupported
from riverdelta.core.recipe import Lora
from riverdelta.kernels.training import Group, grouped_lora, grouped_lora_backward

from .layout import Block
from .norms import row_norm
from .products import FrozenProduct
from .shape import LoraShape, resolve

ATTENTION = "riverdelta_rows"


@dataclass(frozen=True)
class Member:
    """One adapter's part in a step: A, B and scale per module path, and how many of the step's tokens it has.

    `slopes` are where the gradients of A and B are added to; a step that is to learn has them for every path.
    """

    weights: Mapping[str, tuple[Tensor, Tensor, float]]
    tokens: int
    slopes: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Site(nn.Module):
    """A frozen linear layer of the base, with the step's adapters beside it."""

    def __init__(self, path: str, layer: nn.Linear, product: FrozenProduct, step: "Step") -> None:
        super().__init__()
        self.path, self.product, self._step = path, product, step
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._bias = None if layer.bias is None else layer.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        flat = x.reshape(-1, self.in_features)
        members = self._step.members
        if members and self.path in members[0].weights:
            out: Tensor = _Adapted.apply(flat, self._step.learns, self, members)  # type: ignore[no-untyped-call]
        else:
            out = self.product(flat)
            if self._bias is not None:
                out = out + self._bias
        return out.view(*x.shape[:-1], self.out_features)

    def frozen(self, x: Tensor) -> Tensor:
        """The base's part, [rows, in] -> [rows, out], in memory of its own and without a gradient."""
        out = self.product.forward(x)
        return out if self._bias is None else out.add_(self._bias)


class _Adapted(torch.autograd.Function):
    """A site with its adapters. Their gradients go straight to where the members want them: as thousands of leaves of a
    graph they would cost more than they take to compute."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, learns: Tensor, site: Site, members: Sequence[Member]) -> Tensor:
        groups = [Group(*member.weights[site.path], member.tokens) for member in members]
        out = site.frozen(x)
        ctx.hidden = grouped_lora(x, groups, out)
        ctx.save_for_backward(x)
        ctx.site, ctx.groups, ctx.slopes = site, groups, [member.slopes.get(site.path) for member in members]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,), slope = ctx.saved_tensors, grads[0].contiguous()
        slope_x = ctx.site.product.transposed(slope) if ctx.needs_input_grad[0] else None
        grouped_lora_backward(x, ctx.groups, ctx.hidden, slope, ctx.slopes, slope_x)
        return slope_x, None, None, None


class Apart(nn.Module):
    """A norm of the base that is no plain RMS norm, computed for each adapter's tokens by themselves: how a row is
    summed may depend on how many rows there are."""

    def __init__(self, norm: nn.Module, step: "Step") -> None:
        super().__init__()
        self._norm, self._step = norm, step

    def forward(self, x: Tensor) -> Tensor:
        """[1, tokens, width], [1, tokens, heads, dim] or [1, heads, tokens, dim] -> the same shape."""
        tokens = [member.tokens for member in self._step.members]
        dim = 1 if x.shape[1] == sum(tokens) else 2
        # One adapter takes this way too: it decides in which order gradients are added.
        return torch.cat([self._norm(part.clone()) for part in torch.split(x, tokens, dim)], dim)


class Step:
    """What the wrapped modules read while a step runs."""

    def __init__(self, device: torch.device) -> None:
        self.members: Sequence[Member] = ()
        # Brings the backward pass to every site with adapters, though nothing that flows into the first ones wants it.
        self.learns = torch.zeros((), device=device, requires_grad=True)


class _Given(nn.Module):
    """Stands in for the decoder where only its head is wanted: gives back the hidden states that it is handed."""

    def forward(self, **given: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=given["inputs_embeds"])


class Base:
    """A Hugging Face decoder, frozen. One step at a time; nothing of a step stays behind.

    `digest` names the model's files; `device`, `dtype` and `threads` are part of the environment fingerprint.
    """

    def __init__(self, model: Any, tokenizer: Any, digest: str, device: str, dtype: str, threads: int) -> None:
        self.tokenizer, self.digest = tokenizer, digest
        self.device, self.dtype, self.threads = torch.device(device), dtype, threads
        self.config = model.config
        self._model = model.to(device=self.device, dtype=torch.float32).eval().requires_grad_(False)
        self._model.set_attn_implementation(ATTENTION)
        self._step = Step(self.device)
        self._shapes: dict[Lora, LoraShape] = {}
        self._wrap()
        self._head = copy.copy(self._model)
        self._head._modules = {**self._model._modules, self._model.base_model_prefix: _Given()}

    @classmethod
    def load(cls, folder: Path, device: str = "cpu", dtype: str = "float32", threads: int = 0) -> "Base":
        """Load a model folder (safetensors only: nothing in it is executed) and fix the process's arithmetic.

        `dtype` is that of the base's products; everything else is computed in float32. `threads` 0 means all cores.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        threads = threads or len(os.sched_getaffinity(0))
        _fix_arithmetic(device, dtype, threads)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return cls(model, tokenizer, base_files.digest(folder), device, dtype, threads)

    def sites(self) -> Iterator[Site]:
        """Every linear layer."""
        return (module for module in self._model.modules() if isinstance(module, Site))

    def shape(self, lora: Lora) -> LoraShape:
        """Which modules a LoRA changes in this base, as peft resolves it."""
        if lora not in self._shapes:
            self._shapes[lora] = resolve(self.config, lora)
        return self._shapes[lora]

    def hidden(self, tokens: Tensor, positions: Tensor, members: Sequence[Member], blocks: Sequence[Block]) -> Tensor:
        """The last hidden states [tokens, width] of flat `tokens` and `positions`, int64 [tokens] each.

        Members' tokens follow each other, and every block lies within one member's. All members change the same
        modules.
        """
        self._step.members = members
        try:
            decoder = getattr(self._model, self._model.base_model_prefix)
            out = decoder(
                input_ids=tokens[None],
                position_ids=positions[None],
                use_cache=False,
                blocks=blocks,
            )
            return torch.as_tensor(out.last_hidden_state[0])
        finally:
            self._step.members = ()

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's own logits [rows, vocabulary] of hidden states [rows, width], scaling and caps included."""
        # A view: taking the first of one would write it all once more on the way back.
        logits = torch.as_tensor(self._head(inputs_embeds=hidden[None], use_cache=False).logits)
        return logits.view(logits.shape[1:])

    def _wrap(self) -> None:
        head, dtype = self._model.get_output_embeddings(), getattr(torch, self.dtype)
        for path, module in list(self._model.named_modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    full = f"{path}.{name}" if path else name
                    # In bfloat16 a row feels the others in what does not keep its weights packed.
                    packed = child is head or dtype == torch.bfloat16
                    product = FrozenProduct(child.weight.detach().to(dtype), packed)
                    setattr(module, name, Site(full, child, product, self._step))
                elif "Norm" in type(child).__name__:
                    setattr(module, name, row_norm(child) or Apart(child, self._step))


def _fix_arithmetic(device: str, dtype: str, threads: int) -> None:
    from riverdelta.kernels.cpu_linear import has_bf16

    if dtype == "bfloat16" and device == "cpu" and not has_bf16():
        raise Unsupported(
            "This CPU has no bfloat16 arithmetic.", 'Set trainer.dtype to "float32", or train on another machine.'
        )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # its backward adds in any order


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    blocks: Sequence[Block] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: `query` [1, heads, tokens, dim], `key` and `value` [1, kv_heads, ...].

    Each block is a product of its own over fresh operands, so its bits depend on no other block. Returns
    [1, tokens, heads, dim].
    """
    if softcap is not None or s_aux is not None:
        raise Unsupported(
            f"{type(module).__name__} caps or biases its attention scores.",
            "Training has no path for that; choose another base model.",
        )
    if blocks is None:
        raise RuntimeError(f"{ATTENTION} attention runs only inside a training step")
    sizes = [block.rows * block.length for block in blocks]
    parts = []
    for block, *pieces in zip(blocks, *(torch.split(x[0], sizes, 1) for x in (query, key, value)), strict=True):
        q, k, v = (_rows(piece, block) for piece in pieces)
        mask = None
        if sliding_window is not None and block.length > sliding_window:
            at = torch.arange(block.length, device=q.device)
            mask = (at[None] <= at[:, None]) & (at[None] > at[:, None] - sliding_window)
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        parts.append(out.transpose(1, 2).reshape(block.rows * block.length, q.shape[1], v.shape[3]))
    return torch.cat(parts)[None], None


def _rows(piece: Tensor, block: Block) -> Tensor:
    """[heads, tokens, dim] of a block -> its rows, [rows, heads, length, dim], in memory of their own."""
    rows = piece.reshape(piece.shape[0], block.rows, block.length, piece.shape[2]).transpose(0, 1)
    return rows.clone(memory_format=torch.contiguous_format)


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attend)


_register()
