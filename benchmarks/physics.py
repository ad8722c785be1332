"""What laws built into a network cost and bring: accuracy with 10, 30 and 100 % of the data, and how often a law is broken.

Run ``python -m benchmarks.physics [--quick] [--only laws,sphere,data]``. Prints one JSON object.

* ``laws``: an unconstrained network against the same network with a readout of ``fedmat.models.laws``, trained on all sites'
  rows together. Materials (groups) are divided anew for every seed: one fifth test, one eighth of the rest validation, and of
  both learning parts the stated share of the materials. Everything but the last layer is the same: features, width, steps,
  best validation score kept. Laws are judged on test materials, from 10 K below the coldest record to 100 K above the warmest.
* ``sphere``: the diffusion network against the exact series, PyBaMM's single-particle model and a plain network trained with
  penalties.
* ``data``: surface stoichiometry simulated by PyBaMM, learned with and without diffusion and Arrhenius built in.

Data lie in ``$FEDMAT_DATA``; what they are: examples/README.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fedmat.telemetry  # noqa: F401
from fedmat.models import laws, pinn
from fedmat.seeds import derive, stream

torch.set_num_threads(1)

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CONSORTIA = {"liquid electrolytes": "liquid-electrolytes", "polymer electrolytes": "polymer-electrolytes",
             "solid electrolytes": "solid-electrolytes"}  # fmt: skip
SETTINGS = {  # dropout, learning rate: those of the examples
    "liquid electrolytes": (0.0, 2e-3),
    "polymer electrolytes": (0.2, 1e-3),
    "solid electrolytes": (0.3, 1e-3),
}
FRACTIONS = (0.1, 0.3, 1.0)
ARMS = ("none", "arrhenius", "vtf")
TOLERANCE = 0.01  # decades over the whole temperature grid

# --- laws of temperature ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    names: tuple[str, ...]
    x: np.ndarray
    y: np.ndarray
    group: np.ndarray
    site: np.ndarray


def pooled(consortium: str) -> Rows:
    """All sites' rows, as the platform's own steps prepare and featurize them."""
    from fedmat import pipeline

    with tempfile.TemporaryDirectory(prefix="fedmat-bench-") as folder:
        run = pipeline.open_run(EXAMPLES / consortium / "consortium.yaml", home=Path(folder))
        tables = []
        for site in run.sites:
            pipeline.prepare_site(run, site)
            tables.append(pipeline._table(run, site))
    known = [np.isfinite(t.y.reshape(len(t), -1)[:, 0]) for t in tables]
    ends = np.cumsum([0, *(int(t.group.max()) + 1 for t in tables)])
    return Rows(
        tables[0].names,
        np.concatenate([t.x[k] for t, k in zip(tables, known)]),
        np.concatenate([t.y.reshape(len(t), -1)[k, 0] for t, k in zip(tables, known)]),
        np.concatenate([t.group[k] + e for t, k, e in zip(tables, known, ends)]),
        np.concatenate([np.full(int(k.sum()), i) for i, k in enumerate(known)]),
    )


def divide(rows: Rows, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks of training, validation and test rows; every site gives its share of materials."""
    masks = [np.zeros(len(rows.y), dtype=bool) for _ in range(3)]
    rng = stream(seed, "divide")
    for site in np.unique(rows.site):
        groups = rng.permutation(np.unique(rows.group[rows.site == site]))
        n = len(groups)
        test = max(1, n // 5)
        validation = max(1, (n - test) // 8)
        parts = (groups[test + validation :], groups[test : test + validation], groups[:test])
        for mask, part, share in zip(masks, parts, (fraction, fraction, 1.0)):
            mask |= np.isin(rows.group, part[: max(1, math.ceil(share * len(part)))])
    return masks[0], masks[1], masks[2]


class Perceptron(nn.Module):
    """Two hidden layers of 128; the output layer starts at zero."""

    def __init__(self, inputs: int, outputs: int, dropout: float, width: int = 128) -> None:
        super().__init__()
        drop: list[nn.Module] = [nn.Dropout(dropout)] if dropout else []
        self.of = nn.Sequential(
            nn.Linear(inputs, width), nn.SiLU(), *drop, nn.Linear(width, width), nn.SiLU(), *drop, nn.Linear(width, outputs)
        )
        for layer in self.of:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.of[-1].weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.of(x)


@dataclass(frozen=True)
class Model:
    """A trained arm: raw features in, log10 of the conductivity out."""

    predict: Callable[[np.ndarray], np.ndarray]
    validation_mae: float


def learn(
    rows: Rows, law: str, learning: tuple[np.ndarray, np.ndarray], dropout: float, lr: float, steps: int, seed: int
) -> Model:
    """Trains one arm on the rows of ``learning`` (training, validation)."""
    train, validation = learning
    x = rows.x[train]
    mean, scale = np.nan_to_num(np.nanmean(x, axis=0)), np.nan_to_num(np.nanstd(x, axis=0))
    keep = scale > 1e-9 * np.abs(mean) + 1e-12
    if law != "none":
        keep &= ~laws.temperature_columns(rows.names)
    y_mean, y_scale = float(rows.y[train].mean()), float(rows.y[train].std())
    torch.manual_seed(derive(seed, "physics") % 2**31)
    net = Perceptron(int(keep.sum()), 1 if law == "none" else laws.READOUTS[law].n_parameters, dropout)

    def inputs(raw: np.ndarray) -> tuple[Tensor, Tensor]:
        z = np.clip(np.nan_to_num((raw[:, keep] - mean[keep]) / scale[keep]), -5.0, 5.0)
        return torch.tensor(z, dtype=torch.float32), torch.tensor(laws.temperature_k(rows.names, raw), dtype=torch.float32)

    def output(z: Tensor, kelvin: Tensor) -> Tensor:
        raw = net(z)
        return raw[..., 0] if law == "none" else laws.readout(law, raw, kelvin, y_mean, y_scale)

    z, kelvin = inputs(rows.x)
    target = torch.tensor((rows.y - y_mean) / y_scale, dtype=torch.float32)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    where, held = np.flatnonzero(train), torch.from_numpy(np.flatnonzero(validation))
    rng = stream(seed, "batches")
    best, state = math.inf, {k: v.clone() for k, v in net.state_dict().items()}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * step / steps)))
        batch = torch.from_numpy(rng.choice(where, size=64))
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.huber_loss(output(z[batch], kelvin[batch]), target[batch])
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            net.eval()
            with torch.no_grad():
                score = float((output(z[held], kelvin[held]) - target[held]).abs().mean())
            net.train()
            if score < best:
                best, state = score, {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(state)
    net.eval()

    def predict(raw: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return output(*inputs(raw)).double().numpy() * y_scale + y_mean

    return Model(predict, best * y_scale)


def judge(rows: Rows, model: Model, law: str, chosen: np.ndarray) -> laws.Adherence:
    """Adherence of one arm on the rows ``chosen``, on the grid of the module's description."""
    kelvin = laws.temperature_k(rows.names, rows.x)
    low, high = max(float(kelvin.min()) - 10.0, laws.READOUTS[law].above_k + 5.0), float(kelvin.max()) + 100.0
    return laws.law_adherence(
        model.predict, rows.x[chosen], rows.names, law, low_k=low, high_k=high, points=100, tolerance=TOLERANCE
    )


def of_temperature(quick: bool) -> dict[str, Any]:
    """Accuracy and adherence per material class, share of data and arm."""
    seeds, steps, sample = ((1,), 300, 20) if quick else ((1, 2, 3, 4), 1500, 100)
    report: dict[str, Any] = {}
    for title, consortium in CONSORTIA.items():
        began = time.perf_counter()
        rows = pooled(consortium)
        dropout, lr = SETTINGS[title]
        kelvin = laws.temperature_k(rows.names, rows.x)
        shares: dict[str, Any] = {}
        for fraction in FRACTIONS:
            per_arm: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
            sizes = []
            for seed in seeds:
                train, validation, test = divide(rows, fraction, seed)
                sizes.append(int(train.sum()))
                some = stream(seed, "judged").permutation(np.flatnonzero(test))[:sample]
                for arm in ARMS:
                    model = learn(rows, arm, (train, validation), dropout, lr, steps, seed)
                    error = np.abs(model.predict(rows.x[test]) - rows.y[test])
                    cold = kelvin[test] < 260.0
                    entry = {"validation_mae": model.validation_mae, "mae": float(error.mean()),
                             "mae_over_sites": float(np.mean([error[rows.site[test] == s].mean() for s in np.unique(rows.site[test])]))}  # fmt: skip
                    if cold.any():
                        entry["mae_below_260_k"] = float(error[cold].mean())
                    for law in ARMS[1:]:
                        found = judge(rows, model, law, some)
                        entry[f"obeys_{law}"] = found.share
                        entry["positive_activation_energy"] = found.shares["positive activation energy"]
                    per_arm[arm].append(entry)
            shares[f"{fraction:.0%}"] = {
                "training_rows": round(float(np.mean(sizes))),
                **{
                    arm: {k: round(float(np.mean([e[k] for e in es if k in e])), 4) for k in es[0]}
                    for arm, es in per_arm.items()
                },
                "mae_by_seed": {arm: [round(e["mae"], 4) for e in es] for arm, es in per_arm.items()},
            }
        full = shares["100%"]
        report[title] = {
            "rows": len(rows.y),
            "groups": len(np.unique(rows.group)),
            "temperatures_k": [round(float(kelvin.min()), 1), round(float(kelvin.max()), 1)],
            "data": shares,
            "best_by_validation": min(ARMS, key=lambda arm: full[arm]["validation_mae"]),
            "best_law_by_validation": min(ARMS[1:], key=lambda arm: full[arm]["validation_mae"]),
            "seconds": round(time.perf_counter() - began, 1),
        }
        print(f"{title}: {json.dumps(report[title])}", file=sys.stderr, flush=True)
    return report


# --- the sphere ---------------------------------------------------------------------------------------------------


@functools.cache
def spm() -> tuple[Any, dict[str, float]]:
    """PyBaMM's single-particle model with current, radius, diffusivity and start of the negative particle as inputs."""
    import pybamm

    pybamm.set_logging_level("ERROR")
    p = pybamm.ParameterValues("Marquis2019")
    known = {
        "maximum": float(p["Maximum concentration in negative electrode [mol.m-3]"]),
        "radius": float(p["Negative particle radius [m]"]),
    }  # fmt: skip
    p.update(dict.fromkeys(("Current function [A]", "Negative particle radius [m]", "Negative particle diffusivity [m2.s-1]",
                            "Initial concentration in negative electrode [mol.m-3]"), "[input]"))  # fmt: skip
    model = pybamm.lithium_ion.SPM()
    model.events = []  # the particle alone is asked for
    meshes = {
        name: pybamm.SymbolicUniform1DSubMesh if kind is pybamm.Uniform1DSubMesh else kind
        for name, kind in ((n, getattr(k, "submesh_type", k)) for n, k in model.default_submesh_types.items())
    }  # the radius is an input
    simulation = pybamm.Simulation(
        model, parameter_values=p, submesh_types=meshes, var_pts={"x_n": 5, "x_s": 5, "x_p": 5, "r_n": 200, "r_p": 20},
        solver=pybamm.IDAKLUSolver(rtol=1e-8, atol=1e-8),
    )  # fmt: skip
    return simulation, known


FARADAY = 96485.33212


def simulate(times: np.ndarray, current: float, radius: float, diffusivity: float, initial: float) -> tuple[np.ndarray, float]:
    """Surface stoichiometry of the negative particle and the flux into it, mol m^-2 s^-1."""
    simulation, known = spm()
    solution = simulation.solve(
        np.concatenate([[0.0], times]),
        inputs={"Current function [A]": current, "Negative particle radius [m]": radius,
                "Negative particle diffusivity [m2.s-1]": diffusivity,
                "Initial concentration in negative electrode [mol.m-3]": initial * known["maximum"]},
    )  # fmt: skip
    density = np.ravel(solution["X-averaged negative electrode interfacial current density [A.m-2]"](times))
    surface = np.ravel(solution["X-averaged negative particle surface concentration [mol.m-3]"](times)) / known["maximum"]
    return surface, -float(density[-1]) / FARADAY


def against_pybamm(net: pinn.SphereDiffusion) -> list[dict[str, float]]:
    """Constant-current discharges of the negative particle: network against PyBaMM, at 60 times each."""
    _, known = spm()
    out = []
    for factor, current, hours in ((1.0, 0.68, 0.9), (0.1, 0.68, 0.7), (0.1, 1.5, 0.2), (0.01, 0.2, 1.0)):
        times = np.linspace(0.005, 1.0, 60) * 3600.0 * hours
        diffusivity = 3.9e-14 * factor  # the parameter set's own, and slower materials
        surface, flux = simulate(times, current, known["radius"], diffusivity, 0.8)
        one = {k: torch.tensor(v, dtype=torch.float64) for k, v in
               (("flux_mol_m2_s", flux), ("diffusivity_m2_s", diffusivity), ("radius_m", known["radius"]),
                ("maximum_mol_m3", known["maximum"]), ("initial", 0.8))}  # fmt: skip
        with torch.no_grad():
            ours = net.stoichiometry(torch.ones(60), torch.tensor(times), **one).numpy()
        scale = flux * known["radius"] / (diffusivity * known["maximum"])
        exact = 0.8 + scale * pinn.exact_response(np.ones(60), diffusivity * times / known["radius"] ** 2, 2000)
        out.append({
            "diffusivity_m2_s": diffusivity, "current_a": current, "hours": hours,
            "fourier_time_at_end": round(diffusivity * float(times[-1]) / known["radius"] ** 2, 4),
            "surface_at_end": round(float(surface[-1]), 4),
            "surface_max_error": float(f"{np.abs(ours - surface).max():.2g}"),
            "pybamm_max_error_to_series": float(f"{np.abs(surface - exact).max():.2g}"),
            "network_max_error_to_series": float(f"{np.abs(ours - exact).max():.2g}"),
        })  # fmt: skip
    return out


def with_penalties(steps: int, seed: int = 0) -> tuple[pinn.Response, float]:
    """The textbook network (Raissi 2019): u(x, tau) free, everything in the loss. Returns it and the seconds it took."""
    began = time.perf_counter()
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    ).double()

    def response(x: Tensor, t: Tensor) -> Tensor:
        return net(torch.stack([x.double() ** 2, torch.sqrt(t.double() + 1e-12)], dim=-1))[..., 0]

    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        x = torch.rand(512, dtype=torch.float64).clamp_min(0.01).requires_grad_(True)
        t = (10 ** (torch.rand(512, dtype=torch.float64) * 4.2 - 4.0)).requires_grad_(True)
        u = response(x, t)
        first, rate = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
        residual = (rate - second - 2.0 * first / x) * torch.sqrt(t).detach()
        edge = torch.ones(128, dtype=torch.float64).requires_grad_(True)
        (slope,) = torch.autograd.grad(response(edge, t[:128]).sum(), edge, create_graph=True)
        start = response(x[:128].detach(), torch.zeros(128, dtype=torch.float64))
        loss = residual.square().mean() + 10.0 * (slope - 1.0).square().mean() + 10.0 * start.square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return response, time.perf_counter() - began


def errors(response: pinn.Response) -> dict[str, float]:
    """Departure from the exact series for Fourier times of 1e-4 to 2."""
    x, t = np.linspace(0.0, 1.0, 41)[None], np.logspace(-4, math.log10(2.0), 60)[:, None]
    exact = pinn.exact_response(x, t, 2000)
    with torch.no_grad():
        ours = response(
            torch.tensor(np.broadcast_to(x, exact.shape).copy()), torch.tensor(np.broadcast_to(t, exact.shape).copy())
        )
    gap = np.abs(ours.numpy() - exact)
    return {"max": float(f"{gap.max():.2g}"), "surface_max": float(f"{gap[:, -1].max():.2g}"),
            "surface_relative_max": float(f"{(gap[:, -1] / exact[:, -1]).max():.2g}")}  # fmt: skip


def of_diffusion(quick: bool) -> tuple[dict[str, Any], pinn.SphereDiffusion]:
    """The hard-constrained network and the one with penalties, each against the series and the laws."""
    began = time.perf_counter()
    trained = pinn.train(iterations=25 if quick else 100)
    seconds = time.perf_counter() - began
    plain, plain_seconds = with_penalties(200 if quick else 4000)

    def judged(response: pinn.Response) -> dict[str, Any]:
        found = pinn.law_adherence(response, tolerance=0.01)
        return {
            "shares_within_0.01": {k: round(v, 4) for k, v in found.shares.items()},
            "worst": {k: float(f"{v:.2g}") for k, v in found.worst.items()},
        }

    net = trained.network
    return {
        "built_in": {"seconds": round(seconds, 1), "errors": errors(net), **judged(net)},
        "penalties": {"seconds": round(plain_seconds, 1), "errors": errors(plain), **judged(plain)},
        "against_pybamm": against_pybamm(net),
    }, net


# --- less data ----------------------------------------------------------------------------------------------------


def measurements(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Simulated pulse tests: descriptors of the material (4), conditions, surface stoichiometry at the end of the pulse.

    log10 D is a smooth function of the descriptors, with its own activation energy; conditions are temperature (K), particle
    radius (m), flux into the particle (mol m^-2 s^-1), duration (s) and initial stoichiometry. Noise: 0.002.
    """
    rng = stream(seed, "measurements")
    z, conditions, surface = [], [], []
    while len(surface) < n:
        d = rng.uniform(-1.0, 1.0, 4)
        kelvin, radius, duration = rng.uniform(263.0, 333.0), 10 ** rng.uniform(-5.7, -4.9), 10 ** rng.uniform(1.5, 3.5)
        initial, current = rng.uniform(0.3, 0.8), 10 ** rng.uniform(-1.3, 0.5)
        log_d = -14.0 + 0.6 * d[0] - 0.5 * d[1] * d[2] + 0.4 * math.sin(3.0 * d[3])
        energy = 0.4 + 0.15 * d[1] - 0.1 * d[0] * d[3]
        diffusivity = 10 ** (log_d - energy / laws.EV_PER_SLOPE * (1000.0 / kelvin - 1000.0 / laws.T_REF_K))
        value, flux = simulate(np.array([duration]), current, radius, diffusivity, initial)
        if not 0.02 < float(value[0]) < 0.98 or abs(float(value[0]) - initial) < 0.005:
            continue  # emptied, or nothing to see: no laboratory reports it
        z.append(d)
        conditions.append([kelvin, radius, flux, duration, initial])
        surface.append(float(value[0]) + 0.002 * rng.normal())
    return np.array(z), np.array(conditions), np.array(surface)


def of_data(quick: bool, net: pinn.SphereDiffusion) -> dict[str, Any]:
    """Test error of both arms with 10, 30 and 100 % of the simulated measurements."""
    n, steps, seeds = (200, 200, (1,)) if quick else (1000, 2000, (1, 2, 3))
    _, known = spm()
    z, c, y = measurements(n + n // 2, 7)
    kelvin, radius, flux, duration, initial = c.T
    logs = np.column_stack([z, 1000.0 / kelvin, np.log10(radius), np.log10(-flux), np.log10(duration), initial])
    plain_inputs = np.column_stack([logs, np.log10(-flux * duration / radius)])  # the charge taken out is handed to it
    test = np.arange(n, n + n // 2)
    for p in net.parameters():
        p.requires_grad_(False)
    f64 = functools.partial(torch.tensor, dtype=torch.float64)

    def arm(physics: bool, train: np.ndarray, seed: int) -> float:
        torch.manual_seed(seed)
        raw = z if physics else plain_inputs
        features = f64((raw - raw[train].mean(0)) / raw[train].std(0))
        model = Perceptron(features.shape[1], 2 if physics else 1, 0.0, 64).double()
        change = float((y - initial)[train].std())

        def output(rows: np.ndarray) -> Tensor:
            out = model(features[rows])
            if not physics:
                return f64(initial[rows]) + change * out[:, 0]
            log_d = -14.5 + laws.readout("arrhenius", out, f64(kelvin[rows]), 0.0, 1.0)
            return net.stoichiometry(torch.ones(len(rows)), f64(duration[rows]), flux_mol_m2_s=f64(flux[rows]),
                                     diffusivity_m2_s=10**log_d, radius_m=f64(radius[rows]), maximum_mol_m3=f64(known["maximum"]),
                                     initial=f64(initial[rows]))  # fmt: skip

        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        rng = stream(seed, "data")
        order = rng.permutation(train)
        held, rest = order[: len(order) // 6], order[len(order) // 6 :]
        best, found = math.inf, math.nan
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
            batch = rng.choice(rest, size=64)
            optimizer.zero_grad(set_to_none=True)
            nn.functional.huber_loss(output(batch) / change, f64(y[batch]) / change).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            if (step + 1) % 50 == 0:
                with torch.no_grad():
                    score = float((output(held) - f64(y[held])).abs().mean())
                    if score < best:
                        best, found = score, float((output(test) - f64(y[test])).abs().mean())
        return found

    report: dict[str, Any] = {
        "test_rows": len(test),
        "mean_change_of_stoichiometry": round(float(np.abs(y - initial).mean()), 4),
    }
    for fraction in FRACTIONS:
        cells = {}
        for name, physics in (("without_physics", False), ("with_physics", True)):
            cells[name] = round(float(np.mean(
                [arm(physics, stream(s, "subset").permutation(n)[: round(fraction * n)], s) for s in seeds])), 5)  # fmt: skip
        report[f"{fraction:.0%}"] = {"training_rows": round(fraction * n), "mae": cells}
    return report


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute, numbers that mean nothing")
    parser.add_argument("--only", default="laws,sphere,data", help="parts, separated by commas")
    chosen = parser.parse_args(argv)
    parts = set(chosen.only.split(","))
    began = time.perf_counter()
    report: dict[str, Any] = {}
    if parts & {"sphere", "data"}:
        report["sphere"], net = of_diffusion(chosen.quick)
        if "data" in parts:
            report["data"] = of_data(chosen.quick, net)
    if "laws" in parts:
        ready = "FEDMAT_DATA" in os.environ
        report["laws"] = of_temperature(chosen.quick) if ready else "left out: FEDMAT_DATA names no folder of public data sets"
    report["seconds"] = round(time.perf_counter() - began, 1)
    report["max_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
