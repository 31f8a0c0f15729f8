"""Bad input at the command line: its exit code, one clear message on stderr, nothing half-written."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from safetensors import safe_open

import trainer
from modules.diffusion.tokens import FILE
from modules.errors import StorageError, Terminated
from modules.learning.backbones import build_backbone
from modules.settings import load_config, to_yaml
from modules.state import safetensors_bytes
from modules.termination import behind, termination
from tests.base.tinyset import contents, finished_run, shared_folder, write_config
from tests.data.trees import class_folders, csv_set, declared_rows, pack, picture, put
from tests.tiny import pipeline_folder

ROOT = Path(trainer.__file__).parent
WORK = ("results.json", "predictions.safetensors", "report.html", "metrics.jsonl", "checkpoints", "export", "tokens")


@pytest.fixture(autouse=True)
def sigterm_as_before():
    before = signal.getsignal(signal.SIGTERM)
    yield
    termination.listen()  # forgets a signal that came
    signal.signal(signal.SIGTERM, before)


def refused(capsys, path, overrides: list[str], code: int, *phrases: str) -> None:
    """`run` ends with this code and one line on stderr that holds every phrase."""
    capsys.readouterr()
    assert trainer.main(["run", str(path), *overrides]) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1, err
    for phrase in phrases:
        assert phrase in err, err


@pytest.mark.parametrize(
    ("override", "phrases"),
    [
        ("learning.stepz=3", ("unknown setting `learning.stepz`", "did you mean `learning.steps`?")),
        ("lerning.steps=3", ("unknown section `lerning`", "did you mean `learning`?")),
        ("learning.steps=many", ("`learning.steps` is 'many'", "expected a whole number")),
        ("learning.steps", ("is not section.key=value",)),
        ("--learning.steps=3", ("settings have no dashes: learning.steps=3",)),
        ("run.name=../elsewhere", ("`run.name` is '../elsewhere'", "set run.dir")),
        ("near_ood.strength=0.01", ("near_ood.strength", "0.01", "= 0", "use a strength of at least")),
        ("generation.images_per_step=0.1", ("synthetic_fraction", "images_per_step", "max_uses", "raise")),
        ("generation.solver=plms", ("`generation.solver` is 'plms'", "ddim")),
    ],
)
def test_settings(override, phrases, tmp_path, capsys):
    path = write_config(tmp_path)
    refused(capsys, path, [override], 2, *phrases)
    assert not (tmp_path / "runs").exists(), "nothing is made before the settings hold"


def test_a_config_file_that_is_not_there(tmp_path, capsys):
    refused(capsys, tmp_path / "no.yaml", [], 2, "no.yaml", "cannot be read")


def changed(where, **values) -> list[dict]:
    return [{**row, **values} if where(row) else row for row in declared_rows()]


def csv(rows):
    return lambda root: csv_set(root, rows)


def named(path):
    return lambda row: row["path"] == path


def zip_lacking_a_member(root):
    path = pack(root / "pack.zip", declared_rows())
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if name != "bolt/bolt-val-0-0.png"}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def zip_reaching_outside(root):
    return pack(root / "pack.zip", changed(named("bolt/bolt-val-0-0.png"), path="../outside.png"))


def with_a_corrupt_image(root):
    path = csv_set(root, declared_rows())
    put(root / "bolt" / "bolt-train-0-0.png", b"\x89PNG\r\n\x1a\n and nothing more")
    return path


def with_a_small_image(root):
    rows = [row for row in declared_rows(groups=5) if row["role"] == "id"]
    path = csv_set(root, rows)
    put(root / "bolt" / "bolt-train-0-0.png", picture(1, 16, 16))
    return path


BAD_SETS = {
    "missing": (lambda root: root / "nowhere", ("nowhere", "does not exist")),
    "empty": (lambda root: root, ("holds no image",)),
    "one image": (lambda root: class_folders(root, {"bolt": 9, "nut": 1}), ("'nut' has one image",)),
    "test only": (
        csv([r for r in declared_rows() if r["label"] != "nut" or r["split"] == "test"]),
        ("'nut' is in test only", "add train images"),
    ),
    "two roles": (
        csv(changed(named("nut/nut-test-0-0.png"), role="near_ood")),
        ("'nut' has the roles id and near_ood",),
    ),
    "straddling group": (
        csv(changed(named("bolt/bolt-test-0-0.png"), group="bolt-train-1")),
        ("group 'bolt-train-1' is in",),
    ),
    "empty label": (csv(changed(named("bolt/bolt-val-0-0.png"), label=" ")), ("bolt-val-0-0.png has an empty label",)),
    "duplicate label": (csv(changed(named("bolt/bolt-val-0-0.png"), label="Bolt")), ("differ only in case or spaces",)),
    "path outside": (
        lambda root: put(root / "set" / "index.csv", "path,label\n../out.png,bolt\n").parent,
        ("../out.png", "outside"),
    ),
    "zip member missing": (zip_lacking_a_member, ("bolt/bolt-val-0-0.png",)),
    "zip member outside": (zip_reaching_outside, ("../outside.png", "outside")),
    "corrupt image": (with_a_corrupt_image, ("bolt/bolt-train-0-0.png", "data.on_bad_image=skip")),
    "small image": (with_a_small_image, ("bolt/bolt-train-0-0.png", "16 px", "smaller than the 32 px")),
}


@pytest.mark.parametrize("name", BAD_SETS)
def test_image_sets(name, tmp_path, capsys):
    build, phrases = BAD_SETS[name]
    (tmp_path / "data").mkdir()
    root = build(tmp_path / "data")
    path = write_config(tmp_path, learning={"classes_per_batch": 2})
    refused(capsys, path, [f"data.root={root}"], 3, *phrases)
    left = {file.split("/")[0] for file in contents(tmp_path / "runs" / "tiny")}
    assert not left & set(WORK)


def test_a_mistyped_root_may_be_corrected(tmp_path, capsys):
    path = write_config(tmp_path, learning={"steps": 1, "warmup_steps": 0}, generation={"synthetic_fraction": 0})
    refused(capsys, path, [f"data.root={tmp_path / 'tiny.zi'}"], 3, "tiny.zi", "does not exist")
    assert trainer.main(["run", str(path)]) == 0


def test_a_pipeline_that_is_missing_in_whole_or_in_part(tmp_path, capsys):
    path = write_config(tmp_path)
    refused(capsys, path, [f"pipeline.path={tmp_path / 'nowhere'}"], 3, "nowhere")
    partial = tmp_path / "partial"
    for source in pipeline_folder().rglob("*"):
        if source.is_file() and "unet" not in source.parts:
            put(partial / source.relative_to(pipeline_folder()), source.read_bytes())
    refused(capsys, path, [f"pipeline.path={partial}"], 3, "unet")
    assert not set(os.listdir(tmp_path / "runs" / "tiny")) & set(WORK)


def test_a_token_of_another_base_model(tmp_path, capsys):
    """As a cache copied from elsewhere, or edited, would hold it."""
    run = finished_run("supcon")
    cache = shared_folder() / "runs" / "cache"
    for source in cache.rglob(FILE):
        with safe_open(source, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            metadata = file.metadata() | {"base_model": "0" * 64}
        put(tmp_path / "cache" / source.relative_to(cache), safetensors_bytes(tensors, metadata))
    own = [f"run.cache_dir={tmp_path / 'cache'}", f"run.dir={tmp_path}"]
    refused(capsys, run.config_path, own, 3, FILE, "learned on")


def test_an_export_names_the_architecture_that_it_holds(tmp_path, capsys):
    run = finished_run("supcon")
    assert run.config.encoder.arch == "auto"
    with safe_open(run.path / "export/encoder.safetensors", "pt") as file:
        facts, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    build_backbone(facts["arch"], int(facts["width"]), None).load_state_dict(weights)
    path = shutil.copytree(run.path, tmp_path / "supcon")
    assert trainer.main(["evaluate", str(path)]) == 0, capsys.readouterr().err


def test_a_run_directory_in_use_names_its_process(tmp_path, capsys):
    path = write_config(tmp_path)
    lock = put(tmp_path / "runs" / "tiny" / ".lock", "4321")
    with open(lock, "a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused(capsys, path, [], 6, "in use by process 4321", "run.name")
    assert not contents(tmp_path / "runs" / "tiny")


def test_a_run_directory_that_cannot_be_written(tmp_path, capsys):
    put(tmp_path / "file", "")
    refused(capsys, write_config(tmp_path), [f"run.dir={tmp_path / 'file'}"], 6, "cannot be written", "set run.dir")


def test_no_valid_checkpoint_left(tmp_path, capsys):
    path = write_config(tmp_path, generation={"synthetic_fraction": 0})
    manifest = tmp_path / "runs" / "tiny" / "checkpoints" / "contrastive" / "step-00000004" / "manifest.json"
    put(manifest, json.dumps({"step": 4, "files": {"tensors.safetensors": "0"}}))
    put(tmp_path / "runs" / "tiny" / "config.yaml", to_yaml(*load_config(path)))
    refused(capsys, path, [], 6, "step-00000004", "no valid checkpoint is left", "delete the checkpoints folder")
    assert manifest.exists(), "nothing is deleted for the user"


def test_a_batch_of_more_classes_than_there_are_is_refused_before_tokens_are_learned(tmp_path, capsys):
    path = write_config(tmp_path, learning={"classes_per_batch": 5})
    refused(capsys, path, [], 2, "learning.classes_per_batch is 5", "4 classes")
    assert not (tmp_path / "runs" / "cache").exists()


@pytest.mark.parametrize("wrapped", [True, False])
def test_sigterm_inside_an_import_on_demand_is_obeyed_not_a_traceback(wrapped, monkeypatch, capsys):
    """diffusers imports its parts when they are first used, and makes a RuntimeError of whatever interrupts that."""

    def command(*_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception as error:
            raise RuntimeError("Failed to import diffusers.models because of the following error") from error

    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("modules.commands.doctor.command", command if wrapped else broken)
    if wrapped:
        assert trainer.main(["doctor"]) == 143
        assert capsys.readouterr().err.startswith("error: SIGTERM: stopped")
    else:
        with pytest.raises(RuntimeError, match="a bug"):
            trainer.main(["doctor"])


def test_what_fails_while_sigterm_is_obeyed_keeps_its_own_name():
    told = StorageError("no space left")
    told.__context__ = Terminated("SIGTERM")
    assert behind(told) is None


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [([], 2, "usage:"), (["help"], 0, "usage:"), (["run", "--help"], 0, "usage:"), (["run", "x.yaml", "--help"], 0, "usage:"), (["rnu", "x"], 2, "unknown verb 'rnu'"),
     (["run"], 2, "run needs a CONFIG")],
)  # fmt: skip
def test_usage(arguments, code, said, capsys):
    assert trainer.main(arguments) == code
    printed = capsys.readouterr()
    text = printed.out + printed.err
    assert said in text and all(verb in text for verb in trainer.VERBS)


def test_every_verb_is_a_module_with_a_command():
    for module, _ in trainer.VERBS.values():
        assert "\ndef command(" in (ROOT / "modules" / "commands" / f"{module}.py").read_text()


def test_help_and_mistakes_answer_without_importing_torch(tmp_path):
    """One process for every verb: what it imports is what the user waits for."""
    put(tmp_path / "run" / "config.yaml", "learning: {steps: 30}\n")
    config, mistake = ["configs/demo.yaml"], "learning.stepz=1"
    calls = [["--help"], ["doctor", "--devise=cpu"], ["evaluate", str(tmp_path / "run"), mistake]]
    calls += [["train-pipeline", "configs/train_pipeline.yaml", "training.vae_stepz=1"]]
    missing = [
        ["evaluate", str(tmp_path / name)] for name in ("nothing", "run")
    ]  # no run, and one that is not finished
    for verb in ("run", "compare", "tune", "profile", "preview", "check"):
        calls += [[verb, *config, mistake], [verb, *config, "--stepz=1"]]
    assert {call[0] for call in calls} == {"--help", *trainer.VERBS}
    script = (
        "import sys, trainer\n"
        f"codes = [trainer.main(call) for call in {calls + missing!r}]\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "print(codes, sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == f"{[0] + [2] * (len(calls) - 1) + [3, 3]} []", done.stderr
    assert done.stderr.count("did you mean `learning.steps`?") == 7
    assert "did you mean `training.vae_steps`?" in done.stderr and "did you mean --device?" in done.stderr
