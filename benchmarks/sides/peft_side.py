"""transformers + peft as a side of `benchmarks.serving`: BASE ADAPTERS, then a round a line; one mixed batch."""

from __future__ import annotations

import json
import sys
import time

import torch
import transformers
from peft import PeftModel


def main() -> None:
    """Serve rounds until standard input ends."""
    base, adapters = sys.argv[1:]
    # The faster of its dtypes here: in bf16 its mixed batch is several times slower.
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, f"{adapters}/0", adapter_name="0").eval()
    for n in range(1, 16):
        model.load_adapter(f"{adapters}/{n}", adapter_name=str(n))
    print(json.dumps({"transformers": transformers.__version__, "dtype": "float32"}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        ids = torch.tensor(asked["prompts"])
        names = [str(n % 16) if asked["case"] == "adapters" else "__base__" for n in range(len(ids))]
        begin = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                adapter_names=names,
                max_new_tokens=asked["answer"],
                do_sample=False,
                eos_token_id=None,
            )
        seconds = time.perf_counter() - begin
        print(json.dumps({"seconds": seconds, "tokens": out[:, ids.shape[1] :].tolist()}), flush=True)


if __name__ == "__main__":
    main()
