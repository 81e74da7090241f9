"""Every setting of a replica can be given as a flag."""

from __future__ import annotations

import inspect

from octavo_cli.serve import serve
from octavo_server.settings import FIELDS

# Told by another flag's name, a mapping that only a file can hold, and a bound that nobody should need to move.
_WITHOUT_FLAG = {"served_model_names", "tenant_weights", "step_timeout_s"}


def test_every_setting_has_its_flag() -> None:
    flags = set(inspect.signature(serve).parameters)

    assert set(FIELDS) - _WITHOUT_FLAG <= flags
    assert flags - set(FIELDS) == {"model_argument", "served_model_name", "config"}
