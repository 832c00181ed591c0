"""Every walk starts at its first step and ends at its last, also where rounded times repeat."""

import pytest
import torch
from goldens import at_steps, pseudo_model, solver_start

from wan.sampling import SOLVERS, Solver, denoise

# UniPC's first times repeat from 68 steps on at shift 16, from 144 at 8, from 251 at 5.
STEPS, SHIFTS = (1, 2, 3, 20, 67, 68, 143, 144, 251, 1000), (1.0, 3.0, 5.0, 8.0, 16.0, 20.0)


def _latent():
    return solver_start()[0][:, :, :1, :2]


def _repeats(solver):
    return bool((solver.timesteps[1:] == solver.timesteps[:1]).any())


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", SOLVERS)
def test_a_walk_takes_all_its_steps_and_each_with_its_own_noise(name, steps, shift):
    solver, looked_up = (Solver(name, steps, shift, "cpu") for _ in range(2))
    found = denoise(at_steps(pseudo_model, solver), solver, _latent())
    assert solver.done == steps and torch.isfinite(found).all()
    # The scheduler's own search, which is right where no time repeats.
    looked_up._scheduler._begin_index = None
    if not _repeats(looked_up):
        flow = at_steps(pseudo_model, looked_up)
        assert torch.equal(found, denoise(flow, looked_up, _latent()))


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("done", [0, 1, 2, 70, 71])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_state_goes_on_where_times_repeat(name, done, offload):
    whole = Solver(name, 72, 16.0, "cpu")
    expected = denoise(at_steps(pseudo_model, whole), whole, _latent())
    first, second = (Solver(name, 72, 16.0, "cpu", offload=offload) for _ in range(2))
    latent = _latent()
    for t in first.timesteps[:done]:
        latent = first.step(pseudo_model(latent, t[None]), t, latent)
    second.load_state_dict(first.state_dict())
    assert second.done == done
    assert torch.equal(denoise(at_steps(pseudo_model, second), second, latent), expected)


def test_times_repeat_in_what_is_tried():
    assert _repeats(Solver("unipc", 72, 16.0, "cpu"))
