"""A Hugging Face decoder made to run packed steps: its own modules, paged attention, linears with LoRA beside them."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from riverdelta.core.errors import Unsupported
from riverdelta.kernels import LoraPool, Segments, choose_backend, native

from . import attention
from .attention import Chunk, KVCache, StepContext
from .config import EngineConfig
from .fused import fuse_attention, fuse_layers, fuse_mlps, fuse_norms
from .head import FullScores, Scores, ScreenedHead, ScreenedScores, screened_head
from .linears import Frozen, Runtime, linear_groups, wrap

logger = logging.getLogger(__name__)


class PagedModel:
    """The decoder, its KV cache and its LoRA pools. `linears`: module path -> (in, out) of what adapters can change."""

    def __init__(self, model: Any, config: EngineConfig, sample: Sequence[int] = ()) -> None:
        """`sample`: tokens of an ordinary text, to check the model and to tune its head with."""
        self.device = torch.device(config.device)
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.hf = model.to(device=self.device, dtype=self.dtype).eval().requires_grad_(False)
        self.hf.set_attn_implementation(attention.NAME)
        self.config = self.hf.config.get_text_config()
        self.vocab_size = int(self.config.vocab_size)
        self.max_positions = int(getattr(self.config, "max_position_embeddings", None) or config.max_model_len)
        self.block_size = config.block_size
        self.eos = _eos_ids(self.hf)
        length = min(3 * config.block_size, self.max_positions) - 1
        self._probe_tokens = torch.tensor([*sample, *range(3, length + 3)][:length], device=self.device)
        self.runtime = Runtime(self.device)
        self.linears: dict[str, tuple[int, int]] = {}
        self.sites: dict[tuple[str, ...], LoraPool] = {}
        with torch.inference_mode():
            hidden, wanted = self._reference()
        self.mode = self._pack(config)
        # In reduced precision keys and values come from reduced products: the cache need not be wider.
        cache_dtype = torch.bfloat16 if self.mode == "bf16" else self.dtype
        self.cache = KVCache(config.blocks, config.block_size, cache_dtype, self.device)
        self.screen: ScreenedHead | None = None
        with torch.inference_mode():
            compiled = self.mode == "bf16" and not config.batch_invariant and native.available()
            norms = fuse_norms(self.hf, compiled)
            layers = fuse_attention(
                self.hf, lambda: self._probe(0, len(self._probe_tokens)), self.cache.dtype, compiled
            )
            mlps = fuse_mlps(self.hf) if compiled else 0
            last = len(self._probe_tokens)
            whole = fuse_layers(self.hf, self.runtime, lambda: self._probe(last - 1, last)) if compiled else 0
            if hidden is not None and not config.batch_invariant and self.mode != "fp32":
                self.screen = screened_head(self.head_weight, hidden, self.head, config.max_batch)
            self._check(wanted)
        logger.info(
            "Fused %d norms, %d attention modules, %d MLPs, %d whole layers%s; greedy tokens %s",
            norms,
            layers,
            mlps,
            whole,
            " by compiled operators" if compiled else "",
            "screened in int8" if self.screen else "from all scores",
        )

    @classmethod
    def from_pretrained(cls, path: str, config: EngineConfig, sample: Sequence[int] = ()) -> "PagedModel":
        """Load a model folder (safetensors only: nothing in it is executed)."""
        logger.info("Loading the base model from %s", path)
        disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, config.dtype), use_safetensors=True, trust_remote_code=False
        )
        return cls(model, config, sample)

    @torch.inference_mode()
    def step(self, tokens: Tensor, positions: Tensor, context: StepContext, segments: Segments, keep: Tensor) -> Scores:
        """One packed step: `tokens`, `positions` int64 [rows]; the scores of the rows `keep` int64 [kept]."""
        self.runtime.segments = segments
        inputs = {"input_ids": tokens[None], "position_ids": positions[None], "use_cache": False, "paged": context}
        try:
            if self.screen is None:
                return FullScores(self.hf(**inputs, logits_to_keep=keep).logits[0])
            hidden = self.hf.get_decoder()(**inputs).last_hidden_state[0]
            return ScreenedScores(hidden[keep], self.screen, self.head)
        finally:
            self.runtime.end_step()

    def _check(self, wanted: Tensor) -> None:
        """Two chunks and a decode must come to the logits `wanted`, or `Unsupported` is raised."""
        length = len(self._probe_tokens)
        for begin, end in ((0, length // 2), (length // 2, length - 1), (length - 1, length)):
            scores = self._probe(begin, end)
        self.cache.zero(list(range(-(-length // self.block_size))))
        error = float((scores.logits([0])[0] - wanted).std() / wanted.std())
        if not error < (1e-3 if self.exact else 0.2):
            raise Unsupported(
                f"{type(self.hf).__name__} does not compute the same through the paged cache (off by {error:.2g}).",
                "Its attention has something that serving has no path for; choose another base model.",
            )

    @property
    def exact(self) -> bool:
        """Whether everything is computed in fp32."""
        return self.dtype == torch.float32 and self.mode in (None, "fp32", "torch")

    def _pack(self, config: EngineConfig) -> str | None:
        head = self.hf.get_output_embeddings()
        groups = linear_groups(self.hf, head)
        mode: str | None = None
        if self.device.type == "cpu":
            mode = config.cpu_backend
            if mode == "auto":
                shapes = [(sum(m.out_features for m in g), g[0].in_features) for _, _, g in groups]
                shapes.append((head.out_features, head.in_features))
                mode = choose_backend(shapes, config.max_batch, exact=config.batch_invariant)
        logger.info("Packing %d linear sites (%s)", len(groups), mode or config.dtype)
        for group in groups:
            _, paths, members = group
            widths = [m.out_features for m in members]
            self.linears.update({p: (m.in_features, m.out_features) for p, m in zip(paths, members, strict=True)})
            self.sites[paths] = LoraPool(
                config.adapter_slots,
                members[0].in_features,
                sum(widths),
                config.max_rank,
                torch.bfloat16 if mode == "bf16" else self.dtype,
                self.device,
                parts=widths,
            )
            wrap(group, self.sites[paths], mode, config.batch_invariant, self.runtime)
        self.head_weight = head.weight.detach()
        bias = None if head.bias is None else head.bias.detach()
        self.head = Frozen(self.head_weight, bias, mode, config.batch_invariant)
        self.hf.set_output_embeddings(self.head)
        return mode

    def _reference(self) -> tuple[Tensor | None, Tensor]:
        """What the untouched model makes of the probe: the last hidden states [n, width], if its scores are no more
        than their product with the head, and the logits [vocab] of its last token."""
        self.hf.set_attn_implementation("eager")
        tokens = self._probe_tokens[None]
        hidden = self.hf.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state[0]
        logits = self.hf(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[0, -1].float()
        self.hf.set_attn_implementation(attention.NAME)
        head = self.hf.get_output_embeddings()
        plain = head.bias is None and torch.allclose((hidden[-1] @ head.weight.T).float(), logits, rtol=1e-3, atol=1e-3)
        return hidden if plain else None, logits

    def _probe(self, begin: int, end: int) -> Scores:
        """Scores of positions `begin` to `end` of the probe, whose blocks are the first of the cache."""
        at = torch.arange(end, device=self.device)
        blocks = torch.arange(-(-end // self.block_size), dtype=torch.int32, device=self.device)
        decodes = int(end - begin == 1)
        context = StepContext(
            self.cache,
            at[begin:],
            blocks[None][:decodes],
            torch.tensor([end] * decodes, dtype=torch.int32, device=self.device),
            [] if decodes else [Chunk(0, end - begin, begin, at)],
        )
        keep = torch.tensor([end - begin - 1], device=self.device)
        return self.step(self._probe_tokens[begin:end], at[begin:], context, Segments.build([], self.device), keep)


def _eos_ids(model: Any) -> frozenset[int]:
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = model.config.get_text_config().eos_token_id
    return frozenset([eos] if isinstance(eos, int) else eos or [])
