"""Takes the pictures of the documentation: ``make screenshots`` (a few minutes, Linux, a Chromium or Chrome on the path).

Knows: the demonstration consortium, its pages in Prefect and MLflow, how to steer a browser. Refuses to know: anything of the
machine it runs on: everything happens below one neutral folder, and a page that shows another path is an error and no picture.

What the pictures show has happened: the server, the deployment with its schedule, one run that the schedule started, the model it
registered. Everything that is started here ends here.

References:
    Chrome DevTools Protocol (Page.navigate, Page.captureScreenshot, Runtime.evaluate).
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedmat import console
from fedmat.errors import ConfigError, FedmatError, ServiceError
from flows.serve import mlflow_server, stopped_by_signal
from flows.services import LOOPBACK, Child, take_port

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
FOLDER = Path(tempfile.gettempdir()) / "fedmat-demo"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTH, HEIGHT, MOST_BYTES = 1400, 900, 200_000
SCALE = 0.8  # the pages are laid out for wide windows
ROUNDS, EVERY_S = 8, 120
START_S, RUN_S, PAGE_S = 180.0, 900.0, 60.0
REGISTERED = "fedmat-cell-energy"


def main() -> int:
    """Takes all pictures; returns the exit code."""
    try:
        with stopped_by_signal(), workspace() as folder:
            take_all(browser_program(), folder)
    except FedmatError as error:
        console.show_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def take_all(program: str, folder: Path) -> None:
    """Starts the scheduled deployment, waits for a run of its own accord, and takes the pictures."""
    port = take_port(0, "--prefect-port")
    store = f"sqlite:///{folder}/mlflow/mlflow.db"
    command = [
        sys.executable, "-m", "fedmat", "serve", "cells/consortium.yaml", "--every", str(EVERY_S), "--rounds", str(ROUNDS),
        "--home", str(folder / "workspace"), "--tracking-uri", store, "--prefect-port", str(port),
    ]  # fmt: skip
    env = {"PYTHONPATH": str(ROOT), "PREFECT_RUNNER_POLL_FREQUENCY": "2", "PREFECT_API_URL": ""}
    url = f"http://{LOOPBACK}:{port}"
    with started(Child("the scheduled deployment", command, url=f"{url}/api/health", log=folder / "serve.log", env=env)):
        console.say("waiting for the schedule to start a run, and for the run ...")
        run = scheduled_run(f"{url}/api")
        server = mlflow_server(folder, store, port=0)
        with started(server), Browser(program, folder / "browser") as browser:
            take_prefect(browser, url, run)
            take_mlflow(browser, server.url.removesuffix("/health"))


def take_prefect(browser: Browser, url: str, run: dict[str, Any]) -> None:
    """Takes the pages of Prefect: the list of runs, the run, its rounds, the deployment."""
    name = str(run["name"])
    rounds = artifact(f"{url}/api", "simulated-cells-rounds")
    browser.take("prefect-runs", f"{url}/runs", [name, "consortium-run", "simulated-cells/ev-cells"], top="Hide subflows")
    browser.take("prefect-run", f"{url}/runs/flow-run/{run['id']}", [name, "Completed"])
    federate = part(f"{url}/api", run, "federate")
    browser.take("prefect-progress", f"{url}/runs/flow-run/{federate}", [name, "rounds done of"], click="Artifacts")
    browser.take("prefect-rounds", f"{url}/artifacts/artifact/{rounds}", ["every round of this run", "learning rate"])
    browser.take("prefect-deployment", f"{url}/deployments/deployment/{run['deployment_id']}", ["nightly", "Every"])


def take_mlflow(browser: Browser, url: str) -> None:
    """Takes MLflow's pages of registered models."""
    browser.take("mlflow-models", f"{url}/#/models", [REGISTERED, "champion"])
    browser.take("mlflow-model", f"{url}/#/models/{REGISTERED}", [REGISTERED, "champion"])


# --- the workspace and what runs in it ------------------------------------------------------------------------------


@contextmanager
def workspace() -> Iterator[Path]:
    """Gives the neutral folder with a copy of the demonstration consortium in it; removes it unless its logs are needed."""
    try:
        FOLDER.mkdir(mode=0o700)
    except FileExistsError:
        raise ConfigError(f"{FOLDER}: is there already", fix="remove it: it is left over, or another one runs") from None
    before, keep = Path.cwd(), False
    try:
        for name in ("consortium.yaml", "sites"):
            source, target = ROOT / "examples" / "cells" / name, FOLDER / "cells" / name
            if source.is_dir():
                shutil.copytree(source, target)
            else:
                target.parent.mkdir()
                shutil.copyfile(source, target)
        os.chdir(FOLDER)
        yield FOLDER
    except ServiceError:
        keep = True
        raise
    finally:
        os.chdir(before)
        if not keep:
            shutil.rmtree(FOLDER, ignore_errors=True)


@contextmanager
def started(child: Child) -> Iterator[None]:
    """Waits until a server answers, and ends it and all it started."""
    try:
        child.wait_ready(START_S)
        yield
    finally:
        child.stop(60.0)


def scheduled_run(api: str) -> dict[str, Any]:
    """Returns a run that the schedule started, once it is completed."""
    wanted = {
        "deployments": {"name": {"any_": ["nightly"]}},
        "flow_runs": {"state": {"type": {"any_": ["COMPLETED", "FAILED"]}}},
    }

    def done() -> dict[str, Any] | None:
        return next((r for r in ask(f"{api}/flow_runs/filter", wanted) if r["auto_scheduled"]), None)

    found: dict[str, Any] = until(done, RUN_S, "a scheduled run")
    if found["state_type"] != "COMPLETED":
        raise ServiceError("the scheduled run failed", fix=f"see {FOLDER}/serve.log")
    return found


def part(api: str, run: dict[str, Any], flow: str) -> str:
    """Returns the id of a run's part by a flow."""
    wanted = {"flows": {"name": {"any_": [flow]}}, "flow_runs": {"name": {"any_": [run["name"]]}}, "sort": "START_TIME_ASC"}
    return str(ask(f"{api}/flow_runs/filter", wanted)[0]["id"])


def artifact(api: str, key: str) -> str:
    """Returns the id of the newest artifact of a key."""
    return str(ask(f"{api}/artifacts/filter", {"artifacts": {"key": {"any_": [key]}}, "sort": "CREATED_DESC"})[0]["id"])


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """Returns the JSON that an address answers with."""
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=30) as reply:
        return json.load(reply)


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Returns the first true value of ``condition``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.3)
    raise ServiceError(f"{what}: not there within {seconds:.0f} s", fix=f"see the logs in {FOLDER}")


# --- the browser ----------------------------------------------------------------------------------------------------


def browser_program() -> str:
    """Returns the path of the browser."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise ServiceError(
            f"no browser: none of {', '.join(BROWSERS)} is on the path",
            fix="install Chromium (Debian, Ubuntu: apt-get install chromium; Fedora: dnf install chromium) or Google Chrome",
        )
    return found


class Browser:
    """A browser without a window, with a profile of its own, that calls nobody.

    Args:
        profile: folder for its profile.
    """

    def __init__(self, program: str, profile: Path) -> None:
        options = [
            "--headless=new", "--no-sandbox", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}", f"--user-data-dir={profile}",
            "--remote-debugging-port=0", "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--disable-gpu", "--lang=en-GB", "about:blank",
        ]  # fmt: skip
        self._port = profile / "DevToolsActivePort"
        self._child = Child("the browser", [program, *options], log=profile.with_suffix(".log"), env={"TZ": "UTC"})
        self._numbers = itertools.count(1)

    def __enter__(self) -> Browser:
        from websockets.sync.client import connect

        try:
            until(self._port.exists, START_S, "the browser")
            address = f"http://{LOOPBACK}:{self._port.read_text().split()[0]}/json/list"
            page = until(lambda: [t for t in ask(address) if t["type"] == "page"], START_S, "the browser's page")[0]
            self._socket = connect(page["webSocketDebuggerUrl"], max_size=None)
            size = {"width": round(WIDTH / SCALE), "height": round(HEIGHT / SCALE)}
            self._do("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=SCALE, mobile=False)
        except BaseException:
            self._child.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._child.stop()

    def take(self, name: str, url: str, shown: Sequence[str], *, click: str = "", top: str = "") -> None:
        """Writes a picture of a page once it shows all of the given texts.

        Args:
            click: text of a tab to choose first.
            top: text to scroll to.

        Raises:
            ServiceError: it does not, or it shows something of this machine, or the picture is too large.
        """
        self._do("Page.navigate", url=url)
        if click:
            until(lambda: self._run(f"(e => e && (e.click(), true))({_found(click)})"), PAGE_S, f"{url} with {click}")
        until(lambda: all(text in self._text() for text in shown), PAGE_S, f"{url} with {', '.join(shown)}")
        for _ in range(3):  # one dialog may follow another
            self._run(_CLOSE)
            time.sleep(0.7)
        if top:
            self._run(f"{_found(top)}?.scrollIntoView({{block: 'start'}})")
        time.sleep(1.0)  # what moves comes to rest
        text = self._text()
        if told := [word for word in of_this_machine() if word in text]:
            raise ServiceError(f"{url} shows {', '.join(told)}", fix="keep it out of the demonstration's parameters and names")
        data = small(base64.b64decode(self._do("Page.captureScreenshot", format="png")["data"]))
        if len(data) > MOST_BYTES:
            raise ServiceError(f"{name}.png has {len(data)} bytes, at most {MOST_BYTES} are kept", fix="show less on the page")
        IMAGES.mkdir(exist_ok=True)
        (IMAGES / f"{name}.png").write_bytes(data)
        console.say(f"docs/images/{name}.png, {len(data) // 1000} kB")

    def _text(self) -> str:
        return str(self._run("document.body ? document.body.innerText : ''"))

    def _run(self, script: str) -> Any:
        return self._do("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def _do(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            reply = json.loads(self._socket.recv(timeout=PAGE_S))
            if reply.get("id") == number:
                if "error" in reply:
                    raise ServiceError(f"the browser refuses {method}", fix="use a current Chromium or Chrome")
                found: dict[str, Any] = reply["result"]
                return found


# MLflow greets a first visitor with dialogs and panels that cover the page.
_CLOSE = "document.querySelectorAll('button[aria-label^=\"Close\"], .ant-modal-close').forEach(b => b.click())"


def _found(text: str) -> str:
    """The innermost element with exactly this text, as JavaScript."""
    return f"[...document.querySelectorAll('*')].find(e => e.childElementCount === 0 && e.innerText === {json.dumps(text)})"


def of_this_machine() -> list[str]:
    """Returns what no picture may show: this checkout's path, the user's home, the machine's name."""
    words = [str(ROOT), str(Path.home()), socket.gethostname()]
    return [w for w in words if len(w) > 3 and not re.fullmatch(r"localhost|[/\\w]?", w)]


def small(png: bytes) -> bytes:
    """Returns a picture with at most 256 colours: enough for pages, and a third of the bytes."""
    from PIL import Image

    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


if __name__ == "__main__":
    sys.exit(main())
