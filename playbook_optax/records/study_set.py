"""Several studies that belong together: one for each value of a scientific hyperparameter."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from playbook_optax import _checks, _shown
from playbook_optax._text import PARAGRAPH, printable
from playbook_optax.records import schema, storage
from playbook_optax.records.picture import picture_of
from playbook_optax.records.study import (
    BestTrial,
    NoFeasibleTrial,
    Study,
    best_text,
    infeasible_text,
    load_study,
    size_text,
)

if TYPE_CHECKING:
    import pandas

INDEX = "studies.json"
MAX_LABELS = 10_000
# Of a printed set, so that each study has room on the screen.
_MOST_ROWS = 18
SCIENTIFIC = "study"
"""What the labels of a set are values of, unless it is said."""


class StudySet(Mapping[str, Study]):
    """Label to study, one for each value of a scientific hyperparameter; read-only.

    Made by `run_studies` and `load_study_set`. The hyperparameters of its spaces are the nuisance
    ones, optimized over for each value; those that only some of the spaces have are conditional.

    Attributes:
      scientific: what the labels are values of, such as "optimizer".
      fixed: label to the hyperparameters that were fixed in its study, name to number.
      missing: labels of studies that are not there yet.

    Source: playbook, "Identifying scientific, nuisance, and fixed hyperparameters".
    """

    def __init__(
        self,
        studies: Mapping[str, Study],
        scientific: str = SCIENTIFIC,
        fixed: Mapping[str, Mapping[str, float | int]] | None = None,
        missing: tuple[str, ...] = (),
    ) -> None:
        """Takes finished studies.

        Args:
          studies: label to study.
          scientific: what the labels are values of.
          fixed: label to what was fixed in its study.
          missing: labels without a study.

        Raises:
          ValueError: a label is not a non-empty string, or has no study.
        """
        for label in studies:
            check_label("studies", label)
        for label in fixed or {}:
            if label not in studies and label not in missing:
                raise ValueError(
                    f"fixed[{label!r}] belongs to no study: {_checks.nearest(label, studies)}"
                )
        self._studies = dict(studies)
        self.scientific = check_label("scientific", scientific)
        # In the order of the index, where one is given: it decides the folders.
        order = dict.fromkeys((*(fixed or {}), *studies, *missing))
        self.fixed = {label: dict((fixed or {}).get(label, {})) for label in order}
        self.missing = tuple(missing)

    def __getitem__(self, label: str) -> Study:
        return self._studies[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self._studies)

    def __len__(self) -> int:
        return len(self._studies)

    def __repr__(self) -> str:
        return _shown.as_text(*self._summary())

    def _repr_html_(self) -> str:
        return _shown.as_html(*self._summary(), picture_of(self))

    def _summary(self) -> tuple[str, _shown.Rows]:
        """What each study came to, a row each."""
        count = "1 study" if len(self) == 1 else f"{len(self)} studies"
        rows = []
        for label, study in itertools.islice(self.items(), _MOST_ROWS):
            told = f"{size_text(study)}; best {printable(study.objective)}: "
            bad = f"; infeasible: {infeasible_text(study) or 'none'}"
            rows.append((printable(label, 30), told + best_text(study) + bad))
        room = _MOST_ROWS - len(rows)
        rows += [(printable(label, 30), "not there yet") for label in self.missing[:room]]
        more = len(self) + len(self.missing) - len(rows)
        if more:
            rows.append(("…", f"{more} more"))
        return f"StudySet by {printable(self.scientific)}: {count}", rows

    @property
    def nuisance(self) -> tuple[str, ...]:
        """The hyperparameters that every study varies."""
        names = [list(study.points) for study in self.values()]
        return tuple(n for n in (names[0] if names else []) if all(n in other for other in names))

    @property
    def conditional(self) -> dict[str, tuple[str, ...]]:
        """The hyperparameters that only some of the studies vary, with the labels of those."""
        everywhere = self.nuisance
        found: dict[str, tuple[str, ...]] = {}
        for label, study in self.items():
            for name in study.points:
                if name not in everywhere:
                    found[name] = (*found.get(name, ()), label)
        return found

    @property
    def cost(self) -> int:
        """Trial-steps of all studies together."""
        return sum(
            study.num_trials * study.num_seeds * int(study.data["step"].values[-1])
            for study in self.values()
            if study.num_trials
        )

    def best(
        self, objective: str | None = None, maximize: bool | None = None
    ) -> tuple[str, BestTrial]:
        """The best trial of all studies; whether its value is better than others, ask isolation.

        Args:
          objective: a recorded metric; each study's own by default.
          maximize: whether larger is better; see `Study.best`.

        Returns:
          The label of its study, and the trial. Ties go to the first study.

        Raises:
          NoFeasibleTrial: no study has a feasible trial.
          ValueError: no such metric, or studies with different objectives.
        """
        found: list[tuple[str, BestTrial]] = []
        for label, study in self.items():
            try:
                found.append((label, study.best(objective, maximize)))
            except NoFeasibleTrial:
                continue
        if not found:
            raise NoFeasibleTrial(
                f"No study of {printable(', '.join(self), PARAGRAPH)} has a feasible trial."
            )
        kinds = {(best.objective, best.maximize) for _, best in found}
        if len(kinds) > 1:
            raise ValueError(
                f"objective differs between the studies: {sorted(kinds)}; give objective= and "
                "maximize=."
            )
        return min(found, key=lambda pair: -pair[1].value if pair[1].maximize else pair[1].value)

    def point(self, label: str, trial: int) -> dict[str, Any]:
        """All hyperparameters of a trial, the fixed ones included.

        Args:
          label: of its study.
          trial: its index.

        Returns:
          Name to number, as `make_optimizer` saw them.

        Raises:
          KeyError: there is no such study.
          IndexError: there is no such trial.
        """
        return {**self.fixed[label], **self[label].point(trial)}

    def to_dataframe(self) -> pandas.DataFrame:
        """One table of all trials, with a column for the scientific hyperparameter.

        Returns:
          The tables of `Study.to_dataframe` one below the other; empty where a study does not vary
          a conditional hyperparameter.
        """
        import pandas

        frames = []
        for label, study in self.items():
            frame = study.to_dataframe()
            frame.insert(0, self.scientific, label)
            frames.append(frame)
        return pandas.concat(frames, ignore_index=True)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Stores all studies, each in a numbered folder, and an index; `load_study_set` reads it.

        Args:
          directory: made when missing. Saving again into the set's own directory is legal.

        Raises:
          StorageError: the directory holds another set or study, or cannot be written.
        """
        labels = list(self.fixed)
        write_index(directory, self.scientific, labels, self.fixed)
        for label, study in self.items():
            index = labels.index(label)
            bound = {**study.spec, "member": member(self.scientific, label, index)}
            dataclasses.replace(study, spec=bound).save(folder(directory, index))


def check_label(name: str, label: Any) -> str:
    """A label as text: a name for people, never a path.

    Args:
      name: the argument's name.
      label: what was given.

    Returns:
      The label.

    Raises:
      ValueError: it is not a non-empty string of at most 200 characters.
    """
    if not isinstance(label, str):
        raise _checks.ArgumentTypeError(
            f"{name} must be labelled by strings, got {label!r}; write {str(label)!r}."
        )
    if not label or len(label) > 200:
        raise ValueError(f"{name} needs a label of 1 to 200 characters, got {label!r}.")
    return label


def member(scientific: str, label: str, index: int) -> dict[str, Any]:
    """What a study's spec says of the set that it belongs to.

    Args:
      scientific: what the labels are values of.
      label: of the study.
      index: of its folder.

    Returns:
      An entry of the spec, and so part of the study's identity.
    """
    return {"scientific": scientific, "label": label, "index": index}


def folder(directory: str | os.PathLike[str], index: int) -> Path:
    """The folder of one study of a set, named by its index only.

    Args:
      directory: of the set.
      index: of the study.

    Returns:
      The path.
    """
    return storage.root(directory) / f"study-{index:04d}"


def write_index(
    directory: str | os.PathLike[str],
    scientific: str,
    labels: Sequence[str],
    fixed: Mapping[str, Mapping[str, Any]],
) -> None:
    """Writes the index of a set, or adds studies to the one that is there.

    Args:
      directory: of the set; made when missing.
      scientific: what the labels are values of.
      labels: in order.
      fixed: label to what is fixed.

    Raises:
      StorageError: another set is there, or the directory cannot be written.
    """
    for i in range(len(labels)):
        if folder(directory, i).is_symlink():
            raise storage.NotWritable(
                f"{str(folder(directory, i))!r} is a symbolic link: nothing is written outside the "
                "directory of the set. Replace it by a real directory."
            )
    content = {
        "scientific": scientific,
        "labels": list(labels),
        "fixed": [
            {name: _plain(value) for name, value in fixed.get(label, {}).items()}
            for label in labels
        ],
    }
    path = storage.root(directory) / INDEX
    try:
        stored = _read_index(path)
    except storage.NoStudy:
        stored = None
    if stored is not None:
        for part, now in content.items():
            before = stored[part]
            num = len(before)
            same = before == now if isinstance(now, str) else before == now[:num]
            if not same:
                raise storage.StorageError(
                    f"{os.fspath(directory)!r} holds another set of studies: {part} is {before!r} "
                    f"there and {now!r} here. Choose an empty directory, or append new variants "
                    "after the old ones."
                )
        if len(stored["labels"]) == len(content["labels"]):
            return
    storage.write_document(path, content)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _read_index(path: Path) -> dict[str, Any]:
    """The index, every part of it checked."""
    document = storage.read_document(path)
    labels, fixed = document.get("labels"), document.get("fixed")
    scientific = document.get("scientific")
    sound = (
        isinstance(scientific, str)
        and 0 < len(scientific) <= 200
        and isinstance(labels, list)
        and isinstance(fixed, list)
        and len(labels) == len(fixed) <= MAX_LABELS
        and all(isinstance(label, str) and 0 < len(label) <= 200 for label in labels)
        and len(set(labels)) == len(labels)
        and all(
            isinstance(part, dict) and all(schema.is_number(value) for value in part.values())
            for part in fixed
        )
    )
    if not sound:
        raise storage.CorruptSpec(
            f"{str(path)!r} is not the index of a set of studies. Restore it from a copy; the "
            "studies beside it can be read one by one with load_study."
        )
    return {"scientific": scientific, "labels": labels, "fixed": fixed}


@_checks.named_arguments
def load_study_set(
    directory: str | os.PathLike[str], *, weights_like: Mapping[str, Any] | None = None
) -> StudySet:
    """Reads a stored set of studies back; its directory may have moved since.

    Args:
      directory: of the set.
      weights_like: as in `load_study`.

    Returns:
      The StudySet, with those of its studies that have begun; the others are its `missing`.

    Raises:
      NoStudy: there is no set.
      CorruptSpec, CorruptBlock: a file is damaged; nothing is read silently wrong.
      NewerFormat: a newer version of this package wrote it.

    Example:
      >>> import tempfile, numpy as np
      >>> import playbook_optax as pbx
      >>> study = pbx.Study.from_arrays(
      ...     {"learning_rate": np.array([0.1])}, {"loss": np.ones((1, 1))}, [10], objective="loss")
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     pbx.StudySet({"adam": study}, "optimizer").save(directory)
      ...     stored = pbx.load_study_set(directory)
      >>> stored.scientific, list(stored), stored.best()[1].value
      ('optimizer', ['adam'], 1.0)

    Source: playbook, "Identifying scientific, nuisance, and fixed hyperparameters".
    """
    index = _read_index(storage.root(directory) / INDEX)
    studies, missing = {}, []
    for i, label in enumerate(index["labels"]):
        try:
            study = load_study(folder(directory, i), weights_like=weights_like)
        except storage.NoStudy:
            missing.append(label)
            continue
        bound = study.spec["schema_version"] > 1
        if bound and study.spec.get("member") != member(index["scientific"], label, i):
            raise storage.CorruptSpec(
                f"{str(folder(directory, i))!r} holds another study than the {label!r} of this "
                "set: it was copied here, or the index was. Restore it from a copy."
            )
        studies[label] = study
    fixed = dict(zip(index["labels"], index["fixed"], strict=True))
    return StudySet(studies, index["scientific"], fixed, tuple(missing))
