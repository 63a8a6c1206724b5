"""Losses of score distillation, which move a student's samples along a difference of two scores."""

import torch
from jaxtyping import Float
from torch import Tensor


def along_scores(
    x: Float[Tensor, " B *d"], teacher: Float[Tensor, " B *d"], assistant: Float[Tensor, " B *d"]
) -> Float[Tensor, " B"]:
    """Return mean(sg(eps_teacher - eps_assistant) x) of each sample, (B,), where sg stops the gradient.

    Its gradient to x is (eps_teacher - eps_assistant) / n, n elements; since eps = -sigma times the score of
    the noised density, descending it moves x along score_teacher - score_assistant, which lowers
    KL(student || teacher) if the assistant models the student's density (Wang et al. 2023,
    arXiv 2305.16213, ProlificDreamer; Luo et al. 2023, arXiv 2305.18455, Diff-Instruct). The value
    itself has no meaning.

    Args:
        x: clean samples of the student, with gradient.
        teacher: the teacher's noise predictions for the noised samples.
        assistant: the assistant's noise predictions for the same noised samples.
    """
    with torch.no_grad():
        direction = teacher.float() - assistant.float() if x.dtype != torch.float64 else teacher - assistant
    return (direction * x).flatten(1).mean(1)
