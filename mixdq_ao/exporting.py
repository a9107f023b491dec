"""``mixdq_ao.export``: a UNet as one file of machine code and weights, which runs without compiling anything."""

import contextlib
import inspect
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mixdq_ao import siblings
from mixdq_ao._version import __version__
from mixdq_ao.errors import CheckpointError, MixDQError, UnsupportedError
from mixdq_ao.files import regular_file, replacing
from mixdq_ao.model_file import config_of
from mixdq_ao.passes import FuseQuantizers, Passes
from mixdq_ao.tensor import MixDQTensor

# Under this key the package's metadata hold our facts, as JSON.
_KEY = "mixdq_ao"

_EXPORTED = "UNet2DConditionModel"

# What a package must share with the process that runs it: our operators are called by schema, torch by its C interface.
_VERSIONS = {"mixdq_ao": __version__, "torch": torch.__version__}


def export(
    model: nn.Module,
    path,
    example: dict | Callable[[], object],
    *,
    dynamic: bool = False,
    passes: Passes | None = None,
    options: dict | None = None,
) -> None:
    """Compile a UNet ahead of time into the file ``path`` (``.pt2``), whole or not at all; ``load_exported`` runs it.

    The file holds machine code for this kind of device, this torch and this version of mixdq_ao, and the weights as
    they are now: adapters that are active are compiled in. It is a program: load only files that you trust.

    Args:
        model: a ``UNet2DConditionModel``, quantized or not, on the device where it will run
        example: keyword arguments of one call of ``model``, or a function that makes such a call, say ``lambda:
            pipe("a fox", num_inference_steps=1)``; it is stopped there. Their batch, sizes and dtypes will be those of
            every call
        dynamic: take pictures of every height and width that the UNet takes as they are, instead of the example's alone
        passes: which rewrites to make; all by default
        options: Inductor's
    """
    model = getattr(model, "_orig_mod", model)
    if type(model).__name__ != _EXPORTED:
        raise UnsupportedError(
            f"export takes a {_EXPORTED}; found {type(model).__name__}. Use torch.export.export and "
            "torch._inductor.aoti_compile_and_package, which work for every quantized model"
        )
    if Path(path).suffix != ".pt2":
        raise UnsupportedError(f"an exported model's file must end in .pt2; found {str(path)!r}")
    args, kwargs = _recorded(model, example) if callable(example) else ((), example)
    arguments = _arguments(inspect.signature(type(model).forward), args, kwargs)
    tensors = _named_tensors(arguments)
    facts = {
        "versions": _VERSIONS,
        "config": config_of(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": arguments["sample"].device.type,
        "inputs": {name: _facts(tensor) for name, tensor in tensors.items()},
        "step": 2**model.num_upsamplers if dynamic else None,
    }
    for parameter in model.parameters():
        if isinstance(parameter, MixDQTensor):
            # diffusers reads it as one that wants a gradient, which torch.export would want of its codes.
            parameter.requires_grad_(False)
    with torch.no_grad():
        siblings.mark_shared(model)
        module = _OnTensors(model, arguments)
        program = _program(module, tensors, _sizes(facts["step"]) if dynamic else None, passes or Passes())
        metadata = {**(options or {}).get("aot_inductor.metadata", {}), _KEY: json.dumps(facts)}
        with replacing(path) as file, _dtypes_as_they_are_read():
            torch._inductor.aoti_compile_and_package(
                program, package_path=file, inductor_configs={**(options or {}), "aot_inductor.metadata": metadata}
            )


@contextlib.contextmanager
def _dtypes_as_they_are_read() -> Iterator[None]:
    """torch 2.11 writes an operator's dtype into the package by export's numbers and reads it by ATen's: float32 would
    become float64. 2.12 reads what it writes (pytorch#173562); what does is compiled, and shows nowhere in Python."""
    if torch.__version__ >= "2.12":
        yield
        return
    from torch._inductor import extern_node_serializer as module

    write, key = module.extern_node_json_serializer, "as_scalar_type"
    numbers = {13: 15, **{n: n - 1 for n in range(1, 13)}}  # 13 is bfloat16; up to bool only the start differs

    def renumbered(found: dict) -> dict:
        return {**found, key: numbers[found[key]]} if key in found else found

    def write_as_read(nodes: list) -> str:
        return json.dumps(json.loads(write(nodes), object_hook=renumbered))

    module.extern_node_json_serializer = write_as_read
    try:
        yield
    finally:
        module.extern_node_json_serializer = write


def load_exported(path) -> "ExportedModel":
    """Loads what :func:`export` wrote: ``pipe.unet = load_exported("unet.pt2")``, without the UNet's own weights.

    The file is a program, and loading runs it: load only files that you trust.
    """
    path = regular_file(path)
    try:
        package = torch._inductor.aoti_load_package(str(path))
        facts = json.loads(package.get_metadata()[_KEY])
    except (RuntimeError, KeyError) as error:
        advice = f"torch says: {str(error).strip()[:200]}"
        raise CheckpointError(
            path, "", "must be a file that mixdq_ao.export wrote on such a machine", "", advice
        ) from error
    if facts["versions"] != _VERSIONS:
        raise CheckpointError(
            path, "versions", f"must be {_VERSIONS}", str(facts["versions"]), "Export the model again."
        )
    return ExportedModel(package, facts)


# A package that is busy lets a second call wait without giving Python free, which operators in Python then wait for.
_TURN = threading.Lock()


class ExportedModel(nn.Module):
    """What :func:`load_exported` returns: called like the UNet, by a pipeline too, and with the UNet's ``config``.

    It has no parameters. Whatever else is asked of it, a UNet without values on the meta device answers.
    """

    def __init__(self, package, facts: dict):
        super().__init__()
        self._package, self._facts = package, facts
        from diffusers import UNet2DConditionModel

        self._signature = inspect.signature(UNet2DConditionModel.forward)
        with torch.device("meta"):
            # Not as a submodule, whose parameters would be this module's.
            self.__dict__["_skeleton"] = UNet2DConditionModel(**facts["config"])
        self.dtype, self.device = getattr(torch, facts["dtype"]), torch.device(facts["device"])

    def __getattr__(self, name: str):
        return getattr(self.__dict__["_skeleton"], name)

    def forward(self, *args, return_dict: bool = True, **kwargs):
        found = _named_tensors(_arguments(self._signature, args, kwargs))
        self._check(found)
        with _TURN:
            sample = self._package([found[name] for name in self._facts["inputs"]])
        if not return_dict:
            return (sample,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=sample)

    def _check(self, found: dict[str, Tensor]) -> None:
        """The package itself would read whatever it is given as if it fitted."""
        inputs, step = self._facts["inputs"], self._facts["step"]
        if found.keys() != inputs.keys():
            raise MixDQError(f"the exported model takes exactly {', '.join(inputs)}; found {', '.join(found)}")
        for name, tensor in found.items():
            given, wanted = _facts(tensor), inputs[name]
            if name == _SAMPLE and step is not None and len(given["shape"]) == 4:
                if any(size % step or size < 2 * step for size in given["shape"][2:]):
                    sizes = given["shape"][2:]
                    raise MixDQError(
                        f"{name}: height and width must be multiples of {step}, twice it at least; found {sizes}"
                    )
                wanted = {**wanted, "shape": wanted["shape"][:2] + given["shape"][2:]}
            if given != wanted:
                raise MixDQError(
                    f"{name} must be {wanted}, as in the exported example; found {given}. Export once more"
                )


_SAMPLE = "['sample']"


class _Recorded(Exception):
    """Ends the example once the arguments are known."""


def _recorded(model: nn.Module, example: Callable[[], object]) -> tuple[tuple, dict]:
    """The arguments of the first call of ``model`` in ``example``."""
    found = []

    def stop(module, args, kwargs):
        found.append((args, kwargs))
        raise _Recorded

    handle = model.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        # A compiled wrapper around the model would compile the hook.
        with torch.compiler.set_stance("force_eager"):
            example()
    except _Recorded:
        return found[0]
    finally:
        handle.remove()
    raise MixDQError("the function given as example did not call the model")


def _arguments(signature: inspect.Signature, args: tuple, kwargs: dict) -> dict:
    """The arguments of a call by name, without those that are None, and with the timestep as a tensor of one kind."""
    given = signature.bind(None, *args, **kwargs).arguments
    given = {name: v for name, v in given.items() if v is not None and name not in ("self", "return_dict")}
    # A UNet computes with float32 timesteps, and schedulers give integers and floats.
    given["timestep"] = torch.as_tensor(given["timestep"], dtype=torch.float32, device=given["sample"].device)
    return given


def _named_tensors(arguments: dict) -> dict[str, Tensor]:
    """Every tensor in nested arguments, by its place. Contiguous: the machine code asks for no strides."""
    tensors = {pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path(arguments)[0]}
    for name, leaf in tensors.items():
        if not (leaf is None or isinstance(leaf, Tensor)):
            raise UnsupportedError(f"an exported model takes tensors only; found {name} = {leaf!r}")
    return {name: leaf.contiguous() for name, leaf in tensors.items() if leaf is not None}


def _facts(tensor: Tensor) -> dict:
    """What the machine code relies on."""
    return {"dtype": str(tensor.dtype), "device": tensor.device.type, "shape": list(tensor.shape)}


class _OnTensors(nn.Module):
    """The model on a flat list of tensors, giving one: what an exported program has for a signature."""

    def __init__(self, model: nn.Module, arguments: dict):
        super().__init__()
        self.model = model
        position = iter(range(len(_named_tensors(arguments))))
        self.positions = pytree.tree_map(lambda leaf: None if leaf is None else next(position), arguments)

    def forward(self, tensors: list[Tensor]) -> Tensor:
        arguments = pytree.tree_map_only(int, lambda i: tensors[i], self.positions)
        return self.model(**arguments, return_dict=False)[0]


def _sizes(step: int) -> dict:
    """Height and width of a dynamic sample. Other sizes take another path through the UNet's code."""
    height, width = (torch.export.Dim(name, min=2, max=2**16) for name in ("height", "width"))
    return {2: step * height, 3: step * width}


def _program(module: nn.Module, tensors: dict[str, Tensor], sizes: dict | None, passes: Passes):
    """The program of ``module``, captured by Dynamo, since our passes read calls that torch.export takes apart."""
    values = list(tensors.values())
    shapes = None if sizes is None else {"tensors": [sizes if name == _SAMPLE else None for name in tensors]}
    captured, _ = torch._dynamo.export(
        module, aten_graph=False, dynamic_shapes=shapes, assume_static_by_default=True, tracing_mode="symbolic"
    )(values)
    graph = captured.graph
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in list(graph.nodes):
        if node.op == "get_attr" and node is not first:  # passes move layers up to the first that reads an input
            first.prepend(node)
    FuseQuantizers(passes)(graph)
    captured.recompile()
    return torch.export.export(captured, (values,), dynamic_shapes=shapes)
