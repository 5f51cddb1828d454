"""A classifier of long documents: two marks, anywhere in them, decide.

    python examples/long_document.py [--length 2048] [--steps 100]

A document is a row of random letters with two digits in it, and the question is whether the digits are the same. They
may be thousands of tokens apart, so each has to find the other: equal tokens have equal hashes, and LSH attention looks
for nothing else. Everything is seeded; half of the documents of each kind, so guessing is right half of the time.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import longattn

LETTERS, DIGITS = 26, 10


def documents(count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """-> tokens `[count, length]`, letters before digits, and whether the two digits are the same `[count]`."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(LETTERS, (count, length), generator=generator)
    same = torch.rand(count, generator=generator) < 0.5
    first = torch.randint(DIGITS, (count,), generator=generator)
    # another digit is so many steps further on
    step = torch.randint(1, DIGITS, (count,), generator=generator).masked_fill(same, 0)
    places = torch.rand(count, length, generator=generator).topk(2).indices  # [count, 2]
    return tokens.scatter(1, places, LETTERS + torch.stack([first, (first + step) % DIGITS], 1)), same


class Classifier(nn.Module):
    """Tokens attend, each is judged beside what it found, and the strongest judgements are read."""

    def __init__(self, dim: int = 64, heads: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(LETTERS + DIGITS, dim)
        # a large scale: what is not the same token hardly counts
        self.attend = longattn.nn.LSHSelfAttention(dim, heads, n_hashes=1, scale=8.0)
        self.judge = nn.Sequential(nn.Linear(2 * dim, dim), nn.ReLU())
        self.read = nn.Linear(dim, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[B, n]` -> the logit that the digits are the same, `[B]`."""
        x = self.embed(tokens)  # [B, n, dim]
        judged = self.judge(torch.cat([x, self.attend(x)], -1))
        return self.read(judged.amax(1)).squeeze(1)


@torch.inference_mode()
def accuracy(model: Classifier, tokens: Tensor, same: Tensor) -> float:
    model.eval()
    found = torch.cat([model(part) > 0 for part in tokens.split(16)])
    return (found == same).float().mean().item()


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    model, start = Classifier(), time.perf_counter()
    optimizer = torch.optim.Adam(model.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=args.steps)
    for step in range(1, args.steps + 1):
        tokens, same = documents(args.batch, args.length, seed=step)
        loss = F.binary_cross_entropy_with_logits(model.train()(tokens), same.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if step % 10 == 0:
            print(f"step {step:>4}  {time.perf_counter() - start:5.1f} s  loss {loss.item():.3f}")
    right = accuracy(model, *documents(128, args.length, seed=0))
    print(f"{100 * right:.1f} % of 128 documents of {args.length:,} tokens that it has not seen")
    return right


if __name__ == "__main__":
    main()
