"""The rows of the plane: every method with data and settings that suit it.

There is one row a method, and one for some losses of Diffusion-DPO. ``tests/plane`` trains every row with one
seed (``--plane-seeds 5``: with five) and once with flipped labels; a method of the registry without a row
fails a test. To add a row, tune beta and other settings here (a run takes a second). If the method's optimum
is not the KL-regularised one, set ``optimum=False`` and give the reason in ``note``.
"""

from collections.abc import Mapping

from diffalign.diffusion.inversion import Inversion
from diffalign.diffusion.times import Uniform
from diffalign.losses.clipping import Clamp
from diffalign.losses.divergences import ForwardKL
from diffalign.losses.pairwise import BCO, EXO, IPO, NCA, SPPO, APODown, DiscoPOP, Hinge, Logistic, Poly
from diffalign.losses.reference_free import Paper, Released
from diffalign.methods._trailing import Trail
from diffalign.methods.adpo import ADPO
from diffalign.methods.aot import AOT
from diffalign.methods.apo import APO
from diffalign.methods.auto_beta import AutoBeta
from diffalign.methods.beta_dpo import BetaDPO
from diffalign.methods.densedpo import DenseDPO
from diffalign.methods.diffusion_lpo import DiffusionLPO
from diffalign.methods.dmpo import DMPO
from diffalign.methods.dpo import DPO
from diffalign.methods.dro import DRO
from diffalign.methods.dspo import DSPO
from diffalign.methods.fdpo import FDPO
from diffalign.methods.inpo import InPO
from diffalign.methods.inversion_dpo import InversionDPO
from diffalign.methods.kto import KTO
from diffalign.methods.madpo import MADPO
from diffalign.methods.mapo import MaPO
from diffalign.methods.patchdpo import PatchDPO
from diffalign.methods.rankdpo import RankDPO
from diffalign.methods.semi_dpo import SemiDPO
from diffalign.methods.sft import SFT
from diffalign.methods.simpo import SimPO
from diffalign.methods.smpo import SmPO
from diffalign.methods.tdpo import TDPO
from diffalign.methods.tkto import TKTO
from diffalign.plane.data import captions, experts, films, likes, lists, patched
from diffalign.plane.online_settings import ONLINE
from diffalign.plane.rows import PlaneRow

PLANE_METHODS: Mapping[str, PlaneRow] = {
    "dpo": PlaneRow(DPO(beta=100)),
    "densedpo": PlaneRow(DenseDPO(beta=100, time=Uniform()), films, groups=48),
    "ipo": PlaneRow(DPO(beta=20, loss=IPO())),
    "hinge": PlaneRow(DPO(beta=100, loss=Hinge())),
    "smoothed": PlaneRow(DPO(beta=50, loss=Logistic(label_smoothing=0.1))),
    "sft": PlaneRow(SFT()),
    "kto": PlaneRow(
        KTO(beta=15),
        likes,
        rate=2e-4,
        optimum=False,
        note="a single like does not say how much better: it goes further than a pair would",
    ),
    "tdpo": PlaneRow(
        TDPO(beta=50, clip=Clamp(0.02)),
        captions,
        rate=2e-4,
        optimum=False,
        note="unclipped, losers' errors grow without end: 10 to 30 % of the mass leaves the support",
    ),
    "tkto": PlaneRow(TKTO(beta=20, clip=Clamp(0.01)), captions, rate=2e-4, optimum=False),
    "mapo": PlaneRow(
        MaPO(form=Released(timesteps=30)),
        optimum=False,
        note="errors are ten times those of images, so T = 1000 is too sharp here",
    ),
    "mapo_paper": PlaneRow(MaPO(form=Paper()), optimum=False),
    "patchdpo": PlaneRow(PatchDPO(), patched, optimum=False, note="fine-tuning with weights"),
    "rankdpo": PlaneRow(RankDPO(beta=200), lists, groups=64),
    "dro": PlaneRow(
        DRO(margin=0.05, steps=10), experts, groups=96, optimum=False, note="its goal is the experts"
    ),
    "dro_unsynchronised": PlaneRow(
        DRO(margin=0.05, steps=10, trail=Trail(limit=0.0, every=2)),
        experts,
        groups=96,
        optimum=False,
        note="the rollout is that of a copy of up to a step before; from an older one it is pushed too far",
    ),
    "exo": PlaneRow(
        DPO(beta=50, loss=EXO(0.2)),
        steps=100,
        note="a quarter of the labels is a toss-up: told that they are sure (0.001), half the mass leaves",
    ),
    "nca": PlaneRow(DPO(beta=10, loss=NCA()), steps=100),
    "bco": PlaneRow(DPO(beta=15, loss=BCO()), steps=100),
    "sppo": PlaneRow(DPO(beta=4, loss=SPPO()), steps=100),
    "discopop": PlaneRow(DPO(beta=150, loss=DiscoPOP()), steps=100),
    "apo": PlaneRow(APO(beta=15), steps=80, optimum=False, note="bounded: no pull on pairs far ahead"),
    "apo_down": PlaneRow(
        DPO(beta=5000, loss=APODown()),
        steps=20,
        rate=1e-4,
        optimum=False,
        gain=0.1,
        note="for winners worse than the model; here it only pushes losers away and must stop early",
    ),
    "dspo": PlaneRow(DSPO(beta=0.3, scale=100), steps=100),
    "dspo_sdxl": PlaneRow(
        DSPO(scale=100, form="sdxl"),
        steps=100,
        rate=1e-4,
        optimum=False,
        note="bounded, and nothing pulls on the data: it must stop early",
    ),
    "dmpo": PlaneRow(DMPO(beta=50, alpha=0.2), steps=100, note="as exo"),
    "madpo": PlaneRow(MADPO(beta=100, reward_scale=3.3), steps=100),
    "fdpo": PlaneRow(FDPO(scale=200), steps=100),
    "fdpo_forward": PlaneRow(FDPO(scale=50, divergence=ForwardKL()), steps=100),
    "simpo": PlaneRow(
        SimPO(beta=1000, gamma=0.5, time=Uniform(low=0.5)),
        steps=15,
        rate=1e-4,
        optimum=False,
        note="nothing holds it back: it is fast, and off the support after 35 steps",
    ),
    "adpo": PlaneRow(ADPO(scale=70), lists, steps=100, groups=64),
    "aot": PlaneRow(AOT(beta=600), steps=60, rate=2e-4, optimum=False, note="pairs are not its unit"),
    "auto_beta": PlaneRow(AutoBeta(low=100, high=300), steps=100),
    "poly": PlaneRow(DPO(beta=150, loss=Poly(0.5)), steps=100),
    "semi_dpo": PlaneRow(SemiDPO(beta=150, loss_type="sce", sce_beta=0.1), steps=100),
    "beta_dpo": PlaneRow(
        BetaDPO(scale=1500, filter=0.1),
        steps=30,
        rate=2e-4,
        optimum=False,
        note="the pairs left out are those that contradict it: nothing holds it back, and it must stop early",
    ),
    "diffusion_lpo": PlaneRow(DiffusionLPO(beta=400), lists, groups=64, steps=100),
    "inpo": PlaneRow(
        InPO(beta=100, noising=Inversion(steps=5, eta=0.5, by="reference")),
        steps=90,
        groups=128,
        rate=2e-4,
        note="inverted by the policy (released), states drift with it and 3 to 4 % of the mass leaves",
    ),
    "smpo": PlaneRow(
        SmPO(
            beta=1000,
            low=-1.5,
            high=1.5,
            time=Uniform(low=0.4),
            noising=Inversion(steps=5, grid="destination", renoise=1, by="reference"),
        ),
        steps=35,
        groups=128,
        rate=1e-4,
        optimum=False,
        note="ordered by the height itself, no label is wrong and nothing bounds the margin: it stops early",
    ),
    "inversion_dpo": PlaneRow(
        InversionDPO(beta=40, steps=10, guidance=1.0, time=Uniform(low=0.4, steps=None)),
        steps=60,
        groups=128,
        rate=1e-4,
        note="our target; with the released one the gradient is 0 at the start",
    ),
    **ONLINE,
}
