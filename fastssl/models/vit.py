"""ViT-tiny as in the small-model project (arXiv 2107.14762): 12 blocks of width 192, patches of 16 pixels.

Weights trained there compute the same here, under the same names. What differs from DeiT-tiny (`deit_tiny`, timm):
  - six heads of 64 channels, wider together (384) than the 192 of the block; queries, keys and values without biases;
  - a patch's 768 values are ordered (row, column, colour) and pass a Linear layer whose weights stay as they were
    initialised (they take no gradient);
  - LayerNorm has eps 1e-5; Dropout of 0.1 after the positions are added and in both halves of a block, none in the
    attention weights; positions and class token start as N(0, 1);
  - the features are the class token after a LayerNorm (`mlp_head`), the classifier is `fc`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, DEPTH, HEADS, HEAD_WIDTH, HIDDEN, PATCH, IMAGE, DROPOUT = 192, 12, 6, 64, 768, 16, 224, 0.1


class PreNorm(nn.Module):
    """x + fn(norm(x)) for tokens (B, N, 192)."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(self.norm(x))


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, N, 192)."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(WIDTH, 3 * HEADS * HEAD_WIDTH, bias=False)
        self.to_out = nn.Sequential(nn.Linear(HEADS * HEAD_WIDTH, WIDTH), nn.Dropout(DROPOUT))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(2, (3, HEADS, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)  # (B, heads, N, 64) each
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """The block's second half, token by token."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(HIDDEN, WIDTH), nn.Dropout(DROPOUT)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Patches(nn.Module):
    """(B, 3, H, W) -> (B, H/16 * W/16, 768), each patch's values in the order row, column, colour."""

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2] % PATCH or images.shape[3] % PATCH:
            raise ValueError(f"vit_tiny needs sides that {PATCH} divides, got {tuple(images.shape[2:])} pixels")
        x = images.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # (B, 3, h, 16, w, 16)
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


class Transformer(nn.Module):
    """The blocks; `layers` are pairs, as the checkpoints name them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(PreNorm(Attention()), PreNorm(FeedForward())) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class SmallModelViT(nn.Module):
    """(B, 3, S, S) -> (B, 1000); what goes into `fc` are the (B, 192) features.

    Positions are those of 224 x 224 pixels; for other sizes they are interpolated (the project itself never does it).
    """

    def __init__(self) -> None:
        super().__init__()
        self.to_patch_embedding = nn.Sequential(Patches(), nn.Linear(3 * PATCH**2, WIDTH)).requires_grad_(False)
        self.pos_embedding = nn.Parameter(torch.randn(1, (IMAGE // PATCH) ** 2 + 1, WIDTH))
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.dropout = nn.Dropout(DROPOUT)
        self.transformer = Transformer()
        self.mlp_head = nn.Sequential(nn.LayerNorm(WIDTH))
        self.fc = nn.Linear(WIDTH, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = self.to_patch_embedding(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self._positions(images)
        x = self.transformer(self.dropout(x))
        return self.fc(self.mlp_head(x[:, 0]))

    def _positions(self, images: Tensor) -> Tensor:
        side, size = IMAGE // PATCH, (images.shape[2] // PATCH, images.shape[3] // PATCH)
        if size == (side, side):
            return self.pos_embedding
        grid = self.pos_embedding[:, 1:].transpose(1, 2).unflatten(2, (side, side))  # (1, 192, 14, 14)
        grid = F.interpolate(grid, size, mode="bicubic", antialias=True)
        return torch.cat([self.pos_embedding[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
