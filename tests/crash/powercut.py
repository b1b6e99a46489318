"""What a disk may hold after a power cut: system calls are recorded, and the cut comes anywhere.

A `Recorder` watches a directory while something is stored in it, and takes down every change in
the order in which it came: what a file holds, which names a directory has, what was synced. A
`Disk` replays them up to any of them and says what POSIX allows a disk to hold then: the names of a
directory that was not synced since are there or not, each by itself, and of a file that was not
synced there is all, a part, as many zeros, or nothing.

A change is found by looking at the directory before and after each call, so that what a library
writes from C++ is seen as well; it counts as not synced until a file is.
"""

import builtins
import contextlib
import io
import itertools
import os
import pathlib
import random
import stat
import threading

_CHANGES = ("fsync", "link", "rename", "replace", "unlink", "remove", "mkdir", "rmdir")
ROOT = 0


class Interposed:
    """Calls a function in the place of system calls, while it is entered.

    Args:
      names: functions of `os`, or ``"open"`` for that of Python.
      hook: ``hook(name, call, arguments)`` calls `call()` or not, and returns what it returned.
    """

    def __init__(self, names, hook):
        self._names, self._hook = names, hook
        self._originals = []

    def _replaced(self, name, original):
        def call(*args, **kwargs):
            return self._hook(name, lambda: original(*args, **kwargs), args)

        return call

    def __enter__(self):
        for name in self._names:
            places = [builtins, io] if name == "open" else [os]
            for place in places:
                self._originals.append((place, name, getattr(place, name)))
        for place, name, original in self._originals:
            setattr(place, name, self._replaced(name, original))
        return self

    def __exit__(self, *exc):
        for place, name, original in self._originals:
            setattr(place, name, original)


def path_of(argument):
    """The path that the first argument of a system call names; of a descriptor, what it is of."""
    if isinstance(argument, int):
        argument = os.readlink(f"/proc/self/fd/{argument}")
    return pathlib.Path(os.path.abspath(os.fsdecode(argument)))


class Recorder:
    """Takes down what happens below a directory, while it is entered.

    Args:
      root: the directory; what it holds already is on the disk.

    Attributes:
      events: ("write", node, content), ("folder", node), ("names", folder, gone, come),
        ("sync", node) and ("done", what). Nodes are numbers; the root's is `ROOT`.
    """

    def __init__(self, root):
        self.root = pathlib.Path(root)
        self.events = []
        self._nodes = {}
        self._numbers = itertools.count(ROOT)
        self._contents = {}
        self._names = {}
        self._lock = threading.RLock()
        self._looking = False
        self._calls = Interposed(_CHANGES, self._call)
        self._look()
        for node in list(self._names) + list(self._contents):
            self.events.append(("sync", node))

    def __enter__(self):
        self._calls.__enter__()
        return self

    def __exit__(self, *exc):
        self._calls.__exit__(*exc)

    def done(self, what):
        """Notes that a call has returned: from now on its effect must not be lost."""
        with self._lock:
            self._look()
            self.events.append(("done", what))

    def _call(self, name, call, args):
        if self._looking:
            return call()
        with self._lock:
            self._look()
            node = self._node(os.fstat(args[0])) if name == "fsync" else None
            try:
                return call()
            finally:
                self._look()
                if node is not None:
                    self.events.append(("sync", node))

    def _node(self, status):
        return self._nodes.get((status.st_dev, status.st_ino))

    def _look(self):
        """Compares what is there with what was there."""
        self._looking = True
        try:
            seen, names = {}, {}
            self._walk(self.root, seen, names)
            # The number of a file that is gone may be given to the next one.
            self._nodes = {key: node for key, node in self._nodes.items() if key in seen}
            for key, content in seen.items():
                if key not in self._nodes:
                    self._nodes[key] = next(self._numbers)
                    if content is None:
                        self.events.append(("folder", self._nodes[key]))
                node = self._nodes[key]
                if content is not None and self._contents.get(node) != content:
                    self._contents[node] = content
                    self.events.append(("write", node, content))
            for key, inside in names.items():
                folder = self._nodes[key]
                now = {name: self._nodes[child] for name, child in inside.items()}
                before = self._names.get(folder, {})
                gone = [name for name in before if before[name] != now.get(name)]
                come = {name: node for name, node in now.items() if before.get(name) != node}
                self._names[folder] = now
                if gone or come:
                    self.events.append(("names", folder, gone, come))
        finally:
            self._looking = False

    def _walk(self, path, seen, names):
        status = os.lstat(path)
        key = (status.st_dev, status.st_ino)
        if stat.S_ISDIR(status.st_mode):
            seen[key] = None
            inside = names[key] = {}
            for name in sorted(os.listdir(path)):
                child = path / name
                # Another thread may have moved it meanwhile; then it is seen next time.
                with contextlib.suppress(FileNotFoundError):
                    inside[name] = self._walk(child, seen, names)
        else:
            seen[key] = path.read_bytes()
        return key


class Disk:
    """Events replayed so far, and what of them would be there after a power cut."""

    def __init__(self):
        self.done = []
        self._folders = set()
        self._written, self._synced = {}, {}
        self._kept, self._pending = {}, {}

    def apply(self, event):
        kind, *rest = event
        if kind == "done":
            self.done.append(rest[0])
        elif kind == "folder":
            self._folders.add(rest[0])
            self._kept[rest[0]], self._pending[rest[0]] = {}, []
        elif kind == "write":
            self._written[rest[0]] = rest[1]
        elif kind == "names":
            folder, gone, come = rest
            self._pending[folder].append((gone, come))
        elif rest[0] in self._folders:
            (folder,) = rest
            self._kept[folder] = self._names(folder, self._pending[folder])
            self._pending[folder] = []
        elif rest[0] is not None:
            self._synced[rest[0]] = self._written[rest[0]]

    def _names(self, folder, changes):
        names = dict(self._kept[folder])
        for gone, come in changes:
            for name in gone:
                names.pop(name, None)
            names.update(come)
        return names

    def trees(self, thorough=False, seed=0):
        """What may be there: every one of these is a dict of path to content, None for a folder.

        Args:
          thorough: each change of names is lost alone, kept alone and the last to be kept, and
            many combinations are drawn; otherwise all are lost, or none.
          seed: of what is drawn.
        """
        contents = [self._torn(0.0), self._torn(0.5), self._torn(1.0), self._zeros]
        choices = [lambda folder, number: False, lambda folder, number: True]
        if thorough:
            for folder, changes in self._pending.items():
                for i in range(len(changes)):
                    choices += [
                        lambda f, n, folder=folder, i=i: f != folder or n != i,
                        lambda f, n, folder=folder, i=i: f != folder or n == i,
                        lambda f, n, folder=folder, i=i: f != folder or n <= i,
                    ]
        for chosen, content in itertools.product(choices, contents):
            yield self._tree(chosen, content)
        if thorough:
            for draw in map(random.Random, range(seed, seed + 20)):
                yield self._tree(
                    lambda folder, number, draw=draw: draw.random() < 0.5,
                    lambda node, draw=draw: draw.choice(contents)(node),
                )

    def _torn(self, share):
        def content(node):
            written = self._written[node]
            if self._synced.get(node) == written:
                return written
            return written[: int(share * len(written))]

        return content

    def _zeros(self, node):
        written = self._written[node]
        return written if self._synced.get(node) == written else bytes(len(written))

    def _tree(self, chosen, content):
        tree, waiting = {}, [(pathlib.PurePath(), ROOT)]
        while waiting:
            path, folder = waiting.pop()
            changes = [
                change for i, change in enumerate(self._pending[folder]) if chosen(folder, i)
            ]
            for name, node in self._names(folder, changes).items():
                if node in self._folders:
                    tree[path / name] = None
                    waiting.append((path / name, node))
                else:
                    tree[path / name] = content(node)
        return tree


def build(tree, place):
    """Makes a directory of what a disk may hold."""
    os.mkdir(place)
    for path, content in sorted(tree.items()):
        if content is None:
            (place / path).mkdir()
        else:
            (place / path).write_bytes(content)


def check_after_every_cut(events, place, check, thorough=False):
    """Cuts the power after every event, and checks all that may be on the disk then.

    Args:
      events: what a `Recorder` took down.
      place: an empty folder.
      check: ``check(directory, done)`` raises `AssertionError` for what must not be; `done` has
        what the recorder was told.
      thorough: see `Disk.trees`.

    Returns:
      How many events and how many different disks there were.
    """
    disk, seen = Disk(), set()
    for number, event in enumerate(events):
        disk.apply(event)
        for tree in disk.trees(thorough, seed=1000 * number):
            known = (len(disk.done), frozenset((path, content) for path, content in tree.items()))
            if known in seen:
                continue
            seen.add(known)
            directory = place / f"disk-{len(seen)}"
            build(tree, directory)
            try:
                check(directory, list(disk.done))
            except Exception as error:
                raise AssertionError(
                    f"after event {number}, {event[:3]!r:.200}, with {disk.done} done, the disk "
                    f"{sorted(map(str, tree))} in {directory}: {type(error).__name__}: {error}"
                ) from error
    return len(events), len(seen)
