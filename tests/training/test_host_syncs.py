"""Waits for the device: the fake device sees those of torch, and a training step has one."""

import pytest
import torch

from benchmarks.fake_device import DEVICE, Placed, fake_device
from benchmarks.host_syncs import CASES, waits_of
from diffalign.utils.transfer import sent


@pytest.mark.parametrize(
    ("waits", "operation"),
    [
        (1, lambda x, on: x.to(DEVICE)),
        (0, lambda x, on: x.to(DEVICE, non_blocking=True)),
        (0, lambda x, on: sent(x, DEVICE)),
        (1, lambda x, on: torch.tensor([1.0, 2.0], device=DEVICE)),
        (1, lambda x, on: on.new_tensor([1.0])),
        (0, lambda x, on: on.new_full((1,), 1.0)),
        (0, lambda x, on: torch.full((), 3.0, device=DEVICE)),
        (1, lambda x, on: on.sum().item()),
        (1, lambda x, on: bool((on > 0).any())),
        (1, lambda x, on: on.tolist()),
        (1, lambda x, on: on.cpu()),
        (1, lambda x, on: on[on > 0]),
        (1, lambda x, on: on[torch.tensor([0, 1])]),
        (0, lambda x, on: on[torch.tensor([0, 1]).to(DEVICE, non_blocking=True)]),
        (1, lambda x, on: on.nonzero()),
        (0, lambda x, on: torch.where(on > 0, on, 0) * 2 + on.flatten(1).mean(1, keepdim=True)),
        (0, lambda x, on: x[x > 0].tolist()),
    ],
)
def test_the_fake_device_sees_the_waits_of_an_operation(waits, operation):
    x = torch.randn(3, 4)
    on = Placed(x)
    with fake_device() as device:
        operation(x, on)
        assert len(device.waits) == waits
        assert all("test_host_syncs" in wait.place or "transfer" in wait.place for wait in device.waits)


def test_the_fake_device_computes_and_refuses_tensors_of_two_devices():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(4, 2), torch.randn(3, 4)
    expected = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
    weight = layer.weight
    with fake_device():
        layer.to(DEVICE)
        assert layer.weight is weight and weight.device == DEVICE, "an optimizer has the same parameter"
        on = sent(x, DEVICE)
        layer(on).square().sum().backward()
        torch.testing.assert_close(weight.grad.cpu(), expected)
        on[:, 0] = 7
        assert on.view(-1)[0].item() == 7
        with pytest.raises(RuntimeError, match=r"two devices: one of \(3, 4\) on the CPU"):
            on + x
        assert (on + torch.tensor(1.0)).device == DEVICE, "a number may come from the CPU"


def test_what_is_sent_is_equal_and_like():
    x = torch.arange(4.0)
    like = torch.zeros(1, dtype=torch.float64)
    assert sent(x, "cpu") is x and sent(x, like).dtype == torch.float64
    with fake_device():
        on = sent(x, sent(like, DEVICE))
        assert on.device == DEVICE and on.dtype == torch.float64 and on.tolist() == x.tolist()


LOOP, BANK = "diffalign/training/loop.py", "diffalign/diffusion/reference_bank.py"


def test_text_encoders_do_not_move_in_each_step_of_a_rewards_gradient(tmp_path):
    """Their weights went to the device and back, tensor by tensor, for the prompts of each micro-batch."""
    steps = waits_of(*CASES["draft"], tmp_path)
    assert any("models/loaded.py" in wait.place for wait in steps[0]), "prompts are encoded ahead"
    assert not [
        wait for wait in steps[1] if "models/loaded.py" in wait.place or "rollout/model.py" in wait.place
    ]
    assert len(steps[1]) < 20


@pytest.mark.parametrize(
    ("case", "places"),
    [
        ("lora", [LOOP]),
        ("full", [LOOP]),
        ("bank", [BANK, LOOP]),  # it reads which predictions it has, and whether the noisy states are theirs
        ("kto", [LOOP]),
        ("flow_grpo", [LOOP]),
    ],
)
def test_a_step_reads_loss_and_norm_in_one_wait(case, places, tmp_path):
    """The one wait decides whether the step is applied; a step that logs has one more."""
    steps = waits_of(*CASES[case], tmp_path)
    assert [wait.place.split(":")[0] for wait in steps[1]] == places
    assert all(wait.operation == "copy to the CPU" for wait in steps[1])
    assert [wait.place.split(":")[0] for wait in steps[2]] == [*places, "diffalign/training/metrics.py"]
