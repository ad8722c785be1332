"""What all commands share: errors become one panel and an exit code, and options that mean the same everywhere.

Knows: typer. Refuses to know: what any command does.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fedmat.errors import FedmatError

DEBUG = "--debug"


class Group(TyperGroup):
    """Turns errors into one panel and an exit code, and lets ``--debug`` stand anywhere on the line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Moves ``--debug`` to the front."""
        end = args.index("--") if "--" in args else len(args)
        if ctx.parent is None and DEBUG in args[:end]:
            args = [DEBUG, *(a for i, a in enumerate(args) if a != DEBUG or i > end)]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; the outermost group alone handles its errors."""
        if ctx.parent is not None:
            return super().invoke(ctx)
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if type(error).__module__.split(".")[0] in ("typer", "click"):  # wrong usage: typer says so itself
                raise
            from fedmat import console

            if ctx.params.get("debug"):
                traceback.print_exc()
            elif isinstance(error, FedmatError):
                console.show_error(error)
            else:
                console.show_bug(error)
            raise typer.Exit(error.exit_code if isinstance(error, FedmatError) else FedmatError.exit_code) from None


Json = Annotated[bool, typer.Option("--json", help="Answer in JSON on stdout; progress stays on stderr.")]
Home = Annotated[
    Path | None,
    typer.Option(help="Workspace of the consortium.", show_default="$FEDMAT_HOME or .fedmat, then its name"),
]
Store = Annotated[
    str | None,
    typer.Option("--tracking-uri", help="MLflow's store.", show_default="$MLFLOW_TRACKING_URI or mlruns/mlflow.db"),
]
