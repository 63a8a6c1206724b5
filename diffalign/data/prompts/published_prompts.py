"""Addresses and layouts of published prompt sets.

Files and columns are those of public code that reads them (2026-11); PartiPrompts, GenEval and GenEval 2 were
checked against copies of the files; the addresses of the others on the hub and on GitHub were **not
verified**. A local copy is always read: ``dpg:FILE`` and so on.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from diffalign.data.prompts.prompt_files import Row, file_rows
from diffalign.data.prompts.prompt_layouts import (
    any_rows,
    compbench_rows,
    dpg_rows,
    gedit_rows,
    geneval2_rows,
    imgedit_rows,
    unique_rows,
)
from diffalign.errors import UserError
from diffalign.utils.files import write_atomic
from diffalign.utils.text import read_json

STYLES = ("anime", "concept-art", "paintings", "photo")
"""HPDv2's, in the order of its table; one file each."""

_GENEVAL = "https://raw.githubusercontent.com/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl"
_RAW = "https://raw.githubusercontent.com"
_GENEVAL2 = f"{_RAW}/facebookresearch/GenEval2/main/geneval2_data.jsonl"
_DPG = f"{_RAW}/TencentQQGYLab/ELLA/main/dpg_bench/dpg_bench.csv"
_COMPBENCH = f"{_RAW}/Karine-Huang/T2I-CompBench/main/examples/dataset"
_PARTS = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
_UNIGENBENCH = f"{_RAW}/CodeGoat24/UniGenBench/main/data/test_prompts_en.csv"
_VBENCH = f"{_RAW}/Vchitect/VBench/master/vbench/VBench_full_info.json"
_GEDIT = "stepfun-ai/GEdit-Bench"
_SECONDS = 30  # timeout of a server


@dataclass(frozen=True)
class Published:
    """A set that papers evaluate on.

    Attributes:
        name: its name here.
        axes: fields or columns of each axis of categories, in lower case; the first one present counts.
        where: the file that a user may download by hand.
        files: fetches the published files, or takes them from the cache; raises errors of the client.
        rows: of one such file, or of a folder that holds several.
    """

    name: str
    axes: Mapping[str, tuple[str, ...]]
    where: str
    files: Callable[[], list[Path]]
    rows: Callable[[Path], Iterator[Row]]

    def fetched(self) -> Iterator[Row]:
        """Return the rows of the set, from the hub or its cache; UserError if they cannot be had."""
        try:
            files = self.files()
        except Exception as error:  # hub, http and file errors: all mean that the file is not here
            raise UserError(
                f"prompts {self.name!r}: cannot fetch {self.where} ({type(error).__name__}); is the network "
                f"there, and HF_HUB_OFFLINE unset? A downloaded copy is read as {self.name}:PATH"
            ) from error
        return (row for file in files for row in self.rows(file))

    def copy(self, place: str) -> Iterator[Row]:
        """Return the rows of a copy; UserError if there is none, or it is laid out in another way."""
        file = Path(place).expanduser()
        if not file.exists():
            raise UserError(
                f"prompts '{self.name}:{place}': no such file; it should be a copy of {self.where}"
            )
        return self.rows(file)


def _from_hub(repository: str, *names: str) -> Callable[[], list[Path]]:
    def files() -> list[Path]:
        from huggingface_hub import hf_hub_download

        return [Path(hf_hub_download(repository, name, repo_type="dataset")) for name in names]

    return files


def _matching(repository: str, pattern: str) -> Callable[[], list[Path]]:
    """Files of a data set on the hub by a pattern, where their names hold a digest."""

    def files() -> list[Path]:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(repository, repo_type="dataset", allow_patterns=[pattern])
        found = sorted(Path(folder).glob(pattern))
        if not found:
            raise FileNotFoundError(pattern)
        return found

    return files


def _from_web(name: str, *urls: str) -> Callable[[], list[Path]]:
    """Files at addresses, kept beside the hub's cache."""

    def files() -> list[Path]:
        from urllib.request import urlopen

        from huggingface_hub import constants

        found = []
        for url in urls:
            kept = Path(constants.HF_HOME) / "diffalign" / name / url.rpartition("/")[2]
            if not kept.is_file():
                if constants.HF_HUB_OFFLINE:
                    raise OSError("offline")
                with urlopen(url, timeout=_SECONDS) as response:
                    write_atomic(kept, response.read())
            found.append(kept)
        return found

    return files


def _by_hand() -> list[Path]:
    raise OSError("not fetched")


def _styled(place: Path) -> Iterator[Row]:
    """HPDv2's: a file is a list of texts, its name the style; a folder holds the four of them."""
    files = [place / f"{style}.json" for style in STYLES] if place.is_dir() else [place]
    for file in files:
        prompts = read_json(file)
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError(f"{file}: not a list of texts, as HPDv2's benchmark/{STYLES[0]}.json is")
        for number, prompt in enumerate(prompts):
            yield f"{file.name} entry {number}", {"prompt": prompt, "style": file.stem}


PUBLISHED: Mapping[str, Published] = {
    published.name: published
    for published in (
        Published(
            "parti",
            {"category": ("category",), "challenge": ("challenge",)},
            "PartiPrompts.tsv of nateraw/parti-prompts",
            _from_hub("nateraw/parti-prompts", "PartiPrompts.tsv"),
            file_rows,
        ),
        Published(
            "drawbench",
            {"category": ("category",)},
            "'DrawBench Prompts - Sheet1.csv' (columns Prompts, Category) of sayakpaul/drawbench",
            _from_hub("sayakpaul/drawbench", "DrawBench Prompts - Sheet1.csv"),
            file_rows,
        ),
        Published(
            "geneval", {"tag": ("tag",)}, _GENEVAL, lambda: _from_web("geneval", _GENEVAL)(), file_rows
        ),
        Published(
            "hpdv2",
            {"style": ("style",)},
            f"benchmark/{{{','.join(STYLES)}}}.json of zhwang/HPDv2",
            _from_hub("zhwang/HPDv2", *(f"benchmark/{style}.json" for style in STYLES)),
            _styled,
        ),
        Published(
            "pickapic",
            {},
            "data/test_unique-*.parquet of yuvalkirstain/pickapic_v2 (500 prompts), or a json list of texts",
            _matching("yuvalkirstain/pickapic_v2", "data/test_unique-*.parquet"),
            unique_rows,
        ),
        Published(
            "geneval2",
            {"atoms": ("atom_count",), "skills": ("skill_set",)},
            _GENEVAL2,
            _from_web("geneval2", _GENEVAL2),
            geneval2_rows,
        ),
        Published(
            "dpg",
            {},
            f"{_DPG}, or the folder of its prompts' texts",
            _from_web("dpg", _DPG),
            dpg_rows,
        ),
        Published(
            "t2i_compbench",
            {"category": ("category",)},
            f"{_COMPBENCH}/{{{','.join(_PARTS)}}}_val.txt, a file or the folder of them",
            _from_web("t2i_compbench", *(f"{_COMPBENCH}/{part}_val.txt" for part in _PARTS)),
            compbench_rows,
        ),
        Published(
            "oneig",
            {"category": ("category",)},
            "OneIG-Bench.json of OneIG-Bench/OneIG-Bench (prompt_en, category)",
            _from_hub("OneIG-Bench/OneIG-Bench", "OneIG-Bench.json"),
            any_rows,
        ),
        Published(
            "unigenbench",
            {},
            "data/test_prompts_en.csv of UniGenBench (prompt_en)",
            _from_web("unigenbench", _UNIGENBENCH),
            any_rows,
        ),
        Published(
            "vbench",
            {"dimension": ("dimension",)},
            f"{_VBENCH} (prompt_en, dimension)",
            _from_web("vbench", _VBENCH),
            any_rows,
        ),
        Published(
            "mjhq",
            {"category": ("category",)},
            "meta_data.json of playgroundai/MJHQ-30K (objects by id)",
            _from_hub("playgroundai/MJHQ-30K", "meta_data.json"),
            any_rows,
        ),
        *(
            Published(
                name,
                {"task": ("task_type",)},
                f"data/*.parquet of {_GEDIT} (instruction, input_image_raw, task_type; "
                f"instruction_language {language})",
                _matching(_GEDIT, "data/*.parquet"),
                partial(gedit_rows, language),
            )
            for name, language in (("gedit", "en"), ("gedit_cn", "cn"))
        ),
        Published(
            "imgedit",
            {"edit": ("edit_type",)},
            "basic_edit.json of ImgEdit-Bench (prompt, id, edit_type) with the folder singleturn of its "
            "images beside it, which is not fetched",
            _by_hand,
            imgedit_rows,
        ),
    )
}
