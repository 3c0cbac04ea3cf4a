"""Which rank may speak: claims of several ranks, taken in one process."""

from __future__ import annotations

import os
import stat

import pytest

from launch.processes import claims
from launch.processes.claims import CLAIM_FOLDER, Claim


@pytest.fixture(autouse=True)
def ranks(tmp_path, monkeypatch):
    """Two ranks on this node, started by srun."""
    for name in ("TORCHELASTIC_RUN_ID", CLAIM_FOLDER):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "SLURM_JOB_ID": "17"}.items():
        monkeypatch.setenv(name, value)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(claims.tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(claims, "GRACE_S", 0.0)
    monkeypatch.setattr(claims, "WATCH_INTERVAL_S", 0.0)
    return temporary


def test_one_rank_gets_the_claim_and_the_others_see_it(tmp_path):
    first, second = (Claim(tmp_path / "run") for _ in range(2))
    assert not second.is_taken()
    assert first.take() and second.is_taken()
    assert not second.take()
    (claim,) = (tmp_path / "run").iterdir()
    assert not claim.stat().st_mode & 0o111


def test_ranks_of_one_node_claim_in_the_launchers_folder(tmp_path, monkeypatch):
    launcher, run_dir = tmp_path / "launcher", tmp_path / "run"
    launcher.mkdir()
    monkeypatch.setenv(CLAIM_FOLDER, str(launcher))
    early, late = Claim(None), Claim(run_dir)
    assert early.take() and late.is_taken() and not run_dir.exists()
    monkeypatch.setenv("WORLD_SIZE", "4")  # two nodes: only the run folder is seen by all
    assert Claim(run_dir).folder == run_dir


def test_without_any_folder_nothing_stays_in_the_temporary_one(ranks):
    first, second = Claim(None), Claim(None)
    assert first.take() and second.is_taken() and not second.take()
    (folder,) = ranks.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    first.release()
    assert list(ranks.iterdir()) == []


def test_a_folder_that_others_can_write_is_not_believed(ranks):
    """Somebody who guesses its name could silence the ranks, or end them."""
    claim = Claim(None)
    claim.own.mkdir()
    os.chmod(claim.own, 0o777)
    claim.path.touch()
    assert not claim.is_taken()
    assert claim.take() and claim.take()
    claim.path.unlink()
    claim.own.rmdir()
    claim.own.symlink_to(ranks.parent)
    assert claim.take() and not claim.is_taken()
