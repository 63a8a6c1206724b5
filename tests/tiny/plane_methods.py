"""The methods that the plane proves, each with its data and the settings that are right there.

One row per method (and per loss of Diffusion-DPO that is worth a row). ``test_plane.py`` runs every row with
five seeds and once with every label turned round; a name of the registry without a row fails a test. To add
one, tune beta and the like here (a run takes a second) and, where the method's optimum is not the
KL-regularised one, say ``optimum=False`` and why in ``note``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from diffalign.losses.pairwise import IPO, Hinge, Logistic
from diffalign.methods.dpo import DPO
from diffalign.methods.sft import SFT
from diffalign.tiny.plane_data import Maker, preferences
from diffalign.types import Method


@dataclass(frozen=True)
class PlaneRow:
    """One method on the plane.

    Attributes:
        method: with the settings that suit the plane.
        data: what it learns from, a maker of ``diffalign.tiny.plane_data``. Of ``captions`` the gain is of
            prompt fidelity, on a base that was trained with wrong labels; of all others it is of the height.
        steps: optimizer steps of ``groups`` groups.
        groups: groups a step; fewer for lists and for what asks the network often, so that a run stays
            within a second of one core.
        rate: learning rate.
        optimum: whether the result must be near the KL-regularised optimum of its mean reward.
        gain: that the measured quantity must rise by (and fall by, with labels turned round).
        falls: whether labels turned round must lower it (False for what no opinion goes into).
        note: what is particular, for readers.
    """

    method: Method
    data: Maker = preferences
    steps: int = 150
    groups: int = 192
    rate: float = 4e-4
    optimum: bool = True
    gain: float = 0.15
    falls: bool = True
    note: str = ""


PLANE_METHODS: Mapping[str, PlaneRow] = {
    "dpo": PlaneRow(DPO(beta=100)),
    "ipo": PlaneRow(DPO(beta=20, loss=IPO())),
    "hinge": PlaneRow(DPO(beta=100, loss=Hinge())),
    "smoothed": PlaneRow(DPO(beta=50, loss=Logistic(label_smoothing=0.1))),
    "sft": PlaneRow(SFT()),
}
