"""Procedural captioned clips: six shapes, eight colours, four grounds and six motions with closed forms.

A clip is a flat coloured shape on a flat ground. Positions and sizes are in frame widths, x to the right and y down, so
that one state renders at any resolution; times are frame indices (any real number) and periods are counted in frames.
The state at frame ``f`` is

    cx = x0 + vx f + r cos(2 pi f / 16 + phase)
    cy = y0 + vy f + r sin(2 pi f / 16 + phase)
    d  = d0 (1 + a sin(2 pi f / 8 + phase))

with ``v``, ``r`` and ``a`` zero for the motions that do not use them. With y down a growing angle turns clockwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

SHAPES = ("ball", "square", "triangle", "star", "heart", "ring")
MOTIONS = ("left", "right", "up", "down", "circle", "pulse")
COLOURS = {
    "red": (225, 20, 45),
    "orange": (255, 125, 0),
    "yellow": (255, 240, 40),
    "green": (20, 170, 50),
    "blue": (20, 60, 255),
    "purple": (140, 0, 180),
    "pink": (255, 120, 190),
    "cyan": (0, 220, 230),
}
GROUNDS = {"black": (0, 0, 0), "white": (255, 255, 255), "gray": (128, 128, 128), "brown": (95, 50, 15)}

CLIP_FRAMES = 16
CIRCLE_PERIOD = 16.0
PULSE_PERIOD = 8.0
# Every shape of diameter d lies within HALF_EXTENT * d of its centroid along both axes.
HALF_EXTENT = 0.56

Split = Literal["train", "heldout"]


class Attributes(NamedTuple):
    """What a caption says, as indices into ``SHAPES``, ``COLOURS``, ``GROUNDS`` and ``MOTIONS``."""

    shape: int
    colour: int
    ground: int
    motion: int


@dataclass(frozen=True)
class SceneState:
    """Everything the renderer needs. ``shape``, ``colour``, ``ground``: int64 (B,); the others: float32 (B, T)."""

    shape: Tensor
    colour: Tensor
    ground: Tensor
    cx: Tensor
    cy: Tensor
    diameter: Tensor


@dataclass(frozen=True)
class Trajectory:
    """The constants of the closed form above, float32 (B,) each, in frame widths, frames and radians."""

    x0: Tensor
    y0: Tensor
    vx: Tensor
    vy: Tensor
    radius: Tensor
    diameter: Tensor
    amplitude: Tensor
    phase: Tensor

    def at(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(cx, cy, diameter), each float32 (B, T), at the frame indices ``frames`` of shape (B, T) or (T,)."""
        angle = 2 * math.pi / CIRCLE_PERIOD * frames + self.phase[:, None]
        cx = self.x0[:, None] + self.vx[:, None] * frames + self.radius[:, None] * angle.cos()
        cy = self.y0[:, None] + self.vy[:, None] * frames + self.radius[:, None] * angle.sin()
        swell = torch.sin(2 * math.pi / PULSE_PERIOD * frames + self.phase[:, None])
        return cx, cy, self.diameter[:, None] * (1 + self.amplitude[:, None] * swell)

    def to(self, device: torch.device | str) -> Trajectory:
        return Trajectory(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class ClipBatch:
    """Clips or single frames with their captions.

    ``shape``, ``colour``, ``ground``, ``motion``: int64 (B,) indices. ``trajectory``: the constants of the motion.
    ``frames``: float32 (B, T) frame indices. ``prompts``: B captions.
    """

    shape: Tensor
    colour: Tensor
    ground: Tensor
    motion: Tensor
    trajectory: Trajectory
    frames: Tensor
    prompts: list[str]

    @property
    def states(self) -> SceneState:
        """The scene at ``frames``; ``render(batch.states, size)`` draws it."""
        return SceneState(self.shape, self.colour, self.ground, *self.trajectory.at(self.frames))

    @property
    def attributes(self) -> list[Attributes]:
        rows = torch.stack((self.shape, self.colour, self.ground, self.motion), dim=1).tolist()
        return [Attributes(*row) for row in rows]

    def to(self, device: torch.device | str) -> ClipBatch:
        """The same batch with its tensors on ``device``."""
        moved = {name: getattr(self, name).to(device) for name in ("shape", "colour", "ground", "motion", "frames")}
        return replace(self, trajectory=self.trajectory.to(device), **moved)


# --------------------------------------------------------------------------------------------------------------- shapes


def _ball_sdf(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.5


def _ring_sdf(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.37).abs() - 0.13


def _square_sdf(x: Tensor, y: Tensor, half: float = 0.43) -> Tensor:
    qx, qy = x.abs() - half, y.abs() - half
    return torch.hypot(qx.clamp(min=0), qy.clamp(min=0)) + torch.maximum(qx, qy).clamp(max=0)


def _star_sdf(x: Tensor, y: Tensor, points: int, outer: float, inner: float) -> Tensor:
    """Regular star with one point up. Symmetry folds the plane onto half a point, where one edge is left."""
    half_sector = math.pi / points
    turn = torch.atan2(x, -y).abs()
    folded = (torch.remainder(turn + half_sector, 2 * half_sector) - half_sector).abs()
    length = torch.hypot(x, y)
    px, py = length * folded.cos() - outer, length * folded.sin()
    ex, ey = inner * math.cos(half_sector) - outer, inner * math.sin(half_sector)
    along = ((px * ex + py * ey) / (ex * ex + ey * ey)).clamp(0, 1)
    outside = px * ey - py * ex
    return torch.hypot(px - along * ex, py - along * ey) * outside.sign()


def _triangle_sdf(x: Tensor, y: Tensor) -> Tensor:
    return _star_sdf(x, y, 3, HALF_EXTENT, HALF_EXTENT / 2)


def _five_point_sdf(x: Tensor, y: Tensor) -> Tensor:
    return _star_sdf(x, y, 5, HALF_EXTENT, 0.48 * HALF_EXTENT)


def _heart_sdf(x: Tensor, y: Tensor, scale: float = 0.85, centroid: float = 0.6566) -> Tensor:
    """Half a unit diamond standing on its tip at the origin plus a half disc on its upper edge, mirrored."""
    px, py = x.abs() / scale, centroid - y / scale
    lobe = torch.hypot(px - 0.25, py - 0.75) - math.sqrt(2) / 4
    foot = 0.5 * (px + py).clamp(min=0)
    notch = torch.minimum(torch.hypot(px, py - 1), torch.hypot(px - foot, py - foot)) * (px - py).sign()
    return scale * torch.where(px + py > 1, lobe, notch)


_SDFS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ball": _ball_sdf,
    "square": _square_sdf,
    "triangle": _triangle_sdf,
    "star": _five_point_sdf,
    "heart": _heart_sdf,
    "ring": _ring_sdf,
}


def coverage(shape: Tensor, cx: Tensor, cy: Tensor, diameter: Tensor, size: int) -> Tensor:
    """Share of each pixel that the shape covers, ``clamp(1/2 - sdf, 0, 1)`` with the distance in pixels.

    ``shape`` int64 (N,), the others float32 (N,); returns float32 (N, size, size). The signed distances are those of
    the shape of unit diameter about its centroid, scaled by the diameter.
    """
    if size < 1:
        raise ValueError(f"size={size}: the frame needs at least one pixel a side; pass a positive integer")
    centres = (torch.arange(size, device=cx.device, dtype=cx.dtype) + 0.5) / size
    alpha = torch.empty(len(shape), size, size, device=cx.device, dtype=cx.dtype)
    for index, name in enumerate(SHAPES):
        rows = (shape == index).nonzero().squeeze(1)
        if len(rows) == 0:
            continue
        scale = diameter[rows, None, None]
        x = ((centres - cx[rows, None])[:, None, :] / scale).expand(-1, size, -1)
        y = ((centres - cy[rows, None])[:, :, None] / scale).expand(-1, -1, size)
        alpha[rows] = (0.5 - _SDFS[name](x, y) * (scale * size)).clamp_(0, 1)
    return alpha


def palette(colours: dict[str, tuple[int, int, int]], device: torch.device | str = "cpu") -> Tensor:
    """The RGB values of ``colours`` in its order, float32 (len, 3) in [-1, 1]."""
    return torch.tensor(list(colours.values()), dtype=torch.float32, device=device) / 127.5 - 1


def render(state: SceneState, size: int) -> Tensor:
    """Draw ``state``: float32 (B, 3, T, size, size) in [-1, 1], channels_last_3d, on the state's device.

    Anti-aliased from signed distances, so a frame at twice the size averages down to the frame at this size but for
    single pixels at sharp tips, where the distance alone does not tell the covered area. Draws the frames in the state
    and no other.
    """
    batch, time = state.cx.shape
    shape = state.shape[:, None].expand(batch, time).reshape(-1)
    alpha = coverage(shape, state.cx.reshape(-1), state.cy.reshape(-1), state.diameter.reshape(-1), size)
    ground = palette(GROUNDS, alpha.device)[state.ground]
    colour = palette(COLOURS, alpha.device)[state.colour]
    # One contiguous (B, T, H, W, C) write: its permutation is channels_last_3d.
    alpha = alpha.view(batch, time, size, size, 1)
    frames = torch.lerp(ground.view(batch, 1, 1, 1, 3), colour.view(batch, 1, 1, 1, 3), alpha)
    return frames.permute(0, 4, 1, 2, 3)


# ------------------------------------------------------------------------------------------------------------- captions

_NOUNS = {
    "ball": ("ball", "circle", "disc"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle",),
    "star": ("star",),
    "heart": ("heart",),
    "ring": ("ring", "donut", "hoop"),
}
# (as a participle, as a verb): "a ball moving left", "a ball moves left". The first participle is the canonical one.
_PHRASES = {
    "left": (
        ("moving left", "sliding left", "drifting to the left", "moving to the left"),
        ("moves left", "slides to the left", "drifts left", "moves to the left"),
    ),
    "right": (
        ("moving right", "sliding right", "drifting to the right", "moving to the right"),
        ("moves right", "slides to the right", "drifts right", "moves to the right"),
    ),
    "up": (("moving up", "rising", "going up", "sliding up"), ("moves up", "rises", "goes up", "slides up")),
    "down": (("moving down", "falling", "going down", "sliding down"), ("moves down", "falls", "goes down", "drops")),
    "circle": (
        ("going around in a circle", "circling", "orbiting", "going around"),
        ("goes around in a circle", "circles", "orbits", "goes around"),
    ),
    "pulse": (
        ("pulsing", "growing and shrinking", "pulsating", "getting bigger and smaller"),
        ("pulses", "grows and shrinks", "pulsates", "gets bigger and smaller"),
    ),
}
_TEMPLATES = (
    "{thing} on a {ground} background",
    "{thing} on {ground}",
    "{thing}, {ground} background",
    "{thing} over a {ground} background",
    "on a {ground} background, {thing}",
)


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def canonical_caption(attributes: Attributes) -> str:
    """The caption used for evaluation: "a {colour} {shape} {motion phrase} on a {ground} background"."""
    subject = _with_article(f"{list(COLOURS)[attributes.colour]} {SHAPES[attributes.shape]}")
    phrase = _PHRASES[MOTIONS[attributes.motion]][0][0]
    return f"{subject} {phrase} on a {list(GROUNDS)[attributes.ground]} background"


def caption(attributes: Attributes, generator: torch.Generator, with_motion: bool) -> str:
    """A random wording of ``attributes``; without the motion phrase it describes a still picture."""
    noun, template, form, phrase, spelling = torch.randint(1 << 30, (5,), generator=generator).tolist()
    nouns = _NOUNS[SHAPES[attributes.shape]]
    thing = _with_article(f"{list(COLOURS)[attributes.colour]} {nouns[noun % len(nouns)]}")
    if with_motion:
        phrases = _PHRASES[MOTIONS[attributes.motion]][form % 2]
        thing = f"{thing} {phrases[phrase % len(phrases)]}"
    ground = list(GROUNDS)[attributes.ground]
    if ground == "gray" and spelling % 2:
        ground = "grey"
    return _TEMPLATES[template % len(_TEMPLATES)].format(thing=thing, ground=ground)


# -------------------------------------------------------------------------------------------------------------- sampler


def is_heldout(shape: int, colour: int, motion: int) -> bool:
    """Whether the triple is kept out of training: one in ten or so, spread so that every value is on both sides."""
    return (colour + 3 * shape + 7 * motion) % 10 == 0


def split_triples(split: Split) -> list[tuple[int, int, int]]:
    """All (shape, colour, motion) triples of a split, in lexicographic order."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split={split!r}: there are the splits 'train' and 'heldout'; pass one of them")
    everything = [
        (shape, colour, motion)
        for shape in range(len(SHAPES))
        for colour in range(len(COLOURS))
        for motion in range(len(MOTIONS))
    ]
    return [triple for triple in everything if is_heldout(*triple) == (split == "heldout")]


def _splitmix64(value: int) -> int:
    """Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014): the finaliser."""
    mask = (1 << 64) - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def mixed_generator(seed: int, stream: int, step: int) -> torch.Generator:
    """A CPU generator seeded with ``mix(mix(mix(seed) + stream) + step) >> 1``, mix being splitmix64."""
    mixed = _splitmix64(_splitmix64(_splitmix64(seed & (1 << 64) - 1) + stream) + step)
    return torch.Generator().manual_seed(mixed >> 1)


def _between(uniform: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    return low + uniform * (high - low)


def _sample_trajectory(motion: Tensor, num_frames: int, generator: torch.Generator) -> Trajectory:
    """Random constants for each motion that keep the whole object inside the frame over the clip.

    A straight motion covers 0.38 to 0.45 of the frame between the first frame and the last of ``max(num_frames, 16)``.
    """
    size, along, across, travel, radius, depth, turn, x, y = torch.rand(9, len(motion), generator=generator)
    straight, circle, pulse = motion < 4, motion == MOTIONS.index("circle"), motion == MOTIONS.index("pulse")
    diameter = torch.where(pulse, _between(size, 0.40, 0.48), _between(size, 0.38, 0.47))
    amplitude = torch.where(pulse, _between(depth, 0.22, 0.32), 0.0)
    radius = torch.where(circle, _between(radius, 0.16, 0.21), 0.0)
    travel = torch.where(straight, _between(travel, 0.38, 0.45), 0.0)
    reach = HALF_EXTENT * diameter * (1 + amplitude) + radius + 0.01

    direction = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1], [0, 0], [0, 0]], dtype=torch.float32)[motion].T
    slack = (0.5 - reach).clamp(max=0.15)
    offset = torch.stack((_between(x, -slack, slack), _between(y, -slack, slack)))
    # A straight path is centred up to the room its travel leaves, and offset sideways by up to the slack.
    room = (0.5 - reach - travel / 2).clamp(min=0)
    path = direction * (_between(along, -room, room) - travel / 2)
    sideways = (1 - direction.abs()) * _between(across, -slack, slack)
    x0, y0 = 0.5 + torch.where(straight, path + sideways, offset)
    vx, vy = direction * travel / (max(num_frames, CLIP_FRAMES) - 1)
    return Trajectory(x0, y0, vx, vy, radius, diameter, amplitude, 2 * math.pi * turn)


class ClipSampler:
    """Random access to an endless stream of captioned clips: batch ``step`` is the same whatever was drawn before.

    ``seed`` names the stream, ``split`` the triples it draws from (uniformly; the ground is free), ``num_frames`` the
    frames of a clip. Raises ValueError for an unknown split or fewer than one frame.
    """

    def __init__(self, seed: int, split: Split = "train", num_frames: int = CLIP_FRAMES) -> None:
        if num_frames < 1:
            raise ValueError(f"num_frames={num_frames}: a clip needs at least one frame; pass a positive integer")
        self.seed = seed
        self.num_frames = num_frames
        self._triples = torch.tensor(split_triples(split))

    def batch(self, step: int, batch_size: int) -> ClipBatch:
        """Clips of ``num_frames`` frames, each with a caption that names its motion."""
        return self._draw(step, batch_size, still=False)

    def images(self, step: int, batch_size: int) -> ClipBatch:
        """Single frames at random times of such clips; half of the captions keep the motion phrase."""
        return self._draw(step, batch_size, still=True)

    def _draw(self, step: int, batch_size: int, still: bool) -> ClipBatch:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: a batch needs at least one clip; pass a positive integer")
        generator = mixed_generator(self.seed, int(still), step)
        picks = torch.randint(len(self._triples), (batch_size,), generator=generator)
        shape, colour, motion = self._triples[picks].unbind(1)
        ground = torch.randint(len(GROUNDS), (batch_size,), generator=generator)
        trajectory = _sample_trajectory(motion, self.num_frames, generator)
        if still:
            frames = (self.num_frames - 1) * torch.rand(batch_size, 1, generator=generator)
            named = torch.rand(batch_size, generator=generator) < 0.5
        else:
            frames = torch.arange(self.num_frames, dtype=torch.float32).expand(batch_size, -1)
            named = torch.ones(batch_size, dtype=torch.bool)
        batch = ClipBatch(shape, colour, ground, motion, trajectory, frames, [])
        prompts = [caption(a, generator, bool(n)) for a, n in zip(batch.attributes, named, strict=True)]
        return replace(batch, prompts=prompts)
