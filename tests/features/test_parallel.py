"""Laws of featurizing in several processes: the same bytes, the same refusals, and a helper's fate is nobody's."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from fedmat.data.contract import record_type
from fedmat.errors import ConfigError, FeatureError
from fedmat.features import common
from fedmat.features.composition import CompositionFeatures

PARENT = int(os.environ.setdefault("FEDMAT_TEST_PARENT", str(os.getpid())))  # a helper inherits it


@dataclass(frozen=True)
class Slow:
    """A featurizer whose cost and faults a test decides."""

    fault: str = ""
    seconds: float = 0.0
    meet: str = ""  # a file: a helper makes it when it is handed a part, this process waits for it in its second part

    def one(self, text: str) -> list[float]:
        time.sleep(self.seconds)
        if self.meet and int(text) > 0:
            if os.getpid() != PARENT:
                Path(self.meet).touch()
            for _ in range(6000):
                if Path(self.meet).exists():
                    break
                time.sleep(0.01)
        if self.fault == "dies" and os.getpid() != PARENT and int(text) > 0:
            os._exit(3)
        if self.fault == "raises" and int(text) == 150:
            raise KeyError("no ValueError")
        if self.fault == "refuses" and int(text) in (120, 230):
            raise ValueError(f"reason {text}")
        if self.fault == "prints" and os.getpid() != PARENT:
            print("SECRET-CELL", flush=True)
            print("SECRET-CELL", file=sys.stderr, flush=True)
        return [float(text), float(int(text) % 7) / 3.0, float(os.getpid() != PARENT)]


def run(workers: int | str | None, monkeypatch: pytest.MonkeyPatch, *, n: int = 300, compute=None, **slow) -> np.ndarray:
    if workers is None:
        monkeypatch.delenv(common.WORKERS, raising=False)
    else:
        monkeypatch.setenv(common.WORKERS, str(workers))
    records = pd.DataFrame({"source": "s", "source_row": np.arange(n) + 1, "x": [str(i) for i in range(n)]})
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])  # a helper finds this module where pytest did
    return common.per_distinct(records, [records["x"]], 3, compute or Slow(**slow).one, "slow: field 'x'")


def test_helpers_take_part_and_change_no_bit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    alone = run(1, monkeypatch)
    shared = run(2, monkeypatch, meet=str(tmp_path / "met"))
    assert alone[:, :2].tobytes() == shared[:, :2].tobytes()
    assert not alone[:, 2].any() and 32 <= shared[:, 2].sum() < 300


def test_compositions_have_the_same_bytes_in_one_process_and_two(monkeypatch: pytest.MonkeyPatch) -> None:
    formulas = [f"Li{i}La3Zr2O{12 + i % 5}" for i in range(1, 41)] * 2
    part = CompositionFeatures.of({}, record_type("solid_electrolyte"), "conductivity_s_cm")
    out = []
    for workers in ("0", "2"):
        monkeypatch.setenv(common.WORKERS, workers)
        out.append(part.transform(pd.DataFrame({"formula": formulas})))
    assert out[0].tobytes() == out[1].tobytes()


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_refused_row_is_named_without_its_value(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    for _ in range(3):
        with pytest.raises(FeatureError) as caught:
            run(workers, monkeypatch, fault="refuses", seconds=0.002)
        assert caught.value.what == "slow: field 'x': row 121 of source 's': reason 120"
        assert caught.value.__cause__ is None


@pytest.mark.parametrize("workers", [1, 2])
def test_any_other_error_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    with pytest.raises(KeyError, match="no ValueError"):
        run(workers, monkeypatch, fault="raises", seconds=0.002)


def test_a_dead_helpers_rows_are_computed_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = run(3, monkeypatch, fault="dies", meet=str(tmp_path / "met"))
    assert (tmp_path / "met").exists()
    assert out[:, 0].tolist() == list(range(300)) and not out[:, 2].any()


def test_what_helpers_print_goes_nowhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(2, monkeypatch, fault="prints", meet=str(tmp_path / "met"))[:, 2].any()
    assert capfd.readouterr() == ("", "")


def test_what_cannot_travel_is_computed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    out = run(2, monkeypatch, compute=lambda text: [float(text), 0.0, 0.0])
    assert out[:, 0].tolist() == list(range(300))


def test_little_work_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(common.subprocess, "Popen", refuse)
    run(None, monkeypatch)  # far below 8 s
    run(0, monkeypatch, seconds=0.001)
    run(1, monkeypatch, seconds=0.001)
    with pytest.raises(AssertionError, match="was started"):
        run(2, monkeypatch)


@pytest.mark.parametrize(
    ("cores", "share", "seconds", "wanted"),
    [
        (1, 1.0, 1000.0, 0),
        (2, 1.0, 1000.0, 1),
        (3, 0.95, 1000.0, 2),
        (64, 1.0, 1000.0, 3),
        (2, 0.5, 1000.0, 0),  # two cores to run on, none of them free: a helper would halve this process
        (2, 1.0, 5.0, 0),  # over before a helper has loaded
    ],
)
def test_helpers_start_by_themselves_for_much_work_and_on_free_cores_only(
    monkeypatch: pytest.MonkeyPatch, cores: int, share: float, seconds: float, wanted: int
) -> None:
    ticks = iter(range(10**9))
    now = [0.0]

    def clock() -> float:
        now[0] = next(ticks) * seconds / 200
        return now[0]

    started: list[int] = []

    def popen(*_: object, **__: object) -> None:
        started.append(1)
        raise OSError

    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=clock, process_time=lambda: share * now[0]))
    monkeypatch.setattr(common.subprocess, "Popen", popen)
    monkeypatch.setattr(common.os, "sched_getaffinity", lambda _: set(range(cores)))
    run(None, monkeypatch, n=2000)
    assert len(started) == wanted


@pytest.mark.parametrize("value", ["two", "-1", "1.5", "999", "²"])
def test_a_number_of_processes_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    with pytest.raises(ConfigError, match="FEDMAT_WORKERS"):
        run(value, monkeypatch)


def test_no_records_need_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(2, monkeypatch, n=0).shape == (0, 3)
    assert run(2, monkeypatch, n=1).shape == (1, 3)


def test_a_script_without_a_guard_runs_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "print('once')\n"
        "import pandas as pd\n"
        "from fedmat.features import common\n"
        "from test_parallel import Slow\n"
        "x = pd.DataFrame({'x': [str(i) for i in range(400)]})\n"
        "out = common.per_distinct(x, [x['x']], 3, Slow(seconds=0.01).one, 'slow')\n"
        "print(len(out))\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {common.WORKERS: "2", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["once", "400"]
