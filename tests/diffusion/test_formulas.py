"""The formulas of the diffusion against algebra and closed forms of Gaussian data."""

import pytest
import torch
from custom.diffusion.formulas import amplitudes, angle, angle_step, precondition
from custom.volumes.grids import pad_to_multiple
from custom.volumes.haar import depth_to_space, haar_pack, haar_unpack, space_to_depth

SHAPES = [(1, 1, 2, 2, 2), (2, 3, 4, 6, 8), (1, 2, 10, 2, 4)]
TIMES = [(0.02, 0.4), (0.3, 1.5), (0.7, 0.1), (0.98, 3.0)]  # (a, sigma)


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_haar_unpacks_what_it_packed_and_keeps_energy(shape):
    x = noise(*shape)
    packed = haar_pack(x)
    assert packed.shape == (shape[0], 8 * shape[1], *(n // 2 for n in shape[2:]))
    torch.testing.assert_close(haar_unpack(packed), x, rtol=0, atol=1e-14)
    torch.testing.assert_close(packed.square().sum(), x.square().sum(), rtol=1e-13, atol=0)


def test_haar_is_an_orthonormal_matrix():
    columns = haar_pack(torch.eye(64, dtype=torch.float64).reshape(64, 1, 4, 4, 4)).reshape(64, 64)
    torch.testing.assert_close(columns @ columns.T, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-14)


def test_packed_white_noise_is_white():
    packed = haar_pack(noise(1, 1, 48, 40, 44))[0]
    samples = torch.cat([packed[:, :-1].flatten(1), packed[:, 1:].flatten(1)])  # every band, and the same one voxel on
    covariance = samples @ samples.T / samples.shape[1]
    # 21 000 - 2 000 samples: the sampling error of an entry is 0.007
    torch.testing.assert_close(covariance, torch.eye(16, dtype=torch.float64), rtol=0, atol=0.05)


def test_band_zero_is_the_block_mean_times_two_root_two():
    x = noise(2, 3, 4, 6, 8)
    blocks = torch.nn.functional.avg_pool3d(x, 2)
    torch.testing.assert_close(haar_pack(x)[:, ::8], 8**0.5 * blocks)


def test_high_bands_of_a_constant_volume_are_zero():
    packed = haar_pack(torch.full((1, 1, 4, 4, 4), 7.0))
    assert packed[:, 1:].abs().max() < 1e-5


def test_bands_are_ordered_by_axis():
    """Band 1 sees a change along d, band 2 along w, band 4 along h."""
    for axis, band in ((4, 1), (3, 2), (2, 4)):
        x = torch.zeros(1, 1, 2, 2, 2)
        x.select(axis, 0).fill_(1.0)
        packed = haar_pack(x)[0, :, 0, 0, 0]
        assert packed.nonzero().flatten().tolist() == [0, band]
        assert packed[band] > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_depth_to_space_inverts_space_to_depth(shape):
    x = noise(*shape)
    assert torch.equal(depth_to_space(space_to_depth(x)), x)


def test_space_to_depth_lists_block_offsets_fastest():
    x = torch.arange(2 * 4 * 2 * 2.0).reshape(1, 2, 4, 2, 2)
    packed = space_to_depth(x)
    assert packed.shape == (1, 16, 2, 1, 1)
    for channel, block in ((0, 0), (1, 1)):
        expected = x[0, channel, 2 * block : 2 * block + 2].flatten()
        assert torch.equal(packed[0, 8 * channel : 8 * channel + 8, block, 0, 0], expected)


@pytest.mark.parametrize("pack", [space_to_depth, haar_pack])
@pytest.mark.parametrize("size", [(5, 4, 4), (4, 3, 4), (4, 4, 7)])
def test_odd_sizes_cannot_be_packed(pack, size):
    with pytest.raises(
        ValueError, match=r"x: spatial sizes must be even to be packed, got .*; pad the volume first"
    ) as error:
        pack(torch.zeros(1, 1, *size))
    assert str(size) in str(error.value)


@pytest.mark.parametrize(("a", "sigma"), TIMES)
def test_preconditioning_is_the_gaussian_posterior_of_the_velocity(a, sigma):
    """Conditional mean and variance of jointly Gaussian (v, x), from their covariance matrix."""
    a, sigma = torch.tensor(a, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64)
    s = (1 - a**2).sqrt()
    mixing = torch.stack(
        [torch.stack([-s * sigma, a]), torch.stack([a * sigma, s])]
    )  # (v, x) from unit (x0 / sigma, eps)
    (var_v, cov), (_, var_x) = mixing @ mixing.T
    c_in, c_skip, c_out = precondition(a, s, sigma)
    torch.testing.assert_close(c_in, var_x.rsqrt())
    torch.testing.assert_close(c_skip, cov / var_x)
    torch.testing.assert_close(c_out, (var_v - cov**2 / var_x).sqrt())


def test_target_of_the_network_has_unit_variance_and_no_correlation_with_its_input():
    """The same by sampling: what F must predict, (v - c_skip x) / c_out, is standard normal and independent of x."""
    sigma = torch.tensor([0.05, 0.5, 1.0, 4.0], dtype=torch.float64)[:, None]
    x0, eps = sigma * noise(4, 200_000), noise(4, 200_000, seed=1)
    a = torch.tensor(0.8, dtype=torch.float64)
    s = (1 - a**2).sqrt()
    x, v = a * x0 + s * eps, a * eps - s * x0
    c_in, c_skip, c_out = precondition(a, s, sigma)
    target = (v - c_skip * x) / c_out
    one = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(target.var(1), one, rtol=0.02, atol=0)
    torch.testing.assert_close((c_in * x).var(1), one, rtol=0.02, atol=0)
    assert (target * c_in * x).mean(1).abs().max() < 0.015


def test_unit_sigma_is_plain_velocity_prediction():
    a = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    c_in, c_skip, c_out = precondition(a, (1 - a**2).sqrt(), torch.ones(9, dtype=torch.float64))
    torch.testing.assert_close(c_in, torch.ones_like(a))
    torch.testing.assert_close(c_out, torch.ones_like(a))
    assert torch.equal(c_skip, torch.zeros_like(a))


def test_amplitudes_are_a_unit_vector_per_sample():
    alphas = torch.linspace(0.999, 0.001, 10)
    a, s = amplitudes(alphas, torch.tensor([0, 9, 4]), 5)
    assert a.shape == s.shape == (3, 1, 1, 1, 1)
    assert a.dtype == torch.float32
    torch.testing.assert_close(a**2 + s**2, torch.ones_like(a))
    torch.testing.assert_close(a.flatten() ** 2, alphas[[0, 9, 4]])


def test_padding_repeats_the_far_edge_only():
    x = noise(2, 1, 5, 8, 3)
    padded = pad_to_multiple(x, 4)
    assert padded.shape == (2, 1, 8, 8, 4)
    assert torch.equal(padded[..., :5, :, :3], x)
    assert torch.equal(padded[..., 5:, :, :3], x[..., 4:5, :, :].expand(-1, -1, 3, -1, -1))
    assert torch.equal(padded[..., :5, :, 3:], x[..., 2:3])


def test_padding_leaves_fitting_sizes_alone():
    x = noise(1, 1, 4, 8, 12)
    assert pad_to_multiple(x, 4) is x


def test_angle_step_is_second_order_on_a_rotation():
    """dy/dpsi of a point on the unit circle is its tangent: halving the step divides the final error by about four."""

    def error(steps):
        psi = torch.linspace(torch.pi / 2, 0, steps + 1, dtype=torch.float64)
        y, previous = torch.cos(psi[0]) * 0.7 + torch.sin(psi[0]) * 0.2, None
        for now, following in zip(psi[:-1], psi[1:], strict=True):
            f = -torch.sin(now) * 0.7 + torch.cos(now) * 0.2
            y, previous = angle_step(y, f, following - now, previous), (f, following - now)
        return abs(float(y) - 0.7)

    assert 3.3 < error(20) / error(40) < 4.7
    assert error(40) < 1e-3


def test_angle_runs_from_noise_to_image():
    sigma = torch.tensor([0.1, 1.0, 5.0])
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    torch.testing.assert_close(angle(zero, one, sigma), torch.full((3,), torch.pi / 2))
    torch.testing.assert_close(angle(one, zero, sigma), torch.zeros(3))
