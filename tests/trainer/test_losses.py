"""Edit losses weigh what changes, as the paper and the released code say; preferences are learned as in DPO."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from x2i.base.errors import X2IError
from x2i.model import flow
from x2i.trainer.losses import EditWeights, dpo, edit_weights, weighted_squared_error

FIGURES = {
    "raised": [0, 1, 12, 70, 0],
    "largest": [0.0, 64.0, 12.862813, 5.0, 1.0],
    "mean": [0.0, 1.328125, 1.741426, 2.458333, 1.0],
    "row": [12.862813, 12.862813, 1.0, 1.0],
    "loss": [0.0, 3.769982, 4.257677, 8.152698, 2.930476],
}


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def pair() -> tuple[Tensor, Tensor]:
    """Five pairs, one for each case of the released heuristic: the right half changes, by more from row to row."""
    target = drawn(0, 5, 4, 6, 8)
    change = drawn(1, 5, 4, 6, 8) * torch.tensor([0.001, 0.01, 0.2, 0.9, 3.0]).view(5, 1, 1, 1)
    change[..., :4] = 0
    change[1, 0, 0, 5] = -0.5  # one value that is over the threshold
    return target, target + change


def test_released_weights_are_those_of_the_released_code() -> None:
    """Figures from VectorSpaceLab/OmniGen at d475201: the block on image editing of train.py, run on these pairs."""
    target, source = pair()
    weights = edit_weights(target, source, "released")
    assert weights.shape == target.shape
    assert weights.dtype == torch.float32
    assert [(w > 1).sum().item() for w in weights] == FIGURES["raised"]
    assert weights.amax(dim=(1, 2, 3)).tolist() == pytest.approx(FIGURES["largest"], abs=1e-5)
    assert weights.mean(dim=(1, 2, 3)).tolist() == pytest.approx(FIGURES["mean"], abs=1e-5)
    assert weights[2, 1, 3, 4:].tolist() == pytest.approx(FIGURES["row"], abs=1e-5)


def test_the_released_loss_is_the_released_code_s() -> None:
    """Figures as above, with `training_losses` of train_helper/loss.py."""
    target, source = pair()
    predicted, noise = drawn(2, 5, 4, 6, 8), drawn(3, 5, 4, 6, 8)
    loss = weighted_squared_error(predicted, noise, target, edit_weights(target, source, "released"))
    assert loss.tolist() == pytest.approx(FIGURES["loss"], rel=1e-5)


def test_paper_weights_are_one_number_per_picture_where_it_changes() -> None:
    target = torch.zeros(2, 4, 4, 4)
    source = target.clone()
    source[0, :, 0, 0] = 1.0  # 1 of 16 places by 1: mean square 1 / 16
    source[1, :, :2] = 2.0  # half of the places by 2: mean square 2
    weights = edit_weights(target, source, "paper")
    assert weights.shape == (2, 1, 4, 4)
    expected = torch.ones(2, 1, 4, 4)
    expected[0, 0, 0, 0] = 16.0
    expected[1, 0, :2] = 0.5
    assert torch.equal(weights, expected)
    assert torch.equal(edit_weights(target, source), weights)


def test_local_weights_are_the_inverse_square_of_each_place() -> None:
    target = torch.zeros(1, 4, 2, 2)
    source = target.clone()
    source[0, 0, 0, 0] = 3.0
    source[0, :, 0, 1] = 0.25
    source[0, :, 1, 0] = 0.11  # over the threshold, by less than the cap allows
    source[0, :, 1, 1] = 0.09  # as good as equal
    weights = edit_weights(target, source, "local")
    torch.testing.assert_close(weights, torch.tensor([[[[1 / 9, 4.0], [1 / (4 * 0.11**2), 1.0]]]]))
    assert edit_weights(target, source, "local", cap=5.0).max() == 5.0
    assert edit_weights(target, source, "local", equal=0.05)[0, 0, 1, 1] == pytest.approx(1 / (4 * 0.09**2))


@pytest.mark.parametrize("kind", ["paper", "local"])
def test_equal_pictures_weigh_one_everywhere(kind: EditWeights) -> None:
    target = drawn(0, 2, 4, 3, 5)
    assert torch.equal(edit_weights(target, target, kind), torch.ones(2, 1, 3, 5))
    assert torch.equal(edit_weights(target, target + 0.02, kind), torch.ones(2, 1, 3, 5))  # an autoencoder's noise


@pytest.mark.parametrize("kind", ["paper", "local", "released"])
def test_weights_are_finite_without_gradient_and_those_of_the_sample_alone(kind: EditWeights) -> None:
    target, source = pair()
    target.requires_grad_()
    weights = edit_weights(target, source, kind)
    assert not weights.requires_grad
    assert torch.isfinite(weights).all()
    assert weights.max() <= 64
    assert torch.equal(edit_weights(target[1:2], source[1:2], kind), weights[1:2])
    half = edit_weights(target.bfloat16(), source.bfloat16(), kind)
    assert half.dtype == torch.float32


def test_weights_do_not_depend_on_the_resolution() -> None:
    target, source = pair()
    wide, wide_source = (x.repeat_interleave(2, 2).repeat_interleave(2, 3) for x in (target, source))
    for kind in get_args(EditWeights):
        larger = edit_weights(wide, wide_source, kind)
        torch.testing.assert_close(larger[..., ::2, ::2], edit_weights(target, source, kind))


def test_pairs_of_other_sizes_and_unknown_kinds_are_refused() -> None:
    target, source = pair()
    with pytest.raises(X2IError, match="one size"):
        edit_weights(target, source[..., :4], "paper")
    with pytest.raises(X2IError, match="known: paper"):
        edit_weights(target, source, "papre")  # type: ignore[arg-type]


def test_weights_of_one_give_the_plain_loss() -> None:
    predicted, noise, data = drawn(0, 3, 4, 6, 8), drawn(1, 3, 4, 6, 8), drawn(2, 3, 4, 6, 8)
    plain = flow.squared_error(predicted, noise, data)
    assert torch.equal(weighted_squared_error(predicted, noise, data, torch.ones(3, 1, 6, 8)), plain)
    assert torch.equal(weighted_squared_error(predicted, noise, data, torch.ones_like(data)), plain)
    assert weighted_squared_error(predicted.bfloat16(), noise, data, torch.ones(3, 1, 1, 1)).dtype == torch.float32
    halves = torch.ones(3, 1, 6, 8)
    halves[..., :4] = 0
    left_out = weighted_squared_error(predicted, noise, data, halves)
    torch.testing.assert_close(left_out, flow.squared_error(*(x[..., 4:] for x in (predicted, noise, data))) / 2)


CHOSEN = torch.tensor([-12.5, -80.25, -3.0, -41.0, -7.0])
REJECTED = torch.tensor([-14.0, -60.0, -3.0, -90.5, -7.5])
REFERENCE = (torch.tensor([-13.0, -75.0, -2.0, -40.0, -7.25]), torch.tensor([-13.5, -66.0, -2.5, -70.0, -6.0]))


@pytest.mark.parametrize(
    ("beta", "smoothing", "expected"),
    [
        (0.1, 0.0, [0.6443967, 1.4061501, 0.7184597, 0.1330211, 0.6094704]),
        (0.5, 0.0, [0.4740770, 5.6286001, 0.8259394, 5.8292964e-05, 0.3484446]),
        (0.1, 0.1, [0.6543967, 1.2936502, 0.7134596, 0.3280211, 0.6269704]),
        (0.5, 0.1, [0.5240769, 5.0661001, 0.8009394, 0.9750583, 0.4359446]),
    ],
)
def test_preference_loss_is_trl_s(beta: float, smoothing: float, expected: list[float]) -> None:
    """Figures from huggingface/trl at f2cd577: its `sigmoid` loss, and the sum of the two terms of its `robust` loss."""
    loss, margin = dpo(CHOSEN, REJECTED, *REFERENCE, beta, smoothing)
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)
    assert (margin / beta).tolist() == pytest.approx([1.0, -11.25, -0.5, 19.5, 1.75])


def test_a_model_that_is_its_reference_loses_log_two() -> None:
    loss, margin = dpo(CHOSEN, REJECTED, CHOSEN, REJECTED, 0.1)
    assert loss.tolist() == pytest.approx([math.log(2)] * 5)
    assert margin.tolist() == [0.0] * 5


def test_preference_gradient_raises_the_chosen_and_lowers_the_rejected() -> None:
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    best, worst = (r.clone().requires_grad_() for r in REFERENCE)
    loss, margin = dpo(chosen, rejected, best, worst, 0.1)
    assert not margin.requires_grad
    loss.sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert (chosen.grad < 0).all()
    assert torch.equal(chosen.grad, -rejected.grad)
    # equation 7's gradient: beta, by how wrong the implicit reward is
    torch.testing.assert_close(chosen.grad, -0.1 * torch.sigmoid(-margin))
    assert best.grad is None and worst.grad is None


def test_half_precision_sums_are_compared_in_float32() -> None:
    half = [x.bfloat16() for x in (CHOSEN, REJECTED, *REFERENCE)]
    loss, margin = dpo(half[0], half[1], half[2], half[3], 0.1)
    assert loss.dtype == margin.dtype == torch.float32


@pytest.mark.parametrize(("beta", "smoothing"), [(0.0, 0.0), (-1.0, 0.0), (0.1, 0.5), (0.1, -0.1)])
def test_numbers_out_of_range_are_refused(beta: float, smoothing: float) -> None:
    with pytest.raises(X2IError, match="dpo: beta"):
        dpo(CHOSEN, REJECTED, *REFERENCE, beta, smoothing)


def test_what_is_kept_weighs_more_than_what_changes() -> None:
    target, source = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    source[0, :, :2] = 1.0  # the upper half of the first pair changes
    weights = edit_weights(target, source, "kept", kept=3.0)
    assert weights.shape == (2, 1, 4, 4)
    assert (weights[0, :, :2] == 1).all() and (weights[0, :, 2:] == 3).all() and (weights[1] == 3).all()
