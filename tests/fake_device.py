"""A device that is not there: its tensors compute on the CPU, say that they are elsewhere, and insist on it.

    with pretend("mps"):
        call(train, "--device", "mps")

FakeTensorMode of torch does the like, but it knows no MPS, asks a real driver as soon as a gradient is taken, and has
no numbers, on which our commands depend everywhere. Here whole commands run, to their real results. What is raised is
what the device itself would raise:

- RuntimeError where an operation gets tensors of two devices. (Allowed, as on a GPU: numbers in CPU tensors without
  dimensions, CPU indices into a tensor on the device, and copying.)
- RuntimeError for random numbers on one device from the generator of another.
- TypeError for a float64 on MPS, which has none.
- NotImplementedError for what is known to be missing on MPS.
- TypeError for numpy() without cpu().

Two calls of tensors move: `to` and `cpu`; and all functions with `device=` make what they make there. pin_memory hands
back what it is given, where CUDA would. Not pretended are the device's own ways, how it rounds for one, and that it is
asynchronous.
"""
import contextlib
from unittest import mock

import torch
import torch._dynamo  # which an optimizer imports, and which must not see the pretended devices
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing

CPU = torch.device("cpu")
# Of the operations that the commands use, as of torch 2.14, by the list of its kernels, native_functions.yaml.
MISSING_ON_MPS = {"aten::special_log_ndtr"}
aten = torch.ops.aten


def each(change, x):
    """x with each tensor changed, in lists and tuples too."""
    if isinstance(x, torch.Tensor):
        return change(x)
    return type(x)(each(change, inside) for inside in x) if isinstance(x, (list, tuple)) else x


class Elsewhere(torch.Tensor):
    """A tensor on the pretended device; `numbers` is the one on the CPU that it stands for."""
    home = None  # the pretended device, while there is one
    autocast = None  # the device whose autocast is on
    used = set()  # (operation, type of its result) of all that was done there
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers):
        if numbers.dtype == torch.float64 and cls.home.type == "mps":
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        # For autograd and autocast, in C++, it is on the CPU, where they need no driver.
        x = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, strides=numbers.stride(), dtype=numbers.dtype,
                                                storage_offset=numbers.storage_offset(), device=CPU)
        x.numbers = numbers
        return x

    @property
    def device(self):
        return self.home

    def __repr__(self, **_):
        return f"{self.home}: {self.numbers}"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """Every operation on at least one tensor from here."""
        kwargs = kwargs or {}
        there = []  # tensors from elsewhere than home

        def real(x):
            if isinstance(x, cls):
                return x.numbers
            there.append(x)
            return x

        real_args = each(real, args)
        real_kwargs = {key: each(real, value) for key, value in kwargs.items()}
        name = function._schema.name
        if cls.autocast not in (None, cls.home.type):
            raise RuntimeError(f"autocast of {cls.autocast} does nothing for {name} on {cls.home}")
        if cls.home.type == "mps" and name in MISSING_ON_MPS:
            raise NotImplementedError(f"The operator '{name}' is not currently implemented for the MPS device")
        index = name in ("aten::index", "aten::index_put", "aten::index_put_") and isinstance(args[0], cls)
        if any(x.ndim for x in there) and not index and function is not aten.copy_.default:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {cls.home} and cpu in {name}")
        if function is aten.copy_.default and not isinstance(args[0], cls):
            return args[0].copy_(real_args[1])
        made = each(cls, function(*real_args, **real_kwargs))
        each(lambda x: cls.used.add((name, x.dtype)), made)
        return return_and_correct_aliasing(function, args, kwargs, made)


class Generator(torch.Generator):
    """A generator that remembers which device it is of; its numbers are the CPU's."""

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls)
        generator.home = torch.device(device)
        return generator

    def __init__(self, device="cpu"):
        super().__init__()


class Pretend(TorchFunctionMode):
    """Sees every call of torch before the tensors do: what moves, and what is made with device=."""

    def __init__(self, home):
        super().__init__()
        self.home = home

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.to:
            device, dtype, _, memory_format = torch._C._nn._parse_to(*args[1:], **kwargs)
            return self.move(args[0], device or args[0].device, dtype, memory_format)
        if function is torch.Tensor.cpu:
            return self.move(args[0], CPU)
        if function is torch.Tensor.pin_memory:
            if self.home.type != "cuda" or isinstance(args[0], Elsewhere):
                raise RuntimeError(f"only CPU tensors can be pinned, and only where there is CUDA, not {self.home}")
            return args[0]
        if args and isinstance(args[0], Elsewhere):
            if function is torch.Tensor.tolist:
                return args[0].numbers.tolist()
            if function in (torch.Tensor.numpy, torch.Tensor.__array__):
                raise TypeError(f"can't convert {self.home} device type tensor to numpy. Use Tensor.cpu() first")
        device = kwargs.get("device")
        device = torch.device(device) if device is not None else args[0].device if args and isinstance(
            args[0], torch.Tensor) else CPU
        generator = kwargs.get("generator")
        if generator is not None and getattr(generator, "home", CPU).type != device.type:
            raise RuntimeError(f"Expected a '{device}' device type for generator but found '{generator.home}'")
        if "device" in kwargs and device.type == self.home.type:
            made = function(*args, **kwargs | {"device": CPU})
            return made if isinstance(made, Elsewhere) else Elsewhere(made)
        return function(*args, **kwargs)

    def move(self, x, device, dtype=None, memory_format=None):
        """x.to(...) of a tensor to this device, from it, or neither."""
        how = {} if memory_format is None else {"memory_format": memory_format}
        if device.type == x.device.type:
            return x.to(dtype=dtype or x.dtype, **how)
        if torch.is_grad_enabled() and x.requires_grad:
            raise NotImplementedError("gradients from device to device are not pretended")
        x = x.detach()
        if isinstance(x, Elsewhere):
            return x.numbers.to(device, dtype or x.dtype, copy=True, **how)
        if device.type != self.home.type:
            return x.to(device, dtype or x.dtype, **how)
        return Elsewhere(x.to(CPU, dtype or x.dtype, copy=True, **how))


@contextlib.contextmanager
def pretend(name):
    """Context in which torch finds the device `name`, "cuda" or "mps", and can use it. Yields its torch.device."""
    home = torch.device(name)
    autocast = torch.autocast

    @contextlib.contextmanager
    def autocast_there(device_type, *args, **kwargs):
        with mock.patch.object(Elsewhere, "autocast", device_type), autocast("cpu", *args, **kwargs):
            yield

    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to makes new parameters
    try:
        with mock.patch.object(Elsewhere, "home", home), mock.patch.object(torch, "Generator", Generator), \
                mock.patch.object(torch, "autocast", autocast_there), \
                mock.patch.object(torch.cuda, "is_available", lambda: name == "cuda"), \
                mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False), \
                mock.patch.object(torch.accelerator, "current_accelerator", lambda *args, **kwargs: None), \
                mock.patch.object(torch.cuda, "is_bf16_supported", lambda including_emulation=True: name == "cuda"), \
                mock.patch.object(torch.backends.mps, "is_available", lambda: name == "mps"), Pretend(home):
            yield home
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
