"""The labelling page: its tasks, stored answers and labels; over HTTP and in a browser."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from PIL import Image
from starlette.testclient import TestClient

from diffalign.cli import main
from diffalign.config.schema import DataConfig
from diffalign.data import read_preferences
from diffalign.errors import UserError
from diffalign.evaluation.report.people import read_people
from diffalign.preferences.labelling.results import (
    disagreement_of,
    evaluation_tasks,
    is_evaluation,
    summary,
)
from diffalign.preferences.labelling.server import LEASE, Session, application, is_loopback
from diffalign.preferences.labelling.store import (
    ANSWERS,
    LABELS,
    SKIP,
    TIE,
    Answer,
    AnswerStore,
    file_name,
    write_blind,
    write_round,
)
from diffalign.preferences.labelling.tasks import Task, blind_tasks, in_order, read_tasks
from diffalign.rollout.labels import read_labels, write_template

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def samples(folder: Path, prompts: int, per_prompt: int = 2, shade: int = 0) -> Path:
    """Write a folder like ``diffalign generate``: sample k of a prompt is brighter than sample k - 1."""
    folder.mkdir(parents=True)
    rows = []
    for position in range(prompts):
        for number in range(per_prompt):
            name = f"{position}-{number}.png"
            Image.new("RGB", (32, 32), (60 + 90 * number + shade, position, 0)).save(folder / name)
            row = {"prompt": f"a thing {position}", "position": position, "number": number, "seed": 0}
            rows.append(row | {"file": name})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def tasks(tmp_path):
    return read_tasks(str(samples(tmp_path / "images", 4)), tmp_path / "labels")


def client(tasks, folder, **settings):
    session = Session(AnswerStore(tasks, folder), **settings)
    return TestClient(application(session)), session


def test_labels_are_what_train_reads(tasks, tmp_path):
    store = AnswerStore(tasks, tmp_path / "labels")
    for task, choice in zip(tasks, (0, 1, TIE, SKIP), strict=True):
        store.add(Answer(task.key, "anna", choice))
    found = read_preferences(DataConfig(path=str(tmp_path / "labels" / LABELS)), seed=0)
    examples = list(found.rows())
    assert [e.prompt for e in examples] == ["a thing 0", "a thing 1", "a thing 2"]
    assert [e.scores for e in examples] == [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)]
    shades = [Image.open(e.images[1].source).getpixel((0, 0))[0] for e in examples]
    assert shades == [150, 150, 150]


def test_the_newest_answer_counts_and_undo_takes_it_back(tasks, tmp_path):
    store = AnswerStore(tasks, tmp_path / "labels")
    store.add(Answer(tasks[0].key, "anna", 0))
    store.add(Answer(tasks[1].key, "anna", 1))
    store.add(Answer(tasks[0].key, "anna", 1))
    assert store.scores(tasks[0]) == [0.0, 1.0]
    assert store.undo("anna") == tasks[0].key
    assert store.scores(tasks[0]) is None
    assert store.undo("anna") == tasks[1].key
    assert store.undo("anna") is None
    assert (tmp_path / "labels" / LABELS).read_text() == ""


def test_several_people_are_averaged_and_their_agreement_told(tasks, tmp_path):
    store = AnswerStore(tasks, tmp_path / "labels")
    assert store.agreement() is None
    for by, choices in {"anna": (0, 0, 1), "ben": (0, 1, 1), "cem": (0, SKIP, TIE)}.items():
        for task, choice in zip(tasks, choices, strict=False):
            store.add(Answer(task.key, by, choice))
    assert store.scores(tasks[0]) == [1.0, 0.0]
    assert store.scores(tasks[1]) == [0.5, 0.5]
    assert store.scores(tasks[2]) == pytest.approx([1 / 6, 5 / 6])
    # task 0: 3 of 3 pairs of people agree; task 1: 0 of 1; task 2: 1 of 3
    assert store.agreement().value == pytest.approx(4 / 7)
    assert store.counts() == {"anna": 3, "ben": 3, "cem": 3}


def test_a_cut_line_is_dropped_and_everything_before_it_stays(tasks, tmp_path):
    store = AnswerStore(tasks, tmp_path / "labels")
    store.add(Answer(tasks[0].key, "anna", 1))
    whole = (tmp_path / "labels" / ANSWERS).read_bytes()
    (tmp_path / "labels" / ANSWERS).write_bytes(whole + b'{"task": "00001", "by": "an')
    again = AnswerStore(tasks, tmp_path / "labels")
    assert again.dropped == 1
    assert again.scores(tasks[0]) == [0.0, 1.0]
    again.add(Answer(tasks[1].key, "anna", 0))
    assert AnswerStore(tasks, tmp_path / "labels").dropped == 0


def test_answers_of_another_set_are_refused(tasks, tmp_path):
    AnswerStore(tasks, tmp_path / "labels").add(Answer(tasks[3].key, "anna", 1))
    with pytest.raises(UserError, match=f"line 1: task '{tasks[3].key}' is not among the 3 tasks"):
        AnswerStore(tasks[:3], tmp_path / "labels")


def test_the_order_on_the_page_is_shuffled_and_undone_by_the_server(tasks, tmp_path):
    page, session = client(tasks, tmp_path / "labels")
    orders = {by: [session.shown(t, by) for t in tasks] for by in map(str, range(8))}
    assert any(order == [1, 0] for one in orders.values() for order in one)
    assert any(order == [0, 1] for one in orders.values() for order in one)
    for _ in tasks:
        task = page.get("/api/state", params={"by": "0"}).json()["task"]
        bright = [int(url.rpartition("/")[2]) for url in task["media"]].index(1)
        answer = page.post("/api/answer", json={"by": "0", "task": task["key"], "choice": bright})
        assert answer.status_code == 200
    assert all(session.store.scores(task) == [0.0, 1.0] for task in tasks)


def test_people_share_the_work_and_do_not_look_at_one_task(tasks, tmp_path, monkeypatch):
    _, session = client(tasks, tmp_path / "labels")
    first, second = (session.next_for(by)[0].key for by in ("anna", "ben"))
    assert first != second
    assert session.next_for("anna")[0].key == first  # reloading shows the same task
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + LEASE + 1)
    assert session.next_for("cem")[0].key == tasks[0].key
    session.answer("ben", first, TIE)
    assert first not in {task.key for task in session.next_for("cem", 9)}


def test_two_votes_ask_two_people(tasks, tmp_path):
    _, session = client(tasks[:1], tmp_path / "labels", votes=2)
    session.answer("anna", tasks[0].key, 0)
    assert session.done == 0
    assert session.next_for("anna") == []
    assert [task.key for task in session.next_for("ben")] == [tasks[0].key]
    session.answer("ben", tasks[0].key, 0)
    assert session.done == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"by": "anna", "task": "x", "choice": 0}, "task 'x'"),
        ({"by": "anna", "task": "KEY", "choice": 2}, "choice 2; allowed: 0 to 1, tie, skip"),
        ({"by": "anna", "task": "KEY", "choice": True}, "choice True; allowed: 0 to 1, tie, skip"),
        ({"by": "anna", "task": "KEY"}, "choice None; allowed: 0 to 1, tie, skip"),
        ({"by": " ", "task": "KEY", "choice": 0}, "name ' '; allowed: 1 to 80 characters"),
        ({"by": "a\tb", "task": "KEY", "choice": 0}, "none of them a control character"),
        ({"by": ["anna"], "task": "KEY", "choice": 0}, "no texts by, task"),
        ({"task": "KEY"}, "no texts by, task"),
        ([1], "no texts by, task"),
        (b"nonsense", "not JSON"),
        (b'{"by": "\\u0000", "task": "KEY", "choice": 0}', "null byte"),
        (b'{"by": "\\ud800", "task": "KEY", "choice": 0}', "surrogate"),
        (b'{"by": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_answers_are_refused_and_nothing_is_kept(tasks, tmp_path, body, words):
    page, session = client(tasks, tmp_path / "labels")
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    for route in ("/api/answer", *(["/api/undo"] if isinstance(body, bytes | list) else [])):
        answer = page.post(route, content=content.replace(b"KEY", tasks[0].key.encode()))
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert words in error or (route == "/api/undo" and "no texts by" in error)
        assert "UserError" not in error
    assert not session.store.counts()
    assert AnswerStore(tasks, tmp_path / "labels").dropped == 0


@pytest.mark.parametrize(
    "line",
    [
        '{"task": "KEY"}',
        '{"task": "KEY", "by": "anna", "choice": 2}',
        '{"task": "KEY", "by": 3, "choice": 0}',
    ],
)
def test_lines_that_are_no_answers_are_named(tasks, tmp_path, line):
    folder = tmp_path / "labels"
    folder.mkdir()
    (folder / ANSWERS).write_text("\n" + line.replace("KEY", tasks[0].key) + "\n")
    with pytest.raises(
        UserError, match=r"answers.jsonl line 2: .* is no answer; allowed: a name, and 0 to 1"
    ):
        AnswerStore(tasks, folder)


def test_an_answer_that_does_not_fit_the_disk_leaves_no_half_line(tasks, tmp_path, monkeypatch):
    page, session = client(tasks, tmp_path / "labels")
    body = {"by": "anna", "task": tasks[0].key, "choice": 0}
    assert page.post("/api/answer", json=body).status_code == 200
    whole = (tmp_path / "labels" / ANSWERS).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        refused = page.post("/api/answer", json=body | {"task": tasks[1].key})
    assert refused.status_code == 507
    assert refused.json()["error"].endswith("labels cannot be written: No space left on device")
    assert (tmp_path / "labels" / ANSWERS).read_bytes() == whole
    assert session.store.counts() == {"anna": 1}


def test_answers_about_other_images_are_not_taken_over(tmp_path):
    source = samples(tmp_path / "images", 2)
    tasks = read_tasks(str(source), tmp_path / "labels")
    AnswerStore(tasks, tmp_path / "labels").add(Answer(tasks[0].key, "anna", 1))
    manifest = source / "manifest.jsonl"  # drawn again with other weights: other names
    for file in source.glob("*.png"):
        file.rename(source / f"new-{file.name}")
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    manifest.write_text("".join(json.dumps(row | {"file": f"new-{row['file']}"}) + "\n" for row in rows))
    with pytest.raises(UserError, match=f"task '{tasks[0].key}' is not among the 2 tasks"):
        AnswerStore(read_tasks(str(source), tmp_path / "labels"), tmp_path / "labels")


def test_rows_of_a_set_that_give_no_comparison_are_counted(tmp_path, caplog):
    for folder in ("one", "two"):  # equal names and prompts: two comparisons all the same
        samples(tmp_path / folder, 1)
    pair = [["one/0-0.png", "one/0-1.png"], ["two/0-0.png", "two/0-1.png"]]
    rows = [{"prompt": "a", "images": images, "scores": [1, 0]} for images in (*pair, pair[0])]
    rows += [{"prompt": "b", "images": ["one/0-0.png", "one/gone.png"], "scores": [1, 0]}]
    rows += [{"prompt": "c", "images": pair[0], "scores": None}]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = read_tasks(str(file), tmp_path / "labels")
    assert [[f.parent.name for f in task.media] for task in tasks] == [["one"] * 2, ["two"] * 2]
    told = "\n".join(record.getMessage() for record in caplog.records)
    for cause, line in (("there already", 3), ("unreadable", 4), ("unlabelled", 5)):
        assert f"1 row is left out, {cause}, such as pairs.jsonl line {line}" in told


def test_a_set_is_read_with_the_settings_that_it_needs(tmp_path):
    samples(tmp_path / "images", 1)
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"text": "a", "better": "0-0.png", "worse": "0-1.png"}\n')
    columns = ("prompt=text", "chosen=better", "rejected=worse")
    reading = {"columns": columns, "root": str(tmp_path / "images")}
    (task,) = read_tasks(str(file), tmp_path / "labels", reading=reading)
    assert task.prompt == "a"
    assert task.media == (tmp_path / "images" / "0-0.png", tmp_path / "images" / "0-1.png")


def test_a_file_that_is_gone_is_not_found(tasks, tmp_path):
    page, _ = client(tasks, tmp_path / "labels")
    tasks[0].media[1].unlink()
    codes = [page.get(f"/media/{tasks[0].key}/{place}").status_code for place in (0, 1, 2)]
    assert codes == [200, 404, 404]


def test_a_token_is_asked_for_and_other_sites_are_refused(tasks, tmp_path):
    page, _ = client(tasks, tmp_path / "labels", token="secret")
    assert page.get("/").status_code == 401
    assert page.get(f"/media/{tasks[0].key}/0").status_code == 401
    for wrong in ("wrong", "fälsch"):
        assert page.get("/api/state", params={"by": "a", "token": wrong}).status_code == 401
    assert page.get("/", params={"token": "secret"}).status_code == 200
    assert page.get("/api/state", params={"by": "a"}).status_code == 200  # the cookie
    other = page.get("/api/state", headers={"origin": "http://elsewhere.example"})
    assert other.status_code == 403
    assert [is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "example")] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_the_page_fetches_nothing_from_elsewhere(tasks, tmp_path):
    page, _ = client(tasks, tmp_path / "labels")
    text = page.get("/").text
    assert "http://" not in text
    assert "https://" not in text
    assert page.get(f"/media/{tasks[0].key}/7").status_code == 404


def test_sources(tmp_path):
    one = samples(tmp_path / "one", 2, per_prompt=1)
    with pytest.raises(UserError, match="--images-per-prompt 2"):
        read_tasks(str(one), tmp_path / "labels")
    many = read_tasks(str(samples(tmp_path / "many", 2, per_prompt=4)), tmp_path / "labels")
    assert [len(task.media) for task in many] == [4, 4]
    with pytest.raises(UserError, match="2 to 9"):
        read_tasks(str(samples(tmp_path / "more", 1, per_prompt=10)), tmp_path / "labels")
    pairs = read_tasks("tiny:pairs", tmp_path / "labels", limit=3)
    assert len(pairs) == 3
    assert all(file.is_file() and file.suffix == ".png" for task in pairs for file in task.media)
    again = read_tasks("tiny:pairs", tmp_path / "labels", limit=3)
    assert [task.key for task in again] == [task.key for task in pairs]


def test_orders(tasks):
    assert in_order(tasks, "given", 0) == tasks
    mixed = [in_order(tasks, "random", seed) for seed in range(6)]
    assert all(sorted(t.key for t in one) == sorted(t.key for t in tasks) for one in mixed)
    assert any(one != tasks for one in mixed)
    divided = {task.key: value for task, value in zip(tasks, (0.0, 1.0, 0.5, 0.0), strict=True)}
    found = in_order(tasks, "disagreement", 0, lambda task: divided[task.key])
    assert [task.key for task in found[:2]] == [tasks[1].key, tasks[2].key]


def test_rewards_that_are_divided_come_first(tasks):
    same, opposite = (
        disagreement_of(["jpeg", "jpeg"], "cpu"),
        disagreement_of(["jpeg", "jpeg_incompressibility"], "cpu"),
    )
    noisy = Image.effect_noise((32, 32), 80).convert("RGB")
    noisy.save(tasks[0].media[0])
    assert same(tasks[0]) == 0
    assert opposite(tasks[0]) == 1


def test_a_round_of_an_online_run(tmp_path):
    folder = tmp_path / "rollouts" / "round-000000"
    folder.mkdir(parents=True)
    images = [[Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "white")] for _ in range(2)]
    write_template(folder, ["a", "b"], images)
    tasks = read_tasks(str(folder), folder)
    store = AnswerStore(tasks, folder, write_round)
    assert read_labels(folder, ["a", "b"], 2) is None
    store.add(Answer(tasks[0].key, "anna", 1))
    store.add(Answer(tasks[1].key, "Ören/ü", TIE))
    assert read_labels(folder, ["a", "b"], 2).tolist() == [[0, 1], [0.5, 0.5]]
    assert file_name("a/b") != file_name("a_b")


def test_a_blind_evaluation_gives_a_win_rate_in_the_report(tmp_path, caplog):
    folder = tmp_path / "evaluation"
    command = [
        "evaluate", "--base", "tiny:sdxl", "--aligned", "tiny:sdxl", "--prompts", "tiny:test", "--limit", "8",
        "--rewards", "jpeg", "--steps", "2", "--guidance", "1", "--output", str(folder),
    ]  # fmt: skip
    assert main(command) == 0
    assert is_evaluation(folder)
    assert "people" not in json.loads((folder / "report.json").read_text())
    tasks = evaluation_tasks(folder, None, None)
    assert [task.models[0] for task in tasks] == ["base"] * 8
    with pytest.raises(UserError, match="--aligned"):
        evaluation_tasks(folder, "nobody", None)
    store = AnswerStore(tasks, folder / "people" / "aligned", write_blind)
    for number, task in enumerate(tasks):
        store.add(Answer(task.key, "anna", (1, 1, 1, 1, 1, TIE, 0, SKIP)[number]))
    told = summary(Session(store), store.folder, False, folder)
    assert "aligned wins 78.6% against the base" in told
    assert main(command) == 0
    people = json.loads((folder / "report.json").read_text())["people"]["aligned"]
    assert (people["win"], people["tie"], people["loss"], people["prompts"]) == (5, 1, 1, 7)
    assert people["win_rate"] == pytest.approx(5.5 / 7)
    assert "By people" in (folder / "report.html").read_text()
    for file in (folder / "images" / "aligned").glob("*.png"):  # as if the model had been trained further
        file.rename(file.with_name(f"new-{file.name}"))
    assert read_people(folder) == {}
    assert "7 of 7 comparisons are left out, of images" in caplog.text


def test_two_models_of_other_prompts_are_no_blind_comparison(tmp_path):
    one, two = samples(tmp_path / "one", 1), samples(tmp_path / "two", 1)
    manifest = two / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace("a thing", "another"))
    with pytest.raises(UserError, match="share no prompt"):
        blind_tasks({"base": one, "aligned": two})
    assert isinstance(blind_tasks({"base": one, "aligned": one})[0], Task)


@contextmanager
def served(source: Path, *options: str):
    """``diffalign label`` in a process of its own; yields its address and the process."""
    command = [sys.executable, "-m", "diffalign", "label", str(source), "--port", "0", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    try:
        yield process.stdout.readline().strip(), process
    finally:
        process.kill()
        process.wait()


def test_a_kill_at_any_click_loses_nothing(tmp_path):
    source, output = samples(tmp_path / "images", 6), tmp_path / "labels"
    chosen = {}
    for _ in range(3):
        with served(source, "--output", str(output)) as (address, process):
            for _ in range(2):
                task = httpx.get(f"{address}api/state", params={"by": "anna"}).json()["task"]
                body = {"by": "anna", "task": task["key"], "choice": 0}
                assert httpx.post(f"{address}api/answer", json=body).status_code == 200
                chosen[task["key"]] = int(task["media"][0].rpartition("/")[2])
            os.kill(process.pid, signal.SIGKILL)
    rows = [json.loads(line) for line in (output / LABELS).read_text().splitlines()]
    assert len(rows) == len(chosen) == 6
    tasks = {task.prompt: task.key for task in read_tasks(str(source), output)}
    assert all(row["scores"][chosen[tasks[row["prompt"]]]] == 1.0 for row in rows)


def test_one_process_a_folder_and_an_interrupt_that_waits_for_nobody(tmp_path, capsys):
    source, output = samples(tmp_path / "images", 1), tmp_path / "labels"
    with served(source, "--output", str(output)) as (address, process):
        assert main(["label", str(source), "--output", str(output), "--port", "0"]) == 2
        assert f"another run writes {output} (process {process.pid})" in capsys.readouterr().err
        port = int(address.rstrip("/").rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as dead:
            dead.sendall(b"POST /api/answer HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{")
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--output", "elsewhere"], "with an evaluation; allowed: none, since the report reads the answers"),
        (["--videos"], "is an evaluation, with frames; allowed: with a preference set"),
        ([], "has 2 aligned models; name one by --aligned: one, two"),
    ],
)
def test_an_evaluation_refuses(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "one", "two"):
        samples(Path("evaluation", "images", name), 1)
    Path("evaluation", "report.json").write_text("{}")
    aligned = ["--aligned", "two"] if flags else []
    assert main(["label", "evaluation", *aligned, *flags]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rewards", "judge,taste"], "--rewards 'judge,taste' with --order random"),
        (["--aligned", "mine"], "is no folder of `diffalign evaluate`"),
        (["--label", "VQ", "--videos"], "is a folder of drawn images, with label, frames"),
    ],
)
def test_options_that_would_do_nothing_are_refused(tmp_path, capsys, flags, words):
    assert main(["label", str(samples(tmp_path / "images", 1)), *flags]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "images-labels").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_fifty_pairs_by_keyboard_train_a_model(tmp_path):
    """Two people, a reload in the middle, a kill and a restart; the labels then raise the judge's score."""
    sync = pytest.importorskip("playwright.sync_api")
    output = tmp_path / "labels"
    from diffalign.rewards import load

    tasks = {task.key: task for task in read_tasks("tiny:pairs", output, limit=50)}
    judge = load("judge")
    better = {
        key: int(judge([Image.open(f).convert("RGB") for f in t.media], [t.prompt] * 2).argmax())
        for key, t in tasks.items()
    }

    def label(page, count: int) -> None:
        for _ in range(count):
            page.wait_for_selector("#media figure")
            urls = page.eval_on_selector_all("#media img", "all => all.map(one => one.getAttribute('src'))")
            _, key, _ = urls[0].split("/")
            places = [int(url.rpartition("/")[2]) for url in urls]
            before = page.inner_text("#mine")
            page.keyboard.press(("ArrowLeft", "ArrowRight")[places.index(better[key])])
            page.wait_for_function("text => document.querySelector('#mine').innerText !== text", arg=before)

    def enter(browser, address: str, name: str):
        page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        page.goto(address)
        page.fill("#name", name)
        page.keyboard.press("Enter")
        page.wait_for_selector("#media figure")
        return page

    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        with served(Path("tiny:pairs"), "--output", str(output), "--limit", "50") as (address, process):
            anna, ben = enter(browser, address, "anna"), enter(browser, address, "ben")
            label(anna, 10)
            label(ben, 10)
            anna.reload()
            label(anna, 5)
            anna.keyboard.press("z")  # undo, and answer it again
            anna.wait_for_function("document.querySelector('#mine').innerText === 'anna: 14'")
            label(anna, 1)
            os.kill(process.pid, signal.SIGKILL)
        with served(Path("tiny:pairs"), "--output", str(output), "--limit", "50") as (address, _):
            ben = enter(browser, address, "ben")
            assert ben.inner_text("#progress") == "25 of 50 done"
            label(ben, 25)
            ben.wait_for_selector("#end:not([hidden])")
        browser.close()
    rows = [json.loads(line) for line in (output / LABELS).read_text().splitlines()]
    by_prompt = {task.prompt: better[key] for key, task in tasks.items()}
    assert len(rows) == 50
    assert all(row["scores"][by_prompt[row["prompt"]]] == 1.0 for row in rows)
    gain = gain_of(tmp_path, output / LABELS)
    assert gain > 0


def gain_of(tmp_path: Path, labels: Path) -> float:
    """Return the judge's gain after a short Diffusion-DPO on the labels, on the labelled prompts."""
    run = tmp_path / "run"
    train = [
        "train", "tiny_sdxl_dpo", "--data.path", str(labels), "--data.holdout", "0", "--training.steps", "24",
        "--training.batch_size", "16", "--checkpoint.every", "24", "--output", str(run),
    ]  # fmt: skip
    assert main(train) == 0
    prompts = tmp_path / "prompts.txt"
    texts = dict.fromkeys(json.loads(line)["prompt"] for line in labels.read_text().splitlines())
    prompts.write_text("\n".join(texts))
    evaluate = [
        "evaluate",
        "--run",
        str(run),
        "--prompts",
        str(prompts),
        "--rewards",
        "judge",
        "--steps",
        "15",
    ]
    assert main([*evaluate, "--guidance", "1", "--images-per-prompt", "4"]) == 0
    return json.loads((run / "report.json").read_text())["gain"]
