"""Labels of segments: from a file, from rewards, from a model behind an endpoint (a thread here)."""

import base64
import io
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.cli import main
from diffalign.config.schema import DataConfig
from diffalign.data import read_preferences
from diffalign.data.encoding.geometry import Cut
from diffalign.data.reading.dense import dense_of
from diffalign.errors import UserError
from diffalign.media.videos import Video, write_video
from diffalign.preferences.segments.by_file import ByFile
from diffalign.preferences.segments.by_model import ByModel, QuestionSettings, agreed, verdict
from diffalign.preferences.segments.by_reward import ByReward
from diffalign.preferences.segments.label import label_pairs
from diffalign.preferences.segments.pairs import cut, decided, read_pairs, with_labels
from diffalign.rewards.videos import VideoReward
from diffalign.utils.chat_completions import Answers, Endpoint, Tokens
from diffalign.utils.http import Patience
from tests.helpers import PUBLISHED_DATA

pytest.importorskip("av")
REAL = PUBLISHED_DATA / "videoalign"
# Brightness of each second: who is brighter is first, second, neither, first, second.
BRIGHT = ((200, 60, 90, 150, 20), (100, 160, 90, 60, 240))
TRUE = ["first", "second", "tie", "first", "second"]


def grey(path, values, per_second=4, fps=4.0, last=0):
    """Write a video of one grey a second; ``last`` more frames of the last."""
    levels = [value for value in values for _ in range(per_second)] + [values[-1]] * last
    frames = torch.tensor(levels, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    write_video(Video(frames, fps), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    for name, values in zip("ab", BRIGHT, strict=True):
        grey(root / f"{name}.mp4", values)
    grey(root / "long.mp4", (*BRIGHT[1], 255, 255))
    rows = [
        {"prompt": "grey one", "videos": ["a.mp4", "b.mp4"], "eta": 0.7},
        {"prompt": "grey two", "videos": ["b.mp4", "a.mp4"]},
    ]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def pairs(folder):
    return read_pairs(str(folder / "pairs.jsonl"))


def turned(labels):
    return [{"first": "second", "second": "first"}.get(label, label) for label in labels]


# segments


@pytest.mark.parametrize(
    ("frames", "fps", "seconds", "sizes"),
    [
        (81, 16, 1.0, [16, 16, 16, 16, 17]),
        (80, 16, 1.0, [16] * 5),
        (88, 16, 1.0, [16] * 5 + [8]),  # from half a segment on
        (49, 8, 1.0, [8, 8, 8, 8, 8, 9]),
        (10, 20, 1.0, [10]),
        (30, 30000 / 1001, 0.5, [15, 15]),
    ],
)
def test_frames_of_segments(tmp_path, frames, fps, seconds, sizes):
    video = Video(torch.arange(frames).byte().mul(2).reshape(-1, 1, 1, 1).expand(-1, 3, 16, 16), fps)
    write_video(video, tmp_path / "v.mp4")
    (tmp_path / "p.jsonl").write_text('{"prompt": "x", "videos": ["v.mp4", "v.mp4"]}')
    (pair,) = read_pairs(str(tmp_path / "p.jsonl"))
    assert pair.segments(seconds) == len(sizes)
    parts = cut(pair, 0, seconds, len(sizes))
    assert [len(part.frames) for part in parts] == sizes
    shown = torch.cat([part.frames for part in parts])[:, 0, 8, 8].float()
    assert (shown - video.frames[:, 0, 8, 8].float()).abs().max() <= 4  # as encoded, in order


def test_the_shorter_video_says_how_many(folder, tmp_path):
    rows = tmp_path / "p.jsonl"
    rows.write_text(json.dumps({"prompt": "x", "videos": [str(folder / "a.mp4"), str(folder / "long.mp4")]}))
    (pair,) = read_pairs(str(rows))
    assert pair.segments(1.0) == 5 and pair.segments(2.0) == 3  # 2 s, 2 s and 1 s
    last = cut(pair, 1, 1.0, 5)[-1].frames
    assert len(last) == 4 and abs(float(last.float().mean()) - 240) < 5  # what comes after is not in it
    assert [len(part.frames) for part in cut(pair, 0, 1.0, 5, fps=2.0)] == [2] * 5
    with pytest.raises(UserError, match=r"1 frames a second; allowed: segments of at least 1 s"):
        cut(pair, 0, 0.5, 10, fps=1.0)


def test_real_pairs_of_unequal_length_and_rate(tmp_path):
    rows = [{"prompt": "x", "videos": [str(REAL / f"example_{i}_{s}.mp4") for s in "AB"]} for i in (1, 3)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, three = read_pairs(str(tmp_path / "p.jsonl"))
    assert (one.segments(1.0), three.segments(1.0)) == (5, 4)  # 5.25 and 5.07 s; 5.33 and 3.75 s
    sizes = [[len(part.frames) for part in cut(three, video, 1.0, 4)] for video in (0, 1)]
    assert sizes == [[24, 24, 24, 18], [16, 16, 16, 12]]


def test_a_labelled_row_by_hand(pairs):
    row = with_labels(pairs[0], ["first", "tie", None, "first", "second"], 1.0, "me")
    assert row["segments"] == [[1, 0.5, None, 1, 0], [0, 0.5, None, 0, 1]]
    assert row["scores"] == [0.4, 0.2] and row["eta"] == 0.7 and row["segment_seconds"] == 1.0
    assert decided(["first", "tie", None, "second"]) == 0.5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "x", "videos": ["a.mp4"]}', "line 1: needed .* found prompt, videos"),
        ('{"prompt": "x", "images": ["a.png", "b.png"]}', "found prompt, images"),
        ('{"prompt": "x", "videos": ["gone.mp4", "a.mp4"]}', "no such file: .*gone.mp4"),
    ],
)
def test_rows_that_are_no_pairs(tmp_path, text, words):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(UserError, match=words):
        read_pairs(str(tmp_path / "p.jsonl"))


# rewards


class Brightness:
    """A reward of images, which counts what it is asked."""

    def __init__(self, sign=1.0):
        self.sign, self.asked = sign, 0

    def __call__(self, images, prompts):
        assert set(prompts) <= {"grey one", "grey two"}
        self.asked += len(images)
        return torch.tensor([self.sign * float(np.asarray(image).mean()) for image in images])


def watching(videos, prompts):
    """Score videos by the brightness of all frames."""
    return torch.tensor([float(video.frames.float().mean()) for video in videos])


@pytest.mark.parametrize("reward", [Brightness(), VideoReward("watching", watching)])
def test_a_reward_labels_every_segment(pairs, reward):
    labeller = ByReward({"r": reward}, margin=5.0)
    assert [labeller(pair, 5) for pair in pairs] == [TRUE, turned(TRUE)]
    assert ByReward({"r": reward}, margin=110.0)(pairs[0], 5) == ["tie"] * 4 + ["second"]
    with pytest.raises(UserError, match="--margin -1"):
        ByReward({"r": reward}, margin=-1)


def test_several_rewards_vote(pairs):
    two_to_one = {"a": Brightness(), "b": Brightness(-1.0), "c": Brightness()}
    assert ByReward(two_to_one, margin=5.0)(pairs[0], 5) == TRUE
    assert ByReward({"a": Brightness(), "b": Brightness(-1.0)})(pairs[0], 5) == ["tie"] * 5


def test_scores_are_kept_whatever_the_margin(pairs, tmp_path):
    file, first = tmp_path / "sub" / "answers.jsonl", Brightness()
    kept = {"identity": {"r": "brightness 1"}}
    assert ByReward({"r": first}, 5.0, 1.0, Answers(file), **kept)(pairs[0], 5) == TRUE
    again = Brightness()
    assert ByReward({"r": again}, 110.0, 1.0, Answers(file), **kept)(pairs[0], 5)[0] == "tie"
    assert first.asked and not again.asked
    ByReward({"r": again}, 5.0, 2.0, Answers(file), **kept)(pairs[0], 2)
    assert again.asked
    other = Brightness()
    ByReward({"r": other}, 5.0, 1.0, Answers(file), identity={"r": "brightness 2"})(pairs[0], 5)
    assert other.asked


# people


def test_a_table_of_peoples_labels(folder, pairs, tmp_path):
    table = tmp_path / "people.csv"
    table.write_text(
        "pair,video_0,video_1,segment,label,who\n"
        "0,,,0,first,x\n0,,,0,A,y\n0,,,0,second,z\n"  # the majority
        ",b.mp4,a.mp4,2,Same,x\n"
        "0,,,1,first,x\n0,,,1,b,y\n"  # a draw
        "1,,,4,right,x\n"
    )
    labeller = ByFile(str(table), pairs)
    assert labeller(pairs[0], 5) == ["first", "tie", None, None, None]
    assert labeller(pairs[1], 5) == [None, None, "tie", None, "second"]
    lines = tmp_path / "people.jsonl"
    (only,) = read_pairs(str(write_one(tmp_path, folder)))
    lines.write_text('{"video_0": "x/b.mp4", "video_1": "x/a.mp4", "segment": 1, "label": "first"}\n')
    assert ByFile(str(lines), [only])(only, 2) == [None, "second"]  # the other way round there


def write_one(tmp_path, folder):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"prompt": "x", "videos": [str(folder / "a.mp4"), str(folder / "b.mp4")]}))
    return path


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("pair,segment,label\n2,0,first\n", "row 0: pair is 2; allowed: 0 to 1"),
        ("pair,segment,label\n0,x,first\n", "segment is 'x'"),
        ("pair,segment,label\n0,0,frist\n", "row 0.*did you mean first"),
        ("segment,label\n0,first\n", "needed pair"),
        ("video_0,video_1,segment,label\na.mp4,c.mp4,0,first\n", "no pair of a.mp4 and c.mp4"),
    ],
)
def test_labels_that_are_none(pairs, tmp_path, rows, words):
    (tmp_path / "l.csv").write_text(rows)
    with pytest.raises(UserError, match=words):
        ByFile(str(tmp_path / "l.csv"), pairs)


def twins(folder, *rows):
    """Pairs of videos that have the same names in several folders."""
    for name in {name for row in rows for name in row}:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).touch()
    text = "".join(json.dumps({"prompt": "x", "videos": row}) + "\n" for row in rows)
    (folder / "pairs.jsonl").write_text(text)
    return read_pairs(str(folder / "pairs.jsonl"))


def test_files_of_equal_names_are_told_by_their_folders(tmp_path):
    def labels(pairs, row, table=tmp_path / "l.csv"):
        table.write_text(f"video_0,video_1,segment,label\n{row},0,first\n")
        labeller = ByFile(str(table), pairs)
        return [labeller(pair, 1)[0] for pair in pairs]

    sides = twins(tmp_path, ["A/x.mp4", "B/x.mp4"])
    assert labels(sides, "A/x.mp4,B/x.mp4") == ["first"]
    assert labels(sides, "B/x.mp4,A/x.mp4") == ["second"]
    with pytest.raises(UserError, match=r"row 0: no pair of C/x\.mp4 and D/x\.mp4"):
        labels(sides, "C/x.mp4,D/x.mp4")
    two = twins(tmp_path, ["p0/a.mp4", "p0/b.mp4"], ["p1/a.mp4", "p1/b.mp4"])
    assert labels(two, "p0/a.mp4,p0/b.mp4") == ["first", None]
    assert labels(two, "p1/b.mp4,p1/a.mp4") == [None, "second"]
    assert labels(two, f"{tmp_path}/p1/a.mp4,{tmp_path}/p1/b.mp4") == [None, "first"]
    (tmp_path / "tables").mkdir()  # from the table they lie elsewhere
    assert labels(two, "../p1/b.mp4,../p1/a.mp4", tmp_path / "tables" / "l.csv") == [None, "second"]
    with pytest.raises(UserError, match=r"row 0: q/a\.mp4 and q/b\.mp4 are pairs 0, 1; allowed: the pair's"):
        labels(two, "q/a.mp4,q/b.mp4")


def test_a_segment_that_there_is_not(pairs, tmp_path):
    (tmp_path / "l.csv").write_text("pair,segment,label\n0,0,first\n0,5,first\n")
    labeller = ByFile(str(tmp_path / "l.csv"), pairs)
    with pytest.raises(UserError, match=r"row 1: segment is 5; allowed: 0 to 4 \(.* line 1 is 5\.00 s"):
        labeller(pairs[0], 5)
    assert labeller(pairs[1], 5) == [None] * 5


# a vision-language model


class Model:
    """An endpoint on this machine that looks at the frames it is sent; ``says`` may say something else."""

    def __init__(self, says=None, failures=0):
        self.says, self.failures, self.asked = says, failures, []
        self.busy = self.most = 0
        lock, model = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    model.asked.append(body)
                    model.busy += 1
                    model.most = max(model.most, model.busy)
                    number = len(model.asked)
                threading.Event().wait(0.02)
                fails = number <= model.failures
                content = json.dumps({"error": {"message": "slow down"}} if fails else model.reply(body))
                with lock:
                    model.busy -= 1
                self.send_response(429 if fails else 200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content.encode())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def reply(self, body):
        seen = ("TIE", "FIRST", "SECOND")[self.brighter(body)]
        content = self.says or f"One of them is second to none.\n\n**{seen}**\n"
        usage = {"prompt_tokens": 1000, "completion_tokens": 50}
        return {"choices": [{"message": {"content": content}}], "usage": usage}

    @staticmethod
    def brighter(body):
        """1 or 2 by the frames after "Video 1:" and "Video 2:", 0 if they are alike."""
        shown, number = {}, ""
        for part in body["messages"][0]["content"]:
            if part["type"] == "text":
                number = part["text"]
                continue
            assert part["image_url"]["url"].startswith("data:image/jpeg;base64,")
            image = Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1])))
            shown.setdefault(number, []).append(np.asarray(image).mean())
        one, two = (np.mean(shown[f"Video {number}:"]) for number in (1, 2))
        return 0 if abs(one - two) < 5 else 1 if one > two else 2


@pytest.fixture
def model():
    made = []

    def make(*arguments, **options):
        made.append(Model(*arguments, **options))
        return made[-1]

    yield make
    for each in made:
        each.server.shutdown()
        each.server.server_close()


def by_model(server, file, **asking):
    endpoint = Endpoint(server.url, "m", patience=Patience(5.0, 2, 0.001))
    return ByModel(endpoint, Answers(file), QuestionSettings(**asking))


def test_both_orders_are_asked_and_agree(pairs, model, tmp_path):
    server = model()
    labeller = by_model(server, tmp_path / "a.jsonl", price_in=2.0, price_out=8.0)
    assert labeller(pairs[0], 5) == TRUE
    assert len(server.asked) == 10 == labeller.usage.asked and labeller.usage.tokens == Tokens(10000, 500)
    first = server.asked[0]["messages"][0]["content"]
    assert Counter(part["type"] for part in first) == {
        "text": 3,
        "image_url": 8,
    }  # 4 frames a second are there
    assert "grey one" in first[-1]["text"] and "TIE" in first[-1]["text"]
    assert {Model.brighter(body) for body in server.asked[:2]} == {1, 2}
    text = labeller.usage.text(labeller.settings)
    assert text == (
        "10 questions asked, 0 answers known, 0 unreadable; 10000 tokens read, 500 written, cost 0.0240"
    )


def test_frames_are_taken_at_a_rate_and_made_small(pairs, model, tmp_path):
    server = model()
    by_model(server, tmp_path / "a.jsonl", fps=2.0, side=16)(pairs[0], 5)
    content = server.asked[0]["messages"][0]["content"]
    images = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    assert len(images) == 4  # of each second two frames of each video
    assert Image.open(io.BytesIO(base64.b64decode(images[0].split(",")[1]))).size == (16, 16)


@pytest.mark.parametrize("says", ["FIRST", "SECOND", "TIE", "no idea"])
def test_a_model_that_does_not_look_gives_ties(pairs, model, tmp_path, says):
    labeller = by_model(model(says), tmp_path / "a.jsonl")
    assert labeller(pairs[0], 5) == ["tie"] * 5
    assert labeller.usage.unread == (10 if says == "no idea" else 0)


def test_nothing_is_asked_twice(pairs, model, tmp_path):
    server, file = model(), tmp_path / "a.jsonl"
    by_model(server, file)(pairs[0], 5)
    text = file.read_text()
    file.write_text("\n".join(text.splitlines()[:7]) + '\n{"key": "cut o')  # seven answers and a half
    again = by_model(server, file)
    assert again(pairs[0], 5) == TRUE and len(server.asked) == 10 + 3
    assert (again.usage.asked, again.usage.known, again.usage.tokens) == (3, 7, Tokens(3000, 150))
    assert by_model(server, file)(pairs[0], 5) == TRUE and len(server.asked) == 13
    by_model(server, file, side=100)(pairs[0], 1)  # another question
    assert len(server.asked) == 15


def test_failures_that_may_pass_are_waited_for(pairs, model, tmp_path):
    server = model(failures=2)
    assert by_model(server, tmp_path / "a.jsonl")(pairs[0], 5) == TRUE and len(server.asked) == 12
    server = model(failures=100)
    words = (
        r"pairs\.jsonl line 1, segment 0: no answer .*'m', 3 tries\): status 429: slow down; .*run it again"
    )
    with pytest.raises(UserError, match=words):
        by_model(server, tmp_path / "b.jsonl")(pairs[0], 1)


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("FIRST", "first"),
        ("The second flickers.\nAnswer: first.", "first"),
        ("Both are first class. The second has an odd hand.\n\n**TIE**", "tie"),
        ("second\n\n", "second"),
        ("TIE. There is nothing between them.\nThat is all.", "tie"),
        ("Either the first or the second.", None),
        ("", None),
    ],
)
def test_verdicts(answer, label):
    assert verdict(answer) == label


def test_agreement_is_about_the_same_video():
    table = {
        (a, b): agreed(a, b)
        for a in ("first", "second", "tie", None)
        for b in ("first", "second", "tie", None)
    }
    assert {both for both, label in table.items() if label != "tie"} == {
        ("first", "second"),
        ("second", "first"),
    }
    assert table["first", "second"] == "first" and table["second", "first"] == "second"


def test_bad_ways_to_ask():
    with pytest.raises(UserError, match="fps 0"):
        QuestionSettings(fps=0)


# the whole


def test_labelled_pairs_are_a_set_with_dense_labels(folder, pairs, model, tmp_path):
    server = model()
    labeller = by_model(server, tmp_path / "a.jsonl")
    source, target = str(folder / "pairs.jsonl"), tmp_path / "out" / "labelled.jsonl"
    done = label_pairs(pairs, labeller, source, target, workers=2, progress=False)
    assert done.kept == 2 and done.labels == {"first": 4, "second": 4, "tie": 2}
    assert done.text == "2 pairs; segments: 4 first, 4 second, 2 tie"
    assert server.most == 2  # two pairs at once
    one, two = read_preferences(DataConfig(path=str(target), frames=17))
    assert one.segments == ((1, 0, 0.5, 1, 0), (0, 1, 0.5, 0, 1)) and one.segment_seconds == 1.0
    assert one.scores == (0.4, 0.4) and two.segments == one.segments[::-1]
    assert one.images[0].source.is_file()


def test_pairs_without_enough_winners_are_left_out(folder, pairs, tmp_path):
    source, target = str(folder / "pairs.jsonl"), tmp_path / "labelled.jsonl"
    few = ByReward({"r": Brightness()}, margin=110.0)  # one of five
    kept = [
        label_pairs(pairs, few, source, target, min_decided=share, progress=False).kept
        for share in (0.0, 0.1, 0.2)
    ]
    assert kept == [2, 2, 0]
    with pytest.raises(UserError, match="allowed: above 0"):
        label_pairs(pairs, few, source, target, seconds=0.0)


def test_an_error_stops_the_others_and_writes_nothing(folder, pairs, tmp_path):
    asked = []

    class Fails:
        by = "nobody"

        def __call__(self, pair, count):
            asked.append(pair)
            raise UserError("no luck")

    with pytest.raises(UserError, match="no luck"):
        label_pairs(pairs * 20, Fails(), str(folder), tmp_path / "x.jsonl", progress=False)
    assert len(asked) < 40 and not (tmp_path / "x.jsonl").exists()


def test_the_command(folder, model, tmp_path, capsys):
    server, pairs = model(), str(folder / "pairs.jsonl")
    out = str(tmp_path / "out.jsonl")
    argv = ["label-segments", pairs, "--output", out, "--by", "vlm", "--url", server.url, "--model", "m"]
    assert main([*argv, "--price-in", "2", "--limit", "1"]) == 0
    said = capsys.readouterr().err
    assert "1 pairs; segments: 2 first, 2 second, 1 tie" in said and "cost 0.0200" in said
    assert main([*argv, "--price-in", "2"]) == 0
    assert "10 questions asked, 10 answers known" in capsys.readouterr().err
    assert len((tmp_path / "out.vlm-answers.jsonl").read_text().splitlines()) == 20
    by_reward = ["label-segments", pairs, "--output", out, "--by", "reward", "--rewards", "jpeg"]
    assert main([*by_reward, "--margin", "0.001"]) == 0
    assert "2 pairs" in capsys.readouterr().err
    assert not (tmp_path / "out.reward-answers.jsonl").exists()  # as cheap to compute as to look up
    for more, words in (
        (["--by", "vlm"], "--model is empty; needed for --by vlm"),
        (["--by", "reward"], "--by reward needs --rewards"),
        (["--by", "file"], "--by file needs --labels"),
        (["--by", "vlm", "--model", "m", "--url", "localhost"], "--url is 'localhost'"),
    ):
        assert main(["label-segments", pairs, "--output", out, *more]) == 2
        assert words in capsys.readouterr().err


def test_pairs_that_cannot_be_read_are_left_out_and_named(folder, tmp_path, capsys):
    (tmp_path / "broken.mp4").write_bytes((folder / "a.mp4").read_bytes()[:200])
    good = [str(folder / "a.mp4"), str(folder / "b.mp4")]
    rows = [
        {"prompt": "x", "videos": [good[0], str(tmp_path / "broken.mp4")]},
        {"prompt": "x", "videos": good},
    ]
    source, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["label-segments", str(source), "--output", str(out), "--by", "reward", "--rewards", "jpeg"]
    assert main(argv) == 0
    said = capsys.readouterr().err
    assert "skipped, p.jsonl line 1:" in said and "broken.mp4" in said and "1 pairs; segments" in said
    assert [json.loads(line)["videos"] for line in out.read_text().splitlines()] == [good]
    out.unlink()
    assert main([*argv, "--limit", "1"]) == 2 and not out.exists()
    assert "none of 1 pairs can be read; the first: p.jsonl line 1:" in capsys.readouterr().err


def test_a_limit_takes_the_table_of_the_whole_set(folder, tmp_path, capsys):
    table = tmp_path / "people.csv"
    table.write_text("pair,segment,label\n0,0,first\n1,0,second\n")
    argv = ["label-segments", str(folder / "pairs.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert main([*argv, "--by", "file", "--labels", str(table), "--limit", "1"]) == 0
    assert "1 pairs; segments: 1 first, 0 second" in capsys.readouterr().err


def test_a_question_that_is_not_there(folder, tmp_path, capsys):
    argv = ["label-segments", str(folder / "pairs.jsonl"), "--by", "vlm", "--model", "m"]
    assert main([*argv, "--output", str(tmp_path / "o.jsonl"), "--question", str(tmp_path / "gone")]) == 2
    assert "gone': no such file; allowed: a text file" in capsys.readouterr().err


@pytest.mark.parametrize(("frames", "segments"), [(81, 5), (87, 5), (88, 6)])
def test_every_latent_frame_has_its_segments_label(tmp_path, frames, segments):
    """From the label to the latent frame at 16 frames a second: what is left at the end is not a tie."""
    grey(tmp_path / "v.mp4", [100], 1, 16.0, frames - 1)
    (tmp_path / "p.jsonl").write_text('{"prompt": "x", "videos": ["v.mp4", "v.mp4"]}')
    (pair,) = read_pairs(str(tmp_path / "p.jsonl"))
    row = with_labels(pair, ["first"] * pair.segments(1.0), 1.0, "me")
    assert len(row["segments"][0]) == segments
    clip = 4 * ((frames - 1) // 4) + 1
    crop = Cut((32, 32), (32, 32), (0, 0), (32, 32), clip, 16.0)
    made = lambda k: range(max(0, 4 * k - 3), 4 * k + 1)  # noqa: E731
    dense = dense_of(tuple(map(tuple, row["segments"])), 1.0, crop, (clip - 1) // 4 + 1, made)
    assert dense.per_frame(0) == [1.0] * len(dense.shown) and dense.per_frame(1) == [0.0] * len(dense.shown)
    assert (dense.tied, dense.missing, dense.beyond) == (0, 0, segments - len(dense.scores[0]))


def test_large_frames_are_made_small_as_they_are_read(tmp_path):
    frames = torch.randint(0, 255, (8, 3, 48, 96), generator=torch.Generator().manual_seed(0)).byte()
    write_video(Video(frames, 8.0), tmp_path / "v.mp4")
    (tmp_path / "p.jsonl").write_text('{"prompt": "x", "videos": ["v.mp4", "v.mp4"]}')
    (pair,) = read_pairs(str(tmp_path / "p.jsonl"))
    (large,), (small,) = cut(pair, 0, 1.0, 1, 4.0), cut(pair, 0, 1.0, 1, 4.0, side=32)
    assert large.frames.shape == (4, 3, 48, 96) and small.frames.shape == (4, 3, 16, 32)
    image = Image.fromarray(large.frames[2].permute(1, 2, 0).numpy())
    image.thumbnail((32, 32), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(image), small.frames[2].permute(1, 2, 0).numpy())
    assert cut(pair, 0, 1.0, 1, side=512)[0].frames.shape == (8, 3, 48, 96)
