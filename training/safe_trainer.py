"""`SafeTrainer`: transformers' Trainer whose checkpoints are complete or not used.

A run that is killed at any moment goes on from its last complete checkpoint. Nothing of another run is written over,
and no process waits for one that has stopped because its disk is full.
"""

import shutil
from contextlib import ExitStack
from pathlib import Path

from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from ..storage.claims import claimed_run
from ..storage.disk import check_disk_space
from .agreement import of_one_process
from .checkpoints import (
    BASE_CONFIG,
    check_resumable,
    check_same_model,
    checkpoint_bytes,
    complete_checkpoint,
    last_complete_checkpoint,
    last_whole_checkpoint,
)

STATE = "trainer_state.json"


class SafeTrainer(Trainer):
    """transformers' Trainer with atomic checkpoints: a manifest is written last, and none without it is ever used."""

    saves_frozen_weights = True  # but for adapters, which peft saves alone
    _compared: Path | None = None  # the checkpoint of which every byte has just been compared

    def train(self, resume_from_checkpoint: str | bool | None = None, *others, **named):
        """As transformers' Trainer; `resume_from_checkpoint=True` takes the last checkpoint that is complete.

        A run that is resumed from its last step is only loaded, not trained further.

        Raises:
            ValueError: there is nothing to resume from, the checkpoint is incomplete or of another model, or the output
                folder holds checkpoints of a run that is not resumed, or another process trains into it.
            OSError: the disk has no room for a checkpoint.
        """
        folder = self._checkpoint_to_resume(resume_from_checkpoint)
        saves = self.args.save_strategy.value != "no"
        if saves:
            self._check_disk_space("a checkpoint")
        if folder is not None and (finished := self._finished_state(folder)) is not None:
            self._load_from_checkpoint(str(folder))
            self.state = finished
            return TrainOutput(finished.global_step, 0.0, {})
        with ExitStack() as kept:
            if saves:
                output = Path(self.args.output_dir)
                of_one_process(self.args.should_save, lambda: kept.enter_context(claimed_run(output)))
            return super().train(None if folder is None else str(folder), *others, **named)

    def _checkpoint_to_resume(self, asked: str | bool | None) -> Path | None:
        output = Path(self.args.output_dir)
        own = bool(asked) and (asked is True or Path(str(asked)).resolve().parent == output.resolve())
        last = last_complete_checkpoint(output)
        if not own and self.args.save_strategy.value != "no" and last is not None:
            raise ValueError(
                f"output_dir={self.args.output_dir!r} holds {last.name} of another run: "
                "resume it with resume_from_checkpoint=True, or choose another folder. Nothing was overwritten."
            )
        if not asked:
            return None
        if self.is_distributed_loading_by_transformers:
            raise ValueError(
                f"resume_from_checkpoint={asked!r}: transformers cannot resume a model that from_pretrained has "
                "sharded (distributed_config): load the checkpoint's folder as a model and begin a new run."
            )
        folder = self.last_whole_checkpoint() if asked is True else Path(asked)
        if folder is None:
            raise ValueError(f"output_dir={self.args.output_dir!r} holds no complete checkpoint: start a new run.")
        self._check_resumable(folder)
        check_same_model(folder, self.model)
        return folder

    def _finished_state(self, folder: Path) -> TrainerState | None:
        """The state of a checkpoint at the last step of its run; None for an earlier one."""
        state = TrainerState.load_from_json(str(folder / STATE))
        steps = self.args.max_steps if self.args.max_steps > 0 else state.max_steps
        return state if state.global_step >= steps else None

    def _issue_warnings_after_load(self, load_result) -> None:
        # A tied head is not in the file: it is the embedding.
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and hasattr(self.model, "peft_config"):
            # An adapter does not say under which settings of its model it was trained.
            folder = Path(output_dir or self.args.output_dir)
            self.model.config.to_json_file(folder / BASE_CONFIG, use_diff=False)

    def _save_checkpoint(self, model: nn.Module, trial: dict | None) -> None:
        run_folder = Path(self._get_output_dir(trial))
        folder = run_folder / f"checkpoint-{self.state.global_step}"
        self._check_disk_space(folder.name)
        if self.args.should_save:
            # What an interrupted run left of the same step must not mix with the files of this one.
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        # Both come after the manifest: until the checkpoint is complete, no older one may go and nothing be published.
        limit, push = self.args.save_total_limit, self.args.push_to_hub
        self.args.save_total_limit, self.args.push_to_hub = None, False
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit, self.args.push_to_hub = limit, push
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            complete_checkpoint(folder)
            rotate_checkpoints(
                output_dir=str(run_folder),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        if push:
            self._push_from_checkpoint(str(folder))

    def last_whole_checkpoint(self) -> Path | None:
        """The checkpoint from which `train` would go on; None where none was saved to its end. Called by all processes.

        Raises:
            ValueError: all are damaged.
        """
        found = of_one_process(self.args.should_save, lambda: last_whole_checkpoint(Path(self.args.output_dir)))
        self._compared = found
        return found

    def _check_resumable(self, folder: Path) -> None:
        """One process compares every byte of a checkpoint, unless that was just done to find it."""
        compared, self._compared = self._compared == folder, None
        of_one_process(self.args.should_save, lambda: check_resumable(folder, compared))

    def checkpoint_bytes(self) -> int:
        """About what one checkpoint takes on the disk."""
        return checkpoint_bytes(self.model, self.saves_frozen_weights and not hasattr(self.model, "peft_config"))

    def _check_disk_space(self, what: str) -> None:
        """Every process stops where the one that saves has no room."""
        folder, needed = Path(self.args.output_dir), self.checkpoint_bytes()
        of_one_process(self.args.should_save, lambda: check_disk_space(folder, needed, what))
