"""What a record to be predicted looks like: the fields a model accepts and one made-up record of each type.

Knows: the contract, and a plausible value for every required field. Refuses to know: any site's records; an example that
leaves with a model must never be one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedmat.data.contract import Field, RecordType

_LI2O = (
    '{"@class":"Structure","@module":"pymatgen.core.structure",'
    '"lattice":{"matrix":[[0.0,2.31,2.31],[2.31,0.0,2.31],[2.31,2.31,0.0]]},'
    '"sites":[{"abc":[0.25,0.25,0.25],"species":[{"element":"Li","occu":1.0}]},'
    '{"abc":[0.75,0.75,0.75],"species":[{"element":"Li","occu":1.0}]},'
    '{"abc":[0.0,0.0,0.0],"species":[{"element":"O","occu":1.0}]}]}'
)

_EXAMPLE: Mapping[str, str | float] = {
    "formula": "Li2O",
    "structure": _LI2O,
    "temperature_k": 300.0,
    "salt": "LiPF6",
    "concentration": 1.0,
    "concentration_basis": "mol/kg",
    "solvents": '{"DMC": 0.625, "EC": 0.375}',
    "solvent_basis": "w",
    "polymer_smiles": "CCO",
    "salt_smiles": "[Li+].[Cl-]",
    "molality": 1.0,
    "positive_thickness_um": 70.0,
    "negative_thickness_um": 80.0,
    "positive_porosity": 0.3,
    "negative_porosity": 0.3,
    "positive_particle_radius_um": 5.0,
    "negative_particle_radius_um": 6.0,
    "c_rate": 1.0,
    "cell": "K-1",
    "dq_min_ah": -0.04,
    "dq_mean_ah": -0.02,
    "dq_variance_ah2": 2e-4,
    "dq_skewness": 0.0,
    "dq_excess_kurtosis": -1.0,
    "capacity_2_ah": 1.0,
    "capacity_100_ah": 0.99,
    "fade_slope_91_100_ah": -1e-4,
}


def example(rt: RecordType, target: str) -> dict[str, str | float]:
    """Returns one made-up record of ``rt`` with the fields a prediction requires."""
    return {f.name: _EXAMPLE[f.name] for f in inputs(rt, target) if f.required or f.needed_where}


def inputs(rt: RecordType, target: str) -> tuple[Field, ...]:
    """Returns the contract fields a registered model accepts: all but its target; a measured one is never required."""
    return tuple(replace(f, required=f.required and not f.measured) for f in rt.fields if f.name != target)
