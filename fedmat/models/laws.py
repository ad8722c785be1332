"""Laws of temperature as the last layer: what physics knows exactly, a network cannot get wrong.

Knows: how a property follows temperature when everything else stays as it is, and how to build that into a network.
Refuses to know: features, units other than kelvin and electronvolt, training.

The trunk of a network sees every feature but temperature and gives a few unbounded numbers per record; the readout turns
them and the temperature into the property. The law then holds for every weight, every record and every temperature, inside
and far outside the training data: it is a hard constraint [Lu2021]_, not a penalty that training may trade away [Raissi2019]_.

* ``arrhenius``: ``log10 s = a - E / (k ln 10) (1/T - 1/T_ref)``, ``E`` in (0, 3] eV [Arrhenius1889]_.
* ``vtf``: ``log10 s = a - B (1/(T - T_0) - 1/(T_ref - T_0))``, ``B > 0``, ``T_0`` in (0, 180) K [Vogel1921]_ [Fulcher1925]_
  [Tammann1926]_: rises with temperature and is concave in 1/T.
* ``decreasing``, ``increasing``: ``a -+ sum_j b_j (phi_j(T) - phi_j(T_ref))``, ``b_j > 0``, with increasing bounded
  ``phi_j`` (a non-negative sum of monotone functions is monotone [Sill1997]_).

Everything is centred at ``T_ref`` = 298.15 K: the first parameter is the property there, the second its slope there, so that
they are nearly uncorrelated and an output layer of zeros means "the mean property, an activation energy of 0.3 eV".
For ``vtf`` the slope is the apparent activation energy at ``T_ref``, from which ``B`` follows; ``T_0`` adds curvature only,
and ``T_0 -> 0`` is Arrhenius.

References:
    Arrhenius1889: S. Arrhenius, Z. Phys. Chem. 4 (1889) 226.
    Vogel1921: H. Vogel, Phys. Z. 22 (1921) 645.
    Fulcher1925: G. S. Fulcher, J. Am. Ceram. Soc. 8 (1925) 339.
    Tammann1926: G. Tammann, W. Hesse, Z. Anorg. Allg. Chem. 156 (1926) 245.
    Sill1997: J. Sill, "Monotonic Networks", NIPS 1997.
    Raissi2019: M. Raissi, P. Perdikaris, G. E. Karniadakis, J. Comput. Phys. 378 (2019) 686.
    Lu2021: L. Lu et al., "Physics-informed neural networks with hard constraints for inverse design",
        SIAM J. Sci. Comput. 43 (2021) B1105.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import softplus

from fedmat.errors import ConfigError, FeatureError

Array = NDArray[np.float64]

T_REF_K = 298.15
BOLTZMANN_EV_K = 8.617333262e-5  # CODATA 2018
EV_PER_SLOPE = BOLTZMANN_EV_K * math.log(10.0) * 1000.0  # eV per unit of -d log10(s) / d(1000/T)
ENERGY_EV = (1e-3, 3.0)  # below thermal noise; above any ion's migration barrier
ENERGY_START_EV = 0.3  # of a network whose output layer is zero
T0_BOUND_K = 180.0  # liquids measured at 194 K and above bend as if T_0 were 125 to 190 K
T0_START_K = 150.0
STEPS_K = (200.0, 400.0, 600.0, 800.0, 1000.0, 1200.0, 1500.0)  # where the phi_j rise
STEP_WIDTH_K = 100.0


@dataclass(frozen=True)
class Law:
    """A law of temperature and the readout that obeys it.

    Attributes:
        name: what a consortium file calls it.
        about: the law in words.
        n_parameters: trunk outputs consumed per task.
        log10: whether the target must be a base-10 logarithm.
        above_k: the readout is defined above this temperature only.
        fall: (parameters, temperature) -> what is taken from the first parameter, in units of the target.
    """

    name: str
    about: str
    n_parameters: int
    log10: bool
    above_k: float
    fall: Callable[[Tensor, Tensor], Tensor]


def bounded(raw: Tensor, low: float, high: float | None = None) -> Tensor:
    """Returns ``raw`` (any shape, unbounded) mapped into ``(low, high)`` by a sigmoid, or above ``low`` by a softplus.

    Positive mechanical properties: ``bounded(raw, 0.0)``.
    """
    if high is None:
        return low + softplus(raw)
    return low + (high - low) * torch.sigmoid(raw)


def activation_energy_ev(raw: Tensor) -> Tensor:
    """Returns the activation energy in eV, within ``ENERGY_EV``, of an unbounded parameter; 0 gives ``ENERGY_START_EV``."""
    low, high = ENERGY_EV
    share = (ENERGY_START_EV - low) / (high - low)
    return bounded(raw + math.log(share / (1.0 - share)), low, high)


def vogel_temperature_k(raw: Tensor) -> Tensor:
    """Returns ``T_0`` in (0, ``T0_BOUND_K``) of an unbounded parameter; 0 gives ``T0_START_K``."""
    return bounded(raw + math.log(T0_START_K / (T0_BOUND_K - T0_START_K)), 0.0, T0_BOUND_K)


def _inverse(temperature_k: Tensor) -> Tensor:
    return 1000.0 / temperature_k - 1000.0 / T_REF_K


def _arrhenius(parameters: Tensor, temperature_k: Tensor) -> Tensor:
    return activation_energy_ev(parameters[..., 1]) / EV_PER_SLOPE * _inverse(temperature_k)


def _vtf(parameters: Tensor, temperature_k: Tensor) -> Tensor:
    t0 = vogel_temperature_k(parameters[..., 2])
    # B = 1000 slope (T_ref - T_0)^2 / T_ref^2 gives the slope at T_ref; with it the bracket of the law becomes
    # 1/T - 1/T_ref times a factor that is 1 at T_ref and grows towards T_0
    stretch = (T_REF_K - t0) / T_REF_K * temperature_k / (temperature_k - t0)
    return activation_energy_ev(parameters[..., 1]) / EV_PER_SLOPE * _inverse(temperature_k) * stretch


def _steps(temperature_k: Tensor) -> Tensor:
    at = torch.tensor(STEPS_K, dtype=temperature_k.dtype, device=temperature_k.device)
    return torch.sigmoid((temperature_k[..., None] - at) / STEP_WIDTH_K) - torch.sigmoid((T_REF_K - at) / STEP_WIDTH_K)


def _softening(parameters: Tensor, temperature_k: Tensor) -> Tensor:
    return (softplus(parameters[..., 1:] - 1.0) * _steps(temperature_k)).sum(dim=-1)


def _stiffening(parameters: Tensor, temperature_k: Tensor) -> Tensor:
    return -_softening(parameters, temperature_k)


READOUTS: Mapping[str, Law] = {
    law.name: law
    for law in (
        Law(
            "arrhenius",
            "log10 of the conductivity is a straight line in 1/T with an activation energy between 0 and 3 eV",
            2, True, 0.0, _arrhenius,
        ),
        Law(
            "vtf",
            f"log10 of the conductivity rises with T and is concave in 1/T (Vogel-Tammann-Fulcher, T0 below {T0_BOUND_K:.0f} K)",
            3, True, T0_BOUND_K, _vtf,
        ),
        Law("decreasing", "the property never rises with T", 1 + len(STEPS_K), False, 0.0, _softening),
        Law("increasing", "the property never falls with T", 1 + len(STEPS_K), False, 0.0, _stiffening),
    )
}  # fmt: skip


def law_of(name: str) -> Law:
    """Returns the law called ``name``.

    Raises:
        ConfigError: there is none.
    """
    if name not in READOUTS:
        raise ConfigError(f"model: there is no law '{name}'", fix=f"use one of {', '.join(READOUTS)}")
    return READOUTS[name]


def readout(name: str, parameters: Tensor, temperature_k: Tensor, y_mean: float, y_scale: float) -> Tensor:
    """Returns the standardised property ``(y - y_mean) / y_scale``, shape ``...``.

    The first parameter is the standardised property at ``T_ref``. For ``arrhenius`` and ``vtf`` the second sets the
    activation energy in eV whatever ``y_scale`` is; the weights of ``decreasing`` and ``increasing`` are in standard units.

    Args:
        name: a law of ``READOUTS``.
        parameters: trunk outputs, ``... x n_parameters``, unbounded.
        temperature_k: kelvin, broadcast against ``...``.
        y_mean: mean of the transformed target; it does not enter, because standardising takes it out again.
        y_scale: standard deviation of the transformed target.

    Raises:
        ConfigError: an unknown law, or another number of parameters than it takes.
        FeatureError: a temperature at or below the law's limit (0 K; 180 K for ``vtf``).
    """
    law = law_of(name)
    if parameters.shape[-1] != law.n_parameters:
        raise ConfigError(
            f"law {name}: takes {law.n_parameters} parameters, got {parameters.shape[-1]}",
            fix="give the trunk n_parameters outputs per task",
        )
    if not bool((temperature_k > law.above_k).all()):
        raise FeatureError(
            f"law {name}: holds above {law.above_k:.0f} K, a record lies at or below it",
            fix="remove those records, or use the law arrhenius",
        )
    fall = law.fall(parameters, temperature_k)
    return parameters[..., 0] - (fall / y_scale if law.log10 else fall)


# --- which features are temperature -------------------------------------------------------------------------------

_FORMS: Mapping[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {  # of T, and back to T
    "{}": (lambda t: t, lambda v: v),
    "1000/{}": (lambda t: 1000.0 / t, lambda v: 1000.0 / v),
    "log10({})": (np.log10, lambda v: np.asarray(10.0**v, dtype=np.float64)),
    "sqrt({})": (np.sqrt, np.square),
    "{}^2": (np.square, np.sqrt),
}


def temperature_columns(names: Sequence[str], field: str = "temperature_k") -> NDArray[np.bool_]:
    """Returns which feature columns depend on temperature, shape ``p``.

    A column does when ``T`` or ``field`` stands in its name as a word: ``1000/T``, ``molality*1000/T``,
    ``log10(temperature_k)``. Indicator columns (``processing=T``) do not.
    """
    word = re.compile(rf"(?<![\w.])(?:T|{re.escape(field)})(?![\w.])")
    return np.array([bool(word.search(name)) and "=" not in name for name in names], dtype=np.bool_)


def temperature_k(names: Sequence[str], x: NDArray[np.floating[Any]], field: str = "temperature_k") -> Array:
    """Returns temperatures in kelvin, shape ``n``, from raw (not standardised) features ``n x p``.

    Raises:
        FeatureError: no column gives temperature alone, or a value is no positive temperature.
    """
    for form, (_, back) in _FORMS.items():
        for word in (field, "T"):
            name = form.format(word)
            if name not in names:
                continue
            column = np.asarray(x, dtype=np.float64)[:, list(names).index(name)]
            with np.errstate(all="ignore"):
                kelvin = back(column)
            bad = ~(np.isfinite(kelvin) & (kelvin > 0))
            if bad.any():
                raise FeatureError(
                    f"feature '{name}' gives no positive temperature in {int(bad.sum())} record(s), first in row "
                    f"{int(np.argmax(bad))}",
                    fix="a law of temperature needs raw features and a temperature in every record",
                )
            return np.asarray(kelvin, dtype=np.float64)
    raise FeatureError(
        f"features: no column gives the temperature, a law needs one such as '{field}' or '1000/T'",
        fix="add the temperature field to the features, or set no law",
    )


def at_temperature(names: Sequence[str], x: NDArray[np.floating[Any]], kelvin: Array, field: str = "temperature_k") -> Array:
    """Returns raw features ``n x p`` with every temperature column moved to ``kelvin`` (shape ``n``), the rest unchanged.

    Raises:
        FeatureError: a column depends on temperature in a way that its name does not tell.
    """
    out = np.array(x, dtype=np.float64)
    now = temperature_k(names, x, field)
    forms = {form.format(word): f for word in (field, "T") for form, (f, _) in _FORMS.items()}
    for j in map(int, np.flatnonzero(temperature_columns(names, field))):
        name = names[j]
        factor = next((f for plain, f in forms.items() if name.endswith(f"*{plain}")), None)  # molality*1000/T
        if name in forms:
            out[:, j] = forms[name](kelvin)
        elif factor is not None:
            out[:, j] *= factor(kelvin) / factor(now)
        else:
            raise FeatureError(
                f"feature '{name}' depends on temperature in an unknown way",
                fix="name it as a product ending in '*1000/T' or leave it out",
            )
    return out


# --- does a model obey --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adherence:
    """How many predictions obey a law, counted over every record and every step of a temperature grid.

    Attributes:
        law: its name.
        kept: statement of the law -> predictions that satisfy it.
        kept_all: predictions that satisfy every statement.
        checked: predictions looked at, records times grid steps.
        rows, rows_kept: records, and those that obey at every step.
        low_k, high_k: the grid, in kelvin.
        seen_k: lowest and highest temperature among the records; the grid beyond is extrapolation.
        tolerance: departure allowed, in units of the transformed target over the whole grid.
    """

    law: str
    kept: Mapping[str, int]
    kept_all: int
    checked: int
    rows: int
    rows_kept: int
    low_k: float
    high_k: float
    seen_k: tuple[float, float]
    tolerance: float

    @property
    def share(self) -> float:
        """Share of predictions that satisfy every statement."""
        return self.kept_all / self.checked

    @property
    def shares(self) -> Mapping[str, float]:
        """Share of predictions per statement."""
        return {statement: count / self.checked for statement, count in self.kept.items()}


def law_adherence(
    predict: Callable[[Array], NDArray[np.floating[Any]]],
    x_raw: NDArray[np.floating[Any]],
    names: Sequence[str],
    law: str,
    *,
    low_k: float,
    high_k: float,
    points: int = 200,
    tolerance: float,
    field: str = "temperature_k",
) -> Adherence:
    """Moves every record through a grid of temperatures and counts the predictions that obey ``law``.

    The grid has ``points`` temperatures, equidistant in 1/T for ``arrhenius`` and ``vtf``, in T otherwise. Each of its steps
    is one prediction. ``tolerance`` (say 0.01 decades) is what the target may depart from the law over the whole grid; a
    slope may have the wrong sign by ``tolerance`` divided by the grid's length.

    Statements: ``arrhenius``: positive activation energy; activation energy at most 3 eV; straight line in 1/T (distance
    from the least-squares line). ``vtf``: positive activation energy; concave in 1/T (distance from the concave hull).
    ``decreasing``, ``increasing``: the sign of the slope.

    Args:
        predict: raw features ``n x p`` -> transformed target ``n`` in its own unit (log10 of S/cm, not standardised).
        x_raw: raw features ``n x p`` of the records to move.
        names: column names, ``p``.
        low_k, high_k: ends of the grid in kelvin; choose them beyond the data both ways.

    Raises:
        ConfigError: an unknown law or an impossible grid.
        FeatureError: the features give no temperature, or a prediction is not finite.
    """
    known = law_of(law)
    if points < 5 or len(x_raw) == 0 or not known.above_k < low_k < high_k:
        raise ConfigError(
            f"law {law}: needs records, 5 points or more and {known.above_k:.0f} K < low_k < high_k", fix="correct the grid"
        )
    if not tolerance > 0:
        raise ConfigError(f"law {law}: tolerance must be positive", fix="0.01 is 0.01 decades of conductivity")
    seen = temperature_k(names, x_raw, field)
    grid = 1000.0 / np.linspace(1000.0 / high_k, 1000.0 / low_k, points) if known.log10 else np.linspace(low_k, high_k, points)
    y = np.empty((len(x_raw), points))
    for i, kelvin in enumerate(grid):
        y[:, i] = predict(at_temperature(names, x_raw, np.full(len(x_raw), kelvin), field))
    if not np.isfinite(y).all():
        raise FeatureError(f"law {law}: a prediction is not finite", fix="check the model and the grid")
    verdicts = _conductivity(law, y, 1000.0 / grid, tolerance) if known.log10 else _monotone(law, y, tolerance)
    together = np.logical_and.reduce(list(verdicts.values()))
    return Adherence(
        law,
        {statement: int(v.sum()) for statement, v in verdicts.items()},
        int(together.sum()),
        together.size,
        len(x_raw),
        int(together.all(axis=1).sum()),
        low_k,
        high_k,
        (float(seen.min()), float(seen.max())),
        tolerance,
    )


def _conductivity(law: str, y: Array, inverse: Array, tolerance: float) -> dict[str, NDArray[np.bool_]]:
    """Judges ``y`` (``n x points``) over ascending ``1000/T``; each verdict is ``n x (points - 1)``."""
    energy = -np.diff(y, axis=1) / np.diff(inverse) * EV_PER_SLOPE
    slack = tolerance / (inverse[-1] - inverse[0]) * EV_PER_SLOPE
    out: dict[str, NDArray[np.bool_]] = {"positive activation energy": energy >= -slack}
    if law == "arrhenius":
        out[f"activation energy at most {ENERGY_EV[1]:g} eV"] = energy <= ENERGY_EV[1] + slack
        centred = inverse - inverse.mean()
        line = y.mean(axis=1, keepdims=True) + (y @ centred / (centred @ centred))[:, None] * centred
        out["straight line in 1/T"] = _steps_within(np.abs(y - line), tolerance)
    else:
        hull = np.stack([_concave_hull(inverse, row) for row in y])
        out["concave in 1/T"] = _steps_within(hull - y, tolerance)
    return out


def _monotone(law: str, y: Array, tolerance: float) -> dict[str, NDArray[np.bool_]]:
    rise = np.diff(y, axis=1) * (1.0 if law == "increasing" else -1.0)
    return {READOUTS[law].about: rise >= -tolerance / (y.shape[1] - 1)}


def _steps_within(distance: Array, tolerance: float) -> NDArray[np.bool_]:
    inside = distance <= tolerance
    return np.asarray(inside[:, 1:] & inside[:, :-1], dtype=np.bool_)


def _concave_hull(x: Array, y: Array) -> Array:
    """Returns the least concave function above ``y`` at ascending ``x`` (upper hull, Andrew's monotone chain)."""
    kept: list[int] = []
    for i in range(len(x)):
        while len(kept) > 1:
            a, b = kept[-2], kept[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) > (y[i] - y[a]) * (x[b] - x[a]):
                break
            kept.pop()
        kept.append(i)
    return np.interp(x, x[kept], y[kept])
