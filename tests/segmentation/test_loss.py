"""The loss of confidence-aware adaptive learning, against MONAI's and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from custom.segmentation.loss import CALLoss, class_normalised, class_weights
from monai.losses import DiceCELoss, SoftclDiceLoss

CLASSES = 4


@pytest.fixture
def batch():
    """Logits, labels without class 3 in the second sample, and a confidence."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, CLASSES, 9, 8, 7, generator=generator)
    label = torch.randint(0, CLASSES, (2, 1, 9, 8, 7), generator=generator).float()
    label[1][label[1] == 3] = 0
    confidence = torch.rand(2, 1, 9, 8, 7, generator=generator) * 0.9 + 0.1
    return logits, label, confidence


def value_and_gradient(loss, logits, target):
    logits = logits.clone().requires_grad_()
    value = loss(logits, target)
    return value.detach(), torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize("level", [None, 1.0, 0.3, 1e-4])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_the_same_confidence_everywhere_is_dice_ce(batch, level, gamma):
    logits, label, _ = batch
    target = label if level is None else {"label": label, "confidence": torch.full_like(label, level)}
    for weight in (None, torch.tensor([1.0, 0.0, 2.0, 6.0])):
        expected = value_and_gradient(DiceCELoss(softmax=True, to_onehot_y=True, weight=weight), logits, label)
        found = value_and_gradient(CALLoss(gamma=gamma, weight=weight), logits, target)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_without_gamma_confidence_changes_nothing(batch):
    logits, label, confidence = batch
    torch.testing.assert_close(
        CALLoss(gamma=0.0)(logits, {"label": label, "confidence": confidence}), CALLoss()(logits, label)
    )


def test_scaling_the_confidence_changes_nothing(batch):
    logits, label, confidence = batch
    first, second = (
        value_and_gradient(CALLoss(), logits, {"label": label, "confidence": factor * confidence})
        for factor in (1.0, 0.01)
    )
    torch.testing.assert_close(first, second)


def test_the_loss_of_weights_by_hand():
    """Two voxels of class 0 with confidence 1 and 1/3, so weights 3/2 and 1/2; one of class 1."""
    p = torch.tensor([0.8, 0.6, 0.3])  # of class 0
    logits = torch.stack([p, 1 - p]).log().view(1, 2, 3, 1, 1)
    label = torch.tensor([0.0, 0.0, 1.0]).view(1, 1, 3, 1, 1)
    confidence = torch.tensor([1.0, 1 / 3, 0.2]).view_as(label)
    cross_entropy = -(1.5 * np.log(0.8) + 0.5 * np.log(0.6) + np.log(0.7)) / 3
    dice_0 = 2 * (1.5 * 0.8 + 0.5 * 0.6) / (1.5 * 0.8 + 0.5 * 0.6 + 0.3 + 2)
    dice_1 = 2 * 0.7 / (1.5 * 0.2 + 0.5 * 0.4 + 0.7 + 1)
    expected = cross_entropy + 1 - (dice_0 + dice_1) / 2
    assert float(CALLoss()(logits, {"label": label, "confidence": confidence})) == pytest.approx(expected, abs=1e-4)


def test_a_class_keeps_its_share_of_the_loss_however_little_it_is_trusted(batch):
    _, label, confidence = batch
    low = torch.where(label == 2, 0.01 * confidence, confidence)
    weights = class_normalised(low, label, CLASSES, largest=5.0)
    for sample, ids in zip(weights, label, strict=True):
        for k in ids.unique():
            assert float(sample[ids == k].mean()) == pytest.approx(1, abs=1e-6)
    assert float(weights[label == 2].std()) > 0.2, "within the class, confidence must still order the voxels"


@pytest.mark.parametrize("rest", [0.0, 1e-6, 0.05])
@pytest.mark.parametrize("trusted", [1, 190, 199, 201])
def test_few_voxels_cannot_outweigh_their_class(rest, trusted):
    label = torch.zeros(1, 1, 10, 10, 10)
    confidence = torch.full_like(label, rest)
    confidence.view(-1)[:trusted] = 1.0
    weights = class_normalised(confidence, label, 1, largest=5.0)
    assert float(weights.max()) <= 5.25
    assert float(weights.mean()) == pytest.approx(1, abs=1e-5)
    assert bool((weights.view(-1)[:trusted] >= weights.view(-1)[-1]).all())


def test_a_class_without_any_confidence_counts_like_one_with_the_same_everywhere(batch):
    _, label, confidence = batch
    weights = class_normalised(torch.where(label == 1, 0.0, confidence), label, CLASSES, largest=5.0)
    assert bool((weights[label == 1] == 1).all())
    assert bool(weights.isfinite().all())


def test_samples_count_by_their_weight(batch):
    logits, label, confidence = batch
    target = {"label": label, "confidence": confidence, "sample_weight": torch.tensor([2.0, 0.0])}
    alone = {"label": label[:1], "confidence": confidence[:1]}
    torch.testing.assert_close(CALLoss()(logits, target), CALLoss()(logits[:1], alone))


def test_samples_of_a_batch_do_not_see_each_other(batch):
    logits, label, confidence = batch
    together = CALLoss()(logits, {"label": label, "confidence": confidence})
    apart = [
        CALLoss()(logits[i : i + 1], {"label": label[i : i + 1], "confidence": confidence[i : i + 1]}) for i in (0, 1)
    ]
    torch.testing.assert_close(together, (apart[0] + apart[1]) / 2)


def test_half_precision_logits_give_a_float32_loss(batch):
    logits, label, confidence = batch
    found = CALLoss()(logits.bfloat16(), {"label": label, "confidence": confidence})
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, CALLoss()(logits, {"label": label, "confidence": confidence}), atol=0.01, rtol=0)


def test_a_volume_of_background_alone_has_a_finite_loss_and_gradient(batch):
    logits, label, _ = batch
    value, gradient = value_and_gradient(CALLoss(), logits, torch.zeros_like(label))
    assert bool(value.isfinite())
    assert bool(gradient.isfinite().all())


def test_the_cl_dice_term_is_monais_of_the_thin_labels(batch):
    logits, label, _ = batch
    p = logits.softmax(1)[:, [2]]
    term = SoftclDiceLoss()(p, (label == 2).float())
    found = CALLoss(cl_dice_weight=0.5, thin_labels=[2])(logits, label)
    torch.testing.assert_close(found, CALLoss()(logits, label) + 0.5 * term)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -1.0}, "gamma, cl_dice_weight: must not be negative"),
        ({"largest_weight": 0.5}, "largest_weight: must be at least 1"),
        ({"cl_dice_weight": 0.1}, "thin_labels: a clDice term needs the ids"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CALLoss(**options)


def test_class_weights_of_another_number_are_refused(batch):
    with pytest.raises(ValueError, match="weight: needs one value for each of 4 classes, got 3"):
        CALLoss(weight=torch.ones(3))(*batch[:2])


@pytest.mark.parametrize("values", [[1, 1], [1, -1, 1], [0, 1, 1]])
def test_impossible_class_weights_are_refused_before_training(values):
    with pytest.raises(ValueError, match="class_weights: need one weight for each of 3 labels"):
        class_weights(values, 3)


def test_class_weights_are_those_of_the_list():
    assert torch.equal(class_weights([0.5, 1, 6], 3), torch.tensor([0.5, 1.0, 6.0]))


def test_confidence_of_another_shape_is_refused(batch):
    logits, label, confidence = batch
    with pytest.raises(ValueError, match=r"label and confidence must be \(B, 1, H, W, D\)"):
        CALLoss()(logits, {"label": label, "confidence": confidence[..., :-1]})
