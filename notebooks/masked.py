"""Masked pretraining with ARM's parts, to compare objectives: from the visible patches, predict the hidden ones.

    python notebooks/masked.py --visible 0.25 --output-dir runs/masked    # and the flags of train.py
    python finetune.py --checkpoint runs/masked/last.pt

Encoder, taps, decoder, targets and recipe are ARM's; what differs is what is read and what is asked for. It is not the
paper's masked variant to the letter, which is not published.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # isort: skip  (before torch, for which it sets a variable)
import torch
from torch import Tensor, nn

from armamba import ARM, ARMConfig, VisionMamba, patchify


class Masked(ARM):
    """From a random share of visible patches, predict the pixels of all hidden ones at once [MAE].

    Args: visible, the share; in_place, whether mask tokens stand in for the hidden patches, so that the encoder meets
    everything at its place, or it reads the visible patches only, in raster order, as MAE; directions, 4 need in_place.
    """

    def __init__(self, config: ARMConfig, visible: float = 0.25, in_place: bool = False, directions: int = 1):
        super().__init__(config)
        if directions > 1:
            self.encoder = VisionMamba(config, num_classes=None, directions=directions)
        self.n_visible = round(visible * math.prod(config.grid))
        if config.order != "row" or directions > 1 and not in_place:
            raise ValueError(
                f"order {config.order!r}, {directions} directions: there is no order here, and 4 need in_place"
            )
        if not 0 < self.n_visible < math.prod(config.grid):
            raise ValueError(f"visible {visible} leaves no patch to see, or none to predict: choose a share in between")
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.d_model).normal_(std=0.02)) if in_place else None

    def draw(self, b: int) -> tuple[Tensor, Tensor]:
        """Places of the visible and of the hidden patches, (b, visible, 1) and (b, hidden, 1), in raster order."""
        places = torch.rand(b, math.prod(self.config.grid), device=self.mask.device).argsort(dim=1)
        return tuple(x.sort(dim=1)[0][..., None] for x in places.tensor_split((self.n_visible,), dim=1))

    def read(self, images: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """What the encoder reads: (b, visible, d), or in place (b, l, d)."""
        x = self.encoder.embed(images)  # (b, l, d), positions added
        if self.mask_token is None:
            return x.take_along_dim(visible, 1)
        blank = (self.mask_token + self.encoder.pos_embed).expand_as(x)  # a mask token has a position too
        return x.scatter(1, hidden.expand(-1, -1, x.shape[2]), blank.take_along_dim(hidden, 1))

    def reconstruct(self, images: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """(b, hidden, p*p*c). Every query looks at all that the encoder wrote: there is nothing to keep from it."""
        c, x = self.config, self.read(images, visible, hidden)
        taps = [norm(tap) for norm, tap in zip(self.tap_norms, self.encoder.run_layers(x, c.taps))]
        context = self.enc2dec(torch.cat(taps, -1)).unflatten(-1, (c.decoder_dim, c.decoder_depth))
        q = (self.ar_token + self.dec_pos_embed).expand(len(x), -1, -1).take_along_dim(hidden, 1)  # (b, hidden, dec)
        for i, block in enumerate(self.decoder):
            q = block(q, context[..., i], None)
        return self.ar_pred(self.ar_norm(q))

    def forward(self, images: Tensor) -> Tensor:
        """The loss, on hidden patches only."""
        visible, hidden = self.draw(len(images))
        target = patchify(images, self.config.patch_size).take_along_dim(hidden, 1)
        if self.config.norm_pix:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return (self.reconstruct(images, visible, hidden) - target).square().mean()


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--visible", type=float, default=0.25)
    options, flags = parser.parse_known_args(argv)
    return train.main(flags, Masked, visible=options.visible)


if __name__ == "__main__":
    train.run_script(main)
