"""The commands about the ledger: ``fedmat consortium charter | join | leave | pod``, ``fedmat ledger ...``, ``fedmat approve``, ``fedmat credits``.

Knows: what members and the operator type, files of proposals and of ledgers, and the time. Refuses to know: what an entry may
say (``fedmat.governance``), whether it counts (``fedmat.ledger.fold``), how a log is kept (``fedmat.ledger.log``).

Members and operator pass files to each other: a proposal goes round until nobody's signature is lacking, then the operator appends
it. Whoever has the exported ledger checks all of it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedmat.cli_consortium import consortium_app, spoken
from fedmat.commands import Group, Json
from fedmat.errors import ConfigError, NotEvidenced, ProtocolError

if TYPE_CHECKING:
    from fedmat.governance import Departure, Standing
    from fedmat.keys import Party, PartyKeys
    from fedmat.ledger.fold import Fold
    from fedmat.ledger.whole import Examined

ledger_app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    help="The consortium's ledger: sign what is proposed, append it, check all of it from a file.",
)
credits_app = typer.Typer(
    cls=Group, no_args_is_help=True, help="Credits that released models made: who has how many, give and spend them."
)

Ledger = Annotated[
    str,
    typer.Option(
        "--ledger", envvar="FEDMAT_LEDGER", metavar="LEDGER",
        help="The exported ledger (ledger.jsonl), an evidence bundle, or at the operator the ledger's database: path or URL.",
    ),
]  # fmt: skip
Database = Annotated[
    str,
    typer.Option(
        "--ledger", envvar="FEDMAT_LEDGER", metavar="PATH_OR_URL",
        help="The ledger's database at the operator: a path (SQLite) or postgresql://...",
    ),
]  # fmt: skip
Keys = Annotated[Path, typer.Option("--folder", help="The folder of the party's keys.")]
Proposal = Annotated[Path, typer.Argument(metavar="PROPOSAL", help="The proposal's file.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="File to write.", show_default="named after what is proposed")]


# --- decisions -----------------------------------------------------------------------------------------------------


@consortium_app.command("charter")
def consortium_charter(
    consortium: Annotated[Path, typer.Argument(metavar="CONSORTIUM", help="The consortium file, with its terms.")],
    parties: Annotated[Path, typer.Option("--keys", help="Everyone's public keys: charter.json of fedmat keys charter.")],
    operator: Annotated[Path, typer.Option("--operator", help="Folder of the operator's keys: fedmat keys new operator.")],
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Propose the consortium's charter: whose keys are whose, and the terms that all members agree on.

    Every member signs it (fedmat ledger sign) and compares its digest with the others by telephone; it becomes entry 0 of the
    ledger. At the operator.

    Example:  fedmat consortium charter consortium.yaml --keys charter.json --operator operator-keys -o charter.proposal.json
    """
    from fedmat import governance, keys
    from fedmat.config import load_consortium

    config = load_consortium(consortium)
    own = keys.entry_of(operator)
    entry = governance.charter(config, keys.read_charter(parties), own, _now())
    path = _write(out or Path("charter.proposal.json"), governance.propose(entry, keys.load(operator, own.name)))
    found = governance.standing(governance.read(path), None)
    _tell(path, found, as_json, [("digest", f"{spoken(entry.sha256)} (compare by telephone, each with each)")])


@consortium_app.command("join")
def consortium_join(
    folder: Keys,
    ledger: Ledger,
    residency: Annotated[str, typer.Option(help="Country in which the site's data stay, e.g. DE.")] = "",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Propose that a site joins, at the site. A quorum of the members and the operator sign.

    Check the ledger's charter by telephone with a member before you sign anything (fedmat ledger verify).

    Example:  fedmat consortium join --folder keys --ledger ledger.jsonl --residency DE
    """
    from fedmat import governance, keys

    fold, own = _fold(ledger), keys.entry_of(folder)
    entry = governance.join(fold, own, _now(), residency=residency)
    path = _write(out or Path(f"join-{own.name}.proposal.json"), governance.propose(entry, keys.load(folder, own.name)))
    fingerprint = ("fingerprint of the keys", f"{spoken(own.sha256)} (tell the members by telephone)")
    _tell(path, governance.standing(governance.read(path), fold), as_json, [fingerprint])


@consortium_app.command("leave")
def consortium_leave(
    site: Annotated[str, typer.Argument(metavar="SITE", help="The site that leaves.")],
    folder: Keys,
    ledger: Ledger,
    reason: Annotated[str, typer.Option(help="Stands in the ledger for all to read.")] = "",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Propose that a site leaves, and show what follows: models that descend from its data, and what to train again.

    With the site's own keys its signature and the operator's are enough; with anybody else's it takes a quorum of the members.

    Example:  fedmat consortium leave acme-cells --folder keys --ledger ledger.jsonl
    """
    from fedmat import governance

    fold = _fold(ledger)
    own = _own(folder, fold)
    entry = governance.leave(fold, site, _now(), by=own.name, reason=reason)
    path = _write(out or Path(f"leave-{site}.proposal.json"), governance.propose(entry, own))
    after = governance.plan_after(fold, site)
    found = governance.standing(governance.read(path), fold)
    if not as_json:
        _show_departure(after)
    _tell(path, found, as_json, more={"after": asdict(after)})


@consortium_app.command("pod")
def consortium_pod(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The pod's name.")],
    members: Annotated[str, typer.Option(help="Its members, separated by commas.")],
    task: Annotated[str, typer.Option(help="The task it trains.")],
    folder: Keys,
    ledger: Ledger,
    model: Annotated[str | None, typer.Option(help="SHA-256 of a model file it starts from.")] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Propose a pod: some members with a task of their own. Each of them and the operator sign.

    Example:  fedmat consortium pod fast-charge --members acme-cells,birch-labs --task lifetime --folder keys --ledger ledger.jsonl
    """
    from fedmat import governance

    fold = _fold(ledger)
    named = [m.strip() for m in members.split(",") if m.strip()]
    entry = _valid(lambda: governance.pod(fold, name, named, task, _now(), model_sha256=model))
    path = _write(out or Path(f"pod-{name}.proposal.json"), governance.propose(entry, _own(folder, fold)))
    _tell(path, governance.standing(governance.read(path), fold), as_json)


def approve(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run, as the ledger calls it.")],
    folder: Keys,
    ledger: Ledger,
    reject: Annotated[bool, typer.Option("--reject", help="Say no instead; a later word replaces an earlier one.")] = False,
    note: Annotated[str, typer.Option(help="Stands in the ledger for all to read.")] = "",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Approve a run's model, at a member: signs the digests of the model and of its evaluation.

    A model becomes champion only with the approvals that the charter asks for. The file goes to the operator, who appends it.

    Example:  fedmat approve cells-2026-11 --folder keys --ledger ledger.jsonl
    """
    from fedmat import governance

    fold = _fold(ledger)
    own = _own(folder, fold)
    entry = governance.approve(fold, run, own.name, _now(), approves=not reject, note=note)
    about = fold.runs[run].evaluation
    score = about.entry.score if about else None
    told = [("model", entry.model_sha256), ("metrics", entry.metrics_sha256)]
    told += [(about.entry.metric, f"{score:.4g}")] if about and score is not None else []
    path = _write(out or Path(f"approve-{run}-{own.name}.proposal.json"), governance.propose(entry, own))
    _tell(path, governance.standing(governance.read(path), fold), as_json, told)


ledger_app.command("approve")(approve)


@ledger_app.command("rotate")
def ledger_rotate(
    rotation: Annotated[Path, typer.Argument(metavar="ROTATION", help="PARTY.rotation.json, as fedmat keys rotate wrote it.")],
    folder: Keys,
    ledger: Ledger,
    finish: Annotated[
        bool,
        typer.Option("--finish", help="Remove the old keys, now that the ledger holds the new ones. For the operator's keys."),
    ] = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Bring a party's new keys into the ledger, signed by the old key. At the party, after fedmat keys rotate.

    A member ends its rotation with fedmat keys rotate --finish, as the key charter holds its new keys too; the operator with
    --finish here.

    Example:  fedmat ledger rotate keys/acme-cells.rotation.json --folder keys --ledger ledger.jsonl
    """
    from fedmat import console, governance, keys

    fold, step = _fold(ledger), keys.read_rotation(rotation)
    if finish:
        present = fold.parties.get(step.entry.name)
        governance.finish_rotation(folder, step.entry.name, present)
        console.write_json({"party": step.entry.name}) if as_json else console.say(
            f"{step.entry.name}: the old keys are removed"
        )
        return
    entry = governance.rotation(fold, step, _now())
    own = governance.held(folder, fold.parties[step.entry.name])
    path = _write(out or Path(f"rotate-{own.name}.proposal.json"), governance.propose(entry, own))
    told = [("new fingerprint", spoken(step.entry.sha256))]
    _tell(path, governance.standing(governance.read(path), fold), as_json, told)


# --- signatures, and into the ledger -------------------------------------------------------------------------------


@ledger_app.command("sign")
def ledger_sign(
    proposal: Proposal,
    folder: Keys,
    ledger: Annotated[
        str | None,
        typer.Option("--ledger", envvar="FEDMAT_LEDGER", help="The exported ledger. Needed for all but the first charter."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before signing.")] = False,
    as_json: Json = False,
) -> None:
    """Show a proposal in plain words, and sign it. At each party that is asked.

    Adds a signature to the file; the file then goes to the next signer, or back to the operator. Signing again changes nothing.

    Example:  fedmat ledger sign charter.proposal.json --folder keys
    """
    from fedmat import console, governance, keys

    fold = _fold(ledger) if ledger else None
    before = governance.standing(governance.read(proposal), fold, str(proposal))
    if not as_json:
        _show_entry(before.entry)
    if not yes and not as_json and not typer.confirm("Sign this?", err=True):
        console.say("nothing was signed")
        raise typer.Exit(0)
    party = _among(before, fold, keys.entry_of(folder))
    found = governance.sign(proposal, governance.held(folder, party), fold)
    _tell(proposal, found, as_json)


@ledger_app.command("append")
def ledger_append(
    proposals: Annotated[
        list[Path],
        typer.Argument(metavar="PROPOSAL...", help="The file; several are copies of one proposal that went out together."),
    ],
    ledger: Database,
    folder: Annotated[
        Path | None,
        typer.Option("--folder", help="The operator's keys: also adds the operator's signature and signs a checkpoint."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Put a proposal into the ledger, at the operator, once nobody's signature is lacking.

    The charter begins the ledger. An entry that breaks a rule is refused, by everyone who reads the ledger too.

    Example:  fedmat ledger append charter.proposal.json --ledger ledger.db --folder operator-keys
    """
    from fedmat import console, governance
    from fedmat.ledger import entries, whole, words
    from fedmat.ledger.fold import Fold
    from fedmat.ledger.log import Log

    copies = [governance.read(p) for p in proposals]
    origin = whole.origin(entries.open_envelope(copies[0], str(proposals[0]))[0].consortium)
    fold = Fold()
    if "://" in ledger or Path(ledger).exists():  # a file is begun below, once the charter is complete
        with Log.open(ledger, origin) as log:
            fold = Fold.of(log.read())
    data = governance.merge(copies, fold)
    found = governance.standing(data, fold, str(proposals[0]))
    if folder is not None and "operator" in found.missing:
        data = entries.cosign(data, governance.held(folder, _operator(found, fold)))
        found = governance.standing(data, fold, str(proposals[0]))
    if not found.complete:
        raise ProtocolError(
            "no_quorum", f"{proposals[0]}: not signed by {found.lacking()}", fix="collect the signatures: fedmat ledger sign"
        )
    size = fold.size
    fold.apply(data)  # before anything is written
    with Log.open(ledger, origin) as log:
        index = log.append([data], expected=size).start
        note = _checkpoint(log, fold, folder) if folder is not None else ""
    if as_json:
        console.write_json({"entry": index, "type": found.entry.type, "size": fold.size, "checkpoint": note or None})
        return
    console.say(f"entry {index}: {words.words(found.entry)}")
    if index == 0:
        console.say(f"charter's digest: {spoken(found.entry.sha256)}")
    console.say("a checkpoint is signed" if note else "next: fedmat ledger checkpoint signs a checkpoint, which members cosign")


@ledger_app.command("checkpoint")
def ledger_checkpoint(ledger: Database, folder: Keys, as_json: Json = False) -> None:
    """Sign a checkpoint of the whole ledger, at the operator. Members cosign it (fedmat ledger witness).

    Example:  fedmat ledger checkpoint --ledger ledger.db --folder operator-keys
    """
    from fedmat import console
    from fedmat.ledger.log import Log

    fold = _fold(ledger)
    with Log.open(ledger) as log:
        note = _checkpoint(log, fold, folder)
    if as_json:
        console.write_json({"size": fold.size, "checkpoint": note})
    else:
        console.say(f"checkpoint of {fold.size} entries; next: fedmat ledger export, and members cosign it")


# --- reading -------------------------------------------------------------------------------------------------------


@ledger_app.command("verify")
def ledger_verify(
    ledger: Annotated[str, typer.Argument(metavar="LEDGER", help="ledger.jsonl, an evidence bundle, or the database.")],
    charter: Annotated[
        str | None,
        typer.Option(
            "--charter-digest", help="The charter's digest, as it was compared by telephone.", show_default="it is printed"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a whole ledger from a file alone: every entry, signature, rule, root and cosignature.

    Ends with 0 if all holds, 6 at the first thing that does not (its place is named), 8 if nothing is wrong but enough members'
    cosignatures under the whole ledger are not in hand: the operator could still show others another end of it.

    Example:  fedmat ledger verify ledger.jsonl --charter-digest "8d2f 11c0 ..."
    """
    from fedmat import console

    found = _examined(ledger)
    told = "".join((charter or "").split()).lower()
    if charter is not None and (len(told) < 16 or not found.charter_sha256.startswith(told)):
        raise ProtocolError(
            "wrong_charter", f"{ledger}: begins with another charter than the one that was told",
            fix="compare at least 16 digits of the digest by telephone; if they differ, this is not your consortium's ledger",
        )  # fmt: skip
    size, last = found.fold.size, found.witnessed
    if as_json:
        console.write_json({
            "consortium": found.fold.consortium, "entries": size, "root": found.root, "charter_sha256": found.charter_sha256,
            "charter_told": charter is not None, "members": sorted(found.fold.sites), "witnessed": last,
            "checkpoints": [asdict(c) | {"counts": c.counts} for c in found.checkpoints], "ok": last == size,
        })  # fmt: skip
    else:
        rows = [(c.size, f"{len(c.cosigners)} of {c.needed}", ", ".join(c.cosigners) or "nobody") for c in found.checkpoints]
        if rows:
            console.show_rows("", ("checkpoint of entries", "cosigned", "by"), rows)
        same = "it is the one that was told" if charter is not None else "compare it by telephone with another member's"
        console.show_where([
            ("consortium", f"{found.fold.consortium}: {', '.join(sorted(found.fold.sites))}"),
            ("entries", f"{size}, each signed by whom its kind needs, all rules kept"),
            ("root", found.root),
            ("charter", f"{spoken(found.charter_sha256)} ({same})"),
            ("witnessed", f"{last} of {size} entries by as many members as the charter asks for"),
        ])  # fmt: skip
    if last != size:
        raise NotEvidenced(
            f"{ledger}: entries {last} to {size - 1} stand under no checkpoint that enough members cosigned",
            fix="members run fedmat ledger witness, the operator fedmat ledger cosign",
        )


@ledger_app.command("show")
def ledger_show(
    ledger: Annotated[
        str, typer.Argument(metavar="LEDGER", envvar="FEDMAT_LEDGER", help="ledger.jsonl, an evidence bundle, or the database.")
    ],
    entry: Annotated[int | None, typer.Option(min=0, help="Show this entry in full.")] = None,
    run: Annotated[str | None, typer.Option(help="Only entries of this run.")] = None,
    kind: Annotated[str | None, typer.Option("--type", help="Only entries of this type, e.g. update.")] = None,
    as_json: Json = False,
) -> None:
    """List the ledger's entries in plain words, or one entry in full.

    Signatures and rules are checked on the way; where something does not hold, its place is named.

    Example:  fedmat ledger show ledger.jsonl --entry 0
    """
    from fedmat import console
    from fedmat.ledger import entries, words

    datas = _datas(ledger)[1]
    fold = _folded(datas)
    if kind is not None and kind not in entries.TYPES:
        raise ConfigError(f"no entry is of type {kind}", fix=f"types: {', '.join(entries.TYPES)}")
    if entry is not None:
        if entry >= len(datas):
            raise ConfigError(f"there is no entry {entry}", fix=f"the ledger has {len(datas)}")
        found, envelope = entries.open_envelope(datas[entry], f"entry {entry}")
        if as_json:
            console.write_json(
                {"index": entry, "entry": found.model_dump(mode="json"), "signed_by_keys": list(envelope.signers)}
            )
            return
        _show_entry(found)
        console.say("")
        typer.echo(_pretty(found.model_dump(mode="json")))
        return
    listed = [(i, entries.open_envelope(d, f"entry {i}")[0]) for i, d in enumerate(datas)]
    listed = [(i, e) for i, e in listed if (run is None or getattr(e, "run", None) == run) and (kind is None or e.type == kind)]
    if as_json:
        console.write_json([{"index": i, "words": words.words(e), **e.model_dump(mode="json")} for i, e in listed])
        return
    rows = [(i, e.time, e.by, e.type, words.words(e)) for i, e in listed]
    console.show_rows(
        f"{fold.consortium}: {len(datas)} entries", ("entry", "time (UTC)", "by", "type", "what"), rows, right=("entry",)
    )


@ledger_app.command("export")
def ledger_export(
    ledger: Database,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")] = Path("ledger.jsonl"),
    as_json: Json = False,
) -> None:
    """Write the whole ledger with its checkpoints into one file, for members and auditors. At the operator.

    Example:  fedmat ledger export --ledger ledger.db -o ledger.jsonl
    """
    from fedmat import console
    from fedmat.ledger import export
    from fedmat.ledger.log import Log

    fold = _fold(ledger)
    with Log.open(ledger) as log:
        export.export(log, out, fold.size)
    if as_json:
        console.write_json({"ledger": str(out), "entries": fold.size})
    else:
        console.say(f"{out}: {fold.size} entries; every member checks it with fedmat ledger verify {out.name}")


# --- witnesses -----------------------------------------------------------------------------------------------------


@ledger_app.command("witness")
def ledger_witness(
    ledger: Annotated[str, typer.Argument(metavar="LEDGER", help="ledger.jsonl, as the operator exported it.")],
    folder: Keys,
    state: Annotated[Path, typer.Option(help="Folder in which this member keeps what it saw last. Never delete it.")],
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Check that the ledger goes on from what this member saw before, and cosign its last checkpoint.

    A ledger that does not go on from it was rewritten: nothing is cosigned, and the operator has to explain itself. The line that is
    written goes to the operator.

    Example:  fedmat ledger witness ledger.jsonl --folder keys --state witness
    """
    from fedmat import console, files, governance, keys
    from fedmat.ledger import merkle, whole
    from fedmat.ledger.notes import Verifier
    from fedmat.ledger.witness import Witness

    origin, datas, checkpoints = _datas(ledger)
    found = whole.examine(datas, checkpoints, origin)
    if not found.checkpoints:
        raise NotEvidenced(f"{ledger}: there is no checkpoint", fix="the operator signs one: fedmat ledger checkpoint")
    last, site = found.checkpoints[-1], keys.entry_of(folder).name
    party, signer = (found.fold.key_at(n, last.size) for n in (site, "operator"))
    if party is None or signer is None or site not in found.fold.sites_at(last.size):
        raise ProtocolError("unknown_member", f"{site} is no member at the last checkpoint: members cosign")
    own = governance.held(folder, party)
    operator = Verifier(origin, bytes.fromhex(signer.signing))
    witness = Witness(whole.witness_name(found.fold.consortium, site), own, state, operator, origin)
    tree = merkle.Tree(merkle.leaf_hash(d) for d in datas)
    seen = witness.seen.size
    if seen > len(datas):
        raise ProtocolError(
            "truncated_log",
            f"{ledger}: {len(datas)} entries, this member has seen {seen}",
            fix="ask the operator where they are",
        )
    proof = tree.consistency(seen, last.size) if seen <= last.size else ()
    line = witness.cosign(checkpoints[-1], seen, proof, int(_now().timestamp()))
    path = out or Path(f"{own.name}.{last.size}.cosignature")
    files.write_atomic(path, line.encode())
    if as_json:
        console.write_json({"member": own.name, "seen": seen, "size": last.size, "cosignature": str(path)})
        return
    console.show_where([
        ("seen before", f"{seen} entries; the ledger goes on from them"),
        ("cosigned", f"the checkpoint of {last.size} entries"),
        ("send to the operator", console.show_path(path)),
    ])  # fmt: skip


@ledger_app.command("cosign")
def ledger_cosign(
    lines: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Members' cosignatures, as fedmat ledger witness wrote them.")
    ],
    ledger: Database,
    as_json: Json = False,
) -> None:
    """Take members' cosignatures into the ledger, at the operator.

    Example:  fedmat ledger cosign acme-cells.7.cosignature birch-labs.7.cosignature --ledger ledger.db
    """
    from fedmat import console
    from fedmat.ledger.log import Log

    fold = _fold(ledger)
    taken: dict[str, int] = {}
    with Log.open(ledger) as log:
        for path in lines:
            name, size = _cosigned(log, fold, _text(path), path)
            taken[name] = size
    found = _examined(ledger)
    if as_json:
        console.write_json({"taken": taken, "witnessed": found.witnessed, "entries": found.fold.size})
        return
    for name, size in taken.items():
        console.say(f"{name} has cosigned the checkpoint of {size} entries")
    console.say(f"{found.witnessed} of {found.fold.size} entries are witnessed by as many members as the charter asks for")


def _cosigned(log: Any, fold: Fold, line: str, path: Path) -> tuple[str, int]:
    """Adds a line to the checkpoint that it is of; returns the member and the checkpoint's size."""
    from fedmat.ledger import notes, whole

    signature = notes.signature(line)
    for note in reversed(log.checkpoints()):
        size = notes.read(notes.parse(note).body)[1]
        for site in fold.sites_at(size):
            party = fold.key_at(site, size)
            if party is None:
                continue
            who = notes.Verifier(whole.witness_name(fold.consortium, site), bytes.fromhex(party.signing))
            if not signature.by(who, notes.COSIGNATURE):
                continue
            try:
                log.add_cosignature(size, line, who)
            except ProtocolError as error:
                if error.reason == "bad_signature":
                    continue  # of another checkpoint
                raise
            return site, size
    raise ProtocolError(
        "bad_signature", f"{path}: no member's cosignature of a checkpoint of this ledger",
        fix="the member runs fedmat ledger witness on the exported ledger again",
    )  # fmt: skip


# --- credits -------------------------------------------------------------------------------------------------------


@credits_app.command("balance")
def credits_balance(ledger: Ledger, as_json: Json = False) -> None:
    """Show who has how many credits, and what each member has bought.

    Example:  fedmat credits balance --ledger ledger.jsonl
    """
    from fedmat import console

    fold = _fold(ledger)
    state = fold.credits
    names = sorted(fold.sites | set(state.balances))
    priority = {n: {m: until for (who, m), until in sorted(state.priority.items()) if who == n} for n in names}
    if as_json:
        console.write_json({
            "balances": {n: state.balance(n) for n in names}, "minted": state.minted, "spent": state.spent,
            "tiers": {n: sorted(state.tiers.get(n, ())) for n in names}, "priority": priority,
            "next": {n: state.next(n) for n in names},
        })  # fmt: skip
        return
    rows = [
        (
            n if n in fold.sites else f"{n} (left)", state.balance(n), ", ".join(sorted(state.tiers.get(n, ()))) or "-",
            ", ".join(f"{m} until {until}" for m, until in priority[n].items()) or "-",
        )
        for n in names
    ]  # fmt: skip
    console.show_rows("", ("member", "credits", "tiers", "served first"), rows, right=("credits",))
    console.say(f"minted {state.minted}, spent {state.spent}")


@credits_app.command("history")
def credits_history(
    ledger: Ledger,
    member: Annotated[str | None, typer.Option(help="Only what concerns this member.")] = None,
    as_json: Json = False,
) -> None:
    """List every mint, transfer and spend with its entry.

    Example:  fedmat credits history --ledger ledger.jsonl --member acme-cells
    """
    from fedmat import console
    from fedmat.ledger import entries, words

    datas = _datas(ledger)[1]
    _folded(datas)
    listed = [(i, entries.open_envelope(d, f"entry {i}")[0]) for i, d in enumerate(datas)]
    found = [
        (i, e)
        for i, e in listed
        if e.type in ("credit_mint", "credit_transfer", "credit_spend")
        and member in (None, e.by, getattr(e, "to", None), *getattr(e, "amounts", ()))
    ]
    if as_json:
        console.write_json([{"index": i, **e.model_dump(mode="json")} for i, e in found])
        return
    console.show_rows("", ("entry", "time (UTC)", "what"), [(i, e.time, words.words(e)) for i, e in found], right=("entry",))


@credits_app.command("transfer")
def credits_transfer(
    to: Annotated[str, typer.Argument(metavar="MEMBER", help="Who gets them.")],
    amount: Annotated[int, typer.Argument(min=1, help="Whole credits.")],
    folder: Keys,
    ledger: Ledger,
    note: Annotated[str, typer.Option(help="Stands in the ledger for all to read.")] = "",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Give credits to another member, signed by the giver. The file goes to the operator, who appends it.

    Example:  fedmat credits transfer birch-labs 120 --folder keys --ledger ledger.jsonl
    """
    from fedmat import governance

    fold = _fold(ledger)
    own = _own(folder, fold)
    entry = _valid(lambda: governance.transfer(fold, own.name, to, amount, _now(), note=note))
    path = _write(out or Path(f"credits-{own.name}-{entry.sequence}.proposal.json"), governance.propose(entry, own))
    _tell(path, governance.standing(governance.read(path), fold), as_json)


@credits_app.command("spend")
def credits_spend(
    what: Annotated[
        Literal["tier", "priority"], typer.Argument(help="A tier of the registry's models, or days of priority in serving.")
    ],
    item: Annotated[str, typer.Argument(metavar="ITEM", help="The tier's name, or the model that is to be served first.")],
    folder: Keys,
    ledger: Ledger,
    days: Annotated[int, typer.Option(min=1, help="Of priority.")] = 1,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Spend credits on access, at the charter's price, signed by the member. The file goes to the operator, who appends it.

    Example:  fedmat credits spend priority fedmat-cell-life --days 7 --folder keys --ledger ledger.jsonl
    """
    from fedmat import governance

    fold = _fold(ledger)
    own = _own(folder, fold)
    entry = governance.spend(fold, own.name, what, item, _now(), days=days)
    path = _write(out or Path(f"credits-{own.name}-{entry.sequence}.proposal.json"), governance.propose(entry, own))
    _tell(path, governance.standing(governance.read(path), fold), as_json)


# --- inside --------------------------------------------------------------------------------------------------------


def _datas(where: str) -> tuple[str, tuple[bytes, ...], tuple[str, ...]]:
    """Returns the log's own name, its entries and its checkpoints, from a file or the database; nothing is checked yet."""
    from fedmat.bundle import MANIFEST, Bundle
    from fedmat.ledger import export
    from fedmat.ledger.log import Log

    path = Path(where)
    if "://" not in where:
        if not path.exists():
            raise ConfigError(f"{where}: no such ledger", fix="name an exported ledger, a bundle or the ledger's database")
        if path.is_dir() and not (path / MANIFEST).exists():
            raise ConfigError(f"{where}: a folder without a ledger", fix="name the file: ledger.jsonl or ledger.db")
        begin = b"" if path.is_dir() else _begin(path)
        if path.is_dir() or begin.startswith(b"PK"):
            found = Bundle.open(path).ledger()
            return found.origin, found.entries, found.checkpoints
        if not begin.startswith(b"SQLite format 3"):
            found = export.read_export(path)
            return found.origin, found.entries, found.checkpoints
    with Log.open(where) as log:
        return log.origin, tuple(log.read()), log.checkpoints()


def _begin(path: Path) -> bytes:
    with path.open("rb") as handle:
        return handle.read(16)


def _folded(datas: Sequence[bytes]) -> Fold:
    from fedmat.ledger.fold import Fold

    return Fold.of(datas)


def _fold(where: str) -> Fold:
    return _folded(_datas(where)[1])


def _examined(where: str) -> Examined:
    from fedmat.ledger import whole

    origin, datas, checkpoints = _datas(where)
    return whole.examine(datas, checkpoints, origin)


def _own(folder: Path, fold: Fold) -> PartyKeys:
    """Returns the keys of a party of the ledger, those that count now."""
    from fedmat import governance, keys

    name = keys.entry_of(folder).name
    party = fold.parties.get(name)
    if party is None:
        raise ProtocolError("unknown_member", f"{name} is no party of {fold.consortium}", fix="use the keys of a member")
    return governance.held(folder, party)


def _among(found: Standing, fold: Fold | None, own: Party) -> Party:
    """Returns the entry of a signer as the proposal or the ledger knows it; its own where neither does."""
    from fedmat import governance

    known = governance.known(found.entry, fold)
    return known.get(own.name, own)


def _operator(found: Standing, fold: Fold) -> Party:
    from fedmat import governance

    return governance.known(found.entry, fold)["operator"]


def _checkpoint(log: Any, fold: Fold, folder: Path) -> str:
    from fedmat import governance
    from fedmat.ledger import whole

    party = fold.key_at("operator", fold.size) or fold.operator  # new keys sign from the next entry on
    return str(log.sign_checkpoint(whole.origin(fold.consortium), governance.held(folder, party)))


def _write(path: Path, data: bytes) -> Path:
    from fedmat import files

    if path.exists():
        raise ConfigError(f"{path} is there already, and nothing was written", fix="name another file with -o")
    files.write_atomic(path, data)
    return path


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({type(error).__name__})", fix="name the file that was sent") from None


def _valid(make: Any) -> Any:
    """Returns an entry; a field that a person wrote wrong is a setting to correct."""
    from pydantic import ValidationError

    try:
        return make()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", fix="see --help") from None


def _tell(
    path: Path,
    found: Standing,
    as_json: bool,
    told: Sequence[tuple[str, str]] = (),
    more: dict[str, Any] | None = None,
) -> None:
    """Says what a proposal is, who has signed it and who has to."""
    from fedmat import console
    from fedmat.ledger import words

    if as_json:
        digest = {"digest": found.entry.sha256} if found.entry.type == "charter" else {}
        console.write_json({
            "proposal": str(path), "type": found.entry.type, "words": words.words(found.entry), **digest,
            "signed": list(found.signed), "missing": list(found.missing), "votes_missing": found.votes_missing,
            "complete": found.complete, **(more or {}),
        })  # fmt: skip
        return
    name = console.show_path(path)
    then = (
        f"the operator: fedmat ledger append {name} --ledger LEDGER"
        if found.complete
        else f"send it to {found.lacking()}; each signs with fedmat ledger sign {path.name} --folder KEYS"
    )
    console.show_where([
        ("proposal", f"{name}: {words.words(found.entry)}"), *told, ("signed by", ", ".join(found.signed)),
        ("still to sign", found.lacking()), ("then", then),
    ])  # fmt: skip


def _show_entry(entry: Any) -> None:
    from fedmat import console
    from fedmat.ledger import words

    if entry.type == "charter":
        rows = [
            (p.name, p.kind, p.organisation, str(p.not_after), p.sha256[:16]) for p in (*entry.keys.parties, entry.operator)
        ]
        console.show_rows("", ("party", "kind", "organisation", "keys count until", "fingerprint begins"), rows)
    told = [("type", entry.type), ("says", words.words(entry)), ("of", entry.by), ("dated", entry.time)]
    if entry.type == "charter":
        told += words.terms_in_words(entry)
    console.show_rows("", ("", "what stands in it"), told)


def _show_departure(after: Departure) -> None:
    from fedmat import console

    rows = [
        (
            m.run, (m.model_sha256 or "-")[:16], m.registered or "-", "yes" if m.champion else "",
            f"{m.rounds[0]} to {m.rounds[-1]}" if m.rounds else "inputs' scaling alone",
            "none" if m.last_without is None else f"round {m.last_without}",
        )
        for m in after.models
    ]  # fmt: skip
    if rows:
        columns = ("run", "model begins", "registered as", "champion", "its updates in rounds", "last round without it")
        console.show_rows("models that descend from its data: withdraw them, or train again", columns, rows)
    else:
        console.say("no model in the ledger descends from its data")
    console.show_where([
        ("remaining", f"{', '.join(after.remaining) or 'nobody'}; quorum {after.quorum}"),
        ("datasets", f"{len(after.datasets)} that later models must not descend from"),
        *(("problem", p) for p in after.problems),
        *(("pod concerned", p) for p in after.pods),
        *(("then", c) for c in after.commands),
    ])  # fmt: skip


def _pretty(value: Any) -> str:
    import json

    return json.dumps(value, indent=2, ensure_ascii=False)


def _now() -> datetime:
    from datetime import UTC

    return datetime.now(UTC)
