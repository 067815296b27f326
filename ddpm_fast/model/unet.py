"""The paper's U-Net (Ho et al. 2020, Appendix B), for any image size that its levels divide.

Its parameters carry the names of diffusers' UNet2DModel, so that such a checkpoint loads as it is.
Shapes: N images, C channels, H x W pixels, D = 4 * channels the width of the time embedding, S the sum of all
ResBlocks' output channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast.config import UNetConfig
from ddpm_fast.diffusion.noise import NoiseAddress
from ddpm_fast.model.blocks import (
    Attention,
    ConvBeforeShift,
    Downsample,
    FusedGroupNorm,
    Level,
    LevelList,
    MiddleBlock,
    ResBlock,
    Upsample,
    xavier_uniform,
)
from ddpm_fast.model.forms import Forms
from ddpm_fast.model.sums import ConvBeforeNorm, value_of
from ddpm_fast.ops import REFERENCE, Ops

DIFFUSERS_EPS = 1e-5
"""What diffusers' UNet2DModel adds to a variance by default."""


class TimeEmbedding(nn.Module):
    """Linear, SiLU, Linear over the sinusoids: [N, channels] -> [N, D]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, 4 * channels)
        self.linear_2 = nn.Linear(4 * channels, 4 * channels)

    def forward(self, sinusoids: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoids.to(self.linear_1.weight.dtype))))


class ClassEmbedding(nn.Embedding):
    """A row for each class, and a last one for images that are shown without their label: [N] -> [N, D]."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__(classes + 1, width)

    def forward(self, input: Tensor) -> Tensor:
        # As a product, whose gradient is one, too: that of a look-up is added up on a GPU in any order once compiled.
        rows = torch.arange(self.num_embeddings, device=input.device)
        return (input[:, None] == rows).to(self.weight.dtype) @ self.weight


class UNet(nn.Module):
    """Predicts noise, x0 or v from x_t and t, and a conditional one from each image's label, too."""

    def __init__(self, config: UNetConfig, forms: Forms | None = None) -> None:
        """Build the network with initial weights; `forms` are the defaults if left out."""
        super().__init__()
        self.config, self.forms = config, forms or Forms()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = ConvBeforeNorm(config.image_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(config.channels)
        self.class_embedding = ClassEmbedding(config.classes, 4 * config.channels) if config.classes else None
        down, skips = self._build_down(widths)
        self.down_blocks = LevelList(down)
        self.mid_block = MiddleBlock(
            [self._res_block(widths[-1], widths[-1]) for _ in range(2)], self._attention(widths[-1])
        )
        self.up_blocks = LevelList(self._build_up(widths, skips))
        self.conv_norm_out = FusedGroupNorm(widths[0], config.groups)
        self.conv_out = nn.Conv2d(widths[0], config.image_channels, 3, padding=1)
        for number, block in enumerate(self.res_blocks()):
            block.layer = number
        for module in self.modules() if config.details == "diffusers" else ():
            if isinstance(module, FusedGroupNorm):
                module.eps = DIFFUSERS_EPS
        self.use(REFERENCE)
        self.initialize()

    def _res_block(self, channels_in: int, channels_out: int) -> ResBlock:
        config = self.config
        return ResBlock(channels_in, channels_out, 4 * config.channels, config.groups, config.dropout)

    def _attentions(self, level: int, channels: int, count: int) -> list[Attention]:
        has_attention = (self.config.height >> level) in self.config.attention_resolutions
        return [self._attention(channels) for _ in range(count)] if has_attention else []

    def _attention(self, channels: int) -> Attention:
        return Attention(channels, self.config.groups, channels // (self.config.head_channels or channels))

    def _build_down(self, widths: list[int]) -> tuple[list[Level], list[int]]:
        """Build the way down; also return the channels of every skip connection, in order."""
        levels, skips, last = list[Level](), [widths[0]], len(widths) - 1
        for level, width in enumerate(widths):
            blocks = [self._res_block(skips[-1] if i == 0 else width, width) for i in range(self.config.res_blocks)]
            resize = Downsample(width, self.config.details == "diffusers") if level < last else None
            levels.append(Level(blocks, self._attentions(level, width, len(blocks)), resize))
            skips += [width] * (len(blocks) + (resize is not None))
        return levels, skips

    def _build_up(self, widths: list[int], skips: list[int]) -> list[Level]:
        levels, channels, skips = list[Level](), widths[-1], list(skips)
        for level, width in reversed(list(enumerate(widths))):
            blocks = []
            for _ in range(self.config.res_blocks + 1):
                blocks.append(self._res_block(channels + skips.pop(), width))
                channels = width
            resize = Upsample(width, self.forms.transposed_upsampling) if level > 0 else None
            levels.append(Level(blocks, self._attentions(level, width, len(blocks)), resize))
        return levels

    def res_blocks(self) -> list[ResBlock]:
        """Return all ResBlocks in forward order."""
        levels = [*self.down_blocks, self.mid_block, *self.up_blocks]
        return [block for level in levels for block in level.resnets]

    def estimate_flop(self) -> int:
        """Estimate the FLOPs per image of one forward pass: every weight is used at every pixel of its level."""
        config, last = self.config, len(self.down_blocks) - 1
        parts = [*enumerate(self.down_blocks), (last, self.mid_block)]
        parts += [(last - i, level) for i, level in enumerate(self.up_blocks)]
        return sum(
            2 * weight.numel() * (config.height >> level) * (config.width >> level)
            for level, part in parts
            for weight in part.parameters()
        )

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw initial weights as the original code does (its `default_init`), from PyTorch's generator."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                xavier_uniform(module)
        for block in self.res_blocks():
            xavier_uniform(block.conv2, gain=0)
        for module in self.modules():
            if isinstance(module, Attention):
                xavier_uniform(module.output, gain=0)
        xavier_uniform(self.conv_out, gain=0)
        if self.class_embedding is not None:  # last: all else begins as without it
            nn.init.xavier_uniform_(self.class_embedding.weight)

    def use(self, ops: Ops) -> "UNet":
        """Compute with these ops from now on; training and sampling take theirs from here, too."""
        self.ops = ops
        for module in self.modules():
            if isinstance(module, FusedGroupNorm):
                module.ops = ops
        return self

    def low_precision_parameters(self) -> dict[str, nn.Parameter]:
        """Return what bfloat16 is precise enough for: all of convolutions and products but what is added to shifts."""
        return {
            f"{name}.{key}": parameter
            for name, module in self.named_modules()
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
            for key, parameter in module.named_parameters(recurse=False)
            if not (isinstance(module, ConvBeforeShift) and key == "bias")
        }

    @torch.no_grad()
    def freeze(self) -> "UNet":
        """Compute once what follows from the weights alone: from now on they must not change."""
        leaves_sums = self.ops.fused and self.forms.sums_left_to_norms  # a compiler adds up in passing, too
        for module in self.modules():
            if isinstance(module, Attention | Upsample):
                module.freeze()
            if leaves_sums and isinstance(module, Attention | ConvBeforeNorm | ResBlock):
                module.leave_sums()
        return self.requires_grad_(False).eval()

    def embed_time(self, t: Tensor) -> Tensor:
        """Compute the embedding of timesteps t [N]: [N, D]."""
        return self.time_embedding(self._sinusoids(t))

    def _sinusoids(self, t: Tensor) -> Tensor:
        channels = self.config.channels
        if self.config.details == "paper":
            return self.ops.timestep_embedding(t, channels)
        # diffusers' frequencies fall a little less, to where one more of ours would end; and cosines come first.
        sines, cosines = self.ops.timestep_embedding(t, channels + 2).chunk(2, dim=1)
        return torch.cat([cosines[:, :-1], sines[:, :-1]], dim=1)

    def embed(self, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Compute the embedding of timesteps t [N] and labels [N] int64: [N, D].

        The label of the number of classes is that of an image without one, as are all if `labels` is left out.
        """
        embedding = self.embed_time(t)
        if self.class_embedding is None:
            return embedding
        labels = torch.full_like(t, self.config.classes, dtype=torch.int64) if labels is None else labels
        return embedding + self.class_embedding(labels).to(embedding.dtype)

    def projection(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what makes all blocks' shifts of an embedding: weight [S, D], its bias, and the convolutions' [S]."""
        blocks = self.res_blocks()
        weight = torch.cat([block.time_emb_proj.weight for block in blocks])
        bias = torch.cat([block.time_emb_proj.bias for block in blocks])
        return weight, bias, torch.cat([block.conv1.bias for block in blocks if block.conv1.bias is not None])

    def time_shifts(self, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Compute what every ResBlock adds to its first convolution's output for timestep t; once for all steps.

        That is the embedding's projection and the convolution's own bias.

        Args:
            t: [N] timesteps.
            labels: [N] int64, see `embed`.

        Returns:
            [N, S], the blocks' shifts side by side in forward order.
        """
        weight, bias, conv_bias = self.projection()
        # Added to the product, not to its bias: that may be in lower precision, and this is float32 always.
        return F.linear(F.silu(self.embed(t, labels)), weight, bias) + conv_bias

    def forward(
        self, x: Tensor, t: Tensor, dropout_address: NoiseAddress | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Predict from x_t [N, C, H, W] at timesteps t [N]; without a dropout_address nothing is dropped."""
        return self.denoise(x, self.time_shifts(t, labels), dropout_address)

    def denoise(self, x: Tensor, time_shifts: Tensor, dropout_address: NoiseAddress | None = None) -> Tensor:
        """Predict from x_t [N, C, H, W] and the `time_shifts` [N, S] of its timesteps: [N, C, H, W]."""
        widths = [block.conv1.out_channels for block in self.res_blocks()]
        shifts = iter(time_shifts.split(widths, dim=1))

        h = self.conv_in(x)
        skips = [h]
        for level in self.down_blocks:
            for block, attention in level.blocks():
                h = attention(block(h, next(shifts), dropout_address))
                skips.append(h)
            if level.has_resize:
                h = level.downsamplers[0](h)
                skips.append(h)

        h = self.mid_block(h, shifts, dropout_address)

        for level in self.up_blocks:
            for block, attention in level.blocks():
                skip = skips.pop()
                if not self.forms.skips_joined_by_norms:
                    h, skip = torch.cat([value_of(h), value_of(skip)], dim=1), None
                h = attention(block(h, next(shifts), dropout_address, skip))
            if level.has_resize:
                h = level.upsamplers[0](h)
        h = value_of(h)
        return self.conv_out(self.conv_norm_out(h))
