"""How fast records become numbers: fedmat's featurizers against the libraries they stand on, on the same inputs in one run.

Run ``python -m benchmarks.featurization`` (or ``make bench``). Prints one JSON object. Inputs are made from a fixed seed: all
formulas and molecules differ, for fedmat computes each distinct one once and repeated ones would flatter it; the share of repeats
in a table multiplies what is reported here.

One process is measured in *processor* seconds, which other people's load changes little; libraries are loaded before, and
``load_cpu_s`` says what that costs in a fresh process. Two processes can only be measured by the clock, and only where a second
core is free: ``second_core`` is the work two idle loops do in a second over that of one. Near 1 there is no second core, whatever
the affinity says (a container's or session's share of the processor), and a ratio by the clock would tell about the share and not about
the code. The comparison is then left out and said to be.

* composition: matminer computes 132 Magpie columns; fedmat those and 16 more, from text. deepchem's ``ElementPropertyFingerprint``
  is matminer's code with 65 columns.
* molecule: deepchem's ``CircularFingerprint`` (256 bits) and ``RDKitDescriptors`` (over 200) apart; fedmat 20 descriptors and 256 bits.
* formulation: nothing in either library describes a mixture; each row is a new mixture of three known solvents.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import fedmat.telemetry  # noqa: F401  first: it switches off what libraries would send home
from fedmat.data.contract import record_type
from fedmat.features.common import WORKERS
from fedmat.features.composition import CompositionFeatures
from fedmat.features.formulation import FormulationFeatures
from fedmat.features.molecule import MoleculeFeatures
from fedmat.features.table import Featurizer
from fedmat.seeds import stream

FORMULAS, MOLECULES, MIXTURES = 1000, 1000, 2000
MANY = 16000  # formulas for two processes: enough work to be worth loading twice
FREE = 1.5
SIGMA = "conductivity_s_cm"


def formulas(n: int) -> list[str]:
    """Different oxides, sulphides and halides of lithium with up to five other elements."""
    rng = stream(1, "bench", "formulas")
    metals, anions = ["La", "Zr", "Ti", "Al", "Ge", "P", "Si", "Ta", "Nb", "Y", "Sc", "Mg"], ["O", "S", "Cl", "F", "Br"]
    out: dict[str, None] = {}
    while len(out) < n:
        some = rng.choice(metals, size=rng.integers(1, 5), replace=False)
        body = "".join(f"{m}{rng.integers(1, 40) / 10:g}" for m in some)
        out[f"Li{rng.integers(1, 80) / 10:g}{body}{rng.choice(anions)}{rng.integers(1, 13)}"] = None
    return list(out)


def molecules(n: int) -> list[str]:
    """Different chains of the fragments that solvents and repeat units are made of."""
    rng = stream(1, "bench", "molecules")
    parts = ["C", "CC", "CO", "C(F)(F)", "C(=O)O", "C(C)", "C(C#N)", "OCC", "S(=O)(=O)", "[Si](C)(C)O", "c1ccc(cc1)", "N(C)"]
    out: dict[str, None] = {}
    while len(out) < n:
        out["C" + "".join(rng.choice(parts, size=rng.integers(2, 9))) + "C"] = None
    return list(out)


def mixtures(n: int) -> pd.DataFrame:
    """Records of a liquid electrolyte, each a mixture of its own."""
    rng = stream(1, "bench", "mixtures")
    solvents = ["EC", "PC", "DMC", "EMC", "DEC", "DME", "DMSO", "EA", "MA"]
    shares = rng.dirichlet(np.ones(3), size=n)
    names = [rng.choice(solvents, size=3, replace=False) for _ in range(n)]
    return pd.DataFrame(
        {
            "salt": rng.choice(["LiPF6", "LiBF4", "LiTFSI"], size=n),
            "concentration": rng.uniform(0.1, 3.0, size=n),
            "concentration_basis": "mol/kg",
            "solvents": [json.dumps(dict(zip(map(str, a), map(float, s)))) for a, s in zip(names, shares)],
            "solvent_basis": "w",
            "temperature_k": rng.uniform(250.0, 350.0, size=n),
        }
    )


def inputs(kind: str) -> tuple[Featurizer, pd.DataFrame]:
    """A featurizer with its defaults and the records it is timed on."""
    if kind == "composition":
        rt = record_type("solid_electrolyte")
        return CompositionFeatures.of({}, rt, SIGMA), pd.DataFrame({"formula": formulas(FORMULAS)})
    if kind == "molecule":
        rt = record_type("polymer_electrolyte")
        options = {"fields": ["polymer_smiles"]}
        return MoleculeFeatures.of(options, rt, SIGMA), pd.DataFrame({"polymer_smiles": molecules(MOLECULES)})
    return FormulationFeatures.of({}, record_type("liquid_electrolyte"), SIGMA), mixtures(MIXTURES)


def rate(run: Callable[[], Any], rows: int, times: int = 2, clock: Callable[[], float] = time.process_time) -> float:
    """Rows per second of ``clock`` in the best of ``times`` runs, with what libraries print kept off the terminal."""
    best = 0.0
    for _ in range(times):
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            started = clock()
            run()
            best = max(best, rows / (clock() - started))
    return round(best, 1)


@contextlib.contextmanager
def workers(count: int | None) -> Iterator[None]:
    """Sets FEDMAT_WORKERS, or unsets it for None: the default."""
    before = os.environ.pop(WORKERS, None)
    if count is not None:
        os.environ[WORKERS] = str(count)
    try:
        yield
    finally:
        os.environ.pop(WORKERS, None)
        if before is not None:
            os.environ[WORKERS] = before


def ours(kind: str) -> dict[str, Any]:
    """Rows per processor second of one of fedmat's featurizers in one process, and what loading its libraries costs."""
    part, records = inputs(kind)
    part.transform(records[:2])  # loads the libraries
    with workers(1):
        speed = rate(lambda: part.transform(records), len(records))
    return {"rows": len(records), "columns": len(part.names), "rows_per_cpu_s": speed, "load_cpu_s": load(kind)}


def load(kind: str) -> float:
    """Processor seconds of a fresh process that featurizes two records; started with ``--load``."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "benchmarks.featurization", "--load", kind]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2)


def second_core() -> float:
    """Work that two loops do in two seconds over that of one loop: 2 with a free second core, 1 without."""
    loop = "import time\nn, end = 0, time.time() + 2\nwhile time.time() < end: n += 1 + 0 * sum(range(1000))\nprint(n)"

    def work(count: int) -> int:
        started = [subprocess.Popen([sys.executable, "-c", loop], stdout=subprocess.PIPE, text=True) for _ in range(count)]
        return sum(int(p.communicate()[0]) for p in started)

    return round(work(2) / work(1), 2)


def two_processes() -> dict[str, Any]:
    """Rows per second by the clock in one process, in two and by default, and of matminer in one and in two."""
    gain = second_core()
    out: dict[str, Any] = {"second_core": gain}
    if gain < FREE:
        return out | {"measured": False, "why": f"no second core is free (needs {FREE}); run again on an idle machine"}
    part, _ = inputs("composition")
    records = pd.DataFrame({"formula": formulas(MANY)})
    kept: dict[str, bytes] = {}
    speed: dict[str, float] = {}
    for name, count in (("1 process", 1), ("2 processes", 2), ("default", None)):

        def run(key: str = name) -> None:
            kept[key] = part.transform(records).tobytes()

        with workers(count):
            speed[name] = rate(run, MANY, 1, time.perf_counter)
    speed |= {f"matminer, {jobs}": rate(matminer(records["formula"], jobs), MANY, 1, time.perf_counter) for jobs in (1, 2)}
    still = second_core()  # others may have come meanwhile
    return out | {
        "second_core_after": still,
        "measured": still >= FREE,
        "rows": MANY,
        "rows_per_s": speed,
        "same_bytes": len(set(kept.values())) == 1,
        "2_to_1_processes": round(speed["2 processes"] / speed["1 process"], 2),
        "default_to_1_process": round(speed["default"] / speed["1 process"], 2),
        "matminer_2_to_1_processes": round(speed["matminer, 2"] / speed["matminer, 1"], 2),
    }


def matminer(texts: Iterable[str], jobs: int = 1) -> Callable[[], Any]:
    """What matminer alone does with the same formulas, parsing included."""
    from matminer.featurizers.composition import ElementProperty
    from pymatgen.core import Composition

    magpie = ElementProperty.from_preset("magpie", impute_nan=False)
    magpie.set_n_jobs(jobs)

    def call() -> Any:
        table = pd.DataFrame({"composition": [Composition(t) for t in texts]})
        return magpie.featurize_dataframe(table, "composition", pbar=False)

    return call


def deepchem(texts: list[str], smiles: list[str]) -> dict[str, float]:
    """Rows per processor second of deepchem alone; it has no second process."""
    import deepchem as dc
    from rdkit import RDLogger

    logging.getLogger("deepchem").setLevel(logging.ERROR)
    RDLogger.DisableLog("rdApp.*")
    few = smiles[:300]
    return {
        "ElementPropertyFingerprint": rate(lambda: dc.feat.ElementPropertyFingerprint().featurize(texts[:300]), 300),
        "CircularFingerprint": rate(lambda: dc.feat.CircularFingerprint(size=256, radius=2).featurize(smiles), len(smiles)),
        "RDKitDescriptors": rate(lambda: dc.feat.RDKitDescriptors().featurize(few), len(few)),
    }


def cached(folder: Path) -> dict[str, float]:
    """Rows per processor second of a site's whole feature table, first computed, then from its cache."""
    from fedmat.config import Admission, FeatureSpec, SiteConfig, Splits, Task
    from fedmat.data.records import prepare
    from fedmat.features.dataset import featurize
    from fedmat.features.registry import build

    rt = record_type("solid_electrolyte")
    texts = formulas(1000)
    pd.DataFrame({"formula": texts, "T": 298.0, "sigma": np.linspace(1e-6, 1e-3, len(texts))}).to_csv(folder / "d.csv")
    columns = {
        "formula": "formula",
        "temperature_k": {"from": "T", "unit": "kelvin"},
        SIGMA: {"from": "sigma", "unit": "S/cm"},
    }
    source = {"adapter": "csv", "path": "d.csv", "columns": columns}
    site = SiteConfig.model_validate({"site": "lab", "organisation": "Lab", "record_type": rt.name, "sources": [source]})
    prepare(site, folder, folder / "w", target=SIGMA, admission=Admission())
    task = Task(name="sigma", record_type=rt.name, target=SIGMA, unit="siemens / centimeter", transform="log10")
    chosen = build([FeatureSpec(name="composition")], rt, SIGMA)

    def run() -> Any:
        return featurize(folder / "w", chosen, (task,), Splits(), rt)

    with workers(1):
        return {"first": rate(run, len(texts), 1), "from_cache": rate(run, len(texts), 3)}


def main() -> None:
    """Measures everything and prints the comparison."""
    out: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "load_before": round(os.getloadavg()[0], 1)}
    for kind in ("composition", "molecule", "formulation"):
        out[kind] = ours(kind)
    out["matminer_rows_per_cpu_s"] = rate(matminer(formulas(FORMULAS)), FORMULAS)
    out["deepchem_rows_per_cpu_s"] = others = deepchem(formulas(FORMULAS), molecules(MOLECULES))
    with tempfile.TemporaryDirectory() as folder:
        out["feature_table_rows_per_cpu_s"] = table = cached(Path(folder))
    composition, molecule = out["composition"]["rows_per_cpu_s"], out["molecule"]["rows_per_cpu_s"]
    out["ratios"] = {
        "composition_to_matminer": round(composition / out["matminer_rows_per_cpu_s"], 2),
        "composition_to_deepchem": round(composition / others["ElementPropertyFingerprint"], 2),
        "molecule_to_deepchem_fingerprint": round(molecule / others["CircularFingerprint"], 2),
        "molecule_to_deepchem_descriptors": round(molecule / others["RDKitDescriptors"], 2),
        "cache_to_first": round(table["from_cache"] / table["first"], 1),
    }
    out["two_processes"] = two_processes()
    out["load_after"] = round(os.getloadavg()[0], 1)
    json.dump(out, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        timed, table = inputs(sys.argv[2])
        timed.transform(table[:2])
    else:
        main()
