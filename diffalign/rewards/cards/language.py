"""Cards of rewards on vision-language models."""

from diffalign.rewards.cards.card import RewardCard


def _video(name: str, title: str, factory: str, reach: float, notes: str) -> RewardCard:
    return RewardCard(
        name=name,
        title=title,
        low=-reach,
        high=reach,
        scale_note="often negative",
        licence="Apache-2.0 (weights), MIT (code)",
        size="5 GB",
        checkpoint="KwaiVGI/VideoReward",
        target=f"diffalign.rewards.zoo.video_reward:{factory}",
        notes=notes,
        video=True,
    )


def _geneval2(name: str, title: str, factory: str, notes: str) -> RewardCard:
    return RewardCard(
        name=name,
        title=title,
        low=0,
        high=1,
        licence="Apache-2.0 (Qwen3-VL), CC BY-NC 4.0 (the questions)",
        size=f"17.5 GB (any other: {name}:HUB/ID)",
        checkpoint="Qwen/Qwen3-VL-8B-Instruct",
        target=f"diffalign.rewards.zoo.geneval2:{factory}",
        notes=notes,
        differentiable=True,
        prompt_set="geneval2",
    )


CARDS = (
    RewardCard(
        name="hpsv3",
        title="HPSv3: human preference, predicted by a Qwen2-VL-7B with a head",
        low=0,
        high=15,
        scale_note="bad below 5, good above 10",
        licence="MIT (code)",
        size="16.6 GB",
        checkpoint="MizzenAI/HPSv3/HPSv3.safetensors",
        target="diffalign.rewards.zoo.hpsv3:load",
        notes="The mean at the token <|Reward|> (arXiv 2508.03789), which no prompt may hold; use bfloat16. "
        "hpsv3:FILE@BASE has the Qwen2-VL's config and tokenizer elsewhere.",
        differentiable=True,
    ),
    RewardCard(
        name="hpsv3pp",
        title="HPSv3++: human preference by a Qwen3-VL-8B, aware of the generator's capability",
        scale_note="not published; higher is better",
        licence="Apache-2.0 (weights)",
        size="17.6 GB",
        checkpoint="Junjun2333/HPSv3-PlusPlus/hpsv3++.pth",
        target="diffalign.rewards.zoo.hpsv3pp:load",
        notes="The mean at the token <|Reward|> (arXiv 2606.14657), which no prompt may hold; use bfloat16. "
        "It is asked for visual quality, and infers the generator's capability from each image alone. "
        "hpsv3pp:FILE@BASE has the Qwen3-VL's config and tokenizer elsewhere; iteration=0.3 (0 to 1) tells "
        "how much reinforcement learning the images' model has had, for which its authors go from 0.3 to 1 "
        "in a run.",
        differentiable=True,
    ),
    _video(
        "video_reward",
        "VideoAlign's VideoReward: visual quality, motion quality and text alignment",
        "load",
        9,
        "VQ + MQ + TA of a Qwen2-VL-2B, each normalised (arXiv 2501.13918); two frames a second. "
        "video_reward:FOLDER or FOLDER@BASE for what is here already.",
    ),
    _video(
        "video_reward_vq",
        "VideoReward's visual quality alone",
        "load_visual_quality",
        3,
        "VQ of the same network: reasonable, clear, detailed, aesthetic frames.",
    ),
    _video(
        "video_reward_mq",
        "VideoReward's motion quality alone",
        "load_motion_quality",
        3,
        "MQ of the same network: steady, natural, ample motion.",
    ),
    _video(
        "video_reward_ta",
        "VideoReward's text alignment alone",
        "load_text_alignment",
        3,
        "TA of the same network: what the prompt asks for, camera and style included.",
    ),
    RewardCard(
        name="vqascore",
        title="VQAScore: probability of a vision-language model that the image shows the prompt",
        low=0,
        high=1,
        licence="Apache-2.0 (Qwen2-VL)",
        size="16.6 GB (any other: vqascore:HUB/ID)",
        checkpoint="Qwen/Qwen2-VL-7B-Instruct",
        target="diffalign.rewards.zoo.vqascore:load",
        notes="P(\"Yes\") to 'Does this figure show ...?' (arXiv 2404.01291), with any model of "
        "AutoModelForImageTextToText. Scores of different models do not compare.",
        differentiable=True,
    ),
    _geneval2(
        "geneval2_am",
        "GenEval 2's Soft-TIFA AM: mean probability of the right answers to a prompt's questions",
        "load_am",
        "Atom level (arXiv 2512.16853); the figure is 100 times the mean over prompts. Questions are "
        "those of evaluate's --prompts geneval2:FILE, or geneval2_am:MODEL@questions=FILE "
        "(geneval2_data.jsonl), else fetched; a prompt without any is an error. Use bfloat16.",
    ),
    _geneval2(
        "geneval2_gm",
        "GenEval 2's Soft-TIFA GM: geometric mean of the same probabilities",
        "load_gm",
        "Prompt level (arXiv 2512.16853): one wrong atom lowers the score of the whole prompt. Questions and "
        "model as of geneval2_am, which is asked anew.",
    ),
    RewardCard(
        name="quality_levels",
        title="Quality by the level words of a vision-language model, as Q-Align and DeQA-Score read them",
        low=0,
        high=1,
        scale_note="Q-Align's scale; DeQA-Score's is 1 + 4 times as much",
        licence="Apache-2.0 (Qwen2.5-VL)",
        size="16.6 GB (any other: quality_levels:HUB/ID)",
        checkpoint="Qwen/Qwen2.5-VL-7B-Instruct",
        target="diffalign.rewards.zoo.quality_levels:load",
        notes="The next word after 'The quality of the image is' among excellent, good, fair, poor, bad "
        "(arXiv 2312.17090, 2501.11561), with any model of AutoModelForImageTextToText; @about=aesthetics "
        "asks for aesthetics. The weights of Q-Align and DeQA-Score are mPLUG-Owl2 with code for "
        "transformers 4.36, which does not run here: they answer from a server in an environment of their "
        "own (http://HOST:PORT/NAME). Scores of different models do not compare.",
        differentiable=True,
        reads_prompt=False,
    ),
    RewardCard(
        name="checklist",
        title="VisionReward's checklist: weighted yes/no questions to a vision-language model",
        low=-2.5,
        high=4.9,
        licence="Apache-2.0 (questions, Qwen2.5-VL)",
        size="16.6 GB (any other: checklist:HUB/ID)",
        checkpoint="Qwen/Qwen2.5-VL-7B-Instruct",
        target="diffalign.rewards.zoo.checklist:load",
        notes="27 questions, 3 gates and the alignment with the prompt, with the published weights (arXiv "
        "2412.21059), answered by any model of AutoModelForImageTextToText: the expectation over its "
        "answers, or with @hard=yes over the likelier ones. VisionReward's own network (CogVLM2 in the "
        "format of SwissArmyTransformer) does not run here. 31 forward passes an image; scores of different "
        "models do not compare.",
        differentiable=True,
    ),
    RewardCard(
        name="unified_reward",
        title="UnifiedReward behind an endpoint: points for agreement and quality",
        low=0,
        high=1,
        scale_note="0 for an answer without points",
        licence="MIT (UnifiedReward)",
        size="none here",
        checkpoint="",
        source="http://HOST:PORT/v1@MODEL",
        target="diffalign.rewards.zoo.unified_reward:load",
        notes="unified_reward:http://HOST:PORT/v1@MODEL, an OpenAI-compatible endpoint (arXiv 2503.05236); "
        "OPENAI_API_KEY is sent if it is set. flow_grpo's question and scale.",
    ),
    RewardCard(
        name="unified_reward_2",
        title="UnifiedReward 2.0, local or behind an endpoint: points for alignment, coherence and style",
        low=0.2,
        high=1,
        scale_note="the mean of three points from 1 to 5, divided by 5",
        licence="MIT (code)",
        size="17 GB (also 2b, 4b, 32b, and Qwen2.5-VL: unified_reward_2:HUB/ID)",
        checkpoint="CodeGoat24/UnifiedReward-2.0-qwen3vl-8b",
        target="diffalign.rewards.zoo.unified_reward_2:load",
        notes="The published question (arXiv 2503.05236, release 2.0) to a model of transformers in this "
        "process, or to unified_reward_2:http://HOST:PORT/v1@MODEL. Weights: @alignment=2@style=0. An answer "
        "that cannot be read is counted and asked for again, and never a score. From Python, "
        "load_pairwise(SOURCE).compare(a, b, prompts) asks the published question about two images in both "
        "orders.",
    ),
    RewardCard(
        name="vlm_judge",
        title="A vision-language model, local or at an endpoint, with custom questions",
        low=0,
        high=1,
        licence="the model's",
        size="none here",
        checkpoint="",
        source="FILE.yaml",
        target="diffalign.rewards.zoo.vlm_judge:load",
        notes="vlm_judge:FILE.yaml with path (a folder or hub id of transformers) or url and model, prompt "
        "(with {prompt}; several by name for a rubric), low, high, and criteria with weights. An answer that "
        "cannot be read is counted and asked for again, and never a score. From Python, "
        "load_pairwise(FILE).compare(a, b, prompts) asks in both orders and takes the mean.",
        cached=False,
    ),
)
