"""A small causal Transformer over bytes, for sequences as long as a book chapter or a book."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..nn import MultiheadAttention
from ..nn.mechanisms import Mechanism

BYTES = 256


class WindowEmbedding(nn.Module):
    """Embeds each byte together with the ones just before it: one table per distance, summed.

    It is a causal convolution over one-hot bytes. It gives every position its local order, so the model needs no
    position embedding and has no longest length.
    """

    def __init__(self, width: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.tables = nn.Parameter(torch.randn(window * BYTES, width) * window**-0.5)

    def forward(self, text: Tensor) -> Tensor:
        """text `[B, L]` of integers 0..255 -> `[B, L, width]`; what comes before the text reads as zero bytes."""
        padded = F.pad(text.long(), (self.window - 1, 0))                                     # [B, L + window - 1]
        rows = padded.unfold(1, self.window, 1) + BYTES * torch.arange(self.window, device=text.device)
        return F.embedding_bag(rows.flatten(0, 1), self.tables, mode="sum").unflatten(0, text.shape)


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)), squared ReLU in it. Starts as the identity."""

    def __init__(self, width: int, heads: int, hidden: int, mechanism: str | Mechanism) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = MultiheadAttention(
            width, heads, bias=False, batch_first=True, mechanism=mechanism, causal=True
        )
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        nn.init.zeros_(self.attention.out_proj.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention_norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(F.relu(self.up(self.mlp_norm(x))).square())


class ByteLM(nn.Module):
    """Predicts each byte of a text from all bytes before it.

    width: of the residual stream, a multiple of heads. hidden: of the MLPs, default 2 * width.
    window: how many bytes each position embeds, itself included.
    mechanism: what `longattn.nn.MultiheadAttention` takes.
    recompute: keep only the blocks' inputs and the loss's, and run blocks again in the backward pass: a third more
        time for a fraction of the memory.
    """

    # positions whose logits exist at one time in `loss`
    loss_chunk = 16384

    def __init__(
        self,
        width: int = 96,
        heads: int = 3,
        layers: int = 2,
        hidden: int | None = None,
        window: int = 4,
        mechanism: str | Mechanism = "linear",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.embedding = WindowEmbedding(width, window)
        self.blocks = nn.ModuleList(Block(width, heads, hidden or 2 * width, mechanism) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES)
        nn.init.zeros_(self.head.weight)

    def features(self, text: Tensor) -> Tensor:
        """text `[B, L]` -> `[B, L, width]`, what the head reads."""
        x = self.embedding(text)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def _logits(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))

    def forward(self, text: Tensor) -> Tensor:
        """text `[B, L]` of integers 0..255 -> logits `[B, L, 256]` of the byte after each."""
        return self._logits(self.features(text))

    def loss(self, text: Tensor) -> Tensor:
        """text `[B, L + 1]` -> mean cross-entropy in nats over its last L bytes, without all their logits at once."""
        x = self.features(text[:, :-1]).flatten(0, 1)                                         # [B L, width]
        targets = text[:, 1:].flatten().long()                                                # [B L]

        def chunk(x: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(self._logits(x), targets, reduction="sum")

        parts = zip(x.split(self.loss_chunk), targets.split(self.loss_chunk), strict=True)
        return sum(checkpoint(chunk, *part, use_reentrant=False) for part in parts) / targets.numel()

    def optimizers(self, matrix_rate: float = 0.04, rate: float = 0.03) -> list[torch.optim.Optimizer]:
        """Muon for the blocks' matrices, Adam for the rest: it learns in tens of steps."""
        matrices = [p for p in self.blocks.parameters() if p.ndim == 2]
        chosen = set(map(id, matrices))
        rest = [p for p in self.parameters() if id(p) not in chosen]
        return [
            torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=0.0, adjust_lr_fn="original"),
            torch.optim.Adam(rest, lr=rate, betas=(0.9, 0.95)),
        ]
