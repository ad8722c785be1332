"""Laws of temperature hold for every weight, and the check that says so can fail."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmat.errors import ConfigError, FeatureError
from fedmat.models import laws

torch.set_num_threads(1)

NAMES = ("x", "molality", "1000/T", "molality*1000/T")
raw_number = st.floats(-40, 40)


def features(n: int = 40, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x, m, t = rng.normal(size=n), rng.uniform(0.2, 2, n), rng.uniform(250, 340, n)
    return np.column_stack([x, m, 1000 / t, m * 1000 / t])


def physical(law: str, seed: int = 0, width: float = 3.0):
    """A network of random weights whose last layer is the law."""
    torch.manual_seed(seed)
    k = laws.READOUTS[law].n_parameters
    net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, k))
    hidden = ~laws.temperature_columns(NAMES)

    def predict(x):
        with torch.no_grad():
            trunk = width * net(torch.tensor(x[:, hidden], dtype=torch.float32))
            kelvin = torch.tensor(laws.temperature_k(NAMES, x), dtype=torch.float32)
            return -3.0 + 0.8 * laws.readout(law, trunk, kelvin, -3.0, 0.8).double().numpy()

    return predict


def without_physics(seed: int = 0):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))

    def predict(x):
        with torch.no_grad():
            z = (x - [0.0, 1.0, 3.4, 3.4]) / [1.0, 0.5, 0.3, 1.5]
            return net(3 * torch.tensor(z, dtype=torch.float32)).double().numpy()[:, 0]

    return predict


def test_arrhenius_is_the_textbook_formula():
    """sigma = sigma_0 exp(-E/kT) with E read from the parameter, by hand at two temperatures."""
    p = torch.tensor([0.4, 1.1], dtype=torch.float64)
    energy = float(laws.activation_energy_ev(p[1]))
    hot, cold = 350.0, 260.0
    y = [2.0 * float(laws.readout("arrhenius", p, torch.tensor(t, dtype=torch.float64), -3.0, 2.0)) - 3.0 for t in (hot, cold)]
    expected = -energy / 8.617333262e-5 * (1 / hot - 1 / cold) / math.log(10)
    assert y[0] - y[1] == pytest.approx(expected, rel=1e-12)
    at_ref = laws.readout("arrhenius", p, torch.tensor(298.15, dtype=torch.float64), -3.0, 2.0)
    assert float(at_ref) == pytest.approx(0.4)


def test_vtf_is_the_textbook_formula():
    p = torch.tensor([0.4, 0.3, 0.9], dtype=torch.float64)
    t0 = float(laws.vogel_temperature_k(p[2]))
    slope = float(laws.activation_energy_ev(p[1])) / laws.EV_PER_SLOPE
    b = 1000 * slope * (298.15 - t0) ** 2 / 298.15**2
    for t in (200.0, 280.0, 400.0):
        y = 0.5 * float(laws.readout("vtf", p, torch.tensor(t, dtype=torch.float64), 0.0, 0.5))
        assert y == pytest.approx(0.5 * 0.4 - b * (1 / (t - t0) - 1 / (298.15 - t0)), rel=1e-12)


def test_vtf_with_no_vogel_temperature_is_arrhenius():
    t = torch.linspace(200, 500, 20, dtype=torch.float64)
    vtf = laws.readout("vtf", torch.tensor([0.4, 0.3, -60.0], dtype=torch.float64).expand(20, 3), t, 0.0, 1.0)
    arrhenius = laws.readout("arrhenius", torch.tensor([0.4, 0.3], dtype=torch.float64).expand(20, 2), t, 0.0, 1.0)
    assert torch.allclose(vtf, arrhenius, atol=1e-12)


def test_zero_outputs_mean_the_mean_property_at_reference_temperature():
    for name, law in laws.READOUTS.items():
        y = laws.readout(name, torch.zeros(law.n_parameters), torch.tensor(298.15), -5.0, 2.0)
        assert abs(float(y)) < 1e-6
    assert float(laws.activation_energy_ev(torch.zeros(()))) == pytest.approx(0.3)


@given(st.lists(raw_number, min_size=8, max_size=8), st.floats(181, 3000), st.floats(181, 3000))
@settings(max_examples=200, deadline=None)
def test_monotone_for_any_parameters(values, t1, t2):
    low, high = sorted((t1, t2))
    t = torch.tensor([low, high], dtype=torch.float64)
    for name, law in laws.READOUTS.items():
        p = torch.tensor(values[: law.n_parameters], dtype=torch.float64).expand(2, -1)
        y = laws.readout(name, p, t, 0.0, 1.0)
        step = float(y[1] - y[0])
        assert (step <= 1e-9) if name == "decreasing" else (step >= -1e-9)
        assert bool(torch.isfinite(y).all())


@pytest.mark.parametrize("name", list(laws.READOUTS))
def test_an_ensemble_is_its_members(name):
    """Shapes (M, B, k) and (B,) give (M, B), equal to one member at a time."""
    torch.manual_seed(1)
    k = laws.READOUTS[name].n_parameters
    p, t = torch.randn(3, 5, k), torch.linspace(200, 900, 5)
    y = laws.readout(name, p, t, 1.0, 2.0)
    assert y.shape == (3, 5)
    for m in range(3):
        assert torch.equal(y[m], laws.readout(name, p[m], t, 1.0, 2.0))


@pytest.mark.parametrize("name", list(laws.READOUTS))
def test_every_parameter_has_a_gradient_of_the_order_of_one(name):
    """At the start of training no parameter may be deaf or deafening."""
    k = laws.READOUTS[name].n_parameters
    t = torch.linspace(220, 1400 if k > 3 else 360, 50)
    p = torch.zeros(50, k, requires_grad=True)
    y = laws.readout(name, p, t, 0.0, 0.6)
    size = torch.stack([g.abs().amax() for g in torch.autograd.grad(y.sum(), p)[0].unbind(-1)])
    assert bool((size > 0.05).all()) and bool((size < 5).all())


def test_bounded_stays_within():
    raw = torch.tensor([-1e3, -1.0, 0.0, 1.0, 1e3])
    assert bool((laws.bounded(raw, 0.0) >= 0).all())
    inside = laws.bounded(raw, 2.0, 5.0)
    assert bool((inside >= 2).all()) and bool((inside <= 5).all())


def test_refuses_what_it_cannot_do():
    with pytest.raises(ConfigError, match="no law"):
        laws.readout("ohm", torch.zeros(2), torch.tensor(300.0), 0, 1)
    with pytest.raises(ConfigError, match="takes 3"):
        laws.readout("vtf", torch.zeros(2), torch.tensor(300.0), 0, 1)
    for name, kelvin in (("vtf", 180.0), ("arrhenius", 0.0), ("arrhenius", float("nan"))):
        with pytest.raises(FeatureError, match="holds above"):
            laws.readout(name, torch.zeros(laws.READOUTS[name].n_parameters), torch.tensor(kelvin), 0, 1)


def test_temperature_columns_are_found_by_name():
    names = ("1000/temperature_k", "temperature_k", "log10(temperature_k)", "sqrt(temperature_k)", "temperature_k^2", "1000/T",
             "molality*1000/T", "molality", "formula.magpie.mean.MeltingT", "solvent.mean.TPSA", "processing=T",
             "anneal_temperature_k", "T1", "fraction_Ti")  # fmt: skip
    assert laws.temperature_columns(names).tolist() == [True] * 7 + [False] * 7


@pytest.mark.parametrize(
    ("name", "of"),
    [("temperature_k", lambda t: t), ("1000/temperature_k", lambda t: 1000 / t), ("1000/T", lambda t: 1000 / t),
     ("log10(temperature_k)", np.log10), ("sqrt(temperature_k)", np.sqrt), ("temperature_k^2", np.square)],
)  # fmt: skip
def test_temperature_is_recovered(name, of):
    t = np.array([200.0, 298.15, 900.0])
    assert laws.temperature_k(("a", name), np.column_stack([t * 0, of(t)])) == pytest.approx(t)


def test_moving_temperature_moves_every_column_and_nothing_else():
    x = features()
    moved = laws.at_temperature(NAMES, x, np.full(len(x), 400.0))
    assert np.array_equal(moved[:, :2], x[:, :2])
    assert moved[:, 2] == pytest.approx(2.5) and moved[:, 3] == pytest.approx(2.5 * x[:, 1])


def test_features_without_a_readable_temperature_are_refused():
    with pytest.raises(FeatureError, match="no column"):
        laws.temperature_k(("x", "molality*1000/T"), np.ones((2, 2)))
    with pytest.raises(FeatureError, match="no positive temperature in 1 record"):
        laws.temperature_k(("temperature_k",), np.array([[300.0], [np.nan]]))
    with pytest.raises(FeatureError, match="unknown way"):
        laws.at_temperature(("temperature_k", "exp(-temperature_k)"), np.ones((1, 2)), np.array([300.0]))


@pytest.mark.parametrize("law", ["arrhenius", "vtf", "decreasing", "increasing"])
def test_a_network_with_the_law_built_in_always_obeys(law):
    """float32, random weights, a grid far beyond the data."""
    for seed in range(3):
        found = laws.law_adherence(physical(law, seed), features(), NAMES, law, low_k=190, high_k=900, tolerance=0.01)
        assert found.share == 1.0 and found.rows_kept == found.rows == 40
        assert found.checked == 40 * 199
        assert found.low_k < found.seen_k[0] and found.high_k > found.seen_k[1]


@pytest.mark.parametrize("law", ["arrhenius", "vtf", "decreasing", "increasing"])
def test_a_network_without_physics_fails_the_check(law):
    found = laws.law_adherence(without_physics(), features(), NAMES, law, low_k=190, high_k=900, tolerance=0.01)
    assert found.share < 0.9 and found.rows_kept < found.rows


def test_each_statement_is_judged_on_its_own():
    """A convex rising curve breaks concavity alone; a concave one breaks straightness alone; a steep one the bound alone."""

    def curve(of):
        return lambda x: of(laws.temperature_k(NAMES, x))

    def ask(of, law):
        return laws.law_adherence(curve(of), features(5), NAMES, law, low_k=200, high_k=500, tolerance=0.01).shares

    convex = ask(lambda t: (1000 / t - 6) ** 2, "vtf")
    assert convex == {"positive activation energy": 1.0, "concave in 1/T": 0.0}
    bent = ask(lambda t: -300 / (t - 140), "arrhenius")
    assert bent["positive activation energy"] == 1.0 and bent["straight line in 1/T"] < 0.5
    steep = ask(lambda t: -16 * 1000 / t, "arrhenius")
    assert steep["activation energy at most 3 eV"] == 0.0 and steep["straight line in 1/T"] == 1.0
    assert ask(lambda t: 1000 / t, "arrhenius")["positive activation energy"] == 0.0


def test_a_tiny_departure_is_within_tolerance_and_a_larger_one_is_not():
    def predict(size):
        return lambda x: -1000 / laws.temperature_k(NAMES, x) + size * np.sin(laws.temperature_k(NAMES, x) / 20)

    def ask(size):
        return laws.law_adherence(predict(size), features(5), NAMES, "arrhenius", low_k=200, high_k=400, tolerance=0.01)

    assert ask(0.005).share == 1.0
    assert ask(0.05).share < 1.0


def test_impossible_checks_are_refused():
    x = features(3)
    for low, high, points, tolerance in ((170, 400, 50, 0.1), (400, 300, 50, 0.1), (200, 400, 3, 0.1), (200, 400, 50, 0.0)):
        with pytest.raises(ConfigError):
            laws.law_adherence(physical("vtf"), x, NAMES, "vtf", low_k=low, high_k=high, points=points, tolerance=tolerance)
    with pytest.raises(FeatureError, match="not finite"):
        laws.law_adherence(lambda x: x[:, 0] * np.nan, x, NAMES, "vtf", low_k=200, high_k=400, tolerance=0.1)
