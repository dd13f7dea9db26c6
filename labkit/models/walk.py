"""One walk over a model: its layers through every wrapper, under all their names, and what was left out.

Other code stands around a model or a layer and renames what is in it: `torch.compile`, data parallelism,
PEFT, our own adapters. Wherever such a module stands, it *stands in* for one child of its own, and `STANDS_IN`
says which. The walk goes through to that child and passes the rest of the wrapper over, since that is an
adapter or a bookkeeper and no part of the model:

    _orig_mod.model.layers.0.mlp.base.down_proj     the path, for `get_submodule`
    model.layers.0.mlp.down_proj                    its own name, as the innermost model has it

Whatever changes "every layer" of a model walks it here, chooses by `Layer.kind`, and tells with `left_out` and
`describe` what it did not reach, in bytes.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

# by the name of a class, which spares importing libraries that may not be there: the child it stands in for
STANDS_IN = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "AveragedModel": "module",
    "PeftModel": "base_model",
    "PeftMixedModel": "base_model",
    "BaseTuner": "model",  # PEFT's LoraModel and its like
    "BaseTunerLayer": "base_layer",
    "AdaptionPromptModel": "model",
    "AdaptedAttention": "model",
    "AuxiliaryTrainingWrapper": "original_module",  # PEFT's modules_to_save
    "StandIn": "base",  # ours: see `labkit.models.stand_in`
}
OF_PEFT = ("BaseTunerLayer", "AuxiliaryTrainingWrapper", "BasePromptEncoder", "AdaptedAttention")
ADDED = ("VirtualTokens",)  # children that a method has added to a model, in place of nothing
AROUND = ("QATLinear",)  # these stay where they are when what they stand in for is exchanged
EMBEDDING, LINEAR, SUBCLASS, CONV1D, PACKED, EXPERTS, ATTENTION, OTHER = KINDS = (
    "embedding",
    "linear",  # nn.Linear itself
    "subclass of linear",  # its forward pass, or whoever reads its weight, may want something else of it
    "conv1d",  # transformers' linear layer with a transposed weight
    "packed linear",  # the weight is in bytes: ours in 4 bits, or another library's
    "fused experts",  # one weight of three dimensions for all experts of a block
    "fused attention",  # PyTorch's, whose queries, keys and values have one weight and are no layers
    "other",
)


@dataclass
class Layer:
    """A module with weights of its own, wherever it is in a model.

    Attributes:
        module: the layer, with what stands in for it taken off.
        kind: one of `KINDS`.
        names: its own names, as the innermost model has them; several where one module is in several places.
        paths: where it stands in the model that was walked, one for each name: what `get_submodule` takes.
            A wrapper of the layer, such as a `LoRALinear`, is what is found there.
        is_output: does it make the logits (`lm_head`)?
    """

    module: nn.Module
    kind: str
    names: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    is_output: bool = False

    @property
    def name(self) -> str:
        """The first of its own names."""
        return self.names[0]

    @property
    def tensors(self) -> list[Tensor]:
        """Its own parameters and buffers; of a packed layer, those that hold the weight."""
        packed = self.module.buffers(recurse=False) if self.kind == PACKED else ()
        return [*self.module.parameters(recurse=False), *packed]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def is_a(module: nn.Module, name: str) -> bool:
    """Is `module` of a class of this name, or of a subclass of one?"""
    return any(base.__name__ == name for base in type(module).__mro__)


def stood_in_for(module: nn.Module) -> str | None:
    """The name of the child that `module` stands in for; None if it is no wrapper."""
    for base in type(module).__mro__:
        child = STANDS_IN.get(base.__name__)
        if child is not None and isinstance(module._modules.get(child), nn.Module):
            return child
    return None


def unwrap(module: nn.Module) -> nn.Module:
    """The innermost model, or layer: whatever stands in for it is taken off."""
    while (child := stood_in_for(module)) is not None:
        module = module._modules[child]
    return module


def own_name(model: nn.Module, path: str) -> str:
    """The name that the innermost model gives to what is at `path` in `model`: a module or a parameter.

    >>> own_name(nn.DataParallel(nn.Sequential(nn.Linear(2, 2))), "module.0.weight")
    '0.weight'
    """
    module: nn.Module | None = model
    parts = []
    for part in path.split(".") if path else ():
        if module is None or part != stood_in_for(module):
            parts.append(part)
        module = None if module is None else module._modules.get(part)
    return ".".join(parts)


def path_of(model: nn.Module, name: str) -> str:
    """Where in `model` the module stands whose own name is `name`, for `get_submodule`: `own_name` undone.

    What is found there may be a wrapper of it.

    Raises:
        KeyError: there is none.
    """
    module, parts = model, []
    for part in name.split(".") if name else ():
        while (child := stood_in_for(module)) is not None:
            module = module._modules[child]
            parts.append(child)
        if module._modules.get(part) is None:
            raise KeyError(f"{type(model).__name__} has no module {name}")
        module = module._modules[part]
        parts.append(part)
    while any(is_a(module, name) for name in AROUND):
        child = stood_in_for(module)
        module = module._modules[child]
        parts.append(child)
    return ".".join(parts)


def places(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """(own name, path, module) of every place in `model`, in the order of the model, wrappers taken off.

    A module that is in several places comes several times; adapters, no part of the model, never.
    """

    def visit(module: nn.Module, name: str, path: str, above: tuple[nn.Module, ...]):
        standing = path
        while (child := stood_in_for(module)) is not None:
            module, path = module._modules[child], f"{path}.{child}".lstrip(".")
        if any(module is one for one in above):  # a model may hold a part that holds the model
            return
        yield name, standing, module
        for part, inside in module._modules.items():
            if inside is not None and not any(is_a(inside, added) for added in ADDED):
                yield from visit(
                    inside, f"{name}.{part}".lstrip("."), f"{path}.{part}".lstrip("."), (*above, module)
                )

    return visit(model, "", "", ())


def walk(model: nn.Module) -> list[Layer]:
    """Every module of `model` with weights of its own, once, in the order of the model.

    Adapters are no part of the model: of an adapted layer the walk gives the layer.
    """
    found: dict[int, Layer] = {}
    outputs = {id(module) for module in output_layers(model)}
    for name, path, module in places(model):
        kind = kind_of(module)
        if kind != OTHER or next(module.parameters(recurse=False), None) is not None:
            layer = found.setdefault(id(module), Layer(module, kind, is_output=id(module) in outputs))
            layer.names.append(name)
            layer.paths.append(path)
    return list(found.values())


def kind_of(module: nn.Module) -> str:
    """Which of `KINDS` a module is, whatever stands in for it taken off."""
    module = unwrap(module)
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    if is_a(module, "QuantLinear") or (isinstance(module, nn.Linear) and is_packed(module)):
        return PACKED
    if isinstance(module, nn.Linear):
        return LINEAR if type(module) is nn.Linear else SUBCLASS
    if is_a(module, "Conv1D"):
        return CONV1D
    if isinstance(module, nn.MultiheadAttention):
        return ATTENTION
    own = module.parameters(recurse=False)
    is_torchs = type(module).__module__.startswith("torch.nn")  # its convolutions have three dimensions too
    return EXPERTS if not is_torchs and any(p.dim() == 3 and len(p) > 1 for p in own) else OTHER


def is_packed(linear: nn.Linear) -> bool:
    """Is the weight not one whole number for each input and output? Bytes may be stored under a floating dtype."""
    weight = linear._parameters.get("weight")  # to read one that is computed (spectral norm) may change it
    if weight is None or nn.parameter.is_lazy(weight):
        return False
    # floating numbers of one byte have scales beside them
    whole = weight.is_floating_point() and weight.dtype.itemsize > 1
    return not whole or weight.shape != (linear.out_features, linear.in_features)


def output_layers(model: nn.Module) -> list[nn.Module]:
    """The layer that makes logits (`lm_head`), without wrappers; of the models inside, if `model` knows of none."""
    top, found = unwrap(model), {}
    for module in (top, *top.modules()):
        get = None if stood_in_for(module) else getattr(module, "get_output_embeddings", None)
        try:
            output = get() if callable(get) else None
        except (AttributeError, NotImplementedError):  # a backbone of transformers may have none to give
            continue
        if isinstance(output, nn.Module):
            if module is top:
                return [unwrap(output)]
            found[id(output)] = unwrap(output)
    return list(found.values())


def adapters_in(model: nn.Module) -> list[str]:
    """What adapters `model` carries, of ours or of PEFT, mounted or put aside: for messages; [] if none.

    The question to ask before an operation that freezes, replaces or counts all the weights of a model.
    """
    found: dict[str, None] = {}
    for module in model.modules():
        aside = module.__dict__.get("lora_adapters")  # see `labkit.lora.mounting`
        method = module.__dict__.get("added_method")  # see `labkit.alternatives.methods`
        if is_a(module, "LoRALinear") or (aside is not None and aside.by_name):
            found["LoRA"] = None
        if is_a(module, "BatchedLinear"):  # see `labkit.serving.batched`
            found["adapters of a bank"] = None
        if method is not None:
            found[type(method.config).__name__.removesuffix("Config")] = None
        if any(is_a(module, name) for name in OF_PEFT):
            found["PEFT's adapters"] = None
    return list(found)


def left_out(model: nn.Module, reached: Collection[str]) -> list[Layer]:
    """The layers of `model` that are not among `reached`, by any of their own names."""
    return [layer for layer in walk(model) if not any(name in reached for name in layer.names)]


def total_bytes(layers: Iterable[Layer]) -> int:
    """Bytes of the weights of `layers`, a weight that several share counted once."""
    return sum({id(tensor): tensor.nbytes for layer in layers for tensor in layer.tensors}.values())


def describe(layers: Iterable[Layer]) -> str:
    """One line that says what `layers` are: number and bytes of each kind, with the first name of each.

    >>> describe(walk(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(9, 4))))
    '2 x linear (160 bytes: 0, …), 1 x embedding (144 bytes: 2)'
    """
    kinds: dict[str, list[Layer]] = {}
    for layer in layers:
        kinds.setdefault("output layer" if layer.is_output else layer.kind, []).append(layer)
    parts = sorted(kinds.items(), key=lambda item: -total_bytes(item[1]))
    return ", ".join(
        f"{len(group)} x {kind} ({total_bytes(group):,} bytes: {group[0].name}{', …' * (len(group) > 1)})"
        for kind, group in parts
    )
