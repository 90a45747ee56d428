from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lumiere_fast.data import clips
from lumiere_fast.data.clips import (
    COLOURS,
    GROUNDS,
    MOTIONS,
    SHAPES,
    Attributes,
    ClipBatch,
    ClipSampler,
    SceneState,
    render,
)

Image = pytest.importorskip("PIL.Image")
ImageDraw = pytest.importorskip("PIL.ImageDraw")

NUM_CLIPS = 240


@pytest.fixture(scope="module")
def batch() -> ClipBatch:
    return ClipSampler(11).batch(0, NUM_CLIPS)


def of_motion(batch: ClipBatch, motion: str) -> Tensor:
    return batch.motion == MOTIONS.index(motion)


def measured_alpha(batch: ClipBatch, video: Tensor) -> Tensor:
    """Opacity (B, T, H, W) from the channel in which colour and ground differ most."""
    colour = torch.tensor(list(COLOURS.values()))[batch.colour] / 127.5 - 1
    ground = torch.tensor(list(GROUNDS.values()))[batch.ground] / 127.5 - 1
    channel = (colour - ground).abs().argmax(dim=1)
    rows = torch.arange(len(channel))
    low, high = ground[rows, channel], colour[rows, channel]
    return (video[rows, channel] - low.view(-1, 1, 1, 1)) / (high - low).view(-1, 1, 1, 1)


# -------------------------------------------------------------------------------------------------------- determinism


def same(a: ClipBatch, b: ClipBatch) -> bool:
    return a.prompts == b.prompts and torch.equal(render(a.states, 16), render(b.states, 16))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), step=st.integers(0, 2**40), still=st.booleans())
def test_a_batch_depends_on_seed_and_step_only(seed: int, step: int, still: bool) -> None:
    def draw(sampler: ClipSampler, at: int) -> ClipBatch:
        return sampler.images(at, 4) if still else sampler.batch(at, 4)

    used = ClipSampler(seed)
    draw(used, step + 1)
    used.batch(step, 3)
    assert same(draw(used, step), draw(ClipSampler(seed), step))
    assert not same(draw(used, step), draw(used, step + 1))
    assert not same(draw(used, step), draw(ClipSampler(seed + 1), step))


def test_the_global_generator_is_neither_read_nor_advanced() -> None:
    torch.manual_seed(1)
    first = ClipSampler(0).batch(0, 4)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert same(first, ClipSampler(0).batch(0, 4))
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


def test_splitmix_gives_the_published_first_output() -> None:
    assert clips._splitmix64(0) == 0xE220A8397B1DCDAF


def test_images_and_clips_of_a_step_are_different_streams() -> None:
    sampler = ClipSampler(5)
    assert sampler.images(0, 16).attributes != sampler.batch(0, 16).attributes


# ----------------------------------------------------------------------------------------------------------- held out


def test_the_splits_partition_the_triples_and_both_hold_every_value() -> None:
    train, heldout = set(clips.split_triples("train")), set(clips.split_triples("heldout"))
    assert not train & heldout
    assert len(train | heldout) == len(SHAPES) * len(COLOURS) * len(MOTIONS)
    assert 0.08 <= len(heldout) / len(train | heldout) <= 0.12
    for triples in (train, heldout):
        for axis, count in enumerate((len(SHAPES), len(COLOURS), len(MOTIONS))):
            assert {triple[axis] for triple in triples} == set(range(count))


def test_samples_stay_in_their_split() -> None:
    heldout = set(clips.split_triples("heldout"))
    for seed in range(3):
        for split in ("train", "heldout"):
            sampler = ClipSampler(seed, split)
            for drawn in (sampler.batch(0, 300), sampler.images(0, 300)):
                triples = {(a.shape, a.colour, a.motion) for a in drawn.attributes}
                assert triples <= heldout if split == "heldout" else not triples & heldout
                assert {a.ground for a in drawn.attributes} == set(range(len(GROUNDS)))


# ------------------------------------------------------------------------------------------------------------- motion


@pytest.mark.parametrize(("motion", "dx", "dy"), [("left", -1, 0), ("right", 1, 0), ("up", 0, -1), ("down", 0, 1)])
def test_straight_motions_have_constant_velocity_along_their_axis(
    batch: ClipBatch, motion: str, dx: int, dy: int
) -> None:
    rows = of_motion(batch, motion)
    state = batch.states
    step_x, step_y = state.cx[rows].diff(dim=1), state.cy[rows].diff(dim=1)
    speed = step_x * dx + step_y * dy
    assert (speed * 15).min() > 0.37 and (speed * 15).max() < 0.46
    torch.testing.assert_close(step_x, speed * dx, atol=1e-6, rtol=0)
    torch.testing.assert_close(step_y, speed * dy, atol=1e-6, rtol=0)
    assert (speed - speed[:, :1]).abs().max() < 1e-6


def test_circle_turns_clockwise_once_in_sixteen_frames() -> None:
    batch = ClipSampler(11, num_frames=17).batch(0, NUM_CLIPS)
    rows = of_motion(batch, "circle")
    place = torch.stack((batch.states.cx[rows], batch.states.cy[rows]), dim=2)
    torch.testing.assert_close(place[:, 16], place[:, 0], atol=1e-5, rtol=0)
    spoke = place - place[:, :16].mean(dim=1, keepdim=True)
    radius = spoke.norm(dim=2)
    assert radius.min() > 0.155 and radius.max() < 0.215
    cross = spoke[:, :-1, 0] * spoke[:, 1:, 1] - spoke[:, :-1, 1] * spoke[:, 1:, 0]
    # With y down a positive turn is clockwise to the eye; each is a sixteenth.
    sine = cross / (radius[:, :-1] * radius[:, 1:])
    torch.testing.assert_close(sine, torch.full_like(sine, math.sin(math.pi / 8)), atol=1e-4, rtol=0)


def test_pulse_repeats_after_eight_frames_in_place(batch: ClipBatch) -> None:
    rows = of_motion(batch, "pulse")
    state = batch.states
    diameter = state.diameter[rows]
    torch.testing.assert_close(diameter[:, 8:], diameter[:, :8], atol=1e-5, rtol=0)
    torch.testing.assert_close(diameter[:, 4:8] + diameter[:, :4], 2 * diameter.mean(1, True).expand(-1, 4))
    assert (diameter.amax(1) / diameter.amin(1)).min() > 1.4
    assert (state.cx[rows] - state.cx[rows][:, :1]).abs().max() == 0
    constant = state.diameter[~rows]
    assert (constant - constant[:, :1]).abs().max() == 0


@pytest.mark.parametrize("num_frames", [4, 16, 33])
def test_the_object_is_large_and_never_touches_the_border(num_frames: int) -> None:
    batch = ClipSampler(1, num_frames=num_frames).batch(0, NUM_CLIPS)
    # A pixel at this size is narrower than the margin of 0.01 that the sampler leaves.
    alpha = measured_alpha(
        batch, render(replace(batch, frames=batch.frames[:, :: max(1, num_frames // 4)]).states, 128)
    )
    for edge in (alpha[..., 0, :], alpha[..., -1, :], alpha[..., :, 0], alpha[..., :, -1]):
        assert edge.max() < 1e-4
    assert alpha.amax(dim=(2, 3)).min() > 0.99
    assert batch.trajectory.diameter.min() >= 0.38 and batch.trajectory.diameter.max() <= 0.48


# ----------------------------------------------------------------------------------------------------------- renderer


def test_rendered_moments_follow_the_closed_form(batch: ClipBatch) -> None:
    size = 64
    alpha = measured_alpha(batch, render(batch.states, size))
    centres = (torch.arange(size) + 0.5) / size
    mass = alpha.sum(dim=(2, 3))
    torch.testing.assert_close(alpha.sum(2) @ centres / mass, batch.states.cx, atol=0.004, rtol=0)
    torch.testing.assert_close(alpha.sum(3) @ centres / mass, batch.states.cy, atol=0.004, rtol=0)
    points = {
        "ball": math.pi / 4,
        "square": 0.86**2,
        "triangle": 3 * math.sqrt(3) / 4 * 0.56**2,
        "star": 5 * 0.56 * (0.48 * 0.56) * math.sin(math.pi / 5),
        "heart": (0.5 + math.pi / 8) * 0.85**2,
        "ring": math.pi * (0.5**2 - 0.24**2),
    }
    unit = torch.tensor([points[name] for name in SHAPES])[batch.shape]
    torch.testing.assert_close(mass / size**2, unit[:, None] * batch.states.diameter**2, atol=0, rtol=0.03)


def drawn_by_pillow(name: str, cx: float, cy: float, d: float, size: int) -> Tensor:
    image = Image.new("L", (size, size))
    draw = ImageDraw.Draw(image)

    def at(x: float, y: float) -> tuple[float, float]:
        # Pillow's integer coordinates are pixel centres.
        return ((cx + d * x) * size - 0.5, (cy + d * y) * size - 0.5)

    def disc(x: float, y: float, radius: float, fill: int = 255) -> None:
        draw.ellipse((*at(x - radius, y - radius), *at(x + radius, y + radius)), fill=fill)

    def star(radii: tuple[float, ...], count: int) -> None:
        turns = [(2 * math.pi * k / count, radii[k % len(radii)]) for k in range(count)]
        draw.polygon([at(r * math.sin(a), -r * math.cos(a)) for a, r in turns], fill=255)

    if name in ("ball", "ring"):
        disc(0, 0, 0.5)
    if name == "ring":
        disc(0, 0, 0.24, fill=0)
    if name == "square":
        draw.rectangle((*at(-0.43, -0.43), *at(0.43, 0.43)), fill=255)
    if name == "triangle":
        star((0.56,), 3)
    if name == "star":
        star((0.56, 0.48 * 0.56), 10)
    if name == "heart":
        s, top = 0.85, 0.85 * 0.6566
        draw.polygon([at(0, top), at(s / 2, top - s / 2), at(0, top - s), at(-s / 2, top - s / 2)], fill=255)
        for side in (-1, 1):
            disc(side * s / 4, top - 0.75 * s, s * math.sqrt(2) / 4)
    return torch.tensor(list(image.tobytes())).view(size, size) > 127


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_agree_with_polygons_and_discs_drawn_by_pillow(name: str) -> None:
    size, cx, cy, d = 1024, 0.47, 0.55, 0.7
    index = torch.tensor([SHAPES.index(name)])
    ours = clips.coverage(index, torch.tensor([cx]), torch.tensor([cy]), torch.tensor([d]), size)[0] > 0.5
    theirs = drawn_by_pillow(name, cx, cy, d, size)
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.99


def test_twice_the_size_averages_down_to_the_same_clip(batch: ClipBatch) -> None:
    error = (F.avg_pool3d(render(batch.states, 64), (1, 2, 2)) - render(batch.states, 32)).abs()
    assert error.mean() < 0.002
    assert (error > 0.25).float().mean() < 0.001


def test_layout_range_and_colours(batch: ClipBatch) -> None:
    video = render(batch.states, 32)
    assert video.shape == (NUM_CLIPS, 3, 16, 32, 32) and video.dtype == torch.float32
    assert video.is_contiguous(memory_format=torch.channels_last_3d)
    assert video.min() >= -1 and video.max() <= 1
    corner = torch.tensor(list(GROUNDS.values()))[batch.ground] / 127.5 - 1
    torch.testing.assert_close(video[:, :, 0, 0, 0], corner)
    solid = batch.shape == SHAPES.index("ball")
    column, row = ((x[solid, 0] * 32).long() for x in (batch.states.cx, batch.states.cy))
    middle = video[solid, :, 0][torch.arange(int(solid.sum())), :, row, column]
    torch.testing.assert_close(middle, torch.tensor(list(COLOURS.values()))[batch.colour[solid]] / 127.5 - 1)


def test_a_frame_alone_is_the_frame_in_the_clip(batch: ClipBatch) -> None:
    state = batch.states
    alone = SceneState(
        state.shape, state.colour, state.ground, state.cx[:, 5:6], state.cy[:, 5:6], state.diameter[:, 5:6]
    )
    torch.testing.assert_close(render(alone, 32), render(state, 32)[:, :, 5:6], atol=1e-6, rtol=0)


def test_images_are_single_frames_at_times_spread_over_the_clip() -> None:
    images = ClipSampler(2).images(0, 400)
    assert render(images.states, 16).shape == (400, 3, 1, 16, 16)
    assert images.frames.min() < 1 and images.frames.max() > 14 and images.frames.max() <= 15
    assert abs(images.frames.mean() - 7.5) < 1


def test_colours_and_grounds_are_far_apart() -> None:
    colours, grounds = (torch.tensor(list(c.values()), dtype=torch.float32) for c in (COLOURS, GROUNDS))
    assert torch.cdist(colours, grounds).min() > 120
    assert torch.pdist(colours).min() > 110
    assert torch.pdist(grounds).min() > 100


# ----------------------------------------------------------------------------------------------------------- captions

MOTION_WORDS = re.compile(
    r"\b(mov|slid|drift|ris|fall|drop|go|circl(es|ing)|orbit|puls|grow|shrink|get|bigger|left|right|up|down|around)"
)


def test_articles_fit_the_word_that_follows() -> None:
    for split in ("train", "heldout"):
        sampler = ClipSampler(3, split)
        for prompt in sampler.batch(0, 400).prompts + sampler.images(0, 400).prompts:
            for article, initial in re.findall(r"\b(an?) (\w)", prompt):
                assert (article == "an") == (initial in "aeiou"), prompt
            assert len(re.findall(r"\ban? \w+ ", prompt)) >= 1


def test_captions_name_what_is_drawn(batch: ClipBatch) -> None:
    for a, prompt in zip(batch.attributes, batch.prompts, strict=True):
        ground = list(GROUNDS)[a.ground]
        assert list(COLOURS)[a.colour] in prompt
        assert ground in prompt or (ground == "gray" and "grey" in prompt)
        assert MOTION_WORDS.search(prompt), prompt
        for other in set(COLOURS) - {list(COLOURS)[a.colour]}:
            assert not re.search(rf"\b{other}\b", prompt)


def test_half_of_the_image_captions_keep_the_motion() -> None:
    images = ClipSampler(4).images(0, 1000)
    kept = sum(bool(MOTION_WORDS.search(prompt)) for prompt in images.prompts)
    assert 440 < kept < 560


def test_wordings_vary_and_all_are_reached() -> None:
    generator = torch.Generator().manual_seed(0)
    donut = Attributes(
        SHAPES.index("ring"), list(COLOURS).index("orange"), list(GROUNDS).index("gray"), MOTIONS.index("up")
    )
    seen = [clips.caption(donut, generator, with_motion=True) for _ in range(2000)]
    words = " ".join(seen)
    expected = (
        "ring",
        "donut",
        "hoop",
        "gray",
        "grey",
        "moving up",
        "rising",
        "rises",
        "goes up",
        "background",
        "on gray",
    )
    assert all(word in words for word in expected)
    assert len(set(seen)) == 3 * 8 * 2 * len(clips._TEMPLATES)
    still = {clips.caption(donut, generator, with_motion=False) for _ in range(500)}
    assert len(still) == 3 * 2 * len(clips._TEMPLATES) and not any(MOTION_WORDS.search(s) for s in still)


def test_canonical_captions() -> None:
    def of(shape: str, colour: str, ground: str, motion: str) -> str:
        indices = SHAPES.index(shape), list(COLOURS).index(colour), list(GROUNDS).index(ground), MOTIONS.index(motion)
        return clips.canonical_caption(Attributes(*indices))

    assert of("ball", "red", "black", "left") == "a red ball moving left on a black background"
    assert of("ring", "orange", "brown", "circle") == "an orange ring going around in a circle on a brown background"
    assert of("heart", "pink", "gray", "pulse") == "a pink heart pulsing on a gray background"


# ------------------------------------------------------------------------------------------------------------- errors


def test_bad_arguments_are_named() -> None:
    sampler = ClipSampler(0)
    with pytest.raises(ValueError, match="split='test'"):
        ClipSampler(0, "test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_frames=0"):
        ClipSampler(0, num_frames=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        sampler.images(0, 0)
    with pytest.raises(ValueError, match="size=0"):
        render(sampler.batch(0, 1).states, 0)


def test_moving_a_batch_keeps_its_clips() -> None:
    batch = ClipSampler(0).batch(0, 3)
    moved = batch.to("meta")
    assert moved.states.cx.device.type == "meta" and moved.shape.device.type == "meta"
    assert same(batch, batch.to("cpu"))
