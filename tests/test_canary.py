"""Law 2: nothing raw leaves a site, by any road.

Unique values are planted in one site's file, in rows that are accepted and in rows that are not; the whole run is done
under a real Prefect server, registered in MLflow and reported; then every byte outside the sites' own folders is searched
for them in every encoding that any of the tools writes. The same search must find them inside the site's folder.
"""

from __future__ import annotations

import base64
import csv
import json
import os
import pickle
import re
import sqlite3
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import small
import yaml
from leaks import contents

from fedmat import bench_report, benchmark, comparison, pipeline, wire
from fedmat.domain import (
    Attestation,
    Baseline,
    Calibration,
    Evaluation,
    GlobalModel,
    Offer,
    Removed,
    Statements,
    StatementsRequest,
    Statistics,
    Update,
)
from fedmat.federation.coordinator import Coordinator
from fedmat.federation.engine import Handler, InProcessEngine
from fedmat.models.network import Architecture

pytestmark = pytest.mark.timeout(600)

SITE = "mill"
DOI, ROUTE = "canary-doi-5e1f9b", "canary-route-91c3d7"
BAD_CELL, BAD_FORMULA, NO_TARGET = "canary-badcell-77aa01", "Qq7canaryformula", "canary-notarget-31bb"
WORDS = (DOI, ROUTE, BAD_CELL, BAD_FORMULA, NO_TARGET)
OUT_OF_RANGE = 987654.3217
# Hottest and hardest, coldest and softest of the site: an extreme is what sums, ranges and axis limits would give away.
PLANTED = [
    (f"Cu{0.51 + i / 97:.5f}Fe{0.49 - i / 97:.5f}", 700.1234567 + 3.7654321 * i, 5123.456789 + 171.6543219 * i)
    for i in range(8)
] + [
    (f"Cu{0.41 + i / 89:.5f}Fe{0.59 - i / 89:.5f}", -190.7654321 - 2.3456789 * i, 1.23456789 + 0.0987654 * i) for i in range(8)
]

RUN = """
import logging, sys
logging.basicConfig(level=logging.DEBUG)
from pathlib import Path
from fedmat.errors import FedmatError
from flows import run_all
root = Path(sys.argv[1])
given = dict(home=root / "home", tracking_uri=f"sqlite:///{root}/mlruns/mlflow.db", orchestrator="prefect", quiet=False)
outcome = run_all(root / "c/consortium.yaml", **given)
print(outcome.run.run_id, outcome.registered, outcome.metrics())
lab = root / "c/mill/lab.csv"
lab.write_text(lab.read_text() + "canary-badcell-77aa01,25,canary-badcell-77aa01,canary-doi-5e1f9b,canary-route-91c3d7\\n" * 90)
try:
    again = run_all(root / "c/consortium.yaml", **given)
    print("REFUSED", again.metrics()["exclusions"])
except FedmatError as error:
    logging.exception("as expected")
    print("REFUSED", error)
"""


@dataclass(frozen=True)
class World:
    """The finished run and all its surroundings, below one folder."""

    root: Path

    @property
    def site(self) -> Path:
        return self.root / "home" / "sites" / SITE

    def outside(self) -> Iterator[Path]:
        """Every file that is neither in a site's folder, nor in its own DVC remote, nor its raw data."""
        own = [
            self.root / "home" / "sites",
            self.root / "home" / "remotes",
            self.root / "c",
            self.root / "bench/data/tiny/sites",
        ]
        for path in sorted(self.root.rglob("*")):
            if path.is_file() and not path.is_symlink() and not any(path.is_relative_to(o) for o in own):
                yield path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("canary")
    consortium = small.build(root / "c", rounds=4)
    plant(root / "c" / SITE)
    for name in ("tmp", "user", "logs"):
        (root / name).mkdir()
    with (root / "logs/stdout").open("wb") as out, (root / "logs/stderr").open("wb") as err:
        env = {"TMPDIR": str(root / "tmp"), "HOME": str(root / "user"), "PREFECT_LOGGING_LEVEL": "DEBUG"}
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(root)], stdout=out, stderr=err, cwd=root, env={**os.environ, **env}, check=False
        )
    assert done.returncode == 0, (root / "logs/stderr").read_text()[-3000:]
    messages(consortium, root)
    bench(consortium, root)
    return World(root)


def plant(folder: Path) -> None:
    """Adds the canaries to the site's file and maps two text columns that are no features."""
    settings = yaml.safe_load((folder / "site.yaml").read_text())
    settings["sources"][0]["columns"] |= {"doi": "Reference", "processing": "Route"}
    (folder / "site.yaml").write_text(yaml.safe_dump(settings))
    with (folder / "lab.csv").open(newline="") as handle:
        head, *rows = list(csv.reader(handle))
    rows = [[*row, "10.1000/plain", "cast"] for row in rows]
    rows += [[formula, repr(celsius), repr(hardness), DOI, ROUTE] for formula, celsius, hardness in PLANTED]
    rows += [
        ["Cu0.5Fe0.5", "25", BAD_CELL, DOI, ROUTE],
        [BAD_FORMULA, "25", "150.5", DOI, ROUTE],
        ["Cu0.5Fe0.5", repr(OUT_OF_RANGE), "151.5", DOI, ROUTE],
        ["Cu0.5Fe0.5", "25", "", NO_TARGET, ROUTE],
    ]
    with (folder / "lab.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows([[*head, "Reference", "Route"], *rows])


class Recorder(InProcessEngine):
    """Delivers like any engine and keeps every message on disk, both ways."""

    def __init__(self, handlers: dict[str, Handler], folder: Path) -> None:
        super().__init__({site: self._kept(site, handler) for site, handler in handlers.items()})
        self._folder, self._count = folder, 0
        folder.mkdir()

    def _kept(self, site: str, handler: Handler) -> Handler:
        def handle(request: bytes) -> bytes:
            reply = handler(request)
            self._count += 1
            (self._folder / f"{self._count:04d}-{site}-down").write_bytes(request)
            (self._folder / f"{self._count:04d}-{site}-up").write_bytes(reply)
            return reply

        return handle


def messages(consortium: Path, root: Path) -> None:
    """Repeats the rounds, baselines and scores of the run with every message kept."""
    from fedmat import baselines

    run = pipeline.open_run(consortium, home=root / "home", run_id="recorded")
    plan = run.plan()
    # the last thing this site did was to have worse data refused; its messages are made from the good version before
    (run.site_folder(SITE) / pipeline.REFUSED).unlink(missing_ok=True)
    handlers = {s: pipeline.build_handler(run, s) for s in run.sites}
    with Recorder(handlers, root / "messages") as engine:
        architecture = Architecture.of(plan.model, plan.tasks, plan.settings)
        coordinator = Coordinator(plan, lambda n: architecture.initial_weights(n, plan.settings.seed), root / "messages")
        list(coordinator.run(engine))
        model = coordinator.model()
        baselines.own_models(engine, plan, model, run.sites)
        for arm in (baselines.Arm("federated", model.weights, model.scaler), baselines.dummy(model)):
            baselines.score(engine, plan, arm, run.sites, radius=dict.fromkeys(run.sites, 10.0))
        told = engine.broadcast(StatementsRequest(plan.sha256, plan.consortium, "recorded", {}), run.sites, 60.0)
        assert all(isinstance(d.answer, Statements) for d in told)


def bench(consortium: Path, root: Path) -> None:
    """Benchmarks the consortium, as whoever operates a simulated one may; its results are for everyone."""
    case = benchmark.Case("tiny", "", "small alloys")
    job = benchmark.Job(case, consortium, root / "bench/data/tiny", root / "bench/tiny", 17, ("dummy", "pooled", "default"), 2)
    lab = root / "c" / SITE / "lab.csv"
    worse = lab.read_text()
    lab.write_text("".join(line for line in worse.splitlines(keepends=True) if not line.startswith(f"{BAD_CELL},")))
    benchmark.run_all([job], 1, lambda _: None)
    lab.write_text(worse)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "SUITE", (case,))
        bench_report.write(comparison.summary(benchmark.load(root / "bench")), {"tiny": case.about}, root / "bench")


# --- what to look for ------------------------------------------------------------------------------------------------


def texts() -> dict[str, bytes]:
    """Planted text."""
    words = [*WORDS]
    for formula, *_ in PLANTED:
        copper, iron = formula.removeprefix("Cu").split("Fe")
        words += [formula, f"Fe{float(iron):g}Cu{float(copper):g}"]  # as the site wrote it, as the contract writes it
    return {word: word.encode() for word in words}


def printed() -> dict[bytes, float]:
    """Planted numbers as programs print them: the first ten characters in full, and rounded to six digits."""
    found: dict[bytes, float] = {b"987654.321": OUT_OF_RANGE, b"9.87654321": OUT_OF_RANGE, b"987928.471": OUT_OF_RANGE}
    for _, celsius, hardness in PLANTED:
        for number in (celsius, celsius + 273.15, hardness, 1000.0 / (celsius + 273.15)):
            found |= {f"{abs(number):{form}}"[:10].encode(): number for form in (".11g", ".11e", ".6g")}
            found[f"{abs(number):.5e}"[:7].encode()] = number
    return found


def encodings(word: bytes) -> Iterator[bytes]:
    """The ways a program writes a text."""
    yield word
    for code in ("utf-16-le", "utf-16-be", "utf-32-le"):
        yield word.decode().encode(code)
    yield word.hex().encode()
    for shift in range(3):
        coded = base64.b64encode(b"\0" * shift + word)
        yield coded[-(-shift * 4 // 3) + (1 if shift else 0) : len(coded) - 4]  # what does not depend on the neighbours


def doubles(world: World) -> dict[str, bytes]:
    """Every planted number, also as the model sees it, as the eight bytes of a double, both ways round."""
    records = pd.read_parquet(world.site / "records.parquet")
    planted = records[records["doi"] == DOI]
    assert len(planted) == len(PLANTED)
    values = {float(v) for c in ("temperature_k", "hardness_hv") for v in planted[c]}
    values |= {1000.0 / float(v) for v in planted["temperature_k"]} | {float(np.log10(v)) for v in planted["hardness_hv"]}
    values |= {v for _, c, h in PLANTED for v in (c, h)} | {OUT_OF_RANGE, OUT_OF_RANGE + 273.15}
    model = standard(world)
    values |= {(v - model.scaler.y_mean[0]) / model.scaler.y_scale[0] for v in map(float, planted["hardness_hv"])}
    return {f"{order}d {v!r}": struct.pack(f"{order}d", v) for v in values for order in "<>"}


def singles(world: World) -> dict[str, bytes]:
    """The standardised target and rows of standardised features, as the network gets them: float32.

    Four bytes turn up by chance in many megabytes, so a target is looked for where bytes are reproducible, and
    features as pairs of neighbours.
    """
    table, model = features(world), standard(world)
    x, y = model.scaler.features(table.x), model.scaler.target(table.y)
    planted = np.isin(np.round(table.y[:, 0], 6), [round(h, 6) for *_, h in PLANTED])
    assert planted.sum() == len(PLANTED)
    assert set(table.split[planted]) == {0, 1, 2}, "plant more: every split needs a canary"
    found = {f"y {v!r}": np.float32(v).tobytes() for v in y[planted, 0]}
    for row in x[planted]:
        pair = next(i for i in range(len(row) - 1, 0, -1) if abs(row[i]) not in (0.0, 5.0) and row[i - 1] not in (0.0, row[i]))
        found[f"x {row[pair - 1 : pair + 1]}"] = row[pair - 1 : pair + 1].tobytes()
    return found


def standard(world: World) -> GlobalModel:
    folder = world.root / "home" / "runs" / (world.root / "home/runs/latest").read_text()
    return wire.load_model(folder / "model.safetensors")


def features(world: World):  # type: ignore[no-untyped-def]
    return pipeline.site_table(pipeline.open_run(world.root / "c/consortium.yaml", home=world.root / "home"), SITE)


# --- where to look ---------------------------------------------------------------------------------------------------


def found_in(paths: Iterable[Path], needles: Mapping[str, bytes]) -> dict[str, set[str]]:
    """Returns where each needle was found; text is compared without regard to case."""
    hits: dict[str, set[str]] = {}
    folded = {name: needle.lower() for name, needle in needles.items()} if ascii_only(needles) else None
    for path in paths:
        for content in contents(path):
            hay = content.lower() if folded else content
            for name, needle in (folded or needles).items():
                if needle in hay:
                    hits.setdefault(name, set()).add(str(path))
    return hits


def ascii_only(needles: Mapping[str, bytes]) -> bool:
    return all(max(needle) < 128 for needle in needles.values())


def numbers_in(paths: Iterable[Path]) -> dict[float, set[str]]:
    """Returns where each planted number was found printed, in full or rounded."""
    wanted = printed()
    hits: dict[float, set[str]] = {}
    for path in paths:
        for content in contents(path):
            for token in set(re.findall(rb"\d+\.\d{2,}", content)):
                if (number := wanted.get(token[:10])) is not None:
                    hits.setdefault(number, set()).add(str(path))
    return hits


def coded(words: Mapping[str, bytes]) -> dict[str, bytes]:
    return {f"{name} as {code!r}": code for name, word in words.items() for code in encodings(word)}


# --- the law -----------------------------------------------------------------------------------------------------------


def test_the_run_went_every_road(world: World) -> None:
    """Prefect's database, MLflow's store, the report, the messages and the refusal are really there to be searched."""
    said = (world.root / "logs/stdout").read_text()
    assert "fedmat-small-hardness" in said
    assert re.search(r"REFUSED .*mill", said, re.DOTALL)
    with sqlite3.connect(f"file:{world.root}/home/prefect/prefect.db?mode=ro", uri=True) as database:
        states = dict(database.execute("select state_type, count(*) from flow_run group by state_type"))
        logs = database.execute("select count(*) from log").fetchone()[0]
    assert states["COMPLETED"] >= 6
    assert states["FAILED"] >= 1
    assert logs > 30
    names = [str(p) for p in world.outside()]
    for part in (
        "mlruns/mlflow.db", "mlruns/artifacts", "report.html", "rounds.jsonl", "messages/", "prefect/prefect.db",
        "intervals.json", "matching.json", "personal-mill.safetensors", "bench.json", "bench.html", "bench/tiny/17/default.json",
    ):  # fmt: skip
        assert any(part in n for n in names), part
    said_by_the_site = b"".join(p.read_bytes() for p in sorted((world.root / "messages").glob(f"*-{SITE}-up")))
    for kind in (Offer, Removed, Attestation, Statistics, Update, Calibration, Baseline, Evaluation):
        assert f'"!":"{kind.__name__}"'.replace('"', '\\"').encode() in said_by_the_site, kind.__name__
    assert b"mixture" in said_by_the_site


def secret(world: World) -> dict[str, bytes]:
    """The members' matching secrets, of the consortium and of its benchmark, as text and as bytes."""
    paths = [world.root / "home" / pipeline.SECRET, world.root / "bench/data/tiny" / pipeline.SECRET]
    words = {str(p.relative_to(world.root)): p.read_bytes().strip() for p in paths}
    return {**coded(words), **{f"{n} raw": bytes.fromhex(w.decode()) for n, w in words.items()}}


def test_the_matching_secret_is_in_its_own_file_and_nowhere_else(world: World) -> None:
    """Neither in a message, a log or an artefact nor in a site's own folder: who reads any of them can test no guess."""
    where = found_in((p for p in sorted(world.root.rglob("*")) if p.is_file() and not p.is_symlink()), secret(world))
    assert {Path(p).relative_to(world.root).as_posix() for hits in where.values() for p in hits} == {
        f"home/{pipeline.SECRET}", f"bench/data/tiny/{pipeline.SECRET}",
    }  # fmt: skip


def test_keys_of_records_go_to_the_coordinator_and_are_not_kept_there(world: World) -> None:
    run = pipeline.open_run(world.root / "c/consortium.yaml", home=world.root / "home")
    planted = (pd.read_parquet(world.site / "records.parquet")["doi"] == DOI).to_numpy()
    keys = pipeline.matching_keys(run, SITE).keys
    needles = {f"{kind} {i}": k.tobytes() for kind in ("material", "measurement") for i, k in enumerate(keys[kind][planted])}
    hits = {p for found in found_in(world.outside(), needles).values() for p in found}
    assert hits, "the offer holds them"
    assert all(b"Offer" in Path(p).read_bytes() or b"RemoveRequest" in Path(p).read_bytes() for p in hits)
    assert all(p.endswith((f"{SITE}-up", f"{SITE}-down")) for p in hits)


def test_no_text_and_no_printed_number_of_a_record_is_outside_its_site(world: World) -> None:
    assert found_in(world.outside(), coded(texts())) == {}
    assert numbers_in(world.outside()) == {}


def test_no_binary_number_of_a_record_is_outside_its_site(world: World) -> None:
    assert found_in(world.outside(), doubles(world)) == {}


def test_no_standardised_record_is_in_the_run_or_in_a_message(world: World) -> None:
    needles = singles(world)
    pairs = {k: v for k, v in needles.items() if len(v) == 8}
    assert found_in(world.outside(), pairs) == {}
    reproducible = [p for p in world.outside() if p.suffix == ".safetensors" or "messages" in p.parts]
    assert reproducible
    assert found_in(reproducible, needles) == {}


def test_no_record_identifier_is_outside_its_site(world: World) -> None:
    records = pd.read_parquet(world.site / "records.parquet")
    needles = {f"{c} {v}": str(v).encode() for c in ("record_id", "group") for v in set(records[c])}
    assert found_in(world.outside(), needles) == {}


def test_the_same_search_finds_the_canaries_inside(world: World) -> None:
    inside = [p for p in sorted(world.site.rglob("*")) if p.is_file() and not p.is_symlink()]
    assert set(found_in(inside, texts())) >= set(WORDS)
    assert set(found_in([*inside, world.root / "c" / SITE / "lab.csv"], texts())) == set(texts())
    assert set(numbers_in(inside)) >= {OUT_OF_RANGE, *(hardness for *_, hardness in PLANTED)}
    assert len(found_in(inside, doubles(world))) >= 2 * len(PLANTED)


@pytest.mark.parametrize("shift", range(5))
def test_the_search_knows_every_encoding(tmp_path: Path, shift: int) -> None:
    """Each needle is found in a file that hides it the way some tool would, at any alignment."""
    word = b"x" * shift + DOI.upper().encode() + b"tail"
    for number, hidden in enumerate(
        [
            word,
            base64.b64encode(word.lower()),
            word.decode().encode("utf-16-le"),
            zlib.compress(word),
            word.lower().hex().encode(),
        ]
    ):
        path = tmp_path / f"hidden-{number}"
        path.write_bytes(hidden)
        assert found_in([path], coded({DOI: DOI.encode()})), f"encoding {number}"
    stored = tmp_path / "stored.json"  # as Prefect keeps the exception of a failed task, whatever persist_result says
    stored.write_text(json.dumps({"result": base64.encodebytes(pickle.dumps(ValueError(word.lower() * 3))).decode()}))
    assert found_in([stored], coded({DOI: DOI.encode()}))
    page = tmp_path / "page.html"
    page.write_bytes(b"<img src='data:image/svg+xml;base64," + base64.b64encode(word) + b"'>")
    assert found_in([page], coded({DOI: DOI.encode()}))
    with sqlite3.connect(tmp_path / "some.db") as database:
        database.execute("create table t (x text)")
        database.execute("insert into t values (?)", ("y" * 4070 + DOI,))
    assert found_in([tmp_path / "some.db"], {DOI: DOI.encode()})
