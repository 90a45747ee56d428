"""Training a cascade on procedural captioned clips, and scoring what it makes."""

from lumiere_fast.training.evaluation import evaluate_images, evaluate_pipeline
from lumiere_fast.training.stages import STAGES, assemble, train

__all__ = ["STAGES", "assemble", "evaluate_images", "evaluate_pipeline", "train"]
