"""Who looks on while a run goes on, and computes nothing that it needs: events, the alphas over time, the cost.

A run_folder.Run tells its observer of every batch, step and epoch, and keeps in its checkpoints what the observer needs
to go on. What is in the files does not depend on interruptions, but for the clock (`cost`) and for how often the alphas
are drawn.
"""

import contextlib
import json
import logging
import math
import shlex
import sys
import time
from pathlib import Path

import torch

import diagnostics
import utils
import visualize
from watch import alphas, cost
from watch.events import Events

logger = logging.getLogger("darts.observer")

_REDRAW_EVERY = 60  # seconds: drawing the alphas takes one or two


class Observer:
    """Looks on at a run.

    Attributes:
        trajectory: the alphas, an alphas.Trajectory, if the model has some.
    """

    def __init__(self, run):
        self.run, self.model = run, run.parts["model"]
        self.cost = cost.Cost(shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]))
        self.pace, self.events, self.trajectory = cost.Pace(), None, None
        if hasattr(self.model, "arch_parameters"):
            self.trajectory = alphas.Trajectory(self.model.primitives)
            self.trajectory.add(0, self._weights())
        self._reported = [0] * 5  # the meter's sums at the last report of this epoch
        self._norm, self._images, self._reported_at = None, 0, None
        self._drawn_at, self._drawn_epoch = time.monotonic(), None

    def _weights(self):
        """The softmax of the alphas of both cells, on the CPU."""
        return [torch.softmax(alpha.detach(), dim=-1).cpu() for alpha in self.model.arch_parameters()]

    def entropies(self):
        """Columns of metrics.csv: the entropy of a softmax of the alphas in nats, averaged over a cell's edges."""
        values = alphas.entropies(self._weights())
        return {f"entropy_{cell}": value for cell, value in zip(alphas.CELLS, values, strict=True)}

    def state_dict(self):
        """What a checkpoint keeps. The events before it are on their way to the disk, whatever comes."""
        if self.events is not None:
            self.events.flush()
        state = dict(reported=list(self._reported), cost=self.cost.state_dict())
        return state | ({} if self.trajectory is None else {"alphas": self.trajectory.state_dict()})

    def load_state_dict(self, state):
        """Go on from what a checkpoint kept, or from None, of a run from before there was an observer.

        Raises:
            ValueError: says what does not fit; further kinds, of a value of another kind.
        """
        if self.trajectory is not None:
            self.trajectory = alphas.Trajectory(self.model.primitives)
        if state is None:
            self.cost = cost.Cost("unknown", "unknown", since_epoch=self.run.epoch)
            self._reported = list(self.run.meter.sums)
            if self.trajectory is not None and self.run.step == 0:
                self.trajectory.add(self.run.epoch, self._weights())
            return
        self._reported = list(state["reported"])
        self.cost.load_state_dict(state["cost"])
        if self.trajectory is not None:
            self.trajectory.load_state_dict(state["alphas"], self.run.epoch, self.model.alphas_normal.shape)

    def begin(self, resumed):
        """The run stands where it begins or goes on: make its files again, and those of TensorBoard what they were."""
        self.events = Events(self.run.folder, resumed)
        self._drawn_at = -math.inf if resumed else self._drawn_at
        self.write()

    def begin_epoch(self, steps):
        """An epoch of so many steps begins, or goes on."""
        self.cost.begin()
        self.pace.begin_epoch(self.run.epoch, steps, self.run.step)
        self.events.begin_steps(self.run.epoch * steps + self.run.step)
        self._images, self._reported_at = 0, time.monotonic()

    def batch(self, images, grad_norm):
        """A step has been computed on so many images; the norm of its gradient is a tensor that is not waited for."""
        self.cost.count(images)
        self._images += images
        self._norm = grad_norm

    def step(self):
        """A step is over."""
        self.pace.step()
        step, steps, epochs = self.run.step, self.pace.steps, self.run.args.epochs
        if self.pace.is_news:
            left = self.pace.remaining(step, epochs)
            what = "an epoch takes about %s, what is left of %d epochs %s (validation %s); %s so far"
            known = "measured" if self.pace.validation_is_known else "estimated"
            memory = cost.in_words(*cost.peak_memory())
            logger.info(
                what, utils.duration(self.pace.seconds(self.run.epoch)), epochs, utils.duration(left), known, memory
            )
        if step % self.run.args.report_freq == 0 or step == steps:
            self.events.step(self.run.epoch * steps + step, self._scalars())

    def remaining(self):
        """What the progress bar says of the whole run."""
        left = self.pace.remaining(self.run.step, self.run.args.epochs)
        return f"whole run {utils.duration(left)} left"

    def _scalars(self):
        """What is reported of the steps since the last report, by tag; the device has been waited for by their loss."""
        parts, scalars = self.run.parts, {}
        images, loss, top1 = (a - b for a, b in zip(self.run.meter.sums[:3], self._reported, strict=False))
        if images:
            scalars = {"loss/train": loss / images, "accuracy/train": top1 / images}
        scalars["learning_rate/weights"] = parts["optimizer"].param_groups[0]["lr"]
        if self._norm is not None:
            scalars["gradient_norm/weights"] = float(self._norm)
        if "arch_optimizer" in parts:
            scalars["learning_rate/alphas"] = parts["arch_optimizer"].param_groups[0]["lr"]
        if self.trajectory is not None:
            grads = [alpha.grad.flatten() for alpha in self.model.arch_parameters() if alpha.grad is not None]
            if grads:
                scalars["gradient_norm/alphas"] = float(torch.cat(grads).norm())
            scalars |= {name.replace("_", "/"): value for name, value in self.entropies().items()}
        now = time.monotonic()
        scalars["images_per_second"] = self._images / max(now - self._reported_at, 1e-9)
        self._images, self._reported_at, self._reported = 0, now, list(self.run.meter.sums)
        return scalars

    def end_epoch(self):
        """An epoch is over, and the next checkpoint will say so."""
        self._reported = [0] * 5
        if self.trajectory is not None:
            self.trajectory.add(self.run.epoch, self._weights())

    def write(self):
        """Write what is known of the finished epochs; the alphas are drawn if they have not been for some time."""
        run = self.run
        self._write_summary(ended=False)
        self.events.epoch(run.epoch, run.judged_by, run.history[-1] if run.history else {}, self.trajectory)
        if self.trajectory is not None and self.trajectory.epochs:
            self.trajectory.write(run.folder)
            if time.monotonic() - self._drawn_at > _REDRAW_EVERY:
                self._draw()

    def _draw(self):
        pictures = alphas.draw(self.trajectory, self.run.figures())
        self.events.image("alphas/heat_map", pictures[-1], self.run.epoch)
        self._drawn_at, self._drawn_epoch = time.monotonic(), self.run.epoch

    def cells(self, pictures):
        """The cells were drawn: those of a search after an epoch, those of a training before the first."""
        history = [row.get("genotype") for row in self.run.history[-2:]]
        if len(set(history)) == len(history) and None not in history:
            for path in pictures:
                self.events.image(f"cells/{path.stem}", path, self.run.epoch)

    def finish(self):
        """The run has ended."""
        if self.trajectory is not None and self.trajectory.epochs and self._drawn_epoch != self.run.epoch:
            self._draw()
        if self.run.history and "genotype" in self.run.history[-1]:
            with contextlib.suppress(visualize.DrawingError):  # Run.report has said why
                visualize.draw_evolution(self.run.history, self.run.figures() / visualize.EVOLUTION)
        self._write_summary(ended=True)
        logger.info("it took %s", self.cost)

    def _write_summary(self, ended):
        run = self.run
        row = diagnostics.final_row(run.history) if run.history else {}
        summary = dict(kind=run.kind, epochs=run.epoch) | self.cost.summary(ended)
        summary["result_of_epoch"] = row.get("epoch")  # an early stop keeps an earlier one than the last
        for column, images in (("train_acc", "training"), ("valid_acc", run.judged_by)):
            summary[f"{images}_accuracy"] = row.get(column)
        summary["parameters"] = sum(w.numel() for w in self.model.parameters())
        summary["genotype"] = row.get("genotype", getattr(run.args, "arch", None))
        utils.write_text(run.folder / "summary.json", json.dumps(summary, indent=2) + "\n")

    def close(self):
        """The process ends, or the run does."""
        if self.events is not None:
            self.events.close()


class Bystander(Observer):
    """Of a process that does not lead its run: what it looks at enters the run's numbers, and it writes nothing."""

    def begin(self, resumed):
        pass

    def begin_epoch(self, steps):
        self.cost.begin()

    def step(self):
        pass

    def remaining(self):
        return ""

    def write(self):
        pass

    def cells(self, pictures):
        pass

    def finish(self):
        pass
