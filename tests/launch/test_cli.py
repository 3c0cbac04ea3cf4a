"""The command line: help, exit codes, one clear message for what the user can put right, before anything starts."""

import os
import re
import socket
import sys
import types
from pathlib import Path

import pytest

from launch import __version__, cli
from launch.commands import train
from launch.processes import world
from launch.processes.world import VARIABLES
from pipeline.config.load import load_config


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """Without a launcher, and with whatever a test sets taken back."""
    for name in (*VARIABLES, "INFINI_DEBUG", "SLURM_STEP_ID"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def run_yaml(tmp_path) -> Path:
    prepared = tmp_path / "set"
    prepared.mkdir()
    (prepared / "manifest.json").write_text("{}")
    path = tmp_path / "run.yaml"
    path.write_text(f"run_dir: {tmp_path}/run\ndata: {{sets: [{{path: {prepared}}}]}}\n")
    return path


@pytest.fixture
def trainer(monkeypatch):
    """Takes the place of pipeline.training.run; its `calls` are (config, resume), in the `worlds` of VARIABLES."""
    module = types.ModuleType("pipeline.training.run")
    module.calls, module.worlds = [], []
    module.error = None

    def fake_train(config, resume):
        module.calls.append((config, resume))
        module.worlds.append([os.environ.get(name) for name in VARIABLES])
        if module.error:
            raise module.error
        return 0

    module.train = fake_train
    monkeypatch.setitem(sys.modules, "pipeline.training.run", module)
    return module


@pytest.fixture
def launched(monkeypatch):
    """Calls of launch_workers, which starts nothing."""
    from launch.processes import agent

    calls = []
    monkeypatch.setattr(agent, "launch_workers", lambda *arguments: calls.append(arguments) or 0)
    return calls


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    for module in cli.COMMANDS:
        assert module.rpartition(".")[2].replace("_", "-") in printed.split("commands:")[1].split()


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert (left.value.code, capsys.readouterr().out) == (0, f"infini {__version__}\n")


@pytest.mark.parametrize(
    "argv", [[], ["dance"], ["train"], ["train", "a.yaml", "--fast"], ["train", "a.yaml", "--nproc", "0"]]
)
def test_wrong_usage_is_exit_code_2(argv):
    with pytest.raises(SystemExit) as left:
        cli.main(argv)
    assert left.value.code == 2


@pytest.mark.parametrize(
    "argv, message",
    [
        (["prepare", "books", "--out", "set", "--valid_fraction", "0.1"], "did you mean --valid-fraction?"),
        (["train", "a.yaml", "--train.steps=3"], "a setting has no dashes: train.steps=VALUE"),
        (["train", "a.yaml", "--zzz"], "`infini train --help` lists the options"),
        (["prepare", "books--out", "set"], "required: --out (is a space missing in 'books--out'?)"),
    ],
)
def test_a_mistyped_option_is_told_what_was_meant(argv, message, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(argv)
    error = capsys.readouterr().err
    assert left.value.code == 2 and message in error and f"infini {argv[0]}: error: " in error


def test_a_new_run_in_an_old_ones_folder_starts_no_process(run_yaml, launched, capsys):
    run = run_yaml.parent / "run"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    assert cli.main(["train", str(run_yaml), "--nproc", "2"]) == 2
    assert f"run_dir: {run} holds a run already; go on with --resume" in capsys.readouterr().err
    assert not launched and len(list(run.iterdir())) == 1
    assert cli.main(["train", str(run_yaml), "--nproc", "2", "--resume"]) == 0 and launched


def test_user_error_is_one_message_without_traceback(run_yaml, trainer, capsys):
    assert cli.main(["train", str(run_yaml), "model.num_layer=3"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("infini: error: command line: unknown key 'model.num_layer'")
    assert "Traceback" not in printed
    assert not trainer.calls


def test_debug_shows_the_traceback(run_yaml, trainer):
    with pytest.raises(ValueError, match="num_layer"):
        cli.main(["--debug", "train", str(run_yaml), "model.num_layer=3"])


def test_absent_file(capsys):
    assert cli.main(["train", "absent.yaml"]) == 2
    assert "absent.yaml does not exist" in capsys.readouterr().err


def test_interrupt_is_exit_code_130(run_yaml, trainer):
    trainer.error = KeyboardInterrupt()
    assert cli.main(["train", str(run_yaml)]) == 130


def test_alone_the_process_is_a_world_of_one(run_yaml, trainer, monkeypatch):
    assert cli.main(["train", str(run_yaml), "train.steps=77", "--resume", "train.lanes=4"]) == 0
    ((config, resume),) = trainer.calls
    assert (config.train.steps, config.train.lanes, resume) == (77, 4, "latest")
    ((*alone, port),) = trainer.worlds
    assert alone == ["0", "1", "0", "1", "127.0.0.1"] and int(port) > 0


@pytest.mark.parametrize("error", [None, OSError("disk"), KeyboardInterrupt()])
def test_a_command_leaves_the_process_as_it_was(run_yaml, trainer, error):
    """The next one in this process, and libraries that look for a launcher, find none."""
    trainer.error = error
    cli.main(["train", str(run_yaml)])
    assert not any(name in os.environ for name in VARIABLES)
    trainer.error = None
    assert cli.main(["train", str(run_yaml), "--master-port", str(world.free_port())]) == 0
    assert len(trainer.worlds) == 2 and not any(name in os.environ for name in VARIABLES)


def test_traceback_of_a_single_process_is_kept(run_yaml, trainer, tmp_path, capsys):
    trainer.error = OSError(28, "No space left on device", "shard.tar")
    assert cli.main(["train", str(run_yaml)]) == 2
    assert capsys.readouterr().err == "infini: error: [Errno 28] No space left on device: 'shard.tar'\n"
    assert "fake_train" in (tmp_path / "run" / "error-rank0.txt").read_text()


@pytest.mark.parametrize(
    ("argv", "overrides", "resume"),
    [
        ([], [], None),
        (["a.b=1", "--nproc", "2", "c=2"], ["a.b=1", "c=2"], None),
        (["--resume"], [], "latest"),
        (["--resume", "runs/x/step-5", "c=2"], ["c=2"], "runs/x/step-5"),
        (["--resume", "c=2", "d=3"], ["c=2", "d=3"], "latest"),
    ],
)
def test_overrides_and_options_in_any_order(argv, overrides, resume, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "_start", lambda args: seen.append(args) or 0)
    args = cli.parse(["train", "run.yaml", "--nproc", "2", *argv])
    assert args.run(args) == 0
    assert (seen[0].overrides, seen[0].resume) == (overrides, resume)


def test_nproc_checks_before_it_starts_anything(run_yaml, launched, capsys):
    assert cli.main(["train", str(run_yaml), "--nproc", "3", "parallel.tensor=2"]) == 2
    assert "3 process(es) cannot hold parallel.tensor = 2" in capsys.readouterr().err
    assert not launched
    assert cli.main(["train", str(run_yaml), "--nproc", "4", "parallel.tensor=2", "--resume"]) == 0
    arguments = ["train", str(run_yaml), "parallel.tensor=2", "--resume", "latest"]
    assert launched == [("launch.cli", arguments, 4, None, 0)]


def test_restarts_are_the_launchers(run_yaml, launched, capsys):
    assert cli.main(["train", str(run_yaml), "--nproc", "2", "--max-restarts", "3"]) == 0
    assert launched == [("launch.cli", ["train", str(run_yaml)], 2, None, 3)]
    assert cli.main(["train", str(run_yaml), "--max-restarts", "3"]) == 2
    assert "--max-restarts needs --nproc" in capsys.readouterr().err


def test_nproc_under_torchrun_is_refused(run_yaml, launched, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["train", str(run_yaml), "--nproc", "2"]) == 2
    assert "the environment has RANK=0: this process is one rank" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert cli.main(["train", str(run_yaml), "--nproc", "2"]) == 2
    assert "torchrun has set RANK=0 and WORLD_SIZE=4: this process is one rank" in capsys.readouterr().err
    assert not launched


@pytest.mark.parametrize("nproc", [[], ["--nproc", "2"]])
def test_port_in_use(run_yaml, trainer, nproc, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["train", str(run_yaml), "--master-port", str(port), *nproc]) == 2
    assert f"--master-port {port} is in use on this machine" in capsys.readouterr().err
    assert not trainer.calls


def test_under_torchrun_the_world_is_taken_as_it_is(monkeypatch):
    values = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    values |= {"MASTER_ADDR": "node", "MASTER_PORT": "1234"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert world.join_world() == 8
    assert {name: os.environ[name] for name in values} == values


def test_one_process_per_pod_needs_no_local_rank(monkeypatch, capsys):
    pod = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
    for name, value in pod.items():
        monkeypatch.setenv(name, value)
    assert world.join_world() == 2
    assert [os.environ[name] for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")] == ["0", "1"]
    assert "taken as one process on every machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"WORLD_SIZE": None}, "RANK='3' stands in the environment, but WORLD_SIZE"),
        ({"RANK": None}, "WORLD_SIZE='8' stands in the environment, but RANK"),
        ({"RANK": "three"}, "RANK='three' in the environment is no whole number"),
        ({"RANK": "8"}, "RANK=8: must be from 0 to 7"),
        ({"RANK": "-1"}, "RANK=-1: must be from 0 to 7"),
        ({"WORLD_SIZE": "1" * 30}, "is no whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: must be from 1"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2: must be from 0 to 1"),
        ({"LOCAL_RANK": None}, "LOCAL_WORLD_SIZE='2', but LOCAL_RANK"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK='' in the environment is no whole number"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9: must be from 1 to WORLD_SIZE=8"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http' in the environment is no whole number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000: must be a port"),
    ],
)
def test_variables_that_say_no_world_are_named(monkeypatch, changed, expected):
    values = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    values |= {"MASTER_ADDR": "node", "MASTER_PORT": "1234"}
    for name, value in (values | changed).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(expected)):
        world.join_world()


def test_a_port_for_processes_that_others_started_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="--master-port 29500 is for processes that this command starts"):
        world.join_world(29500)


STEP = {"STEP_ID": "1", "PROCID": "5", "LOCALID": "1", "STEP_NUM_TASKS": "8", "STEP_TASKS_PER_NODE": "4(x2)"}
STEP |= {"STEP_NODELIST": "n[3-4]", "JOB_ID": "77", "NODEID": "1"}


def test_under_srun_the_world_follows_from_the_step(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")  # in a container there is no scontrol
    for name, value in STEP.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert world.join_world() == 8
    assert [os.environ[name] for name in VARIABLES] == ["5", "8", "1", "4", "n3", "20771"]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"SLURM_LOCALID": None}, "SLURM_LOCALID is not set"),
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID='x'"),
        ({"SLURM_STEP_NODELIST": "n[3"}, "set MASTER_ADDR"),
        ({"SLURM_STEP_NODELIST": None}, "set MASTER_ADDR"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE='4' and SLURM_STEP_NUM_TASKS=8 contradict each other"),
        ({"SLURM_PROCID": "8"}, "RANK=8: must be from 0 to 7"),
    ],
)
def test_variables_of_slurm_that_say_no_world_are_named(monkeypatch, changed, expected):
    for name, value in ({f"SLURM_{name}": value for name, value in STEP.items()} | changed).items():
        if value is not None:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    with pytest.raises(ValueError, match=re.escape(expected)):
        world.join_world()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[3-4]", "n3"),
        ("n[03-12,20],m1", "n03"),
        ("gpu-a.b.c,n[1-2]", "gpu-a.b.c"),
        ("rack[1-2]n[5-8]", "rack1n5"),
        ("n[7]", "n7"),
        ("n[1-2]-ib,m", "n1-ib"),
    ],
)
def test_first_node_of_slurms_list(nodes, first):
    assert world.first_node(nodes) == first


def test_config_arguments_reach_the_loader(run_yaml):
    args = cli.parse(["train", str(run_yaml), "name=x"])
    assert train.checked_config(args, 1) == load_config(run_yaml, ["name=x"])
