"""Losses of a training step that are more than a mean: edits weighted by where they change, and preferences.

Pure functions on tensors. Names carry their axes: B batch · C latent channels · H, W latent height and width.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from x2i.base.errors import X2IError

EditWeights = Literal["paper", "local", "released", "kept"]

#: The weights' upper bound. The released heuristic's, and by our choice the formula's too, which has none.
CAP = 64.0
#: Latents whose root mean squared difference over channels is at most this are called equal. An autoencoder or
#: JPEG moves untouched places by a few hundredths; the formula asks for equality, which no real pair has.
EQUAL = 0.1

# The released heuristic's numbers (VectorSpaceLab/OmniGen, train.py, the block on image editing).
_SAME, _DIFFERENT, _CHANGED, _LOWEST = 0.001, 0.8, 0.3, 5.0


def edit_weights(
    target_BCHW: Tensor,
    source_BCHW: Tensor,
    kind: EditWeights = "paper",
    *,
    equal: float = EQUAL,
    cap: float = CAP,
    kept: float = 4.0,
) -> Tensor:
    """Weights of an edit's squared error, which stop a model from learning to copy its source.

    paper: OmniGen, arXiv 2409.11340 section 2.2: 1 where x = x', 1 / ||x - x'||^2 elsewhere. The norm has no
        index there, so it is one number per picture. We take its mean over all elements, which does not depend on
        the resolution: the smaller an edit, the more its places weigh. Below 1 if pictures differ by more than 1.
    local: the same formula with the norm of each place, a sum over channels. Faint changes weigh most, and places
        that change by more than 1 weigh less than those that do not.
    released: the heuristic that the authors published. With d = |x - x'|: mean d under 0.001, the pair is taken for
        broken and weighs 0; up to 0.8, single values with d > 0.3 weigh 1 / mean d, within 5 and 64; else 1.
    kept: ours: places that do not change weigh `kept`, the others 1: for edits that must leave the rest alone.

    Args:
        target_BCHW: clean latents of the picture to be drawn, x.
        source_BCHW: latents of the picture to be edited, x', of the same shape.
        kind: which formula.
        equal: of all but released: root mean squared difference over channels up to which a place is unchanged.
        cap: of paper and local: largest weight.
        kept: of kept: weight of what does not change.

    Returns:
        Float32 without gradient, [B, 1, H, W], or [B, C, H, W] for `released`.

    Raises:
        X2IError: the pictures' sizes differ, or the kind is unknown.
    """
    if target_BCHW.shape != source_BCHW.shape:
        raise X2IError(
            f"an edit's latents differ in shape: target {list(target_BCHW.shape)}, source {list(source_BCHW.shape)}. "
            f"The weighted loss needs pictures of one size: leave it off for this task"
        )
    difference_BCHW = (target_BCHW.detach().float() - source_BCHW.detach().float()).abs()
    if kind == "released":
        return _released(difference_BCHW)
    squared_BCHW = difference_BCHW.square()
    changed_B1HW = squared_BCHW.mean(dim=1, keepdim=True) > equal**2
    if kind == "kept":
        return changed_B1HW.float().where(changed_B1HW, kept)
    if kind == "paper":
        weight = squared_BCHW.mean(dim=(1, 2, 3), keepdim=True)
    elif kind == "local":
        weight = squared_BCHW.sum(dim=1, keepdim=True)
    else:
        raise X2IError(f"no edit weights {kind!r}; known: paper, local, released, kept")
    return weight.reciprocal().clamp(max=cap).where(changed_B1HW, 1.0)


def _released(difference_BCHW: Tensor) -> Tensor:
    mean_B111 = difference_BCHW.mean(dim=(1, 2, 3), keepdim=True)
    weight_B111 = (1 / (mean_B111 + 1e-6)).clamp(_LOWEST, CAP)
    raised_BCHW = (difference_BCHW > _CHANGED) & (mean_B111 <= _DIFFERENT)
    return weight_B111.where(raised_BCHW, 1.0).where(mean_B111 >= _SAME, 0.0)


def weighted_squared_error(predicted: Tensor, noise: Tensor, data: Tensor, weights: Tensor) -> Tensor:
    """Mean of weight times squared error of the velocity, one value per sample, float32 [B].

    Not divided by the weights' sum, as in the published loss. With weights of 1 it is `flow.squared_error`.

    Args:
        predicted: velocity [B, C, H, W].
        noise, data: of the path; the velocity is data - noise.
        weights: [B, C, H, W] or broadcastable to it.
    """
    squared = (predicted.float() - (data - noise).float()).pow(2)
    return (squared * weights).flatten(1).mean(dim=1)


def dpo(
    chosen_B: Tensor,
    rejected_B: Tensor,
    reference_chosen_B: Tensor,
    reference_rejected_B: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Direct preference optimisation (Rafailov et al. 2305.18290, equation 7).

    -log sigmoid(beta * ((chosen - rejected) - (reference_chosen - reference_rejected))); with label smoothing e the
    conservative form: (1 - e) of it, and e of the loss with the preference turned round.

    Args:
        chosen_B, rejected_B: sums of the log-likelihoods of the answers' tokens under the model.
        reference_chosen_B, reference_rejected_B: the same under the frozen model of the start; no gradient flows.
        beta: how much the model may leave the reference; the larger, the less. The paper uses 0.1.
        label_smoothing: probability that a preference is wrong, at least 0 and under 0.5.

    Returns:
        Loss [B], and the margin of the implicit rewards [B], detached: positive where the model prefers the chosen
        answer more than the reference does. Both float32.

    Raises:
        X2IError: beta or label_smoothing is out of range.
    """
    if beta <= 0 or not 0 <= label_smoothing < 0.5:
        raise X2IError(f"dpo: beta {beta} must be positive, and label_smoothing {label_smoothing} in [0, 0.5)")
    model_B = chosen_B.float() - rejected_B.float()
    reference_B = (reference_chosen_B.float() - reference_rejected_B.float()).detach()
    margin_B = beta * (model_B - reference_B)
    loss_B = -(1 - label_smoothing) * logsigmoid(margin_B) - label_smoothing * logsigmoid(-margin_B)
    return loss_B, margin_B.detach()
