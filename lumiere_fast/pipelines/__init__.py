"""Pipelines: prompts in, clips out."""

from lumiere_fast.pipelines.checkpoint import Checkpoint
from lumiere_fast.pipelines.text_to_video import LumiereOutput, LumierePipeline

__all__ = ["Checkpoint", "LumiereOutput", "LumierePipeline"]
