"""The translation demo's command: its errors, the whole of it, Ctrl-C and exact resumption."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from demo_needs import CPU, command, environment
from translation_pairs import TINY, work_here, write_tsv

from demo import budget
from demo.translation import catalogues, checkpoint, cli, compare, pairs, tokens
from demo.translation.settings import Settings
from demo.translation.worker import INTERRUPTED


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pairs.tsv and, in out, what training on it gave."""
    folder = tmp_path_factory.mktemp("trained")
    tsv = write_tsv(folder / "pairs.tsv")
    run = ["train", *TINY, "--steps=60", "--watch-every=20", "--threads=1"]
    assert cli.main([*run, f"--pairs={tsv}", f"--out={folder / 'out'}"]) == 0
    return folder


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--pairs", "absent"], "--pairs: cannot read absent: No such file or directory"),
        (["--pairs", "folder"], "--pairs: cannot read folder: Is a directory"),
        (["--pairs", "empty"], "--pairs: empty is empty"),
        (["--pairs", "binary"], "--pairs: binary is not UTF-8 text"),
        (["--pairs", "one"], "too few pairs: at least 2 different texts are needed, one to learn"),
        (["--pairs", "twice"], "and one to hold out, got 1"),
        (["--pairs", "untabbed"], "--pairs: line 2 of untabbed must be source, tab, translation, "),
        (["--pairs", "half"], "--pairs: line 1 of half must be source, tab, translation, got 'a'"),
        (["--lang", "xx"], "--lang: must be one of de, fr, zh, got 'xx'"),
        (["--device", "nonesuch"], "--device: 'nonesuch' cannot be used: "),
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--steps", "many"], "--steps: invalid number value: 'many'"),
        (["--dropout", "1.5"], "--dropout: must be at least 0, at most 1, got 1.5"),
        (["--dropout", "nan"], "--dropout: must be at least 0, at most 1, got nan"),
        (["--rate", "0"], "--rate: must be above 0, got 0"),
        (["--precision", "fp8"], "--precision: invalid choice: 'fp8'"),
        (["--width", "10", "--heads", "4"], "--width: must be even and a multiple of --heads 4, g"),
        (["--vocabulary", "9"], "--vocabulary: must be at least 300, got 9"),
        (["--nonesuch"], "unrecognized arguments: --nonesuch"),
        (["dance"], "argument COMMAND: invalid choice: 'dance'"),
        (["train", "hello"], "TEXT: only say takes texts, got 'hello'"),
        (["say"], "say: needs a TEXT to translate"),
        (["say", " "], "say: needs a TEXT to translate"),
        (["say", "x", "--out", "folder"], "--resume: cannot read folder/checkpoint.pt: No such"),
        (["compare", "--resume"], "--resume: compare always starts afresh"),
        (["--pairs", "two", "--out", "two"], "--out: cannot write to two: "),
        (["--pairs", "two", "--resume", "absent"], "--resume: cannot read absent: No such file"),
        (["--pairs", "two", "--resume", "two"], "--resume: two is no checkpoint of this demo"),
        (["--pairs", "two", "--max-tokens", "2"], "--max-tokens: leaves no training pair"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = {
        "empty": b"\n \n",
        "binary": b"\xff\xfe\x00a",
        "one": b"a\tb\n",
        "twice": b"Open\tb\nopen!\tc\n",
        "untabbed": b"a\tb\nno tab here\n",
        "half": b"a\t \n",
        "two": b"Open the file\tDatei oeffnen\nClose it\tSchliessen\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(catalogues, "download", lambda *_: pytest.fail("downloads"))
    if "--out" not in arguments:
        arguments = [*arguments, "--out", "out"]
    assert cli.main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("translate: ")
    assert told in printed
    assert printed.count("\n") == 1
    assert not list((tmp_path / "folder").iterdir())
    assert not list((tmp_path / "out").glob("*"))


def test_no_network_is_one_line_and_what_is_cached_still_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(arguments: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(arguments, 1, "", "ERROR: no route to host\n")

    monkeypatch.setattr(catalogues.subprocess, "run", offline)
    cache = tmp_path / "cache"
    places = [f"--out={tmp_path / 'out'}", f"--cache={cache}"]
    assert cli.main(["train", *places]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"translate: cannot download {catalogues.WHEELS[0]}: no route to host (")
    assert not list(cache.iterdir())
    write_tsv(catalogues.cache_path("de", cache))
    assert cli.main(["train", *TINY, "--steps=2", "--threads=1", *places]) == 0


def test_a_cache_that_cannot_be_written_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / "cache"
    assert cli.main(["train", f"--out={tmp_path / 'out'}", f"--cache={cache}"]) == 2
    assert f"translate: --cache: cannot write to {cache}: " in capsys.readouterr().err


def test_a_checkpoint_of_another_shape_is_one_line(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["train", *TINY, "--width=32", f"--pairs={trained / 'pairs.tsv'}"]
    assert cli.main([*given, f"--out={trained / 'out'}", "--resume"]) == 2
    path = trained / "out" / "checkpoint.pt"
    told = f"--resume: {path} is of another shape: it was made with --width 16, got 32"
    assert capsys.readouterr().err == f"translate: {told}\n"


def test_results_of_training(trained: Path) -> None:
    out = trained / "out"
    pictures = ["cross_attention.png", "habits.png", "losses.png"]
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [*pictures, "checkpoint.pt", "results.json"]
    )
    for name in pictures:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "results.json").read_text())
    assert len(results["losses"]) == 60
    assert results["held_out"] < results["losses"][0] / 2
    assert {"greedy", "beam of 4"} == set(results["decoded"])
    for found in results["decoded"].values():
        assert len(found["texts"]) == 30
        assert 0 <= found["scores"]["bleu"] <= 100
        assert 0 < found["scores"]["chrf"] <= 100
    assert results["uncached"]["same"] == results["uncached"]["texts"] == 30
    assert set(results["tokens"]) == {"accuracy", "precision", "recall", "f1", "count"}
    assert [look["step"] for look in results["looks"]] == [0, 20, 40, 60]
    assert len(results["looks"][0]["breadth"]["cross"][0]) == 2


def test_say_needs_nothing_but_the_checkpoint(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(trained / "out" / "checkpoint.pt", tmp_path)
    texts = ["Open the new file", "Close the old page at once"]
    assert cli.main(["say", *texts, f"--out={tmp_path}"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2
    assert told[0].startswith("Die")
    assert cli.main(["say", texts[1], f"--resume={tmp_path / 'checkpoint.pt'}"]) == 0
    assert capsys.readouterr().out.splitlines() == told[1:]


def test_losses_that_differ_are_exit_code_1(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = [
        compare.Outcome([2.0] * 3, 2.0, 1.0, 1.0, 9),
        compare.Outcome([2.5] * 3, 2.0, 1.0, 1.0, 9),
    ]
    both = dict(zip(("torch", "attnfast"), made, strict=True))
    monkeypatch.setattr(compare, "_both", lambda *_, **__: both)
    given = ["compare", *TINY, f"--pairs={trained / 'pairs.tsv'}", f"--out={tmp_path}"]
    assert cli.main(given) == 1
    printed = capsys.readouterr()
    assert "the losses of every step: apart by 2.5e-01, MORE THAN 0.001" in printed.out
    assert "translate: exact: torch and attnfast are apart by 2.5e-01 > 0.001" in printed.err
    assert "translate: dropout: torch and attnfast are apart by 2.5e-01 > 0.05" in printed.err
    assert json.loads((tmp_path / "results.json").read_text())["comparison"]["exact"]


def test_the_whole_command_on_a_small_file(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(compare, "_in_process", work_here)
    given = [*TINY, f"--pairs={trained / 'pairs.tsv'}", f"--out={tmp_path / 'out'}", "--threads=1"]
    given += ["--exact-steps=5", "--compare-steps=30", "--steps=60", "--watch-every=20"]
    given += [f"--logdir={tmp_path / 'log'}", "--sentence=Open the new file"]
    assert cli.main(given) == 0
    printed = capsys.readouterr()
    for said in ("within 0.001", "within 0.05", "tokens/s", "peak memory", "BLEU", "precision"):
        assert said in printed.out
    for bar in ("torch, without dropout: 100%", "attnfast, dropout 0.1: 100%", "training: 100%"):
        assert bar in printed.err
    # Ours goes on where the comparison left it, as if it had been trained in one go.
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    alone = json.loads((trained / "out" / "results.json").read_text())
    assert results["losses"] == alone["losses"]
    assert results["looks"] == alone["looks"]
    assert list((tmp_path / "log").iterdir())


def test_the_number_of_steps_follows_from_the_time_and_stays(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(budget, "TRAINED", budget.Limits(12, 14))
    monkeypatch.setattr(cli, "_measure", lambda out, job, trainer: {"losses": trainer.losses})
    monkeypatch.setattr(cli, "draw_losses", lambda *_: None)
    given = ["train", *TINY, "--threads=1", f"--pairs={trained / 'pairs.tsv'}"]

    def losses(*more: str, out: str = "out") -> list[float]:
        assert cli.main([*given, *more, f"--out={tmp_path / out}"]) == 0
        return json.loads((tmp_path / out / "results.json").read_text())["losses"]

    chosen = losses()
    assert " 14 steps, from 12 to 14: one takes " in capsys.readouterr().out
    assert len(chosen) == 14
    assert chosen == losses("--steps=14", out="given")
    assert " 14 steps, as asked" in capsys.readouterr().out

    # Stopped early, it goes on to the number decided on, whatever fits by now.
    monkeypatch.setattr(budget, "TRAINED", budget.Limits(12, 30))
    path = tmp_path / "out" / "checkpoint.pt"
    losses("--steps=11")
    state = checkpoint.read(path, CPU)
    assert state["goal"] == 11
    torch.save({**state, "goal": 14}, path)
    assert losses("--resume") == chosen
    assert " 14 steps, as decided when this training began" in capsys.readouterr().out

    monkeypatch.setattr(budget, "RUN", 0.0)
    assert losses() == chosen[:12]


def test_a_comparison_takes_its_steps_from_the_time_and_no_more_than_training(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def made(data: object, settings: object, steps: int, *_: object, **ours: object) -> object:
        asked.append(steps)
        both = [compare.Outcome([2.0] * 3, 2.0, slow, 1.0, 9) for slow in (0.5, 1.0)]
        return dict(zip(("torch", "attnfast"), both, strict=True))

    monkeypatch.setattr(compare, "_both", made)
    monkeypatch.setattr(budget, "RUN", 420.0)
    given = ["compare", *TINY, f"--pairs={trained / 'pairs.tsv'}", f"--out={tmp_path}"]
    for more in ([], ["--steps=40"], ["--compare-steps=70"], ["--compare-steps=7", "--steps=9"]):
        assert cli.main([*given, *more]) == 0
    # The slower model's second a step: (420 - a moment - 120) / 5.
    assert asked[:1] == asked[2:3] == asked[4:5] == asked[6:7] == [50]
    assert 50 < asked[1] < 60
    assert asked[3::2] == [40, 70, 7]


def interrupted(arguments: list[str]) -> tuple[int, str]:
    """Run the command, send Ctrl-C once its bar shows a step; exit code and error output."""
    with subprocess.Popen(
        command("demo.translation", *arguments),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # A shell starts background jobs, such as a CI run, with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        seen = b""
        while not re.search(rb"\b[1-9]\d*/\d", seen) and process.poll() is None:
            seen += os.read(process.stderr.fileno(), 4096)
        process.send_signal(signal.SIGINT)
        try:
            rest = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    return process.returncode, (seen + rest).decode()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_after_ctrl_c_the_run_goes_on_as_if_it_had_not_been(trained: Path, tmp_path: Path) -> None:
    given = ["train", *TINY, f"--pairs={trained / 'pairs.tsv'}", f"--out={tmp_path}"]
    given += ["--watch-every=20"]
    # Far more steps than will be done: the rate does not depend on how many are asked for.
    code, told = interrupted([*given, "--steps=100000"])
    assert code == 130
    assert "Traceback" not in told
    path = tmp_path / "checkpoint.pt"
    last = told.splitlines()[-1]
    assert last.startswith("translate: interrupted after step ")
    assert last.endswith(f", saved {path}: --resume goes on")
    stopped = int(last.split("step ")[1].split(",")[0])
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    steps = stopped + 10
    assert cli.main([*given, f"--steps={steps}", "--threads=1", "--resume"]) == 0
    resumed = json.loads((tmp_path / "results.json").read_text())
    whole = tmp_path / "whole"
    given[-2] = f"--out={whole}"
    assert cli.main([*given, f"--steps={steps}", "--threads=1"]) == 0
    expected = json.loads((whole / "results.json").read_text())
    assert len(resumed["losses"]) == steps
    assert resumed["losses"] == expected["losses"]
    assert resumed["held_out"] == expected["held_out"]
    assert resumed["looks"] == expected["looks"]
    assert resumed["decoded"]["greedy"]["texts"] == expected["decoded"]["greedy"]["texts"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_ctrl_c_while_comparing_reaches_both_processes(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal sends it to parent and child; the child saves before the parent ends."""
    split = pairs.split_pairs(pairs.read_pairs(trained / "pairs.tsv"), 0)
    tokens.save_data(tokens.prepare(split, 320, 64), tmp_path / "data.pt")
    code = (
        "import os, signal, sys\n"
        "from demo.translation import train, worker\n"
        "step = train.Trainer._step\n"
        "def interrupted(trainer, batch):\n"
        "    step(trainer, batch)\n"
        "    if trainer.steps == 3:\n"
        "        os.kill(os.getppid(), signal.SIGINT), signal.raise_signal(signal.SIGINT)\n"
        "train.Trainer._step = interrupted; sys.exit(worker.main())"
    )
    real = subprocess.run

    def run(arguments: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert arguments[1:3] == ["-m", "demo.translation.worker"]
        return real([arguments[0], "-c", code, arguments[3]], **options)

    monkeypatch.setattr(compare.subprocess, "run", run)
    settings = Settings(width=16, heads=2, layers=1, feedforward=32)
    path = tmp_path / "checkpoint.pt"
    job = {"name": "attnfast", "settings": settings.as_dict(), "steps": 9, "device": "cpu"}
    job |= {"threads": 1, "label": "attnfast"}
    with pytest.raises(KeyboardInterrupt) as caught:
        compare._in_process({**job, "checkpoint": str(path)}, tmp_path)
    assert caught.value.args == (f"interrupted after step 3, saved {path}: --resume goes on",)
    assert len(checkpoint.read(path, CPU)["losses"]) == 3

    def ended(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], INTERRUPTED)

    monkeypatch.setattr(compare.subprocess, "run", ended)
    with pytest.raises(KeyboardInterrupt) as caught:
        compare._in_process(job, tmp_path)  # which has nothing to save
    assert caught.value.args == ()
