"""Is the mathematics right, here, now?

Each line says what was expected, what was found, and which file to look at. Everything is judged from outside: the
ops are run and their results compared with formulas derived another way, so that a changed line shows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpm_fast import ops, schedule
from ddpm_fast.checkpoint import PARTS, Checkpoint
from ddpm_fast.config import Config, DiffusionConfig, SamplerConfig, with_training
from ddpm_fast.data import BatchSource, Dataset
from ddpm_fast.noise import key_from_seed, timesteps
from ddpm_fast.samplers import Row, SamplerTable, sampler_table
from ddpm_fast.trainer import NoiseAddress, Trainer, ema_decay

SIGMAS = 5.0
"""Standard errors that a statistic may be off: 1 false alarm in 1.7 million."""
EXAMPLES = 8
"""Training examples that the checks of the network use."""
QUICK_STEPS, FULL_STEPS = 2, 100
"""Steps on one fixed batch, by the quick part and in full."""


@dataclass(frozen=True)
class Line:
    """One thing that was checked."""

    name: str
    passed: bool
    expected: str
    found: str
    file: str


def report(lines: Iterator[Line], full: bool = False) -> int:
    """Print the lines as they come; return the exit status: 0, or 3 if any failed."""
    part = "in full" if full else "quick part; `ddpm-fast check` runs all"
    print(f"checking the mathematics ({part})")
    failed = 0
    for line in lines:
        failed += not line.passed
        mark = "ok  " if line.passed else "FAIL"
        tail = "" if line.passed else f"; look at {line.file}"
        print(f"  {mark} {line.name}: expected {line.expected}, found {line.found}{tail}", flush=True)
    if failed:
        print(f"{failed} of the checks failed: the mathematics is wrong, nothing was trained")
    return 3 if failed else 0


def check_start(config: Config, dataset: Dataset, device: torch.device) -> Iterator[Line]:
    """Check what takes seconds: run before step 0."""
    yield from _check_everything_but_fitting(config, dataset, device, None)
    yield from check_fitting(_small_trainer(config, dataset, device, None), QUICK_STEPS)


def check_run(config: Config, dataset: Dataset, device: torch.device, found: Checkpoint | None) -> Iterator[Line]:
    """Check everything, for a trained run or for what a configuration describes."""
    yield from _check_everything_but_fitting(config, dataset, device, found)
    yield from check_fitting(_small_trainer(config, dataset, device, None), FULL_STEPS)


def _check_everything_but_fitting(
    config: Config, dataset: Dataset, device: torch.device, found: Checkpoint | None
) -> Iterator[Line]:
    shape = (config.unet.image_channels, config.unet.height, config.unet.width)
    yield from check_noise(shape, device)
    yield from check_schedule(config.diffusion)
    trainer = _small_trainer(config, dataset, device, found)
    yield from check_data(trainer, shape)
    yield from check_forward_process(trainer)
    yield from check_samplers(config.diffusion, device)
    yield from check_network(trainer, trained=found is not None)


def _small_trainer(config: Config, dataset: Dataset, device: torch.device, found: Checkpoint | None) -> Trainer:
    """Build a trainer of the same network on a handful of fixed examples, in float32."""
    config = with_training(config, batch_size=EXAMPLES, accumulate=1, warmup_steps=0, precision="fp32")
    config = replace(config, unet=replace(config.unet, dropout=0.0))
    source = BatchSource(dataset, key_from_seed(config.training.seed), device)
    trainer = Trainer(config, lambda first, n: source.batch(0, n), device)
    if found is not None:
        trainer.load_state(found.step, {part: found.tensors(part) for part in PARTS})
    return trainer


def _training_noise(sample_index: Tensor, shape: tuple[int, int, int], seed: int) -> Tensor:
    """Return the noise that q_sample really adds: by a table of one row with a = 0, b = 1."""
    device = sample_index.device
    images = torch.zeros(len(sample_index), *shape, device=device)
    table = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0]], device=device)
    return ops.q_sample(images, torch.zeros_like(sample_index), table, key_from_seed(seed, device), sample_index)


def _sampling_noise(sample_index: Tensor, shape: tuple[int, int, int], step: int) -> Tensor:
    """Return the noise that reverse_step really adds: by rows with s = 1 and nothing else."""
    device = sample_index.device
    x = torch.zeros(len(sample_index), *shape, device=device)
    rows = torch.zeros(step + 1, len(Row._fields), device=device)
    rows[:, Row._fields.index("s")] = 1
    at = torch.full((1,), step, dtype=torch.int64, device=device)
    ops.reverse_step(x, x.clone(), rows, at, key_from_seed(0, device), sample_index, clip=False, noisy=True)
    return x


def kolmogorov_smirnov(z: Tensor) -> float:
    """Return sqrt(n) times the largest distance between z's distribution and N(0, 1); above 2.2 once in 10,000."""
    ordered = z.double().flatten().sort().values
    n = len(ordered)
    expected = torch.special.ndtr(ordered)
    ranks = torch.arange(n + 1, dtype=torch.float64, device=z.device) / n
    distance = torch.maximum((ranks[1:] - expected).max(), (expected - ranks[:-1]).max())
    return float(distance) * n**0.5


def _correlation_sigmas(a: Tensor, b: Tensor) -> float:
    """Return the correlation of two equally shaped noises, in standard errors."""
    a, b = a.double().flatten(), b.double().flatten()
    return abs(float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())) * len(a) ** 0.5


def check_noise(shape: tuple[int, int, int], device: torch.device) -> Iterator[Line]:
    """Check that noise is N(0, 1) and independent over pixels, channels, samples and steps."""
    _, height, width = shape
    count = max(2, min(4096, 65536 // (height * width)))
    sample_index = torch.arange(count, device=device)
    wide = (8, height, width)
    pairs = [
        (
            "training",
            "ddpm_fast/noise.py",
            _training_noise(sample_index, wide, 0),
            _training_noise(sample_index, wide, 1),
        ),
        (
            "sampling",
            "ddpm_fast/noise.py",
            _sampling_noise(sample_index, wide, 0),
            _sampling_noise(sample_index, wide, 1),
        ),
    ]
    for name, file, z, other in pairs:
        n = z.numel()
        mean, variance = float(z.mean()) * n**0.5, (float(z.square().mean()) - 1) * (n / 2) ** 0.5
        distance = kolmogorov_smirnov(z)
        normal = abs(mean) < SIGMAS and abs(variance) < SIGMAS and distance < 2.2
        found = f"mean {mean:+.1f} and variance {variance:+.1f} standard errors off, Kolmogorov-Smirnov {distance:.2f}"
        yield Line(f"{name} noise is N(0, 1)", normal, f"within {SIGMAS:.0f}, below 2.2", found, file)
        neighbours = {
            "channels": (z[:, 1:], z[:, :-1]),
            "samples": (z[1:], z[:-1]),
            "seeds" if name == "training" else "steps": (z, other),
        }
        if height > 1:
            neighbours["rows"] = (z[:, :, 1:], z[:, :, :-1])
        if width > 1:
            neighbours["columns"] = (z[..., 1:], z[..., :-1])
        worst, off = max(((k, _correlation_sigmas(*v)) for k, v in neighbours.items()), key=lambda kv: kv[1])
        found = f"between {worst} {off:.1f} standard errors"
        yield Line(f"{name} noise is independent", off < SIGMAS, f"correlations within {SIGMAS:.0f}", found, file)


def check_schedule(diffusion: DiffusionConfig) -> Iterator[Line]:
    """Check that the schedule falls monotonically and ends in noise, and that variance is preserved."""
    file = "ddpm_fast/schedule.py"
    betas, alpha_bar = schedule.betas(diffusion), schedule.alphas_cumprod(diffusion)
    monotone = bool((betas > 0).all() and (betas < 1).all() and (alpha_bar.diff() < 0).all())
    found = f"betas {float(betas.min()):.2g}..{float(betas.max()):.2g}"
    yield Line("the schedule is monotone", monotone, "0 < beta < 1 and alphas_cumprod falling", found, file)
    last = float(alpha_bar[-1])
    yield Line(
        "the schedule ends in noise", last < 0.01, "alphas_cumprod[T-1] below 0.01", f"{last:.2g}", f"{file}, or betas"
    )
    # Products of 1 - beta by another way: sums of logarithms.
    expected = torch.exp(torch.cumsum(torch.log1p(-betas), 0))
    table = schedule.TrainingTable(*schedule.training_table(diffusion).double().unbind(1))
    off = float((table.a**2 - expected).abs().max())
    yield Line("a is sqrt(alphas_cumprod)", off < 1e-6, "a**2 = prod(1 - beta) within 1e-6", f"{off:.1e} off", file)
    off = float((table.a**2 + table.b**2 - 1).abs().max())
    yield Line("Var[x_t] = 1 at every t", off < 1e-6, "a**2 + b**2 = 1 within 1e-6", f"{off:.1e} off", file)


def _first_batch(trainer: Trainer) -> tuple[Tensor, Tensor, Tensor]:
    images, sample_index = trainer.batch(0, EXAMPLES)
    return images, sample_index, timesteps(NoiseAddress(trainer.key, sample_index), trainer.config.diffusion.timesteps)


def check_data(trainer: Trainer, shape: tuple[int, int, int]) -> Iterator[Line]:
    """Check that images fit the U-Net and reach it in [-1, 1]."""
    images, sample_index, _ = _first_batch(trainer)
    fits = tuple(images.shape[1:]) == shape and images.dtype == torch.uint8
    found = f"{tuple(images.shape[1:])} {images.dtype}"
    yield Line("images fit the U-Net", fits, f"{shape} torch.uint8", found, "ddpm_fast/data.py")
    table = torch.tensor([[1.0, 0.0, 0.0, 1.0, 1.0]], device=images.device)  # a = 1, b = 0: no noise
    x_start = ops.q_sample(images, torch.zeros_like(sample_index), table, trainer.key, sample_index)
    low, high = float(x_start.min()), float(x_start.max())
    fine = low >= -1 and high <= 1 and high - low > 0.1
    yield Line("data lies in [-1, 1]", fine, "-1..1, not constant", f"{low:.3f}..{high:.3f}", "ddpm_fast/reference.py")


def _closed_form_target(diffusion: DiffusionConfig, t: Tensor, x_start: Tensor, eps: Tensor) -> Tensor:
    """Return what the network should predict, from alphas_cumprod alone."""
    ab = schedule.alphas_cumprod(diffusion).to(x_start.device)[t].view(-1, 1, 1, 1)
    v = ab.sqrt() * eps - (1 - ab).sqrt() * x_start
    return {"eps": eps, "x0": x_start, "v": v}[diffusion.prediction].float()


def check_forward_process(trainer: Trainer) -> Iterator[Line]:
    """Check that q_sample, the target and the sampler's table agree on t, signs and coefficients."""
    diffusion, file = trainer.config.diffusion, "ddpm_fast/reference.py or ddpm_fast/samplers.py"
    images, sample_index, _ = _first_batch(trainer)
    # Where alphas_cumprod is tiny, float32 cannot give x_start back: stay in the lower nine tenths.
    t = (torch.arange(EXAMPLES, device=images.device) * (diffusion.timesteps * 9 // 10)) // EXAMPLES
    x_start = (images.double() / 127.5 - 1).float()
    shape = (images.shape[1], images.shape[2], images.shape[3])
    eps = _training_noise(sample_index, shape, trainer.config.training.seed)
    target = _closed_form_target(diffusion, t, x_start.double(), eps.double())
    x_t = ops.q_sample(images, t, trainer.table, trainer.key, sample_index)
    row = Row(*sampler_table(diffusion).rows.to(images.device).flip(0)[t].unbind(1))
    p, q = row.p.view(-1, 1, 1, 1), row.q.view(-1, 1, 1, 1)
    off = float((p * x_t - q * target - x_start).abs().max())
    expected = "x_start again within 1e-3"
    yield Line("q_sample, then predicting x_start, gives the data back", off < 1e-3, expected, f"{off:.1e} off", file)
    loss = float(ops.noise_mse(target, images, t, trainer.table, trainer.key, sample_index).max())
    name = f"the loss of the true {diffusion.prediction} is 0"
    yield Line(name, loss < 1e-6, "below 1e-6", f"{loss:.1e}", "ddpm_fast/reference.py or ddpm_fast/schedule.py")


def check_samplers(diffusion: DiffusionConfig, device: torch.device) -> Iterator[Line]:
    """Check the posterior by Bayes' rule computed another way, and every sampler with the true prediction."""
    file = "ddpm_fast/samplers.py"
    row = Row(*sampler_table(diffusion).rows.flip(0).unbind(1))  # row t now belongs to t
    betas = schedule.betas(diffusion)[1:]
    prior_variance = 1 - schedule.alphas_cumprod(diffusion)[:-1]
    # q(x_{t-1} | x_0) times q(x_t | x_{t-1}), both Gaussian: precisions add up.
    variance = 1 / (1 / prior_variance + (1 - betas) / betas)
    u = variance * (1 - prior_variance).sqrt() / prior_variance
    v = variance * (1 - betas).sqrt() / betas
    off = float(torch.maximum((row.u[1:] - u).abs().max(), (row.v[1:] - v).abs().max()))
    yield Line("the posterior mean is Bayes' rule", off < 1e-9, "within 1e-9", f"{off:.1e} off", file)
    expected = variance if diffusion.variance == "small" else betas
    off = float((row.s[1:] ** 2 / expected - 1).abs().max()) + float(row.s[0].abs())
    name = f"the posterior variance is the fixed {diffusion.variance} one"
    yield Line(name, off < 1e-9, "within 1e-9 of it, none in the last step", f"{off:.1e} off", file)
    steps = min(20, diffusion.timesteps)
    for config in (SamplerConfig("ddpm", steps), SamplerConfig("ddim", steps), SamplerConfig("dpm++", steps)):
        off = _distance_with_true_prediction(diffusion, sampler_table(diffusion, config), device)
        name = f"{config.sampler} with the true prediction ends on the data"
        yield Line(name, off < 1e-3, "within 1e-3", f"{off:.1e} off", f"{file} or ddpm_fast/reference.py")


def _distance_with_true_prediction(diffusion: DiffusionConfig, table: SamplerTable, device: torch.device) -> float:
    """Run a sampler whose network knows the answer; return how far from it the sampler ends."""
    generator = torch.Generator().manual_seed(0)
    x_start = (torch.rand(2, 3, 4, 4, generator=generator) * 2 - 1).to(device)
    x = torch.randn(2, 3, 4, 4, generator=generator).to(device)
    x0 = torch.zeros_like(x)
    sample_index, key = torch.arange(2, device=device), key_from_seed(0, device)
    rows = table.rows.to(device, torch.float32)
    for k in range(len(rows)):
        t = rows[k, 0].long().expand(2)
        ab = schedule.alphas_cumprod(diffusion).to(device)[t].view(-1, 1, 1, 1)
        eps = (x.double() - ab.sqrt() * x_start) / (1 - ab).sqrt()
        out = _closed_form_target(diffusion, t, x_start.double(), eps)
        step = torch.full((1,), k, dtype=torch.int64, device=device)
        ops.reverse_step(x, out, rows, step, key, sample_index, clip=table.clip, noisy=table.noisy, x0=x0)
    return float((x - x_start).abs().max())


def check_network(trainer: Trainer, trained: bool) -> Iterator[Line]:
    """Check the first loss, every parameter's gradient, and that t reaches the output."""
    file = "ddpm_fast/unet.py or ddpm_fast/trainer.py"
    if not trained:
        images, sample_index, t = _first_batch(trainer)
        zeros = torch.zeros(images.shape, device=images.device)
        nothing = float(ops.noise_mse(zeros, images, t, trainer.table, trainer.key, sample_index).mean())
        first = float(trainer.losses(0, EXAMPLES).mean().detach())
        expected = f"{nothing:.4f} within 2%"
        yield Line(
            "the first loss is that of predicting nothing",
            abs(first / nothing - 1) < 0.02,
            expected,
            f"{first:.4f}",
            file,
        )
    trainer.backward()
    # A constant added to every key cancels in softmax: that bias alone has no gradient.
    silent = [
        name
        for name, p in trainer.unet.named_parameters()
        if (p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.any()) and not name.endswith("to_k.bias")
    ]
    found = f"{len(silent)} without, e.g. {silent[0]}" if silent else "all have one"
    yield Line("every parameter receives a finite gradient", not silent, "all", found, file)
    images, _, t = _first_batch(trainer)
    x, first = images.float() / 127.5 - 1, torch.zeros_like(t)
    with torch.no_grad():
        early, late = trainer.unet(x, first), trainer.unet(x, first + trainer.config.diffusion.timesteps - 1)
    # Residual branches start at 1e-5 of the trunk, so at first t moves the output by about that; without t, by 0.
    change = float((early - late).norm() / early.norm())
    yield Line("the output depends on t", change > 1e-7, "a relative change above 1e-7", f"{change:.1e}", file)


def check_fitting(trainer: Trainer, steps: int) -> Iterator[Line]:
    """Check that the average follows and that a handful of images can be overfitted."""
    file = "ddpm_fast/trainer.py"
    before = {name: tensor.clone() for name, tensor in trainer.ema.items()}
    trainer.train_step_no_sync()
    decay = ema_decay(0, trainer.config.training)
    weights = dict(trainer.unet.named_parameters())
    off = max(
        float((trainer.ema[name] - (decay * before[name] + (1 - decay) * weights[name].detach())).abs().max())
        for name in before
    )
    moved = any(bool((trainer.ema[name] != before[name]).any()) for name in before)
    found = f"{off:.1e} off" if moved else "it does not move"
    yield Line("the weights' average follows", moved and off < 1e-6, f"decay {decay:.2f} at step 0", found, file)
    first = trainer.read_loss()
    for _ in range(steps):
        trainer.step = 0  # the same examples with the same noise again
        trainer.train_step_no_sync()
    last = float(trainer.losses(0, EXAMPLES).mean().detach())
    share = 0.5 if steps >= FULL_STEPS else 1.0
    yield Line(
        f"{EXAMPLES} fixed examples are learned in {steps} steps",
        last < share * first,
        f"a loss below {share * first:.3f}",
        f"{last:.3f}",
        file,
    )
