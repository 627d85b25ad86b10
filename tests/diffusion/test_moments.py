"""Mean and deviation of the residual: regions by hand, bases by algebra, the table by its fixed point."""

import math

import pytest
import torch
from custom.diffusion.context import MODES, Context
from custom.diffusion.moments import (
    REGIONS,
    ResidualMoments,
    from_local,
    label_edges,
    residual_regions,
    residual_unit,
    to_local,
)
from custom.volumes.haar import depth_to_space, haar_pack, haar_unpack, space_to_depth

TABLE = (len(MODES), len(REGIONS), 8)
BACKGROUND = REGIONS.index("soft_background")
INSIDE, OUTSIDE = REGIONS.index("label_edge_inside"), REGIONS.index("label_edge_outside")


def noise(*shape, seed=3, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def blank_context(size, batch=1):
    """Background only, everything at 0 HU, and spreads of 100 HU: the residual unit is 1 everywhere."""
    context = torch.zeros(batch, len(Context._fields), *size)
    context[:, 4:] = 100.0
    return context


def make_moments(table=None):
    torch.manual_seed(0)
    moments = ResidualMoments(3, 4, image_unit=5.0)
    if table is not None:
        moments.set_table(table)
    return moments


def apply(moments, context, images=None):
    """Moments of a context, with features and images of noise on its packed grid."""
    grid = [n // 2 for n in context.shape[2:]]
    images = noise(len(context), 4, *grid, seed=5) if images is None else images
    with torch.no_grad():
        return moments(noise(len(context), 3, *grid, seed=4), images, Context.of(context))


def varied_table(seed=6):
    return 0.3 + noise(*TABLE, seed=seed).abs()


# Regions and units


def test_dropped_label_maps_select_the_mode():
    context = blank_context((4, 4, 4), 4)  # background only, but present
    context[1, 2] = -1
    context[2, 0] = context[2, 2] = -1
    context[3, 0, 0, 0, 0] = 3
    context[3, 2] = -1
    assert [MODES[i] for i in Context.of(context).modes()] == ["template", "mask_only", "unconditional", "mask_only"]


def cube():
    """Cube of label 1 at voxels 4 to 11; lung from voxel 16 on."""
    label, prior = torch.zeros(1, 1, 16, 16, 24), torch.zeros(1, 1, 16, 16, 24)
    label[..., 4:12, 4:12, 4:12] = 1
    prior[..., 16:] = -900.0
    return label, prior


def edge_blocks_of_the_cube():
    """Blocks 2 to 5 hold the cube; its face neighbours, voxels 3 and 12, make blocks 1 and 6 edge too."""
    edge = torch.zeros(8, 8, 12, dtype=torch.bool)
    for axis in range(3):
        grown = [slice(2, 6)] * 3
        grown[axis] = slice(1, 7)
        edge[tuple(grown)] = True
    edge[3:5, 3:5, 3:5] = False
    return edge


def test_regions_of_a_cube():
    label, prior = cube()
    region = residual_regions(label, prior)
    assert region.shape == (1, 8, 8, 8, 12)
    expected = torch.full((8, 8, 12), BACKGROUND)
    expected[..., 9:] = REGIONS.index("lung")
    expected[..., 7:9] = REGIONS.index("background_edge")
    expected[3:5, 3:5, 3:5] = REGIONS.index("interior")
    edge = edge_blocks_of_the_cube()
    for channel in range(8):
        assert torch.equal(region[0, channel][~edge], expected[~edge])
    voxels = depth_to_space(region)[0, 0]
    at_edge = edge.repeat_interleave(2, 0).repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(voxels[at_edge], torch.where(label[0, 0] > 0, INSIDE, OUTSIDE)[at_edge])


def test_label_edges_of_a_cube():
    assert torch.equal(label_edges(cube()[0])[0, 0], edge_blocks_of_the_cube())


@pytest.mark.parametrize("face", [4, 5])
def test_a_face_on_a_block_border_makes_both_blocks_edge_and_one_inside_a_block_only_that(face):
    label = torch.ones(1, 1, 10, 2, 2)
    label[:, :, face:] = 2
    expected = [False, True, True, False, False] if face == 4 else [False, False, True, False, False]
    assert label_edges(label)[0, 0, :, 0, 0].tolist() == expected


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_edges_are_found_along_every_axis(axis):
    label = torch.zeros(1, 1, 8, 8, 8)
    label.narrow(axis, 0, 3).fill_(1)  # the face lies inside the second block
    assert label_edges(label).nonzero()[:, axis].unique().tolist() == [1]


@pytest.mark.parametrize(("step_hu", "region"), [(99.0, "soft_background"), (101.0, "background_edge")])
def test_background_edges_begin_at_a_hundred_hu(step_hu, region):
    prior = torch.zeros(1, 1, 8, 2, 2)
    prior[:, :, 4:] = step_hu
    regions = residual_regions(torch.zeros_like(prior), prior)[0, :, :, 0, 0]
    for channel in regions:
        assert [REGIONS[i] for i in channel] == ["soft_background", region, region, "soft_background"]


def test_boundary_between_two_labels_is_edge_and_all_inside():
    label = torch.ones(1, 1, 8, 4, 4)
    label[:, :, 4:] = 2
    region = residual_regions(label, torch.zeros_like(label))[0, :, :, 0, 0]
    for channel in region:
        assert [REGIONS[i] for i in channel] == ["interior", "label_edge_inside", "label_edge_inside", "interior"]


def test_a_dropped_mask_has_no_edges():
    label = torch.full((1, 1, 4, 4, 4), -1.0)
    assert not label_edges(label).any()
    assert [REGIONS[i] for i in residual_regions(label, torch.zeros_like(label)).unique()] == ["soft_background"]


def test_unit_is_the_label_spread_for_means_and_the_grain_for_details():
    context = blank_context((12, 2, 2))
    context[:, 4], context[:, 5] = 40.0, 25.0
    context[:, 5, 2:] = 1.0  # grain below 5 HU counts as 5
    region = torch.arange(len(REGIONS)).view(1, 1, 6, 1, 1).expand(1, 8, 6, 1, 1)
    unit = residual_unit(Context.of(context), region)[0, :, :, 0, 0]
    torch.testing.assert_close(unit[0], torch.tensor([0.4, 0.4, 0.4, 1.0, 1.0, 1.0]))
    torch.testing.assert_close(unit[1:], torch.tensor([0.25, 0.05, 0.05, 1.0, 1.0, 1.0]).expand(7, -1))


# The local basis


def mixed_edge():
    """Half of the blocks of a (2, 8, 2, 2, 2) packed volume, at random."""
    return noise(2, 1, 2, 2, 2, seed=9) > 0


def test_local_basis_is_voxels_at_edges_and_bands_elsewhere():
    volume, edge = noise(2, 1, 4, 4, 4), mixed_edge()
    local = to_local(haar_pack(volume), edge)
    inside = edge.expand_as(local)
    torch.testing.assert_close(local[inside], space_to_depth(volume)[inside])
    assert torch.equal(local[~inside], haar_pack(volume)[~inside])


@pytest.mark.parametrize("edge", ["none", "mixed", "all"])
def test_local_basis_is_undone_and_keeps_energy(edge):
    edge = {"none": torch.zeros_like(mixed_edge()), "mixed": mixed_edge(), "all": torch.ones_like(mixed_edge())}[edge]
    bands = noise(2, 8, 2, 2, 2, dtype=torch.float64)
    local = to_local(bands, edge)
    torch.testing.assert_close(from_local(local, edge), bands, rtol=0, atol=1e-14)
    torch.testing.assert_close(to_local(from_local(bands, edge), edge), bands, rtol=0, atol=1e-14)
    torch.testing.assert_close(local.square().sum(), bands.square().sum(), rtol=1e-13, atol=0)


def test_white_noise_is_white_in_the_local_basis():
    """Its covariance there is M M^T, with M the matrix from voxels to the basis, written out for 4^3 voxels."""
    voxels = torch.eye(64, dtype=torch.float64).reshape(64, 1, 4, 4, 4)
    edge = mixed_edge()[:1].expand(64, -1, -1, -1, -1)
    matrix = to_local(haar_pack(voxels), edge).reshape(64, 64)
    assert not torch.equal(matrix, haar_pack(voxels).reshape(64, 64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-14)


# Moments


def test_unmeasured_moments_are_zero_and_one_whatever_the_weights_and_the_context():
    moments, context = make_moments(), blank_context((8, 8, 8))
    for parameter in moments.parameters():
        parameter.data.normal_()
    context[:, 4:] = 30.0
    mean, sigma = apply(moments, context)
    assert torch.equal(mean, torch.zeros(1, 8, 4, 4, 4))
    assert torch.equal(sigma, torch.ones(1, 8, 4, 4, 4))
    moments.set_table(torch.ones(TABLE))
    mean, sigma = apply(moments, context)
    assert mean.abs().max() > 0.1
    assert not torch.equal(sigma, torch.ones_like(sigma))


def test_fresh_deviation_is_the_table_times_the_unit_and_the_mean_is_zero():
    table, context = varied_table(), blank_context((8, 8, 8), 2)
    context[1, 2] = -1  # mask only
    context[:, 3, :4] = -900.0  # lung in the first half
    context[:, 4] = 40.0
    mean, sigma = apply(make_moments(table), context)
    assert not mean.any()
    unit = torch.tensor([0.4, *[1.0] * 7])
    for sample, mode in ((0, "template"), (1, "mask_only")):
        for row, region in ((0, "lung"), (3, "soft_background")):
            expected = table[MODES.index(mode), REGIONS.index(region)]
            torch.testing.assert_close(sigma[sample, :, row, 1, 2], expected * unit)


def test_at_label_edges_every_voxel_has_the_deviation_of_its_side():
    table, context = varied_table(), blank_context((4, 2, 2))
    context[:, 0, 3:] = 2  # voxel 3, inside block 1
    sigma = apply(make_moments(table), context)[1][0, :, 1, 0, 0]
    channels = torch.arange(8)  # offsets run over (h, w, d), d fastest: 4 to 7 are voxel 3
    torch.testing.assert_close(sigma, table[0][torch.where(channels >= 4, INSIDE, OUTSIDE), channels])


def test_learned_factor_multiplies_and_stays_within_twenty():
    table = varied_table()
    moments, context = make_moments(table), blank_context((4, 4, 4))
    values = torch.tensor([-1e4, -3.0, -0.1, 0.0, 0.1, 0.5, 3.0, 1e4])
    moments.hidden[-1].bias.data[8:] = values
    sigma = apply(moments, context)[1]
    expected = table[0, BACKGROUND] * (3 * torch.tanh(values / 3)).exp()
    torch.testing.assert_close(sigma, expected.view(1, 8, 1, 1, 1).expand_as(sigma))
    assert sigma[0, 7, 0, 0, 0] / table[0, BACKGROUND, 7] == pytest.approx(torch.e**3, rel=1e-5)


def test_correction_of_the_mean_is_in_single_voxels():
    moments, values = make_moments(torch.ones(TABLE)), noise(8)
    moments.hidden[-1].bias.data[:8] = values
    mean = apply(moments, blank_context((4, 6, 4)))[0]
    blocks = space_to_depth(haar_unpack(mean))
    torch.testing.assert_close(blocks, values.view(1, 8, 1, 1, 1).expand_as(blocks))


def test_linear_mean_carries_packed_images_in_their_unit():
    """Reading image channel 2 into every voxel of the block gives its value times the unit, and no details."""
    moments, images = make_moments(torch.ones(TABLE)), noise(1, 4, 2, 3, 4)
    moments.linear.weight.data[:, 2, 1, 1, 1] = 1.0
    mean = apply(moments, blank_context((4, 6, 8)), images)[0]
    torch.testing.assert_close(mean[:, 0], 8**0.5 * 5.0 * images[:, 2])
    assert mean[:, 1:].abs().max() < 1e-5


# The table


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_table_is_refused_and_leaves_the_old_one(value):
    moments, table = make_moments(), torch.ones(TABLE)
    table[0, 1, 2] = value
    with pytest.raises(ValueError, match="table: must be finite, positive and shaped"):
        moments.set_table(table)
    assert torch.equal(moments.table, torch.ones(TABLE))
    assert not moments.measured


@pytest.mark.parametrize("shape", [(3, 2), (8,), (1, *TABLE)])
def test_table_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"table: must be finite, positive and shaped \(3, 6, 8\), got") as error:
        make_moments().set_table(torch.ones(shape))
    assert str(shape) in str(error.value)


def test_table_and_measured_are_part_of_the_state():
    copy, table = make_moments(), varied_table()
    copy.load_state_dict(make_moments(table).state_dict())
    assert torch.equal(copy.table, table)
    assert copy.measured


def test_absolute_sums_by_hand():
    values = torch.tensor([1.0, -2, 3, 4, -5, 6, 7, 8]).view(1, 8, 1, 1, 1)
    cell = torch.tensor([0, 0, 9, 9, 9, 143, 0, 20]).view(1, 8, 1, 1, 1)
    absolute, count = make_moments().absolute_sums(values, cell)
    assert absolute.shape == count.shape == TABLE
    sums, counts = torch.zeros(2, 144, dtype=torch.float64)
    sums[[0, 9, 20, 143]] = torch.tensor([1 + 2 + 7, 3 + 4 + 5, 8, 6], dtype=torch.float64)
    counts[[0, 9, 20, 143]] = torch.tensor([3, 3, 1, 1], dtype=torch.float64)
    assert torch.equal(absolute.flatten(), sums)
    assert torch.equal(count.flatten(), counts)


def test_cells_number_mode_region_and_channel():
    context = blank_context((2, 2, 2), 2)
    context[1, 2] = -1
    context[1, 3] = -900.0
    cell, unit = make_moments().cells(Context.of(context))
    numbered = torch.arange(144).view(TABLE)
    assert torch.equal(cell[0].flatten(), numbered[0, BACKGROUND])
    assert torch.equal(cell[1].flatten(), numbered[1, REGIONS.index("lung")])
    assert torch.equal(unit, torch.ones(2, 8, 1, 1, 1))


def deviation_of(values):
    """What the mean absolute value says of the deviation, by channel, were the values Gaussian."""
    return math.sqrt(math.pi / 2) * values.abs().mean((0, 2, 3, 4))


def test_tracking_moves_the_table_two_percent_of_the_way_and_leaves_absent_cells_alone():
    table = varied_table()
    moments, standardised = make_moments(table), 1.5 * noise(2, 8, 4, 4, 4)
    moments.track(standardised, Context.of(blank_context((8, 8, 8), 2)))
    expected = 0.98 + 0.02 * deviation_of(standardised)
    assert (expected - 1).abs().min() > 1e-3
    torch.testing.assert_close((moments.table / table)[0, BACKGROUND], expected)
    present = torch.zeros(TABLE, dtype=torch.bool)
    present[0, BACKGROUND] = True
    assert torch.equal(moments.table[~present], table[~present])


def test_absent_cells_do_not_drift_over_many_batches():
    table = varied_table()
    moments, context = make_moments(table), blank_context((2, 2, 2))
    for _ in range(300):
        moments.track(torch.full((1, 8, 1, 1, 1), 0.5), Context.of(context))
    present = torch.zeros(TABLE, dtype=torch.bool)
    present[0, BACKGROUND] = True
    assert torch.equal(moments.table[~present], table[~present])
    assert (moments.table < table)[present].all()


@pytest.mark.parametrize("start", [0.25, 1.0, 4.0])
def test_tracking_ends_at_the_true_deviation(start):
    """In units of the residual unit, whose low-pass band is 0.4 here."""
    moments, context = make_moments(torch.full(TABLE, start)), blank_context((8, 8, 8), 2)
    context[:, 4] = 40.0
    true = torch.linspace(0.5, 2, 8)
    residual = noise(2, 8, 4, 4, 4) * (true * torch.tensor([0.4, *[1.0] * 7])).view(1, 8, 1, 1, 1)
    for _ in range(450):
        moments.track(residual / apply(moments, context)[1], Context.of(context))
    reached = moments.table[0, BACKGROUND]
    torch.testing.assert_close(reached, deviation_of(residual) / torch.tensor([0.4, *[1.0] * 7]), rtol=2e-3, atol=0)
    torch.testing.assert_close(reached, true, rtol=0.2, atol=0)  # 128 voxels: a sampling error of 7 %


def test_one_wild_batch_moves_the_table_little_and_silence_never_empties_it():
    moments, context = make_moments(torch.full(TABLE, 0.0101)), blank_context((2, 2, 2))
    moments.track(torch.full((1, 8, 1, 1, 1), 1e4), Context.of(context))
    torch.testing.assert_close(moments.table[0, BACKGROUND], torch.full((8,), 1.08 * 0.0101))
    for _ in range(100):
        moments.track(torch.zeros(1, 8, 1, 1, 1), Context.of(context))
    torch.testing.assert_close(moments.table[0, BACKGROUND], torch.full((8,), 0.01))
