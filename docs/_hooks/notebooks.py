"""MkDocs hook: a page for each notebook, with the outputs that it is saved with, and their index."""

import base64
import html
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
OPEN = """# Notebooks

Each runs in minutes on a CPU, on the embedded tiny models, and says at its end what to change for a real one.
The pages here show them with their outputs; to run one:

```bash
pip install -e ".[notebook]" jupyterlab
jupyter lab notebooks
```

"""


def on_files(files: Files, config: Any) -> Files:
    """Add the index, the pages and their pictures."""
    index = OPEN
    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = json.loads(path.read_text("utf-8"))
        title, about = opening(notebook)
        index += f"- [{title}](notebooks/{path.stem}.md): {about}\n"
        text, pictures = page(path.stem, notebook)
        made = [File.generated(config, f"notebooks/{path.stem}.md", content=text)]
        made[0].inclusion = InclusionLevel.NOT_IN_NAV
        made += [File.generated(config, f"notebooks/{name}", content=png) for name, png in pictures.items()]
        for file in made:
            files.append(file)
    files.append(File.generated(config, "notebooks.md", content=index))
    return files


def opening(notebook: dict[str, Any]) -> tuple[str, str]:
    """Return title and first sentence of a notebook."""
    title, about = "".join(notebook["cells"][0]["source"]).split("\n\n")[:2]
    return title.lstrip("# "), " ".join(re.split(r"(?<=[.])\s", about.strip())[0].split())


def page(name: str, notebook: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its pictures by file name."""
    blocks, pictures = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            blocks.append(source)
            continue
        blocks.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                file = f"{name}_{len(pictures)}.png"
                pictures[file] = base64.b64decode("".join(data["image/png"]))
                blocks.append(f"![Output of the cell above]({file})")
            elif "text/html" in data:
                blocks.append(f'<div class="output">{flat("".join(data["text/html"]))}</div>')
            elif said := "".join(output.get("text", data.get("text/plain", ""))).strip():
                blocks.append(f'<pre class="output">{html.escape(said)}</pre>')
    blocks.insert(1, f"*The notebook `notebooks/{name}.ipynb`, with the outputs that it is saved with.*")
    return "\n\n".join(blocks) + "\n", pictures


def flat(markup: str) -> str:
    """Return HTML without the empty lines at which Markdown would end it."""
    return re.sub(r"\n\s*\n", "\n", markup)
