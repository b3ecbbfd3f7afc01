"""What lies around a user's model: DDP, torch.compile and FSDP2, in names and in modules."""

from __future__ import annotations

from torch import Tensor, nn

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def clean_name(name: str) -> str:
    """The name, in an `unwrap`ped model, without what wrappers inside it put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def is_sharded(t: Tensor) -> bool:
    """Whether ranks hold parts of it (FSDP2's DTensors)."""
    return hasattr(t, "to_local")


def reshard(model: nn.Module) -> None:
    """Drop the gathered copies that FSDP2 keeps after a forward pass without a backward.

    Else a module shows the copy in place of its parameter, and computes with it whatever is
    written to the parameter.
    """
    for module in model.modules():
        # by name, because the import takes long and has moved between versions of torch
        if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
            module.reshard()  # type: ignore[operator]


def clean_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by clean name, tied ones under each of their names."""
    reshard(model)
    named = unwrap(model).named_parameters(remove_duplicate=False)
    return {clean_name(name): p for name, p in named}


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside DDP and torch.compile wrappers."""
    for attribute in ("_orig_mod", "module"):
        inner = model._modules.get(attribute)
        if inner is not None and len(model._modules) == 1:
            return unwrap(inner)
    return model
