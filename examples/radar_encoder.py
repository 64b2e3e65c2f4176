from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn.functional import adaptive_max_pool2d, normalize

from bindllm.encoders import fingerprint
from bindllm.errors import MediaError
from bindllm.media import Media


class RadarEncoder:  # embeds sweeps of an FMCW radar, complex [chirps, samples], by their range-Doppler maps
    modalities, embedding_size = ("radar",), 64

    def __init__(self, weights: str = "data/radar/encoder.safetensors") -> None:
        self.config, self.axes = {"weights": weights}, None

    def fingerprint(self) -> str:
        return fingerprint({}, "range-doppler 1", Path(self.config["weights"]))

    def to(self, device) -> "RadarEncoder":
        return self  # stays on CPU: a 1024 x 64 product is faster than a copy to an accelerator

    def prepare(self, media: Media) -> torch.Tensor:
        try:
            sweep = media.source if isinstance(media.source, np.ndarray) else np.load(media.source)
        except (OSError, ValueError, EOFError) as error:
            raise MediaError(f"{media.name}: not an .npy file of a radar sweep ({error})") from error
        if sweep.ndim != 2 or min(sweep.shape) < 32 or not np.isfinite(sweep).all():
            raise MediaError(f"{media.name}: expected finite numbers [chirps, samples], not {sweep.shape}")
        spectrum = np.fft.fft2(sweep * np.outer(*map(np.hanning, sweep.shape)))
        power = np.abs(np.fft.fftshift(spectrum, axes=0)) ** 2  # [speed, range]
        level = torch.from_numpy(np.log10(power / np.median(power).clip(1e-12) + 1))  # above the noise
        return adaptive_max_pool2d(level.float()[None], 32).flatten()

    def embed(self, modality: str, inputs: list[torch.Tensor]) -> torch.Tensor:
        self.axes = self.axes or load_file(self.config["weights"])
        return normalize((torch.stack(list(inputs)) - self.axes["mean"]) @ self.axes["axes"], dim=-1)
