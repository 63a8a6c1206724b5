"""Methods that remember something: their state is a part of a checkpoint."""

import json

from diffalign.config.schema import TrainingConfig
from diffalign.methods.auto_beta import AutoBeta
from diffalign.methods.dpo import DPO
from diffalign.strategies.sdpo import SDPO
from diffalign.training.checkpoint import Checkpoints, fingerprint
from diffalign.training.hooks import SaveCheckpoints
from tests.training.toys import Probe, Trial, same, weights


def run(folder, steps, resume=None, betas=None, wrap=lambda method: method):
    settings = TrainingConfig(steps=steps, batch_size=4, accumulation=2, seed=5)
    trial = Trial(settings=settings, method=wrap(AutoBeta(decay=0.9, low=1, high=1e6)), ties=(1, 2))
    checkpoints = Checkpoints(folder, 0, fingerprint(settings, trial.optimizer, 1))
    noted = Probe(
        lambda state: betas.append(getattr(state.method, "inner", state.method).running.value.item())
    )
    trial.hooks, trial.resume = [noted, SaveCheckpoints(checkpoints, 5)], resume and checkpoints.start(resume)
    return trial.run()


def test_a_running_mean_resumes_to_the_bit(tmp_path):
    one, other = [], []
    whole = run(tmp_path / "whole", 10, betas=one)
    run(tmp_path / "parts", 5, betas=other)
    resumed = run(tmp_path / "parts", 10, "latest", other)
    assert one == other and len(set(one)) == 10
    assert same(weights(whole), weights(resumed))
    kept = json.loads((tmp_path / "whole" / "step-5" / "state.json").read_text())
    assert kept["facts"]["method"] == {"margin": one[4]}


def test_a_strategy_around_the_method_keeps_its_state(tmp_path):
    sdpo = SDPO(over="pair").wrap
    whole = run(tmp_path / "whole", 10, betas=[], wrap=sdpo)
    run(tmp_path / "parts", 5, betas=[], wrap=sdpo)
    assert same(weights(whole), weights(run(tmp_path / "parts", 10, "latest", [], sdpo)))
    assert SDPO().wrap(DPO()).state_dict() == {}


def test_a_fresh_method_would_not_have_resumed(tmp_path):
    """The control of the test above: without its state, the same steps differ."""
    whole = run(tmp_path / "whole", 10, betas=[])
    run(tmp_path / "parts", 5, betas=[])
    path = tmp_path / "parts" / "step-5" / "state.json"
    state = json.loads(path.read_text())
    state["facts"]["method"]["margin"] = 0.0
    path.write_text(json.dumps(state))
    assert not same(weights(whole), weights(run(tmp_path / "parts", 10, "latest", [])))
