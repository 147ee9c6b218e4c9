"""What happens to a run's files, terminal, and memory: nothing of the user's is lost, and a line says what is wrong."""

import contextlib
import os
import shutil
import signal
import sqlite3
import sys
import zipfile

import pytest
import torch
from conftest import ROOT, question, rows
from test_bad_input import state_of, stop_of

import dapo
from tools import chat

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(autouse=True)
def reward(parity):
    """A model without a chance learns from the parity of a length."""


# ---- 1. Only what the run made is removed ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["step_1", "checkpoint", "epoch_3", "run.db.bak", "checkpoint.pt.unfinished"])
@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_with_files_and_no_run_is_left_alone(name, resume, main, settings, tmp_path, capsys):
    (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / name / "mine.txt").write_text("mine")
    before = state_of(tmp_path)
    error = stop_of(main, [*settings, f"--RESUME={resume}"], capsys)
    assert f"contains {name} but no run" in error and state_of(tmp_path) == before


@pytest.mark.parametrize("resume", [True, False])
def test_the_checkpoint_of_another_program_is_left_alone(resume, main, settings, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    torch.save({"epoch": 3, "state_dict": {}}, tmp_path / "run/checkpoint.pt")
    before = state_of(tmp_path)
    error = stop_of(main, [*settings, f"--RESUME={resume}"], capsys)
    assert "checkpoint.pt" in error and state_of(tmp_path) == before and not (tmp_path / "run_1").exists()


def test_a_checkpoint_and_a_run_db_of_two_runs_are_noticed(main, settings, tmp_path, capsys):
    main([*settings, "--NUM_STEPS=1"])
    shutil.copy(tmp_path / "run/run.db", tmp_path)
    main([*settings, "--NUM_STEPS=2"])
    shutil.copy(tmp_path / "run.db", tmp_path / "run")
    capsys.readouterr()
    main([*settings, "--NUM_STEPS=3"])
    assert "run.db was lost, or is another run's" in capsys.readouterr().out


def test_the_database_of_another_program_is_left_alone(main, settings, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    with contextlib.closing(sqlite3.connect(tmp_path / "run/run.db")) as db:
        db.execute("CREATE TABLE mine (text)")
    assert "contains run.db but no run" in stop_of(main, settings, capsys)
    assert os.listdir(tmp_path / "run") == ["run.db"]


@pytest.mark.parametrize("name", [".gitkeep", None])
def test_an_empty_folder_is_begun_in(name, main, settings, tmp_path):
    (tmp_path / "run").mkdir()
    if name:
        (tmp_path / "run" / name).touch()
    main([*settings, "--NUM_STEPS=1"])
    assert (tmp_path / "run/step_1").is_dir()


def test_what_a_user_adds_to_a_run_stays(main, settings, tmp_path, capsys):
    run = tmp_path / "run"
    main([*settings, "--NUM_STEPS=1"])
    for name in "notes.unfinished", "checkpoint/best", "checkpoint_copy.pt", "step_7/notes", "step_01":
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    (run / "step_2").mkdir()
    (run / "step_2/mine.txt").write_text("mine")
    error = stop_of_last(main, settings, capsys)
    assert "step_2 is not this run's: move it" in error and (run / "step_2/mine.txt").read_text() == "mine"
    (run / "step_2").rename(run / "my_step_2")
    main(settings)
    for name in "notes.unfinished checkpoint/best checkpoint_copy.pt step_7/notes step_01 my_step_2/mine.txt".split():
        assert (run / name).read_text() == "mine"
    assert (run / "step_2/model.safetensors").exists()


def test_weights_too_large_to_sample_with_end_the_run_in_one_line(main, settings, chance, no_pictures, capsys):
    """They are finite still, but what is computed from them is not."""
    error = stop_of_last(main, [*settings, "--LEARNING_RATE=1e30", "--WARMUP_STEPS=0", "--EVAL_EVERY=9"], capsys)
    assert "not finite" in error and "lower LEARNING_RATE" in error


def stop_of_last(main, arguments, capsys):
    """The error of a run that has begun, after what it said before."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# ---- 5, 6. Paths, and the two stores --------------------------------------------------------------------------------


def in_step(monkeypatch, number, do):
    """Calls `do` in a step."""
    real = dapo.train_step

    def step(*parts):
        if parts[-1] == number:
            do()
        return real(*parts)

    monkeypatch.setattr(dapo, "train_step", step)


@pytest.mark.parametrize("what", ["run.db", "folder"])
def test_a_run_whose_record_is_gone_stops_with_a_whole_checkpoint(what, main, settings, monkeypatch, tmp_path, capsys):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    settings += ["--NUM_STEPS=9", "--CHECKPOINT_EVERY=2"]
    with monkeypatch.context() as patch:
        in_step(patch, 4, lambda: (run / "run.db").unlink() if what == "run.db" else run.rename(elsewhere))
        error = stop_of_last(main, settings, capsys)
    assert "its run.db was moved or removed: the run stops after step 4" in error
    found = torch.load((run if what == "run.db" else elsewhere) / "checkpoint.pt", weights_only=True)
    assert found["step"] == (4 if what == "run.db" else 2) and not list(tmp_path.rglob("step_*"))
    if what == "run.db":
        main([*settings, "--NUM_STEPS=5"])
        said = capsys.readouterr().out
        assert "after step 4" in said and "run.db was lost" in said and (run / "step_5").is_dir()
    else:
        assert not run.exists()


@pytest.mark.parametrize("damage", [b"this is no database" * 999, b"\0" * 9999])
def test_a_damaged_run_db_stops_the_run(damage, main, settings, monkeypatch, tmp_path, capsys):
    settings += ["--NUM_STEPS=9", "--CHECKPOINT_EVERY=2"]
    in_step(monkeypatch, 3, lambda: (tmp_path / "run/run.db").write_bytes(damage))
    assert "OUTPUT_DIR=" in stop_of_last(main, settings, capsys)
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"] == 2


def test_a_reward_may_change_the_directory(main, settings, monkeypatch, tmp_path, set_reward):
    def wanders(solution_str, **others):
        os.chdir(tmp_path / "elsewhere")
        return float(len(solution_str) % 2)

    set_reward(wanders)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    main([*settings, "--OUTPUT_DIR=here/run", "--NUM_STEPS=1"])
    assert (tmp_path / "here/run/step_1/model.safetensors").exists() and not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_flipped_bit_in_a_checkpoint_is_found_and_the_one_before_it_resumes(place, main, settings, tmp_path, capsys):
    main([*settings, "--NUM_STEPS=3", "--CHECKPOINT_EVERY=1"])
    path = tmp_path / "run/checkpoint.pt"
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 200 + int(place * (largest.file_size - 200))] ^= 4
    path.write_bytes(content)
    error = stop_of(main, [*settings, "--NUM_STEPS=4"], capsys)
    assert "is damaged" in error and "move it to resume from checkpoint.previous.pt" in error
    path.unlink()
    main([*settings, "--NUM_STEPS=4"])
    assert "resuming the run" in capsys.readouterr().out and not (tmp_path / "run_1").exists()


def edits():
    """Changes of what a checkpoint holds."""

    def shape(state):
        state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)

    def moment(state):
        state["optimizer"]["state"][1]["exp_avg_sq"].fill_(float("nan"))

    def weights(state):
        state["model"].popitem()

    def model(state):
        del state["model"]

    def optimizer(state):
        del state["optimizer"]["param_groups"]

    def step(state):
        state["step"] = "two"

    def whole(state):
        return [1, 2]

    return [shape, moment, weights, model, optimizer, step, whole]


@pytest.mark.parametrize("edit", edits())
def test_odd_contents_of_a_checkpoint_are_refused(edit, main, settings, tmp_path, capsys):
    main([*settings, "--NUM_STEPS=1"])
    path = tmp_path / "run/checkpoint.pt"
    state = torch.load(path, weights_only=True)
    torch.save(edit(state) or state, path)
    before = state_of(tmp_path)
    error = stop_of(main, settings, capsys)
    assert "checkpoint.pt cannot be read" in error and state_of(tmp_path) == before


@pytest.mark.parametrize("what", ["held out", "model"])
def test_changed_held_out_questions_or_weights_are_another_run(what, main, settings, make_folder, tmp_path, capsys):
    folder, data = tmp_path / "model", tmp_path / "held_out.csv"
    shutil.copytree(make_folder(seed=8), folder)
    data.write_text("q,a\nTom?,1\n")
    held_out = [{"path": str(data), "type": "csv", "input": "q", "output": "a"}]
    settings += [f"--MODEL={folder}", f"--EVAL_DATASETS={held_out}"]
    main([*settings, "--NUM_STEPS=1"])
    if what == "model":
        shutil.copy(make_folder(seed=9) / "model.safetensors", folder)
    else:
        data.write_text("q,a\nTom?,2\n")
    main(settings)
    said = capsys.readouterr().out
    assert ("the held-out questions' checksum was" if what == "held out" else "MODEL's checksum was") in said


@pytest.mark.parametrize("name", ["reward.py", "dapo.py", "judge.py"])
def test_a_changed_reward_file_is_said_and_saved_whatever_its_name(name, main, settings, tmp_path, capsys):
    judge, text = tmp_path / "mine" / name, "def score(solution_str, **others):\n    return len(solution_str) % 2\n"
    judge.parent.mkdir()
    judge.write_text(text)
    main([*settings, "--NUM_STEPS=1", f"--REWARD={judge}:score"])
    judge.write_text(text + "# a remark\n")
    capsys.readouterr()
    main([*settings, "--NUM_STEPS=2", f"--REWARD={judge}:score"])
    kept = name if name == "judge.py" else f"my_{name}"
    said, saved = capsys.readouterr().out, tmp_path / "run/step_2"
    assert f"source of {kept}" in said and "resuming" in said and (saved / kept).read_text().endswith("# a remark\n")
    assert (saved / "reward.py").read_text() == (ROOT / "reward.py").read_text()
    assert f"REWARD = '{kept}:score'" in (saved / "constants.py").read_text()


def test_a_fault_in_the_reward_after_skipped_updates_keeps_the_sound_checkpoint(
    main, settings, monkeypatch, set_reward, tmp_path, capsys
):
    real, steps = dapo.update_policy, []

    def judge(solution_str, **others):
        if len(steps) == 3:
            raise ValueError("the judge is gone")
        return float(len(solution_str) % 2)

    def update(*parts):
        steps.append(parts[-1])
        return real(*parts) | ({"skipped_updates": 1} if parts[-1] == 3 else {})

    set_reward(judge)
    monkeypatch.setattr(dapo, "update_policy", update)
    error = stop_of_last(main, [*settings, "--NUM_STEPS=9", "--CHECKPOINT_EVERY=2", "--EVAL_EVERY=9"], capsys)
    assert "the judge is gone" in error
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"] == 2


# ---- 10, 13, 15. Odd places, lost terminals, and memory -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["loop", "lock"])
def test_odd_places_are_named(kind, main, settings, tmp_path, capsys):
    if kind == "loop":
        (tmp_path / "run").symlink_to(tmp_path / "run")
    else:
        (tmp_path / ".run.lock").mkdir()
    assert "OUTPUT_DIR=" in stop_of(main, settings, capsys)


@pytest.mark.parametrize("stream", ["none", "closed", "full"])
def test_output_that_cannot_be_written_does_not_end_training(stream, main, settings, monkeypatch, tmp_path):
    broken = None
    if stream != "none":
        broken = open("/dev/full" if stream == "full" else os.devnull, "w", buffering=1)
    if stream == "closed":
        broken.close()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", broken)
        patch.setattr(sys, "stderr", broken)
        main([*settings, "--NUM_STEPS=1"])
    assert (tmp_path / "run/step_1").is_dir()
    if stream == "full":
        with contextlib.suppress(OSError):
            broken.close()


def test_a_reward_may_close_the_output(main, settings, set_reward, monkeypatch, tmp_path):
    def closes(solution_str, **others):
        sys.stdout.close()
        return float(len(solution_str) % 2)

    set_reward(closes)
    monkeypatch.setattr(sys, "stdout", open(os.devnull, "w"))
    main([*settings, "--NUM_STEPS=1"])
    assert (tmp_path / "run/step_1").is_dir()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no hangup")
@pytest.mark.parametrize("ignored", [False, True])
def test_a_lost_terminal_saves_a_checkpoint_but_under_nohup(ignored, main, settings, monkeypatch, tmp_path):
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    in_step(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGHUP))
    try:
        if ignored:
            main(settings)
        else:
            with pytest.raises(SystemExit) as stop:
                main(settings)
            assert stop.value.code == 128 + signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, old)
    step = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"]
    assert step == (2 if ignored else 1)


def test_epochs_in_which_all_questions_rest_are_passed_over(set_constants):
    """Not spun through: a hundred thousand epochs would take minutes, and a billion for ever."""
    questions = [question(str(n)) for n in range(3)]
    set_constants(NUM_STEPS=5)
    run = type("Run", (), {"drawn": 0})()
    stream = dapo.question_stream(questions, run)
    for number, asked in zip(range(3), stream):
        asked.rests = 10**9 + number
    assert next(stream).rests == 0 and run.drawn > 3 * 10**9
    set_constants(NUM_STEPS=None, NUM_EPOCHS=100)
    run.drawn = 0
    for asked in questions:
        asked.rests = 10**9
    assert list(dapo.question_stream(questions, run)) == []


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_a_limit_on_the_cpus_memory_is_told_as_one_of_memory(error, main, settings, monkeypatch, capsys):
    monkeypatch.setattr(dapo, "update_policy", lambda *parts: (_ for _ in ()).throw(error))
    assert "out of memory: lower MICRO_BATCH_TOKENS" in stop_of_last(main, settings, capsys)


def test_another_runtime_error_is_not_one_of_memory(main, settings, monkeypatch):
    def update(*parts):
        raise RuntimeError("of mine")

    monkeypatch.setattr(dapo, "update_policy", update)
    with pytest.raises(RuntimeError, match="of mine"):
        main(settings)


def test_what_is_shown_has_no_control_characters(capsys):
    hostile = "a\x1b[2Jb\x1b]0;title\x07c\x9b31md\u202ee"
    shown = dapo.shorten(hostile)
    assert shown.isprintable() and [sign for sign in shown if sign.isalpha()][0] == "a"
    with pytest.raises(SystemExit):
        dapo.fail(f"OUTPUT_DIR={hostile}")
    assert capsys.readouterr().err.rstrip("\n").isprintable()


def test_what_is_recorded_keeps_its_control_characters(main, settings, monkeypatch, tmp_path, capsys):
    hostile = "a\x1b[2Jb"
    monkeypatch.setattr(
        dapo.transformers.PreTrainedTokenizerBase, "batch_decode", lambda self, ids, **others: [hostile] * len(ids)
    )
    main([*settings, "--NUM_STEPS=1", "--USE_DYNAMIC_SAMPLING=False"])
    assert set(rows(tmp_path / "run", "SELECT response FROM responses")) == {(hostile,)}
    assert "\x1b" not in capsys.readouterr().out


def test_saved_files_can_be_read_by_the_same_people(main, settings, tmp_path):
    main([*settings, "--NUM_STEPS=1"])
    modes = {path.name: oct(path.stat().st_mode) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert len(set(modes.values())) == 1, modes


# ---- 14. Recipes ----------------------------------------------------------------------------------------------------

RECIPES = {
    "a byte order mark": "\ufeffGROUP_SIZE = 3\n",
    "a coding line": "# -*- coding: latin-1 -*-\nGROUP_SIZE = 3  # \xfc\n",
    "a dataclass": "import dataclasses\n@dataclasses.dataclass\nclass Size:\n    n: int = 3\nGROUP_SIZE = Size().n\n",
    "a neighbor": "from beside import GROUP_SIZE\n",
    "numpy": "import numpy\nGROUP_SIZE = numpy.int64(3)\nTEMPERATURE = numpy.float32(0.5)\n",
    "a path": "from pathlib import Path\nGROUP_SIZE = 3\nOUTPUT_DIR = Path('some') / 'where'\n"
    "TRAIN_DATASETS = [{'path': Path('train.csv'), 'type': 'csv', 'input': 'q', 'output': 'a'}]\n",
    "a tuple": "GROUP_SIZE = 3\nTRAIN_DATASETS = ({'path': 'a', 'type': 'csv', 'input': 'q', 'output': 'a'},)\n",
    "a function": "GROUP_SIZE = 3\ndef REWARD(solution_str, **others):\n    return 1.0\n",
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes_are_python(case, main, monkeypatch, tmp_path):
    encoding = "latin-1" if "coding" in case else "utf-8"
    (tmp_path / "mine.py").write_text(RECIPES[case], encoding=encoding)
    (tmp_path / "beside.py").write_text("GROUP_SIZE = 3\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(dapo, "train", lambda: None)
    main([str(tmp_path / "mine.py")])
    assert dapo.GROUP_SIZE == 3 and type(dapo.GROUP_SIZE) is int and type(dapo.OUTPUT_DIR) is str
    assert type(dapo.TRAIN_DATASETS[0]["path"]) is str and type(dapo.TEMPERATURE) is float
    sys.modules.pop("beside", None)


def test_a_conversation_shows_no_control_characters(tokenizer, capsys):
    shown = chat.Shown(tokenizer)
    shown.on_finalized_text("a\x1b[2J\x07\tb\n", stream_end=True)
    assert capsys.readouterr().out.split() == ["a[2J", "b"]
