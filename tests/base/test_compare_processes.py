"""Trials as processes of their own: signals that reach them, and two that meet in the token cache."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

import trainer
from modules import config
from modules.commands import trials
from modules.errors import Terminated
from modules.termination import termination
from tests.base.tinyset import write_config


def test_sigterm_reaches_the_trial_under_way_and_waits_for_its_checkpoint(tmp_path):
    script = (
        "import signal, sys, time\nfrom pathlib import Path\n"
        f"def checkpoint(*_):\n    time.sleep(0.1)\n    Path({str(tmp_path / 'saved')!r}).touch()\n    sys.exit(143)\n"
        f"signal.signal(signal.SIGTERM, checkpoint)\nPath({str(tmp_path / 'ready')!r}).touch()\ntime.sleep(60)\n"
    )
    trial = trials.Planned("ce", 0, config.Config(), tmp_path / "ce-s0", [sys.executable, "-c", script])

    def stop_when_ready():
        while not (tmp_path / "ready").exists():
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    termination.listen()
    try:
        threading.Thread(target=stop_when_ready).start()
        with pytest.raises(Terminated):
            trials.run_trial(trial, tmp_path / "logs/ce-s0.log")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "saved").exists()


def test_printed_trials_run_in_parallel_as_separate_processes(tmp_path, capsys):
    """Two generating arms of one seed meet in the token cache, as on a cluster; `compare` then finds them finished."""
    path = write_config(
        tmp_path, learning={"steps": 4, "warmup_steps": 1}, evaluation={"judge_steps": 1, "bootstrap": 40}
    )
    arguments = [str(path), "--arms", "positives,jigsaw_roundtrip", "--seeds", "0"]
    assert trainer.main(["compare", *arguments, "--print-trials"]) == 0
    lines = capsys.readouterr().out.splitlines()
    processes = [
        subprocess.Popen(line, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in lines
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len([entry for entry in (tmp_path / "runs/cache/tokens").iterdir() if entry.is_dir()]) == 1
    assert sum("class tokens, denoising loss" in output for output in outputs) == 1, "one learned, the other waited"
    assert sum("class tokens: read from the cache" in output for output in outputs) == 1
    assert trainer.main(["compare", *arguments]) == 0
    assert capsys.readouterr().out.count("finished before") == 2
    found = json.loads((tmp_path / "runs/tiny/compare.json").read_text())
    assert len(found["finished"]) == 2 and not found["unfinished"]
    assert found["arms"]["positives"]["cost.images_generated"]["mean"] > 0
    assert (tmp_path / "runs/tiny/compare.html").exists()
