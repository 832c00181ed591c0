"""Euler's steps on the shifted schedule, and guidance that asks for one pass."""

import pytest
import torch
from goldens import at_steps, pseudo_model, solver_start

from wan.sampling import Solver, denoise, guided


def test_the_schedule_of_four_steps():
    """What models distilled to four steps are trained at: 1, 3/4, 1/2, 1/4, shifted."""
    solver = Solver("euler", 4, 5.0, "cpu")
    shifted = [5 * s / (1 + 4 * s) for s in (1, 0.75, 0.5, 0.25)]
    assert torch.allclose(solver.timesteps, 1000 * torch.tensor(shifted)) and solver.timesteps[0] == 1000


@pytest.mark.parametrize("steps, shift", [(4, 5.0), (7, 3.0), (1, 16.0)])
def test_each_step_follows_the_flow_to_the_next_noise(steps, shift):
    solver, expected = Solver("euler", steps, shift, "cpu"), solver_start()[0]
    found = denoise(at_steps(pseudo_model, solver), solver, expected)
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    sigmas = (shift * sigmas / (1 + (shift - 1) * sigmas)).float()
    for now, then in zip(sigmas, sigmas[1:]):
        expected = expected + (then - now) * pseudo_model(expected, 1000 * now)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("done", [1, 3])
def test_a_state_goes_on_with_the_same_bits(done):
    latent = solver_start()[0]
    whole, first, second = (Solver("euler", 5, 5.0, "cpu") for _ in range(3))
    expected = denoise(at_steps(pseudo_model, whole), whole, latent)
    for t in first.timesteps[:done]:
        latent = first.step(pseudo_model(latent, t[None]), t, latent)
    second.load_state_dict(first.state_dict())
    assert len(second.timesteps) == 5 - done
    assert torch.equal(denoise(at_steps(pseudo_model, second), second, latent), expected)


def test_a_scale_of_one_asks_the_conditional_flow_alone():
    latent, t = solver_start()[0], torch.tensor([500.0])

    def never(latent, t):
        raise AssertionError("asked")

    assert torch.equal(guided(pseudo_model, never, 1.0)(latent, t), pseudo_model(latent, t))
    with pytest.raises(AssertionError, match="asked"):
        guided(pseudo_model, never, 1.5)(latent, t)
