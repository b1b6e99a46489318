"""Small studies that are stored, extended and saved without training, as the runner does it."""

import numpy as np

import playbook_optax as pbx
from playbook_optax.records import checkpoints, load_study, storage
from playbook_optax.runner import finished
from tests.records import helpers

WIDTH = 3
BEGUN, EXTENDED = 6, 9


class Run:
    """A study of two blocks, extended to three.

    Args:
      directory: the study directory.
    """

    def __init__(self, directory):
        self.directory = directory
        self.blocks = helpers.some_blocks(EXTENDED, width=WIDTH)

    def tell(self, done=lambda what: None):
        """Stores whatever is missing; the same call continues."""
        for num_trials in (BEGUN, EXTENDED):
            storage.check_writable(self.directory)
            storage.remove_temporary_files(self.directory)
            self._write_spec(num_trials)
            done(("trials", num_trials))
            for index in range(num_trials // WIDTH):
                if index not in finished.read(self.directory, {index}):
                    storage.write_block(self.directory, index, self.blocks[index])
                done(("block", index))

    def _write_spec(self, num_trials):
        spec = helpers.a_spec(num_trials)
        if storage.write_spec(self.directory, spec, replace=False):
            return
        if storage.read_spec(self.directory)["num_trials"] < num_trials:
            storage.write_spec(self.directory, spec)

    def check(self, done):
        """What is there is what was stored, and nothing that was finished is missing."""
        promised = [what for kind, what in done if kind == "block"]
        planned = [what for kind, what in done if kind == "trials"]
        try:
            spec = storage.read_spec(self.directory)
        except storage.NoStudy:
            assert not done
            return
        assert spec["num_trials"] >= max(planned, default=0)
        assert spec == helpers.a_spec(spec["num_trials"])
        there = storage.finished_blocks(self.directory)
        assert set(promised) <= set(there), f"of the finished blocks {promised} there are {there}"
        for index in there:
            found = storage.read_block(self.directory, index)
            assert helpers.same(found, self.blocks[index]), f"block {index} is another"
        study = load_study(self.directory)
        assert study.num_trials >= WIDTH * (max(promised, default=-1) + 1)
        if study.num_trials == 0:  # Nothing is known of metrics yet.
            return
        whole = np.float32(helpers.some_blocks(EXTENDED, width=EXTENDED)[0]["metrics/valid/loss"])
        loss = study.data["valid/loss"].values
        assert loss.tobytes() == whole[: study.num_trials].tobytes()

    def check_whole(self):
        """Everything is there."""
        self.check([("trials", EXTENDED), *(("block", i) for i in range(EXTENDED // WIDTH))])
        assert load_study(self.directory).num_trials == EXTENDED


class Saving:
    """A study that is saved by `Study.save`, and saved again with more trials.

    Args:
      directory: the study directory.
    """

    def __init__(self, directory):
        self.directory = directory

    @staticmethod
    def study(num_trials):
        rates = np.float32(0.5) ** np.arange(1, num_trials + 1, dtype=np.float32)
        return pbx.Study.from_arrays(
            {"learning_rate": rates},
            {"valid/loss": np.stack([rates, 2 * rates], axis=1)},
            np.array([0, 10]),
            objective="valid/loss",
        )

    def tell(self, done=lambda what: None):
        """Saves it; the same call continues."""
        self.study(BEGUN).save(self.directory)
        done(("trials", BEGUN))

    def check(self, done):
        """What is there is what was saved."""
        try:
            study = load_study(self.directory)
        except storage.NoStudy:
            assert not done
            return
        assert study.num_trials in ((BEGUN,) if done else (0, BEGUN))
        if study.num_trials:
            loss = self.study(BEGUN).data["valid/loss"].values
            assert study.data["valid/loss"].values.tobytes() == loss.tobytes()

    def check_whole(self):
        """Everything is there."""
        self.check([("trials", BEGUN)])


class Saves:
    """Saves inside a block.

    Args:
      directory: the study directory.
      steps: of the saves.
    """

    def __init__(self, directory, steps=(10, 20, 30)):
        self.directory = directory
        self._steps = steps
        self._saves = checkpoints.Checkpoints(directory, "blocks-1")

    @staticmethod
    def arrays(step):
        draw = np.random.default_rng(step)
        return [draw.normal(size=(3, 5)).astype(np.float32), np.int32(step) * np.ones(3, np.int32)]

    @staticmethod
    def meta(step):
        return {"blocks": [1], "position": {"state": {"next": step}}}

    def tell(self, done=lambda what: None):
        """Saves at each step that is not there yet; the same call continues."""
        checkpoints.remove_temporary_folders(self.directory)
        newest = self.newest()
        for step in self._steps:
            if step > newest:
                self._saves.write(step, self.arrays(step), self.meta(step))
            done(("step", step))

    def newest(self):
        """The step of the newest save, which is what was saved; -1 if there is none."""
        found = self._saves.read_newest(self.arrays(0))
        if found is None:
            return -1
        step, arrays, meta = found
        assert meta == self.meta(step)
        for one, other in zip(arrays, self.arrays(step), strict=True):
            assert (one.dtype, one.tobytes()) == (other.dtype, other.tobytes())
        return step

    def check(self, done):
        """The newest save is what was saved, and none that was finished is missing."""
        newest, promised = self.newest(), max((step for _, step in done), default=-1)
        assert newest >= promised, f"the save of step {promised} is lost, {newest} is there"

    def check_whole(self):
        """The last save is there."""
        assert self.newest() == self._steps[-1]
