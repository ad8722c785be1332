"""The story as OpenLineage events: one START and, where the ledger states an end, one COMPLETE or FAIL for every step.

Knows: the OpenLineage client's typed classes (spec 2-0-2), how jobs and datasets are named, our own facets. Refuses to know: any
transport: nothing is sent, no client is made; a file is written, and whoever runs a lineage server hands it over.

Names: a job is ``fedmat://<consortium>`` / ``<job>`` or ``<job>.<site>``; what belongs to a site is
``fedmat://<consortium>/<site>`` / ``<thing>``, what belongs to all is ``fedmat://<consortium>`` / ``<run>/<thing>``. A dataset's
version is its SHA-256. Run ids are UUIDs of stable names, times are those of the ledger's entries: the same ledger gives the same
events.

References:
    OpenLineage specification 2-0-2. RFC 9562 (UUID version 5). RFC 8141 (URN).
"""

from __future__ import annotations

from typing import Any

import attr
from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
from openlineage.client.facet_v2 import (
    DatasetFacet,
    JobFacet,
    OutputDatasetFacet,
    RunFacet,
    dataset_version_dataset,
    documentation_job,
    error_message_run,
    job_type_job,
    output_statistics_output_dataset,
    parent_run,
    processing_engine_run,
)
from openlineage.client.serde import Serde

from fedmat._version import __version__
from fedmat.provenance.story import JOBS, Step, Story, Thing

SCHEMA = "urn:fedmat:schema:openlineage-facets:1"
"""``$id`` of ``docs/schemas/openlineage-facets.json``."""
PRODUCER = f"urn:fedmat:code:{__version__}"
_NAMES = {
    "source": "raw", "dataset": "records", "features": "features", "contract_report": "contract-report", "update": "update",
    "approval": "approval",
}  # fmt: skip
_ENDS = {"complete": RunState.COMPLETE, "fail": RunState.FAIL}


@attr.define
class EvidenceFacet(DatasetFacet):
    """Which entry of the ledger states a dataset, its digest, and who signed."""

    kind: str
    entry: int
    signedBy: str
    stated: str
    sha256: str | None = None
    tag: str | None = None
    gitCommit: str | None = None
    leftSite: str | None = None
    counted: bool | None = None

    @staticmethod
    def _get_schema() -> str:
        return f"{SCHEMA}#/$defs/EvidenceFacet"


@attr.define
class ContractFacet(DatasetFacet):
    """How a site's data fared against the shared contract."""

    contractVersion: str
    accepted: int
    rejected: dict[str, int]

    @staticmethod
    def _get_schema() -> str:
        return f"{SCHEMA}#/$defs/ContractFacet"


@attr.define
class StepFacet(RunFacet):
    """What the ledger states of a step, and which entry does."""

    job: str
    entry: int
    signedBy: str
    stated: str
    outcome: str
    ledger: str
    charterSha256: str
    run: str | None = None
    round: int | None = None
    rule: str | None = None
    protection: str | None = None
    seed: int | None = None
    rounds: int | None = None
    codeVersion: str | None = None
    gitCommit: str | None = None
    gitDirty: bool | None = None
    leftOut: list[dict[str, str]] | None = None

    @staticmethod
    def _get_schema() -> str:
        return f"{SCHEMA}#/$defs/StepFacet"


def events(story: Story) -> list[dict[str, Any]]:
    """Returns a story as OpenLineage run events in plain JSON, in order of time; a run's START precedes its end."""
    found: list[tuple[str, int, RunEvent]] = []
    for s in story.steps:
        began = min(s.began, s.about.time)  # sites' clocks and the operator's may differ
        found.append((began, 0, _event(story, s, RunState.START, began)))
        if s.outcome in _ENDS:
            found.append((s.about.time, 1, _event(story, s, _ENDS[s.outcome], s.about.time)))
    return [Serde.to_dict(event) for _, _, event in sorted(found, key=lambda f: f[:2])]


def _event(story: Story, s: Step, state: RunState, time: str) -> RunEvent:
    inputs = [InputDataset(*_dataset(story, t), facets=_facets(story, s, t)) for t in (*s.used, *s.considered)]
    made = () if state is RunState.START else s.made
    outputs = [
        OutputDataset(*_dataset(story, t), facets=_facets(story, s, t), outputFacets=_statistics(story.things[t])) for t in made
    ]
    return RunEvent(
        eventType=state, eventTime=time, producer=PRODUCER, run=Run(story.uuid(s.id), _run_facets(story, s, state)),
        job=Job(*_job(story, s), _job_facets(s)), inputs=inputs, outputs=outputs,
    )  # fmt: skip


def _namespace(story: Story, site: str = "") -> str:
    return f"fedmat://{story.consortium}" + (f"/{site}" if site else "")


def _job(story: Story, s: Step) -> tuple[str, str]:
    return _namespace(story), f"{s.job}.{s.site}" if s.site else s.job


def _dataset(story: Story, id: str) -> tuple[str, str]:
    t = story.things[id]
    name = _NAMES.get(t.kind, t.kind)
    if t.kind == "source":
        name = f"{name}/{t.sha256}"  # a raw file's name stays with its site
    elif t.kind == "registration":
        name = f"models/{t.told['name']}"
    return _namespace(story, t.site), f"{t.run}/{name}" if t.run and t.kind != "registration" else name


def _version(t: Thing) -> str:
    return str(t.told["version"]) if t.kind == "registration" else t.sha256 or str(t.told.get("commit", ""))


def _facets(story: Story, s: Step, id: str) -> dict[str, DatasetFacet]:
    t = story.things[id]
    counted = None if t.kind != "update" or s.job != "round" else id in s.used
    told = t.told if t.kind == "dataset" else {}
    facets: dict[str, DatasetFacet] = {
        "fedmat_evidence": EvidenceFacet(
            t.kind,
            t.word.entry,
            t.word.by,
            t.word.time,
            t.sha256 or None,
            told.get("version"),
            told.get("commit"),
            t.left or None,
            counted,
            producer=PRODUCER,
        )
    }
    if version := _version(t):
        facets["version"] = dataset_version_dataset.DatasetVersionDatasetFacet(version, producer=PRODUCER)
    if t.kind == "contract_report":
        facets["fedmat_contract"] = ContractFacet(
            str(t.told["contract_version"]), int(t.told["accepted"]), dict(t.rejected), producer=PRODUCER
        )
    return facets


def _statistics(t: Thing) -> dict[str, OutputDatasetFacet]:
    if t.kind == "update" and "bytes" in t.told:
        size = int(t.told["bytes"])
        return {
            "outputStatistics": output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
                size=size, producer=PRODUCER
            )
        }
    return {}


def _job_facets(s: Step) -> dict[str, JobFacet]:
    return {
        "documentation": documentation_job.DocumentationJobFacet(JOBS[s.job], "text/plain", producer=PRODUCER),
        "jobType": job_type_job.JobTypeJobFacet("BATCH", "FEDMAT", "JOB" if s.job == "run" else "TASK", producer=PRODUCER),
    }


def _run_facets(story: Story, s: Step, state: RunState) -> dict[str, RunFacet]:
    told = s.told
    facets: dict[str, RunFacet] = {
        "fedmat_step": StepFacet(
            s.job,
            s.about.entry,
            s.about.by,
            s.about.time,
            s.outcome,
            story.ledger,
            story.charter.sha256,
            s.run or None,
            told.get("round"),
            told.get("rule"),
            told.get("protection"),
            told.get("seed"),
            told.get("rounds"),
            told.get("code_version"),
            told.get("git_commit"),
            told.get("git_dirty"),
            [{"site": site, "reason": reason} for site, reason in sorted(s.left_out.items())] or None,
            producer=PRODUCER,
        )
    }
    if "code_version" in told:
        facets["processing_engine"] = processing_engine_run.ProcessingEngineRunFacet(
            str(told["code_version"]), "fedmat", __version__, producer=PRODUCER
        )
    if s.parent:
        facets["parent"] = _parent(story, s)
    if state is RunState.FAIL:
        facets["errorMessage"] = error_message_run.ErrorMessageRunFacet(s.reason, "PYTHON", producer=PRODUCER)
    return facets


def _parent(story: Story, s: Step) -> RunFacet:
    above = story.step(s.parent)
    root = above
    while root.parent:
        root = story.step(root.parent)
    return parent_run.ParentRunFacet(
        parent_run.Run(story.uuid(above.id)), parent_run.Job(*_job(story, above)),
        parent_run.Root(parent_run.RootRun(story.uuid(root.id)), parent_run.RootJob(*_job(story, root))), producer=PRODUCER,
    )  # fmt: skip
