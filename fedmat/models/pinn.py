"""Lithium diffusing in a battery particle: a physics-informed network that cannot lose lithium.

Knows: Fick's law in a sphere with a current through its surface. Refuses to know: electrodes, voltages, other shapes, a
diffusivity that changes with concentration (superposition and the scaling below need a linear equation).

With ``x = r/R``, Fourier time ``tau = D t / R^2`` and stoichiometry ``theta = c/c_max``, a constant flux ``J`` into the particle
(mol m^-2 s^-1) gives ``theta = theta_0 + j u(x, tau)``, ``j = J R / (D c_max)``, with one function ``u`` for every particle,
diffusivity and current::

    du/dtau = (1/x^2) d/dx (x^2 du/dx),   u(x, 0) = 0,   du/dx(0) = 0,   du/dx(1) = 1.

Any piecewise constant current is a sum of delayed ``u`` (Duhamel). So scaling and superposition are exact, and a network has to
learn ``u`` alone. Its ansatz satisfies everything but the equation itself, for every weight (hard constraints [Lu2021]_):

* ``u = 3 tau + x^k/k - mean + sum_m b_m(tau) Q_m``; the flux through the surface is 1, the centre is symmetric, the volume mean
  is ``3 tau`` (all lithium that came in is there) and ``u`` vanishes at ``tau = 0``.
* ``k(tau)`` falls from infinity to 2: a boundary layer as thick as the diffusion length, then the parabola of the steady state.
* ``Q_m``: Legendre polynomials in ``x^k`` (they follow the layer) and in ``x^2`` (smooth at the centre), combined so that slope
  at both ends and volume mean are zero.
* ``b_m(tau)``: a small network, trained by the residual of the equation alone [Raissi2019]_, without one solved example.

The residual is linear in ``b`` and ``db/dtau``, hence least squares in the weights: Levenberg-Marquardt [Marquardt1963]_ takes
seconds where Adam and L-BFGS took minutes. The series [Crank1975]_ is only used to say how large the error is.

References:
    Crank1975: J. Crank, "The Mathematics of Diffusion", 2nd ed., Oxford 1975, eq. 6.45.
    Marquardt1963: D. W. Marquardt, J. Soc. Indust. Appl. Math. 11 (1963) 431.
    Raissi2019: M. Raissi, P. Perdikaris, G. E. Karniadakis, J. Comput. Phys. 378 (2019) 686.
    Lu2021: L. Lu et al., SIAM J. Sci. Comput. 43 (2021) B1105.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.polynomial import legendre, polynomial
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmat.errors import ConfigError
from fedmat.seeds import derive

Array = NDArray[np.float64]
Response = Callable[[Tensor, Tensor], Tensor]

ROOT = 4.493409457909064  # first positive root of tan(q) = q: the slowest mode decays as exp(-ROOT^2 tau)
LAYER = math.sqrt(math.pi) / 2.0  # x^k/k with k = LAYER/sqrt(tau) has the surface value 2 sqrt(tau/pi) of a flat layer
LAYER_END = 60.0  # the layer reaches the centre near tau = 0.05: from there on everything is even in x
N_LAYER, N_SMOOTH = 8, 6  # functions Q_m of each kind
TINY = 1e-14  # Fourier time below which u (< 2e-7) is taken at TINY
SHORTEST, LONGEST = 1e-6, 1.5  # Fourier times of the training points; later than that u is the steady state


class SphereDiffusion(nn.Module):
    """The function ``u``: float64, differentiable in ``x``, in ``tau`` and therefore in the diffusivity."""

    def __init__(self, width: int = 12, seed: int = 0) -> None:
        super().__init__()
        count = N_LAYER + N_SMOOTH
        generator = torch.Generator().manual_seed(derive(seed, "sphere-diffusion"))
        hidden = [nn.Linear(a, width, dtype=torch.float64) for a in (2, width)]
        self.last = nn.Linear(width, count, dtype=torch.float64)
        with torch.no_grad():
            for layer in hidden:
                bound = math.sqrt(3.0 / layer.in_features)
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.uniform_(-0.5, 0.5, generator=generator)
            self.last.weight.zero_()
            self.last.bias.zero_()
        self.hidden = nn.ModuleList(hidden)

    def coefficients(self, fourier: Tensor) -> Tensor:
        """Returns ``b_m``, shape ``... x (N_LAYER + N_SMOOTH)``, for Fourier times of shape ``...``."""
        root = torch.sqrt(fourier)
        h = torch.stack([4.0 * root / (root + 0.2) - 2.0, 2.0 * torch.exp(-20.0 * fourier) - 1.0], dim=-1)
        for layer in self.hidden:
            h = torch.tanh(layer(h))
        out: Tensor = self.last(h)
        return out

    def forward(self, x: Tensor, fourier: Tensor) -> Tensor:
        """Returns ``u``, shape of ``x`` and ``fourier`` broadcast.

        Args:
            x: radius over particle radius, within [0, 1].
            fourier: ``D t / R^2``; 0 where negative, since nothing has happened yet.
        """
        x, fourier = torch.broadcast_tensors(x.double(), fourier.double())
        later = fourier > 0
        time = torch.where(later, fourier.clamp_min(TINY), torch.ones_like(fourier))
        functions, _ = _functions(x.contiguous(), time)
        u = 3.0 * fourier + functions[..., 0] + (functions[..., 1:] * self.coefficients(time)).sum(dim=-1)
        out: Tensor = torch.where(later, u, torch.zeros_like(u))
        return out

    def stoichiometry(
        self,
        x: Tensor,
        time_s: Tensor,
        *,
        flux_mol_m2_s: Tensor,
        diffusivity_m2_s: Tensor,
        radius_m: Tensor,
        maximum_mol_m3: Tensor,
        initial: Tensor,
    ) -> Tensor:
        """Returns ``theta`` after ``time_s`` at constant flux into the particle (negative: lithium leaves); all broadcast."""
        per_flux = radius_m / (diffusivity_m2_s * maximum_mol_m3)
        u: Tensor = self(x, diffusivity_m2_s * time_s / radius_m**2)
        return initial + flux_mol_m2_s * per_flux * u

    def under_pulses(
        self,
        x: Tensor,
        time_s: Tensor,
        *,
        starts_s: Sequence[float],
        fluxes_mol_m2_s: Sequence[float],
        diffusivity_m2_s: Tensor,
        radius_m: Tensor,
        maximum_mol_m3: Tensor,
        initial: Tensor,
    ) -> Tensor:
        """Returns ``theta`` under a piecewise constant flux: ``fluxes[i]`` holds from ``starts[i]`` until the next start.

        Raises:
            ConfigError: not one flux per start, or starts that do not ascend.
        """
        if len(starts_s) != len(fluxes_mol_m2_s) or any(b <= a for a, b in itertools.pairwise(starts_s)):
            raise ConfigError("pulses: need one flux per start and ascending starts", fix="sort them")
        theta, before = initial + torch.zeros_like(x * time_s), 0.0
        per_flux = radius_m / (diffusivity_m2_s * maximum_mol_m3)
        for start, flux in zip(starts_s, fluxes_mol_m2_s, strict=True):
            theta = theta + (flux - before) * per_flux * self(x, diffusivity_m2_s * (time_s - start) / radius_m**2)
            before = flux
        return theta


# --- the ansatz ---------------------------------------------------------------------------------------------------


def _combinations(count: int) -> Tensor:
    """Returns ``count x (count + 1)``: coefficients of z, z^2, ... of ``P_m(2z-1) - m(m+1)/2 P_1(2z-1)``, flat at z = 1."""
    rows = np.zeros((count, count + 1))
    for m in range(2, count + 2):
        series = np.zeros(m + 1)
        series[m], series[1] = 1.0, -m * (m + 1) / 2.0
        total: Array = np.zeros(1)
        for power, value in enumerate(legendre.leg2poly(series)):
            total = np.asarray(polynomial.polyadd(total, value * polynomial.polypow([-1.0, 2.0], power)), dtype=np.float64)
        rows[m - 2, : len(total) - 1] = total[1:] / m**2  # the constant goes into the zero mean
    return torch.from_numpy(rows)


_LAYER_MIX, _SMOOTH_MIX = _combinations(N_LAYER), _combinations(N_SMOOTH)


def _powers(x: Tensor, k: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns ``x^(ki)`` minus its volume mean for i = 1..count, and its Laplacian in the sphere."""
    q = k[..., None] * torch.arange(1.0, count + 1.0, dtype=torch.float64)
    return x[..., None] ** q - 3.0 / (q + 3.0), q * (q + 1.0) * x[..., None] ** (q - 2.0)


def _functions(x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the particular solution (without ``3 tau``) and all ``Q_m`` on the last axis, and their Laplacians."""
    wide = 2.0 + LAYER / torch.sqrt(time)
    k = 2.0 + LAYER / torch.sqrt(time) * torch.exp(-LAYER_END * time)
    layer, layer_lap = _powers(x, k, N_LAYER + 1)
    smooth, smooth_lap = _powers(x, torch.full_like(time, 2.0), N_SMOOTH + 1)
    a, b = (torch.exp(-rate * time)[..., None] / wide[..., None] for rate in (LAYER_END, ROOT**2))
    values = [layer[..., :1] / k[..., None], a * (layer @ _LAYER_MIX.T), b * (smooth @ _SMOOTH_MIX.T)]
    laplacians = [layer_lap[..., :1] / k[..., None], a * (layer_lap @ _LAYER_MIX.T), b * (smooth_lap @ _SMOOTH_MIX.T)]
    return torch.cat(values, dim=-1), torch.cat(laplacians, dim=-1)


# --- training -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """The network and its mean squared weighted residual after every accepted step."""

    network: SphereDiffusion
    losses: tuple[float, ...]


def train(seed: int = 0, *, iterations: int = 100, width: int = 12, times: int = 80, radii: int = 24) -> Trained:
    """Trains ``u`` on the diffusion equation alone.

    Points: ``times`` Fourier times, equidistant in their logarithm; at each ``radii`` Gauss points across the boundary layer and
    as many across the particle. Residuals are weighted by the thickness of the layer, since ``du/dtau`` grows as its inverse.

    Raises:
        ConfigError: a number of points, width or iterations below 1.
    """
    if min(iterations, width, times, radii) < 1:
        raise ConfigError("pinn: iterations, width, times and radii must be 1 or more", fix="use the defaults")
    net = SphereDiffusion(width, seed)
    names = [name for name, _ in net.named_parameters()]
    shapes = [p.shape for p in net.parameters()]
    ends = np.cumsum([0, *(int(s.numel()) for s in shapes)])
    t = torch.logspace(math.log10(SHORTEST), math.log10(LONGEST), times, dtype=torch.float64)
    offset, value, change = _equation(t, radii)

    def tensors(flat: Tensor) -> dict[str, Tensor]:
        return {n: flat[a:b].reshape(s) for n, s, a, b in zip(names, shapes, ends, ends[1:], strict=False)}

    def coefficients(flat: Tensor) -> Tensor:  # b and db/dtau side by side, times x 2K
        def at(time: Tensor) -> Tensor:
            out: Tensor = torch.func.functional_call(
                _Coefficients(net), {f"of.{k}": v for k, v in tensors(flat).items()}, (time,)
            )
            return out

        return torch.cat(torch.func.jvp(at, (t,), (torch.ones_like(t),)), dim=-1)

    system = torch.cat([change, value], dim=-1)

    def residual(flat: Tensor) -> Tensor:
        return (offset + (system * coefficients(flat)[:, None]).sum(dim=-1)).reshape(-1)

    flat = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    jacobian = torch.func.jacfwd(coefficients)
    r = residual(flat)
    losses, damping = [float(r @ r) / times], 1e-2
    for _ in range(iterations):
        slope = torch.einsum("npk,nkq->npq", system, jacobian(flat)).reshape(len(r), -1)
        normal, gradient = slope.T @ slope, slope.T @ r
        accepted = False
        while not accepted and damping < 1e8:
            trial = flat - torch.linalg.solve(normal + damping * torch.eye(len(flat), dtype=torch.float64), gradient)
            new = residual(trial)
            accepted = float(new @ new) < float(r @ r)
            damping = max(damping / 3.0, 1e-14) if accepted else damping * 4.0
        if not accepted:
            break
        flat, r = trial, new
        losses.append(float(r @ r) / times)
    net.load_state_dict(tensors(flat))
    return Trained(net, tuple(losses))


class _Coefficients(nn.Module):
    """The network's coefficients as a module's forward, which ``functional_call`` needs."""

    def __init__(self, of: SphereDiffusion) -> None:
        super().__init__()
        self.of = of

    def forward(self, time: Tensor) -> Tensor:
        return self.of.coefficients(time)


def _equation(t: Tensor, radii: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the weighted residual's parts at ``n x p`` points: constant, factor of ``db/dtau`` and of ``b`` (``n x p x K``)."""
    points, weights = np.polynomial.legendre.leggauss(radii)
    z, share = torch.from_numpy((points + 1.0) / 2.0), torch.from_numpy(weights / 2.0)
    wide = (2.0 + LAYER / torch.sqrt(t))[:, None]
    x = torch.cat([z[None] ** (1.0 / wide), z[None].expand(len(t), -1)], dim=1).contiguous()
    time = t[:, None].expand_as(x).contiguous()
    weight = torch.cat([torch.sqrt(share) / wide, torch.sqrt(share) / torch.sqrt(wide)], dim=1)[..., None]
    found: Any = torch.func.jvp(lambda s: _functions(x, s), (time,), (torch.ones_like(time),))
    (values, laplacians), (rates, _) = found
    change = (rates - laplacians) * weight
    return change[..., 0] + 3.0 * weight[..., 0], values[..., 1:] * weight, change[..., 1:]


# --- what is known about u ------------------------------------------------------------------------------------------


def exact_response(x: Array, fourier: Array, terms: int = 400) -> Array:
    """Returns ``u`` by the series of [Crank1975]_ eq. 6.45, shape of ``x`` and ``fourier`` broadcast.

    With 400 terms the error is below 1e-6 for Fourier times of 1e-5 and more.
    """
    x, fourier = np.broadcast_arrays(np.asarray(x, dtype=np.float64), np.asarray(fourier, dtype=np.float64))
    q = _roots(terms)
    out = 3.0 * fourier + 0.5 * x**2 - 0.3
    for root in q:
        shape = np.sinc(root * x / math.pi)  # sin(q x) / (q x)
        out = out - 2.0 * shape / (root * math.sin(root)) * np.exp(-(root**2) * fourier)
    return np.asarray(out, dtype=np.float64)


def _roots(count: int) -> Array:
    """Returns the first positive roots of ``tan q = q`` by Newton steps on ``q = n pi + atan q``."""
    n = np.arange(1, count + 1) * math.pi
    q = n + math.pi / 2.0 - 1.0 / (n + math.pi / 2.0)
    for _ in range(30):
        q = n + np.arctan(q)
    return np.asarray(q, dtype=np.float64)


@dataclass(frozen=True)
class Adherence:
    """How many predictions obey each law of diffusion.

    Attributes:
        kept, checked: law -> predictions that obey, predictions looked at.
        worst: law -> largest departure, in the law's own measure (see :func:`law_adherence`).
        built_in: laws that the ansatz guarantees; the others are learned.
        tolerance: largest departure that still counts as obeying.
    """

    kept: Mapping[str, int]
    checked: Mapping[str, int]
    worst: Mapping[str, float]
    built_in: tuple[str, ...]
    tolerance: float

    @property
    def shares(self) -> Mapping[str, float]:
        """Share of predictions per law."""
        return {law: self.kept[law] / self.checked[law] for law in self.kept}

    @property
    def share(self) -> float:
        """Share over all laws together."""
        return sum(self.kept.values()) / sum(self.checked.values())


BUILT_IN = ("initial state", "conservation of lithium", "flux through the surface", "symmetry at the centre")


def law_adherence(
    response: Response, *, low: float = 1e-4, high: float = 3.0, times: int = 120, radii: int = 60, tolerance: float = 0.01
) -> Adherence:
    """Judges any ``u(x, tau)`` by the laws of diffusion, at ``times`` Fourier times from ``low`` to ``high`` (log scale).

    Departures, all dimensionless: initial state ``|u(x, 0)|``; conservation ``|mean u - 3 tau| / (3 tau)``; flux
    ``|du/dx(1) - 1|``; symmetry ``|du/dx(0)|``; diffusion equation ``|du/dtau - lap u|`` over the largest rate at that time,
    ``3 + 1/sqrt(pi tau)``; maximum principle: how far ``u`` lies below zero or above the surface, over the surface value.

    Raises:
        ConfigError: an impossible grid or tolerance.
    """
    if not (0 < low < high and times > 1 and radii > 3 and tolerance > 0):
        raise ConfigError("pinn: needs 0 < low < high, points and a positive tolerance", fix="use the defaults")
    t = torch.logspace(math.log10(low), math.log10(high), times, dtype=torch.float64)
    points, weights = np.polynomial.legendre.leggauss(radii)
    z, share = torch.from_numpy((points + 1.0) / 2.0), torch.from_numpy(weights / 2.0)
    x = (1.0 - (1.0 - z) ** 2)[None].expand(times, -1).contiguous()  # closer together at the surface
    volume = (3.0 * x**2 * share * 2.0 * (1.0 - z)).detach()
    inner = _derivatives(response, x, t[:, None].expand_as(x).contiguous())
    ends = _derivatives(response, torch.tensor([0.0, 1.0], dtype=torch.float64).expand(times, 2).contiguous(),
                        t[:, None].expand(times, 2).contiguous())  # fmt: skip
    zero = response(x, torch.zeros_like(x)).detach()
    surface = ends.u[:, 1:]
    laplacian = inner.xx + 2.0 * inner.x / x
    fastest = (3.0 + 1.0 / torch.sqrt(math.pi * t))[:, None]
    departures = {
        "initial state": zero.abs(),
        "conservation of lithium": ((inner.u * volume).sum(dim=1) / (3.0 * t) - 1.0).abs(),
        "flux through the surface": (ends.x[:, 1] - 1.0).abs(),
        "symmetry at the centre": ends.x[:, 0].abs(),
        "diffusion equation": (inner.t - laplacian).abs() / fastest,
        "maximum principle": torch.maximum(-inner.u, inner.u - surface).clamp_min(0.0) / surface.abs(),
    }
    return Adherence(
        {law: int((d <= tolerance).sum()) for law, d in departures.items()},
        {law: d.numel() for law, d in departures.items()},
        {law: float(d.max()) for law, d in departures.items()},
        BUILT_IN,
        tolerance,
    )


@dataclass(frozen=True)
class _Derivatives:
    u: Tensor
    x: Tensor
    xx: Tensor
    t: Tensor


def _derivatives(response: Response, x: Tensor, time: Tensor) -> _Derivatives:
    x, time = x.clone().requires_grad_(True), time.clone().requires_grad_(True)
    u = response(x, time)
    first, rate = torch.autograd.grad(u.sum(), (x, time), create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    return _Derivatives(u.detach(), first.detach(), second.detach(), rate.detach())
