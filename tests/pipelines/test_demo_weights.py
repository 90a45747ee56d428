"""The shipped weights: their size and format, and that they show what a sentence asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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


def test_the_folder_is_what_save_pretrained_writes(tmp_path: Path) -> None:
    """But for the version that wrote it."""
    pipe = LumierePipeline.from_pretrained("demo")
    pipe.save_pretrained(tmp_path / "demo", dtype=torch.float16)
    names = [sorted(x.relative_to(root) for x in root.rglob("*.*")) for root in (WEIGHTS / "demo", tmp_path / "demo")]
    assert names[0] == names[1]
    for name in names[0]:
        shipped, written = WEIGHTS / "demo" / name, tmp_path / "demo" / name
        if name.suffix == ".json":
            mine, theirs = (json.loads(path.read_text()) for path in (shipped, written))
            assert "." in mine.pop("_lumiere_fast_version")
            assert theirs.pop("_lumiere_fast_version")
            assert mine == theirs, name
        else:
            mine, theirs = load_file(shipped), load_file(written)
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in mine), name


def test_the_demo_shows_what_the_sentence_asks_for() -> None:
    """Three triples kept out of training, few steps; one wrong trajectory in three is within the known score."""
    pytest.importorskip("tokenizers")
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
