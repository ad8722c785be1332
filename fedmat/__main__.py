"""``python -m fedmat`` is the command ``fedmat``."""

from fedmat.cli import app

app(prog_name="fedmat")
