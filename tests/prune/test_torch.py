"""The PyTorch adaptor: shared memory, three lines in a loop, the same numbers as the NumPy solver and layer."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from skimtvm import prune  # noqa: E402
from skimtvm.errors import InvalidOption  # noqa: E402
from skimtvm.prune import torch as adaptor  # noqa: E402
from skimtvm.winograd import SIZES  # noqa: E402

nn = torch.nn


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 4),
    )


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 1, 6, 6, generator=generator), torch.randint(0, 4, (16,), generator=generator)


def loss_of(model, step):
    x, y = batch(step)
    return nn.functional.cross_entropy(model(x), y)


def test_memory_is_shared():
    model = net()
    arrays = adaptor.arrays(model)
    arrays["0.weight"][0, 0] = 7
    assert (model[0].weight[0, 0] == 7).all()


def loop(model, optimizer, pruner, steps):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        pruner.after_backward()
        optimizer.step()
        pruner.after_step()


RULES = {
    "l1": {"*": prune.Rule(prune.L1(1e-3), prune.GradientAdjusted(1e-3))},
    "ista": {"[02]": prune.Rule(prune.ISTA(1e-2))},
    "surgery": {"*": prune.Rule(prune.L1Surgery(1e-3), prune.GradientAdjusted(1e-2, reading="update"))},
    "ramp": {"*": prune.Rule(mask=prune.Mask(), sparsity=prune.ramp_to_sparsity(0.8, begin=0, end=6))},
}


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("name", RULES)
def test_three_lines_and_resume_bit_for_bit(name, optimizer, tmp_path):
    def make():
        model = net()
        opt = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-2)
        return model, opt, adaptor.Pruner(model, RULES[name], opt)

    straight = make()
    loop(*straight, range(12))
    first = make()
    loop(*first, range(5))
    torch.save({k: o.state_dict() for k, o in zip("mop", first, strict=True)}, tmp_path / "c.pt")
    second = make()
    for k, o in zip("mop", second, strict=True):
        o.load_state_dict(torch.load(tmp_path / "c.pt", weights_only=True)[k])
    loop(*second, range(5, 12))
    for (n, a), b in zip(straight[0].named_parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b), n
    if name == "ramp":
        assert all(s == pytest.approx(0.8, abs=0.01) for s in straight[2].sparsity().values())
    if name == "l1":
        assert max(straight[2].sparsity().values()) > 0


def test_ista_shrinks_by_the_rate_of_its_parameter_group():
    model = net()
    opt = torch.optim.SGD([{"params": [model[0].weight], "lr": 0.5}, {"params": [model[5].weight], "lr": 0.1}])
    pruner = adaptor.Pruner(model, {"*": prune.ISTA(0.01)}, opt)
    before = {n: a.copy() for n, a in adaptor.arrays(model).items()}
    pruner.after_step()
    for name, rate in (("0.weight", 0.5), ("2.weight", 0.0), ("5.weight", 0.1)):
        w = before[name]
        expected = np.sign(w) * np.maximum(np.abs(w) - np.float32(0.01 * rate), 0)
        assert np.allclose(pruner.core.parameters[name], expected, atol=1e-7), name


def test_mask_holds_under_adam():
    model = net()
    opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    pruner = adaptor.Pruner(model, {"*": prune.Rule(mask=prune.Mask(0.05))}, opt)
    dead = {n: p.detach().numpy() == 0 for n, p in model.named_parameters()}
    assert dead["5.weight"].any()
    loop(model, opt, pruner, range(20))
    for n, p in model.named_parameters():
        assert not p.detach().numpy()[dead[n]].any()


def test_solver_is_the_numpy_one():
    rules = {"*": prune.Rule(prune.L1(1e-3), prune.GradientAdjusted(1e-3))}
    model = net()
    copies = {n: a.copy() for n, a in adaptor.arrays(model).items()}
    mine, other = adaptor.SGD(model, rules, lr=0.05), prune.SGD(copies, rules, lr=0.05)
    for step in range(5):
        mine.zero_grad()
        loss_of(model, step).backward()
        other.step({n: g.copy() for n, g in adaptor.gradients(model).items()})
        mine.step()
    for n, p in model.named_parameters():
        assert p.detach().numpy().tobytes() == copies[n].tobytes()


def test_solver_is_torchs_own_without_rules():
    ours, theirs = net(), net()
    mine, opt = adaptor.SGD(ours, lr=0.05, momentum=0.0), torch.optim.SGD(theirs.parameters(), lr=0.05)
    for step in range(5):
        for model, o in ((ours, mine), (theirs, opt)):
            o.zero_grad()
            loss_of(model, step).backward()
            o.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(("m", "r"), SIZES, ids=str)
@pytest.mark.parametrize("padding", [0, 1, (2, 0, 1, 3)], ids=str)
def test_winograd_module_is_the_numpy_layer(m, r, padding):
    torch.manual_seed(1)
    module = adaptor.WinogradConv2d(3, 4, r, m, padding).double()
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64, requires_grad=True)
    y = module(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    pads = (padding,) * 4 if isinstance(padding, int) else padding
    layer = prune.WinogradConv2d(module.weight.detach().numpy(), module.bias.detach().numpy(), r=r, pads=pads)
    assert np.allclose(layer.forward(x.detach().numpy()), y.detach().numpy(), atol=1e-6)
    dx, du, db = layer.backward(dy.numpy())
    for ours, theirs in ((dx, x.grad), (du, module.weight.grad), (db, module.bias.grad)):
        assert np.allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-5)


def test_winograd_module_in_parts(monkeypatch):
    """What is done at once is a matter of speed, not of results."""
    torch.manual_seed(2)
    module = adaptor.WinogradConv2d(3, 4, 5, 4, 2).double()
    x = torch.randn(7, 3, 14, 10, dtype=torch.float64, requires_grad=True)
    results = []
    for cached in (10**9, 3 * 4 * 64 * 12, 1):  # all seven images, three at a time, one by one
        monkeypatch.setattr(adaptor, "_CACHED", cached)
        results.append((module(x), *torch.autograd.grad(module(x).square().sum(), (x, module.weight, module.bias))))
    for other in results[1:]:
        assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(results[0], other, strict=True))
    frozen = module(x.detach()).square().sum()
    assert torch.allclose(torch.autograd.grad(frozen, module.weight)[0], results[0][2])


def test_to_winograd_keeps_the_function():
    model = net()
    x, _ = batch(0)
    before = model(x)
    assert adaptor.to_winograd(model, "2") == ["2"]
    assert isinstance(model[2], adaptor.WinogradConv2d) and torch.allclose(model(x), before, atol=1e-5)
    with pytest.raises(InvalidOption, match="matches nothing; there are: 0"):
        adaptor.to_winograd(model, "conv*")
    with pytest.raises(InvalidOption, match="stride 1"):
        adaptor.WinogradConv2d.from_conv(nn.Conv2d(3, 3, 3, stride=2))


def test_bad_input():
    model = net()
    with pytest.raises(InvalidOption, match="there are: 0, 2, 5"):
        adaptor.Pruner(model, {"conv1": prune.Rule()})
    with pytest.raises(InvalidOption, match="pass the optimizer"):
        adaptor.Pruner(model, RULES["ista"])
    with pytest.raises(InvalidOption, match="float32"):
        adaptor.arrays(net().bfloat16())
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = adaptor.Pruner(model, RULES["l1"], opt)
    loss_of(model, 0).backward()
    model[2].weight.grad[0, 0, 0, 0] = float("nan")
    with pytest.raises(prune.TrainingDiverged, match="layer '2'"):
        pruner.after_backward()
