"""A training run: its progress, and how it stops. Its files are described in `directory`."""

import json
import shlex
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.config import Config, with_training
from ddpm_fast.data.conditions import batches_of
from ddpm_fast.data.dataset import Dataset
from ddpm_fast.engine.execution import EAGER
from ddpm_fast.engine.memory import until_it_fits
from ddpm_fast.engine.trainer import WARM_UP_STEPS, Trainer
from ddpm_fast.errors import InputError, MathematicsError
from ddpm_fast.files import writing
from ddpm_fast.progress import say
from ddpm_fast.runs import checkpoint, decisions, evaluation, origin, scores
from ddpm_fast.runs.against import EITHER_WAY, Judge
from ddpm_fast.runs.board import Board
from ddpm_fast.runs.decisions import Decisions, decide
from ddpm_fast.runs.directory import amend_last_metrics, prepare, read_metrics
from ddpm_fast.runs.evaluation import is_due
from ddpm_fast.runs.grids import to_uint8
from ddpm_fast.runs.guards import Guards
from ddpm_fast.runs.previews import Previews
from ddpm_fast.runs.progress import TrainingProgress
from ddpm_fast.runs.saver import Saver
from ddpm_fast.runs.sheet import write_sheet
from ddpm_fast.runs.signals import InterruptedRunError, Signals


class Run:
    """One run of the trainer in its directory."""

    def __init__(
        self,
        directory: Path,
        config: Config,
        dataset: Dataset,
        found: checkpoint.Checkpoint | None,
        progress: bool,
        judge: Judge | None = None,
        decided: Decisions | None = None,
    ) -> None:
        """Set up the run in its directory, without training yet.

        Args:
            directory: where the run is kept.
            config: what to train.
            dataset: what to train on.
            found: the checkpoint to continue from, see `find_start`.
            progress: show bars, instead of lines.
            judge: compares each evaluation with another run's, if given, and may end the run.
            decided: how to compute, by default as the flags say on this machine.

        Raises:
            InputError: the directory cannot be written, or the checkpoint does not fit.
        """
        self.judge = judge
        self.directory, self.config, self.dataset = directory, config, dataset
        decided = decided or decide(config.training)
        device, execution = torch.device(decided.device), decided.execution
        source = batches_of(config, dataset, device)
        as_decided = with_training(config, precision=decided.precision, accumulate=decided.accumulate)
        self.trainer = Trainer(as_decided, source.batch, device, execution)
        self.evaluation_set = evaluation.EvaluationSet(as_decided, dataset, device)
        self.previews = Previews(config, directory, self.trainer, progress)
        self.scores = scores.Scores(config, dataset, progress)
        if found is not None:
            try:
                self.trainer.load_state(found.step, {part: found.tensors(part) for part in checkpoint.TENSOR_FILES})
            except ValueError as error:
                raise InputError(f"{found.path} does not fit its own configuration: {error}") from None
        self._saved = self.trainer.step
        self.saver = Saver(directory, config, dataset.fingerprint)
        self.signals = Signals()
        self.trainer.undivided = self.signals.held
        untimed = 0 if execution == EAGER else WARM_UP_STEPS + 1
        self.progress = TrainingProgress(config, self.trainer.step, untimed, progress)
        prepare(directory, config, dataset.fingerprint, self.trainer.step, asdict(decided))
        self.guards = Guards(config, directory, self.trainer, self.saver.wait)
        self._logged = max((line["step"] for line in read_metrics(directory)), default=0)

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Start with these weights, and keep them as step 0: to continue, their source is not needed any more."""
        self.trainer.load_weights(weights)
        checkpoint.save(self.directory, 0, self.config, self.dataset.fingerprint, self.trainer.state())

    @property
    def finished(self) -> bool:
        """Are all steps done, or does the judge stop the run."""
        return (self.judge is not None and self.judge.stops) or self.trainer.step >= self.config.training.steps

    def train(self) -> None:
        """Train up to the configured number of steps, logging, evaluating, saving and drawing on the way.

        Raises:
            InterruptedRunError: SIGINT or SIGTERM arrived; the run is saved.
            MathematicsError: a value was not finite, or the run diverges; the last good checkpoint is kept.
            InputError: the disk is full or not writable.
        """
        trainer = self.trainer
        with self.signals, ExitStack() as opened:
            try:
                origin.write(self.directory, trainer.step, trainer.device)
                write_sheet(self.directory, self.config, self.dataset)
                self.board = opened.enter_context(Board(self.directory, trainer.step))
                opened.enter_context(self.progress)
                opened.enter_context(self.saver)
                if trainer.execution.compiled:
                    with self.progress.doing("compiling the training step: a minute, the first time", seconds=60):
                        self._in_parts_that_fit(trainer.compile)
                self._do_what_is_due()  # of a step after which the run was interrupted
                if self.signals.asked_before:
                    say("SIGUSR1 came before training: the next step is saved and drawn")
                while not self.finished:
                    self._in_parts_that_fit(trainer.train_step_no_sync)
                    self.progress.step_done()
                    self._do_what_is_due()
                    if self.signals.asked():
                        self._save_and_draw_now()
            except InterruptedRunError as interrupted:
                raise self._save_and_say_so(interrupted.number) from None

    def _in_parts_that_fit(self, work: Callable[[], None]) -> None:
        """Do a step's work; where memory does not suffice, in smaller parts of the batch, which the run then keeps."""
        before = self.trainer.accumulate
        until_it_fits(work, self.trainer.split_further)
        parts, size = self.trainer.accumulate, self.config.training.batch_size
        if parts != before:
            with self.signals.held():
                decisions.keep_accumulate(self.directory, parts)
            say(
                f"memory did not suffice for {size // before} images at once: each batch of {size} is now taken in "
                f"{parts} parts, as by --accumulate {parts}, which changes nothing else; kept for --resume"
            )

    def _do_what_is_due(self) -> None:
        """Evaluate, log, save and draw after a step, where that is due."""
        training, step = self.config.training, self.trainer.step
        self.saver.raise_failure()
        if step > self._logged:
            evaluated = self._evaluate() if self._evaluation_is_due() else None
            if evaluated or self._scores_are_due() or step % training.log_every == 0:
                self._log(evaluated)
            elif self.progress.line_due():
                self.progress.report(f"loss {self.trainer.mean_loss():.4f}")
        elif step > 0 and self._evaluation_is_due() and "evaluation" not in read_metrics(self.directory)[-1]:
            evaluated = evaluation.read(self.directory, step) or self._evaluate()
            amend_last_metrics(self.directory, {"evaluation": evaluation.summary(evaluated)})
            self.guards.look_at_evaluation(evaluated)
        if step > self._saved and self.saver.is_due(step, self.finished):
            self.save()
        if self._scores_are_missing():
            self._score()
        self._draw_if_due()

    def _scores_are_due(self) -> bool:
        return scores.is_due(self.trainer.step, self.config.training, self.finished)

    def _evaluation_is_due(self) -> bool:
        return self.trainer.step == self.config.training.steps or is_due(self.trainer.step, self.config)

    def _scores_are_missing(self) -> bool:
        return self._scores_are_due() and scores.is_missing(self.directory, self.trainer.step)

    def _save_and_say_so(self, number: int) -> InterruptedRunError:
        """Save the steps that are finished; return what ends the run."""
        step = self.trainer.step
        try:
            logs = self._evaluation_is_due() or self._scores_are_due() or step % self.config.training.log_every == 0
            if self.trainer.half_updated:  # by a second signal: what would be saved is no step's state
                self.saver.wait()
                raise InterruptedRunError(number)
            if step > self._saved:
                if step > self._logged and logs:
                    self._log()  # an evaluation that was interrupted is made when the run goes on
                self.save()
            self.saver.wait()
            done = f"saved step {self._saved}" if self._saved else "interrupted before the first step"
        except InterruptedRunError:
            kept = checkpoint.newest(self.directory)
            where = "in an update" if self.trainer.half_updated else "while saving"
            done = f"interrupted {where}; the newest checkpoint is {kept.path if kept else 'none'}"
        measured = evaluation.read(self.directory, step) is not None and not self._scores_are_missing()
        if step == self.config.training.steps and measured:
            return InterruptedRunError(number, f"{done}, the last; its grid was not drawn")
        against = f" --against {shlex.quote(str(self.judge.base.path))}" if self.judge else ""
        until = " --until-decided" if self.judge and self.judge.stops_at == EITHER_WAY else ""
        how = f"continue by ddpm-fast train --out {shlex.quote(str(self.directory))} --resume{against}{until}"
        return InterruptedRunError(number, f"{done}; {how}")

    def _evaluate(self) -> evaluation.Evaluation:
        """Evaluate the weights and keep what was found; the time it takes is not training's."""
        self.guards.stop_if_not_finite()
        with self.progress.doing("evaluating"), writing(self.directory):
            evaluated = until_it_fits(
                lambda: self.evaluation_set.evaluate(self.trainer), self.evaluation_set.halve_batches
            )
            evaluation.write(self.directory, self.trainer.step, evaluated)
        if apart := self.judge and self.judge.look(self.trainer.step, evaluated):
            say(f"step {self.trainer.step:,}: {apart}")
        return evaluated

    def _score(self) -> None:
        """Measure the quality of samples, add it to the step's line of metrics, and say it."""
        count = self.config.training.evaluate_count
        seconds = self.previews.seconds(count, self.progress.seconds_per_step)
        with self.progress.doing(f"measuring {count} samples", seconds):
            found = self.scores.of(self.previews.samples(count, self.scores.labels))
        with self.signals.held():
            amend_last_metrics(self.directory, {"quality": found})
        for name, value in found.items():
            self.board.add_scalar(f"quality/{name}", value, self.trainer.step)
        say(f"step {self.trainer.step:,}: {scores.in_words(found, count)}")

    def _log(self, evaluated: evaluation.Evaluation | None = None) -> None:
        """Write one line of metrics, and say it."""
        self.guards.stop_if_not_finite()
        with self.signals.held():
            metrics = self._write_metrics(evaluated)
        found = metrics.get("evaluation")
        self.progress.report(f"loss {metrics['loss']:.4f}" + (f", {evaluation.in_words(found)}" if found else ""))
        self.guards.look_at_log(metrics)
        if evaluated:
            self.guards.look_at_evaluation(evaluated)

    def _write_metrics(self, evaluated: evaluation.Evaluation | None) -> dict[str, Any]:
        """Write one line of metrics and return it; the loss is that of the steps since the last."""
        trainer = self.trainer
        seconds, images_per_s = self.progress.end_interval()
        metrics: dict[str, Any] = {
            "step": trainer.step,
            "loss": trainer.read_loss(),
            "gradient_norm": float(trainer.figures.gradient_norm),
            "learning_rate": float(trainer.figures.learning_rate),
            "wall": {"seconds": round(seconds, 4), "images_per_s": round(images_per_s, 1)},
        }
        if evaluated is not None:
            metrics["evaluation"] = evaluation.summary(evaluated)
            for name, values in evaluated.errors.items():
                self.board.add_scalar(f"evaluation/{name}", float(values.mean()), trainer.step)
        self._logged = trainer.step
        self._saved = min(self._saved, trainer.step - 1)  # a checkpoint knows what was logged
        with writing(self.directory / "metrics.jsonl"), (self.directory / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        for name in ("loss", "gradient_norm", "learning_rate"):
            self.board.add_scalar(name, metrics[name], trainer.step)
        self.board.add_scalar("images_per_s", metrics["wall"]["images_per_s"], trainer.step)
        return metrics

    def save(self) -> None:
        """Begin to write a checkpoint; never one that is not finite."""
        self.guards.stop_if_not_finite()
        step = self.trainer.step
        with self.progress.doing(f"saving step {step:,}"):
            self.saver.wait()
            with self.signals.held():
                self.saver.save(step, self.trainer.state())
                self._saved = step

    def _save_and_draw_now(self) -> None:
        """Save and draw as SIGUSR1 asks: no number of the run depends on it."""
        if self.trainer.step > self._saved:
            self.save()
        count = self.previews.images_now()
        drew = self._draw(count, may_fail=True) if count else True
        self.saver.wait()
        grid = f" and drawn, see {self.previews.directory}" if drew else ""
        say(f"step {self.trainer.step:,}: saved{grid}, as SIGUSR1 asked")

    def _draw_if_due(self) -> None:
        """Draw a grid where one is due; one that nobody asked for may fail."""
        count = self.previews.images_due(self.finished)
        if count:
            self._draw(count, may_fail=not self.previews.asked_for(self.finished))

    def _draw(self, count: int, may_fail: bool) -> bool:
        """Draw a grid of so many images; return whether it was drawn."""
        images = f"{count} image" + ("s" if count > 1 else "")
        with self.progress.doing(f"drawing {images}", self.previews.seconds(count, self.progress.seconds_per_step)):
            try:
                samples = self.previews.draw(count)
            except MathematicsError as error:
                if not may_fail:
                    raise
                say(f"step {self.trainer.step:,}: no grid was drawn: {error}")
                return False
            if self.config.unet.image_channels in (1, 3):
                pixels = torch.from_numpy(to_uint8(samples))
                self.board.add_images("samples", pixels, self.trainer.step, dataformats="NHWC")
        return True
