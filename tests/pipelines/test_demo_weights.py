"""The shipped weights: their size and format, and that they show what a sentence asks for."""

from __future__ import annotations

from pathlib import Path

import torch

import lumiere_fast
from lumiere_fast import LumierePipeline
from lumiere_fast.data.clips import COLOURS, GROUNDS, MOTIONS, SHAPES, Attributes, canonical_caption, is_heldout
from lumiere_fast.data.tracker import evaluate

WEIGHTS = Path(lumiere_fast.__file__).parent / "weights"
MIB = 2**20


def test_the_files_are_small_and_safe() -> None:
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert max(path.stat().st_size for path in files) < 16 * MIB
    assert sum(path.stat().st_size for path in files) < 24 * MIB


def test_the_demo_shows_what_the_sentence_asks_for() -> None:
    """Three triples kept out of training, few steps; one wrong trajectory in three is within the known score."""
    asked = [
        Attributes(SHAPES.index(shape), list(COLOURS).index(colour), list(GROUNDS).index(ground), MOTIONS.index(motion))
        for shape, colour, ground, motion in (
            ("triangle", "blue", "black", "left"),
            ("star", "blue", "white", "right"),
            ("heart", "cyan", "gray", "down"),
        )
    ]
    assert all(is_heldout(each.shape, each.colour, each.motion) for each in asked)
    prompts = [canonical_caption(attributes) for attributes in asked]
    generator = torch.Generator().manual_seed(3)
    output = LumierePipeline.from_pretrained("demo")(prompts, num_inference_steps=16, generator=generator)
    assert output.frames.shape == (3, 3, 16, 64, 64)
    scores = evaluate(output.frames, asked)
    assert scores["colour"]["accuracy"] == scores["ground"]["accuracy"] == 1
    assert scores["shape"]["accuracy"] == 1
    assert scores["motion"]["accuracy"] >= 2 / 3
