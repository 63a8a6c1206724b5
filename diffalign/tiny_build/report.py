"""Measure a build; write the figures beside the weights as `report.json` and `report.md`."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.tiny.worlds import SCENES, World


def judges(seed: int = 0, count: int = 1000, world: World = SCENES) -> dict[str, float]:
    """Measure the judges on correct renders, renders with one wrong word, and images without content."""
    rng = np.random.default_rng(seed)
    judge, taste, render, (with_it, without) = world.judge, world.taste, world.render, world.styles
    scenes = [world.sample(rng, None) for _ in range(count)]
    texts = [world.caption(s) for s in scenes]
    images = [render(s) for s in scenes]
    mean = lambda values: round(float(np.mean(list(values))), 4)  # noqa: E731
    contentless = [image for i in range(100) for image in nonsense(seed + i)]
    return {
        "statements_right": mean(judge(i, t) for i, t in zip(images, texts, strict=True)),
        "one_word_wrong": mean(
            judge(render(world.alter(s, rng)), t) for s, t in zip(scenes, texts, strict=True)
        ),
        "another_caption": mean(judge(i, t) for i, t in zip(images, texts[1:] + texts[:1], strict=True)),
        "blank_noise_stripes": mean(judge(j, texts[k % count]) for k, j in enumerate(contentless)),
        **{
            f"taste_{name}": mean(
                taste(i) for i, s in zip(images, scenes, strict=True) if world.styled(s) is (name == with_it)
            )
            for name in (with_it, without)
        },
    }


def nonsense(seed: int) -> list[np.ndarray]:
    """Return images without content, float (32, 32, 3): blank, noise, blocks, both stripes, a chessboard."""
    rng = np.random.default_rng(seed)
    a, b = rng.random(3), rng.random(3)
    rows = np.arange(32) // int(rng.integers(1, 9)) % 2
    stripes = np.where(rows[:, None, None] == 0, a, b) * np.ones((32, 32, 3))
    chess = np.where(((rows[:, None] + rows[None, :]) % 2)[..., None] == 0, a, b)
    blocks = np.kron(rng.random((8, 8, 3)), np.ones((4, 4, 1)))
    return [
        np.ones((32, 32, 3)) * a,
        rng.random((32, 32, 3)),
        blocks,
        stripes,
        stripes.transpose(1, 0, 2),
        chess,
    ]


def base(
    pipe: Any,
    seed: int = 10_000,
    count: int = 512,
    guidance: float = 2.0,
    world: World = SCENES,
    **more: Any,
) -> dict[str, float]:
    """Measure content and taste of a pipeline's images on validation prompts, and the chance level.

    `more` are arguments of the pipeline's call.
    """
    from diffalign.tiny_build.pretrain import sample

    prompts = list(world.split_captions("validation")[:count])
    images = sample(pipe, prompts, seed, guidance=guidance, **more)
    scores = np.array([world.judge(i, p) for i, p in zip(images, prompts, strict=True)])
    other = [world.judge(i, p) for i, p in zip(images, prompts[1:] + prompts[:1], strict=True)]
    return {
        "prompts": count,
        "content": round(float(scores.mean()), 4),
        "perfect": round(float((scores == 1).mean()), 4),
        "nothing_seen": round(float((scores == 0).mean()), 4),
        "content_of_another_caption": round(float(np.mean(other)), 4),
        "taste": round(float(np.mean([world.taste(i) for i in images])), 4),
    }


def video_base(
    pipe: Any, seed: int = 10_000, count: int = 128, guidance: float = 3.0, tokens: int = 24
) -> dict[str, float]:
    """Measure content, motion and dynamics of a pipeline's clips on validation prompts, and chance levels."""
    from diffalign.tiny import motion_judge
    from diffalign.tiny.motions import split_captions as motions_of
    from diffalign.tiny_build import wan

    prompts = list(motions_of("validation")[:count])
    clips = wan.sample(pipe, prompts, seed, guidance=guidance, tokens=tokens)
    shifted = prompts[1:] + prompts[:1]
    rules = {
        "content": (motion_judge.content, prompts),
        "motion": (motion_judge.motion, prompts),
        "content_of_another_caption": (motion_judge.content, shifted),
        "motion_of_another_caption": (motion_judge.motion, shifted),
        "pixels_a_second": (motion_judge.dynamics, prompts),
    }
    scores = {
        name: round(float(np.mean([rule(c, t) for c, t in zip(clips, texts, strict=True)])), 4)
        for name, (rule, texts) in rules.items()
    }
    return {"prompts": count, **scores}


def sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each part of the package data, and their total."""
    parts = {
        p.name: sum(f.stat().st_size for f in ([p] if p.is_file() else p.rglob("*")) if f.is_file())
        for p in sorted(folder.iterdir())
        if not p.name.startswith(("report", "."))
    }
    return {**parts, "total": sum(parts.values())}


def write(folder: Path, part: str, figures: dict[str, Any]) -> None:
    """Update one part of the report and rewrite both files."""
    path = folder / "report.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    report[part] = figures
    report["bytes"] = sizes(folder)
    lines = ["# How the tiny models were built", ""]
    for name in sorted(report):
        lines += [f"## {name}", "", "| figure | value |", "|---|---|"]
        lines += [*(f"| {key} | {value} |" for key, value in report[name].items()), ""]
    for target, body in (
        (path, json.dumps(report, indent=1) + "\n"),
        (folder / "report.md", "\n".join(lines)),
    ):
        fresh = target.with_name(f".{target.name}")
        fresh.write_text(body, encoding="utf-8")
        fresh.replace(target)
