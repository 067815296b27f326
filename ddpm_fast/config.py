"""What a run is: frozen dataclasses, the only source of a default.

Shapes: N images, C channels, H x W pixels, T diffusion timesteps. Imports nothing heavy, so that
`ddpm-fast --help` answers at once.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ddpm_fast.errors import flag, require, require_counts, require_seed, require_types
from ddpm_fast.stages import Stage

Prediction = Literal["eps", "x0", "v"]
Variance = Literal["small", "large"]
Spacing = Literal["trailing", "leading", "linspace"]
Details = Literal["paper", "diffusers"]
TimestepDensity = Literal["uniform", "laplace"]
Precision = Literal["auto", "fp32", "tf32", "bf16"]
SamplerName = Literal["ddpm", "ddim", "dpm++"]
WIDEST = 2**16
"""Channels or pixels that a U-Net may have: what asks for more is damaged, and no memory would hold it."""


@dataclass(frozen=True)
class UNetConfig:
    """The paper's U-Net (Ho et al. 2020, Appendix B)."""

    image_channels: int = 3
    """Channels of an image: 1 for grey, 3 for RGB, 4 for RGBA."""
    height: int = 32
    """Height of an image in pixels; images are resized and centre-cropped to it."""
    width: int = 32
    """Width of an image in pixels; images are resized and centre-cropped to it."""
    channels: int = 128
    """Feature channels at full resolution."""
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 2)
    """Channels of each level as a multiple of --channels; every level but the last halves H and W."""
    res_blocks: int = 2
    """ResBlocks per level on the way down; one more on the way up."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Heights, in pixels, of the feature maps that get self-attention after each ResBlock."""
    dropout: float = 0.0
    """Probability, 0 to 1, that a ResBlock's inner activation is dropped in training."""
    groups: int = 32
    """Groups of every GroupNorm; must divide the channels of every level."""
    head_channels: int = 0
    """Channels per attention head; 0 is one head of all channels, as in the paper."""
    details: Details = "paper"
    """Padding, GroupNorm's epsilon and the time's sinusoids: the paper's, or those of diffusers' defaults."""
    num_classes: int | Literal["auto"] = 0
    """Classes that the U-Net is told images of, whose labels count from 0: auto counts the data's; 0 tells it none."""

    def __post_init__(self) -> None:
        require_types(self)
        levels = len(self.channel_multipliers)
        require(levels > 0, "--channel-multipliers is empty: name one multiplier per level, e.g. 1 2 2")
        require_counts(self, "image_channels", "height", "width", "channels", "groups", most=WIDEST)
        require_counts(self, "res_blocks", most=256)
        require(min(self.channel_multipliers) > 0, f"--channel-multipliers {self.channel_multipliers} must be positive")
        step = 2 ** (levels - 1)
        for name, value in (("height", self.height), ("width", self.width)):
            why = f"{flag(name)} {value} does not divide by {step}, which {levels} levels (--channel-multipliers) need"
            usable = max(step, round(value / step) * step)
            require(value % step == 0, f"{why}: use {usable}, or fewer multipliers")
        for multiplier in self.channel_multipliers:
            width = self.channels * multiplier
            require(width <= WIDEST, f"--channels {self.channels} x multiplier {multiplier} is more than {WIDEST}")
            require(
                width % self.groups == 0,
                f"{width} channels (--channels {self.channels} x multiplier {multiplier}) do not divide into "
                f"{self.groups} groups: change --channels or --groups",
            )
        require(self.channels % 2 == 0, f"--channels is {self.channels}: it must be even (half sines, half cosines)")
        resolutions = [self.height >> level for level in range(levels)]
        for resolution in self.attention_resolutions:
            message = f"--attention-resolutions has {resolution}, but the feature maps are {resolutions} pixels high"
            require(resolution in resolutions, message)
        require(0 <= self.dropout < 1, f"--dropout is {self.dropout}: it must lie in [0, 1)")
        require(self.head_channels >= 0, f"--head-channels is {self.head_channels}: it must not be negative")
        for level, multiplier in enumerate(self.channel_multipliers) if self.head_channels else ():
            width, attends = self.channels * multiplier, resolutions[level] in self.attention_resolutions
            message = f"{width} channels do not divide into heads of {self.head_channels}: change --head-channels"
            require(width % self.head_channels == 0 or not (attends or level == levels - 1), message)
        fits = self.num_classes == "auto" or 0 <= self.num_classes <= 2**20
        require(fits, f"--num-classes is {self.num_classes}: negative, or more than {2**20}")

    @property
    def classes(self) -> int:
        """The number of classes: `data.conditions.with_classes` counts them for auto, which is a ValueError here."""
        return int(self.num_classes)


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward process and what the network predicts of it."""

    timesteps: int = 1000
    """Diffusion timesteps T."""
    schedule: Literal["linear", "cosine", "sigmoid"] = "linear"
    """How beta grows with t: the paper's line, or alpha_bar as a squared cosine or a sigmoid."""
    beta_start: float = 1e-4
    """First beta of the linear schedule."""
    beta_end: float = 0.02
    """Last beta of the linear schedule."""
    prediction: Prediction = "eps"
    """What the U-Net predicts: the noise eps, the clean image x0, or v = a*eps - b*x0."""
    variance: Variance = "large"
    """The DDPM sampler's fixed variance: large is beta_t, small the posterior's (paper, Section 3.2)."""
    clip: bool = True
    """Clip the estimate of x0 to [-1, 1] in every sampling step."""

    def __post_init__(self) -> None:
        require_types(self)
        require_counts(self, "timesteps", most=1_000_000)
        require(
            0 < self.beta_start <= self.beta_end < 1,
            f"--beta-start {self.beta_start} and --beta-end {self.beta_end} must satisfy 0 < start <= end < 1",
        )


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they are read."""

    data: str = ""
    """digits, a folder of images, a .npy, .npz, .parquet or .tar, or of the hub hf:NAME[:CONFIG[:SPLIT]] or mnist."""
    float_range: Literal["none", "0..1", "-1..1"] = "none"
    """What floats in a .npy/.npz mean: the range that is mapped to black..white; uint8 needs none."""
    skip_bad: bool = False
    """Leave out files that cannot be read, and count them, instead of refusing the folder."""
    flip: bool = False
    """Flip half of the training images left to right."""
    holdout: float = 0.0
    """Share of the images that is never trained on: the evaluation loss is then theirs; 0 keeps none back."""
    image_column: str = ""
    """Column of a .parquet, or ending in a .tar, that holds the images, where there are several."""
    label_column: str = ""
    """Column of a .parquet, or ending or key in a .tar, that says the class, where it is not called so."""
    revision: str = ""
    """Commit of a data set of the hub; a run keeps the newest, which it found when it began."""

    def __post_init__(self) -> None:
        require_types(self)
        require(0 <= self.holdout < 1, f"--holdout is {self.holdout}: it must lie in [0, 1)")


@dataclass(frozen=True)
class TrainingConfig:
    """One training run."""

    steps: int = 800_000
    """Optimizer steps in all."""
    batch_size: int = 128
    """Images per optimizer step; auto is as many as memory holds: up to 256 on a GPU, else at most the preset's."""
    accumulate: int = 1
    """Parts that a batch is split into, one after the other, to save memory; must divide --batch-size."""
    learning_rate: float = 2e-4
    """Adam's learning rate after warm-up."""
    warmup_steps: int = 5000
    """Steps over which the learning rate rises linearly from 0."""
    cooldown: float = 0.0
    """Share of the steps, 0 to 1, at the end, over which the learning rate falls linearly to 0."""
    adam_beta2: float = 0.999
    """Decay per step of Adam's average of squared gradients."""
    clip_norm: float = 1.0
    """Largest global gradient norm; longer gradients are scaled down to it. 0 turns clipping off."""
    ema_decay: float = 0.9999
    """Decay per step of the averaged weights; warmed up as min(decay, (1 + step) / (10 + step))."""
    min_snr_gamma: float = 0.0
    """Clamp of min-SNR loss weights (Hang et al. 2023), e.g. 5. 0 is the paper's unweighted loss."""
    label_dropout: float = 0.1
    """Share of examples, 0 to 1, that the U-Net is shown without their label, as --guidance needs it."""
    timestep_density: TimestepDensity = "uniform"
    """How t is drawn: each as often (the paper), or mostly where signal and noise are alike (Hang et al. 2025)."""
    seed: int = 0
    """Seed of everything random, 0 to 2**64 - 1: same seed, same run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes an NVIDIA GPU if there is one."""
    precision: Precision = "auto"
    """The U-Net's arithmetic; auto is bf16 on GPUs good at it, else fp32; tf32 is for GPUs. Parameters stay fp32."""
    kernels: bool = True
    """Run the Triton kernels on an NVIDIA GPU; --no-kernels is plain PyTorch everywhere."""
    compile: bool = True
    """Compile the U-Net on a GPU with torch.compile; --no-compile runs it as written."""
    capture: bool = True
    """Capture each step on a GPU as a CUDA graph; --no-capture launches every kernel from Python."""
    deterministic: bool = False
    """Let PyTorch use only algorithms on a GPU that give the same bits each time; a CPU's do in any case."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    save_every: int = 5000
    """Steps between two checkpoints; one more is written before the cooldown, and one at the end."""
    save_minutes: float = 0.0
    """Write a checkpoint also where the last one is older than this, in minutes; 0 looks at no clock."""
    keep_last: int = 0
    """Checkpoints to keep, the newest and the one before the cooldown in any case; 0 deletes none."""
    keep_every: int = 0
    """With --keep-last, keep also every checkpoint whose step is a multiple of this; 0 keeps no more."""
    sample_every: int = 5000
    """Steps between two sample grids; cheap ones are drawn early, and one at the end. 0 draws none at all."""
    evaluate_every: int = 0
    """Steps between two measurements of the samples' quality, and one at the end; 0 measures none."""
    evaluate_count: int = 1000
    """Samples that --evaluate-every makes and measures each time."""
    init: str = ""
    """Start from the weights of a run, a checkpoint, a diffusers folder or hf:NAME, whose U-Net and process hold."""

    def __post_init__(self) -> None:
        require_types(self)
        require_counts(self, "steps", "batch_size", "accumulate", "log_every", "save_every", most=2**31 - 1)
        not_negative = ("warmup_steps", "clip_norm", "min_snr_gamma", "sample_every", "evaluate_every")
        for name in (*not_negative, "save_minutes", "keep_last", "keep_every"):
            value = getattr(self, name)
            require(value >= 0, f"{flag(name)} is {value}: it must not be negative")
        require(
            self.batch_size % self.accumulate == 0,
            f"--batch-size {self.batch_size} does not divide into --accumulate {self.accumulate} equal parts",
        )
        require(
            self.evaluate_count >= 2,
            f"--evaluate-count is {self.evaluate_count}: quality is measured over at least 2 samples",
        )
        require(self.keep_last > 0 or not self.keep_every, "--keep-every needs --keep-last: without it all are kept")
        require(self.learning_rate > 0, f"--learning-rate is {self.learning_rate}: it must be positive")
        require(0 <= self.cooldown <= 1, f"--cooldown is {self.cooldown}: it must lie in [0, 1]")
        require(0 < self.adam_beta2 < 1, f"--adam-beta2 is {self.adam_beta2}: it must lie in (0, 1)")
        require(0 <= self.label_dropout <= 1, f"--label-dropout is {self.label_dropout}: it must lie in [0, 1]")
        require(0 <= self.ema_decay < 1, f"--ema-decay is {self.ema_decay}: it must lie in [0, 1)")
        require_seed(self.seed)

    @property
    def cooldown_steps(self) -> int:
        """Steps at the end over which the learning rate falls."""
        return round(self.cooldown * self.steps)

    @property
    def cooldown_start(self) -> int:
        """Steps before the cooldown, up to which a run does not depend on how many follow; all where there is none."""
        return self.steps - self.cooldown_steps


# fmt: off
MAY_CHANGE = frozenset({
    "steps", "data", "accept", "strict",  # see `directory.check_resumable`
    "device", "precision", "kernels", "compile", "capture", "deterministic",
    "log_every", "save_every", "save_minutes", "keep_last", "keep_every",
    "sample_every", "evaluate_every", "evaluate_count",
})
# fmt: on
"""Fields that may change where a run is continued: it stays the same run, up to the device's roundings."""


@dataclass(frozen=True)
class SamplerConfig:
    """Which sampler, and how many of the T timesteps it visits."""

    sampler: SamplerName = "ddpm"
    """ddpm is the paper's; ddim (Song et al. 2021) and dpm++ (DPM-Solver++ 2M) need far fewer steps."""
    steps: int = 0
    """Sampling steps K, 1 to T; 0 is all T."""
    eta: float = 0.0
    """DDIM's share of fresh noise: 0 is deterministic, 1 as noisy as DDPM."""
    spacing: Spacing = "trailing"
    """Which timesteps a shorter sampler visits: trailing always starts from pure noise."""

    def __post_init__(self) -> None:
        require_types(self)


@dataclass(frozen=True)
class CheckConfig:
    """How much may differ from the paper before training is refused."""

    accept: tuple[Stage, ...] = ()
    """Stages of the check whose faults are meant: they are said, and training goes on."""
    strict: bool = False
    """Refuse to train also where something is consistent, but another thing than the paper's."""

    def __post_init__(self) -> None:
        require_types(self)


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes."""

    preset: str = "digits"
    """What gives other flags' defaults: digits, mnist, icons32, cifar10, cifar10-fast, church256, celebahq256, auto."""
    unet: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checks: CheckConfig = field(default_factory=CheckConfig)
    sampling: SamplerConfig = field(default_factory=SamplerConfig)
    """What makes images unless a sampler is asked for; training does not depend on it."""


def with_training(config: Config, **changes: Any) -> Config:
    """Return the configuration with fields of its `training` part replaced."""
    return replace(config, training=replace(config.training, **changes))
