"""Model weights as flat named arrays, with a description in JSON that rebuilds their tree."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

_LEAF, _NONE, _DICT, _LIST, _TUPLE, _NODE = "leaf", "none", "dict", "list", "tuple", "node"
_KINDS = (_LEAF, _NONE, _DICT, _LIST, _TUPLE, _NODE)
# Of a description from a file: what `rebuild_tree` can go down, and what its paths may take.
_MAX_DEPTH, _MAX_LETTERS = 200, 2**26


def _key_of(entry: Any) -> str | int | bool:
    """The name of one child: a dictionary's key, a position or an attribute's name."""
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            key = getattr(entry, attribute)
            return key if isinstance(key, (str, int)) else str(key)
    return str(entry)


def _join(path: str, key: Any) -> str:
    # As in a JSON pointer, so that no key can imitate a path.
    name = str(key).replace("~", "~0").replace("/", "~1") or "~2"
    return f"{path}/{name}" if path else name


def _children(node: Any) -> tuple[str, list[tuple[Any, Any]]]:
    """The kind of a pytree node and its children, one level deep."""
    if node is None:
        return _NONE, []
    if type(node) is dict and all(isinstance(key, (str, int)) for key in node):
        return _DICT, list(node.items())
    if type(node) is list:
        return _LIST, list(enumerate(node))
    if type(node) is tuple:
        return _TUPLE, list(enumerate(node))
    if jax.tree_util.all_leaves([node]):
        return _LEAF, []
    below = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda x: x is not node)
    keyed = [(_key_of(path[0]) if path else "", child) for path, child in below]
    if len({str(key) for key, _ in keyed}) < len(keyed):
        keyed = [(index, child) for index, (_, child) in enumerate(keyed)]
    return _NODE, keyed


def describe_tree(tree: Any) -> list[list[Any]]:
    """Describes a pytree's structure in JSON, without its arrays.

    Args:
      tree: a pytree; its leaves may be arrays, tracers or `jax.ShapeDtypeStruct`.

    Returns:
      The nodes in depth-first order, each ``[kind, keys]`` with kind ``leaf``, ``none``, ``dict``,
      ``list``, ``tuple`` or ``node`` (any other registered type, rebuilt as a dictionary).

    Example:
      >>> describe_tree({"w": 1.0, "b": None})
      [['dict', ['w', 'b']], ['leaf', []], ['none', []]]
    """
    kind, children = _children(tree)
    description = [[kind, [key for key, _ in children]]]
    for _, child in children:
        description += describe_tree(child)
    return description


def flatten_tree(tree: Any, path: str = "") -> dict[str, Any]:
    """Names every leaf of a pytree by its path.

    Args:
      tree: a pytree.
      path: a prefix for the names; "" for none.

    Returns:
      Path to leaf, in depth-first order; keys are joined by ``/``, a ``/`` inside a key is ``~1``,
      a ``~`` is ``~0`` and an empty key is ``~2``. A bare leaf has the path "".

    Example:
      >>> flatten_tree({"layer": {"w": 1.0}, "scales": (2.0, 3.0)})
      {'layer/w': 1.0, 'scales/0': 2.0, 'scales/1': 3.0}
    """
    kind, children = _children(tree)
    if kind == _LEAF:
        return {path: tree}
    flat: dict[str, Any] = {}
    for key, child in children:
        flat |= flatten_tree(child, _join(path, key))
    return flat


def leaf_paths(description: Any) -> list[str]:
    """The names that `flatten_tree` gives to the arrays of a tree, from its description alone.

    Args:
      description: from a file, perhaps anybody's.

    Returns:
      The paths of the leaves, in depth-first order.

    Raises:
      ValueError: it is none that `describe_tree` makes, or one too deep or too long to be rebuilt.

    Example:
      >>> leaf_paths(describe_tree({"layer": {"w": 1.0}, "scales": (2.0, None)}))
      ['layer/w', 'scales/0']
    """
    if type(description) is not list or not description:
        raise ValueError("the description of the weights is not a list of nodes.")
    paths, letters = [], 0
    # Of each node on the way down, its path and the keys of the children that are still to come.
    above: list[tuple[str, list[Any]]] = [("", [""])]
    for node in description:
        while above and not above[-1][1]:
            above.pop()
        if not above:
            raise ValueError("the description of the weights goes on after its end.")
        if type(node) is not list or len(node) != 2 or node[0] not in _KINDS:
            raise ValueError("the description of the weights has a node of unknown kind.")
        kind, keys = node
        if type(keys) is not list or not all(isinstance(key, (str, int)) for key in keys):
            raise ValueError("the description of the weights has keys that are no names.")
        if keys and kind in (_LEAF, _NONE):
            raise ValueError("the description of the weights has a leaf with children.")
        path, left = above[-1]
        key = left.pop()
        path = _join(path, key) if len(above) > 1 else ""
        letters += len(path)
        if len(above) > _MAX_DEPTH or letters > _MAX_LETTERS:
            raise ValueError("the description of the weights is too deep or too long.")
        if kind == _LEAF:
            paths.append(path)
        above.append((path, keys[::-1]))
    if any(left for _, left in above):
        raise ValueError("the description of the weights ends early.")
    return paths


def rebuild_tree(description: Sequence[Sequence[Any]], arrays: Mapping[str, Any]) -> Any:
    """Puts arrays back into the tree that `describe_tree` described.

    Args:
      description: what `describe_tree` returned, also after a round trip through JSON.
      arrays: what `flatten_tree` returned.

    Returns:
      The tree; dictionaries, lists, tuples and None as they were, other nodes as dictionaries.

    Raises:
      ValueError: the description is malformed, or an array it names is missing.
    """
    nodes = iter(description)

    def build(path: str) -> Any:
        try:
            kind, keys = next(nodes)
        except (StopIteration, TypeError, ValueError):
            raise ValueError(f"the description of the weights ends early, at {path!r}.") from None
        if kind == _NONE:
            return None
        if kind == _LEAF:
            if path not in arrays:
                raise ValueError(f"the array {path!r} of the weights is missing.")
            return arrays[path]
        children = [(key, build(_join(path, key))) for key in keys]
        if kind in (_DICT, _NODE):
            return dict(children)
        if kind == _LIST:
            return [child for _, child in children]
        if kind == _TUPLE:
            return tuple(child for _, child in children)
        raise ValueError(f"the description of the weights has the unknown kind {kind!r}.")

    tree = build("")
    if next(nodes, None) is not None:
        raise ValueError("the description of the weights goes on after its end.")
    return tree


def restore_like(like: Any, arrays: Mapping[str, Any]) -> Any:
    """Puts arrays into a tree of exactly the types of `like`.

    Args:
      like: a pytree of the same structure; the values of its leaves do not matter.
      arrays: what `flatten_tree` returned for a tree of that structure.

    Returns:
      The tree.

    Raises:
      ValueError: the paths of `like` are not those of `arrays`.
    """
    wanted = flatten_tree(like)
    if set(wanted) != set(arrays):
        raise ValueError(
            f"weights_like does not have the structure of the stored weights: only stored "
            f"{sorted(set(arrays) - set(wanted))}, only in weights_like "
            f"{sorted(set(wanted) - set(arrays))}."
        )

    # flatten_tree keeps the order of insertion, JAX sorts: find each leaf by a number in its place.
    leaves, structure = jax.tree.flatten(like)
    order = flatten_tree(jax.tree.unflatten(structure, range(len(leaves))))
    paths = {number: path for path, number in order.items()}
    return jax.tree.unflatten(structure, [arrays[paths[n]] for n in range(len(leaves))])
