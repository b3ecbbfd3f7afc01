from torch import nn

import prunus


def test_one_shot_magnitude_meets_its_target():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    assert prunus.prune(model, "magnitude", sparsity=0.5).sparsity == 0.5
