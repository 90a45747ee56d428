"""Scores a clip by tracking its object: which shape, colour and ground are seen, and which closed-form motion fits.

Nothing here is learned. The ground is the median of the border, the object's colour the median of its solid pixels, and
its opacity in a pixel the projection of that pixel between the two. Moments of the opacity give position and area;
templates drawn by the renderer at that place and area give the shape; least squares against the closed forms of
``lumiere_fast.data.clips`` gives the motion. Positions are in frame widths, times in frames.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lumiere_fast.data.clips import (
    CIRCLE_PERIOD,
    COLOURS,
    GROUNDS,
    MOTIONS,
    PULSE_PERIOD,
    SHAPES,
    Attributes,
    coverage,
    palette,
)

# RGB distance to the ground, in units of [-1, 1], from which a pixel is the object's: a third of the smallest distance
# between any colour and any ground, and four times the length of noise of sigma 0.05.
_OBJECT_DISTANCE = 0.35
# Opacities below this are noise; they would pull the moments towards the frame's centre.
_MIN_OPACITY = 0.25
# A frame holds an object if it covers this share of it. The smallest true one, a pulsing triangle, covers 0.03.
_MIN_AREA = 0.01
_MIN_SHAPE_FIT = 0.5
_MIN_DETECTED = 0.75
_MIN_FRAMES = 4

_MIN_TRAVEL = 0.2
_MIN_RADIUS = 0.08
_MIN_SWELL = 0.1
# Root mean square excursions below which an object stays where it is, and keeps its size (relative).
_STILL_PLACE = 0.04
_STILL_SIZE = 0.06
# Share of the variance that the closed form must explain.
_MIN_PLACE_EXPLAINED = 0.9
_MIN_SIZE_EXPLAINED = 0.8


@dataclass(frozen=True)
class ClipScore:
    """What is seen in a clip.

    ``shape`` and ``colour`` are None without an object (or, for the shape, without a template that overlaps by half).
    ``motion`` is one of ``MOTIONS``, "still" when the object keeps place and size, or "none" when nothing fits.
    ``detected``: share of frames with an object. ``shape_fit``: intersection over union with the templates of the best
    shape. ``shape_flips``: how often the best shape of a frame differs from that of the frame before.
    ``ground_flicker``: standard deviation over time of the border's mean colour, averaged over channels, where black to
    white is 1.
    """

    shape: str | None
    colour: str | None
    ground: str
    motion: str
    detected: float
    shape_fit: float
    shape_flips: int
    ground_flicker: float

    def matches(self, attributes: Attributes) -> dict[str, bool]:
        """Whether each attribute is the one asked for; "look" takes the first three together, "all" all four."""
        hits = {
            "shape": self.shape == SHAPES[attributes.shape],
            "colour": self.colour == list(COLOURS)[attributes.colour],
            "ground": self.ground == list(GROUNDS)[attributes.ground],
            "motion": self.motion == MOTIONS[attributes.motion],
        }
        look = hits["shape"] and hits["colour"] and hits["ground"]
        return {**hits, "look": look, "all": look and hits["motion"]}


@dataclass(frozen=True)
class Track:
    """The object over time: ``opacity`` (T, H, W), and for each frame ``cx``, ``cy``, ``area``, ``detected`` (T,).

    ``area`` is a share of the frame. Positions of frames without an object mean nothing.
    """

    opacity: Tensor
    cx: Tensor
    cy: Tensor
    area: Tensor
    detected: Tensor


def _nearest(colour: Tensor, names: Mapping[str, tuple[int, int, int]]) -> str:
    return list(names)[int((palette(dict(names), colour.device) - colour).norm(dim=1).argmin())]


def _border(video: Tensor) -> Tensor:
    """The outermost pixels of each frame, (3, T, P)."""
    size = video.shape[-1]
    edge = torch.zeros(video.shape[-2:], dtype=torch.bool, device=video.device)
    width = max(1, size // 32)
    edge[:width] = edge[-width:] = True
    edge[:, :width] = edge[:, -width:] = True
    return video[:, :, edge]


def _object_colour(video: Tensor, ground: Tensor) -> Tensor | None:
    """Median colour of the solid pixels, (3,): the half of the object farthest from the ground leaves out its edge."""
    distance = (video - ground[:, None, None, None]).norm(dim=0)
    inside = distance > _OBJECT_DISTANCE
    if inside.sum() < _MIN_AREA * distance.numel():
        return None
    solid = inside & (distance >= distance[inside].median())
    return video[:, solid].median(dim=1).values


def track(video: Tensor, ground: Tensor, colour: Tensor) -> Track:
    """Follow an object of RGB ``colour`` (3,) on ``ground`` (3,) through ``video`` (3, T, H, H) by moments."""
    span = colour - ground
    opacity = torch.einsum("cthw,c->thw", video - ground[:, None, None, None], span)
    # Pixels of many colours can have a median near the ground; those are then no object.
    opacity = opacity / span.square().sum().clamp(min=_OBJECT_DISTANCE**2)
    opacity = torch.where(opacity < _MIN_OPACITY, 0.0, opacity.clamp(max=1))
    size = video.shape[-1]
    centres = (torch.arange(size, device=video.device, dtype=video.dtype) + 0.5) / size
    mass = opacity.sum(dim=(1, 2))
    cx = (opacity.sum(dim=1) @ centres) / mass.clamp(min=1)
    cy = (opacity.sum(dim=2) @ centres) / mass.clamp(min=1)
    area = mass / size**2
    return Track(opacity, cx, cy, area, area > _MIN_AREA)


@lru_cache(maxsize=1)
def _unit_areas() -> tuple[float, ...]:
    """Area of each shape at diameter 1, measured on a template of diameter 1/2."""
    count = len(SHAPES)
    half = torch.full((count,), 0.5)
    return tuple((4 * coverage(torch.arange(count), half, half, half, 256).mean(dim=(1, 2))).tolist())


def _shape_overlap(seen: Track) -> tuple[Tensor, Tensor]:
    """Intersection and union, each (shapes, detected frames), of the opacity with shapes of the same place and area."""
    opacity, cx, cy, area = (x[seen.detected] for x in (seen.opacity, seen.cx, seen.cy, seen.area))
    count, frames, size = len(SHAPES), len(cx), opacity.shape[-1]
    shapes = torch.arange(count, device=cx.device).repeat_interleave(frames)
    diameter = (area / area.new_tensor(_unit_areas())[:, None]).sqrt()
    templates = coverage(shapes, cx.repeat(count), cy.repeat(count), diameter.reshape(-1), size)
    templates = templates.view(count, frames, size, size)
    shared = torch.minimum(templates, opacity).sum(dim=(2, 3))
    return shared, torch.maximum(templates, opacity).sum(dim=(2, 3))


def _fit(basis: Tensor, signal: Tensor) -> tuple[Tensor, float]:
    """Least squares of ``signal`` (T, K) on ``basis`` (T, N): coefficients (N, K), share of the variance explained."""
    coefficients = torch.linalg.lstsq(basis, signal).solution
    residual = (signal - basis @ coefficients).square().sum()
    variance = (signal - signal.mean(dim=0)).square().sum()
    return coefficients, float(1 - residual / variance.clamp(min=1e-12))


def _wave(frames: Tensor, period: float) -> Tensor:
    angle = 2 * math.pi / period * frames
    return torch.stack((torch.ones_like(frames), angle.cos(), angle.sin()), dim=1)


def _straight(frames: Tensor, place: Tensor) -> tuple[str, float]:
    """The straight motion along the axis of the larger slope, and how well it fits (0 if too short or too oblique)."""
    coefficients, explained = _fit(torch.stack((torch.ones_like(frames), frames), dim=1), place)
    vx, vy = coefficients[1].tolist()
    name = ("left" if vx < 0 else "right") if abs(vx) > abs(vy) else ("up" if vy < 0 else "down")
    travel = max(abs(vx), abs(vy)) * float(frames[-1] - frames[0])
    fits = travel >= _MIN_TRAVEL and min(abs(vx), abs(vy)) < 0.5 * max(abs(vx), abs(vy))
    return name, explained if fits and explained >= _MIN_PLACE_EXPLAINED else 0.0


def _circle(frames: Tensor, place: Tensor) -> tuple[str, float]:
    """One clockwise turn in ``CIRCLE_PERIOD`` frames.

    ``cx + i cy = c + p exp(i w f) + q exp(-i w f)``: with y down, p is the clockwise radius and q the other one, so
    that a line swung along has |p| = |q| and a turn the other way has |p| = 0.
    """
    coefficients, explained = _fit(_wave(frames, CIRCLE_PERIOD), place)
    (xc, yc), (xs, ys) = coefficients[1].tolist(), coefficients[2].tolist()
    clockwise = math.hypot(xc + ys, yc - xs) / 2
    counter = math.hypot(xc - ys, yc + xs) / 2
    fits = clockwise >= _MIN_RADIUS and counter < 0.35 * clockwise
    return "circle", explained if fits and explained >= _MIN_PLACE_EXPLAINED else 0.0


def _pulse(frames: Tensor, place: Tensor, diameter: Tensor) -> tuple[str, float]:
    """A swelling of period ``PULSE_PERIOD`` frames in place."""
    coefficients, explained = _fit(_wave(frames, PULSE_PERIOD), diameter[:, None])
    swell = float(coefficients[1:].norm() / coefficients[0].abs().clamp(min=1e-6))
    fits = swell >= _MIN_SWELL and _spread(place) < _STILL_PLACE
    return "pulse", explained if fits and explained >= _MIN_SIZE_EXPLAINED else 0.0


def _spread(place: Tensor) -> float:
    return float((place - place.mean(dim=0)).square().sum(dim=1).mean().sqrt())


def _motion(seen: Track) -> str:
    """The closed form that explains the track best; "still" if nothing moves, "none" if it moves otherwise."""
    detected = seen.detected
    if detected.sum() < _MIN_FRAMES or detected.float().mean() < _MIN_DETECTED:
        return "none"
    frames = detected.nonzero().squeeze(1).to(torch.float64)
    place = torch.stack((seen.cx, seen.cy), dim=1)[detected].double()
    # The closed form is in the diameter, which for one shape is the root of the area up to a constant.
    diameter = seen.area[detected].double().sqrt()
    if _spread(place) < _STILL_PLACE and float(diameter.std() / diameter.mean()) < _STILL_SIZE:
        return "still"
    name, explained = max(
        (_straight(frames, place), _circle(frames, place), _pulse(frames, place, diameter)), key=lambda fit: fit[1]
    )
    return name if explained > 0 else "none"


def score_clip(video: Tensor) -> ClipScore:
    """Score one clip, ``video`` (3, T, H, H) in [-1, 1] of any floating dtype. See ``ClipScore`` for what is returned.

    Raises ValueError for another shape or dtype, or values that are not finite. With fewer than four frames, or an
    object in less than three quarters of them, the motion is "none".
    """
    _check(video)
    video = video.detach().to("cpu", torch.float32).clamp(-1, 1)
    border = _border(video)
    ground = border.flatten(1).median(dim=1).values
    flicker = float(border.mean(dim=2).std(dim=1, correction=0).mean()) / 2
    name = _nearest(ground, GROUNDS)
    colour = _object_colour(video, ground)
    if colour is None:
        return ClipScore(None, None, name, "none", 0.0, 0.0, 0, flicker)
    seen = track(video, ground, colour)
    share = float(seen.detected.float().mean())
    if share == 0:
        return ClipScore(None, _nearest(colour, COLOURS), name, "none", 0.0, 0.0, 0, flicker)
    shared, united = _shape_overlap(seen)
    overall = shared.sum(dim=1) / united.sum(dim=1)
    best = int(overall.argmax())
    fit = float(overall[best])
    per_frame = (shared / united).argmax(dim=0)
    return ClipScore(
        shape=SHAPES[best] if fit >= _MIN_SHAPE_FIT else None,
        colour=_nearest(colour, COLOURS),
        ground=name,
        motion=_motion(seen),
        detected=share,
        shape_fit=fit,
        shape_flips=int((per_frame[1:] != per_frame[:-1]).sum()),
        ground_flicker=flicker,
    )


def _check(video: Tensor) -> None:
    if video.ndim != 4 or video.shape[0] != 3 or video.shape[2] != video.shape[3] or video.shape[1] < 1:
        raise ValueError(f"video has shape {tuple(video.shape)}; pass one clip (3, T, H, H) with T of at least 1")
    if not video.is_floating_point():
        raise ValueError(f"video has dtype {video.dtype}; pass floating point values in [-1, 1]")
    if not torch.isfinite(video).all():
        raise ValueError("video holds values that are not finite; pass values in [-1, 1]")


def wilson_interval(hits: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion (1927), 95% by default. Raises ValueError without trials."""
    if trials < 1 or not 0 <= hits <= trials:
        raise ValueError(f"hits={hits}, trials={trials}: pass at least one trial and 0 <= hits <= trials")
    rate, weight = hits / trials, z * z / trials
    middle = (rate + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(rate * (1 - rate) / trials + weight / (4 * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def evaluate(videos: Tensor, attributes: Sequence[Attributes]) -> dict[str, dict[str, float]]:
    """Score ``videos`` (B, 3, T, H, H) against the ``attributes`` their captions ask for.

    Returns for "shape", "colour", "ground", "motion", "look" (the first three in the same clip) and "all" the
    "accuracy" with the "low" and "high" ends of its Wilson 95% interval, and under "quality" the means over clips of
    "detected", "shape_fit", "shape_flips" and "ground_flicker". Single frames (T = 1) have no motion: read "look".
    Raises ValueError if the numbers of clips and attributes differ.
    """
    if videos.ndim != 5 or len(videos) != len(attributes) or len(videos) == 0:
        raise ValueError(
            f"videos has shape {tuple(videos.shape)} and attributes has {len(attributes)} entries; "
            "pass (B, 3, T, H, H) with as many attributes as clips, at least one"
        )
    scores = [score_clip(video) for video in videos]
    matches = [score.matches(wanted) for score, wanted in zip(scores, attributes, strict=True)]
    report = {}
    for name in ("shape", "colour", "ground", "motion", "look", "all"):
        hits = sum(match[name] for match in matches)
        low, high = wilson_interval(hits, len(matches))
        report[name] = {"accuracy": hits / len(matches), "low": low, "high": high}
    report["quality"] = {
        name: sum(float(getattr(score, name)) for score in scores) / len(scores)
        for name in ("detected", "shape_fit", "shape_flips", "ground_flicker")
    }
    return report
