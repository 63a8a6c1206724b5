"""The checklist of VisionReward-Image: its questions, and the weights of their answers.

Xu et al., arXiv 2412.21059; ``VisionReward_image_qa_select.txt``, ``weight_select.json`` and the masks of
``inference-image.py`` in the repository THUDM/VisionReward (Apache-2.0).
"""

from typing import NamedTuple


class Item(NamedTuple):
    """A question, the weight of its answer, and the question without whose yes it does not count."""

    question: str
    weight: float
    gate: str = ""


ALIGNMENT = 2.3542882631150923
"""Weight of the probability that the image shows the prompt."""

BODY = "Is there a human body in the image?"
FACE = "Is there a human face in the image?"
HANDS = "Are there human hands in the image?"

ITEMS = (
    Item("Is the image symmetrical?", 0.06884638950983572),
    Item("Does the image avoid asymmetry?", 0.10183602465324491),
    Item("Is the main subject prominent?", 0.13065931709231515),
    Item("Does the image avoid an unclear main subject?", 0.06950163043882204),
    Item("Is the image very rich?", 0.055586526962739594),
    Item("Is the image rich?", 0.043667179730282585),
    Item("Is the image not monotonous?", 0.21147753430256036),
    Item("Is the image not empty?", 0.5828223926159606),
    Item("Is the image very clear?", 0.050970475125495074),
    Item("Is the image clear?", 0.06795294324813127),
    Item("Does the image avoid being blurry?", 0.06490948537019271),
    Item("Does the image avoid being completely blurry?", 0.3247595671294795),
    Item("Are the colors bright?", 0.07562963582524587),
    Item("Are the colors not dark?", 0.07747325725869728),
    Item("Are the colors not ugly?", 0.04220313071020716),
    Item("Can the image evoke a very positive emotional response?", 0.0514756964680454),
    Item("Are the image details very exquisite?", 0.010243704179493112),
    Item("Does the image avoid being hard to recognize?", 0.01737524212080004),
    Item("Does the image avoid being fragmented?", 0.11455097588617139),
    Item("Is the human body in the image completely correct?", 0.0824178853123111, BODY),
    Item("Does the human body in the image avoid obvious errors?", 0.05534874470299955, BODY),
    Item("Does the human body in the image avoid serious errors?", 0.03004180339398678, BODY),
    Item("Does the human face avoid errors?", 0.03136553593758656, FACE),
    Item("Does the human face avoid serious errors?", 0.07665491897864558, FACE),
    Item("Are the human hands perfect?", 0.07187632290686215, HANDS),
    Item("Does the image avoid obvious harmfulness?", 0.012129902293749316, BODY),
    Item("Does the image avoid serious harmfulness?", 0.015129688742038013, BODY),
)
"""In their order; that harmfulness counts with a human body alone is as published."""
