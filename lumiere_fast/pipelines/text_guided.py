"""The first stage: noise to small clips, led by their prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lumiere_fast.models import STUNet, UNet2D
from lumiere_fast.pipelines.cuda_graph import Graphed
from lumiere_fast.pipelines.denoising import Denoised, Denoiser
from lumiere_fast.pipelines.state import DenoisingState
from lumiere_fast.pipelines.windows import Window, WindowPlan
from lumiere_fast.text import TextEmbedding


@dataclass(frozen=True)
class TextGuided:
    """Denoises clips, or with a `UNet2D` images, by classifier-free guidance.

    Args:
        guidance_scale: 1 for none, which costs half as much.
        cuda_graphs: replay the network as CUDA graphs, see `Graphed`.
    """

    model: UNet2D | STUNet
    denoiser: Denoiser
    guidance_scale: float
    cuda_graphs: bool = False

    @property
    def guided(self) -> bool:
        return self.guidance_scale != 1

    def texts(self, prompts: list[str]) -> list[str]:
        """What the network reads of `prompts`: with guidance the empty prompt beside each."""
        return prompts + [""] * len(prompts) if self.guided else prompts

    def __call__(
        self,
        text: TextEmbedding,
        noise: Tensor,
        num_inference_steps: int,
        *,
        windows: WindowPlan,
        generators: Sequence[torch.Generator] | None = None,
        on_step: Callable[[int, int], None] | None = None,
        resume: DenoisingState | None = None,
        on_state: Callable[[DenoisingState], None] | None = None,
    ) -> Denoised:
        """Unit `noise` (B, 3, T, H, W) to clips, in its memory; `text` is that of `texts`, the same in every window.

        Windows are not made smaller where memory runs out: a model of motion would show it in fewer frames.
        """
        prepared = self.model.prepare_text(*text)

        def network(scaled: Tensor, timestep: Tensor) -> Tensor:
            if self.guided:
                scaled, timestep = torch.cat([scaled, scaled]), torch.cat([timestep, timestep])
            prediction: Tensor = self.model(scaled, timestep, prepared)
            return prediction

        run = Graphed(network) if self.cuda_graphs else network

        def predict(scaled: Tensor, timestep: Tensor, window: Window) -> Tensor:
            return run(scaled, timestep)

        return self.denoiser(
            predict,
            noise,
            num_inference_steps,
            windows=windows,
            guidance_scale=self.guidance_scale if self.guided else None,
            generators=generators,
            on_step=on_step,
            resume=resume,
            on_state=on_state,
        )
