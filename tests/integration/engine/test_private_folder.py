"""Socket folders of engines whose server was killed are removed by the next one; those in use never are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from octavo_engine.process.private_folder import PREFIX, PrivateFolder, remove_abandoned

OWNER = textwrap.dedent(
    """
    import time
    from octavo_engine.process.private_folder import PrivateFolder
    print(PrivateFolder().path, flush=True)
    time.sleep(3600)
    """
)


@pytest.fixture(autouse=True)
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_folder_of_a_killed_owner_is_removed_and_that_of_a_living_one_is_not(parent: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(parent)}
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, env=environment)
    assert owner.stdout is not None
    with owner, owner.stdout:
        folder = owner.stdout.readline().strip()
        (Path(folder) / "commands").touch()

        assert remove_abandoned() == []
        assert Path(folder).is_dir()

        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert remove_abandoned() == [folder]
    assert list(parent.iterdir()) == []


def test_what_is_no_folder_of_ours_is_left_alone(parent: Path) -> None:
    elsewhere = parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").touch()
    (parent / f"{PREFIX}link").symlink_to(elsewhere)
    (parent / f"{PREFIX}file").touch()
    (parent / "octavo-other").mkdir()

    assert remove_abandoned() == []

    assert (elsewhere / "mine").exists()
    assert len(list(parent.iterdir())) == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make folders that belong to somebody else")
def test_other_peoples_folders_are_left_alone(parent: Path) -> None:
    folder = parent / f"{PREFIX}theirs"
    folder.mkdir()
    os.chown(folder, 12_345, 12_345)

    assert remove_abandoned() == []
    assert folder.is_dir()


def test_a_folder_goes_with_its_owner_and_is_private(parent: Path) -> None:
    folder = PrivateFolder()

    assert Path(folder.path).stat().st_mode & 0o777 == 0o700
    assert remove_abandoned() == []
    folder.remove()

    assert list(parent.iterdir()) == []
