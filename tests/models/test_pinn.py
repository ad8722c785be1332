"""Diffusion in a particle: what is built in holds for every weight, and what is learned agrees with the books."""

import functools

import numpy as np
import pytest
import torch

from fedmat.errors import ConfigError
from fedmat.models import pinn

torch.set_num_threads(1)

PARTICLE = {
    "diffusivity_m2_s": torch.tensor(4e-15, dtype=torch.float64),
    "radius_m": torch.tensor(5e-6, dtype=torch.float64),
    "maximum_mol_m3": torch.tensor(3e4, dtype=torch.float64),
    "initial": torch.tensor(0.2, dtype=torch.float64),
}


@functools.cache
def trained():
    """A short training, enough for errors below one percent."""
    return pinn.train(iterations=20, times=40, radii=14, width=10)


def random_network(seed):
    net = pinn.SphereDiffusion(seed=seed)
    torch.manual_seed(seed)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=1.0)
    return net


def test_series_satisfies_equation_and_boundary():
    """Crank's series by finite differences: du/dtau = lap u, slope 1 at the surface, mean 3 tau."""
    x, t, h = np.linspace(0.1, 0.9, 9), 0.05, 1e-4
    u = pinn.exact_response
    laplacian = (u(x + h, t) - 2 * u(x, t) + u(x - h, t)) / h**2 + (u(x + h, t) - u(x - h, t)) / h / x
    assert laplacian == pytest.approx((u(x, t + h) - u(x, t - h)) / (2 * h), abs=1e-3)
    assert (u(1.0, t) - u(1.0 - h, t)) / h == pytest.approx(1.0, abs=2e-3)
    z, w = np.polynomial.legendre.leggauss(60)
    x, w = (z + 1) / 2, w / 2
    assert (3 * x**2 * w * u(x, t)).sum() == pytest.approx(3 * t, rel=1e-6)


def test_series_at_short_times_is_a_flat_layer():
    """2 sqrt(tau/pi) + tau: a plane's uptake and the first correction for curvature."""
    for t in (1e-5, 1e-4):
        assert float(pinn.exact_response(np.array(1.0), np.array(t), 4000)) == pytest.approx(
            2 * np.sqrt(t / np.pi) + t, rel=2e-2
        )


@pytest.mark.parametrize("seed", range(3))
def test_built_in_laws_hold_for_any_weights(seed):
    """Not trained at all: only the equation and the maximum principle may fail."""
    found = pinn.law_adherence(random_network(seed), tolerance=1e-6)
    assert all(found.shares[law] == 1.0 for law in found.built_in)
    assert found.shares["diffusion equation"] < 0.9


def test_training_lowers_the_residual_and_the_same_seed_gives_the_same_network():
    result = trained()
    assert result.losses[-1] < 1e-2 * result.losses[0]
    assert all(b < a for a, b in zip(result.losses, result.losses[1:], strict=False))
    a, b = (pinn.train(seed=3, iterations=2, times=8, radii=6, width=4).network.state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_agrees_with_the_series():
    """Trained on the equation alone, no solved example seen."""
    x, t = np.linspace(0, 1, 21)[None], np.logspace(-4, 0.3, 40)[:, None]
    exact = pinn.exact_response(x, t)
    with torch.no_grad():
        u = trained().network(torch.tensor(x), torch.tensor(t)).numpy()
    assert np.abs(u - exact).max() < 5e-3
    assert np.abs(u[:, -1] / exact[:, -1] - 1).max() < 1e-2


def test_trained_network_obeys_and_a_network_without_the_ansatz_does_not():
    found = pinn.law_adherence(trained().network, tolerance=0.05)
    assert found.share > 0.99 and min(found.shares[law] for law in found.built_in) == 1.0
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double()
    free = pinn.law_adherence(lambda x, t: plain(torch.stack([x, t], dim=-1))[..., 0], tolerance=0.05)
    assert free.share < 0.7 and free.shares["conservation of lithium"] < 0.5


def test_lithium_is_conserved_under_pulses():
    """Charge, rest, discharge: the mean is the initial value plus 3 J t / (R c_max), to rounding."""
    net = random_network(5)
    z, w = np.polynomial.legendre.leggauss(200)
    x = torch.tensor(1 - (1 - (z + 1) / 2) ** 3)
    volume = torch.tensor(3 * w / 2 * 3 * (1 - (z + 1) / 2) ** 2) * x**2
    starts, fluxes, now = [0.0, 600.0, 900.0], [3e-6, 0.0, -5e-6], 1500.0
    theta = net.under_pulses(x, torch.tensor(now), starts_s=starts, fluxes_mol_m2_s=fluxes, **PARTICLE)
    taken = 3.0 * (3e-6 * 600 - 5e-6 * 600) / (5e-6 * 3e4)
    assert float((theta * volume).sum().detach()) == pytest.approx(0.2 + taken, abs=1e-9)


def test_before_the_pulse_nothing_happens_and_one_pulse_is_constant_flux():
    x = torch.linspace(0, 1, 5, dtype=torch.float64)
    net = trained().network
    early = net.under_pulses(x, torch.tensor(10.0), starts_s=[20.0], fluxes_mol_m2_s=[1e-6], **PARTICLE)
    assert torch.equal(early, torch.full_like(early, 0.2))
    pulse = net.under_pulses(x, torch.tensor(500.0), starts_s=[0.0], fluxes_mol_m2_s=[1e-6], **PARTICLE)
    constant = net.stoichiometry(x, torch.tensor(500.0), flux_mol_m2_s=torch.tensor(1e-6), **PARTICLE)
    assert torch.allclose(pulse, constant)


def test_gradient_in_the_diffusivity_is_that_of_the_series():
    """What an inverse problem needs: d theta_surface / d log D."""
    log_d = torch.tensor(float(np.log(4e-15)), dtype=torch.float64, requires_grad=True)
    rest = {k: v for k, v in PARTICLE.items() if k != "diffusivity_m2_s"}
    theta = trained().network.stoichiometry(
        torch.ones(1), torch.tensor(700.0), flux_mol_m2_s=torch.tensor(2e-6), diffusivity_m2_s=torch.exp(log_d), **rest
    )
    theta.backward()

    def exact(d):
        return 2e-6 * 5e-6 / (d * 3e4) * float(pinn.exact_response(np.array(1.0), np.array(d * 700 / 25e-12)))

    h = 1e-4
    expected = (exact(4e-15 * np.exp(h)) - exact(4e-15 * np.exp(-h))) / (2 * h)
    assert float(log_d.grad) == pytest.approx(expected, rel=2e-2)


def test_impossible_requests_are_refused():
    net = trained().network
    for starts, fluxes in (([0.0, 0.0], [1.0, 2.0]), ([0.0], [1.0, 2.0])):
        with pytest.raises(ConfigError, match="pulses"):
            net.under_pulses(torch.ones(1), torch.tensor(1.0), starts_s=starts, fluxes_mol_m2_s=fluxes, **PARTICLE)
    with pytest.raises(ConfigError, match="1 or more"):
        pinn.train(iterations=0)
    with pytest.raises(ConfigError, match="low"):
        pinn.law_adherence(net, low=1.0, high=0.5)


@pytest.mark.slow
def test_agrees_with_pybamm():
    """Surface stoichiometry of the single-particle model: no further off than its own mesh is from the exact series."""
    from benchmarks.physics import against_pybamm

    for case in against_pybamm(pinn.train().network):
        assert case["network_max_error_to_series"] < 1e-3
        assert case["surface_max_error"] < case["pybamm_max_error_to_series"] + 1e-3 < 6e-3
