"""The rows of ``plane_methods`` on the flow version of the plane: every method again, and what differs.

An error of the velocity is 1 / (1 - t)^2 times one of the noise, and larger betas mean as much KL there: most
are a sixth to a tenth of those of the noise schedule. Rows are smaller too: two runs each must stay quick.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffalign.diffusion.inversion import Inversion
from diffalign.plane.rows import PlaneRow
from diffalign.plane.settings import PLANE_METHODS


def on_flow(name: str, **changes: Any) -> PlaneRow:
    """Return a row with other settings of its method (``method.beta=...`` as ``beta``) and of its own."""
    row = PLANE_METHODS[name]
    own = {key: changes.pop(key) for key in list(changes) if key in row.__dataclass_fields__}
    return replace(
        row, **{"groups": min(row.groups, 96), "flow": True, "method": replace(row.method, **changes), **own}
    )


FLOW_CHANGES: Mapping[str, dict[str, Any]] = {
    "dpo": {"beta": 15.0},
    "densedpo": {"beta": 15.0},
    "ipo": {"beta": 2.5},
    "hinge": {"beta": 19.0},
    "smoothed": {"beta": 8.0},
    "kto": {"rate": 1e-4, "steps": 55},
    "tdpo": {"beta": 6.0},
    "tkto": {"beta": 4.0},
    "rankdpo": {"beta": 28.0},
    "dspo_sdxl": {"scale": 15.0},
    "exo": {"beta": 7.5},
    "nca": {"beta": 2.6},
    "bco": {"beta": 4.0},
    "sppo": {"beta": 0.8},
    "discopop": {"beta": 20.0},
    "apo": {"steps": 10},
    "apo_down": {"beta": 120.0, "steps": 60},
    "dmpo": {"beta": 7.5},
    "madpo": {"beta": 16.0},
    "fdpo": {"scale": 45.0},
    "fdpo_forward": {"scale": 10.0},
    "adpo": {"scale": 12.0},
    "aot": {"beta": 100.0},
    "auto_beta": {"low": 12.0, "high": 40.0},
    "poly": {"beta": 26.0, "steps": 60},
    "semi_dpo": {"beta": 26.0, "steps": 60},
    "beta_dpo": {"scale": 350.0, "steps": 75},
    "diffusion_lpo": {"beta": 60.0, "steps": 60},
    "inpo": {"beta": 35.0, "noising": Inversion(steps=5, by="reference")},
    "simpo": {"steps": 40},
    "smpo": {"beta": 60.0, "steps": 50},
    "ddpo": {"steps": 200},
    "inversion_dpo": {"beta": 50.0},
    "online_dpo": {"beta": 35.0},
    "xpo": {"scale": 35.0},
    "draft": {"hold": 0.08},
    "draft_lv": {"hold": 0.06, "rate": 1e-3},
    "alignprop": {"hold": 0.1},
    "adjoint_dpm": {"hold": 0.2, "steps": 40, "rate": 1e-4},
    "refl": {"hold": 1.0, "low": 0.5},
    "srpo": {"hold": 0.5},
}
FLOW_METHODS: Mapping[str, PlaneRow] = {
    name: on_flow(name, **FLOW_CHANGES.get(name, {})) for name, row in PLANE_METHODS.items() if not row.flow
}
