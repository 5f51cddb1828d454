"""A Hugging Face model with the attentions of this package, selected by name.

    python examples/huggingface.py [--length 4096] [--window 256]

The model is a small random Llama with grouped heads, so nothing is downloaded; `from_pretrained(...,
attn_implementation="longattn_local")` takes a real one. Needs transformers 5.
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longattn.integrations.transformers import register


def build(length: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": length}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, pad_token_id=0, **sizes, **heads)).eval()


@torch.inference_mode()
def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--window", type=int, default=256)
    args = parser.parse_args(argv)

    register()
    register(local={"window": args.window}, name="near")
    model, changes = build(args.length), {}
    text = torch.randint(1, 256, (1, args.length), generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("sdpa")
    expected = model(text).logits
    for name in ("sdpa", "longattn_exact", "near", "longattn_lsh"):
        model.set_attn_implementation(name)
        start = time.perf_counter()
        logits = model(text).logits
        seconds = time.perf_counter() - start
        changes[name] = ((logits - expected).norm() / expected.norm()).item()
        print(f"{name:<16}{seconds:6.2f} s, logits changed by {100 * changes[name]:.2f} %")

    # two rows of different lengths, padded on the left, written with a cache
    model.set_attn_implementation("near")
    mask = torch.ones(2, 64, dtype=torch.long)
    mask[0, :20] = 0
    prompt = text[:, :64].repeat(2, 1).masked_fill(mask == 0, 0)
    written = model.generate(prompt, attention_mask=mask, max_new_tokens=16, do_sample=False)
    print("generated", written[:, 64:].tolist())
    return changes


if __name__ == "__main__":
    main()
