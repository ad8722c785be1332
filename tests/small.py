"""A small real consortium on disk: three invented alloy companies with CSV files, made in a second."""

from __future__ import annotations

import csv
from pathlib import Path

import yaml

from fedmat.seeds import stream

COMPANIES = {"foundry": ("Al", "Ni"), "forge": ("Ti", "Cr"), "mill": ("Cu", "Fe")}
STRENGTH = {"Al": 90.0, "Ni": 180.0, "Ti": 260.0, "Cr": 320.0, "Cu": 100.0, "Fe": 150.0, "Co": 210.0, "Mn": 170.0}


def build(folder: Path, *, rows: int = 60, rounds: int = 3, simulated: bool = True, **plan: object) -> Path:
    """Writes the consortium below ``folder`` and returns its consortium.yaml.

    Hardness follows a rule of mixtures with solid-solution hardening, softened by temperature; each company works
    around two base metals of its own, so that the companies' data differ as real ones do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for site, base in COMPANIES.items():
        _company(folder / site, site, base, rows)
    settings = {
        "rounds": rounds,
        "quorum": 2,
        "local": {"steps": 10, "batch_size": 16, "lr": 3e-3},
        "personalization": {"finetune_steps": 20},
        **plan,
    }
    consortium = {
        "name": "small-alloys",
        "title": "Three alloy makers",
        "simulated": simulated,
        "task": {"name": "small-hardness", "record_type": "alloy", "target": "hardness_hv", "unit": ""},
        "features": ["composition", {"name": "conditions", "options": {"fields": ["temperature_k"]}}],
        "model": {"hidden": [16]},
        "plan": settings,
        "members": [{"site": s, "organisation": f"{s.title()} Ltd", "file": f"{s}/site.yaml"} for s in COMPANIES],
    }
    path = folder / "consortium.yaml"
    path.write_text(yaml.safe_dump(consortium, sort_keys=False))
    return path


def _company(folder: Path, site: str, base: tuple[str, str], rows: int) -> None:
    folder.mkdir(exist_ok=True)
    rng = stream(11, "small", site)
    others = sorted(set(STRENGTH) - set(base))
    with (folder / "lab.csv").open("w", newline="") as handle:
        out = csv.writer(handle)
        out.writerow(["Alloy", "Test temp (C)", "Vickers"])
        for _ in range(rows // 2):
            extra = others[int(rng.integers(len(others)))]
            x, y = float(rng.uniform(0.2, 0.8)), float(rng.uniform(0.02, 0.2))
            parts = {base[0]: round(x * (1 - y), 3), base[1]: round((1 - x) * (1 - y), 3), extra: round(y, 3)}
            mixed = sum(STRENGTH[e] * a for e, a in parts.items())
            for celsius in (25.0, float(rng.integers(100, 600))):
                hardness = (mixed + 400 * x * (1 - x)) * (1 - celsius / 2500) + float(rng.normal(0, 3))
                out.writerow(["".join(f"{e}{a:g}" for e, a in parts.items()), celsius, round(hardness, 2)])
    site_yaml = {
        "site": site,
        "organisation": f"{site.title()} Ltd",
        "record_type": "alloy",
        "sources": [
            {
                "adapter": "csv",
                "path": "lab.csv",
                "columns": {
                    "formula": "Alloy",
                    "temperature_k": {"from": "Test temp (C)", "unit": "degC"},
                    "hardness_hv": "Vickers",
                },
            }
        ],
    }
    (folder / "site.yaml").write_text(yaml.safe_dump(site_yaml, sort_keys=False))
