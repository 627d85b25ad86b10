"""Times of the network calls, evenly spaced or listed."""

import pytest
from custom.diffusion.schedule import listed_timesteps, spaced_timesteps


@pytest.mark.parametrize("num_steps", [1, 2, 7, 10, 999])
def test_spaced_times_descend_from_the_noisiest_and_leave_out_time_zero(num_steps):
    times = spaced_timesteps(num_steps)
    assert len(times) == num_steps
    assert times[0] == 999
    assert times[-1] > 0
    gaps = [early - late for early, late in zip(times, [*times[1:], 0], strict=True)]
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("num_steps", [0, -1, 1000])
def test_number_of_steps_out_of_range_is_refused(num_steps):
    with pytest.raises(ValueError, match=rf"num_steps: must be 1 to 999, got {num_steps}"):
        spaced_timesteps(num_steps)


def test_a_number_asks_for_evenly_spaced_times_and_a_list_stays():
    assert listed_timesteps(7) == spaced_timesteps(7)
    assert listed_timesteps([950, 600, 599, 0]) == [950, 600, 599, 0]


@pytest.mark.parametrize("times", [[10, 20], [500, 500, 3], [900, 30, 40]])
def test_times_that_do_not_descend_are_refused(times):
    with pytest.raises(ValueError, match="timesteps: must descend strictly, from noise to image, got") as error:
        listed_timesteps(times)
    assert str(times) in str(error.value)


@pytest.mark.parametrize("times", [[1000, 4], [30, -1], []])
def test_times_outside_the_schedule_are_refused(times):
    with pytest.raises(ValueError, match=r"timesteps: must be a non-empty list within \[0, 1000\), got"):
        listed_timesteps(times)
