"""Loading of causal vision-language models of transformers for rewards."""

from typing import Any

from diffalign.errors import UserError
from diffalign.rewards.checkpoints import check_complete, unloadable
from diffalign.rewards.place import Place


def model_of(name: str, source: str, place: Place) -> Any:
    """Return the frozen model of a folder or hub id, in evaluation mode.

    Raises:
        UserError: nothing there, the hub cannot be reached, weights are missing, or it is no causal model;
            ``name`` is the reward's.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    # the libraries raise many types for an absent, unreachable or unsuitable model
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source, dtype=getattr(torch, place.dtype), output_loading_info=True
        )
    except Exception as error:
        raise unloadable(name, f"the vision-language model of {source!r}", error, "instead") from error
    model, loading = loaded
    check_complete(name, source, "vision-language model", loading)
    if model.config.is_encoder_decoder:
        raise UserError(f"reward {name!r}: {source!r} encodes and decodes; needed is a causal model")
    return model.to(place.device).eval().requires_grad_(False)


def processor_of(name: str, source: str, side: str) -> Any:
    """Return the model's processor of PIL images, padding on the ``side``.

    Raises:
        UserError: nothing there, or it has no processor of images and texts.
    """
    from transformers import AutoImageProcessor, AutoProcessor

    try:
        processor: Any = AutoProcessor.from_pretrained(source)
        processor.tokenizer.padding_side = side
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        processor.image_processor = AutoImageProcessor.from_pretrained(source, backend="pil")
    except Exception as error:
        raise unloadable(name, f"the vision-language model of {source!r}", error, "instead") from error
    return processor


def adds_special_tokens(processor: Any, text: str) -> bool:
    """Return whether a tokenizer must add the special tokens to a text of the chat template: some templates
    have them.
    """
    bos = processor.tokenizer.bos_token
    return bos is None or not text.startswith(bos)
