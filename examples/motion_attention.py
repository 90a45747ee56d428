"""One op inside a stack of another's making: a motion module's attention over time, without its two transposes.

    python examples/motion_attention.py [cpu | cuda]

Models that were inflated from images keep a clip as B*T images and rearrange it to B*H*W sequences of T frames, and
back, around torch's attention. `temporal_attention` reads the fused projection where it lies. The two modules below
have the same weights and the same result.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from lumiere_fast import why_not
from lumiere_fast.ops import temporal_attention


class MotionAttention(nn.Module):
    """Self-attention over the frames of each pixel, told their order by a learned bias of the lag."""

    def __init__(self, channels: int, heads: int, num_frames: int) -> None:
        super().__init__()
        self.heads, self.num_frames = heads, num_frames
        self.to_qkv, self.to_out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.bias = nn.Parameter(torch.zeros(heads, 2 * num_frames - 1))

    def forward(self, images: Tensor) -> Tensor:
        """(B*T, C, H, W) in channels_last memory, as the layers around it have it; the same back."""
        rows = images.permute(0, 2, 3, 1).unflatten(0, (-1, self.num_frames))  # a view, (B, T, H, W, C)
        q, k, v = self.to_qkv(rows).unflatten(-1, (3, self.heads, -1)).unbind(4)
        return self.to_out(self.attend(q, k, v).flatten(-2)).flatten(0, 1).permute(0, 3, 1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return temporal_attention(q, k, v, bias=self.bias)


class Rearranging(MotionAttention):
    """How it is usually written."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, T, H, W, heads, D = q.shape
        sequences = (x.permute(0, 2, 3, 4, 1, 5).reshape(-1, heads, T, D) for x in (q, k, v))
        frames = torch.arange(T, device=q.device)
        table = self.bias[:, frames[:, None] - frames + T - 1]
        y = F.scaled_dot_product_attention(*sequences, attn_mask=table[None])
        return y.reshape(B, H, W, heads, T, D).permute(0, 4, 1, 2, 3, 5)


@torch.no_grad()
def main(device: str) -> None:
    ours, usual = (module(320, 8, 16).to(device) for module in (MotionAttention, Rearranging))
    nn.init.normal_(ours.bias)
    usual.load_state_dict(ours.state_dict())
    images = torch.randn(16, 320, 16, 16, device=device).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours(images), usual(images), rtol=1e-3, atol=1e-4)

    q, k, v = torch.randn(1, 16, 16, 16, 3, 8, 40, device=device).unbind(4)
    for backend in ("triton", "cpu", "reference"):
        reasons = why_not("temporal_attention", backend, q, k, v, bias=ours.bias)
        print(f"{backend}: {'; '.join(reasons) or 'can run this call'}")
    for name, module in (("temporal_attention", ours), ("rearranged", usual)):
        timer = Timer("attend(q, k, v)", globals={"attend": module.attend, "q": q, "k": k, "v": v})
        print(f"{name}: {timer.blocked_autorange().median * 1e3:.2f} ms on one thread")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cuda" if torch.cuda.is_available() else "cpu")
