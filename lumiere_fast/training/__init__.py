"""Training a cascade on captioned clips, procedural or your own, and scoring what it makes."""

from lumiere_fast.training.evaluation import evaluate_images, evaluate_pipeline
from lumiere_fast.training.loss_curve import draw_loss_curve
from lumiere_fast.training.run_folder import read_cascade, read_noising
from lumiere_fast.training.stages import SCHEDULE_NAMES, STAGES, assemble, train

__all__ = [
    "SCHEDULE_NAMES",
    "STAGES",
    "assemble",
    "draw_loss_curve",
    "evaluate_images",
    "evaluate_pipeline",
    "read_cascade",
    "read_noising",
    "train",
]
