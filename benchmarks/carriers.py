"""What it costs to let NVIDIA FLARE carry the rounds: the same consortium in one process, rehearsed over FLARE, and FLARE's own recipe.

Run ``python -m benchmarks.carriers`` (or ``make bench``); needs Linux. Prints one JSON object, or tables with ``--markdown``; progress goes
to stderr. ``--only a,b`` picks parts, ``--sites 20`` makes the consortium larger, ``--from FILE`` shows an earlier result again.

* ``a`` in process: ``examples/cells`` in this process, one site after another. What training itself takes is measured here.
* ``b`` rehearsal: ``fedmat rehearse`` as a command: a FLARE server, per site a FLARE client, its job process and a desk; mutual TLS on
  loopback; local models and evaluation too. From the command to its answer, everything stopped again.
* ``c`` simulator: FLARE's FedAvg recipe in FLARE's simulator, a network of the same shape, a local step that is next to nothing. A round is
  given by the times in FLARE's log and as the difference of two numbers of rounds, which holds what start and end differ by as well.
* ``d`` PocEnv: the same recipe in FLARE's own real deployment on one machine (``PocEnv``). Needs port 8002, which it opens to all addresses.

``b``, ``c`` and ``d`` run once unmeasured with one round: Python compiles what it imports the first time, which is no carrier's cost. The
compiled modules lie in a temporary folder. ``command_first_s`` says what that first run took.

Rounds are given without the first, which loads and compiles; it stands apart. "Training" of a round is what a site takes from request to
answer in ``a``, decoding included. What a round over FLARE takes beyond it is given twice: beyond the slowest site, which counts
waiting for a core as well, and beyond what the sites together take at least on the cores that are here.

Memory is the proportional set size, looked at every second; shared pages are counted once. Bytes are those of the messages, without TLS
and FLARE's own traffic. More sites than the example has are its sites several times under other names, each with four fifths of its rows
(drawn by seed): for the load, not for the accuracy.

References: NVIDIA FLARE 2.9, its recipe and environment guides.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import fedmat.telemetry  # noqa: F401  first: it switches off what libraries would send home
from fedmat.domain import TrainRequest
from fedmat.federation.engine import Engine
from fedmat.seeds import stream

if TYPE_CHECKING:
    from fedmat.domain import Delivery, Request
    from fedmat.federation.engine import Failure
    from fedmat.pipeline import Run

ROOT = Path(__file__).resolve().parent.parent
CONSORTIUM = ROOT / "examples" / "cells" / "consortium.yaml"
PARTS = {"a": "in_process", "b": "rehearsal", "c": "flare_simulator", "d": "flare_poc"}
TITLES = {
    "in_process": "in process",
    "rehearsal": "rehearsal over FLARE",
    "flare_simulator": "FLARE's simulator, FedAvg recipe",
    "flare_poc": "FLARE's PocEnv, FedAvg recipe",
}
FEW, MANY = 3, 8  # rounds of FLARE's recipe
KEPT_ROWS = 0.8
POC_PORT = 8002
MIB = 2**20
_TORCH = (
    "TORCHINDUCTOR_CACHE_DIR"  # torch makes this folder when it is imported, beside other temporary files where nothing is said
)
_MARK = "FEDMAT_BENCHMARK"  # environment variable that every process of a measured command inherits
_LIMIT_S = 900.0
_GRACE_S = 60.0


# --- a: in process ---------------------------------------------------------------------------------------------------


class Watched(Engine):
    """Passes requests on and notes how long each site took to train.

    Attributes:
        training: round -> site -> seconds from request to answer.
    """

    def __init__(self, inner: Engine) -> None:
        self._inner, self.side_by_side = inner, inner.side_by_side
        self.training: dict[int, dict[str, float]] = {}

    def scatter(self, requests: Mapping[str, Request], deadline_s: float) -> Sequence[Delivery]:
        """See :class:`Engine`."""
        found = self._inner.scatter(requests, deadline_s)
        for delivery in found:
            request = requests[delivery.site]
            if isinstance(request, TrainRequest):
                noted = self.training.setdefault(request.round, {})
                noted[delivery.site] = noted.get(delivery.site, 0.0) + delivery.seconds
        return found

    def exchange(self, data: Mapping[str, bytes], deadline_s: float) -> Sequence[tuple[bytes | Failure, float]]:
        """See :class:`Engine`."""
        return self._inner.exchange(data, deadline_s)


def in_process(consortium: Path, rounds: int, folder: Path) -> dict[str, Any]:
    """The rounds in this process, through the steps that ``fedmat run --orchestrator none`` takes up to the model."""
    from fedmat import files, pipeline
    from fedmat.training import trainer

    trainer.warm_up()
    run = pipeline.open_run(consortium, home=folder / "home", rounds=rounds)
    started = time.perf_counter()
    for site in run.sites:
        pipeline.prepare_site(run, site)
        pipeline.featurize_site(run, site)
    prepared = time.perf_counter() - started
    with pipeline.open_engine(run) as inner:
        engine = Watched(inner)
        reports = list(pipeline.train(run, resume=False, engine=engine))
    training = [engine.training[r.round] for r in reports]
    return {
        "prepare_s": round(prepared, 2),
        "train_s": round(time.perf_counter() - started - prepared, 2),
        **round_times([r.seconds for r in reports]),
        "training_slowest_site_s": settled([max(t.values()) for t in training]),
        "training_all_sites_s": settled([sum(t.values()) for t in training]),
        **traffic(pipeline_bytes(run), rounds),
        "model_sha256": files.sha256_file(run.folder / pipeline.MODEL),
    }


def pipeline_bytes(run: Run) -> dict[str, dict[str, int]]:
    """Bytes of each site over all rounds."""
    rows = run.reports()
    return {s: {way: sum(r[f"bytes_{way}"].get(s, 0) for r in rows) for way in ("down", "up")} for s in run.sites}


def round_times(seconds: Sequence[float]) -> dict[str, float]:
    """A round's seconds, without the first, which stands apart."""
    return {"first_round_s": round(seconds[0], 3), "round_s": settled(seconds), "round_longest_s": round(max(seconds[1:]), 3)}


def settled(seconds: Sequence[float]) -> float:
    """Mean of all but the first."""
    return round(sum(seconds[1:]) / len(seconds[1:]), 4)


def traffic(sites: Mapping[str, Mapping[str, int]], rounds: int) -> dict[str, int]:
    """Bytes of the busiest site in a mean round, each way."""
    return {f"bytes_{way}_per_site_and_round": max(t[way] for t in sites.values()) // rounds for way in ("down", "up")}


# --- commands and everything they start --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Finished:
    """A command that ended well.

    Attributes:
        memory: largest sum over its processes, MiB.
        processes: the most at a time.
        left: processes of its that were still there two seconds after it ended; they are gone now.
    """

    seconds: float
    stdout: str
    memory: int
    processes: int
    left: int


class NotMeasured(Exception):
    """A part could not be measured; the text says why."""


def finish(command: Sequence[str], folder: Path, **env: str) -> Finished:
    """Runs a command to its end and sees that nothing it started outlives it.

    Args:
        folder: for its output, and for its temporary files.

    Raises:
        NotMeasured: it failed or took too long.
    """
    mark = secrets.token_hex(8)
    temporary = folder / "t"  # short: sockets lie below
    temporary.mkdir(parents=True, exist_ok=True)
    given = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", _TORCH)}
    given |= {"TMPDIR": str(temporary), _MARK: mark, **env}
    memory = processes = 0
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "flows" / "child.py"), str(os.getpid()), *command],
            cwd=ROOT,
            env=given,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            while (code := _ended(process, 1.0)) is None:
                sizes = [_size(pid) for pid in marked(mark)]
                memory, processes = max(memory, sum(sizes)), max(processes, len(sizes))
                if time.perf_counter() - started > _LIMIT_S:
                    raise NotMeasured(f"did not end within {_LIMIT_S:.0f} s")
            seconds = time.perf_counter() - started
            left = _still_there(mark, 2.0)
        finally:
            end(process, mark)
    if code != 0:
        told = (folder / "stderr").read_text(errors="replace") + (folder / "stdout").read_text(errors="replace")
        sys.stderr.write(told[-4000:] + "\n")
        raise NotMeasured(f"the command ended with status {code}")
    return Finished(seconds, (folder / "stdout").read_text(errors="replace"), memory // MIB, processes, left)


def end(process: subprocess.Popen[bytes], mark: str) -> None:
    """Ends a command that still runs, with time to clean up, and then whatever it left."""
    if process.poll() is None:
        process.terminate()
        _ended(process, _GRACE_S)
    until = time.monotonic() + _GRACE_S
    while (there := list(marked(mark))) and time.monotonic() < until:
        for pid in there:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        process.poll()
        time.sleep(0.1)


def _ended(process: subprocess.Popen[bytes], patience_s: float) -> int | None:
    with suppress(subprocess.TimeoutExpired):
        return process.wait(patience_s)
    return None


def _still_there(mark: str, patience_s: float) -> int:
    until = time.monotonic() + patience_s
    while (left := len(list(marked(mark)))) and time.monotonic() < until:
        time.sleep(0.1)
    return left


def marked(mark: str) -> Iterator[int]:
    """Processes that inherited the mark, in whatever session and whoever their parent is now."""
    wanted = f"{_MARK}={mark}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                yield int(entry.name)


def _size(pid: int) -> int:
    """Proportional set size, bytes; 0 for a process that is gone."""
    with suppress(OSError, StopIteration):
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return 1024 * int(next(line for line in rollup.splitlines() if line.startswith("Pss:")).split()[1])
    return 0


# --- b: rehearsal ------------------------------------------------------------------------------------------------------


def rehearsal(consortium: Path, rounds: int, folder: Path, compiled: Path, *, warm: bool) -> dict[str, Any]:
    """``fedmat rehearse`` as a command."""

    def once(count: int, name: str) -> Finished:
        say(f"rehearsal, rounds: {count}")
        command = [sys.executable, "-m", "fedmat", "rehearse", str(consortium), "--rounds", str(count), "--json"]
        return finish(command, folder / name, PYTHONPYCACHEPREFIX=str(compiled))

    first = once(1, "w").seconds if warm else None
    done = once(rounds, "b")
    found = json.loads(done.stdout)
    phases = list(found["seconds"].items())
    took = {name: round(at - before, 2) for (name, at), (_, before) in zip(phases, [("", 0.0), *phases])}
    return {
        "command_first_s": None if first is None else round(first, 1),
        "command_s": round(done.seconds, 1),
        "command_start_and_end_s": round(done.seconds - phases[-1][1], 2),
        "phases_s": took,
        **round_times(found["round_seconds"]),
        **traffic(found["bytes"]["sites"], rounds),
        "rounds_completed": found["rounds"]["completed"],
        "exclusions": len(found["exclusions"]),
        "memory_mib": found["memory"]["all"] // MIB,
        "memory_largest_of_a_kind_mib": {k: v // MIB for k, v in sorted(found["memory"].items()) if k != "all"},
        "processes_most": done.processes,
        "processes_left": done.left,
        "temporary_files_left": sorted(p.name for p in (folder / "b" / "t").iterdir()),
        "model_sha256": found["model"]["sha256"],
    }


# --- c, d: FLARE's own recipe --------------------------------------------------------------------------------------------


def recipe(kind: str, shape: Sequence[int], sites: int, folder: Path, compiled: Path, *, warm: bool) -> dict[str, Any]:
    """FLARE's FedAvg recipe with two numbers of rounds.

    Args:
        kind: ``simulator`` or ``poc``.
        shape: width of the network's input and of its hidden layers.
    """
    if kind == "poc" and _taken(POC_PORT):
        raise NotMeasured(f"port {POC_PORT} is in use, and PocEnv knows no other")

    def once(rounds: int, name: str) -> tuple[Finished, dict[str, Any]]:
        say(f"FLARE's recipe, {kind}, rounds: {rounds}")
        own = folder / name
        (own / "h").mkdir(parents=True)
        script = [sys.executable, str(ROOT / "benchmarks" / "flare" / "recipe.py")]
        done = finish(
            [*script, kind, str(sites), str(rounds), str(own / "s"), *map(str, shape)],
            own,
            PYTHONPYCACHEPREFIX=str(compiled),
            HOME=str(own / "h"),
            NVFLARE_POC_WORKSPACE=str(own / "p"),
            PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        )
        told = json.loads(done.stdout.strip().splitlines()[-1])
        if told["rounds"] != rounds or told["sites"] != sites or len(told["round_seconds"]) != rounds - 1:
            raise NotMeasured(f"FLARE's record has {told['rounds']} rounds of {told['sites']} sites, not {rounds} of {sites}")
        shutil.rmtree(own, ignore_errors=True)
        return done, told

    first = once(1, "w")[0].seconds if warm else None
    (few, few_told), (many, many_told) = once(FEW, "f"), once(MANY, "m")
    difference = (many_told["finished_s"] - few_told["finished_s"]) / (MANY - FEW)
    return {
        "command_first_s": None if first is None else round(first, 1),
        f"command_{FEW}_rounds_s": round(few.seconds, 1),
        f"command_{MANY}_rounds_s": round(many.seconds, 1),
        f"result_{FEW}_rounds_s": few_told["finished_s"],
        f"result_{MANY}_rounds_s": many_told["finished_s"],
        **round_times(many_told["round_seconds"]),
        "round_by_difference_s": round(difference, 3),
        "parameters": many_told["parameters"],
        "memory_mib": max(few.memory, many.memory),
        "processes_most": max(few.processes, many.processes),
        "processes_left": max(few.left, many.left),
    }


def _taken(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))  # noqa: S104  where PocEnv listens
        except OSError:
            return True
    return False


# --- the consortium ------------------------------------------------------------------------------------------------------


def variation(source: Path, folder: Path, count: int) -> Path:
    """Writes a consortium of ``count`` sites that are those of ``source`` again and again, each with a part of the rows as CSV."""
    from fedmat.config import load_consortium, load_site
    from fedmat.data import adapters, selection

    document = yaml.safe_load(source.read_bytes())
    members = load_consortium(source).members
    made = []
    for number in range(count):
        member = members[number % len(members)]
        name = f"{member.site}-{1 + number // len(members):02d}"
        path = source.parent / member.file
        settings, written = load_site(path), yaml.safe_load(path.read_bytes())
        own = folder / "sites" / name
        own.mkdir(parents=True)
        rng = stream(1, "bench", "rows", number)
        for origin, entry in zip(settings.sources, written["sources"], strict=True):
            rows = adapters.read_raw(origin, path.parent)
            rows = rows.drop(columns=[selection.ROW, selection.PROBLEM], errors="ignore")
            kept = sorted(rng.choice(len(rows), size=int(KEPT_ROWS * len(rows)), replace=False))
            rows.iloc[kept].to_csv(own / f"{origin.name}.csv", index=False)
            notation = {k: v for k, v in origin.options.items() if k in ("decimal", "thousands", "missing")}
            entry |= {"adapter": "csv", "path": f"{origin.name}.csv", "options": notation}
        written |= {"site": name, "organisation": f"{member.organisation} {1 + number // len(members)}"}
        (own / "site.yaml").write_text(yaml.safe_dump(written, sort_keys=False, allow_unicode=True))
        made.append({"site": name, "organisation": written["organisation"], "file": f"sites/{name}/site.yaml"})
    document["members"] = made
    document["plan"]["deduplicate"] = False  # the same records under several names are wanted here
    path = folder / "consortium.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True))
    return path


def network(consortium: Path) -> tuple[tuple[int, ...], int]:
    """Width of the plan's network's input and hidden layers, and its number of parameters."""
    from fedmat.data.contract import record_type
    from fedmat.features.registry import build
    from fedmat.models.network import Architecture
    from fedmat.pipeline import open_run

    run = open_run(consortium)
    plan, config = run.plan(), run.config()
    width = len(build(config.features, record_type(config.task.record_type), config.task.target).names)
    weights = Architecture.of(plan.model, plan.tasks, plan.settings).initial_weights(width, plan.settings.seed)
    return (width, *config.model.hidden), sum(w.size for w in weights.values())


# --- together ------------------------------------------------------------------------------------------------------------


def measure(parts: Sequence[str], rounds: int, sites: int | None, *, warm: bool) -> dict[str, Any]:
    """Measures the parts and compares them."""
    out: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 1),
        "versions": {name: version(name) for name in ("nvflare", "torch", "fedmat")},
        "rounds": rounds,
        "recipe_rounds": [FEW, MANY],
        "warmed_up": warm,
    }
    with _folder() as folder:
        os.environ[_TORCH] = str(folder / "i")
        consortium = CONSORTIUM
        if sites is not None:
            (folder / "c").mkdir()
            consortium = variation(CONSORTIUM, folder / "c", sites)
        shape, parameters = network(consortium)
        count = len(yaml.safe_load(consortium.read_bytes())["members"])
        out |= {"sites": count, "parameters": parameters}
        compiled = folder / "y"
        work: dict[str, Callable[[Path], dict[str, Any]]] = {
            "a": lambda own: in_process(consortium, rounds, own),
            "b": lambda own: rehearsal(consortium, rounds, own, compiled, warm=warm),
            "c": lambda own: recipe("simulator", shape, count, own, compiled, warm=warm),
            "d": lambda own: recipe("poc", shape, count, own, compiled, warm=warm),
        }
        for part in parts:
            say(TITLES[PARTS[part]])
            (folder / part).mkdir()
            try:
                out[PARTS[part]] = work[part](folder / part)
            except NotMeasured as why:
                out[PARTS[part]] = {"measured": False, "why": str(why)}
            except json.JSONDecodeError:
                out[PARTS[part]] = {"measured": False, "why": "the command's answer is no JSON"}
            say(json.dumps(out[PARTS[part]]))
    out["load_after"] = round(os.getloadavg()[0], 1)
    return out | {"compared": compare(out)}


def compare(out: Mapping[str, Any]) -> dict[str, Any]:
    """What only two parts of one run can say."""
    plain, carried = out.get("in_process", {}), out.get("rehearsal", {})
    found: dict[str, Any] = {}
    if "round_s" in plain and "round_s" in carried:
        slowest, everyone = plain["training_slowest_site_s"], plain["training_all_sites_s"]
        least = max(slowest, everyone / out["cores"])
        found["same_model"] = plain["model_sha256"] == carried["model_sha256"]
        found["rehearsal_round_beyond_slowest_site_s"] = round(carried["round_s"] - slowest, 3)
        found["training_on_these_cores_at_least_s"] = round(least, 4)
        found["rehearsal_round_beyond_training_on_these_cores_s"] = round(carried["round_s"] - least, 3)
        found["rehearsal_to_in_process_round"] = round(carried["round_s"] / plain["round_s"], 2)
    for name in ("flare_simulator", "flare_poc"):
        if "round_s" in out.get(name, {}) and "round_s" in carried:
            theirs = out[name]
            per_round = (theirs[f"command_{MANY}_rounds_s"] - theirs[f"command_{FEW}_rounds_s"]) / (MANY - FEW)
            whole = theirs[f"command_{FEW}_rounds_s"] + (out["rounds"] - FEW) * per_round
            found[f"{name}_to_rehearsal_round"] = round(theirs["round_s"] / carried["round_s"], 2)
            found[f"{name}_command_{out['rounds']}_rounds_s"] = round(whole, 1)
            found[f"{name}_to_rehearsal_command"] = round(whole / carried["command_s"], 2)
    return found


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="fm-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- tables --------------------------------------------------------------------------------------------------------------

ROWS = (
    ("from the command to its answer, everything stopped (s)", "command_s"),
    (f"the same, {FEW} rounds (s)", f"command_{FEW}_rounds_s"),
    (f"the same, {MANY} rounds (s)", f"command_{MANY}_rounds_s"),
    ("a first run with one round, compiling what it imports (s)", "command_first_s"),
    ("a round (s)", "round_s"),
    ("the first round (s)", "first_round_s"),
    ("the longest other round (s)", "round_longest_s"),
    (f"a round, by the difference of {FEW} and {MANY} (s)", "round_by_difference_s"),
    ("training of the slowest site, of a round (s)", "training_slowest_site_s"),
    ("training of all sites, of a round (s)", "training_all_sites_s"),
    ("bytes to a site, a round", "bytes_down_per_site_and_round"),
    ("bytes from a site, a round", "bytes_up_per_site_and_round"),
    ("memory of all processes, at most (MiB)", "memory_mib"),
    ("processes, at most", "processes_most"),
    ("processes left", "processes_left"),
    ("temporary files left", "temporary_files_left"),
    ("parameters", "parameters"),
    ("sha256 of the model", "model_sha256"),
)


def labels(rounds: int) -> dict[str, str]:
    """What the comparisons are called in a table."""
    return {
        "same_model": "the same model in process and over FLARE",
        "rehearsal_round_beyond_slowest_site_s": "a rehearsed round beyond the training of its slowest site (s)",
        "training_on_these_cores_at_least_s": "training of all sites on these cores, at least (s)",
        "rehearsal_round_beyond_training_on_these_cores_s": "a rehearsed round beyond that (s)",
        "rehearsal_to_in_process_round": "a rehearsed round to one in process",
        **{
            key: text
            for name, who in (("flare_simulator", "simulator"), ("flare_poc", "PocEnv"))
            for key, text in (
                (f"{name}_to_rehearsal_round", f"a round of the recipe in {who} to a rehearsed one"),
                (
                    f"{name}_command_{rounds}_rounds_s",
                    f"the recipe in {who}, as a command of {rounds} rounds, between the two measured (s)",
                ),
                (f"{name}_to_rehearsal_command", "that to the rehearsal as a command"),
            )
        },
    }


def markdown(out: Mapping[str, Any]) -> str:
    """The result as tables."""
    names = [n for n in TITLES if n in out]
    heads = [TITLES[n] for n in names]
    plain = {"in_process": {"parameters": out["parameters"]}, "rehearsal": {"parameters": out["parameters"]}}
    rows = []
    for label, key in ROWS:
        cells = [_cell({**plain.get(n, {}), **out[n]}.get(key)) for n in names]
        if any(cells):
            rows.append((label, *cells))
    lines = [
        f"{out['sites']} sites, {out['rounds']} rounds, {out['parameters']} parameters; {out['cores']} cores, load {out['load_before']} before "
        f"and {out['load_after']} after; {', '.join(f'{k} {v}' for k, v in out['versions'].items())}; "
        + ("one run before, unmeasured." if out["warmed_up"] else "first runs."),
        "",
        *_table(("", *heads), rows),
    ]
    lines += [f"\nNot measured, {TITLES[n]}: {out[n]['why']}." for n in names if out[n].get("measured") is False]
    carried = out.get("rehearsal", {})
    if "phases_s" in carried:
        phases = {"start and end of the command": carried["command_start_and_end_s"], **carried["phases_s"]}
        lines += ["", *_table(("phase of the rehearsal", "seconds"), [(k, _cell(v)) for k, v in phases.items()])]
        kinds = carried["memory_largest_of_a_kind_mib"]
        lines += ["", *_table(("process of the rehearsal", "largest (MiB)"), [(k, _cell(v)) for k, v in kinds.items()])]
    if out["compared"]:
        said = [(labels(out["rounds"])[k], _cell(v)) for k, v in out["compared"].items()]
        lines += ["", *_table(("compared", ""), said)]
    return "\n".join(lines)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ")
    if isinstance(value, float):
        return f"{value:.3g}" if value < 10 else f"{value:.1f}"
    if isinstance(value, list):
        return ", ".join(f"`{v}`" for v in value) or "none"
    return "" if value is None else f"`{value[:16]}`"


def say(text: str) -> None:
    """Writes a line of news to stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Measures, or reads an earlier result, and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, e.g. a,b")
    parser.add_argument("--rounds", type=int, default=5, help="of a and b; at least 2")
    parser.add_argument("--sites", type=int, help="make a consortium of so many sites out of the example's")
    parser.add_argument("--no-warm-up", action="store_true", help="measure first runs, which compile what they import")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object (the default)")
    form.add_argument("--markdown", action="store_true", help="print tables")
    parser.add_argument("--from", dest="earlier", type=Path, help="show an earlier result, kept as JSON, and measure nothing")
    wanted = parser.parse_args()
    parts = wanted.only.split(",")
    if set(parts) - set(PARTS) or wanted.rounds < 2:
        parser.error(f"--only takes {', '.join(PARTS)}; --rounds at least 2")
    if wanted.earlier is not None:
        out = json.loads(wanted.earlier.read_text())
    else:
        if not Path("/proc/self/smaps_rollup").exists():
            sys.exit("this benchmark needs Linux")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
        out = measure(parts, wanted.rounds, wanted.sites, warm=not wanted.no_warm_up)
    if wanted.markdown:
        print(markdown(out))
    else:
        json.dump(out, sys.stdout, indent=2)
        print()
    failed = [p for p in ("a", "b", "c") if out.get(PARTS[p], {}).get("measured") is False]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
