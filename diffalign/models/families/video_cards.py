"""The families of videos, a card each. No torch."""

from diffalign.models.families.card import FamilyCard

VIDEOS = (
    FamilyCard(
        name="animatediff",
        title="AnimateDiff on Stable Diffusion 1.x",
        pipeline="AnimateDiffPipeline",
        resolution=512,
        example="stable-diffusion-v1-5/stable-diffusion-v1-5",
        same_shapes=(),
        single_file_key=(),
        target="diffalign.models.families.animatediff:ANIMATEDIFF",
        moves="sd15",
    ),
    FamilyCard(
        name="cogvideox",
        title="CogVideoX",
        pipeline="CogVideoXPipeline",
        resolution=480,
        example="THUDM/CogVideoX-2b",
        same_shapes=("THUDM/CogVideoX-2b", "zai-org/CogVideoX-2b"),
        single_file_key=(),
        target="diffalign.models.families.cogvideox:COGVIDEOX",
        other_shapes=(
            ("THUDM/CogVideoX-5b", "diffalign.models.families.cogvideox:LARGE"),
            ("zai-org/CogVideoX-5b", "diffalign.models.families.cogvideox:LARGE"),
        ),
    ),
    FamilyCard(
        name="hunyuan_video15",
        title="HunyuanVideo 1.5",
        pipeline="HunyuanVideo15Pipeline",
        resolution=480,
        example="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
        same_shapes=(
            "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
            "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v",
        ),
        single_file_key=(),
        target="diffalign.models.families.hunyuan_video15:HUNYUAN_VIDEO15",
    ),
    FamilyCard(
        name="ltx",
        title="LTX-Video 0.9",
        pipeline="LTXPipeline",
        resolution=512,
        example="Lightricks/LTX-Video",
        same_shapes=("Lightricks/LTX-Video",),
        single_file_key=(),
        target="diffalign.models.families.ltx:LTX",
    ),
    FamilyCard(
        name="ltx2",
        title="LTX-2, its video",
        pipeline="LTX2Pipeline",
        resolution=512,
        example="Lightricks/LTX-2",
        same_shapes=("Lightricks/LTX-2",),
        single_file_key=(),
        target="diffalign.models.families.ltx2:LTX2",
    ),
    FamilyCard(
        name="text_to_video",
        title="ModelScope text-to-video",
        pipeline="TextToVideoSDPipeline",
        resolution=256,
        example="ali-vilab/text-to-video-ms-1.7b",
        same_shapes=(
            "ali-vilab/text-to-video-ms-1.7b",
            "damo-vilab/text-to-video-ms-1.7b",
            "cerspense/zeroscope_v2_576w",
        ),
        single_file_key=(),
        target="diffalign.models.families.text_to_video:TEXT_TO_VIDEO",
    ),
    FamilyCard(
        name="wan",
        title="Wan 2.1 and 2.2",
        pipeline="WanPipeline",
        resolution=480,
        example="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        same_shapes=("Wan-AI/Wan2.1-T2V-1.3B-Diffusers",),
        single_file_key=(),
        target="diffalign.models.families.wan:WAN",
        other_shapes=(
            ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "diffalign.models.families.wan:LARGE"),
            ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "diffalign.models.families.wan:TI2V"),
        ),
        refuses=(
            (
                "transformer_2",
                "it is two experts, for high and for low noise, and one network is trained here. Allowed: "
                "the models of one transformer (Wan 2.1, Wan 2.2 TI2V-5B), or a folder that holds one expert "
                "alone as its transformer, trained at that expert's times (method time: {type: uniform, "
                "steps: null, low: 0.875} for A14B's high-noise expert, high: 0.875 for the other)",
            ),
        ),
    ),
)
