"""What a party's FLARE client no longer does, whatever a server asks and whoever signed a job."""

from __future__ import annotations

from pathlib import Path

import pytest
from nvflare.private.fed.client.client_req_processors import ClientRequestProcessors

from fedmat import files, kit_settings
from fedmat.federation import flare


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the commands a client answers after the lockdown; FLARE's own list is put back afterwards."""
    monkeypatch.setattr(ClientRequestProcessors, "request_processors", list(ClientRequestProcessors.request_processors))
    before = {type(p).__name__ for p in ClientRequestProcessors.request_processors}
    assert "ShellCommandProcessor" in before  # else FLARE has renamed it, and the lockdown takes nothing away
    flare.Lockdown()
    return [type(p).__name__ for p in ClientRequestProcessors.request_processors]


def test_a_client_has_no_command_for_its_files_environment_or_logs(commands: list[str]) -> None:
    assert not {c for c in commands if "Shell" in c or "Env" in c or "Log" in c}
    assert {"StartJobProcessor", "DeployProcessor", "AbortAppProcessor"} <= set(commands)


def test_every_name_that_is_taken_away_is_one_of_flares() -> None:
    assert {type(p).__name__ for p in ClientRequestProcessors.request_processors} >= flare._TAKEN_AWAY


@pytest.mark.parametrize("odd", ["custom/evil.py", "config/more.json", "evil.so", "config/config_fed_client.conf"])
def test_a_job_with_anything_but_settings_is_refused(tmp_path: Path, odd: str) -> None:
    app = flare.write_job(
        tmp_path / "job", name="n", conductor="fedmat.conductor.Federate", order="o", consortium=b"", stated={}, least=1
    )
    validator = flare.SettingsOnly()
    assert validator.validate(str(app / "app")) == ("", {})
    files.write_atomic(app / "app" / odd, b"")
    assert "settings and nothing else" in validator.validate(str(app / "app"))[0]


def test_both_are_in_every_partys_kit() -> None:
    found = kit_settings.client_resources()
    assert found["app_validator"]["path"] == "fedmat.federation.flare.SettingsOnly"
    assert "fedmat.federation.flare.Lockdown" in {c["path"] for c in found["components"]}
