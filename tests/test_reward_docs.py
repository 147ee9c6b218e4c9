"""The reward functions that docs/data_and_rewards.md shows do what it says, as they stand there; none of a run is lost
when a server that they ask is slow, broken, or gone."""

import ast
import itertools
import json
import re
import runpy
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, question, rows
from test_resume import checkpoint, everything
from test_reward import from_the_page

import dapo
import reward

PAGE = (ROOT / "docs/data_and_rewards.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", re.findall(r"```python\n# (\w+_rewards?\.py)\n", PAGE))
def test_examples_are_short(name, tmp_path):
    lines = from_the_page(name, tmp_path).read_text(encoding="utf-8").splitlines()
    assert len(lines) < 30 and max(map(len, lines)) <= 120


# ---- Other columns --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "response, truth, tolerance, right",
    [
        (r"\boxed{9.8}", "9.81", 0.05, True),
        (r"\boxed{9.8}", "9.81", "0.01", True),  # as JSON and CSV have it; exact, where 9.81 - 9.8 > 0.01 in floats
        (r"\boxed{9.8}", "9.81", "0.009", False),
        (r"\boxed{-9.8}", "9.81", "0.05", False),
        ("Answer: 9.8 m/s^2", "9.81", 0.05, True),
        ("Answer: fast", "9.81", 1, False),
        ("It is 9.8.", "9.81", 1, False),
        (r"\boxed{1e999}", "9.81", 1, False),
        (r"\boxed{10^{5000}}", "9.81", 1, False),
    ],
)
def test_the_tolerance_of_a_row(response, truth, tolerance, right, tmp_path):
    judge = runpy.run_path(str(from_the_page("tolerance_reward.py", tmp_path)))["compute_score"]
    verdict = judge("", response, truth, {"tolerance": tolerance, "question": "", "prompt": ""})
    assert verdict["acc"] is right and verdict["score"] == (1 if right else -1)
    assert verdict["pred"] == (reward.extract_answer(response) or "")


def test_the_tolerance_reaches_it_from_every_form(tokenizer, set_reward, tmp_path):
    set_reward(runpy.run_path(str(from_the_page("tolerance_reward.py", tmp_path)))["compute_score"])
    (tmp_path / "rows.csv").write_text("question,answer,tolerance\nTom has 10,10.0,0.5\n")
    (tmp_path / "rows.json").write_text('{"question": "Tom has 10", "answer": 10.0, "tolerance": 0.5}')
    table = pyarrow.table({"question": ["Tom has 10"], "answer": ["10.0"], "tolerance": [0.5]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    for kind in "csv", "json", "parquet":
        data = {"path": f"{tmp_path}/rows.{kind}", "type": kind, "input": "question", "output": "answer"}
        (asked,) = dapo.load_questions([data], tokenizer)
        assert [verdict["accuracy"] for verdict in dapo.judge([asked] * 2, ["#### 10.5", "#### 10.51"])] == [1, 0]


# ---- Several rewards ------------------------------------------------------------------------------------------------

WORK, CHECK = "Work:\n5+4=9\n#### 9", "#### 9\nCheck:\n5+4=9"


@pytest.mark.parametrize(
    "response, right, form, language",
    [
        (WORK, 1, 1, 1),
        (WORK + "\n", 1, 1, 1),
        (WORK.replace("#### 9", "#### 8"), -1, 1, 1),
        (CHECK, 1, 0, 1),
        (f"{WORK}\nCheck:\n5+4=9", 1, 0, 1),
        ("#### 9", 1, 0, 1),
        ("Work:\n5+4=9", -1, 0, 1),
        ("答案：9", 1, 0, 0),
        ("", -1, 0, 1),
    ],
)
def test_several_rewards_by_hand(response, right, form, language, tmp_path):
    judge = runpy.run_path(str(from_the_page("several_rewards.py", tmp_path)))["compute_score"]
    verdict = judge("", response, "9", {"question": "What is 5 + 4?", "prompt": "<|assistant|>"})
    assert [verdict[name] for name in ("right", "form", "language")] == [right, form, language]
    assert verdict["score"] == pytest.approx(right + 0.2 * form + 0.1 * language)
    assert verdict["acc"] is (right == 1) and verdict["pred"] == (reward.extract_answer(response) or "")
    assert judge("", "答案：9", "9", {"question": "5 加 4 是多少？"})["language"] == 1


def test_parts_are_recorded_and_drawn(main, settings, no_pictures, monkeypatch, tmp_path):
    """Of all responses of the step, dropped ones too; what is trained on is their sum, what is filtered by is acc."""
    path = from_the_page("several_rewards.py", tmp_path)
    texts = itertools.cycle([[WORK, CHECK, "#### 7"], [CHECK, WORK, CHECK], ["#### 1", WORK.replace("9", "8"), ""]])

    def judge(asked, _, real=dapo.judge):  # not what a model wrote, but groups of three of these
        return real(asked, [*itertools.chain(*itertools.islice(texts, len(asked) // 3))])

    monkeypatch.setattr(dapo, "judge", judge)
    words = ["--GROUP_SIZE=3", "--BATCH_SIZE=3", "--MAX_GEN_BATCHES=1", "--NUM_STEPS=1", "--MINI_BATCHES=1"]
    (tmp_path / "rows.json").write_text(json.dumps([{"question": f"Tom has {n}.", "answer": "9"} for n in range(9)]))
    data = [{"path": f"{tmp_path}/rows.json", "type": "json", "input": "question", "output": "answer"}]
    words += [f"--TRAIN_DATASETS={data}", f"--EVAL_DATASETS={data}", f"--REWARD={path}:compute_score"]
    main([*settings, *words, "--OVERLONG_BUFFER_LENGTH=0"])
    told = dict(rows(tmp_path / "run", "SELECT name, value FROM metrics WHERE name LIKE 'reward/%'"))
    assert told == {
        "reward/right": pytest.approx((5 - 4) / 9),
        "reward/form": pytest.approx(3 / 9),
        "reward/language": 1.0,
        "reward/mean": pytest.approx((5 - 4 + 0.2 * 3 + 0.1 * 9) / 9),
        "reward/timeouts": 0.0,
    }
    found = rows(tmp_path / "run", "SELECT fate, round(reward, 6) FROM responses ORDER BY number")
    fates = ["trained"] * 3 + ["all correct"] * 3 + ["all wrong"] * 3
    assert found == [*zip(fates, [1.3, 1.1, -0.9, 1.1, 1.3, 1.1, -0.9, -0.7, -0.9])]
    curves = {name: ((1, 2), (value, value)) for name, value in told.items()}
    (axes,) = [axes for axes in dapo.metrics_figure(curves).axes if axes.get_title() == "reward"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["mean", "form", "language", "right"]


def test_what_weights_do_to_advantages():
    """The page's command prints what the trainer computes: only ratios of weights matter, and acc has its reason."""
    section = PAGE.partition("## Several rewards, with weights")[2].partition("\n## ")[0]
    found = re.search(r"stdev.* for r in \((.*)\)\]\"\n```\n\n```\n(.*?)```", section, re.DOTALL)
    scores, shown = ast.literal_eval(f"[{found[1]}]"), [ast.literal_eval(line) for line in found[2].splitlines()]
    advantages = [dapo.group_advantages(torch.tensor([row], dtype=torch.float64))[0].tolist() for row in scores]
    assert shown == [[pytest.approx(value, abs=0.006) for value in row] for row in advantages]
    assert shown[0] == shown[1] and abs(shown[2][0]) > 0.8


# ---- A server -------------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Says yes to responses of an odd length. `fault` says for a response, and how often it came, what goes wrong."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, port=0, fault=lambda response, times: None):
        super().__init__(("127.0.0.1", port), Handler)
        self.fault, self.seen, self.asked, self.lock, self.ended = fault, {}, 0, threading.Lock(), threading.Event()
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    def end(self):
        """Nobody listens any more."""
        self.ended.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (message,) = asked["messages"]
        parts = re.fullmatch(
            r"Question: (.*)\nRight answer: (.*)\nResponse: (.*)\nDoes the response .*", message["content"], re.DOTALL
        )
        with self.server.lock:
            self.server.asked += 1
            self.server.seen[parts.groups()] = times = self.server.seen.get(parts.groups(), 0) + 1
        fault = self.server.fault(parts[3], times)
        said = "Yes." if len(parts[3]) % 2 else "no"
        body = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode()
        if fault == "slow":
            self.server.ended.wait(60)
        if fault in ("slow", "drop"):
            return self.close_connection
        if fault == "nonsense":
            body = b"<html>"
        self.send_response(500 if fault == "error" else 200)
        self.send_header("Content-Length", str(len(body) + 100 * (fault == "half")))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *parts):
        pass


@pytest.fixture
def serve(monkeypatch):
    """Starts a Server; any is ended after the test. Proxies are for others."""
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def start(*parts, **others):
        servers.append(Server(*parts, **others))
        return servers[-1]

    yield start
    for server in servers:
        if not server.ended.is_set():
            server.end()


@pytest.fixture
def reward_file(tmp_path):
    """Saves the page's function as one that asks a port, with other times; gives its path."""

    def save(port, timeout=60, pauses=(0,) * 8, gone="raise"):
        path = from_the_page("judge_reward.py", tmp_path)
        text = path.read_text(encoding="utf-8")
        changes = {
            "localhost:8000": f"127.0.0.1:{port}",
            "TIMEOUT, PAUSES = 60, (1, 4, 16)": f"TIMEOUT, PAUSES = {timeout}, {pauses}",
            "                raise  #": f"                {gone}  #",
        }
        for old, new in changes.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")
        return path

    return save


RESPONSES = ["a" * length for length in range(1, 9)]
EXPECTED = [{"score": 1.0 if n % 2 else -1.0, "acc": bool(n % 2)} for n in range(1, 9)]


def ask(path, responses=RESPONSES):
    """The verdicts of the function in a file."""
    infos = [{"question": f"question {n}", "prompt": ""} for n in range(len(responses))]
    judge = runpy.run_path(str(path))["compute_score"]
    return judge(["data"] * len(infos), responses, [f"truth {n}" for n in range(len(infos))], infos)


def test_the_judge_is_told_everything(serve, reward_file):
    server = serve()
    assert ask(reward_file(server.server_port)) == EXPECTED
    told = {(f"question {n}", f"truth {n}", text) for n, text in enumerate(RESPONSES)}
    assert {*server.seen} == told and {*server.seen.values()} == {1}


@pytest.mark.parametrize("fault", ["slow", "error", "drop", "half", "nonsense"])
def test_what_goes_wrong_is_tried_again(fault, serve, reward_file):
    """Every second response fails twice; verdicts stay in order. On a busy machine others may be slow, too."""
    server = serve(fault=lambda response, times: fault if len(response) % 2 and times <= 2 else None)
    timeout, pauses = (0.3, (0,) * 40) if fault == "slow" else (60, (0,) * 2)
    assert ask(reward_file(server.server_port, timeout, pauses)) == EXPECTED
    assert all(times >= 3 for (*_, response), times in server.seen.items() if len(response) % 2)


def test_256_responses_are_judged_side_by_side(serve, reward_file):
    """No reply comes before all of them are being asked for."""
    together = threading.Barrier(256)
    server = serve(fault=lambda response, times: together.wait(60) and None)
    assert ask(reward_file(server.server_port), RESPONSES * 32) == EXPECTED * 32


def free_port():
    """A port at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_pauses_grow_and_then_it_ends(reward_file, monkeypatch):
    paused, path = [], reward_file(free_port(), pauses=(1, 4, 16))
    monkeypatch.setattr(time, "sleep", paused.append)
    with pytest.raises(OSError):
        ask(path, RESPONSES[:1])
    assert paused == [1, 4, 16]


@pytest.mark.parametrize("gone", ["raise", "return None"])
def test_nothing_is_lost_when_the_server_dies(gone, serve, reward_file, main, settings, no_pictures, capsys, tmp_path,
                                              monkeypatch):  # fmt: skip
    """In the third of five steps: if all faults are raised, in its middle, else before it, or a part of the step would
    be trained on. The same command resumes, and ends with the bytes of a run whose server has lived."""
    server = serve()
    words = [*settings, "--NUM_STEPS=5", "--EVAL_EVERY=3", "--CHECKPOINT_EVERY=100", "--MAX_GEN_BATCHES=3"]
    words += [f"--REWARD={reward_file(server.server_port, pauses=(0, 0), gone=gone)}:compute_score"]
    main([*words, f"--OUTPUT_DIR={tmp_path / 'undisturbed'}"])
    undisturbed = everything(tmp_path / "undisturbed")

    def die(response, times):
        if server.asked > limit:
            threading.Thread(target=server.end).start()
            return "drop"

    def step(*parts, real=dapo.train_step):
        nonlocal limit
        if parts[-1] == 3 and server.ended.is_set() is False and limit is None:
            limit = server.asked + 4 if gone == "raise" else -1
            if limit < 0:
                server.end()
            else:
                server.fault = die
        return real(*parts)

    limit = None
    monkeypatch.setattr(dapo, "train_step", step)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(words)
    error = capsys.readouterr().err
    said = "no verdict on any of" if gone == "return None" else "failed at the question"
    assert stop.value.code == 2 and error.count("\n") == 1 and said in error and "judge_reward.py" in error
    state = checkpoint(tmp_path / "run")
    assert state["step"] == 2 and not state["finished"]
    for table in "metrics", "responses":
        query = f"SELECT count(*), max(step) FROM {table} WHERE step <= 2"
        assert rows(tmp_path / "run", query.partition(" WHERE")[0]) == rows(tmp_path / "undisturbed", query)

    port = server.server_port
    with pytest.raises(SystemExit) as stop:  # it is still gone
        main(words)
    assert stop.value.code == 2 and checkpoint(tmp_path / "run")["step"] == 2
    server = serve(port)
    main(words)
    assert capsys.readouterr().out.count("resuming the run") == 2
    resumed = everything(tmp_path / "run")
    for part in undisturbed:
        assert resumed[part] == undisturbed[part], part
    assert not (tmp_path / "run_1").exists() and len(resumed["responses"]) > 5 * 6


def test_a_response_without_a_verdict_is_left_out(serve, reward_file, set_reward):
    """If the function returns None in the end, for those that the server will not judge."""
    server = serve(fault=lambda response, times: "error" if len(response) > 6 else None)
    path = reward_file(server.server_port, pauses=(0,), gone="return None")
    assert ask(path) == EXPECTED[:6] + [None] * 2
    set_reward(runpy.run_path(str(path))["compute_score"])
    verdicts = dapo.judge([question()] * 3, ["a", "a" * 7, "aa"])
    assert [verdict and verdict["reward"] for verdict in verdicts] == [1, None, -1]


def test_waiting_for_a_verdict_counts_as_sampling(main, settings, set_reward, no_pictures, tmp_path):
    def slow(solution_strs, **others):
        time.sleep(0.2)
        return [float(n % 2) for n in range(len(solution_strs))]

    set_reward(slow)
    main([*settings, "--NUM_STEPS=1"])
    told = dict(rows(tmp_path / "run", "SELECT name, value FROM metrics WHERE name LIKE 'time/%'"))
    assert told["time/step"] > told["time/generate"] >= 0.2
