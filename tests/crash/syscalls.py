"""Functions of our own in the place of system calls: to watch them, or to let them fail."""

import builtins
import io
import os
import pathlib

EVERY = (
    *("open", "read", "write", "os.open", "os.fsync", "os.posix_fallocate"),
    *("os.link", "os.rename", "os.replace", "os.unlink", "os.mkdir", "os.rmdir"),
    *("os.listdir", "os.scandir"),
)


class Interposed:
    """Calls a function in the place of system calls, while it is entered.

    Args:
      names: such as ``"os.fsync"``; ``"open"`` is that of Python, and ``"read"`` and ``"write"``
        those of the files that it opens.
      hook: ``hook(name, call, args, kwargs)`` calls `call()` or not, and returns a result.
    """

    def __init__(self, names, hook):
        self._names, self._hook = names, hook
        self._originals = []

    def _replaced(self, name, original):
        def call(*args, **kwargs):
            return self._hook(name, lambda: original(*args, **kwargs), args, kwargs)

        def opened(*args, **kwargs):
            return _File(call(*args, **kwargs), self._hook, args[0])

        return opened if name == "open" and {"read", "write"} & {*self._names} else call

    def __enter__(self):
        for name in self._names:
            if name == "open":
                self._originals += [(place, name, place.open) for place in (builtins, io)]
            elif name.startswith("os."):
                bare = name.removeprefix("os.")
                self._originals.append((os, bare, getattr(os, bare)))
        for place, name, original in self._originals:
            full = name if place in (builtins, io) else f"os.{name}"
            setattr(place, name, self._replaced(full, original))
        return self

    def __exit__(self, *exc):
        for place, name, original in self._originals:
            setattr(place, name, original)


class _File:
    """An open file whose reads and writes go through the hook."""

    def __init__(self, file, hook, path):
        self._file, self._hook, self._path = file, hook, path

    def _through(self, name, method, *args):
        return self._hook(name, lambda: method(*args), (self._path,), {})

    def write(self, content):
        return self._through("write", self._file.write, content)

    def read(self, *args):
        return self._through("read", self._file.read, *args)

    def readinto(self, into):
        return self._through("read", self._file.readinto, into)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __iter__(self):
        return iter(self._file)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *exc):
        return self._file.__exit__(*exc)


def path_of(args, kwargs):
    """The path that a call is about, or None; of a descriptor, what it is of."""
    first = args[0] if args else kwargs.get("path", ".")
    try:
        if isinstance(first, int):
            return pathlib.Path(os.readlink(f"/proc/self/fd/{first}"))
        folder = kwargs.get("dir_fd") or kwargs.get("src_dir_fd")
        above = "." if folder is None else os.readlink(f"/proc/self/fd/{folder}")
        return pathlib.Path(os.path.abspath(os.path.join(above, os.fsdecode(first))))
    except (OSError, TypeError):
        return None


class OneFails(Interposed):
    """Lets the n-th system call below a directory fail, while it is entered.

    Args:
      root: the directory.
      number: which call, from 0.
      code: its ``errno``.
      names: which calls are counted.

    Attributes:
      failed: name and path of the call that failed, or None if there were fewer.
    """

    def __init__(self, root, number, code, names=EVERY):
        super().__init__(names, self._call)
        self._root, self._left, self._code = pathlib.Path(root), number, code
        self.failed = None

    def _call(self, name, call, args, kwargs):
        path = path_of(args, kwargs)
        if path is None or not path.is_relative_to(self._root):
            return call()
        self._left -= 1
        if self._left != -1:
            return call()
        self.failed = name, path
        raise OSError(self._code, os.strerror(self._code), str(path))
