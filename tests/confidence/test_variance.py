"""Skip-sampling variance and confidence, against closed forms."""

from math import log

import pytest
import torch
from custom.confidence.table import tau_table
from custom.confidence.variance import RunningVariance, confidence, local_mean, local_mean_variance, sample_score
from custom.diffusion.moments import from_local
from custom.volumes.haar import haar_unpack
from scipy import ndimage


def variance_of(samples):
    running = RunningVariance()
    for sample in samples:
        running.add(sample)
    return running.value()


def test_constant_samples_have_zero_variance():
    sample = torch.randn(2, 1, 6, 7, 5) * 300
    assert variance_of([sample] * 4).abs().max() == 0


def test_the_variance_is_the_unbiased_one_of_the_local_means():
    samples = torch.randn(5, 2, 1, 6, 7, 5, generator=torch.Generator().manual_seed(0)) * 100 + 40
    means = torch.stack([local_mean(sample) for sample in samples])
    torch.testing.assert_close(variance_of(samples), means.var(0, unbiased=True), rtol=1e-4, atol=1e-2)


def test_gaussian_samples_have_the_analytic_variance():
    """White noise of SD s averaged over 27 voxels has variance s^2 / 27; 40 samples of 20^3 voxels."""
    samples = 50 * torch.randn(40, 1, 1, 20, 20, 20, generator=torch.Generator().manual_seed(1))
    inner = variance_of(samples)[..., 1:-1, 1:-1, 1:-1]
    assert float(inner.mean()) == pytest.approx(50**2 / 27, rel=0.03)


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


def test_local_means_match_scipy_and_keep_constants():
    volume = torch.randn(1, 1, 5, 6, 4)
    expected = ndimage.uniform_filter(volume[0, 0].double().numpy(), 3, mode="nearest")
    torch.testing.assert_close(local_mean(volume)[0, 0].double(), torch.from_numpy(expected), atol=1e-5, rtol=1e-5)
    assert torch.equal(local_mean(torch.full((1, 1, 1, 1, 1), 7.0)), torch.full((1, 1, 1, 1, 1), 7.0))


def test_the_variance_of_local_means_is_that_of_drawn_residuals():
    """Interior, one voxel from the border: what is averaged there lies inside."""
    generator = torch.Generator().manual_seed(3)
    sigma = 0.2 + torch.rand(1, 8, 4, 5, 3, generator=generator)
    edge = torch.rand(1, 1, 4, 5, 3, generator=generator) > 0.5
    draws = 6000
    noise = torch.randn(draws, 8, 4, 5, 3, generator=generator) * sigma
    drawn = haar_unpack(from_local(noise, edge.expand(draws, -1, -1, -1, -1)))
    measured = local_mean(drawn).var(0, keepdim=True)
    inner = (..., slice(1, -1), slice(1, -1), slice(1, -1))
    ratio = local_mean_variance(sigma, edge)[inner] / measured[inner]
    assert local_mean_variance(sigma, edge).shape == (1, 1, 8, 10, 6)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=0.1, rtol=0)
    assert float(ratio.mean()) == pytest.approx(1, abs=0.01)


def test_white_noise_of_one_deviation_averages_to_its_27th():
    sigma, edge = torch.full((1, 8, 4, 4, 4), 3.0), torch.zeros(1, 1, 4, 4, 4, dtype=torch.bool)
    for where in (edge, ~edge):
        inner = local_mean_variance(sigma, where)[..., 1:-1, 1:-1, 1:-1]
        torch.testing.assert_close(inner, torch.full_like(inner, 9 / 27))


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
