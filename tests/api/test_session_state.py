"""States are read and checked whole before anything changes, and loaded in any order."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

import prunus

GRADUAL = """
modifiers:
- prune: {sparsity: {from: 0.1, to: 0.9}, window: {from: 2step, to: 8step, every: 2step}, layers: ['0']}
- nm_training: {layers: ['2'], pattern: '2:4', masking: sr_ste, window: {to: 8step}}
- movement: {layers: ['4'], sparsity: 0.5, window: {from: 8step}}
- keep: {layers: ['6'], allow_dense: true}
"""


def attached(recipe=GRADUAL, seed=0, steps=0):
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(8, 8) if i % 2 == 0 else nn.Tanh() for i in range(9)))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    session = prunus.attach(model, optimizer, recipe)
    train(model, optimizer, steps)
    return model, optimizer, session


def train(model, optimizer, steps):
    for i in range(steps):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(i))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def plain(state):
    """Lists in place of tensors, so that == compares."""
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, list):
        return [plain(value) for value in state]
    return state.tolist() if isinstance(state, torch.Tensor) else state


FAULTS = {
    "no mapping": (lambda d: None, "NoneType"),
    "empty": (lambda d: d.clear(), "it lacks"),
    "foreign version": (lambda d: d.update(version=2), "version 2"),
    "negative step": (lambda d: d.update(step=-5), "step=-5"),
    "step is text": (lambda d: d.update(step="x"), "step='x'"),
    "no step": (lambda d: d.update(step=None), "step=None"),
    "no masks": (lambda d: d.update(masks=None), "masks=None"),
    "masks lost": (lambda d: d.update(masks={}), "no mask"),
    "mask without bits": (lambda d: d["masks"]["0.weight"].pop("bits"), "0.weight.*bits"),
    "bits missing": (
        lambda d: d["masks"]["0.weight"].update(bits=torch.zeros(7, dtype=torch.uint8)),
        "7 bytes",
    ),
    "too many bits": (
        lambda d: d["masks"]["0.weight"].update(bits=torch.zeros(99, dtype=torch.uint8)),
        "99 bytes",
    ),
    "floating bits": (lambda d: d["masks"]["0.weight"].update(bits=torch.zeros(8)), "uint8"),
    "negative shape": (lambda d: d["masks"]["0.weight"].update(shape=[-8, 8]), "shape="),
    "mask is text": (lambda d: d["masks"].update({"0.weight": "x"}), "masks.0.weight"),
    "runs is none": (lambda d: d.update(runs=None), "runs=None"),
    "no runs": (lambda d: d.update(runs=[]), "0 runs"),
    "one run more": (lambda d: d["runs"].append({}), "5 runs"),
    "empty run": (lambda d: d["runs"].__setitem__(0, {}), r"runs\[0\]: 'next' is missing"),
    "next beyond": (lambda d: d["runs"][0].update(next=99), "next=99"),
    "next negative": (lambda d: d["runs"][0].update(next=-1), "next=-1"),
    "ticks are text": (lambda d: d["runs"][0].update(ticks=["a"]), "ticks='a'"),
    "unknown owned": (lambda d: d["runs"][0].update(owned=["zzz"]), "zzz"),
    "frozen is text": (lambda d: d["runs"][1].update(frozen="no"), r"runs\[1\]: frozen='no'"),
    "dense of another": (lambda d: d["runs"][1]["dense"].update(zzz=torch.ones(8, 8)), "zzz"),
    "dense of another shape": (
        lambda d: d["runs"][1]["dense"].update({"2": torch.ones(8)}),
        "shape",
    ),
    "moved is none": (lambda d: d["runs"][2].update(moved=None), "moved=None"),
    "moved is integral": (
        lambda d: d["runs"][2]["moved"].update({"4": torch.ones(8, 8, dtype=torch.int)}),
        "moved",
    ),
    "begun is a number": (lambda d: d["runs"][3].update(begun=1), "begun=1"),
    "another recipe": (lambda d: d.update(recipe="modifiers: [keep: {}]"), "another recipe"),
}


@pytest.mark.parametrize(("fault", "match"), FAULTS.values(), ids=FAULTS)
def test_a_faulty_state_is_one_valueerror_and_changes_nothing(fault, match):
    *_, first = attached(steps=5)
    state = copy.deepcopy(first.state_dict())
    model, _, session = attached(seed=1, steps=3)
    weights, before = copy.deepcopy(model.state_dict()), copy.deepcopy(session.state_dict())
    events = list(session.recorder.events)
    fault(state)
    state = None if match == "NoneType" else state
    with pytest.raises(ValueError, match=match):
        session.load_state_dict(state)
    assert plain(session.state_dict()) == plain(before)
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert session.recorder.events == events


def test_a_closed_session_loads_no_state():
    *_, session = attached(steps=5)
    state = session.state_dict()
    session.close()
    with pytest.raises(ValueError, match="attach anew"):
        session.load_state_dict(state)


NM = "- nm_training: {layers: ['0'], pattern: '2:4', masking: %s, window: {from: %dstep, to: %dstep}}\n"
CASES = {
    "frozen masks, learning rate 0": (NM % ("sr_ste", 0, 2), 0.0),
    "frozen masks": (NM % ("sr_ste", 0, 2), 0.1),
    "fully pruned later": (
        NM % ("sr_ste", 0, 2) + "- prune: {layers: ['0'], sparsity: 1.0, window: {from: 4step}}\n",
        0.1,
    ),
    "frozen weights": (NM % ("sr_ste", 0, 2) + "- freeze: {parameters: ['0.*']}\n", 0.1),
    "training, learning rate 0": (NM % ("sr_ste", 0, 9), 0.0),
    "training": (NM % ("mdgf", 0, 9), 0.1),
    "before the window": (NM % ("ste", 8, 9), 0.1),
}
LOADS = ("attach", "model", "optimizer", "session")
ORDERS = [x for x in itertools.permutations(LOADS) if x.index("attach") < x.index("session")]


def parts(rate):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    groups = [{"params": model[0].parameters(), "lr": rate}, {"params": model[2].parameters()}]
    return model, torch.optim.SGD(groups, lr=0.1, momentum=0.9)


@pytest.mark.parametrize(("entries", "rate"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_every_order_of_loading_resumes_the_uninterrupted_run(order, entries, rate):
    recipe = f"modifiers:\n{entries}"
    whole, optimizer = parts(rate)
    first = prunus.attach(whole, optimizer, recipe)
    train(whole, optimizer, 6)
    saved = copy.deepcopy(
        {
            "model": whole.state_dict(),
            "optimizer": optimizer.state_dict(),
            "session": first.state_dict(),
        }
    )
    model, new = parts(rate)
    session = None
    for load in order:
        if load == "attach":
            session = prunus.attach(model, new, recipe)
        else:
            target = {"model": model, "optimizer": new, "session": session}[load]
            target.load_state_dict(saved[load])
    for name, t in saved["model"].items():
        assert torch.equal(model.state_dict()[name], t)
    for m, o, s in ((whole, optimizer, first), (model, new, session)):
        train(m, o, 5)
        s.close()
    for name, t in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], t)
    assert session.sparsity == first.sparsity


def test_an_output_folder_that_cannot_be_written_is_told_when_attaching(tmp_path):
    (tmp_path / "file").touch()
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recipe = "modifiers: [prune: {sparsity: 0.5, layers: ['*']}]"
    with pytest.raises(OSError, match="cannot write"):
        prunus.attach(model, optimizer, recipe, output_dir=tmp_path / "file")


@pytest.mark.parametrize("take", [copy.deepcopy, copy.copy, pickle.dumps])
def test_a_session_is_neither_copied_nor_pickled(take):
    *_, session = attached(steps=1)
    with pytest.raises(TypeError, match="session.state_dict"):
        take(session)


@pytest.mark.parametrize("take", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_an_optimizer_has_no_session(take):
    model, optimizer, session = attached(steps=1)
    other, trained = take((optimizer, model))
    train(trained, other, 3)
    assert session.step == 1
    prunus.attach(trained, other, GRADUAL).close(finish=False)
