"""A whole replica process around the fake engine: `python -m fakes.fake_replica '{"step_s": 1}' '{"port": 8000}'`."""

from __future__ import annotations

import json
import sys

from fakes.byte_tokenizer import ByteTokenizer
from fakes.fake_engine import FakeEngine
from octavo_engine.errors import ModelLoadError
from octavo_server.serving import run_replica
from octavo_server.settings import ServeSettings


def main() -> int:
    engine_arguments, settings = (json.loads(argument) for argument in sys.argv[1:])
    load_error = engine_arguments.pop("load_error", None)
    engine = FakeEngine(**engine_arguments, load_error=None if load_error is None else ModelLoadError(load_error))
    return run_replica(ServeSettings(model="fake", **settings), lambda config: engine, lambda path: ByteTokenizer())


if __name__ == "__main__":
    raise SystemExit(main())
