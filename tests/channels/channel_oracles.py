"""The slow, obvious side of the comparisons: copies of models in which units are zero."""

import copy

import torch

from prunus.channels.inputs import run
from prunus.channels.recording import output_tensors


def randomized(model, seed=0):
    """In float64 and evaluation mode, with no parameter or statistic at a value that hides errors."""
    torch.manual_seed(seed)
    model = model.double().eval()
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def as_double(inputs):
    if isinstance(inputs, torch.Tensor):
        return inputs.double() if inputs.is_floating_point() else inputs
    return {name: as_double(t) for name, t in inputs.items()}


def masked_copy(model, found, gone):
    """A copy in which each slot of the units that go is zero, but for running variances."""
    model = copy.deepcopy(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for group in found.groups:
        units = torch.as_tensor(sorted(gone.get(group.name, ())), dtype=torch.long)
        for slot in group.slots:
            if not slot.parameter.endswith("running_var"):
                index = slot.index[units].flatten()
                tensors[slot.parameter].data.index_fill_(slot.dim, index, 0)
    return model


@torch.no_grad()
def outputs(model, inputs):
    return output_tensors(run(model, inputs))


def error(model, other, inputs):
    """The largest difference of all outputs, of the largest value."""
    worst = 0.0
    for a, b in zip(outputs(model, inputs), outputs(other, inputs), strict=True):
        if a.is_floating_point():
            worst = max(worst, float((a - b).abs().max() / a.abs().max()))
    return worst
