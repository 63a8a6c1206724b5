"""Wrong captions from a language model behind an OpenAI-compatible chat endpoint.

Answers are appended to a file of json lines at once, so that a restarted run requests none of them again;
several threads may send requests (``data.workers``).
"""

from diffalign.config.schema import AlteredConfig
from diffalign.diffusion.randomness import derive
from diffalign.errors import UserError
from diffalign.utils.chat_completions import Answers, Endpoint, check_endpoint
from diffalign.utils.http import NoAnswerError, Patience, UnusableError

PRINCIPLES = {
    "content": "replace one object by a different object",
    "attribute": "change one attribute of an object: its colour, size, number, material or shape",
    "spatial": "change how two objects lie to each other, or where in the picture one is",
    "contextual": "change the setting: the place, the time, the weather, or what somebody is doing",
}


class Chat:
    """Captions that no longer describe their image, by a language model.

    Each caption gets one of four kinds of edit, drawn by its text.
    """

    def __init__(self, config: AlteredConfig, pause: float = 1.0):
        """``pause``: seconds before the second try. Raises a UserError for a missing or wrong setting."""
        check_endpoint(config.url, config.model, "data.altered.", "data.altered.by llm")
        patience = Patience(config.timeout, config.retries, pause)
        self._config = config
        self._endpoint = Endpoint(config.url, config.model, config.key, patience)
        self._answers = Answers(config.answers)
        mine = [row for row in self._answers.rows if row.get("model") == config.model]
        self._known: dict[str, str] = {
            r["caption"]: r["altered"] for r in mine if {"caption", "altered"} <= {*r}
        }

    @property
    def fingerprint(self) -> str:
        """Address, model and file of answers: stored answers do not change."""
        return f"llm {self._config.url} {self._config.model} {self._config.answers}"

    def __call__(self, caption: str) -> str:
        """Return the altered caption; UserError naming the caption if no try gives one."""
        if caption not in self._known:
            altered = self._ask(caption)
            self._answers.add({"model": self._config.model, "caption": caption, "altered": altered})
            self._known[caption] = altered
        return self._known[caption]

    def _ask(self, caption: str) -> str:
        principle = list(PRINCIPLES.values())[derive(0, "principle", caption) % len(PRINCIPLES)]
        order = (
            f"Rewrite this image caption so that it no longer describes the same image: {principle}. Change "
            f"nothing else, keep it grammatical and about as long. Answer with the caption only.\n\n{caption}"
        )
        try:
            return self._endpoint.complete(order, lambda answer: _other(answer, caption))[0]
        except NoAnswerError as error:
            raise UserError(
                f"data.altered: no altered caption for {caption!r} from {self._config.url} "
                f"(model {self._config.model!r}, {error.tries} tries): {error.problem}"
            ) from error


def _other(answer: str, caption: str) -> str:
    """Return the first line of an answer, without quotation marks; UnusableError if it is no other
    caption.
    """
    line = next((line.strip() for line in answer.splitlines() if line.strip()), "")
    altered = line.strip("\"'“”").strip()
    if not altered or altered.casefold() == caption.strip().casefold():
        raise UnusableError(f"the answer {altered!r}, which is no other caption")
    return altered
