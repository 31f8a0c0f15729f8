"""The README's grids are the printed one: its snippets are run here, with schedulers that only write down."""

import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from modules.commands.arms import DEFAULT_ARMS
from modules.commands.trials import plan

ROOT = Path(__file__).resolve().parents[2]


def block(language: str, word: str) -> str:
    """The fenced block of the README in a language that holds a word."""
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return next(text for text in blocks if word in text)


@pytest.fixture
def trials(monkeypatch):
    """Words after the interpreter of every trial of the README's grid."""
    monkeypatch.chdir(ROOT)
    return lambda *overrides: [
        trial.command[1:] for trial in plan("configs/parts.yaml", DEFAULT_ARMS, (0, 1, 2), overrides)
    ]


def test_submitit_gets_every_trial_as_a_command(trials, monkeypatch):
    submitted, asked = [], {}

    class AutoExecutor:
        def __init__(self, folder):
            assert "%j" in folder

        def update_parameters(self, **parameters):
            asked.update(parameters)

        def map_array(self, function, commands):
            assert function is subprocess.check_call
            submitted.extend(commands)

    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(AutoExecutor=AutoExecutor))
    exec(compile(block("python", "submitit"), "README.md", "exec"), {})
    assert [words[0] for words in submitted] == [sys.executable] * 18
    assert [words[1:] for words in submitted] == trials()
    assert asked["gpus_per_node"] == 1


def test_skypilot_gets_every_trial_with_its_quotes(trials, tmp_path):
    """`sky` writes down what it is given; the job's own line then says what its Python would be called with."""
    job = yaml.safe_load(block("yaml", "TRIAL"))
    assert job["envs"] == {"TRIAL": ""} and job["volumes"] == {"/mnt/runs": "runs"}
    words = "import json, sys; print(json.dumps(sys.argv[1:]))"
    python = f"{shlex.quote(sys.executable)} -c {shlex.quote(words)}"
    run = job["run"].replace('eval ".venv/bin/python $TRIAL"', 'eval "$SHOW $TRIAL"')
    assert run != job["run"], "the line this test stands in for has changed"
    script = (
        f"cd {shlex.quote(str(ROOT))}\n"
        f'python() {{ {shlex.quote(sys.executable)} "$@"; }}\n'
        'sky() { for word in "$@"; do case "$word" in TRIAL=*) printf "%s\\n" "${word#TRIAL=}";; esac; done; }\n'
        + block("bash", "sky jobs").replace("trials.txt", shlex.quote(str(tmp_path / "trials.txt")))
    )
    given = subprocess.run(["bash", "-ec", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [shlex.split(line) for line in given] == trials("run.dir=/mnt/runs")
    shown = subprocess.run(
        ["bash", "-ec", run], env={"SHOW": python, "TRIAL": given[-1]}, capture_output=True, text=True, check=True
    )
    assert yaml.safe_load(shown.stdout) == trials("run.dir=/mnt/runs")[-1]
