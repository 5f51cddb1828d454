"""A torch encoder whose attention is exchanged: same weights, same call, another mechanism.

    python examples/encoder.py [--length 16384] [--mechanism local|lsh|linear|favor|exact]

Prints how far the new outputs are from the old ones and how long both take. Only "local", "lsh" and "favor" stand for
the attention the model was trained with; how well, depends on the model (`longattn.fidelity_report`).
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

import longattn


def build(dim: int, heads: int, layers: int) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()


@torch.inference_mode()
def timed(model: nn.Module, *inputs, **options) -> tuple[torch.Tensor, float]:
    start = time.perf_counter()
    output = model(*inputs, **options)
    return output, time.perf_counter() - start


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--mechanism", default="local", choices=("exact", "local", "lsh", "linear", "favor"))
    args = parser.parse_args(argv)

    model = build(args.dim, args.heads, args.layers)
    x = torch.randn(1, args.length, args.dim)
    # the last tenth is padding
    padding = torch.arange(args.length)[None] >= args.length - args.length // 10
    before, seconds = timed(model, x, src_key_padding_mask=padding)

    longattn.replace_attention(model, args.mechanism)
    after, ours = timed(model, x, src_key_padding_mask=padding)

    valid = ~padding
    change = ((after - before)[valid].norm() / before[valid].norm()).item()
    print(
        f"{args.length:,} tokens: {seconds:.2f} s before, {ours:.2f} s after; outputs changed by {100 * change:.1f} %"
    )

    longattn.restore_attention(model)
    restored, _ = timed(model, x, src_key_padding_mask=padding)
    return {"change": change, "restored": (restored - before)[valid].abs().max().item()}


if __name__ == "__main__":
    main()
