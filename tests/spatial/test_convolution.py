"""Dense convolution is the oracle: values and both gradients, over the whole dense volume."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional as F

from prunus import spatial

from tests.spatial.scenes import scene

FLOWS = list(spatial.DATAFLOWS)
DENSE = {2: F.conv2d, 3: F.conv3d}


def gradients(y, x, weight, cotangent):
    return torch.autograd.grad((y * cotangent).sum(), (x, weight))


def compare(module, x, dense_output, mask=None):
    """The module on the sparse tensor, against a function of its dense twin."""
    x.features.requires_grad_()
    y = module(x).dense()
    dense = x.dense().detach().requires_grad_()
    expected = dense_output(dense)
    if mask is not None:
        expected = expected * mask
    torch.testing.assert_close(y, expected)
    cotangent = torch.randn_like(expected)
    got = gradients(y, x.features, module.weight, cotangent)
    want = gradients(expected, dense, module.weight, cotangent)
    at_sites = x.replace_feature(x.features)  # gradients at the sites, in their order
    places = tuple(at_sites.indices.long().T)
    torch.testing.assert_close(got[0], want[0].movedim(1, -1)[places])
    torch.testing.assert_close(got[1], want[1])


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (5, 1), (3, 2), (1, 1)])
def test_submanifold_equals_dense_at_its_sites(flow, dims, kernel, dilation):
    x = scene((9, 6, 7)[:dims], density=0.3)
    make = {2: spatial.SubMConv2d, 3: spatial.SubMConv3d}[dims]
    module = make(3, 4, kernel, dilation=dilation, bias=False, dataflow=flow).double()
    reach = kernel // 2 * dilation
    sites = (x.replace_feature(torch.ones_like(x.features[:, :1]))).dense()

    def dense_output(dense):
        return DENSE[dims](dense, module.weight, padding=reach, dilation=dilation)

    compare(module, x, dense_output, sites)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(3, 2, 1, 1), (2, 2, 0, 1), (3, 1, 1, 1), (3, 3, 0, 1), (3, 2, 2, 2), (4, 2, 1, 1)],
)
def test_strided_equals_dense_everywhere(flow, dims, kernel, stride, padding, dilation):
    x = scene((9, 6, 7)[:dims])
    make = {2: spatial.SparseConv2d, 3: spatial.SparseConv3d}[dims]
    sizes = (kernel, stride, padding, dilation)
    module = make(3, 4, *sizes, bias=False, dataflow=flow).double()

    def dense_output(dense):
        return DENSE[dims](dense, module.weight, None, stride, padding, dilation)

    compare(module, x, dense_output)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("dims", [2, 3])
def test_inverse_equals_transposed_dense_at_the_old_sites(flow, dims):
    x = scene((9, 7, 8)[:dims])
    down = {2: spatial.SparseConv2d, 3: spatial.SparseConv3d}[dims]
    up = {2: spatial.SparseInverseConv2d, 3: spatial.SparseInverseConv3d}[dims]
    down = down(3, 5, 3, 2, 1, bias=False, indice_key="down").double()
    up = up(5, 4, 3, "down", bias=False, dataflow=flow).double()
    y = down(x)
    z = up(y)
    assert z.sites is x.sites
    dense = y.dense().detach().requires_grad_()
    transpose = {2: F.conv_transpose2d, 3: F.conv_transpose3d}[dims]
    extra = [s - (2 * (o - 1) + 1) for s, o in zip(x.spatial_shape, y.spatial_shape, strict=True)]
    full = transpose(dense, up.weight.transpose(0, 1), None, 2, 1, tuple(extra))
    sites = x.replace_feature(torch.ones_like(x.features[:, :1])).dense()
    torch.testing.assert_close(z.dense(), full * sites)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    density=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    kernel=st.tuples(*[st.sampled_from([1, 3])] * 3),
    flow=st.sampled_from(FLOWS),
    seed=st.integers(0, 99),
)
def test_any_grid_and_any_odd_kernel(shape, density, kernel, flow, seed):
    x = scene(shape, density=density, seed=seed)
    module = spatial.SubMConv3d(3, 2, kernel, dataflow=flow).double()
    y = module(x)
    padding = [k // 2 for k in kernel]
    dense = F.conv3d(x.dense(), module.weight, module.bias, padding=padding)
    places = tuple(x.indices.long().T)
    torch.testing.assert_close(y.features, dense.movedim(1, -1)[places])


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(*[st.integers(3, 7)] * 2),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(1, 1)),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    flow=st.sampled_from(FLOWS),
    seed=st.integers(0, 99),
)
def test_any_strided_convolution(shape, sizes, density, flow, seed):
    x = scene(shape, density=density, seed=seed)
    module = spatial.SparseConv2d(3, 2, *sizes, bias=False, dataflow=flow).double()
    dense = F.conv2d(x.dense(), module.weight, None, *sizes[1:])
    torch.testing.assert_close(module(x).dense(), dense)


def test_submanifold_does_not_dilate_and_strided_with_stride_one_does():
    indices = torch.tensor([[0, 3, 3, 3]])
    x = spatial.SparseTensor(torch.ones(1, 1), indices, (7, 7, 7), 1)
    for _ in range(3):
        x = spatial.SubMConv3d(1, 1, 3)(x)
    assert len(x.features) == 1
    assert len(spatial.SparseConv3d(1, 1, 3, padding=1)(x).features) == 27


def test_permuting_the_sites_permutes_the_outputs():
    x = scene()
    order = torch.randperm(len(x.features))
    y = spatial.SparseTensor(x.features[order], x.indices[order], x.spatial_shape, 2)
    module = spatial.SubMConv3d(3, 4, 3).double()
    torch.testing.assert_close(module(x).features[order], module(y).features)


def test_an_example_without_sites_stays_empty():
    indices = torch.tensor([[0, 1, 1], [2, 0, 1]])
    x = spatial.SparseTensor(torch.ones(2, 1), indices, (3, 3), 4)
    y = spatial.SparseConv2d(1, 2, 3, padding=1, bias=False)(x).dense()
    assert y.shape == (4, 2, 3, 3)
    assert not y[[1, 3]].any()
    assert y[[0, 2]].abs().sum() > 0


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close_to_single(flow, dtype):
    x = scene(channels=16, dtype=torch.float32)
    module = spatial.SubMConv3d(16, 8, 3, dataflow=flow)
    expected = module(x).features
    halved = module.to(dtype)(x.to(dtype)).features
    assert halved.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(halved.float(), expected, rtol=tolerance, atol=4 * tolerance)


def test_autocast_computes_in_half_precision():
    x = scene(channels=16, dtype=torch.float32)
    module = spatial.SubMConv3d(16, 8, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.features.dtype == torch.bfloat16
    y.features.float().sum().backward()
    assert module.weight.grad.dtype == torch.float32


def test_maps_are_made_once_for_all_layers_at_the_same_sites():
    x = scene()
    net = spatial.SparseSequential(
        spatial.SubMConv3d(3, 4, 3), torch.nn.ReLU(), spatial.SubMConv3d(4, 4, 3)
    ).double()
    y = net(x)
    assert y.sites is x.sites
    assert len(x.sites._submanifold) == 1


def test_pruned_offsets_are_skipped_and_change_nothing():
    x = scene()
    module = spatial.SubMConv3d(3, 4, 3).double().eval()
    module.weight.data[:, :, 0] = 0
    _, whole = module._kernel_map(x)
    less = module._without_empty_offsets(module.matrices(), whole)
    assert less.count < whole.count
    expected = F.conv3d(x.dense(), module.weight, module.bias, padding=1)
    places = tuple(x.indices.long().T)
    for flow in FLOWS:
        module.dataflow = flow
        torch.testing.assert_close(module(x).features, expected.movedim(1, -1)[places])


def test_the_input_matrix_times_the_weight_is_the_output():
    x = scene()
    for module in (spatial.SubMConv3d(3, 4, 3), spatial.SparseConv3d(3, 4, 3, 2, 1)):
        module = module.double()
        product = module.input_matrix(x) @ module.weight.flatten(1).T + module.bias
        torch.testing.assert_close(product, module(x).features)


def test_weights_of_spconv_are_read():
    x = scene(dtype=torch.float32)
    theirs = torch.randn(4, 3, 3, 3, 3)  # (out, *kernel, in)
    module = spatial.SubMConv3d(3, 4, 3, bias=False)
    module.weight.data = spatial.from_spconv(theirs)
    (row,) = [0]
    site = x.indices[row]
    expected = torch.zeros(4)
    for j, other in enumerate(x.indices):
        step = (other - site)[1:] + 1
        if other[0] == site[0] and bool(((step >= 0) & (step < 3)).all()):
            expected += theirs[:, step[0], step[1], step[2]] @ x.features[j]
    torch.testing.assert_close(module(x).features[row], expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: spatial.SubMConv3d(3, 4, 2), "has no centre; use odd sizes"),
        (lambda: spatial.SubMConv3d(3, 4, 3, stride=2), "submanifold convolution has stride 1"),
        (lambda: spatial.SparseConv3d(4, 4, 3, groups=2), "groups=2; sparse convolutions have one"),
        (lambda: spatial.SubMConv3d(4, 4, 3)(scene(dtype=torch.float32)), "3 channels for 4"),
        (
            lambda: spatial.SubMConv3d(3, 4, 3, dataflow="hash")(scene(dtype=torch.float32)),
            "dataflow='hash'; use gather_scatter, fused",
        ),
        (
            lambda: spatial.SparseInverseConv3d(3, 4, 3, "up")(scene(dtype=torch.float32)),
            r"indice_key='up' names no convolution that led here \(known: none\)",
        ),
        (
            lambda: spatial.SparseConv3d(3, 4, 9)(scene(dtype=torch.float32)),
            "does not fit sites",
        ),
    ],
)
def test_what_makes_no_convolution_is_one_clear_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()
