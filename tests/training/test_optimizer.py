from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lumiere_fast.training.optimizer import MuonAdamW, as_matrix, is_matrix

RATE = 1e-2


def draw(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stepped(weight: Tensor, gradients: list[Tensor], weight_decay: float = 0.0) -> Tensor:
    """`weight` after one step along each gradient."""
    parameter = nn.Parameter(weight.clone())
    optimizer = MuonAdamW({"weight": parameter}, weight_decay=weight_decay)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step(RATE)
        optimizer.zero_grad()
        assert parameter.grad is None
    return parameter.detach()


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [
        ((16, 16), True),
        ((15, 64), False),
        ((64, 15), False),
        ((32, 2, 3, 3), True),
        ((8, 32, 3), False),
        ((64,), False),
    ],
)
def test_weights_of_16_rows_and_columns_are_matrices(shape: tuple[int, ...], matrix: bool) -> None:
    assert is_matrix(torch.empty(shape)) is matrix


@pytest.mark.parametrize("shape", [(16, 32), (16, 8, 3), (16, 8, 3, 3), (16, 24, 1, 1)])
def test_a_matrix_is_a_view_with_a_row_for_each_output(shape: tuple[int, ...]) -> None:
    weight = draw(*shape)
    layouts = [weight]
    if len(shape) == 4:
        layouts.append(weight.contiguous(memory_format=torch.channels_last))
    if len(shape) == 3:
        layouts.append(weight.transpose(1, 2).contiguous().transpose(1, 2))
    for given in layouts:
        matrix = as_matrix(given, like=given)
        assert matrix.data_ptr() == given.data_ptr()
        assert matrix.shape == (16, weight[0].numel())
        assert torch.equal(matrix.sort(dim=1).values, weight.flatten(1).sort(dim=1).values)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (20, 4, 3, 3)])
def test_matrices_step_along_the_orthogonalised_gradient(shape: tuple[int, ...]) -> None:
    """The nearest orthogonal matrix by SVD, at 0.2 sqrt(longer side); Newton-Schulz comes within a factor of it."""
    gradient = draw(*shape)
    step = (draw(*shape, seed=4) - stepped(draw(*shape, seed=4), [gradient])).flatten(1)
    step = step / (RATE * 0.2 * max(step.shape) ** 0.5)
    left, _, right = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    singular = torch.linalg.svdvals(step)
    assert singular.min() > 0.6
    assert singular.max() < 1.3
    exact = left @ right
    assert (step * exact).sum() / (step.norm() * exact.norm()) > 0.97


def test_the_layout_of_a_convolution_does_not_matter() -> None:
    weight, gradients = draw(16, 8, 3, 3), [draw(16, 8, 3, 3, seed=s) for s in range(4)]
    contiguous = stepped(weight, gradients)
    permuted = [x.contiguous(memory_format=torch.channels_last) for x in (weight, *gradients)]
    channels_last = stepped(permuted[0], permuted[1:])
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    assert (contiguous - channels_last).norm() < 0.02 * (contiguous - weight).norm()  # Newton-Schulz runs in bfloat16


def test_vectors_and_slim_weights_are_those_of_adamw() -> None:
    for shape in ((7,), (4, 9)):
        weight, gradients = draw(*shape), [draw(*shape, seed=s) for s in range(3)]
        theirs = nn.Parameter(weight.clone())
        adamw = torch.optim.AdamW([theirs], lr=RATE, betas=(0.9, 0.99), weight_decay=0.1)
        for gradient in gradients:
            theirs.grad = gradient
            adamw.step()
        assert torch.equal(stepped(weight, gradients, weight_decay=0.1), theirs)


@pytest.mark.parametrize("shape", [(20, 30), (5,)])
def test_weight_decay_is_times_the_rate(shape: tuple[int, ...]) -> None:
    weight, gradient = draw(*shape), draw(*shape, seed=4)
    with_decay, without = stepped(weight, [gradient], weight_decay=0.1), stepped(weight, [gradient])
    torch.testing.assert_close(without - with_decay, RATE * 0.1 * weight, rtol=0, atol=1e-6)


def test_a_restored_optimiser_goes_on_as_before() -> None:
    def fresh() -> tuple[dict[str, nn.Parameter], MuonAdamW]:
        shapes = {"conv": (16, 8, 3, 3), "bias": (16,), "linear": (20, 16), "head": (3, 16, 3, 3)}
        parameters = {name: nn.Parameter(draw(*shape)) for name, shape in shapes.items()}
        for name in ("conv", "head"):
            parameters[name].data = parameters[name].data.contiguous(memory_format=torch.channels_last)
        return parameters, MuonAdamW(parameters, weight_decay=0.01)

    def advance(parameters: dict[str, nn.Parameter], optimizer: MuonAdamW, seed: int) -> None:
        for name, parameter in parameters.items():
            parameter.grad = torch.empty_like(parameter).copy_(draw(*parameter.shape, seed=seed + len(name)))
        optimizer.step(RATE)

    parameters, optimizer = fresh()
    advance(parameters, optimizer, 0)
    advance(parameters, optimizer, 10)
    twins, restored = fresh()
    for name, twin in twins.items():
        twin.data.copy_(parameters[name])
    state = {name: x.contiguous() for name, x in optimizer.state().items()}
    adamw, muon = ("bias", "head"), ("conv", "linear")
    names = {f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in adamw}
    assert set(state) == names | {f"momentum_buffer.{name}" for name in muon}
    restored.load_state(state, 2)
    for name, moment in restored.state().items():
        assert moment.stride() == optimizer.state()[name].stride(), name
    for seed in (20, 30):
        advance(parameters, optimizer, seed)
        advance(twins, restored, seed)
    assert all(torch.equal(twins[name], parameter) for name, parameter in parameters.items())
