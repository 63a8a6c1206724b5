"""The networks of FID and LPIPS, from torchmetrics (the extra ``metrics``), and their published weights.

FID takes the 2048 features of the Inception network of the original implementation (torch-fidelity's
conversion), LPIPS the AlexNet of torchvision with the linear layers that torchmetrics ships. The weights lie
at their projects' addresses, not on the hub: they are downloaded into torch's own cache when first used.
"""

import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from diffalign.errors import UserError

LpipsNetwork = Callable[[Tensor, Tensor], Tensor]
"""Distances (N,) of two batches of images (N, 3, H, W) in [0, 1]."""


def load_inception(device: str) -> nn.Module:
    """Return the network of FID: images (N, 3, H, W) of uint8, of any size, to features (N, 2048).

    Images are resized to 299 x 299 pixels with antialiasing, whole and without regard to their proportions.

    Raises:
        UserError: torchmetrics or torch-fidelity is not installed, or the weights are not here and cannot be
            fetched.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise _not_installed("FID", error) from error
    ensure_weights("FID", URL_INCEPTION_V3)
    network: nn.Module = FrechetInceptionDistance(feature=2048).inception
    return network.to(device).eval()


def load_lpips(device: str) -> LpipsNetwork:
    """Return the network of LPIPS, with AlexNet's features (the authors' choice for a metric).

    Raises:
        UserError: torchmetrics or torchvision is not installed, or the weights are not here and cannot be
            fetched.
    """
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
        from torchvision.models import AlexNet_Weights
    except (ImportError, RuntimeError) as error:  # torchvision raises the second where it does not fit torch
        raise _not_installed("LPIPS", error) from error
    ensure_weights("LPIPS", AlexNet_Weights.IMAGENET1K_V1.url)
    network: nn.Module = LearnedPerceptualImagePatchSimilarity(net_type="alex").net
    return lpips_of(network.to(device).eval())


def lpips_of(network: nn.Module) -> LpipsNetwork:
    """Return torchmetrics' LPIPS module as a function of images in [0, 1] on any device."""
    device = next(network.parameters()).device

    @torch.no_grad()
    def distances(first: Tensor, second: Tensor) -> Tensor:
        found: Tensor = network(first.to(device), second.to(device), normalize=True)
        return found.flatten().cpu()

    return distances


def ensure_weights(metric: str, url: str) -> Path:
    """Return the file of ``url`` in torch's cache, downloading it if it is not there.

    The file's name ends in the first digits of its SHA-256, which a download is checked by.

    Raises:
        UserError: the file is not there, and the network is switched off (HF_HUB_OFFLINE) or the download
            failed; it names the file and the address.
    """
    from huggingface_hub import constants

    name = Path(urlparse(url).path).name
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    if file.is_file():
        return file
    remedy = f"put a copy of {url} there"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{metric}: the weights {file} are missing and HF_HUB_OFFLINE is set; {remedy}")
    file.parent.mkdir(parents=True, exist_ok=True)
    digits = re.search(r"-([0-9a-f]{8,})\.", name)
    try:
        torch.hub.download_url_to_file(url, str(file), digits[1] if digits else None, progress=False)
    except (OSError, RuntimeError) as error:  # no connection or disk; a file that does not match its digest
        raise UserError(
            f"{metric}: cannot fetch the weights {file} ({type(error).__name__}: {error}); check the "
            f"connection, or {remedy}"
        ) from error
    return file


def _not_installed(metric: str, error: Exception) -> UserError:
    reason = f" ({error})" if not isinstance(error, ModuleNotFoundError) else ""
    return UserError(
        f"{metric} needs torchmetrics and torch-fidelity{reason}; pip install 'diffalign[metrics]'"
    )
