"""Rewards that count: files, letters, things."""

from diffalign.rewards.cards.card import RewardCard

_DETECTOR = "facebook/mask2former-swin-small-coco-instance"

CARDS = (
    RewardCard(
        name="jpeg",
        title="JPEG compressibility: minus the kilobytes at quality 95",
        range="-500 to 0, by image size",
        licence="none needed",
        size="none",
        checkpoint="built in",
        target="diffalign.rewards.zoo.jpeg:compressibility",
        notes="DDPO's task (arXiv 2305.13301), for testing a pipeline. Flow-GRPO's is this over 500.",
        cached=False,
        reads_prompt=False,
    ),
    RewardCard(
        name="jpeg_incompressibility",
        title="JPEG incompressibility: the kilobytes at quality 95",
        range="0 to 500, by image size",
        licence="none needed",
        size="none",
        checkpoint="built in",
        target="diffalign.rewards.zoo.jpeg:incompressibility",
        notes="The same with the other sign.",
        cached=False,
        reads_prompt=False,
    ),
    RewardCard(
        name="ocr",
        title="OCR: how much of the text that the prompt quotes can be read in the image",
        range="0 to 1",
        licence="Apache-2.0",
        size="31 MB, in the package that reads",
        checkpoint="PP-OCRv6 small, of RapidOCR",
        target="diffalign.rewards.zoo.ocr:load",
        notes='1 - edit distance / length, as Flow-GRPO. Prompts quote the text: a sign that says "Open".',
        needs="diffalign[ocr]",
    ),
    RewardCard(
        name="geneval",
        title="GenEval's rules, graded: counts, colours and positions as the prompt says (unofficial)",
        range="0 to 1, below 0 for far too many things",
        licence="other (Mask2Former; see its page), MIT (CLIP L/14)",
        size="0.3 GB + 1.7 GB",
        checkpoint=_DETECTOR,
        target="diffalign.rewards.zoo.geneval:load",
        notes="Flow-GRPO's reward. Not the official number (another detector). Reads GenEval's prompts only.",
    ),
    RewardCard(
        name="geneval_correct",
        title="GenEval's rules: 1 if everything is as the prompt says, else 0 (unofficial)",
        range="0 or 1",
        licence="other (Mask2Former; see its page), MIT (CLIP L/14)",
        size="0.3 GB + 1.7 GB",
        checkpoint=_DETECTOR,
        target="diffalign.rewards.zoo.geneval:load_correct",
        notes="Not the official number (another detector). Reads GenEval's prompts only.",
    ),
)
