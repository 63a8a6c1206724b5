"""The rows of online methods; ``diffalign.plane.settings`` has all rows."""

from collections.abc import Mapping

from diffalign.methods._multi_time import Stratified
from diffalign.methods.adjoint_dpm import AdjointDPM
from diffalign.methods.adjoint_matching import AdjointMatching
from diffalign.methods.alignprop import AlignProp
from diffalign.methods.awm import AWM
from diffalign.methods.crd import CRD
from diffalign.methods.d3po import D3PO
from diffalign.methods.ddpo import DDPO
from diffalign.methods.ddrl import DDRL
from diffalign.methods.dgpo import DGPO
from diffalign.methods.diff_instruct import DiffInstruct
from diffalign.methods.diffusion_nft import DiffusionNFT
from diffalign.methods.diffusion_opd import DiffusionOPD
from diffalign.methods.distillation_dpo import DistillationDPO
from diffalign.methods.dpo import DPO
from diffalign.methods.draft import DRaFT
from diffalign.methods.flow_dppo import FlowDPPO
from diffalign.methods.flow_grpo import FlowGRPO
from diffalign.methods.grpo_guard import GRPOGuard
from diffalign.methods.refl import ReFL
from diffalign.methods.spo import SPO
from diffalign.methods.srpo import SRPO
from diffalign.methods.xpo import XPO
from diffalign.plane.rows import PlaneRow, few_steps, of_flow, online, sampled

ONLINE: Mapping[str, PlaneRow] = {
    "d3po": PlaneRow(
        D3PO(beta=1, kl=0.1),
        steps=200,
        groups=96,
        rate=1e-4,
        optimum=False,
        rollout=online("trajectories", 96, samples=4),
        note="the clip alone does not hold it on the support: a small penalty does",
    ),
    "ddpo": PlaneRow(
        DDPO(clip=1e-2),
        steps=400,
        groups=96,
        optimum=False,
        rollout=online("trajectories", 96, samples=4, advantage="prompt"),
    ),
    "ddrl": PlaneRow(
        DDRL(clip=1e-2, data_beta=0.02),
        steps=120,
        groups=96,
        flow=True,
        optimum=False,
        rollout=of_flow("trajectories", eta=0.7),
        note="its ratio of bare squared errors is weak where steps are short, and so must the data be",
    ),
    "spo": PlaneRow(
        SPO(beta=1, kl=1),
        steps=100,
        groups=96,
        rate=1e-4,
        optimum=False,
        rollout=online("tree", 96, samples=4),
        note="judged by the height of clean estimates, at every noise level",
    ),
    "online_dpo": PlaneRow(
        DPO(beta=300),
        steps=60,
        rate=2e-4,
        rollout=online("samples", 192, eta=0.0, shared_noise=False, passes=3),
    ),
    "xpo": PlaneRow(
        XPO(scale=300, beta=1.0, alpha=1e-3),
        steps=60,
        rate=2e-4,
        optimum=False,
        rollout=online("samples", 192, eta=0.0, shared_noise=False, passes=3),
    ),
    "draft": PlaneRow(DRaFT(last=5, hold=0.5), steps=150, groups=96, rollout=sampled(96), optimum=False),
    "draft_lv": PlaneRow(
        DRaFT(copies=2, hold=0.02),
        gain=0.1,
        steps=150,
        groups=96,
        rate=2e-3,
        rollout=sampled(96),
        optimum=False,
    ),
    "alignprop": PlaneRow(AlignProp(hold=0.5), steps=150, groups=96, rollout=sampled(96), optimum=False),
    "adjoint_dpm": PlaneRow(
        AdjointDPM(hold=15.0),
        steps=20,
        groups=96,
        rate=5e-5,
        rollout=sampled(96, steps=10),
        optimum=False,
        note="all steps learn: ten times as fast as the last five, off the support after 40 steps",
    ),
    "adjoint_matching": PlaneRow(
        AdjointMatching(beta=1.2), steps=60, groups=48, rate=6e-4, rollout=sampled(48, eta=1.0)
    ),
    "srpo": PlaneRow(
        SRPO(("high",), ("low",), high=0.8, low=0.3, margin=99.0, hold=4.0),
        steps=40,
        groups=96,
        rollout=sampled(96),
        optimum=False,
        note="the height under the word low is minus the height; the margin never binds",
    ),
    "refl": PlaneRow(
        ReFL(margin=9.0, scale=1.0, hold=5.0, low=0.5),
        steps=100,
        groups=96,
        rollout=sampled(96),
        optimum=False,
        note="heights are below 3, so that the margin of 9 never binds",
    ),
    "flow_grpo": PlaneRow(
        FlowGRPO(clip=1e-2),
        steps=120,
        groups=96,
        flow=True,
        optimum=False,
        rollout=of_flow("trajectories", eta=0.7),
    ),
    "flow_grpo_cps": PlaneRow(
        FlowGRPO(clip=1e-2, kl_form="exact"),
        steps=80,
        groups=96,
        flow=True,
        optimum=False,
        rollout=of_flow("trajectories", eta=0.7, form="cps"),
    ),
    "dancegrpo": PlaneRow(
        FlowGRPO(clip=1e-2, kl=None),
        steps=54,
        groups=96,
        flow=True,
        optimum=False,
        rollout=of_flow("trajectories", eta=0.3, form="dance", advantage="group", trained_steps=0.6),
    ),
    "mixgrpo": PlaneRow(
        FlowGRPO(clip=1e-2, kl=None),
        steps=48,
        groups=96,
        rate=1e-4,
        flow=True,
        optimum=False,
        rollout=of_flow("trajectories", eta=0.7, window=4, window_shift=2),
        note="with four draws in place of nine each is to blame for more: it is fast, and must stop early",
    ),
    "flow_grpo_fast": PlaneRow(
        FlowGRPO(clip=1e-2, kl=None),
        steps=60,
        groups=96,
        rate=1e-4,
        flow=True,
        optimum=False,
        rollout=of_flow(
            "trajectories",
            eta=0.8,
            form="cps",
            density="squared",
            window=3,
            window_order="random",
            window_within=5,
        ),
    ),
    "tempflow": PlaneRow(
        FlowGRPO(clip=1e-2, noise_weight=2.25),
        steps=120,
        groups=96,
        flow=True,
        optimum=False,
        rollout=of_flow("trajectories", eta=0.7),
    ),
    "grpo_guard": PlaneRow(
        GRPOGuard(clip=2e-3),
        steps=60,
        groups=96,
        rate=2e-4,
        flow=True,
        optimum=False,
        rollout=of_flow("trajectories", eta=0.7),
    ),
    "flow_dppo": PlaneRow(
        FlowDPPO(threshold=1e-4),
        steps=80,
        groups=96,
        rate=2e-4,
        flow=True,
        optimum=False,
        rollout=of_flow("trajectories", eta=0.7),
    ),
    "awm": PlaneRow(
        AWM(kl=0.15, time=Stratified(strata=4)),
        steps=30,
        groups=96,
        flow=True,
        optimum=False,
        rollout=of_flow("samples", eta=0.0, shared_noise=False),
    ),
    "diffusion_nft": PlaneRow(
        DiffusionNFT(kl=1.0),
        steps=25,
        groups=96,
        flow=True,
        optimum=False,
        rollout=of_flow("samples", eta=0.0, shared_noise=False),
        note="the whole network is trained: it needs a penalty that adapters do not",
    ),
    "crd": PlaneRow(
        CRD(kl=1.0, kl_guidance=1.0),
        steps=25,
        groups=96,
        flow=True,
        optimum=False,
        rollout=of_flow("samples", eta=0.0, shared_noise=False),
        note="as diffusion_nft",
    ),
    "diffusion_opd": PlaneRow(
        DiffusionOPD(),
        steps=120,
        groups=96,
        rate=1e-3,
        rollout=online("trajectories", 96, samples=1, eta=0.0, steps=10),
        note="its teacher is the exact denoiser of the optimum of a temperature, and there it must end",
    ),
    "distillation_dpo": PlaneRow(
        DistillationDPO(assistants="crossed", losers=0.25, last=None, every=5),
        steps=200,
        groups=96,
        rate=2e-4,
        rollout=few_steps(2),
        optimum=False,
        note="with each side's own assistant, as published, it goes against the preference: see its page",
    ),
    "diff_instruct": PlaneRow(
        DiffInstruct(last=None, every=5),
        steps=200,
        groups=96,
        rate=2e-4,
        rollout=few_steps(1),
        optimum=False,
        gain=-0.1,
        falls=False,
        sampling=4,
        note="it has no preference: the height stays, and four steps come closer to the data than the base's",
    ),
    "dgpo": PlaneRow(
        DGPO(kl=1.0),
        steps=25,
        groups=96,
        flow=True,
        optimum=False,
        rollout=of_flow("samples", eta=0.0, shared_noise=False, advantage="group_std"),
        note="as diffusion_nft",
    ),
}
