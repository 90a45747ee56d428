from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lumiere_fast.diffusion import (
    PARAMETERIZATIONS,
    PREDICTION_TYPES,
    EDMParameterization,
    EpsilonParameterization,
    NoiseLevel,
    Parameterization,
    SampleParameterization,
    VParameterization,
    parameterization_from_dict,
    to_dict,
)

EDM = EDMParameterization()
KINDS = [
    EDM,
    EDMParameterization(1.3),
    EpsilonParameterization(),
    VParameterization(),
    SampleParameterization(),
]
EXPLODING = [NoiseLevel(1.0, sigma) for sigma in (0.002, 0.02, 0.3, 1.0, 7.0, 80.0)]
PRESERVING = [NoiseLevel(math.cos(t), math.sin(t)) for t in (0.002, 0.1, 0.7, 1.3, 1.569)]
NEITHER = [NoiseLevel(0.3, 0.4), NoiseLevel(2.0, 5.0)]
LEVELS = EXPLODING + PRESERVING + NEITHER


def name(value: object) -> str:
    return f"{value.alpha:.3g}, {value.sigma:.3g}" if isinstance(value, NoiseLevel) else repr(value)


def draw(count: int) -> tuple[Tensor, Tensor]:
    clean, noise = torch.randn(2, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return clean, noise


def tensors(level: NoiseLevel) -> tuple[Tensor, Tensor]:
    return torch.tensor(level.alpha, dtype=torch.float64), torch.tensor(level.sigma, dtype=torch.float64)


@pytest.mark.parametrize("level", LEVELS, ids=name)
@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_a_network_that_hits_the_target_gives_back_the_clean_clip(kind: Parameterization, level: NoiseLevel) -> None:
    clean, noise = draw(1000)
    of_latent, of_prediction = kind.x0_coefficients(level)
    x0 = of_latent * (level.alpha * clean + level.sigma * noise) + of_prediction * kind.target(
        clean, noise, *tensors(level)
    )
    torch.testing.assert_close(x0, clean, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("level", LEVELS, ids=name)
def test_the_targets_are_those_of_their_names(level: NoiseLevel) -> None:
    clean, noise = draw(1000)
    alpha, sigma = tensors(level)
    size = math.hypot(*level)
    assert torch.equal(EpsilonParameterization().target(clean, noise, alpha, sigma), noise)
    assert torch.equal(SampleParameterization().target(clean, noise, alpha, sigma), clean)
    velocity = (level.alpha * noise - level.sigma * clean) / size
    torch.testing.assert_close(VParameterization().target(clean, noise, alpha, sigma), velocity)
    # EDM: what is left of the clean clip after the skip, at unit scale; here at the network's scale x / alpha
    x, noise_to_signal = clean + level.sigma / level.alpha * noise, level.sigma / level.alpha
    total = noise_to_signal**2 + 0.25
    wanted = (clean - 0.25 / total * x) / (noise_to_signal * 0.5 / total**0.5)
    torch.testing.assert_close(EDM.target(clean, noise, alpha, sigma), wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("level", EXPLODING + PRESERVING + NEITHER, ids=name)
@pytest.mark.parametrize("kind", [*KINDS[:2], VParameterization(), EpsilonParameterization()], ids=name)
def test_inputs_and_targets_have_unit_variance(kind: Parameterization, level: NoiseLevel) -> None:
    """For data of the deviation that the kind is made for. EDM's and v's also have nothing in common: the skip leaves
    only what the input does not tell."""
    clean, noise = draw(200_000)
    clean = getattr(kind, "sigma_data", 1.0) * clean
    alpha, sigma = tensors(level)
    seen = kind.scale_input(alpha * clean + sigma * noise, alpha, sigma)
    target = kind.target(clean, noise, alpha, sigma)
    assert seen.var().item() == pytest.approx(1.0, rel=0.02)
    assert target.var().item() == pytest.approx(1.0, rel=0.02)
    if kind.prediction_type in ("edm", "v_prediction"):
        assert (seen * target).mean().item() == pytest.approx(0.0, abs=0.02)


@pytest.mark.parametrize("level", PRESERVING, ids=name)
def test_where_the_variance_is_preserved_the_input_is_the_clip_and_edm_of_unit_data_is_v(level: NoiseLevel) -> None:
    clean, noise = draw(1000)
    alpha, sigma = tensors(level)
    unit = EDMParameterization(1.0)
    for kind in (unit, *KINDS[2:]):
        torch.testing.assert_close(kind.scale_input(clean, alpha, sigma), clean)
    velocity = VParameterization().target(clean, noise, alpha, sigma)
    torch.testing.assert_close(unit.target(clean, noise, alpha, sigma), -velocity)
    torch.testing.assert_close(velocity, alpha * noise - sigma * clean)
    assert VParameterization().x0_coefficients(level) == pytest.approx((level.alpha, -level.sigma))
    assert EpsilonParameterization().x0_coefficients(level) == pytest.approx(
        (1 / level.alpha, -level.sigma / level.alpha)
    )


def test_preconditioning_is_that_of_the_table() -> None:
    """Karras et al. 2022, table 1, with the numbers put in: sigma = 2, sigma_data = 0.5; then of 3 times all."""
    one, two, three = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)
    c_skip, c_out, c_in = 0.25 / 4.25, 2 * 0.5 / math.sqrt(4.25), 1 / math.sqrt(4.25)
    assert EDM.x0_coefficients(NoiseLevel(1.0, 2.0)) == pytest.approx((c_skip, c_out))
    assert EDM.x0_coefficients(NoiseLevel(3.0, 6.0)) == pytest.approx((c_skip / 3, c_out))
    assert EDM.scale_input(three, one, two).item() == pytest.approx(3 * c_in)
    assert EDM.scale_input(3 * three, three, 3 * two).item() == pytest.approx(3 * c_in)


@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_the_network_is_told_the_ratio_of_noise_to_signal(kind: Parameterization) -> None:
    alpha, sigma = torch.tensor([1.0, 1.0, 0.6, 1e-3]), torch.tensor([2.0, 0.0, 0.8, 1.0])
    wanted = [250 * math.log(ratio) for ratio in (2, 1e-4, 4 / 3, 1000)]
    assert kind.timestep(alpha, sigma).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_json_holds_a_parameterization(kind: Parameterization) -> None:
    assert parameterization_from_dict(json.loads(json.dumps(to_dict(kind)))) == kind


def test_every_kind_is_registered_and_edm_needs_no_name() -> None:
    kinds = set(Parameterization.__subclasses__())
    assert set(PARAMETERIZATIONS.values()) == set(PREDICTION_TYPES.values()) == kinds == {type(kind) for kind in KINDS}
    assert set(PREDICTION_TYPES) == {"edm", "epsilon", "v_prediction", "sample"}
    assert parameterization_from_dict({"sigma_data": 0.7}) == EDMParameterization(0.7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "Score"}, "_class_name must be one of EDMParameterization, .*, got 'Score'"),
        ({"_class_name": "VParameterization", "sigma_data": 1}, "has no setting sigma_data; it has none"),
        ({"sigma_data": 0}, "sigma_data must be a number > 0, got 0"),
        (None, "expected an object with _class_name .*, got None"),
    ],
)
def test_what_is_no_parameterization_is_told(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parameterization_from_dict(values)
