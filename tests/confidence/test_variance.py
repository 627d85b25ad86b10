"""Skip-sampling variance and confidence, against closed forms."""

from math import log

import pytest
import torch
from custom.confidence.table import tau_table
from custom.confidence.variance import RunningVariance, confidence, predicted_variance, sample_score
from custom.volumes.haar import haar_unpack


def variance_of(samples):
    running = RunningVariance()
    for sample in samples:
        running.add(sample)
    return running.value()


def test_constant_samples_have_zero_variance():
    sample = torch.randn(2, 1, 6, 7, 5) * 300
    assert variance_of([sample] * 4).abs().max() == 0


def test_the_variance_is_the_unbiased_one_of_the_samples():
    samples = torch.randn(5, 2, 1, 6, 7, 5, generator=torch.Generator().manual_seed(0)) * 100 + 40
    torch.testing.assert_close(variance_of(samples), samples.var(0, unbiased=True), rtol=1e-4, atol=1e-2)


def test_gaussian_samples_have_the_analytic_variance():
    """Structure has no noise to average away: every voxel counts for itself."""
    samples = 50 * torch.randn(40, 1, 1, 20, 20, 20, generator=torch.Generator().manual_seed(1))
    variance = variance_of(samples)
    assert float(variance.mean()) == pytest.approx(50**2, rel=0.02)
    neighbours = torch.stack([variance[..., 1:].flatten(), variance[..., :-1].flatten()])
    assert abs(float(torch.corrcoef(neighbours)[0, 1])) < 0.05


def test_a_shift_between_two_samples_counts_half_its_square():
    sample = torch.randn(1, 1, 5, 5, 5)
    torch.testing.assert_close(variance_of([sample, sample + 30]), torch.full_like(sample, 450.0), rtol=1e-3, atol=0.1)


def test_a_batch_is_its_items():
    samples = torch.randn(3, 2, 1, 4, 5, 6)
    whole = variance_of(samples)
    torch.testing.assert_close(whole[1:], variance_of(samples[:, 1:]), rtol=0, atol=0)


def test_one_sample_has_no_variance():
    with pytest.raises(ValueError, match=r"needs two samples or more, got 1"):
        variance_of([torch.zeros(1, 1, 2, 2, 2)])
    with pytest.raises(ValueError, match=r"needs two samples or more, got 0"):
        variance_of([])


def test_the_predicted_variance_is_that_of_drawn_residuals():
    """Exactly the mean of the variances of the eight bands; 20 000 draws know a variance to 1 %."""
    generator = torch.Generator().manual_seed(3)
    sigma = 0.2 + torch.rand(1, 8, 3, 4, 2, generator=generator)
    drawn = haar_unpack(torch.randn(20_000, 8, 3, 4, 2, generator=generator) * sigma)
    predicted = predicted_variance(sigma)
    assert predicted.shape == (1, 1, 6, 8, 4)
    torch.testing.assert_close(predicted, drawn.var(0, keepdim=True), rtol=0.06, atol=0)


def test_bands_of_one_deviation_give_every_voxel_that():
    torch.testing.assert_close(predicted_variance(torch.full((2, 8, 2, 3, 4), 3.0)), torch.full((2, 1, 4, 6, 8), 9.0))


def one_label(variance):
    return variance, torch.zeros_like(variance)


def test_confidence_is_one_half_at_the_quantile():
    variance = torch.rand(30, 30, 30, generator=torch.Generator().manual_seed(2)) * 1000
    tau, count = tau_table([one_label(variance)], num_labels=1, quantile=0.9)
    assert count.tolist() == [27000]
    assert float(tau[0]) == pytest.approx(900 / log(2), rel=0.02)
    c = confidence(*one_label(variance), tau, c_min=0.0)
    assert float((c >= 0.5).float().mean()) == pytest.approx(0.9, abs=0.001)


def test_each_label_has_its_own_scale_over_all_cases():
    label = torch.zeros(40, 10, 10)
    label[20:] = 1
    variance = torch.where(label == 1, 100.0, 10.0)
    tau, count = tau_table([(variance, label), (2 * variance, label)], num_labels=3, quantile=0.4)
    torch.testing.assert_close(tau[:2] * log(2), torch.tensor([10.0, 100.0]))
    assert float(tau[2]) * log(2) == pytest.approx(20)  # never seen: of everything, 10, 20, 100 and 200 alike
    assert count.tolist() == [4000, 4000, 0]
    torch.testing.assert_close(confidence(variance, label, tau), torch.full_like(variance, 0.5))


def test_a_label_of_a_few_voxels_takes_the_scale_of_everything():
    label = torch.zeros(10, 10, 10)
    label[0, 0] = 1
    tau, _ = tau_table([(torch.where(label == 1, 9e4, 50.0), label)], num_labels=2, quantile=0.5)
    torch.testing.assert_close(tau * log(2), torch.tensor([50.0, 50.0]))


def test_more_variance_is_less_confidence_within_its_limits():
    variance = torch.tensor([0.0, 1.0, 10.0, 1e9]).view(4, 1, 1)
    c = confidence(*one_label(variance), torch.tensor([10.0]), c_min=0.05).flatten()
    torch.testing.assert_close(c, torch.tensor([1.0, 0.90484, 0.36788, 0.05]))


def test_scores_weigh_labels_alike_and_leave_the_background_out():
    label = torch.zeros(10, 10, 10)
    label[0, 0, 0], label[5:] = 9, 1
    variance = torch.where(label == 9, 400.0, torch.where(label == 1, 100.0, 1e6))
    assert sample_score(variance, label) == pytest.approx((20 + 10) / 2)
    assert sample_score(variance, torch.zeros_like(label)) != sample_score(variance, torch.zeros_like(label))  # NaN


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tau_table([], num_labels=1), r"at least one image to calibrate with, got none"),
        (lambda: tau_table([one_label(torch.ones(2, 2, 2))], num_labels=1, quantile=1.0), r"between 0 and 1, got 1"),
        (
            lambda: confidence(torch.ones(1, 1, 1), torch.full((1, 1, 1), 3.0), torch.ones(2)),
            r"the table is for labels 0 to 1, got labels 3 to 3",
        ),
        (lambda: confidence(*one_label(torch.ones(1, 1, 1)), torch.ones(1), c_min=1.0), r"in \[0, 1\), got 1"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
