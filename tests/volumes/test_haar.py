"""The Haar transform against algebra."""

import pytest
import torch
from custom.volumes.haar import depth_to_space, haar_pack, haar_unpack, space_to_depth

SHAPES = [(1, 1, 2, 2, 2), (2, 3, 4, 6, 8), (1, 2, 10, 2, 4)]


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


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
