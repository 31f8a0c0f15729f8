"""A run's directory: locked, exact in what it lets go on, whole in what it writes."""

import json
import multiprocessing
import os
import resource

import pytest
import yaml

from modules.config import Config
from modules.errors import ConfigError, DataError, StorageError
from modules.records import read_record
from modules.settings import flatten, with_settings
from modules.workdir import MAY_CHANGE, Workdir


@pytest.fixture
def config(tmp_path):
    return with_settings(Config(), {"run.name": "one", "run.dir": str(tmp_path)})


def opened(config, **origins) -> Workdir:
    return Workdir(config, origins)


def begun(config) -> Workdir:
    """The closed directory of a run that holds a checkpoint."""
    workdir = opened(config)
    (workdir.checkpoints / "contrastive" / "step-00000004").mkdir(parents=True)
    (workdir.checkpoints / "contrastive" / "step-00000004" / "manifest.json").write_text("{}")
    workdir.close()
    return workdir


def test_the_resolved_config_with_origins_is_kept(config):
    workdir = Workdir(config, {"learning.lr": "command line"})
    text = (workdir.path / "config.yaml").read_text()
    assert "lr: 0.1  # command line" in text and "momentum: 0.9  # default" in text
    stored = yaml.safe_load(text)
    for name, value in flatten(config).items():
        section, key = name.split(".")
        assert stored[section][key] == (list(value) if isinstance(value, tuple) else value)
    workdir.close()


def test_one_process_at_a_time_and_the_other_is_named(config):
    workdir = opened(config)
    with pytest.raises(StorageError, match=f"in use by process {os.getpid()}; wait for it, or set run.name"):
        opened(config)
    workdir.close()
    workdir.close()
    opened(config).close()


def test_what_a_killed_process_left_is_removed_by_the_next(config):
    path = begun(config).path
    (path / "export").mkdir()
    for name in (".config.yaml.123", "export/.encoder.safetensors.123"):
        (path / name).write_text("half")
    workdir = opened(config)
    assert not list(path.rglob("*.123")) and any(workdir.checkpoints.rglob("manifest.json"))
    workdir.write_json("results.json", {})  # and here it is killed
    workdir.close()
    workdir = opened(config)
    assert workdir.results() == {} and not workdir.checkpoints.exists()
    workdir.close()


def _filled(config, found):
    """A process that may make no file longer than 0 bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    workdir = opened(config)
    found.send(workdir.results())
    workdir.close()
    try:
        opened(with_settings(config, {"run.name": "new"}))
    except StorageError as error:
        found.send(str(error))


def test_on_a_full_disk_a_finished_run_shows_its_result_and_another_is_refused(config):
    workdir = opened(config)
    workdir.write_json("results.json", {"test.accuracy": 0.5})
    workdir.close()
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    child = fork.Process(target=_filled, args=(config, there))
    child.start()
    child.join(60)
    assert here.poll(1) and here.recv() == {"test.accuracy": 0.5}
    assert here.poll(1) and "config.yaml: could not be written" in here.recv()


def _hold_and_die(config):
    opened(config)
    os._exit(9)


def test_a_lock_dies_with_its_process(config):
    child = multiprocessing.get_context("fork").Process(target=_hold_and_die, args=(config,))
    child.start()
    child.join(60)
    assert child.exitcode == 9
    workdir = opened(config)
    with pytest.raises(StorageError, match=f"in use by process {os.getpid()};"):
        opened(config)
    workdir.close()


def test_a_directory_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written .*; set run.dir"):
        opened(with_settings(config, {"run.dir": str(tmp_path / "file")}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning.lr", 0.2), ("run.seed", 1), ("generation.strengths", {0.5: 1.0}), ("probe.lrs", [0.1])],
)
def test_a_run_does_not_go_on_under_other_settings(config, name, value):
    path = begun(config).path
    before = (path / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=f"holds a run of other settings .*{name} was .*, now .*set run.name"):
        opened(with_settings(config, {name: value}))
    assert (path / "config.yaml").read_bytes() == before
    opened(config).close()


def test_a_look_replaces_an_earlier_one_but_never_one_under_way(config):
    path, other = begun(config).path, with_settings(config, {"learning.lr": 0.2})
    first = opened(config)
    kept = (path / "config.yaml").read_bytes()
    with pytest.raises(StorageError, match="in use by process"):
        Workdir(other, {}, replacing=True)
    assert (path / "config.yaml").read_bytes() == kept and (path / "checkpoints").exists()
    first.close()
    Workdir(config, {}, replacing=True).close()
    assert (path / "checkpoints").exists(), "the same look goes on"
    Workdir(other, {}, replacing=True).close()
    assert "lr: 0.2" in (path / "config.yaml").read_text() and not (path / "checkpoints").exists()


def test_a_look_replaced_halfway_is_not_taken_for_the_new_one(config, monkeypatch):
    """Killed while it removes an earlier look, the next of the same settings removes the rest, and goes on with none."""

    def die(folder, **options):
        raise KeyboardInterrupt

    begun(config)
    other = with_settings(config, {"learning.lr": 0.2})
    with monkeypatch.context() as patched:
        patched.setattr("modules.workdir.shutil.rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            Workdir(other, {}, replacing=True)
    workdir = Workdir(other, {}, replacing=True)
    assert not workdir.goes_on and not workdir.checkpoints.exists()
    workdir.close()


@pytest.mark.parametrize("content", [None, b"", b"hello", b"run: {a: [", b"run:\n- 1\n", b"\xff\xfe"])
def test_work_of_unknown_settings_is_refused(config, content):
    """Without its config.yaml a run would go on under any settings at all."""
    path = begun(config).path / "config.yaml"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="config.yaml: cannot be read .* are not known; restore it, or set run.name"):
        opened(config)
    Workdir(config, {}, replacing=True).close()
    opened(config).close()


def test_every_changed_setting_is_named(config):
    begun(config)
    with pytest.raises(ConfigError, match=r"run.seed was 0, now 3; learning.lr was 0.1, now 0.2"):
        opened(with_settings(config, {"learning.lr": 0.2, "run.seed": 3}))


def test_settings_that_do_not_change_results_may_change(config):
    begun(config)
    changes = {"run.threads": 1, "run.log_every": 3, "run.checkpoint_every": 7, "run.keep_checkpoints": 1}
    changes |= {"run.cache_dir": "elsewhere", "run.kernels": "torch", "tune.steps": 5}
    changes |= {
        "evaluation.batch_size": 8,
        "evaluation.tsne_points": 0,
    }  # else memory that runs out after training is the end
    assert changes.keys() - {"tune.steps"} <= MAY_CHANGE
    opened(with_settings(config, changes)).close()


def test_a_command_that_ended_before_any_work_may_be_corrected(config):
    opened(config).close()
    opened(with_settings(config, {"data.root": "elsewhere"})).close()


def test_a_finished_run_is_kept_from_other_settings_too(config):
    workdir = opened(config)
    assert workdir.results() is None
    workdir.write_json("results.json", {"test.accuracy": 0.5})
    assert workdir.results() == {"test.accuracy": 0.5}
    workdir.close()
    with pytest.raises(ConfigError, match="run.seed was 0, now 1"):
        opened(with_settings(config, {"run.seed": 1}))


def test_work_is_held_to_every_file_that_it_began_with(config):
    workdir = opened(config)
    for setting in ("data.root", "pipeline.path"):
        workdir.hold_to(setting, "here", "as it was")
    workdir.close()
    opened(config).close()
    begun(config)
    for setting in ("data.root", "pipeline.path"):
        workdir = opened(config)
        before = (workdir.path / "inputs.json").read_bytes()
        with pytest.raises(DataError, match=f"{setting} here: these files are not those that this run began with"):
            workdir.hold_to(setting, "here", "another")
        assert (workdir.path / "inputs.json").read_bytes() == before
        workdir.close()


def test_what_a_run_computes_with_is_kept_and_changes_are_told(config):
    workdir = opened(config)
    assert workdir.computes_with({"torch": "2.11", "device": "cpu"}) == {}
    assert workdir.computes_with({"torch": "2.11", "device": "cpu"}) == {}
    changed = workdir.computes_with({"torch": "2.11", "threads": 2})
    assert changed == {"device": ("cpu", None), "threads": (None, 2)}
    assert workdir.computes_with({"torch": "2.11", "threads": 2}) == {}
    history = json.loads((workdir.path / "inputs.json").read_text())["runtime"]
    assert history == [{"torch": "2.11", "device": "cpu"}, {"torch": "2.11", "threads": 2}]
    workdir.close()


def test_a_refused_command_leaves_the_settings_of_the_one_before(config):
    workdir = opened(config)
    workdir.hold_to("data.root", "here", "as it was")
    workdir.close()
    begun(config)
    workdir = opened(with_settings(config, {"run.log_every": 3}))
    with pytest.raises(DataError):
        workdir.hold_to("data.root", "here", "another")
    assert "log_every: 10 " in (workdir.path / "config.yaml").read_text()
    workdir.hold_to("data.root", "here", "as it was")
    assert "log_every: 3 " in (workdir.path / "config.yaml").read_text()
    workdir.close()


def test_before_any_work_other_files_may_be_read(config):
    for digest in ("one", "another"):
        workdir = opened(config)
        workdir.hold_to("data.root", "here", digest)
        assert json.loads((workdir.path / "inputs.json").read_text()) == {"data.root": digest}
        workdir.close()


def test_metric_rows_beyond_the_resumed_step_are_cut(config):
    workdir = opened(config)
    assert workdir.rows() == []
    for step in (2, 4, 6):
        workdir.log({"step": step, "loss": step / 3})
    with open(workdir.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # power went
    assert [row["step"] for row in workdir.rows()] == [2, 4, 6]
    workdir.cut_rows(4)
    assert workdir.rows() == [{"step": 2, "loss": 2 / 3}, {"step": 4, "loss": 4 / 3}]
    workdir.log({"step": 6})
    lines = (workdir.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6]
    workdir.close()


@pytest.mark.parametrize("line", [b"hello", b"\0" * 40, b"\xff\xfe", b"[]", b"{}", b"\r", b'{"step": "two"}', b""])
def test_a_damaged_metric_row_is_named_with_its_line(config, line):
    workdir = opened(config)
    for step in (2, 4):
        workdir.log({"step": step})
    path = workdir.path / "metrics.jsonl"
    first, second = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, line, second, b""]))
    with pytest.raises(DataError, match=r"metrics.jsonl: line 2 is no metric row .*; delete that line"):
        workdir.cut_rows(4)
    path.write_bytes(b"\n".join([first, second, b""]))
    workdir.cut_rows(4)
    assert [row["step"] for row in workdir.rows()] == [2, 4]
    workdir.close()


@pytest.mark.parametrize("content", ["", '{"test.accuracy": 0.', "[1, 2]"])
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(DataError, match=r"results.json: (cannot be read|holds no JSON object)"):
        read_record(tmp_path / "results.json")
