"""What weights are multiplied with, whoever does it: seen in the operations as they run.

A hook sees what a module is called with. Weights that somebody else's forward uses
(``F.linear(x, self.qkv.weight)``), one expert of a stack, the gates of an LSTM, a convolution that
pads by itself are seen here instead, as the other factor of a product.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from prunus.calibration.weight_places import Copy, Place, is_order
from prunus.core.layers import Layer
from prunus.core.patches import patches

aten = torch.ops.aten
Sink = Callable[[Layer, Tensor, Callable[[Tensor], Tensor] | None], None]
"""called with a layer, the factor, and how that becomes (samples, columns) if it is not that"""

_FACTORS: dict[Any, tuple[int, int]] = {
    aten.mm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
    aten.mv.default: (0, 1),
    aten.addmv.default: (1, 2),
}
_COPIES = (aten._to_copy.default, aten.clone.default)


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows for each layer what its weight is multiplied with, while it is on.

    Raises ValueError for a layer whose rows are multiplied with different things.
    """

    def __init__(self, layers: Iterable[Layer], sink: Sink) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sink = sink
        self.convolutions: dict[int, list[Layer]] = {}
        self.places: dict[int, list[Place]] = {}
        for layer in layers:
            pointer = layer.local.untyped_storage().data_ptr()
            if layer.is_convolution:
                self.convolutions.setdefault(pointer, []).append(layer)
            else:
                self.places.setdefault(pointer, []).append(Place.of(layer))
        self.copies: dict[int, Copy] = {}
        self.picked: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=2)

    def forget(self) -> None:
        """Of copies that were made of weights; between batches."""
        self.copies.clear()
        self.picked.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # composite operations come whole then
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        self._see(func, args, kwargs)
        result = func(*args, **kwargs)
        if func in _COPIES:
            self._copied(args[0], result)
        elif func is aten.index.Tensor:
            self._picked_entries(args[0], args[1], result)
        return result

    def _see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if func in _FACTORS:
            left, right = (args[i] for i in _FACTORS[func])
            self._product(left, right)
        elif func is aten.linear.default:
            self._product(args[0].flatten(0, -2), args[1].mT)
        elif func is aten.convolution.default:
            self._convolution(*args)
        elif func is aten._trilinear.default:
            self._bilinear(args[0], args[1], args[2])
        elif "grouped_mm" in str(func):
            self._grouped(args[0], args[1], kwargs["offs"] if "offs" in kwargs else args[2])

    def _copied(self, source: Tensor, made: Tensor) -> None:
        """A copy in another precision, as autocast makes them, is the weight itself."""
        pointer = source.untyped_storage().data_ptr()
        if pointer in self.places or pointer in self.convolutions:
            self.copies[made.untyped_storage().data_ptr()] = Copy(
                made, pointer, int(source.storage_offset()), source.stride()
            )

    def _picked_entries(self, source: Tensor, indices: Any, made: Tensor) -> None:
        """``stack[numbers]`` of a stack of experts, one entry for each sample."""
        alone = len(indices) == 1 and isinstance(indices[0], Tensor) and indices[0].dim() == 1
        known = alone and source.dim() == 3 and bool(self._where(source)[0])
        if known and source[0].is_contiguous() and made.is_contiguous():
            self.picked.append((made, source, indices[0]))

    def _where(self, t: Tensor) -> tuple[list[Place], int]:
        """The places in the memory of a tensor, and where in that memory it begins."""
        if not isinstance(t, Tensor) or t.device.type == "meta" or t.layout != torch.strided:
            return [], 0
        pointer, offset = t.untyped_storage().data_ptr(), int(t.storage_offset())
        copy = self.copies.get(pointer)
        if copy is not None and copy.laid_out_alike:
            pointer, offset = copy.pointer, offset + copy.begin - int(copy.made.storage_offset())
        return self.places.get(pointer, []), offset

    def _is_watched(self, t: Tensor) -> bool:
        pointer = t.untyped_storage().data_ptr()
        return pointer in self.places or pointer in self.copies

    def _show(self, x: Tensor, w: Tensor) -> None:
        """``x`` (samples, k) is multiplied with ``w`` (k, outputs)."""
        copy = self.copies.get(w.untyped_storage().data_ptr())
        if copy is not None and not copy.laid_out_alike:
            self._show_rearranged(x, w, copy)
            return
        places, offset = self._where(w)
        for place in places:
            inside = place.is_in(offset, w.shape, w.stride())
            if inside is None:
                raise ValueError(
                    f"{place.layer.name}: only some of its rows are multiplied with this input, "
                    "so the layer as a whole has no inputs; name its parts, such as "
                    f"{place.layer.name}[q], exclude it, or use a pruner that needs no inputs"
                )
            if inside:
                self.sink(place.layer, x.detach(), None)

    def _show_rearranged(self, x: Tensor, w: Tensor, copy: Copy) -> None:
        """``w`` is from a copy with other axes first, as `torch.einsum` makes them."""
        for place in self.places.get(copy.pointer, ()):
            k, n = (copy.origins(w, axis) for axis in (0, 1))
            begin = int(k[0]) - place.offset
            columns = (k - k[0] + begin % place.row_stride) // place.column_stride
            rows = (n - n[0] + begin - begin % place.row_stride) // place.row_stride
            if is_order(columns, place.columns) and is_order(rows, place.rows):
                order = columns.argsort().to(x.device)
                self.sink(place.layer, x.detach()[:, order], None)

    def _product(self, left: Tensor, right: Tensor) -> None:
        if right.dim() == 1:  # matrix times vector
            self._show(right.unsqueeze(0), left.mT)
            return
        if left.dim() == 2:
            self._show(left, right)
            self._show(right.mT, left.mT)
            return
        for x, w in ((left, right), (right.mT, left.mT)):
            self._batched(x, w)

    def _batched(self, x: Tensor, w: Tensor) -> None:
        """``x`` (batch, samples, k), ``w`` (batch, k, outputs)."""
        for made, source, numbers in self.picked:
            if _same_memory(made, w) and made.shape[0] == w.shape[0] == len(numbers):
                for i in torch.unique(numbers).tolist():
                    # the same view of the stack's entry as `w` has of the copies of entries
                    offset = source[i].storage_offset()
                    entry = source.as_strided(w.shape[1:], w.stride()[1:], offset)
                    self._show(x[numbers == i].flatten(0, 1), entry)
                return
        if not self._is_watched(w):
            return
        if w.stride(0) == 0 or len(w) == 1:
            self._show(x.flatten(0, 1), w[0])
            return
        for i in range(len(w)):
            self._show(x[i], w[i])

    def _grouped(self, x: Tensor, w: Tensor, offsets: Tensor | None) -> None:
        """``x`` (samples, k), ``w`` (experts, k, outputs), and where each expert's samples end."""
        if offsets is None or x.dim() != 2 or w.dim() != 3 or not self._where(w)[0]:
            return
        begin = 0
        for i, end in enumerate(offsets.tolist()):
            if end > begin:
                self._show(x[begin:end], w[i])
            begin = end

    def _bilinear(self, first: Tensor, weight: Tensor, second: Tensor) -> None:
        places, _ = self._where(weight)
        for place in places:
            a, b = (t.detach().reshape(-1, t.shape[-1]) for t in (first, second))
            pairs = (a.unsqueeze(2) * b.unsqueeze(1)).flatten(1)
            self.sink(place.layer, pairs, None)

    def _convolution(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Any,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        output_padding: Any,
        groups: int,
    ) -> None:
        pointer = weight.untyped_storage().data_ptr()
        if pointer in self.copies:
            pointer = self.copies[pointer].pointer
        form = tuple(weight.shape[2:]), stride, padding, dilation
        for layer in self.convolutions.get(pointer, ()):
            number = 0 if layer.piece is None else layer.piece.number
            begin, end = number * weight.shape[1], (number + 1) * weight.shape[1]

            def read(x: Tensor, layer: Layer = layer, begin: int = begin, end: int = end) -> Tensor:
                return layer.channels_last(patches(x[:, begin:end], *form))

            self.sink(layer, x.detach(), read)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@contextlib.contextmanager
def products(layers: Sequence[Layer], sink: Sink) -> Iterator[Callable[[], None]]:
    """With every product of these layers' weights shown to the sink.

    Yields what is to be called between batches. Kernels that compute several products at once, as
    those for attention and recurrent layers, are off meanwhile.
    """
    if not layers:
        yield lambda: None
        return
    recurrent = any(isinstance(layer.module, nn.RNNBase) for layer in layers)
    fused = torch.backends.mha.get_fastpath_enabled()
    mode = Products(layers, sink)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fused)
        torch.backends.mha.set_fastpath_enabled(False)
        if recurrent:
            stack.callback(torch.backends.mkldnn.set_flags, torch.backends.mkldnn.enabled)
            torch.backends.mkldnn.set_flags(False)  # type: ignore[no-untyped-call]
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(mode)
        yield mode.forget
