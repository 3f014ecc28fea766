"""torch's private names, each once. A version that has one no more is served the plain way, and never an error.

What reads one reads it here, where it may be None.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

FAKE_TENSORS = "torch._subclasses.fake_tensor"


def find(path: str, module: str = "torch") -> Any:
    """Return the object with a dotted name in a module, or None where this version has no such name.

    Example:
        >>> find("_C._has_been_renamed") is None
        True
    """
    try:
        value: Any = importlib.import_module(module)
    except ImportError:
        return None
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


_transforms = find("_C._functorch.peek_interpreter_stack")  # () → the innermost of vmap, grad and jvp, or None
_modes = find("_C._len_torch_dispatch_stack")  # () → how many modes see this thread's operations
_is_wrapped = find("_C._functorch.is_functorch_wrapped_tensor")  # by vmap, grad or jvp
_is_of_several = find("_C._functorch.is_legacy_batchedtensor")  # several gradients at once
_is_zero = find("Tensor._is_zerotensor")  # zeros without memory
_forward_ad = find("autograd.forward_ad")
_graph_task = find("_C._current_graph_task_id")  # () → of the backward pass that this thread is in, or -1
_global_hooks = find("_global_forward_hooks", "torch.nn.modules.module")  # which see the output of every module
_FakeTensor, _FakeTensorMode = find("FakeTensor", FAKE_TENSORS), find("FakeTensorMode", FAKE_TENSORS)


def hides_memory(*tensors: Tensor) -> bool:
    """Return whether a mode, transform or subclass hides the tensors' memory; True where this version cannot tell."""
    if None in (_transforms, _modes, _is_wrapped, _is_of_several, _is_zero):
        return True
    if _transforms() is not None or _modes() or getattr(_forward_ad, "_current_level", 0) >= 0:
        return True
    return any(map(_is_zero, tensors)) or any(map(_is_wrapped, tensors)) or any(map(_is_of_several, tensors))


def hooked_everywhere() -> bool:
    """Return whether a hook sees the outputs of all modules; True where this version does not tell."""
    return _global_hooks is None or bool(_global_hooks)


def in_backward() -> bool:
    """Return whether a backward pass is running; False where this version cannot tell."""
    return _graph_task is not None and _graph_task() != -1


def is_fake(value: Any) -> bool:
    """Return whether a value is a fake tensor, which an export or a trace uses instead of a real one."""
    return _FakeTensor is not None and isinstance(value, _FakeTensor)


def has_numbers(x: Tensor) -> bool:
    """Return whether a tensor has numbers, and not only a shape."""
    return not (x.is_meta or is_fake(x))


def fake_mode() -> AbstractContextManager[Any]:
    """Return a context in which new tensors are fake, beside real ones.

    Raises:
        RuntimeError: this version of torch has none.
    """
    if _FakeTensorMode is None:
        raise RuntimeError(f"torch {torch.__version__} has no FakeTensorMode")
    return _FakeTensorMode(allow_non_fake_inputs=True)


def cpp_builder() -> Any:
    """Return the builder of C++ that torch.compile uses; it is imported at the first use.

    Raises:
        RuntimeError: this version of torch has none.
    """
    builder = find("CppPythonBindingsCodeCache", "torch._inductor.codecache")
    if builder is None:
        raise RuntimeError(f"torch {torch.__version__} has no CppPythonBindingsCodeCache")
    return builder
