"""The story as a Workflow Run RO-Crate: a folder with the files that may be shared, and a description of all that may not.

Knows: the Provenance Run Crate profile, which of a bundle's files the charter shows to whom. Refuses to know: records (a bundle has
none), whether the story is true (``fedmat.audit``).

What is withheld is described with its SHA-256 and without its bytes: whoever is given the bytes later can show that they are the ones.
Times are those at which the ledger's entries were signed.

The profile is 0.5, over RO-Crate 1.1: the newest that a validator exists for.

References:
    Soiland-Reyes et al., "Packaging research artefacts with RO-Crate", Data Science 2022. Leo et al., "Recording provenance of
    workflow runs with RO-Crate", PLOS ONE 2024 (process, workflow and provenance run crates). RO-Crate 1.1.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from rocrate.model.computationalworkflow import ComputationalWorkflow
from rocrate.model.contextentity import ContextEntity
from rocrate.rocrate import ROCrate

import fedmat
from fedmat import files
from fedmat._version import __version__
from fedmat.bundle import (
    CONSORTIUM,
    ENVIRONMENT,
    LEDGER,
    MANIFEST,
    SETTLEMENT,
    Bundle,
    egress_file,
    run_file,
)
from fedmat.errors import NotEvidenced, StateError
from fedmat.evidence import ATTESTATIONS, EVALUATIONS, INTERVALS, MATCHING, METRICS, MODEL, PLAN, ROUNDS
from fedmat.provenance.story import JOBS, Job, Step, Story, Thing

Audience = Literal["members", "public"]

RO_CRATE, PROFILE, WORKFLOW_CRATE = "1.1", "0.5", "1.0"
METADATA, README = "ro-crate-metadata.json", "README.md"
_PROFILES = {
    f"https://w3id.org/ro/wfrun/process/{PROFILE}": ("Process Run Crate", PROFILE),
    f"https://w3id.org/ro/wfrun/workflow/{PROFILE}": ("Workflow Run Crate", PROFILE),
    f"https://w3id.org/ro/wfrun/provenance/{PROFILE}": ("Provenance Run Crate", PROFILE),
    f"https://w3id.org/workflowhub/workflow-ro-crate/{WORKFLOW_CRATE}": ("Workflow RO-Crate", WORKFLOW_CRATE),
}
_SHA256 = {"sha256": "https://w3id.org/ro/terms/workflow-run#sha256"}  # a term that RO-Crate 1.1 lacks
_LICENCE_OF_CODE = "https://spdx.org/licenses/Apache-2.0"
_FLOW = Path("flows/federate.py")  # installed beside the package; dvc.yaml only in a clone
_STAGES = Path("dvc.yaml")
_WORKFLOW = "workflow/"
_STEPS: tuple[Job, ...] = ("prepare", "featurize", "round", "evaluate", "contribution", "approve", "register")
"""Told one by one; what each site did in each round is told by its update, and what came before the first round by the run."""

_CLASSES = {
    run_file(MODEL): "model", run_file(METRICS): "metrics", run_file(INTERVALS): "metrics", MANIFEST: "", run_file(CONSORTIUM): "",
}  # fmt: skip
"""File -> what the charter calls it; "" is never shared (the consortium file has paths of the operator's machine in it, the manifest
lists files that may be withheld); everything else counts as the ledger's."""

_ABOUT = {
    LEDGER: "The consortium's ledger: signed entries, checkpoints and cosignatures.",
    run_file(PLAN): "The plan of the run.",
    run_file(ATTESTATIONS): "What each site attested about its data before the first round.",
    run_file(MATCHING): "Records that sites have in common, found blind.",
    run_file(INTERVALS): "Half-widths of the prediction intervals.",
    run_file(ROUNDS): "One report per round.",
    run_file(MODEL): "The model.",
    run_file(EVALUATIONS): "Sums of errors of every model on every site's test groups.",
    run_file(METRICS): "The scores.",
    run_file(SETTLEMENT): "What each member's data was worth, settled.",
    run_file(ENVIRONMENT): "Python and every installed release.",
    run_file(CONSORTIUM): "The consortium file.",
    MANIFEST: "List of the bundle's files.",
}
_FORMATS = {
    ".json": "application/json", ".jsonl": "application/jsonl", ".yaml": "application/yaml", ".py": "text/x-python",
    ".safetensors": "application/octet-stream",
}  # fmt: skip
_LOCAL = {"plan": PLAN, "environment": ENVIRONMENT, "model": MODEL, "evaluation": METRICS}
"""Kind of thing -> the file of the bundle that it is."""


def shared(name: str, story: Story, audience: Audience) -> bool:
    """Tells whether the charter lets a file of a bundle be shown to an audience."""
    kind = _CLASSES.get(name, "ledger")
    return kind != "" and (audience == "members" or story.charter.published.get(kind, "members") == "public")


def write(story: Story, bundle: Bundle, folder: Path, audience: Audience) -> Path:
    """Writes a story as a crate into ``folder``, which is replaced, and returns it.

    Raises:
        StateError: ``folder`` holds something else than a crate.
        NotEvidenced: the ledger has no plan of the run.
    """
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / METADATA).is_file())):
        raise StateError(f"{folder}: is there already and is no crate", fix="name an empty or a new folder")
    crate = _Crate(story, bundle, audience).build()
    if folder.exists():
        shutil.rmtree(folder)
    crate.write(folder)
    return folder


class _Crate:
    def __init__(self, story: Story, bundle: Bundle, audience: Audience) -> None:
        self.story, self.bundle, self.audience = story, bundle, audience
        self.crate: Any = ROCrate(version=RO_CRATE)
        self.crate.metadata.extra_terms.update(_SHA256)
        self.known: dict[str, Any] = {}  # id in the graph -> entity
        self.entities: dict[str, Any] = {}  # file of the bundle -> entity
        self.run = next((s for s in story.steps if s.id == f"run/{story.run}"), None)

    def build(self) -> Any:
        if self.run is None:
            raise NotEvidenced(f"run {self.story.run}: the ledger has no plan of it", fix="ask for the bundle again")
        self._agents()
        self._root()
        self._files()
        self._readme()
        steps = self._mine()
        for id in dict.fromkeys(t for s in (self.run, *steps) for t in (*s.used, *s.considered, *s.made)):
            self._thing(self.story.things[id])
        for later, earlier in self._derived(steps):
            if later in self.known and earlier in self.known:
                self._append(self.known[later], "isBasedOn", self.known[earlier])
        self._actions(self.run, steps)
        return self.crate

    def _mine(self) -> list[Step]:
        """Returns the steps that this run consists of, those that prepared its data included."""
        made = {t for u in (self.run.used if self.run else ()) for t in self._back(u)}
        return [s for s in self.story.steps if s.job in _STEPS and (s.run == self.story.run or made & set(s.made))]

    def _back(self, id: str) -> set[str]:
        return {id, *(t for later, earlier in self.story.derived if later == id for t in self._back(earlier))}

    def _derived(self, steps: list[Step]) -> list[tuple[str, str]]:
        trained = [s for s in self.story.steps if s.job == "train" and s.run == self.story.run]
        pairs = [(m, u) for s in trained for m in s.made for u in s.used if self.story.things[u].kind != "plan"]
        for u in {u for _, u in pairs}:
            self._thing(self.story.things[u])
        return [*self.story.derived, *pairs]

    # --- entities --------------------------------------------------------------------------------------------------

    def _add(self, id: str, **properties: Any) -> Any:
        kind = properties.pop("type")
        told = {k: v for k, v in properties.items() if v not in (None, "", [])}
        return self.crate.add(ContextEntity(self.crate, id, properties={"@type": kind, **told}))

    @staticmethod
    def _append(entity: Any, key: str, value: Any) -> None:
        known = entity.properties().get(key)
        if known is None:
            entity[key] = value
        elif {"@id": value.id} not in (known if isinstance(known, list) else [known]):
            entity.append_to(key, value)

    def _agents(self) -> None:
        for a in self.story.agents.values():
            self.known[a.id] = self._add(
                f"#{quote(a.id)}", type="Organization", name=a.organisation or a.name, alternateName=a.name
            )

    def _root(self) -> None:
        story, root = self.story, self.crate.root_dataset
        operator = self.known.get("operator")
        root["name"] = f"Run {story.run} of the consortium {story.consortium}"
        root["description"] = (
            f"How a model of the consortium {story.consortium} came about: which data of which sites, which rounds, which code, "
            "with the consortium's ledger as evidence. Data and updates of the sites are described, not contained."
        )
        root["datePublished"] = _offset(story.time)
        root["license"] = self._add(
            "#charter", type="CreativeWork", name=f"Charter of the consortium {story.consortium}", sha256=story.charter.sha256,
            identifier=f"entry {story.charter.entry} of the ledger",
            description="What members may do with each other's models and evidence; no further licence is given with this crate.",
        )  # fmt: skip
        if operator is not None:
            root["publisher"] = root["author"] = operator
        root["conformsTo"] = [
            self._add(id, type="CreativeWork", name=name, version=version) for id, (name, version) in _PROFILES.items()
        ]
        self._add(
            _LICENCE_OF_CODE, type="CreativeWork", name="Apache License 2.0", identifier="Apache-2.0",
            description="Of the code, not of the run's results.",
        )  # fmt: skip
        self.crate.metadata["conformsTo"] = [
            {"@id": f"https://w3id.org/ro/crate/{RO_CRATE}"},
            {"@id": f"https://w3id.org/workflowhub/workflow-ro-crate/{WORKFLOW_CRATE}"},
        ]

    def _files(self) -> None:
        for name, data in sorted(self.bundle.contents.items()):
            about = _ABOUT.get(name)
            site = next((a.name for a in self.story.agents.values() if name == egress_file(a.name)), "")
            if site:
                about = f"What left site {site}: one line for every object."
            if about is None:
                continue  # not a file that a bundle has: nobody vouches for it
            told = {
                "name": name, "description": about, "encodingFormat": _format(name), "sha256": files.sha256(data),
                "contentSize": str(len(data)),
            }  # fmt: skip
            if shared(name, self.story, self.audience):
                entity = self.crate.add_file(io.BytesIO(data), name, properties=told)
            else:
                entity = self._add(
                    f"#{quote(name)}", type="CreativeWork", **{**told, "conditionsOfAccess": "not in this crate"}
                )
            self.entities[name] = entity

    def _readme(self) -> None:
        here = sorted(n for n, e in self.entities.items() if "File" in e.type)
        absent = sorted(set(self.entities) - set(here))
        text = "\n".join([
            f"# {self.crate.root_dataset['name']}", "", f"{self.crate.root_dataset['description']}", "",
            f"`{METADATA}` describes it for programs (Provenance Run Crate {PROFILE}). It proves nothing by itself: whoever has the",
            "run's evidence bundle checks it with `fedmat audit verify BUNDLE`, without a network.", "",
            "| File | |", "| --- | --- |", *(f"| `{n}` | {self.entities[n]['description']} |" for n in here), "",
            *(["Described there with their SHA-256, not contained:", "", *(f"- `{n}`" for n in absent), ""] if absent else []),
        ])  # fmt: skip
        self.crate.add_file(io.BytesIO(text.encode()), README, properties={
            "name": README, "description": "For people.", "encodingFormat": "text/markdown", "sha256": files.sha256(text.encode()),
            "about": self.crate.root_dataset,
        })  # fmt: skip

    def _thing(self, t: Thing) -> None:
        if t.id in self.known:
            return
        mine = t.run in ("", self.story.run)
        entity = self.entities.get(run_file(_LOCAL[t.kind])) if t.kind in _LOCAL and mine else None
        if entity is not None and (t.kind == "plan" or entity["sha256"] == t.sha256):
            self.known[t.id] = entity  # the plan's digest is of its canonical form, not of the file's bytes
            entity["identifier"] = f"entry {t.word.entry} of the ledger"
            return
        owner = self.known.get(t.owner)
        self.known[t.id] = self._add(
            f"#{quote(t.id)}", type="CreativeWork", name=t.name, additionalType=t.kind, sha256=t.sha256,
            identifier=f"entry {t.word.entry} of the ledger", dateCreated=_offset(t.left or t.word.time),
            version=str(t.told.get("version") or t.told.get("commit") or ""), creator=owner,
            contentSize=str(t.told["bytes"]) if "bytes" in t.told else None, conditionsOfAccess="not in this crate",
        )  # fmt: skip

    # --- actions ---------------------------------------------------------------------------------------------------

    def _actions(self, run: Step, steps: list[Step]) -> None:
        workflow = self._workflow(run, [s.job for s in steps])
        agent = self.known.get("operator")
        actions = []
        for s in (run, *steps):
            instrument = workflow if s is run else self.known[f"tool/{s.job}"]
            whole = {"object": [*s.used, *s.considered], "result": [*s.made]}
            told = {k: _one([self.known[i] for i in dict.fromkeys(ids)]) for k, ids in whole.items() if ids}
            failed = s.outcome == "fail"
            actions.append(self.crate.add_action(
                instrument, f"#{quote(s.id)}", properties={
                    "@type": "CreateAction", "name": s.name, "description": _sentence(s), "endTime": _offset(s.about.time),
                    "identifier": self.story.uuid(s.id), "agent": self.known.get(s.agent, agent), **told,
                    **({} if s.outcome == "open" else {
                        "actionStatus": "http://schema.org/" + ("FailedActionStatus" if failed else "CompletedActionStatus")
                    }),
                },
            ))  # fmt: skip
        controls = [self._add(
            f"#control/{quote(s.id)}", type="ControlAction", name=f"{s.name}: orchestrated", instrument=self.known[f"step/{s.job}"],
            object=action,
        ) for s, action in zip(steps, actions[1:], strict=True)]  # fmt: skip
        if controls:
            self._add(
                "#engine-run", type="OrganizeAction", name=f"Orchestration of run {run.run}", instrument=self.known["engine"],
                agent=agent, object=_one(controls), result=actions[0], endTime=_offset(run.about.time),
            )  # fmt: skip
        self.crate.root_dataset["mentions"] = _one(actions)

    def _workflow(self, run: Step, jobs: list[Job]) -> Any:
        version = str(run.told.get("code_version", __version__))
        beside = Path(fedmat.__file__).parent.parent
        python = self._add("https://www.python.org/", type="ComputerLanguage", name="Python", url="https://www.python.org/")
        self.known["engine"] = self._add(
            "#fedmat", type="SoftwareApplication", name="fedmat", softwareVersion=version, identifier=str(run.told.get("git_commit", "")),
            license={"@id": _LICENCE_OF_CODE},
        )  # fmt: skip
        source = (beside / _FLOW).read_bytes()
        told = {
            "@type": ["File", "SoftwareSourceCode", "ComputationalWorkflow", "HowTo"], "name": "Rounds of a consortium",
            "description": f"The flow as fedmat {__version__} has it, which wrote this crate; the run was made by fedmat {version}.",
            "version": __version__, "programmingLanguage": python, "encodingFormat": _format(_FLOW.name),
            "sha256": files.sha256(source), "license": {"@id": _LICENCE_OF_CODE},
            "conformsTo": {"@id": "https://bioschemas.org/profiles/ComputationalWorkflow/1.0-RELEASE"},
        }  # fmt: skip
        workflow = self.crate.add(
            ComputationalWorkflow(self.crate, io.BytesIO(source), f"{_WORKFLOW}{_FLOW.name}", properties=told)
        )
        self.crate.mainEntity = workflow
        used = [job for job in JOBS if job in jobs]
        tools, steps = [], []
        for position, job in enumerate(used, 1):
            tool = self._add(
                f"#tool/{job}",
                type="SoftwareApplication",
                name=f"fedmat: {job}",
                softwareVersion=version,
                description=JOBS[job],
            )
            step = self._add(
                f"#step/{job}", type="HowToStep", name=job, description=JOBS[job], position=str(position), workExample=tool
            )
            self.known |= {f"tool/{job}": tool, f"step/{job}": step}
            tools.append(tool)
            steps.append(step)
        workflow["hasPart"], workflow["step"] = _one(tools), _one(steps)
        if (stages := beside / _STAGES).is_file():
            self.crate.add_file(io.BytesIO(stages.read_bytes()), f"{_WORKFLOW}{_STAGES.name}", properties={
                "name": _STAGES.name, "description": "The same steps as stages, for dvc repro.", "encodingFormat": _format(_STAGES.name),
                "sha256": files.sha256_file(stages), "license": {"@id": _LICENCE_OF_CODE},
            })  # fmt: skip
        return workflow


def _one(values: list[Any]) -> Any:
    """Returns a list's only value alone: JSON-LD in compact form has no list of one."""
    return values[0] if len(values) == 1 else values


def _offset(time: str) -> str:
    """Returns an entry's time as the profile writes it, with an offset."""
    return time.removesuffix("Z") + "+00:00"


def _format(name: str) -> str:
    return _FORMATS[Path(name).suffix]


def _sentence(s: Step) -> str:
    told: Mapping[str, Any] = {k: v for k, v in s.told.items() if k != "round"}
    parts = [
        JOBS[s.job], f"Stated by {s.about.by} in entry {s.about.entry} of the ledger.",
        *([f"{', '.join(f'{k} {v}' for k, v in sorted(told.items()))}."] if told else []),
        *([f"Left out: {', '.join(f'{site} ({why})' for site, why in sorted(s.left_out.items()))}."] if s.left_out else []),
        *([f"Seen by the rule and left out: {len(s.considered)} of the updates."] if s.considered else []),
        *(["The ledger states no end of it."] if s.outcome == "open" else []),
    ]  # fmt: skip
    return " ".join(parts)
