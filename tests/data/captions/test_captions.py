"""Altered captions: by exchanging a word offline, or from a chat endpoint (a local thread here)."""

import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from diffalign.config.schema import AlteredConfig, DataConfig
from diffalign.data import encode_preferences, read_preferences
from diffalign.data.captions.chat import Chat
from diffalign.data.captions.lexicon import ENGLISH, plural_of
from diffalign.data.captions.perturb import Swap, edits_of, replaced
from diffalign.errors import UserError
from diffalign.tiny import prompts, scenes
from tests.data.conftest import Model, png, write_jsonl

CAPTIONS = [
    "A red car parked in front of a wooden house at sunset",
    "two dogs playing in the snow",
    "an owl sitting on a branch, night, oil painting",
    "a glass of wine next to a blue vase",
    "portrait of a young woman with her umbrella",
    "A LARGE BEAR in a forest",
    "three wolves under a tree",
    "an orange cat and an orange on a table",
]


def answers(caption, count=200):
    return Counter(Swap(seed)(caption) for seed in range(count))


# the lexicon


def test_words_stand_in_one_group_only_and_have_rivals():
    words = [word for group in ENGLISH for word in group.words]
    assert not [word for word, times in Counter(words).items() if times > 1]
    assert all(len(group.words) > 1 for group in ENGLISH)
    assert {group.principle for group in ENGLISH} == {"content", "attribute", "spatial", "contextual"}


def test_plurals():
    plurals = [
        "puppies",
        "wolves",
        "buses",
        "peaches",
        "potatoes",
        "women",
        "monkeys",
        "churches",
        "butterflies",
    ]
    singles = ["puppy", "wolf", "bus", "peach", "potato", "woman", "monkey", "church", "butterfly"]
    assert [plural_of(word) for word in singles] == plurals


# exchanges


@pytest.mark.parametrize("caption", CAPTIONS)
def test_one_word_is_exchanged_and_nothing_else(caption):
    for altered in answers(caption, 60):
        assert altered is not None and altered != caption
        spans = {(e.start, e.end): e.others for e in edits_of(caption)}
        assert any(
            altered == replaced(caption, edit, other) for edit in edits_of(caption) for other in edit.others
        )
        assert spans


def test_the_same_seed_and_caption_give_the_same_answer():
    assert [Swap(3)(caption) for caption in CAPTIONS] == [Swap(3)(caption) for caption in CAPTIONS]
    assert [Swap(3)(caption) for caption in CAPTIONS] != [Swap(4)(caption) for caption in CAPTIONS]


def test_every_principle_is_as_likely():
    caption = "A red car parked in front of a wooden house at sunset"
    chosen = Counter()
    for altered, times in answers(caption, 800).items():
        (edit,) = [e for e in edits_of(caption) for o in e.others if replaced(caption, e, o) == altered]
        chosen[edit.principle] += times
    assert set(chosen) == {"content", "attribute", "spatial", "contextual"}
    assert all(150 <= times <= 250 for times in chosen.values())


@pytest.mark.parametrize(
    ("caption", "word", "new", "expected"),
    [
        ("a red car", "red", "orange", "an orange car"),
        ("an owl", "owl", "parrot", "a parrot"),
        ("An owl", "owl", "parrot", "A parrot"),
        ("A CAT", "CAT", "elephant", "AN ELEPHANT"),
        ("Cats sleep", "Cats", "wolves", "Wolves sleep"),
        ("the owl", "owl", "parrot", "the parrot"),
        ("a cat", "cat", "unicorn", "a unicorn"),
    ],
)
def test_articles_and_capitals_follow_the_new_word(caption, word, new, expected):
    (edit,) = [edit for edit in edits_of(caption) if caption[edit.start : edit.end] == word]
    assert replaced(caption, edit, new) == expected


def test_plurals_are_exchanged_for_plurals():
    others = {o for edit in edits_of("three wolves") for o in edit.others}
    assert {"foxes", "cats", "ponies"} & others == {"foxes", "cats"}
    assert not {"fox", "cat"} & others and "four" in others


@pytest.mark.parametrize(
    ("caption", "untouched"),
    [
        ("a glass of wine", "glass"),
        ("an orange on a table", "orange"),
        ("a woman with her cat", "woman"),
        ("a cat-like hat", "cat"),
        ("the catalogue of hats", "cat"),
    ],
)
def test_words_that_mean_something_else_here_are_left_alone(caption, untouched):
    assert untouched not in {caption[e.start : e.end] for e in edits_of(caption)}


@pytest.mark.parametrize(
    ("caption", "touched"),
    [
        ("a glass door", "glass"),
        ("a door of glass", "glass"),
        ("an orange cat", "orange"),
        ("a woman with a cat", "woman"),
        ("a cup far away from a jar", "far away from"),
    ],
)
def test_words_that_are_meant(caption, touched):
    assert touched in {caption[e.start : e.end] for e in edits_of(caption)}


@pytest.mark.parametrize("caption", ["", "masterpiece, best quality", "abstract expressionism"])
def test_a_caption_without_a_known_word_has_no_answer(caption):
    assert Swap()(caption) is None


def test_captions_of_drawn_scenes_become_wrong_captions_of_drawn_scenes():
    changed = Counter()
    for caption in prompts("train", 600):
        altered = Swap(1)(caption)
        assert altered is not None and not scenes.same(caption, altered)
        differ = [a.kind for a, b in zip(scenes.parse(caption), scenes.parse(altered), strict=True) if a != b]
        assert len(differ) == 1
        changed[differ[0]] += 1
    assert min(changed[kind] for kind in ("size", "color", "shape", "relation")) > 60


def test_what_is_true_from_the_other_end_is_no_alteration():
    a, b = "a large red circle", "a small red circle"
    assert scenes.same(f"{a} above {b}", f"{b} below {a}") and scenes.same(f"{a} above {a}", f"{a} below {a}")
    assert not scenes.same(f"{a} above {b}", f"{a} below {b}") and not scenes.same(a, b)
    assert not scenes.same(a, f"{a} above {b}")
    assert f"{a} below {a}" not in answers(f"{a} above {a}")


# the view


@pytest.fixture
def jsonl(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    return lambda entries: write_jsonl(tmp_path / "p.jsonl", entries)


def read(path, **settings):
    return read_preferences(DataConfig(path=str(path), resolution=16, view="captions", **settings))


ENTRIES = [
    {"prompt": "a red car", "chosen": "0.png", "rejected": "1.png"},
    {"prompt": "two cats", "images": ["0.png", "1.png", "2.png"], "scores": [1, 2, 3], "rewards": [4, 5, 6]},
    {"prompt": "masterpiece", "chosen": "0.png", "rejected": "1.png"},
    {"prompt": "a dog", "image": "3.png", "liked": False},
    {"prompt": "a hat", "image": "3.png"},
    {"prompt": "a hat", "images": ["0.png", "1.png"], "scores": [1, 1]},
]


def test_the_best_image_under_a_right_and_a_wrong_caption(jsonl, tmp_path):
    path = jsonl(ENTRIES)
    preferences = read(path)
    examples = list(preferences)
    assert [example.prompts for example in examples] == [
        (p, Swap()(p)) for p in ("a red car", "two cats", "a hat")
    ]
    assert [example.images[0].source.name for example in examples] == ["0.png", "2.png", "3.png"]
    assert all(e.images[0] == e.images[1] and e.scores == (1, 0) for e in examples)
    assert examples[1].rewards == ((6,), (6,))
    text = "3 caption pairs, 0 ties, 2 rows without label, 1 caption without a word to change, 0 unreadable"
    assert preferences.counts.text == text
    model = Model()
    config = DataConfig(path=str(jsonl(ENTRIES[:1])), resolution=16, view="captions", workers=2)
    encoded = encode_preferences(model, read_preferences(config), config, tmp_path / "c", False)
    assert model.images == 1 and set(model.family.prompts) == {"", "a red car", Swap()("a red car")}
    assert encoded[0].texts[0] == encoded[0].text != encoded[0].texts[1]


def test_turned_labels_prefer_the_wrong_caption(jsonl):
    assert [example.scores for example in read(jsonl(ENTRIES), flip_labels=1.0)] == [(0, 1)] * 3


def test_the_drawn_captions_stay_as_they_are():
    config = DataConfig(path="tiny:captions", view="captions", limit=3)
    plain = DataConfig(path="tiny:captions", limit=3)
    assert list(read_preferences(config)) == list(read_preferences(plain))


def test_the_seed_is_part_of_the_fingerprint():
    marks = {
        read_preferences(
            DataConfig(path="tiny:pairs", view=view, altered=AlteredConfig(seed=seed))
        ).fingerprint
        for view, seed in (("captions", 0), ("captions", 1), ("auto", 0))
    }
    assert len(marks) == 3


# the endpoint


class Endpoint:
    """A chat endpoint on this machine: its replies in turn, the last one for ever; what it was asked."""

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.asked.append((self.path, self.headers.get("Authorization"), body))
                reply = endpoint.replies.pop(0) if len(endpoint.replies) > 1 else endpoint.replies[0]
                status, content = reply if isinstance(reply, tuple) else (200, reply)
                if status == 200 and not content.startswith("{"):
                    content = json.dumps({"choices": [{"message": {"content": content}}]})
                self.send_response(status)
                self.send_header("Content-Length", str(len(content.encode())))
                self.end_headers()
                self.wfile.write(content.encode())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def endpoint():
    made = []

    def make(*replies):
        made.append(Endpoint(*replies))
        return made[-1]

    yield make
    for each in made:
        each.server.shutdown()
        each.server.server_close()


@pytest.fixture
def chat(tmp_path):
    def make(url, **settings):
        settings = {
            "model": "m",
            "answers": str(tmp_path / "sub" / "answers.jsonl"),
            "timeout": 5.0,
            **settings,
        }
        return Chat(AlteredConfig(by="llm", url=url, **settings), pause=0.001)

    return make


def test_an_answer_is_asked_for_once(endpoint, chat, monkeypatch):
    server = endpoint('"a blue car"\n')
    monkeypatch.setenv("SOME_KEY", "secret")
    asker = chat(server.url, key="SOME_KEY")
    assert asker("a red car") == "a blue car" == asker("a red car")
    assert chat(server.url)("a red car") == "a blue car"  # from the file
    ((path, key, body),) = server.asked
    assert path == "/v1/chat/completions" and key == "Bearer secret" and body["model"] == "m"
    assert body["messages"][0]["content"].endswith("\n\na red car")
    assert chat(server.url, model="other")("a red car") == "a blue car" and len(server.asked) == 2


def test_no_key_is_sent_where_there_is_none(endpoint, chat, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = endpoint("a blue car")
    chat(server.url)("a red car")
    assert server.asked[0][1] is None


def test_what_may_pass_is_tried_again(endpoint, chat):
    server = endpoint((429, "slow down"), (503, "busy"), "{}", "A red car", "a blue car")
    assert chat(server.url)("a red car") == "a blue car"
    assert len(server.asked) == 5


@pytest.mark.parametrize(
    ("reply", "problem", "tries"),
    [
        ((500, "broken"), "status 500: broken", 3),
        ((401, "bad key"), "status 401: bad key", 1),
        ('{"choices": []}', "an answer that is no chat completion", 3),
        ("a red car", "the answer 'a red car', which is no other caption", 3),
        ("  \n", "the answer ''", 3),
    ],
)
def test_the_caption_is_named_when_no_try_helps(endpoint, chat, reply, problem, tries):
    server = endpoint(reply)
    message = (
        rf"data\.altered: no altered caption for 'a red car' from {re.escape(server.url)} .*{tries} tries\): "
    )
    with pytest.raises(UserError, match=message + re.escape(problem)):
        chat(server.url, retries=2)("a red car")
    assert len(server.asked) == tries


def test_nobody_answers(chat):
    with pytest.raises(UserError, match=r"'a red car' from http://127.0.0.1:9 .*refused"):
        chat("http://127.0.0.1:9", retries=1)("a red car")


def test_a_file_of_answers_that_was_cut_is_read_as_far_as_it_goes(endpoint, chat, tmp_path):
    server = endpoint("a blue car")
    file = tmp_path / "sub" / "answers.jsonl"
    file.parent.mkdir()
    file.write_text('{"model": "m", "caption": "a hat", "altered": "a cap"}\n{"model": "m", "capt')
    asker = chat(server.url)
    assert asker("a hat") == "a cap" and asker("a red car") == "a blue car" and len(server.asked) == 1
    assert chat(server.url)("a red car") == "a blue car" and len(server.asked) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": ""}, "data.altered.model is empty; needed for data.altered.by llm"),
        ({"url": "localhost:8000"}, "data.altered.url is 'localhost:8000'; allowed: an http:// or https://"),
    ],
)
def test_settings_of_the_endpoint(chat, settings, message):
    with pytest.raises(UserError, match=message):
        chat(**{"url": "http://localhost", **settings})


def test_a_set_through_the_endpoint(endpoint, jsonl, tmp_path):
    server = endpoint("something else")
    altered = AlteredConfig(by="llm", url=server.url, model="m", answers=str(tmp_path / "a.jsonl"))
    for _ in range(2):
        examples = list(read(jsonl(ENTRIES[:2]), altered=altered))
        assert [e.prompts[1] for e in examples] == ["something else"] * 2
    assert len(server.asked) == 2
