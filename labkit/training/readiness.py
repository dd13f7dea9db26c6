"""Is everything there that a run needs? Asked once, before its first step and in it.

A run whose parameters are not part of the computation does not fail: the loss comes out, a number is shown at
each step, and nothing is learned. So before the first step every state is looked for in which that is so: an
adapter that is merged or switched off, gradients that are switched off. After the first backward pass the
gradients themselves are looked at. A gradient of zero is fine (LoRA's A has one at first, because B = 0);
none at all is not.

A model that is not causal sees the token that it is to predict, and learns to copy it. Whether it is causal
cannot be read off its class, so it is asked: does an earlier logit have a derivative by a later embedding?
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from labkit.data.batches import pack
from labkit.data.encoding import Encoded
from labkit.lora.mounting import adapters_of, mounted_adapter
from labkit.models.walk import is_a, own_name, unwrap
from labkit.training.config import TrainConfig
from labkit.training.control import TrainControl
from labkit.training.recompute import checkpoint_blocks, keep_blocks

PROBE = 8  # tokens that the question needs
SHOWN = 4  # names in a message


def check_arguments(model: object, tokenizer: object, config: object, control: object) -> None:
    """Raise a `ValueError` unless they are a model, a tokenizer, a `TrainConfig`, and a `TrainControl` or None."""
    if not isinstance(model, nn.Module):
        also = "; models.load returns two things: model, tokenizer = models.load(…)"
        raise ValueError(
            f"model is a {type(model).__name__}, and must be a model"
            + (also if isinstance(model, tuple) else "; load one with model, tokenizer = models.load(…)")
        )
    if not callable(tokenizer):
        raise ValueError(f"tokenizer={tokenizer!r} must be the model's tokenizer, as models.load returns it")
    if not isinstance(config, TrainConfig):
        also = ": TrainConfig(**config)" if isinstance(config, dict) else ""
        raise ValueError(f"config is a {type(config).__name__}, and must be a TrainConfig{also}")
    if control is not None and not isinstance(control, TrainControl):
        raise ValueError(f"control is a {type(control).__name__}, and must be a TrainControl, or None")


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `model` that require a gradient, by their own names.

    Raises:
        ValueError: there are none, or what trains would have no part in the output; says why.
    """
    check_mounted(model)
    check_not_merged(model)
    if not torch.is_grad_enabled():
        raise ValueError(
            "gradients are switched off here (torch.no_grad or torch.inference_mode); call train outside of it"
        )
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trained:
        also = (
            "; its adapters are frozen too, which quantize_model or requires_grad_(False) after add_lora may have done"
            if any(".lora_" in name for name, _ in model.named_parameters())
            else ""
        )
        raise ValueError(
            f"no parameter of the model requires a gradient{also}; call add_lora, or unfreeze some"
        )
    for name, p in model.named_parameters():
        if p.is_meta:
            raise ValueError(
                f"{name} is on the meta device: it has a shape, and no values to train or to use"
            )
        if p.is_inference():
            raise ValueError(
                f"{name} was made within torch.inference_mode, and cannot be differentiated; load the model outside of it"
            )
    own = {own_name(model, name): p for name, p in trained.items()}
    return own if len(own) == len(trained) else trained


def check_mounted(model: nn.Module) -> None:
    """Raise a `ValueError` if the model has an adapter, or a method beside LoRA, and none is switched on."""
    inner = unwrap(model)
    adapters, added = adapters_of(inner).by_name, getattr(inner, "added_method", None)
    if adapters and mounted_adapter(inner) is None:
        raise ValueError(
            f"the adapters of the model ({', '.join(adapters)}) are switched off, so none would train; leave "
            f"disabled(model), or call use_adapter(model, {next(iter(adapters))!r})"
        )
    if added is not None and not added.mounted:
        raise ValueError(
            f"{type(added.config).__name__.removesuffix('Config')} is switched off, so it would not train; call train "
            "outside of base_only(model)"
        )


def check_not_merged(model: nn.Module) -> None:
    """Raise a `ValueError` if an adapter, ours or PEFT's, is merged: its parameters do nothing then."""
    for path, module in model.named_modules():
        if getattr(module, "is_merged", False) is True:
            undo = "unmerge_ia3(model)" if is_a(module, "IA3Linear") else "unmerge(model)"
        elif is_a(module, "BaseTunerLayer") and module.merged:
            undo = "model.unmerge_adapter()"
        else:
            continue
        raise ValueError(
            f"the adapter is merged into the base ({own_name(model, path)}), so its parameters would not train; call "
            f"{undo} first"
        )


def check_causal(model: nn.Module, examples: list[Encoded], device: torch.device) -> None:
    """Raise a `ValueError` unless the model predicts each token from those before it.

    Args:
        model: any.
        examples: the longest is used, up to eight tokens of it.
        device: for the tokens.
    """
    inner, name = unwrap(model), type(unwrap(model)).__name__
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{name} has an encoder and a decoder; train teaches causal language models, which have a decoder alone"
        )
    try:
        has_logits = inner.get_output_embeddings() is not None
    except (AttributeError, NotImplementedError):
        has_logits = False
    if not has_logits:
        raise ValueError(
            f"{name} has no output layer over a vocabulary, so it predicts no token; load a causal language model "
            "(AutoModelForCausalLM)"
        )
    longest = max(examples, key=len)
    ids = torch.tensor([(longest.prompt + longest.completion)[:PROBE]], device=device)
    if ids.shape[1] > 1 and looks_ahead(inner, ids):
        raise ValueError(
            f"{name} is not causal: what it says at a token depends on later ones, so it would learn to copy the token "
            "that it is to predict. Load a causal language model; of BERT and its like, one with config.is_decoder=True"
        )


def looks_ahead(model: nn.Module, ids: Tensor) -> bool:
    """Does a logit before the last position depend on the last token of `ids`, (1, time)?

    Asked by the derivative by the embeddings, which a causal mask makes exactly zero in any dtype.
    """
    embedded: list[Tensor] = []

    def catch(_, __, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = model.get_input_embeddings().register_forward_hook(catch)
    try:
        with own_modes(model):
            model.eval()
            logits = model(input_ids=ids, use_cache=False).logits  # (1, time, vocab)
    finally:
        hook.remove()
    if not embedded or embedded[0].shape[:2] != ids.shape or not logits.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(logits[:, :-1].float().square().sum(), embedded[0], allow_unused=True)
    if gradient is None:
        return False
    size = gradient.float().abs().amax(dim=2)[0]  # (time,)
    return bool(size[-1] > 1e-6 * size.max())


@torch.no_grad()
def check_packs(model: nn.Module, examples: list[Encoded]) -> None:
    """Raise a `ValueError` unless an example in a packed row reads nothing of the one before it.

    transformers masks by the positions; a model with an attention of its own may not. So it is asked: a text must
    get the same logits behind another as by itself.
    """
    device = next(model.parameters()).device
    ids = [(one.prompt + one.completion)[:PROBE] for one in (examples[0], max(examples, key=len))]
    row = pack([Encoded(one, []) for one in ids]).to(device)
    with own_modes(model):
        model.eval()
        behind = model(**row.inputs(), use_cache=False).logits[0, len(ids[0]) :].float()
        alone = model(input_ids=torch.tensor([ids[1]], device=device), use_cache=False).logits[0].float()
    if (behind - alone).abs().max() > 0.02 * alone.abs().max():
        raise ValueError(
            f"{type(unwrap(model)).__name__} reads from one example of a packed row into the next, so it cannot be "
            "trained with batching='packed'; use 'similar'"
        )


@contextmanager
def own_modes(model: nn.Module) -> Iterator[None]:
    """After the block each module is in the mode, training or not, that it was in before."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def training_mode(model: nn.Module, checkpointing: bool) -> Iterator[None]:
    """Within the block, `model` is in training mode, with gradient checkpointing if `checkpointing`.

    Afterwards every module is in the mode that it was in before.
    """
    switched = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    before = [(module, module.gradient_checkpointing) for module in switched]
    with own_modes(model):
        model.train()
        if checkpointing:
            checkpoint_blocks(model)
        try:
            yield
        finally:
            if checkpointing:
                keep_blocks(model)
                for module, was in before:
                    module.gradient_checkpointing = was


def not_in_graph(names: list[str]) -> ValueError:
    """The error about parameters that are no part of the computation."""
    return ValueError(
        f"none of the {len(names)} parameters that train has a part in the loss ({shown(names)}), so nothing would be "
        "learned: the forward pass does not call their modules, an adapter of another library is switched off, or "
        "something on the way to the loss detaches. The model is unchanged"
    )


def shown(names: list[str]) -> str:
    """A list of names for a message, the first few of them."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
